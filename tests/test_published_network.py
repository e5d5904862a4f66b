"""Weights with the published names, against the published network written with plain functions."""

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import bundled_digits, run_script
from PIL import Image

import checkpoint
import data
from modules import Decoder, Encoder
from testers import float64_distances, random_images

pytestmark = pytest.mark.rounding


def published_state(hidden_size=8, num_codes=16, channels=1):
    """A state_dict with the published names and random values, including BatchNorm statistics."""
    torch.manual_seed(3)
    state = {}
    for prefix, module in (("encoder", Encoder(channels, hidden_size)), ("decoder", Decoder(channels, hidden_size))):
        for name, value in module.state_dict().items():
            random = torch.rand(value.shape) + 0.5 if "var" in name else torch.randn(value.shape) / 4
            state[f"{prefix}.{name}"] = random.to(value.dtype)
    state["codeBook.embedding.weight"] = torch.randn(num_codes, hidden_size)
    return state


@pytest.mark.parametrize("wrapper", ["state_dict", "model_state_dict"])
def test_wrapped_state_dict_loads(wrapper, tmp_path):
    torch.save({wrapper: published_state(), "epoch": 3}, tmp_path / "wrapped.pt")
    torch.save(published_state(), tmp_path / "bare.pt")
    (wrapped, _), (bare, _) = (checkpoint.load_model(tmp_path / f"{name}.pt") for name in ("wrapped", "bare"))
    assert all(torch.equal(value, bare.state_dict()[name]) for name, value in wrapped.state_dict().items())


def published_names():
    """The names in the published checkpoint, listed independently of the modules."""
    block = ["1.weight", "1.bias", "4.weight", "4.bias"] + \
        [f"{i}.{name}" for i in (2, 5)
         for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")]
    norm = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
    names = {"codeBook.embedding.weight"}
    for half, convolutions, batch_norm, blocks in (("encoder", (0, 3), 1, (4, 5)), ("decoder", (3, 6), 4, (0, 1))):
        names |= {f"{half}.{i}.{name}" for i in convolutions for name in ("weight", "bias")}
        names |= {f"{half}.{batch_norm}.{name}" for name in norm}
        names |= {f"{half}.{i}.block.{name}" for i in blocks for name in block}
    return names


def published_forward(state, x):
    """The reconstruction of x by the published network, computed from its state_dict."""
    def norm(name, x):
        mean, var = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale = state[f"{name}.weight"] / torch.sqrt(var + 1e-5)
        return (x - mean[:, None, None]) * scale[:, None, None] + state[f"{name}.bias"][:, None, None]

    def conv(name, x, **kwargs):
        return F.conv2d(x, state[f"{name}.weight"], state[f"{name}.bias"], **kwargs)

    def conv_transposed(name, x):
        return F.conv_transpose2d(x, state[f"{name}.weight"], state[f"{name}.bias"], stride=2, padding=1)

    def residual(name, x):
        hidden = norm(f"{name}.block.2", conv(f"{name}.block.1", x.relu_(), padding=1))
        return x + norm(f"{name}.block.5", conv(f"{name}.block.4", hidden.relu_()))     # relu_ has changed x in place

    z_e = conv("encoder.0", x, stride=2, padding=1)
    z_e = conv("encoder.3", norm("encoder.1", z_e).relu_(), stride=2, padding=1)
    z_e = residual("encoder.5", residual("encoder.4", z_e))
    codebook = state["codeBook.embedding.weight"]
    nearest = float64_distances(z_e.permute(0, 2, 3, 1), codebook).argmin(dim=1)
    B, D, h, w = z_e.shape
    z_q = codebook[nearest].view(B, h, w, D).permute(0, 3, 1, 2).contiguous()
    y = residual("decoder.1", residual("decoder.0", z_q)).relu_()
    y = norm("decoder.4", conv_transposed("decoder.3", y)).relu_()
    return torch.tanh(conv_transposed("decoder.6", y))


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_published_state_dict_loads_and_its_outputs_match(tmp_path, channels, prefix):
    state = published_state(channels=channels)
    assert set(state) == published_names()
    torch.save({prefix + name: value for name, value in state.items()}, tmp_path / "published.pt")
    model, contents = checkpoint.load_model(tmp_path / "published.pt")
    assert contents["config"] == {"channels": channels, "hidden_size": 8, "num_codes": 16}
    x = random_images(5, channels)
    expected = published_forward(state, x.clone())
    assert expected.std() > 0.1
    with torch.no_grad():
        assert (model(x).reconstruction - expected).abs().max() < 1e-5


def test_generate_matches_the_published_network(tmp_path):
    state = published_state(hidden_size=40, num_codes=64)
    torch.save(state, tmp_path / "published.pt")
    result = run_script("generate.py", "--model", "published.pt", "--dataset", "MNIST-10k", "--hidden-size", 40,
                        "--k", 64, "--seed", 7, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    written = torchvision.transforms.functional.pil_to_tensor(
        Image.open(tmp_path / "generatedImages" / "MNIST-10k.png").convert("L"))

    digits = torch.from_numpy(bundled_digits()[0][9000:]).unsqueeze(1)
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(7))[:100]
    expected = published_forward(state, data.to_model_range(digits[chosen]))
    expected = torchvision.utils.make_grid((expected + 1) / 2, nrow=10)[0] * 255
    # A latent between two codes may round to either, which changes the pixels around it.
    assert ((written[0] - expected).abs() <= 1).float().mean() > 0.99
