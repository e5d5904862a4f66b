"""How the scripts start: at once where nothing has to be computed, with torchvision only where it is needed, and ended
by Ctrl-C in one line at any moment.
"""

import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from helpers import ROOT, import_script, obey_ctrl_c, run_command

import arguments
import checkpoint
import data
import downloads
import vector_quantizer

SCRIPTS = ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py", "evaluate.py", "codes.py", "figures.py",
           "testers.py", "benchmarks/speed.py")
HEAVY = "torch", "torchvision", "numpy", "PIL", "tensorboard", "tqdm", "matplotlib"


@pytest.fixture(scope="module")
def unwanted(tmp_path_factory):
    """A folder for PYTHONPATH whose packages, named as the large ones, end the script that imports them."""
    folder = tmp_path_factory.mktemp("unwanted")
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name} was imported')")
    return folder


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_mistakes_are_answered_before_anything_large_is_imported(script, unwanted, tmp_path):
    shown = run_command(sys.executable, ROOT / script, "--help", cwd=tmp_path, PYTHONPATH=str(unwanted))
    assert shown.returncode == 0 and "--help" in shown.stdout and not shown.stderr
    wrong = run_command(sys.executable, ROOT / script, "--helq", "3", cwd=tmp_path, PYTHONPATH=str(unwanted))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and ": error: " in wrong.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["generate.py", "--input", "test", "--label", "3"], ["generate.py", "--input", "random", "--originals"],
    ["generate.py", "--input", "nowhere.png"], ["VQ-VAE.py", "--dataset", "MNIST-10k", "--image-size", "32"],
    ["VQ-VAE.py", "--resume", "--overwrite"], ["train_prior.py", "--dropout", "1"], ["evaluate.py", "--seed", "3"],
    ["codes.py", "--decode", "a", "--output", "b", "--part", "test"], ["train_classifier.py", "--batch-size", "1"]])
def test_every_argument_error_is_such_a_mistake(words, unwanted, tmp_path):
    wrong = run_command(sys.executable, ROOT / words[0], *words[1:], cwd=tmp_path, PYTHONPATH=str(unwanted))
    assert wrong.returncode == 2 and wrong.stderr.count("\n") == 1 and ": error: " in wrong.stderr


@pytest.mark.parametrize(("script", "words", "meant"), [
    ("VQ-VAE.py", ["--epochs", "3"], "--num-epochs"), ("VQ-VAE.py", ["--wombat=1"], None),
    ("VQ-VAE.py", ["--batchsize", "3"], "--batch-size"), ("VQ-VAE.py", ["--dataset", "mnist10k"], "MNIST-10k"),
    ("VQ-VAE.py", ["--dataset", "cifar-10"], "CIFAR10"), ("VQ-VAE.py", ["--codebook-update", "emma"], "ema"),
    ("train_prior.py", ["--num_epochs", "3"], "--num-epochs"), ("generate.py", ["--imput", "test"], "--input"),
    ("generate.py", ["--input", "pror"], "prior"), ("evaluate.py", ["--classifer", "x"], "--classifier"),
    ("codes.py", ["--part", "tests", "--output", "x"], "test")])
def test_a_mistyped_flag_or_value_is_answered_with_the_nearest_right_one(script, words, meant, capsys):
    with pytest.raises(SystemExit):
        import_script(script).parse_arguments(words)
    line = capsys.readouterr().err
    assert words[0].partition("=")[0] in line
    assert (f"did you mean {meant}?" in line) if meant else "did you mean" not in line


def test_names_that_parsers_know_without_torch_are_those_of_the_code():
    assert data.DATASETS == ("MNIST-10k", *downloads.SOURCES, "folder") == arguments.DATASETS
    script = import_script("VQ-VAE.py")
    assert script.CODEBOOK_UPDATES == vector_quantizer.CODEBOOK_UPDATES
    assert script.CODEBOOK_INITS == vector_quantizer.CODEBOOK_INITS
    assert set(arguments.DIGIT_SETS) <= set(arguments.DATASETS)


def test_torchvision_is_imported_by_its_own_data_sets_alone(tmp_path):
    program = f"""
import runpy, sys
sys.modules["torchvision"] = None
sys.path.insert(0, {str(ROOT)!r})
for words in (["VQ-VAE.py", "--dataset", "MNIST-10k", "--num-epochs", "1", "--k", "8", "--hidden-size", "4"],
              ["generate.py", "--input", "prior"], ["generate.py", "--dataset", "MNIST-10k"],
              ["evaluate.py", "--model", "models/vqvae/best.pt"],
              ["codes.py", "--model", "models/vqvae/best.pt", "--part", "test", "--output", "codes.npz"]):
    sys.argv = words
    runpy.run_path({str(ROOT)!r} + "/" + words[0], run_name="__main__")
"""
    done = run_command(sys.executable, "-c", program, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "generatedImages" / "prior.png").is_file() and (tmp_path / "codes.npz").is_file()


# ---------------------------------------------------------------- Ctrl-C

@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("module", ["argparse", "torch"])
def test_ctrl_c_during_the_imports_ends_in_one_line(module, script, tmp_path):
    """In a package of the standard library, before the flags are read, and in torch, after that."""
    (tmp_path / f"{module}.py").write_text("import pathlib, time\n"
                                       "pathlib.Path('importing').touch()\n"
                                       "while True:\n"
                                       "    time.sleep(0.01)\n")
    words = [] if script != "codes.py" else ["--output", "x"]
    process = subprocess.Popen([sys.executable, ROOT / script, *words], cwd=tmp_path,
                               env={"PYTHONPATH": str(tmp_path), "MPLCONFIGDIR": str(tmp_path)},       # it may talk
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=obey_ctrl_c)
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    said, line = process.communicate()
    assert (process.returncode, said, line) == (130, "", f"\n{script.rpartition('/')[2]}: interrupted\n")


@pytest.mark.parametrize(("script", "words"), [
    ("VQ-VAE.py", []), ("train_prior.py", ["--model", "model.pt"]), ("evaluate.py", ["--model", "model.pt"]),
    ("generate.py", ["--model", "model.pt"]), ("codes.py", ["--model", "model.pt", "--output", "codes.npz"])])
def test_ctrl_c_while_the_data_is_read_leaves_one_line_alone(script, words, tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    shutil.copy(checkpoint.PRETRAINED, "model.pt")
    monkeypatch.setattr(data, "load", interrupted)
    with pytest.raises(SystemExit) as stopped:
        import_script(script).main(words)
    said = capsys.readouterr()
    assert stopped.value.code == 130 and said.out == "" and re.fullmatch(r"\n.+: interrupted\n", said.err)
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_script_that_is_run_hands_ctrl_c_to_its_work_and_takes_it_back():
    program = f"""
import signal, sys
sys.path.insert(0, {str(ROOT)!r})
from utils import interrupt
interrupt.exit_at_once_from_here()
with interrupt.as_exception():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        print("left in order", flush=True)
signal.raise_signal(signal.SIGINT)
print("never reached")
"""
    done = run_command(sys.executable, "-c", program)
    assert done.returncode == 130 and done.stdout == "left in order\n"
    assert re.fullmatch(r"\n.*: interrupted\n", done.stderr)
