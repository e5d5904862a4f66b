"""Start of the scripts: no heavy imports for --help and usage errors, and a one-line message on Ctrl-C at any time."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, import_script, restore_sigint, run_command, run_script

import checkpoint
import data
import modules
import vector_quantizer
from data import downloads
from utils import arguments

SCRIPTS = ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py", "evaluate.py", "codes.py",
           "export.py", "demo.py", "docs/figures.py", "testers.py", "benchmarks/speed.py", "benchmarks/sizes.py",
           "benchmarks/completions.py", "benchmarks/demo.py", "benchmarks/reproduce.py", "benchmarks/compare.py",
           "benchmarks/quantizers.py")
HEAVY_PACKAGES = "torch", "torchvision", "numpy", "PIL", "tensorboard", "tqdm", "matplotlib", "gradio"


@pytest.fixture(scope="module")
def blocked_packages(tmp_path_factory):
    """A folder for PYTHONPATH with modules that replace heavy packages and exit when imported."""
    folder = tmp_path_factory.mktemp("unwanted")
    for name in HEAVY_PACKAGES:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return folder


@pytest.mark.parametrize("script", [*SCRIPTS, "minimal.py"])
def test_help_and_usage_errors_need_no_heavy_imports(script, blocked_packages, tmp_path):
    help_result = run_command(sys.executable, ROOT / script, "--help", cwd=tmp_path, PYTHONPATH=str(blocked_packages))
    assert help_result.returncode == 0 and "--help" in help_result.stdout and not help_result.stderr
    result = run_command(sys.executable, ROOT / script, "--helq", "3", cwd=tmp_path, PYTHONPATH=str(blocked_packages))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and ": error: " in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("argv", [
    ["generate.py", "--input", "test", "--label", "3"], ["generate.py", "--input", "random", "--originals"],
    ["generate.py", "--input", "nowhere.png"], ["VQ-VAE.py", "--dataset", "MNIST-10k", "--image-size", "32"],
    ["VQ-VAE.py", "--resume", "--overwrite"], ["train_prior.py", "--dropout", "1"], ["evaluate.py", "--seed", "3"],
    ["codes.py", "--decode", "a", "--output", "b", "--part", "test"], ["train_classifier.py", "--batch-size", "1"]])
def test_argument_errors_need_no_heavy_imports(argv, blocked_packages, tmp_path):
    result = run_command(sys.executable, ROOT / argv[0], *argv[1:], cwd=tmp_path, PYTHONPATH=str(blocked_packages))
    assert result.returncode == 2 and result.stderr.count("\n") == 1 and ": error: " in result.stderr


@pytest.mark.parametrize(("script", "argv", "suggestion"), [
    ("VQ-VAE.py", ["--epochs", "3"], "--num-epochs"), ("VQ-VAE.py", ["--wombat=1"], None),
    ("VQ-VAE.py", ["--batchsize", "3"], "--batch-size"), ("VQ-VAE.py", ["--dataset", "mnist10k"], "MNIST-10k"),
    ("VQ-VAE.py", ["--dataset", "cifar-10"], "CIFAR10"), ("VQ-VAE.py", ["--codebook-update", "emma"], "ema"),
    ("train_prior.py", ["--num_epochs", "3"], "--num-epochs"), ("generate.py", ["--imput", "test"], "--input"),
    ("generate.py", ["--input", "pror"], "prior"), ("evaluate.py", ["--classifer", "x"], "--classifier"),
    ("codes.py", ["--part", "tests", "--output", "x"], "test"),
    ("export.py", ["--modle", "y", "--output", "x"], "--model")])
def test_typo_error_suggests_the_nearest_flag_or_value(script, argv, suggestion, capsys):
    with pytest.raises(SystemExit):
        import_script(script).get_parser().parse_args(argv)
    line = capsys.readouterr().err
    assert argv[0].partition("=")[0] in line
    assert (f"did you mean {suggestion}?" in line) if suggestion else "did you mean" not in line


def test_parser_choices_match_the_code():
    assert data.DATASETS == ("MNIST-10k", *downloads.SOURCES, "folder") == arguments.DATASETS
    script = import_script("VQ-VAE.py")
    assert script.CODEBOOK_UPDATES == vector_quantizer.CODEBOOK_UPDATES
    assert script.CODEBOOK_INITS == vector_quantizer.CODEBOOK_INITS
    assert script.DOWNSAMPLES == modules.DOWNSAMPLES and script.LARGEST_SIDE == checkpoint.LARGEST_SIDE
    assert set(arguments.DIGIT_SETS) <= set(arguments.DATASETS)


def test_torchvision_is_needed_only_for_its_data_sets(tmp_path):
    program = f"""
import runpy, sys
sys.modules["torchvision"] = None
sys.path.insert(0, {str(ROOT)!r})
for words in (["VQ-VAE.py", "--dataset", "MNIST-10k", "--num-epochs", "1", "--k", "8", "--hidden-size", "4",
               "--batch-size", "500"],
              ["generate.py", "--input", "prior"], ["generate.py", "--dataset", "MNIST-10k"],
              ["evaluate.py", "--model", "models/vqvae/best.pt"],
              ["codes.py", "--model", "models/vqvae/best.pt", "--part", "test", "--output", "codes.npz"]):
    sys.argv = words
    runpy.run_path({str(ROOT)!r} + "/" + words[0], run_name="__main__")
