"""A golden file of every checkpoint format, with the outputs that it must reproduce in all later versions.

python3 tests/test_golden.py writes missing golden files. It is needed only for a new format.
"""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import import_script

import checkpoint
import data
from modules import VectorQuantizedVAE
from prior import CodePrior
from utils import tensorboard_logs

pytestmark = pytest.mark.rounding

GOLDEN = Path(__file__).resolve().parent / "golden"
MODELS = ("state-dict-of-the-published-code", "vqvae-format-1", "vqvae-ema-format-1")
PRIORS = {"prior-format-1": "vqvae-format-1"}


def digits():
    """Three of the bundled test digits: (3, 1, 28, 28) in [-1, 1]."""
    return data.to_model_range(data.load("MNIST-10k", "MNIST")[1].images[:3])


@torch.no_grad()
def model_outputs(path):
    model, contents = checkpoint.load_model(path)
    output = model(digits())
    return {"indices": output.indices.numpy(), "reconstruction": output.reconstruction.numpy(),
            "codes": model.quantizer.num_codes, "shape": contents["dataset"]["shape"]}


@torch.no_grad()
def prior_outputs(path, vqvae_path):
    prior, _ = checkpoint.load_prior(path, vqvae_path)
    indices = checkpoint.load_model(vqvae_path)[0].encode(digits())
    return {"log_prob": prior.log_prob(indices, torch.tensor([3, 5, 10])).numpy(),
            "most_probable": prior.sample(torch.arange(10), top_k=1).numpy()}


def load_expected(name):
    with np.load(GOLDEN / f"{name}.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize("name", MODELS)
def test_golden_model_reproduces_its_outputs(name):
    actual, expected = model_outputs(GOLDEN / f"{name}.pt"), load_expected(name)
    assert actual.keys() == expected.keys() and expected["reconstruction"].std() > 0.1
    for key, value in expected.items():
        assert np.allclose(actual[key], value, atol=1e-5), key


@pytest.mark.parametrize("name", PRIORS)
def test_golden_prior_reproduces_its_outputs(name):
    actual, expected = prior_outputs(GOLDEN / f"{name}.pt", GOLDEN / f"{PRIORS[name]}.pt"), load_expected(name)
    assert actual.keys() == expected.keys() and len(np.unique(expected["log_prob"])) == 3
    for key, value in expected.items():
        assert np.allclose(actual[key], value, rtol=1e-5), key


@pytest.mark.parametrize("words, track, expected", [
    (("VQ-VAE.py", "--output-folder", "run"), "track.txt", {"test_recon": 0.42893, "step": 36}),
    (("train_prior.py", "--model", "models/run/best.pt"), "prior-track.txt", {"test_nats": 1.8804})])
def test_run_of_the_first_version_resumes(words, track, expected, tmp_path, monkeypatch):
    """From before there were validation images, quantizers and gated MLPs. Expected: that version's next epoch."""
    (tmp_path / "models").mkdir()
    shutil.copytree(GOLDEN / "run-format-1", tmp_path / "models" / "run")
    monkeypatch.chdir(tmp_path)
    script, *flags = words
    import_script(script).main([*flags, "--resume", "--num-epochs", "2"])
    rows = (tmp_path / "models" / "run" / track).read_text().splitlines()
    row = tensorboard_logs.track_row(rows, 2)
    assert {name: row[name] for name in expected} == pytest.approx(expected, rel=0.02)


def test_every_format_has_a_golden_file():
    names = {path.stem for path in GOLDEN.glob("*.pt")}
    assert names == {*MODELS, *PRIORS}
    assert {f"{kind}-format-{n}" for kind in ("vqvae", "prior") for n in range(1, checkpoint.FORMAT + 1)} <= names


def write_missing():
    """Random weights, scaled so that the outputs depend on all of them, and latents of digits as codes."""
    from test_published_network import published_state
    published = published_state(hidden_size=4, num_codes=8)
    model = VectorQuantizedVAE(1, 4, 8).eval()
    model.load_state_dict(published, strict=False)
    with torch.no_grad():
        latents = model.encoder(digits()).permute(0, 2, 3, 1).flatten(0, 2)
    published["codeBook.embedding.weight"] = latents[torch.randperm(len(latents))[:8]]
    contents = {"state-dict-of-the-published-code": published}
    for name, update in (("vqvae-format-1", "gradient"), ("vqvae-ema-format-1", "ema")):
        config = {"channels": 1, "hidden_size": 4, "num_codes": 8, "codebook_update": update}
        model = VectorQuantizedVAE(**config)
        state = {key: published[key] for key in published if key in model.state_dict()}
        codebook = {"quantizer.codebook": published["codeBook.embedding.weight"],
                    "quantizer.initialised": torch.tensor(True)}
        model.load_state_dict(model.state_dict() | state | codebook)
        contents[name] = {"format": 1, "kind": "vqvae", "config": config, "model": model.state_dict(), "epoch": 2,
                          "step": 20, "dataset": {"name": "MNIST", "shape": [1, 28, 28]},
                          "test": {"reconstruction": 0.5}}
    for name, value in contents.items():
        if not (GOLDEN / f"{name}.pt").exists():
            checkpoint.save(GOLDEN / f"{name}.pt", value)
            np.savez(GOLDEN / f"{name}.npz", **model_outputs(GOLDEN / f"{name}.pt"))
    for name, vqvae in PRIORS.items():
        if not (GOLDEN / f"{name}.pt").exists():
            config = {"num_codes": 8, "height": 7, "width": 7, "layers": 1, "embedding": 8, "heads": 2, "num_shifts": 2}
            prior = CodePrior(**config)
            checkpoint.save(GOLDEN / f"{name}.pt", {
                "format": 1, "kind": "prior", "config": config, "dataset": "MNIST", "epoch": 2,
                "vqvae": checkpoint.load(GOLDEN / f"{vqvae}.pt")["sha256"],
                "model": {key: value * (20 if value.dim() > 1 else 1) for key, value in prior.state_dict().items()},
                "test": {"nats_per_code": 2.0, "bits_per_pixel": 0.2}})
            np.savez(GOLDEN / f"{name}.npz", **prior_outputs(GOLDEN / f"{name}.pt", GOLDEN / f"{vqvae}.pt"))


if __name__ == "__main__":
    write_missing()
