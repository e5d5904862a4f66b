"""Quantizers of vector-quantize-pytorch under the names that add_to_quantizers() gives them.

python3 benchmarks/quantizer_adapters.py VQ-VAE.py --quantizer cosine ... runs a script with them.
"""

import runpy
import sys
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

import torch
from torch import nn
from vector_quantize_pytorch import LFQ, ResidualVQ, SimVQ, VectorQuantize

from vector_quantizer import QUANTIZERS, Quantized, straight_through

RESIDUAL_SIZES = 16, 32         # codes of the two codebooks: 512 pairs
EMA = {"decay": 0.99, "kmeans_init": True, "threshold_ema_dead_code": 2}        # of those with moving averages


class Adapter(nn.Module):
    """A quantizer of that library under the contract of vector_quantizer.py.

    inner(x): latents (1, N, D) → codes, indices, loss. codes_of(indices) → codes (1, N, D) of indices as it returns
    them. sizes: the numbers of codes that make up an index. loss_has_beta: whether its loss is a commitment loss, to be
    weighted by β, or a complete one.
    """

    def __init__(self, num_codes, dim, inner, codes_of, sizes=None, loss_has_beta=True):
        super().__init__()
        self.num_codes, self.dim, self.inner, self.codes_of = num_codes, dim, inner, codes_of
        self.sizes, self.loss_has_beta = sizes, loss_has_beta

    def forward(self, z_e):
        B, D, h, w = z_e.shape
        flat = z_e.permute(0, 2, 3, 1).reshape(1, -1, D).float()                      # (1, N, D)
        with self._not_initialised_in_evaluation():
            codes, indices, loss = self.inner(flat)[:3]
        if not self.training:           # some have no straight-through gradient in evaluation mode
            codes = straight_through(flat, codes.detach())
        if self.sizes:
            indices = indices[..., 0] * self.sizes[1] + indices[..., 1]               # (1, N)
        loss, none = loss.sum(), flat.new_zeros(())
        losses = (none, loss) if self.loss_has_beta else (loss, none)
        return Quantized(codes.view(B, h, w, D).permute(0, 3, 1, 2), indices.view(B, h, w).long(), *losses)

    def encode(self, z_e):
        return self(z_e).indices

    def lookup(self, indices):
        flat = indices.reshape(1, -1)
        if self.sizes:
            flat = torch.stack([flat // self.sizes[1], flat % self.sizes[1]], dim=-1)                 # (1, N, 2)
        return self.codes_of(flat).view(*indices.shape, self.dim).permute(0, 3, 1, 2)

    @contextmanager
    def _not_initialised_in_evaluation(self):
        """Its K-means would run in evaluation mode too, on whatever comes first."""
        flags = [buffer for name, buffer in self.inner.named_buffers() if name.endswith("initted")]
        before = [flag.clone() for flag in flags]
        if not self.training:
            for flag in flags:
                flag.fill_(True)
        yield
        if not self.training:
            for flag, value in zip(flags, before):
                flag.copy_(value)


def cosine(num_codes, dim):
    inner = VectorQuantize(dim, num_codes, use_cosine_sim=True, rotation_trick=False, **EMA)
    return Adapter(num_codes, dim, inner, inner.get_output_from_indices)


def rotation(num_codes, dim):
    inner = VectorQuantize(dim, num_codes, rotation_trick=True, **EMA)
    return Adapter(num_codes, dim, inner, inner.get_output_from_indices)


def simvq(num_codes, dim):
    inner = SimVQ(dim, num_codes, rotation_trick=False)
    return Adapter(num_codes, dim, inner, inner.indices_to_codes, loss_has_beta=False)


def bsq(num_codes, dim):
    """Binary spherical quantization (Zhao et al. 2024): LFQ of latents on a sphere.

    LFQ itself came to perplexities of 2 to 84 here, whatever the weights of its losses. The default weight of the
    entropy loss, 0.1, makes it as large as the reconstruction loss; a tenth of that is better.
    """
    inner = LFQ(dim=dim, codebook_size=num_codes, spherical=True, entropy_loss_weight=0.01)
    return Adapter(num_codes, dim, inner, inner.indices_to_codes, loss_has_beta=False)


def residual(num_codes, dim):
    if num_codes != RESIDUAL_SIZES[0] * RESIDUAL_SIZES[1]:
        raise ValueError(f"--k {num_codes}: the two codebooks have {RESIDUAL_SIZES} codes")
    inner = ResidualVQ(dim=dim, num_quantizers=2, codebook_size=RESIDUAL_SIZES, rotation_trick=False, **EMA)
    return Adapter(num_codes, dim, inner, inner.get_output_from_indices, RESIDUAL_SIZES)


def add_to_quantizers():
    """Add them to QUANTIZERS, so that --quantizer and checkpoints know them in this process."""
    QUANTIZERS.update({make.__name__: make for make in (cosine, rotation, simvq, bsq, residual)})


if __name__ == "__main__":
    add_to_quantizers()
    sys.argv = [str(ROOT / sys.argv[1]), *sys.argv[2:]]
    runpy.run_path(sys.argv[0], run_name="__main__")
