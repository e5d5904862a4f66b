"""What a GPU does, compared with the CPU; on a machine without one everything here is skipped."""

import json
import shutil

import numpy as np
import pytest
import torch
from helpers import build_trainer, import_script, run_script

import checkpoint
import data
import testers
from data import code_maps
from modules import VectorQuantizedVAE, vqvae_losses
from prior import CodePrior
from utils import inputs, tensorboard_logs, trainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")

DEVICE = "cuda"
FLAGS = ("--dataset", "MNIST-10k", "--hidden-size", "16", "--k", "64", "--batch-size", "256", "--lr", "4e-3",
         "--num-epochs", "2")
SMALL_PRIOR = ("--num-epochs", "1", "--layers", "1", "--width", "16", "--heads", "2", "--batch-size", "512")
CHECKS = [name for name in vars(testers) if name.startswith("test_")]


@pytest.fixture(autouse=True)
def settings_of_a_script():
    """Convolutions in float32, as find_device() sets them; afterwards no deterministic algorithms for other tests."""
    inputs.find_device(DEVICE)
    yield
    torch.cuda.set_sync_debug_mode("default")
    torch.use_deterministic_algorithms(False)


def run(*arguments, cwd):
    result = run_script(*arguments, cwd=cwd)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


@pytest.mark.parametrize("name", CHECKS)
def test_check_of_testers(name):
    getattr(testers, name)(device=DEVICE)


# ---------------------------------------------------------------- one step, one batch

def gradient_step(model, x):
    """→ losses and gradients of one training step, and the state after it, on the CPU."""
    losses = vqvae_losses(x, model.train()(x), 0.25)
    losses.total.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    values = {**losses._asdict(), **gradients, **model.state_dict()}
    return {name: value.detach().cpu() for name, value in values.items()}


@pytest.mark.parametrize("settings", [{}, {"codebook_update": "ema"}, {"quantizer": "fsq", "levels": "8,8"}])
def test_training_step_equals_that_of_the_cpu(settings):
    """From latents that are far from ties: the codebook is of the first digits' own latents."""
    x, values = data.to_model_range(data.load("MNIST-10k", "")[0][:64][0]), []
    torch.manual_seed(0)
    reference = VectorQuantizedVAE(1, 16, 64, **settings)
    if not settings.get("quantizer"):
        reference.quantizer(reference.encoder(x[:16]))          # K-means, on the CPU
    for device in ("cpu", DEVICE):
        model = VectorQuantizedVAE(1, 16, 64, **settings)
        model.load_state_dict(reference.state_dict())
        values.append(gradient_step(model.to(device), x.to(device)))
    for name, expected in values[0].items():
        if "steps_unused" in name:          # of a code that few latents choose, one may be as near to another code
            assert (values[1][name] != expected).float().mean() <= 0.05
            continue
        difference = (values[1][name].double() - expected.double()).norm()
        assert difference <= 0.02 * expected.double().norm() + 1e-7, name


def test_prior_has_the_same_probabilities_and_samples():
    torch.manual_seed(0)
    prior = CodePrior(64, 7, 7, layers=2, embedding=32, heads=2, num_shifts=9, gated=True).eval()
    torch.nn.init.normal_(prior.head.weight, std=0.2)
    maps, labels = torch.randint(64, (50, 7, 7)), torch.arange(50) % 10
    probabilities, sampled = [], []
    for device in ("cpu", DEVICE):
        prior.to(device).calibrate(maps, labels)
        with torch.no_grad():
            probabilities.append(prior.log_prob(maps, labels).cpu())
        sampled.append(prior.sample(labels, generator=torch.Generator().manual_seed(0)).cpu())
    torch.testing.assert_close(*probabilities, rtol=1e-4, atol=1e-3)
    # A random number may fall between two codes, after which the maps differ.
    assert (sampled[0] == sampled[1]).flatten(1).all(dim=1).float().mean() > 0.9


