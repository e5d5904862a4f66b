"""The encoder, the decoder, the VQ-VAE around the quantizer, and its losses.

Letters: B images, C channels, H×W pixels, h×w = H/f × W/f latents, D latent size, K codes. f is 4 in the published
network, whose layers and parameter names these are; with 8 or 16 there are one or two more stages of each kind.
"""

import copy
import inspect
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vector_quantizer import QUANTIZERS, Quantized, check_indices

DOWNSAMPLES = 4, 8, 16      # f: pixels that a code covers, in each direction


class VQVAEOutput(NamedTuple):
    """What the model returns for images (B, C, H, W)."""

    reconstruction: torch.Tensor    # (B, C, H, W) in [-1, 1]
    z_e: torch.Tensor               # (B, D, h, w), the encoder's latents
    z_q: torch.Tensor               # (B, D, h, w), the codes that replace them
    indices: torch.Tensor           # (B, h, w) int64, in [0, K)
    codebook_loss: torch.Tensor     # scalar
    commitment_loss: torch.Tensor   # scalar, unweighted by β


class Losses(NamedTuple):
    """The three losses of eq. 3, each a mean over elements, and their sum with β."""

    reconstruction: torch.Tensor    # MSE: −log p(x|z_q) of a Gaussian with fixed variance, up to constants
    codebook: torch.Tensor          # ‖sg[z_e] − e‖²: trains only the codebook
    commitment: torch.Tensor        # ‖z_e − sg[e]‖², without β: trains only the encoder
    total: torch.Tensor             # reconstruction + codebook + β·commitment


def vqvae_losses(x, output, beta):
    """Eq. 3 for images x (B, C, H, W) in [-1, 1] and the VQVAEOutput for them → Losses of scalars."""
    reconstruction = F.mse_loss(output.reconstruction, x)
    total = reconstruction + output.codebook_loss + beta * output.commitment_loss
    return Losses(reconstruction, output.codebook_loss, output.commitment_loss, total)


class ResidualBlock(nn.Module):
    """(B, D, h, w) → (B, D, h, w). The skip carries the rectified input, as published."""

    def __init__(self, dim):
        super().__init__()
        self.block = nn.Sequential(
            nn.Identity(),      # in the place of the published ReLU, for the numbers in the parameters' names
            nn.Conv2d(dim, dim, kernel_size=3, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel_size=1),
            nn.BatchNorm2d(dim),
        )

    def forward(self, x):
        # The published block starts with an in-place ReLU, which rectifies its skip as well.
        rectified = F.relu(x)
        return rectified + self.block(rectified)


class Encoder(nn.Sequential):
    """Images (B, C, H, W) → z_e (B, D, H/f, W/f)."""

    def __init__(self, channels, dim, downsample=4):
        stages = [layer for _ in range(int(math.log2(downsample)) - 1) for layer in (
            nn.BatchNorm2d(dim),
            nn.ReLU(),
            nn.Conv2d(dim, dim, kernel_size=4, stride=2, padding=1),
        )]
        super().__init__(
            nn.Conv2d(channels, dim, kernel_size=4, stride=2, padding=1),
            *stages,
            ResidualBlock(dim),
            ResidualBlock(dim),
        )


class Decoder(nn.Sequential):
    """z_q (B, D, h, w) → images (B, C, f·h, f·w) in [-1, 1]."""

    def __init__(self, channels, dim, downsample=4):
        stages = [layer for _ in range(int(math.log2(downsample)) - 1) for layer in (
            nn.ConvTranspose2d(dim, dim, kernel_size=4, stride=2, padding=1),
            nn.BatchNorm2d(dim),
            nn.ReLU(),
        )]
        super().__init__(
            ResidualBlock(dim),
            ResidualBlock(dim),
            nn.ReLU(),
            *stages,
            nn.ConvTranspose2d(dim, channels, kernel_size=4, stride=2, padding=1),
            nn.Tanh(),
        )


