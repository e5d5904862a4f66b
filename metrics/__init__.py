"""Measures of a VQ-VAE and its prior over a data set: losses, perplexity, nats per code."""

import torch

from data import to_model_range
from modules import Losses, vqvae_losses
from utils import distributed
from utils.memory import maps_that_fit


def code_counts(indices, num_codes):
    """How often each of K codes occurs in indices, of any shape: int64 (K,). No host–device synchronisation."""
    indices = indices.flatten().long()
    return torch.zeros(num_codes, dtype=torch.int64, device=indices.device).index_add_(
        0, indices, torch.ones_like(indices))


def perplexity(counts):
    """exp(entropy) of the codes' use, from counts (K,): 1 if a single code is used, K if all are used equally."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def evaluate(model, batches, device, beta=1.0):
    """Measure a model over batches of (uint8 images, labels), in evaluation mode.

    → (losses, counts): Losses of numbers, means over images whatever the sizes of the batches; int64 counts (K,), how
    often each code was chosen in the whole set. No parameter, buffer or random state changes, and the model's mode is
    restored. With several processes, each evaluates its shard of the set, and all get the metrics of the complete set.
    """
    was_training = model.training
    model.eval()
    # Summed on the device, so that no batch waits for it; MPS has no float64.
    sums = torch.zeros(len(Losses._fields), dtype=torch.float64, device="cpu" if "mps" in str(device) else device)
    counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64, device=device)
    num_images = torch.tensor(0)
    for images, _ in batches:
        x = to_model_range(images, device)                            # (B, C, H, W) in [-1, 1]
        output = model(x)
        sums += torch.stack(vqvae_losses(x, output, beta)).to(sums.device).double() * len(x)
        counts += code_counts(output.indices, len(counts))
        num_images += len(x)
    model.train(was_training)
    sums, num_images, counts = distributed.all_reduce_sums(sums.cpu(), num_images, counts.cpu())
    return Losses(*(sums / num_images).tolist()), counts


@torch.no_grad()
def nats_per_code(prior, maps, labels):
    """−log p(map | label) of code maps (N, h, w), on the CPU, the mean over all codes, in evaluation mode.

    With several processes, each takes its shard of the maps, and all get the mean.
    """
    was_training, shard = prior.training, distributed.shard_slice()
    prior.eval()
    batch_size = maps_that_fit(prior)
    nats = [prior.log_prob(map_batch, label_batch)                    # (B,)
            for map_batch, label_batch in zip(maps[shard].split(batch_size), labels[shard].split(batch_size))]
    total = torch.cat(nats).cpu().double().sum()
    prior.train(was_training)
    return -distributed.all_reduce_sum(total).item() / maps.numel()
