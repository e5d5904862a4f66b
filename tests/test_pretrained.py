"""The pretrained model, prior and classifier, their record, and the scripts that use them by default."""

import hashlib
import re
import shlex
import subprocess

import numpy as np
import pytest
import torch
from helpers import ROOT, events, import_script, run_script
from PIL import Image
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoint
import data

RECORD = (ROOT / "model.txt").read_text()
TRACK = (ROOT / "Training track for VQ-VAE.txt").read_text()
PRIOR = checkpoint.PRETRAINED_PRIOR
LOGS = ROOT / "logs_VQ-VAE"


def recorded(name):
    return float(re.search(rf"^ +{name} +([\d.]+)", RECORD, flags=re.MULTILINE)[1])


def test_pretrained_model_is_the_one_in_model_txt():
    path = ROOT / re.search(r"pretrained/\S+\.pt", RECORD)[0]
    assert path == checkpoint.PRETRAINED and path.stat().st_size < 1_000_000
    assert hashlib.sha256(path.read_bytes()).hexdigest() in RECORD
    contents = checkpoint.load(path)
    assert "training" not in contents and contents["dataset"] == {"name": "MNIST", "shape": [1, 28, 28]}
    assert contents["config"]["hidden_size"] == 40 and contents["config"]["num_codes"] == 512


def test_colour_model_is_the_one_in_model_txt_and_reconstructs_the_pictures_of_the_docs():
    path = ROOT / "pretrained" / "vqvae-cifar10.pt"
    assert path.stat().st_size < 1_500_000 and hashlib.sha256(path.read_bytes()).hexdigest() in RECORD
    model, contents = checkpoint.load_model(path)
    section = RECORD.split("for colour photographs\n")[1]
    command = re.search(r"python3 VQ-VAE\.py .*", section)[0]
    args = import_script("VQ-VAE.py").get_parser().parse_args(shlex.split(command)[2:])
    assert (model.quantizer.dim, model.quantizer.num_codes, model.downsample) == (args.hidden_size, args.k, 4)
    assert "training" not in contents and contents["dataset"]["folder"] == args.data_folder == "cifar10"
    assert f"{contents['test']['reconstruction']:.5f}" in section and f"step {contents['step']}" in section
    # Rows of originals, each above its reconstructions.
    picture = torch.from_numpy(np.array(Image.open(ROOT / "readme_images" / "cifar10-pairs.png"))).permute(2, 0, 1)
    cells = torch.stack([picture[:, 2 + 34 * i:, 2 + 34 * j:][:, :32, :32] for i in range(10) for j in range(10)])
    originals, shown = cells.unflatten(0, (5, 2, 10)).transpose(0, 1).flatten(1, 2)
    x = data.to_model_range(originals)
    with torch.no_grad():
        reconstructions = model(x).reconstruction
    assert (data.to_uint8(reconstructions).float() - shown.float()).abs().mean() < 0.5      # a latent between two codes
    assert 0.008 < (reconstructions - x).square().mean() < 0.018                   # the test set's is 0.0129


def test_checkpoint_record_track_and_logs_agree():
    contents = checkpoint.load(checkpoint.PRETRAINED)
    header, *lines = TRACK.splitlines()
    rows = [dict(zip(header.split(), map(float, line.split()))) for line in lines]
    best = min(rows, key=lambda row: row["val_recon"])
    assert best["epoch"] == contents["epoch"] and best["step"] == contents["step"]
    assert best["test_recon"] == pytest.approx(contents["test"]["reconstruction"], abs=1e-5)
    assert best["test_recon"] <= 0.0068 and best["perplexity"] >= 300 and best["used"] >= 508
    assert recorded("test MSE") == pytest.approx(best["test_recon"], abs=5e-5)
    assert recorded("perplexity") == pytest.approx(best["perplexity"], abs=0.5)
    assert recorded("codes used") == best["used"]

    command = re.search(r"python3 VQ-VAE\.py .*--output-folder recommended", RECORD)[0]
    assert command in (ROOT / "README.md").read_text()
    args = vars(import_script("VQ-VAE.py").get_parser().parse_args(shlex.split(command)[2:]))
    run = events(LOGS / "recommended")
    contents = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    logged = {name: getattr(value, value.WhichOneof("kind")) for name, value
              in HParamsPluginData.FromString(contents).session_start_info.hparams.items()}
    assert (logged["channels"], logged["image_size"], logged["validation_images"]) == (1, 28, 5000)      # MNIST's
    assert {"channels", "image_size", "validation_images"} < logged.keys() and logged == {
        name: value if args.get(name) is None or name in ("channels", "image_size") else args[name]
        for name, value in logged.items()}
    for column, tag in (("test_recon", "loss/test/reconstruction"), ("perplexity", "codebook/perplexity"),
                        ("used", "codebook/used"), ("restarts", "codebook/restarts")):
        assert np.allclose([event.value for event in run.Scalars(tag)], [row[column] for row in rows], rtol=1e-2)
    counts = np.loadtxt(LOGS / "recommended" / "00012" / "codebook" / "metadata.tsv", skiprows=1, dtype=int)[:, 1]
    assert counts.sum() == 10_000 * 49
    assert (counts > 0).sum() == rows[-1]["used"]


