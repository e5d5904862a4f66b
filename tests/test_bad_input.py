"""Bad input: one line that names flag and value, exit status 2, and nothing on disk changed."""

import pickle
import shutil

import pytest
import torch
from helpers import give_up_privileges, import_script, refuse, run_script, snapshot, write_mnist

import checkpoint
import inputs

BUNDLED = ("--dataset", "MNIST-10k")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder to stand in, which has to stay as the test leaves it before refuse()."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(trained):
    return trained / "models" / "run" / "best.pt"


# ---------------------------------------------------------------- values of flags

WHOLE = ["0", "-1", "2.5", "many", "", "1e3", "99999999999999999999"]
WRONG = [("VQ-VAE.py", flag, value)
         for flag in ("--hidden-size", "--k", "--batch-size", "--num-epochs", "--num_epoch") for value in WHOLE]
WRONG += [("VQ-VAE.py", flag, value) for flag in ("--num-workers", "--restart-after", "--seed")
          for value in ("-1", "1.5", "none")]
WRONG += [("VQ-VAE.py", "--lr", value) for value in ("0", "-1e-3", "fast", "nan", "inf")]
WRONG += [("VQ-VAE.py", "--beta", value) for value in ("-0.1", "β", "nan", "inf")]
WRONG += [("VQ-VAE.py", "--codebook-init", "random"), ("VQ-VAE.py", "--codebook-update", "adam"),
          ("VQ-VAE.py", "--lr-schedule", "step"), ("VQ-VAE.py", "--dataset", "ImageNet")]
WRONG += [("VQ-VAE.py", "--output-folder", value)
          for value in ("../elsewhere", "/tmp/elsewhere", "a/../../elsewhere", "", ".", "two\nlines")]
WRONG += [(script, flag, value) for script in ("generate.py", "evaluate.py") for flag in ("--hidden-size", "--k")
          for value in WHOLE]
WRONG += [("generate.py", "--input", "noise"), ("generate.py", "--dataset", "ImageNet"),
          ("evaluate.py", "--dataset", "ImageNet")]
WRONG += [("generate.py", "--seed", "-1")]
WRONG += [("generate.py", "--filename", value) for value in ("../elsewhere", "/tmp/elsewhere", "")]
WRONG += [(script, "--device", value) for script in ("VQ-VAE.py", "generate.py", "evaluate.py")
          for value in ("gpu", "cuda:x", "cuda:", "cpu:3", "mps:0", "auto:1")]
WRONG += [("train_prior.py", flag, value) for flag in ("--layers", "--width", "--heads", "--batch-size", "--num-epochs")
          for value in ("0", "2.5", "many")]
WRONG += [("train_prior.py", flag, value) for flag in ("--dropout", "--drop-label") for value in ("-0.1", "1", "nan")]
WRONG += [("train_prior.py", "--shift", "-1"), ("train_prior.py", "--lr", "0"), ("train_prior.py", "--device", "gpu"),
          ("train_classifier.py", "--num-epochs", "0"), ("train_classifier.py", "--device", "gpu"),
          ("train_classifier.py", "--dataset", "ImageNet"), ("evaluate.py", "--seed", "-1"),
          ("codes.py", "--part", "all")]


@pytest.mark.parametrize("script, flag, value", WRONG)
def test_a_wrong_value_is_named_with_its_flag(script, flag, value, folder, capsys):
    arguments = [f"{flag}={value}"] + (list(BUNDLED) if script == "VQ-VAE.py" else ["--model", "x"])
    if flag == "--dataset":
        arguments = arguments[:-2] + arguments[:1]
    line = refuse(script, arguments, capsys)
    assert flag in line and repr(value) in line
    assert snapshot(folder) == {}


@needs_no_gpu
@pytest.mark.parametrize("script", ["VQ-VAE.py", "generate.py"])
def test_cuda_without_a_gpu_says_what_to_do(script, folder, capsys):
    for value in ("cuda", "cuda:1"):
        line = refuse(script, ["--device", value, "--model", "x"][:None if script == "generate.py" else 2], capsys)
        for word in ("--device", value, "--device cpu", "Colab", "Change runtime type"):
            assert word in line
    assert snapshot(folder) == {}