def init_convolution(module):
    """Xavier-uniform weights and zero biases for convolutions; other modules are unchanged."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def contiguous_on_mps(x):
    """x (B, D, h, w) as it is; on MPS contiguous, its gradient too: BatchNorm's gradients are wrong there otherwise.

    The quantizer's latents are channels last. A view's gradient has the memory format of the view.
    """
    return x.flatten(1).view(x.shape) if x.device.type == "mps" else x


class VectorQuantizedVAE(nn.Module):
    """Encoder → quantizer → decoder (van den Oord et al. 2017, figure 1).

    channels is 1 or 3; hidden_size is D; num_codes is K; downsample is f, one of DOWNSAMPLES; quantizer is a name in
    QUANTIZERS, and **settings are its other arguments. Raises ValueError for another number of channels, f or
    quantizer, a size below 1, or a quantizer that breaks the contract.
    """

    def __init__(self, channels=1, hidden_size=40, num_codes=512, downsample=4, quantizer="vq", **settings):
        super().__init__()
        if channels not in (1, 3):
            raise ValueError(f"images have 1 or 3 channels, not {channels}")
        if min(hidden_size, num_codes) < 1:
            raise ValueError(f"hidden_size {hidden_size} and num_codes {num_codes} are not both positive integers")
        if type(downsample) is not int or downsample not in DOWNSAMPLES:
            raise ValueError(f"downsample is {', '.join(map(str, DOWNSAMPLES))}, not {downsample}")
        if quantizer not in QUANTIZERS:
            raise ValueError(f"quantizer {quantizer!r} is not in vector_quantizer.QUANTIZERS, which has "
                             f"{', '.join(QUANTIZERS)}")
        check_settings(quantizer, settings)
        self.channels, self.downsample = channels, downsample
        self.encoder = Encoder(channels, hidden_size, downsample)
        self.quantizer = QUANTIZERS[quantizer](num_codes, hidden_size, **settings)
        self.decoder = Decoder(channels, hidden_size, downsample)
        self.encoder.apply(init_convolution)
        self.decoder.apply(init_convolution)
        check_quantizer(self.quantizer, num_codes, hidden_size)

    def forward(self, x):
        """Images x (B, C, H, W) in [-1, 1] → VQVAEOutput. Raises ValueError as encode() does."""
        z_e = self._latents(x)                                        # (B, D, h, w)
        quantized = self.quantizer(contiguous_on_mps(z_e))
        return VQVAEOutput(self.decoder(contiguous_on_mps(quantized.z_q)), z_e, *quantized)

    def encode(self, x):
        """Code indices (B, H/f, W/f) of images (B, C, H, W) in [-1, 1].

        In training mode BatchNorm uses the batch's statistics, and updates its own. Raises ValueError if x is not
        (B, C, H, W) with H and W multiples of f.
        """
        return self.quantizer.encode(self._latents(x))

    def decode(self, indices):
        """Images (B, C, f·h, f·w) in [-1, 1] from code indices (B, h, w).

        Raises ValueError if indices are not integers (B, h, w) in [0, K).
        """
        if indices.dim() != 3:
            raise ValueError(f"indices {tuple(indices.shape)} are not (B, h, w)")
        indices = check_indices(indices.cpu(), self.quantizer.num_codes)
        return self.decoder(self.quantizer.lookup(indices.to(next(self.parameters()).device)))

    def map_size(self, height, width):
        """(h, w) of the code map of images of (H, W) pixels. Raises ValueError if there is none."""
        if min(height, width) < 1 or height % self.downsample or width % self.downsample:
            raise ValueError(f"images of {height}×{width} pixels do not fit: height and width are multiples of "
                             f"{self.downsample}")
        return height // self.downsample, width // self.downsample

    def image_size(self, map_height, map_width):
        """(H, W) of the images of code maps (h, w)."""
        return map_height * self.downsample, map_width * self.downsample

    def _latents(self, x):
        if x.dim() != 4 or x.shape[1] != self.channels:
            raise ValueError(f"images {tuple(x.shape)} are not (B, {self.channels}, H, W)")
        self.map_size(*x.shape[2:])
        return self.encoder(x)


# ---------------------------------------------------------------- the contract of a quantizer

TRIED_INDICES = 256     # of each codebook, the first and the last among them


def check_settings(name, settings):
    """Raise ValueError if the quantizer of that name needs a setting that is not among these, the others' defaults."""
    parameters = list(inspect.signature(QUANTIZERS[name]).parameters.values())[2:]          # after num_codes and dim
    for parameter in parameters:
        if parameter.default is parameter.empty and parameter.name not in settings and parameter.kind not in (
                parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise ValueError(f"the quantizer {name!r} does not keep the contract in vector_quantizer.py: its setting "
                             f"{parameter.name} has no default")


def check_quantizer(quantizer, num_codes, dim):
    """Raise ValueError unless a new quantizer keeps the contract of vector_quantizer.py, as far as a trial shows.

    It quantizes a few latents in evaluation mode, without random numbers. On the meta device, which has no values, only
    the presence of its parts is checked.
    """
    require = _requirements_of(quantizer)
    require(isinstance(quantizer, nn.Module), "it is not an nn.Module")
    for attribute, expected in (("num_codes", num_codes), ("dim", dim)):
        require(hasattr(quantizer, attribute), f"it has no {attribute}")
        found = getattr(quantizer, attribute)
        fits = type(found) in (int, type(expected)) and found == expected
        require(fits, f"its {attribute} is {found!r}, not {expected}")
    require(type(quantizer).forward is not nn.Module.forward, "it has no forward()")
    for method in ("encode", "lookup"):
        require(callable(getattr(quantizer, method, None)), f"it has no {method}()")
    if hasattr(quantizer, "restarts"):
        count = dict(quantizer.named_buffers()).get("restarts")
        require(count is not None and count.shape == () and count.dtype == torch.int64,
                "its restarts is not a buffer of one int64 number, without dimensions")
        require("restarts" not in quantizer.state_dict(), "its restarts is a persistent buffer")
    z_e = _made_up_latents(dim)
    if z_e.is_meta:
        return
    modes = {module: module.training for module in quantizer.modules()}
    quantizer.eval()
    try:
        _check_outputs(quantizer, z_e, require)
    finally:
        for module, mode in modes.items():
            module.training = mode


def check_training_mode(quantizer):
    """Raise ValueError unless forward() keeps the contract in training mode too. Tries a copy, so nothing changes."""
    copied, require = copy.deepcopy(quantizer).train(), _requirements_of(quantizer, " in training mode")
    restarts = getattr(copied, "restarts", None)
    with torch.random.fork_rng(devices=[]):
        _check_forward(copied, _made_up_latents(quantizer.dim), require)
    require(getattr(copied, "restarts", None) is restarts, "its restarts is another tensor, not changed in place")


def check_state(quantizer, make):
    """Raise ValueError unless all that a quantizer has drawn is in its state_dict. make() → another one, made alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        other = make()
    other.load_state_dict(quantizer.state_dict())
    quantizer, other = copy.deepcopy(quantizer).eval(), other.eval()
    require, z_e = _requirements_of(quantizer), _made_up_latents(quantizer.dim)
    with torch.no_grad():
        indices = quantizer.encode(z_e)
        require(torch.equal(other.encode(z_e), indices)
                and torch.allclose(other.lookup(indices), quantizer.lookup(indices), rtol=1e-4, atol=1e-6),
                "another one with its state_dict has other codes: what is learned or drawn is a parameter or a buffer")


def _requirements_of(quantizer, when=""):
    """→ require(condition, wrong), which raises ValueError(wrong) of a quantizer unless a condition holds."""
    def require(condition, wrong):
        if not condition:
            raise ValueError(f"the quantizer {type(quantizer).__name__} does not keep the contract in "
                             f"vector_quantizer.py{when}: {wrong}")
    return require


def _require_tensor(require, value, what, shape, dtype=None):
    kind = dtype or "floating point"
    require(torch.is_tensor(value), f"{what} is {type(value).__name__}, not a tensor")
    require(value.shape == shape and (value.dtype == dtype if dtype else value.is_floating_point()),
            f"{what} is {value.dtype} {tuple(value.shape)}, not {kind} {tuple(shape)}")


def _made_up_latents(dim):
    """Latents (2, D, 3, 4), always the same; of three different sizes, so that swapped dimensions show."""
    return torch.arange(2 * dim * 3 * 4.0).sin().view(2, dim, 3, 4)


def _check_forward(quantizer, z_e, require):
    """Try forward() on latents z_e (B, D, h, w), with their gradient unless that is impossible. → its output"""
    B, _, h, w = z_e.shape
    with torch.enable_grad():
        z_e = z_e.clone().requires_grad_()
        output = quantizer(z_e)
        require(isinstance(output, Quantized), f"forward() returns {type(output).__name__}, not Quantized")
        for field, shape, dtype in (("z_q", z_e.shape, None), ("indices", (B, h, w), torch.int64),
                                    ("codebook_loss", (), None), ("commitment_loss", (), None)):
            _require_tensor(require, getattr(output, field), f"forward()'s {field}", shape, dtype)
        require(output.indices.min() >= 0 and output.indices.max() < quantizer.num_codes,
                f"forward()'s indices leave [0, {quantizer.num_codes})")
        if not torch.is_inference_mode_enabled():
            gradient = output.z_q.requires_grad and torch.autograd.grad(
                output.z_q, z_e, z_e.detach().to(output.z_q.dtype), allow_unused=True)[0]
            require(torch.is_tensor(gradient) and gradient.any(), "no gradient of forward()'s z_q reaches z_e")
    return output


def _check_outputs(quantizer, z_e, require):
    """The part of check_quantizer() that calls a quantizer in evaluation mode, on latents z_e (B, D, h, w)."""
    state = dict((*quantizer.named_parameters(), *quantizer.named_buffers()))
    before = {key: value.detach().clone() for key, value in state.items()}

    def require_no_change():
        for key, value in (*quantizer.named_parameters(), *quantizer.named_buffers()):
            require(key in before and torch.equal(value, before[key]), f"its {key} changes in evaluation mode")

    output = _check_forward(quantizer, z_e, require)
    require_no_change()
    with torch.no_grad():
        indices, codes = quantizer.encode(z_e), quantizer.lookup(output.indices)
        _require_tensor(require, indices, "encode()'s result", output.indices.shape, torch.int64)
        require(torch.equal(indices, output.indices), "encode() gives other indices than forward()")
        _require_tensor(require, codes, "lookup()'s result", z_e.shape, output.z_q.dtype)
        require(torch.allclose(codes, output.z_q, rtol=1e-4, atol=1e-6), "lookup() gives other codes than forward()")
        # The latents above need not reach the first and the last code.
        K = quantizer.num_codes
        tried = torch.linspace(0, K - 1, min(K, TRIED_INDICES)).round().long().view(1, 1, -1)
        try:
            indices = quantizer.encode(quantizer.lookup(tried))
        except IndexError as error:
            require(False, f"lookup() does not take all indices in [0, {K}) ({error})")
        require(indices.min() >= 0 and indices.max() < K, f"encode()'s indices leave [0, {K})")
    require_no_change()