def test_scripts_default_to_the_pretrained_model(tmp_path):
    for script, arguments in (("generate.py", ["--input", "random"]), ("generate.py", ["--dataset", "MNIST-10k"]),
                              ("evaluate.py", ["--dataset", "MNIST-10k"])):
        result = run_script(script, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        assert "pretrained/vqvae.pt" in result.stderr
        said = result.stdout if script == "evaluate.py" else result.stderr
        assert ("has seen these images" in said) == ("MNIST-10k" in arguments)
    assert {path.name for path in (tmp_path / "generatedImages").iterdir()} == {"MNIST-10k.png", "random.png"}
    grid = np.array(Image.open(tmp_path / "generatedImages" / "MNIST-10k.png").convert("L"))
    assert np.median(grid) < 10 and grid.max() > 240                               # white digits on black
    mse = float(re.search(r"^MSE +([\d.]+)", result.stdout, flags=re.MULTILINE)[1])
    assert mse < 0.0075                             # the model was trained on these digits


def test_pretrained_prior_and_classifiers_are_those_in_model_txt():
    classifiers = [path for path in checkpoint.CLASSIFIERS if path.exists()]
    assert checkpoint.CLASSIFIER in classifiers
    for path, largest in ((PRIOR, 8_000_000), *((path, 1_000_000) for path in classifiers)):
        assert f"pretrained/{path.name}" in RECORD and path.stat().st_size < largest
        assert hashlib.sha256(path.read_bytes()).hexdigest() in RECORD
    _, contents = checkpoint.load_prior(PRIOR, checkpoint.PRETRAINED)
    assert contents["dataset"] == "MNIST" and contents["test"]["nats_per_code"] <= 2.3
    assert recorded("nats per code") == pytest.approx(contents["test"]["nats_per_code"], abs=2e-4)
    for path in classifiers:
        _, contents = checkpoint.load_classifier(path)
        assert contents["dataset"] == "MNIST" and contents["test"]["accuracy"] >= 0.99
        section = RECORD.split(f"  pretrained/{path.name} ")[1]
        accuracy = float(re.search(r"^ +accuracy +([\d.]+) %", section, flags=re.MULTILINE)[1])
        assert accuracy == pytest.approx(100 * contents["test"]["accuracy"], abs=0.0051)


def test_sampled_digits_match_the_requested_labels(tmp_path):
    result = run_script("generate.py", "--input", "prior", "--filename", "digits", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "generatedImages/digits.png\n"
    grid = torch.from_numpy(np.array(Image.open(tmp_path / result.stdout.strip()).convert("L")))
    cells = torch.stack([grid[2 + 30 * i:, 2 + 30 * j:][:28, :28] for i in range(10) for j in range(10)])
    classifier, _ = checkpoint.load_classifier(checkpoint.CLASSIFIER)
    with torch.no_grad():
        digits = classifier(data.to_model_range(cells.unsqueeze(1))).argmax(dim=1)
    assert (digits == torch.arange(10).repeat_interleave(10)).sum() >= 90


def test_contradicting_sizes_are_rejected(tmp_path):
    result = run_script("generate.py", "--input", "random", "--k", 100, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert all(words in result.stderr for words in ("--k 100", "--k 512", "pretrained/vqvae.pt"))
    assert not list(tmp_path.iterdir())


def test_repository_stays_small():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git clone")
    sizes = [(ROOT / name).stat().st_size for name in listed.stdout.split("\0") if name]
    assert sum(sizes) < 25_000_000
