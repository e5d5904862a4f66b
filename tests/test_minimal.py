"""minimal.py as the reference: with equal weights, modules.py has its outputs, losses and gradients."""

import re

import numpy as np
import pytest
import torch
from helpers import bundled_digits, run_script
from PIL import Image

import data
import minimal
from modules import VectorQuantizedVAE, vqvae_losses

pytestmark = pytest.mark.rounding


def module_name(name):
    return "quantizer.codebook" if name == "codebook" else name


@pytest.mark.parametrize("training", [True, False])
def test_modules_match_its_outputs_losses_and_gradients(training):
    torch.manual_seed(0)
    reference = minimal.VQVAE()
    model = VectorQuantizedVAE(1, minimal.D, minimal.K, restart_after=0, codebook_init="uniform")
    x = data.to_model_range(torch.from_numpy(bundled_digits()[0][:24]).unsqueeze(1))
    reference.train(training)
    model.train(training)
    with torch.no_grad():           # codes close to latents, so that many are used
        latents = reference.encoder(x).permute(0, 2, 3, 1).flatten(0, 2)
        chosen = latents[torch.randperm(len(latents))[:minimal.K]]
        reference.codebook.copy_(chosen + 0.1 * torch.randn(minimal.K, minimal.D))
    mismatch = model.load_state_dict({module_name(name): value for name, value in reference.state_dict().items()},
                                     strict=False)
    assert not mismatch.unexpected_keys and all(name.startswith("quantizer.") for name in mismatch.missing_keys)

    x_hat, *expected = reference(x)
    (expected[0] + expected[1] + minimal.BETA * expected[2]).backward()
    output = model(x)
    losses = vqvae_losses(x, output, minimal.BETA)
    losses.total.backward()
    with torch.no_grad():
        indices = reference.quantize(output.z_e)[1]
    assert torch.equal(indices, output.indices) and len(indices.unique()) > 100
    torch.testing.assert_close(output.reconstruction, x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[:3], tuple(expected), rtol=1e-4, atol=1e-6)
    gradients = {module_name(name): value.grad for name, value in reference.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_minimal_trains_logs_each_epoch_and_writes_a_picture(tmp_path):
    result = run_script("minimal.py", 2, cwd=tmp_path, prepare=use_small_data)
    assert result.returncode == 0, result.stderr
    logged = re.findall(r"^epoch (\d): test reconstruction loss ([\d.]+), .* (\d+) of 512 codes used$", result.stdout,
                        flags=re.MULTILINE)
    assert [epoch for epoch, *_ in logged] == ["1", "2"] and float(logged[1][1]) < float(logged[0][1])
    picture = np.array(Image.open(tmp_path / "minimal.png").convert("L")).astype(int)
    rows = picture[2:].reshape(10, 30, 302)[:, :28, 2:].reshape(10, 28, 10, 30)[..., :28].transpose(0, 2, 1, 3)
    assert np.abs(rows[::2].reshape(50, 28, 28) - bundled_digits()[0][9000:9050]).max() <= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "minimal.png"]


def use_small_data():
    sets = data.load("MNIST-10k", "")
    small_sets = [data.Images(part.images[:640], part.labels[:640]) for part in sets]
    data.load = lambda *_: small_sets