def test_mps_without_an_apple_gpu_says_what_to_do(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = refuse("generate.py", ["--device", "mps"], capsys)
    for word in ("--device mps", "--device cpu", "Apple"):
        assert word in line
    assert snapshot(folder) == {}


@pytest.mark.parametrize("cuda, mps, chosen", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_is_the_best_device_that_is_there(cuda, mps, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert inputs.find_device("auto") == chosen


@needs_no_gpu
def test_a_run_goes_on_where_it_was_or_on_the_device_given_anew_and_nowhere_else_unasked(trained, folder, capsys):
    """Its settings hold what --device auto chose; without that device it says so, and takes another if told."""
    contents = torch.load(trained / "models" / "run" / "last.pt", weights_only=True)
    contents["training"]["settings"] |= {"device": "cuda", "num_epochs": 2}       # which auto chose there
    (folder / "models" / "run").mkdir(parents=True)
    checkpoint.save(folder / "models" / "run" / "last.pt", contents)
    resume = ["--resume", "--output-folder", "run"]
    assert "--device cuda: there is no CUDA GPU" in refuse("VQ-VAE.py", resume, capsys)
    assert "the run ended after epoch 2" in refuse("VQ-VAE.py", [*resume, "--device", "auto"], capsys)


def test_unknown_and_missing_flags_are_refused(folder, capsys):
    assert "--epochs" in refuse("VQ-VAE.py", ["--epochs", "3"], capsys)
    assert "--batch" in refuse("VQ-VAE.py", ["--batch", "3"], capsys)           # no guessing at shortened flags
    assert "--models" in refuse("generate.py", ["--models", "x"], capsys)
    assert snapshot(folder) == {}


def test_names_are_understood_in_any_case():
    train, generate = import_script("VQ-VAE.py").get_parser(), import_script("generate.py").get_parser()
    assert train.parse_args(["--dataset", "mnist-10K", "--codebook-init", "UNIFORM"]).dataset == "MNIST-10k"
    for given, meant in (("mnist", "MNIST"), ("Random", "random"), ("RANDOM", "random")):
        assert generate.parse_args(["--model", "x", "--input", given]).input == meant


# ---------------------------------------------------------------- data folders

@pytest.mark.parametrize("script", ["VQ-VAE.py", "generate.py"])
def test_a_data_folder_that_is_a_file(script, folder, model, capsys):
    (folder / "file").write_text("not a folder")
    before = snapshot(folder)
    arguments = ["--data-folder", "file", "--dataset", "MNIST"] + ["--model", model] * (script == "generate.py")
    line = refuse(script, arguments, capsys)
    assert "--data-folder file: is a file" in line
    assert snapshot(folder) == before


@pytest.mark.parametrize("name, contents", [("train-images-idx3-ubyte", b"<html>404</html>"),
                                            ("t10k-labels-idx1-ubyte", b"")])
def test_foreign_and_truncated_mnist_files(name, contents, folder, capsys):
    write_mnist(folder / "data" / "MNIST" / "raw", train=20, test=10)
    (folder / "data" / "MNIST" / "raw" / name).write_bytes(contents)
    before = snapshot(folder)
    line = refuse("VQ-VAE.py", ["--data-folder", "data"], capsys)
    assert "--data-folder data" in line and name in line and "delete" in line
    assert snapshot(folder) == before


def test_no_network_for_the_download(folder, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")      # nobody listens there
    monkeypatch.delenv("no_proxy", raising=False)
    done = run_script("VQ-VAE.py", "--data-folder", "new/data", cwd=folder)
    assert done.returncode == 2 and "refused" in done.stdout + done.stderr     # older torchvisions print it
    line = done.stderr.splitlines()[-1]
    for words in ("--data-folder new/data", "could not be downloaded", "train-images-idx3-ubyte",
                  "new/data/MNIST/raw", "--dataset MNIST-10k"):
        assert words in line
    assert "Traceback" not in done.stderr and snapshot(folder) == {}


# ---------------------------------------------------------------- model files

class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_model_file_that_is_none(folder, model, capsys):
    shutil.copy(model, "good.pt")
    for name, contents in (("empty.pt", b""), ("text.pt", b"weights\n"), ("half.pt", model.read_bytes()[:30_000]),
                           ("bomb.pt", pickle.dumps({"model": Bomb()}))):
        (folder / name).write_bytes(contents)
    torch.save({"model": Bomb()}, "bomb2.pt")
    before = snapshot(folder)
    expected = {"missing.pt": "error: --model missing.pt: No such file", ".": "directory", "empty.pt": "empty",
                "text.pt": "not a checkpoint", "half.pt": "not a checkpoint", "bomb.pt": "could run code",
                "bomb2.pt": "could run code"}
    for name, words in expected.items():
        line = refuse("generate.py", ["--model", name, "--input", "random"], capsys)
        assert f"--model {name}" in line and words in line
    for flag, given, own in (("--hidden-size", 41, 16), ("--k", 511, 512)):
        line = refuse("generate.py", ["--model", "good.pt", flag, given], capsys)
        assert f"{flag} {given}" in line and f"{flag} {own}" in line
    assert snapshot(folder) == before


# ---------------------------------------------------------------- output folders

def test_an_output_folder_that_is_a_file(folder, model, capsys):
    (folder / "models").mkdir()
    (folder / "models" / "run").write_text("mine")
    (folder / "generatedImages").write_text("mine")
    before = snapshot(folder)
    assert "--output-folder run: models/run is not a folder" in refuse(
        "VQ-VAE.py", [*BUNDLED, "--output-folder", "run"], capsys)
    assert "--filename x: generatedImages" in refuse(
        "generate.py", ["--model", model, "--input", "random", "--filename", "x"], capsys)
    assert snapshot(folder) == before


@pytest.mark.parametrize("script, locked, arguments", [
    ("VQ-VAE.py", "models", [*BUNDLED, "--output-folder", "run"]),
    ("VQ-VAE.py", "logs", [*BUNDLED, "--output-folder", "run"]),
    ("VQ-VAE.py", "data", ["--data-folder", "data"]),
    ("generate.py", "generatedImages", ["--filename", "x", "--input", "random"])])
def test_a_folder_without_permission_to_write(script, locked, arguments, folder, model):
    (folder / locked).mkdir(mode=0o500)
    before = snapshot(folder)
    if script == "generate.py":
        arguments = [*arguments, "--model", model]
    done = run_script(script, *arguments, cwd=folder, prepare=give_up_privileges)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1
    flag = {"models": "--output-folder run", "logs": "--output-folder run", "data": "--data-folder data",
            "generatedImages": "--filename x"}[locked]
    assert flag in done.stderr and locked in done.stderr and "ermission" in done.stderr
    assert snapshot(folder) == before
