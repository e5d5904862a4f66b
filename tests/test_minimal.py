"""minimal.py, the second opinion: with the same weights the fast code has its outputs, losses and gradients."""

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


def name_in_modules(name):
    return "quantizer.codebook" if name == "codebook" else name


@pytest.mark.parametrize("training", [True, False])
def test_modules_have_its_outputs_losses_and_gradients(training):
    torch.manual_seed(0)
    page, model = minimal.VQVAE(), VectorQuantizedVAE(1, minimal.D, minimal.K, restart_after=0, codebook_init="uniform")
    x = data.to_model_range(torch.from_numpy(bundled_digits()[0][:24]).unsqueeze(1))
    page.train(training)
    model.train(training)
    with torch.no_grad():           # the codes lie among the latents, so that many are chosen
        latents = page.encoder(x).permute(0, 2, 3, 1).flatten(0, 2)
        page.codebook.copy_(latents[torch.randperm(len(latents))[:minimal.K]] + 0.1 * torch.randn(minimal.K, minimal.D))
    missing = model.load_state_dict({name_in_modules(name): value for name, value in page.state_dict().items()},
                                    strict=False)
    assert not missing.unexpected_keys and all(name.startswith("quantizer.") for name in missing.missing_keys)

    x_hat, *expected = page(x)
    (expected[0] + expected[1] + minimal.BETA * expected[2]).backward()
    output = model(x)
    losses = vqvae_losses(x, output, minimal.BETA)
    losses.total.backward()
    with torch.no_grad():
        chosen = page.quantize(output.z_e)[1]
    assert torch.equal(chosen, output.indices) and len(chosen.unique()) > 100
    torch.testing.assert_close(output.reconstruction, x_hat, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses[:3], tuple(expected), rtol=1e-4, atol=1e-6)
    gradients = {name_in_modules(name): value.grad for name, value in page.named_parameters()}
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    for name, value in model.named_parameters():
        torch.testing.assert_close(value.grad, gradients[name], rtol=1e-3, atol=1e-5 * largest, msg=name)


def test_it_trains_prints_a_line_an_epoch_and_draws_a_picture(tmp_path):
    done = run_script("minimal.py", 2, cwd=tmp_path, prepare=load_few)
    assert done.returncode == 0, done.stderr
    found = re.findall(r"^epoch (\d): test reconstruction loss ([\d.]+), .* (\d+) of 512 codes used$", done.stdout,
                       flags=re.MULTILINE)
    assert [epoch for epoch, *_ in found] == ["1", "2"] and float(found[1][1]) < float(found[0][1])
    picture = np.array(Image.open(tmp_path / "minimal.png").convert("L")).astype(int)
    rows = picture[2:].reshape(10, 30, 302)[:, :28, 2:].reshape(10, 28, 10, 30)[..., :28].transpose(0, 2, 1, 3)
    assert np.abs(rows[::2].reshape(50, 28, 28) - bundled_digits()[0][9000:9050]).max() <= 1
    assert list(tmp_path.iterdir()) == [tmp_path / "minimal.png"]


def load_few():
    sets = data.load("MNIST-10k", "")
    few = [data.Images(part.images[:640], part.labels[:640]) for part in sets]
    data.load = lambda *_: few
