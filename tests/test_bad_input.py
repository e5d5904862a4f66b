"""Invalid input: a one-line error that names flag and value, exit status 2, no change on disk."""

import os
import pickle
import shutil

import pytest
import torch
from helpers import drop_capabilities, expect_usage_error, import_script, run_script, snapshot, write_mnist

import checkpoint
from prior import CodePrior
from utils import files, inputs

BUNDLED = ("--dataset", "MNIST-10k")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def model(trained):
    return trained / "models" / "run" / "best.pt"


# ---------------------------------------------------------------- values of flags

NOT_POSITIVE = ["0", "-1", "2.5", "many", "", "1e3", "99999999999999999999"]
INVALID = [("VQ-VAE.py", flag, value) for value in NOT_POSITIVE
           for flag in ("--hidden-size", "--k", "--batch-size", "--num-epochs", "--num_epoch")]
INVALID += [("VQ-VAE.py", flag, value) for flag in ("--num-workers", "--restart-after", "--seed")
            for value in ("-1", "1.5", "none")]
INVALID += [("VQ-VAE.py", "--lr", value) for value in ("0", "-1e-3", "fast", "nan", "inf")]
INVALID += [("VQ-VAE.py", "--beta", value) for value in ("-0.1", "β", "nan", "inf", "1e308")]
INVALID += [(script, flag, value) for value in ("/".join(50 * "a"), 300 * "n")
            for script, flag in (("VQ-VAE.py", "--output-folder"), ("generate.py", "--filename"))]
INVALID += [("VQ-VAE.py", "--codebook-init", "random"), ("VQ-VAE.py", "--codebook-update", "adam"),
            ("VQ-VAE.py", "--lr-schedule", "step"), ("VQ-VAE.py", "--dataset", "ImageNet")]
INVALID += [("VQ-VAE.py", "--output-folder", value)
            for value in ("../elsewhere", "/tmp/elsewhere", "a/../../elsewhere", "", ".", "two\nlines")]
INVALID += [(script, flag, value) for script in ("generate.py", "evaluate.py") for flag in ("--hidden-size", "--k")
            for value in NOT_POSITIVE]
INVALID += [("generate.py", "--input", "noise"), ("generate.py", "--input", 300 * "n"),
            ("generate.py", "--dataset", "ImageNet"),
            ("evaluate.py", "--dataset", "ImageNet")]
INVALID += [("generate.py", "--seed", "-1")]
INVALID += [("generate.py", "--filename", value) for value in ("../elsewhere", "/tmp/elsewhere", "")]
INVALID += [(script, "--device", value) for script in ("VQ-VAE.py", "generate.py", "evaluate.py")
            for value in ("gpu", "cuda:x", "cuda:", "cpu:3", "mps:0", "auto:1")]
INVALID += [("train_prior.py", flag, value) for value in ("0", "2.5", "many")
            for flag in ("--layers", "--width", "--heads", "--batch-size", "--num-epochs")]
INVALID += [("train_prior.py", flag, value) for flag in ("--dropout", "--drop-label") for value in ("-0.1", "1", "nan")]
INVALID += [("train_prior.py", "--shift", "-1"), ("train_prior.py", "--lr", "0"), ("train_prior.py", "--device", "gpu"),
            ("train_classifier.py", "--num-epochs", "0"), ("train_classifier.py", "--device", "gpu"),
            ("train_classifier.py", "--dataset", "ImageNet"), ("evaluate.py", "--seed", "-1"),
            ("codes.py", "--part", "all"), ("export.py", "--output", "")]


@pytest.mark.parametrize("script, flag, value", INVALID)
def test_invalid_value_error_names_flag_and_value(script, flag, value, folder, capsys):
    arguments = [f"{flag}={value}"] + (list(BUNDLED) if script == "VQ-VAE.py" else ["--model", "x"])
    if flag == "--dataset":
        arguments = arguments[:-2] + arguments[:1]
    line = expect_usage_error(script, arguments, capsys)
    assert flag in line and repr(value) in line
    assert snapshot(folder) == {}


@without_gpu
@pytest.mark.parametrize("script", ["VQ-VAE.py", "generate.py"])
def test_missing_cuda_gpu_error_suggests_alternatives(script, folder, capsys):
    for value in ("cuda", "cuda:1"):
        arguments = ["--device", value] + ["--model", "x"] * (script == "generate.py")
        line = expect_usage_error(script, arguments, capsys)
        for word in ("--device", value, "--device cpu", "Colab", "Change runtime type"):
            assert word in line
    assert snapshot(folder) == {}


