"""Baselines for benchmarks/speed.py: the usual implementations of training, quantization and sampling."""

import os
import tempfile
import time

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torch.utils.tensorboard import SummaryWriter
from torchvision import transforms

import data
from modules import Decoder, Encoder, init_convolution
from prior import sample_codes
from utils import inputs


def full_matrix(flat, codebook):
    """Nearest codes (N,) of latents (N, D) by all N × K distances at once, ‖z‖² + ‖e‖² − 2 z·e."""
    squares = flat.square().sum(dim=1, keepdim=True) + codebook.square().sum(dim=1)               # (N, K)
    return torch.addmm(squares, flat, codebook.T, alpha=-2).argmin(dim=1)


def cdist(flat, codebook):
    """The same with torch.cdist."""
    return torch.cdist(flat, codebook).argmin(dim=1)


class Quantizer(nn.Module):
    """z_e (B, D, h, w) → (z_q, indices, codebook loss, commitment loss), the codes found by `nearest`."""

    def __init__(self, num_codes, dim, nearest):
        super().__init__()
        self.codebook = nn.Parameter(torch.empty(num_codes, dim).uniform_(-1 / num_codes, 1 / num_codes))
        self.nearest = nearest

    def forward(self, z_e):
        B, D, h, w = z_e.shape
        flat = z_e.permute(0, 2, 3, 1).reshape(-1, D)                 # (N, D)
        with torch.no_grad():
            indices = self.nearest(flat, self.codebook)               # (N,)
        codes = F.embedding(indices, self.codebook)                   # (N, D)
        z_q = (flat + (codes - flat).detach()).view(B, h, w, D).permute(0, 3, 1, 2)
        return z_q, indices, F.mse_loss(codes, flat.detach()), F.mse_loss(flat, codes.detach())


class DigitDataset(Dataset):
    """The bundled digits, one PIL image at a time through transforms, as torchvision's MNIST does it."""

    def __init__(self):
        images = data.load("MNIST-10k", "MNIST")[0]
        self.images, self.labels = images.images.squeeze(1).numpy(), images.labels.tolist()
        self.transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize((0.5,), (0.5,))])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(np.asarray(self.images[i]), mode="L")), self.labels[i]


def training(batch_size, device="cpu", num_codes=512, dim=40, beta=1.0, lr=2e-4):
    """→ a function that trains for one epoch on the bundled digits and returns images/s."""
    inputs.find_device(device)          # which sets the precision of convolutions, for a fair comparison
    torch.manual_seed(0)
    encoder, quantizer, decoder = Encoder(1, dim), Quantizer(num_codes, dim, full_matrix), Decoder(1, dim)
    model = nn.ModuleList([encoder, quantizer, decoder]).apply(init_convolution).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    loader = DataLoader(DigitDataset(), batch_size, shuffle=True, num_workers=max(0, os.cpu_count() - 1))
    writer = SummaryWriter(tempfile.mkdtemp())
    steps = 0

    def epoch():
        nonlocal steps
        start = time.perf_counter()
        for x, _ in loader:
            x = x.to(device)
            z_q, _, codebook_loss, commitment_loss = quantizer(encoder(x))
            reconstruction_loss = F.mse_loss(decoder(z_q), x)
            optimizer.zero_grad()
            (reconstruction_loss + codebook_loss + beta * commitment_loss).backward()
            optimizer.step()
            steps += 1
            writer.add_scalar("reconstruction", reconstruction_loss.item(), steps)
            writer.add_scalar("codebook", codebook_loss.item(), steps)
            writer.add_scalar("commitment", commitment_loss.item(), steps)
        return len(loader.dataset) / (time.perf_counter() - start)
    return epoch


@torch.no_grad()
def uncached_sample(prior, labels, generator):
    """Code maps (B, h, w) as drawn by CodePrior.sample(), but without a cache of the earlier positions."""
    labels = labels.to(prior.positions.device)
    codes = labels.new_empty(len(labels), 0)
    draws = torch.rand(len(labels), prior.height * prior.width, generator=generator).T.to(labels.device)      # (T, B)
    for t in range(prior.height * prior.width):
        previous = F.pad(prior.code_embedding(codes), (0, 0, 1, 0))   # (B, t + 1, E)
        x = previous + prior._condition(labels).unsqueeze(1) + prior.positions[:t + 1]
        for block in prior.blocks:
            x = block(x)
        logits = prior._logits(prior.norm(x[:, -1]))                  # (B, K)
        codes = torch.cat([codes, sample_codes(logits, draws[t]).unsqueeze(1)], dim=1)
    return codes.view(-1, prior.height, prior.width)