def test_code_maps_and_decoded_images_are_those_of_the_cpu():
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    batches = [(data.load("MNIST-10k", "")[1][:100][0], None)]
    maps, images = [], []
    for device in ("cpu", DEVICE):
        model.to(device)
        maps.append(code_maps.encode(model, batches, device))
        with torch.no_grad():
            images.append(model.decode(maps[0]).cpu())
    assert (maps[0] == maps[1]).float().mean() > 0.999
    torch.testing.assert_close(*images, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- whole runs

class Stop(Exception):
    """Raised by after_step() to end a training."""


@pytest.mark.parametrize("words", [
    ("VQ-VAE.py", *FLAGS, "--output-folder", "run"),
    ("VQ-VAE.py", *FLAGS, "--output-folder", "run", "--codebook-update", "ema", "--amp"),
    ("train_prior.py", "--layers", "1", "--width", "16", "--heads", "2", "--batch-size", "64", "--dropout", "0.1"),
    ("train_classifier.py", "--dataset", "MNIST-10k", "--batch-size", "64")])
def test_steps_of_a_training_wait_for_nothing(words, tmp_path, monkeypatch):
    """From the end of one step to that of the next, apart from one in ten, in which the losses are read."""
    monkeypatch.chdir(tmp_path)
    name, *flags = words
    if name == "train_prior.py":
        run("VQ-VAE.py", *FLAGS[:-1], "1", "--output-folder", "run", cwd=tmp_path)
        flags += ["--model", "models/run/best.pt"]
    after_step = trainer.Trainer.after_step

    def waiting_allowed(self, *losses):
        torch.cuda.set_sync_debug_mode("default")
        after_step(self, *losses)
        if self.state.step == 25:
            raise Stop
        if self.state.step > 3:             # the first ones allocate memory, and K-means runs in the very first
            torch.cuda.set_sync_debug_mode("error")

    monkeypatch.setattr(trainer.Trainer, "after_step", waiting_allowed)
    with pytest.raises(Stop):
        import_script(name).main([*flags, "--device", DEVICE])


def test_data_set_is_held_on_the_gpu(tmp_path):
    _, trainer, batches = build_trainer(tmp_path, *FLAGS, "--device", DEVICE)
    images, labels = next(iter(batches.train))
    assert images.device.type == labels.device.type == DEVICE and images.dtype == torch.uint8
    assert next(trainer.model.parameters()).device.type == DEVICE


def test_memory_of_a_run_is_returned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = import_script("VQ-VAE.py")
    script.main([*FLAGS, "--device", DEVICE, "--output-folder", "first"])       # what torch itself keeps
    before = torch.cuda.memory_allocated()
    script.main([*FLAGS, "--device", DEVICE, "--output-folder", "second"])
    assert torch.cuda.memory_allocated() - before < 2**20


@pytest.mark.parametrize("flags", [(), ("--codebook-update", "ema"), ("--quantizer", "fsq", "--levels", "8,8")])
def test_same_seed_gives_the_same_run(flags, tmp_path):
    models = []
    for name in ("first", "second"):
        run("VQ-VAE.py", *FLAGS[:-1], "1", *flags, "--device", DEVICE, "--output-folder", name, cwd=tmp_path)
        models.append(checkpoint.load(tmp_path / "models" / name / "last.pt")["model"])
    assert_equal(*models)


def assert_equal(first, second):
    assert first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


def test_same_seed_gives_the_same_prior(trained_on_gpu, tmp_path):
    priors = []
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        shutil.copy(trained_on_gpu / "models" / "run" / "best.pt", tmp_path / name)
        run("train_prior.py", "--model", f"{name}/best.pt", *SMALL_PRIOR, "--device", DEVICE, cwd=tmp_path)
        priors.append(torch.load(tmp_path / name / "prior.pt", map_location="cpu", weights_only=True)["model"])
    assert_equal(*priors)


def test_interrupted_run_resumes_bit_for_bit(tmp_path):
    run("VQ-VAE.py", *FLAGS, "--device", DEVICE, "--output-folder", "whole", cwd=tmp_path)
    run("VQ-VAE.py", *FLAGS[:-1], "1", "--device", DEVICE, "--output-folder", "parts", cwd=tmp_path)
    run("VQ-VAE.py", "--resume", "--num-epochs", "2", "--output-folder", "parts", cwd=tmp_path)
    assert_equal(*(checkpoint.load(tmp_path / "models" / name / "last.pt")["model"] for name in ("whole", "parts")))


def test_images_loaded_by_other_processes_are_pinned(trained_on_gpu, tmp_path):
    _, _, batches = build_trainer(tmp_path, *FLAGS, "--device", DEVICE, "--num-workers", "2")
    images, labels = next(iter(batches.train))
    assert images.is_pinned() and not labels.is_cuda
    run("VQ-VAE.py", *FLAGS, "--num-workers", "2", "--device", DEVICE, "--output-folder", "loaded", cwd=tmp_path)
    assert error_of(tmp_path, "loaded", 2) == pytest.approx(error_of(trained_on_gpu, "run", 2), rel=0.25)


@pytest.fixture(scope="module")
def trained_on_gpu(tmp_path_factory):
    """A folder with a run on the GPU, in which resuming has moved from CPU to GPU to CPU."""
    folder = tmp_path_factory.mktemp("cuda")
    run("VQ-VAE.py", *FLAGS[:-1], "1", "--device", "cpu", "--output-folder", "run", cwd=folder)
    for epochs, device in ((2, DEVICE), (3, "cpu")):
        run("VQ-VAE.py", "--resume", "--output-folder", "run", "--num-epochs", epochs, "--device", device, cwd=folder)
    return folder


def error_of(folder, name, epoch):
    """The test reconstruction loss of a run after an epoch."""
    track = (folder / "models" / name / "track.txt").read_text().splitlines()
    return tensorboard_logs.track_row(track, epoch)["test_recon"]


def test_run_resumes_on_the_other_device(trained_on_gpu, tmp_path):
    """The errors are near those of a run on the CPU alone."""
    run("VQ-VAE.py", *FLAGS[:-1], "3", "--output-folder", "run", cwd=tmp_path)
    errors = [[error_of(folder, "run", epoch) for epoch in (1, 2, 3)] for folder in (trained_on_gpu, tmp_path)]
    assert errors[0] == pytest.approx(errors[1], rel=0.2)
    devices = [one["device"] for one in checkpoint.load(trained_on_gpu / "models/run/last.pt")["training"][
        "environments"]]
    assert [device.split()[0].lower() == "cpu" for device in devices] == [True, False, True]


@pytest.mark.parametrize("flag", ["--amp", "--compile"])
def test_faster_steps_reach_the_same_error(flag, trained_on_gpu, tmp_path):
    output = run("VQ-VAE.py", *FLAGS, flag, "--device", DEVICE, "--output-folder", "fast", cwd=tmp_path)
    assert "continuing without" not in output
    assert ("in bfloat16" in output) == (flag == "--amp" and torch.cuda.get_device_capability() >= (8, 0))
    assert error_of(tmp_path, "fast", 2) == pytest.approx(error_of(trained_on_gpu, "run", 2), rel=0.25)


def test_every_script_agrees_with_the_cpu(trained_on_gpu):
    folder, model, shown = trained_on_gpu, "models/run/best.pt", {}
    run("train_prior.py", "--model", model, *SMALL_PRIOR, "--amp", "--device", DEVICE, cwd=folder)
    run("train_classifier.py", "--dataset", "MNIST-10k", "--num-epochs", "1", "--device", DEVICE, cwd=folder)
    for device in ("cpu", DEVICE):
        name = f"{device}-result"
        run("evaluate.py", "--model", model, "--prior", "models/run/prior.pt", "--device", device,
            "--classifier", "models/classifier.pt", "--json", f"{name}.json", "--overwrite", cwd=folder)
        run("codes.py", "--model", model, "--part", "test", "--output", f"{name}.npz", "--overwrite", "--device",
            device, cwd=folder)
        shown[device] = (json.loads((folder / f"{name}.json").read_text()), np.load(folder / f"{name}.npz")["indices"])
    (expected, expected_codes), (found, found_codes) = shown["cpu"], shown[DEVICE]
    assert (expected_codes == found_codes).mean() > 0.999
    for name in ("mse", "perplexity"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3)
    assert found["prior"]["nats_per_code"] == pytest.approx(expected["prior"]["nats_per_code"], rel=1e-3)
    for part in ("test_set", "reconstructions"):
        assert found["prior"][part]["recognised"] == pytest.approx(expected["prior"][part]["recognised"], abs=0.005)