def test_missing_apple_gpu_error_suggests_alternatives(folder, capsys, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    line = expect_usage_error("generate.py", ["--device", "mps"], capsys)
    for word in ("--device mps", "--device cpu", "Apple"):
        assert word in line
    assert snapshot(folder) == {}


def test_torch_too_old_for_an_apple_gpu_is_one_line_and_auto_takes_the_cpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    assert inputs.find_device("auto") == "cpu"
    assert "a build of torch 2.6 or newer" in expect_usage_error("generate.py", ["--device", "mps"], capsys)
    monkeypatch.setattr(torch, "__version__", "2.10.0.dev2026+cpu")
    assert inputs.find_device("auto") == inputs.find_device("mps") == "mps"


def test_size_beyond_all_memory_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flag in ("--k", "--hidden-size"):
        line = expect_usage_error("VQ-VAE.py", ["--dataset", "MNIST-10k", flag, "1" + "0" * 17], capsys)
        assert "no memory for a model of this size" in line and "0" * 17 in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cuda, mps, expected", [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")])
def test_auto_device_prefers_cuda_then_mps_then_cpu(cuda, mps, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert inputs.find_device("auto") == expected


@without_gpu
def test_resume_changes_device_only_when_asked(trained, folder, capsys):
    """A run resumes on its own device. If that is missing, only --device can choose another."""
    contents = torch.load(trained / "models" / "run" / "last.pt", weights_only=True)
    contents["training"]["settings"] |= {"device": "cuda", "num_epochs": 2}       # as chosen by auto on another machine
    (folder / "models" / "run").mkdir(parents=True)
    checkpoint.save(folder / "models" / "run" / "last.pt", contents)
    resume = ["--resume", "--output-folder", "run"]
    assert "--device cuda: there is no CUDA GPU" in expect_usage_error("VQ-VAE.py", resume, capsys)
    assert "the run ended after epoch 2" in expect_usage_error("VQ-VAE.py", [*resume, "--device", "auto"], capsys)


def test_unknown_and_abbreviated_flags_are_rejected(folder, capsys):
    assert "--epochs" in expect_usage_error("VQ-VAE.py", ["--epochs", "3"], capsys)
    assert "--batch" in expect_usage_error("VQ-VAE.py", ["--batch", "3"], capsys)       # not abbreviated
    assert "--models" in expect_usage_error("generate.py", ["--models", "x"], capsys)
    assert snapshot(folder) == {}


def test_choices_are_case_insensitive():
    train, generate = import_script("VQ-VAE.py").get_parser(), import_script("generate.py").get_parser()
    assert train.parse_args(["--dataset", "mnist-10K", "--codebook-init", "UNIFORM"]).dataset == "MNIST-10k"
    for text, expected in (("mnist", "MNIST"), ("Random", "random"), ("RANDOM", "random")):
        assert generate.parse_args(["--model", "x", "--input", text]).input == expected


def test_messages_keep_the_blanks_of_names_and_commands(folder, capsys):
    line = expect_usage_error("generate.py", ["--model", "two  blanks\n  and lines/best.pt"], capsys)
    assert "--model two  blanks and lines/best.pt: No such file" in line
    assert files.command("generate.py", "--model", "-d/two  blanks.pt", "--input", "prior").endswith(
        "generate.py --model './-d/two  blanks.pt' --input prior")


# ---------------------------------------------------------------- data folders

@pytest.mark.parametrize("script", ["VQ-VAE.py", "generate.py"])
def test_data_folder_that_is_a_file_is_rejected(script, folder, model, capsys):
    (folder / "file").write_text("not a folder")
    before = snapshot(folder)
    arguments = ["--data-folder", "file", "--dataset", "MNIST"] + ["--model", model] * (script == "generate.py")
    line = expect_usage_error(script, arguments, capsys)
    assert "--data-folder file: is a file" in line
    assert snapshot(folder) == before


@pytest.mark.parametrize("name, contents", [("train-images-idx3-ubyte", b"<html>404</html>"),
                                            ("t10k-labels-idx1-ubyte", b"")])
def test_foreign_and_empty_mnist_files_are_rejected(name, contents, folder, capsys):
    write_mnist(folder / "data" / "MNIST" / "raw", train=20, test=10)
    (folder / "data" / "MNIST" / "raw" / name).write_bytes(contents)
    before = snapshot(folder)
    line = expect_usage_error("VQ-VAE.py", ["--data-folder", "data"], capsys)
    assert "--data-folder data" in line and name in line and "delete" in line
    assert snapshot(folder) == before


def test_download_without_network_reports_what_to_do(folder, monkeypatch):
    for variable in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")      # nothing listens there
    monkeypatch.delenv("no_proxy", raising=False)
    result = run_script("VQ-VAE.py", "--data-folder", "new/data", cwd=folder)
    assert result.returncode == 2 and "refused" in result.stdout + result.stderr     # older torchvisions print it
    line = result.stderr.splitlines()[-1]
    for words in ("--data-folder new/data", "could not be downloaded", "train-images-idx3-ubyte",
                  "new/data/MNIST/raw", "--dataset MNIST-10k"):
        assert words in line
    assert "Traceback" not in result.stderr and snapshot(folder) == {}


# ---------------------------------------------------------------- model files

class CodeInPickle:
    """Unpickling it creates the file "exploded"."""

    def __reduce__(self):
        return open, ("exploded", "w")


def test_invalid_model_files_are_rejected(folder, model, capsys):
    shutil.copy(model, "good.pt")
    for name, contents in (("empty.pt", b""), ("text.pt", b"weights\n"), ("half.pt", model.read_bytes()[:30_000]),
                           ("code.pt", pickle.dumps({"model": CodeInPickle()}))):
        (folder / name).write_bytes(contents)
    torch.save({"model": CodeInPickle()}, "code2.pt")
    before = snapshot(folder)
    expected = {"missing.pt": "error: --model missing.pt: No such file", ".": "directory", "empty.pt": "empty",
                "text.pt": "not a checkpoint", "half.pt": "not a checkpoint", "code.pt": "could run code",
                "code2.pt": "could run code"}
    for name, words in expected.items():
        line = expect_usage_error("generate.py", ["--model", name, "--input", "random"], capsys)
        assert f"--model {name}" in line and words in line
    for flag, value, stored in (("--hidden-size", 41, 16), ("--k", 511, 512)):
        line = expect_usage_error("generate.py", ["--model", "good.pt", flag, value], capsys)
        assert f"{flag} {value}" in line and f"{flag} {stored}" in line
    assert snapshot(folder) == before


# ---------------------------------------------------------------- output folders

def test_output_folder_that_is_a_file_is_rejected(folder, model, capsys):
    (folder / "models").mkdir()
    (folder / "models" / "run").write_text("mine")
    (folder / "generatedImages").write_text("mine")
    before = snapshot(folder)
    assert "--output-folder run: models/run is not a folder" in expect_usage_error(
        "VQ-VAE.py", [*BUNDLED, "--output-folder", "run"], capsys)
    assert "--filename x: generatedImages" in expect_usage_error(
        "generate.py", ["--model", model, "--input", "random", "--filename", "x"], capsys)
    assert snapshot(folder) == before


@pytest.mark.parametrize("script, locked, arguments", [
    ("VQ-VAE.py", "models", [*BUNDLED, "--output-folder", "run"]),
    ("VQ-VAE.py", "logs", [*BUNDLED, "--output-folder", "run"]),
    ("VQ-VAE.py", "data", ["--data-folder", "data"]),
    ("generate.py", "generatedImages", ["--filename", "x", "--input", "random"])])
def test_unwritable_folder_is_rejected(script, locked, arguments, folder, model):
    (folder / locked).mkdir(mode=0o500)
    before = snapshot(folder)
    if script == "generate.py":
        arguments = [*arguments, "--model", model]
    result = run_script(script, *arguments, cwd=folder, prepare=drop_capabilities)
    assert result.returncode == 2 and result.stdout == "" and result.stderr.count("\n") == 1
    flag = {"models": "--output-folder run", "logs": "--output-folder run", "data": "--data-folder data",
            "generatedImages": "--filename x"}[locked]
    assert flag in result.stderr and locked in result.stderr and "ermission" in result.stderr
    assert snapshot(folder) == before


# ---------------------------------------------------------------- devices, pipes, too much of a name

@pytest.mark.skipif(not os.path.exists("/dev/zero") or not hasattr(os, "mkfifo"), reason="no devices and pipes")
@pytest.mark.parametrize("words", ["evaluate.py --model {}", "generate.py --input {}",
                                   "generate.py --input prior --prior {}", "evaluate.py --prior {}",
                                   "codes.py --output images.npz --decode {}", "export.py --output new --model {}",
                                   "export.py --output new --prior {}"])
def test_devices_and_pipes_are_not_read(words, folder, capsys):
    os.mkfifo("pipe")
    for path in ("/dev/zero", "pipe"):
        script, *flags = words.format(path).split()
        flags += ["--model", checkpoint.PRETRAINED] if "--model" not in flags else []
        line = expect_usage_error(script, flags, capsys)
        assert path in line and "regular file" in line
    assert [path.name for path in folder.iterdir()] == ["pipe"]


def test_guidance_needs_a_prior_that_was_trained_without_classes_too(folder, model, capsys):
    vqvae, contents = checkpoint.load_model(model)
    h, w = vqvae.map_size(28, 28)
    config = {"num_codes": vqvae.quantizer.num_codes, "height": h, "width": w, "layers": 1, "embedding": 4, "heads": 1,
              "drop_label": 0.0}
    checkpoint.save("prior.pt", {"format": 1, "kind": "prior", "config": config, "vqvae": contents["sha256"],
                                 "dataset": "MNIST", "model": CodePrior(**config).state_dict()})
    flags = ["--model", model, "--input", "prior", "--prior", "prior.pt"]
    assert "--guidance 2: it was trained with --drop-label 0" in expect_usage_error(
        "generate.py", [*flags, "--guidance", "2"], capsys)
    import_script("generate.py").main([str(word) for word in flags])
    os.mkdir("other")
    shutil.copy(model, "other/a copy.pt")
    capsys.readouterr()
    line = expect_usage_error("generate.py", ["--model", "other/a copy.pt", "--input", "prior", "--overwrite"],
                              capsys)
    assert "no prior yet: train one with python3 " in line
    assert line.endswith("train_prior.py --model 'other/a copy.pt'\n")