"""
    result = run_command(sys.executable, "-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "generatedImages" / "prior.png").is_file() and (tmp_path / "codes.npz").is_file()


# ---------------------------------------------------------------- too little memory

@pytest.mark.parametrize(("error", "line"), [
    ("MemoryError", True), ("ImportError('x.so: failed to map segment')", True),
    ("ImportError('no such module')", False)])
def test_too_little_memory_to_load_torch_is_one_line(error, line, tmp_path):
    (tmp_path / "torch.py").write_text(f"raise {error}")
    result = run_command(sys.executable, ROOT / "evaluate.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    if line:
        assert result.returncode == 2 and result.stderr.count("\n") == 1
        assert result.stderr.startswith("evaluate.py: error: memory has run out while torch was loaded")
    else:
        assert result.returncode == 1 and "no such module" in result.stderr and "Traceback" in result.stderr


# ---------------------------------------------------------------- consoles

@pytest.mark.parametrize("script", SCRIPTS)
def test_help_fits_any_encoding(script):
    result = run_command(sys.executable, ROOT / script, "--help", PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "--help" in result.stdout and not result.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no device that is always full")
@pytest.mark.parametrize("streams", ["> /dev/full 2> /dev/full", "2>&-", "| true"])
def test_output_that_nobody_can_read_changes_no_exit_status(streams, tmp_path):
    train = (f"{sys.executable} {ROOT}/VQ-VAE.py --dataset MNIST-10k --num-epochs 1 --k 4 --hidden-size 2 "
             f"--batch-size 3000 --output-folder ünïx {streams}; exit ${{PIPESTATUS[0]}}")
    result = run_command("bash", "-c", train, cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr
    assert checkpoint.load(tmp_path / "models" / "ünïx" / "last.pt")["epoch"] == 1
    wrong = f"{sys.executable} {ROOT}/VQ-VAE.py --k 0 {streams}; exit ${{PIPESTATUS[0]}}"
    assert run_command("bash", "-c", wrong, cwd=tmp_path).returncode == 2


def test_control_characters_in_names_are_not_sent_to_the_console(tmp_path):
    result = run_command(sys.executable, ROOT / "evaluate.py", "--model", "a\x1b[31m\tb\nc", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr == (
        "evaluate.py: error: --model a\\x1b[31m\\tb c: No such file or directory\n")


# ---------------------------------------------------------------- Ctrl-C

@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("module", ["argparse", "torch"])
def test_ctrl_c_during_imports_prints_one_line(module, script, tmp_path):
    """In the standard library, before flags are parsed, and in torch, after that."""
    (tmp_path / f"{module}.py").write_text("import pathlib, time\n"
                                           "pathlib.Path('importing').touch()\n"
                                           "while True:\n"
                                           "    time.sleep(0.01)\n")
    argv = ["--output", "x"] if script in ("codes.py", "export.py") else []
    process = subprocess.Popen([sys.executable, ROOT / script, *argv], cwd=tmp_path,
                               env={"PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)},
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint)
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    number = signal.SIGTERM if script == "VQ-VAE.py" and module == "torch" else signal.SIGINT
    process.send_signal(number)
    output, line = process.communicate()
    assert (process.returncode, output, line) == (128 + number, "", f"\n{script.rpartition('/')[2]}: interrupted\n")


@pytest.mark.parametrize(("script", "argv"), [
    ("VQ-VAE.py", []), ("train_prior.py", ["--model", "model.pt"]), ("evaluate.py", ["--model", "model.pt"]),
    ("generate.py", ["--model", "model.pt"]), ("codes.py", ["--model", "model.pt", "--output", "codes.npz"])])
def test_ctrl_c_while_loading_data_prints_one_line(script, argv, tmp_path, monkeypatch, capsys):
    def raise_interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint.PRETRAINED, "model.pt")
    monkeypatch.setattr(data, "load", raise_interrupt)
    with pytest.raises(SystemExit) as excinfo:
        import_script(script).main(argv)
    captured = capsys.readouterr()
    assert excinfo.value.code == 130 and captured.out == "" and re.fullmatch(r"\n.+: interrupted\n", captured.err)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_signal_while_loading_data_leaves_no_empty_folders(name, tmp_path):
    prepare = {"SIGTERM": terminate_in_load, "SIGHUP": hang_up_in_load}[name]
    result = run_script("VQ-VAE.py", "--output-folder", "new/run", cwd=tmp_path, prepare=prepare)
    assert (result.returncode, result.stdout) == (128 + getattr(signal, name), "")
    assert result.stderr == "\nVQ-VAE.py: interrupted\n" and not list(tmp_path.iterdir())


def terminate_in_load(number=signal.SIGTERM):
    def load(*_):
        assert os.path.isdir("models/new/run")
        os.kill(os.getpid(), number)
        time.sleep(60)
    data.load = load


def hang_up_in_load():
    terminate_in_load(signal.SIGHUP)


def test_signal_is_one_line_where_ctrl_c_is_ignored():
    """As in a shell script's background command."""
    program = f"""
import signal, sys
signal.signal(signal.SIGINT, signal.SIG_IGN)
sys.path.insert(0, {str(ROOT)!r})
from utils import startup
startup.prepare()
signal.raise_signal(signal.SIGINT)
try:
    with startup.as_exception():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
except KeyboardInterrupt as error:
    print("caught", error.args[0], flush=True)
signal.raise_signal(signal.SIGTERM)
"""
    result = run_command(sys.executable, "-c", program)
    assert (result.returncode, result.stdout, result.stderr) == (143, "caught 15\n", "\n-c: interrupted\n")


def test_ctrl_c_raises_keyboard_interrupt_only_inside_the_context():
    program = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from utils import startup
startup.prepare()
with startup.as_exception():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("caught", flush=True)
signal.raise_signal(signal.SIGINT)
print("unreachable")
"""
    result = run_command(sys.executable, "-c", program)
    assert result.returncode == 130 and result.stdout == "caught\n"
    assert re.fullmatch(r"\n.*: interrupted\n", result.stderr)
