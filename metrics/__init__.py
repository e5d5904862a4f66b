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
    restored. Of several processes each brings its own shard of the set, and all get the figures of the complete set.
    """
    was_training = model.training
    model.eval()
    sums, num_images = torch.zeros(len(Losses._fields), dtype=torch.float64), torch.tensor(0)
    counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64)
    for images, _ in batches:
        x = to_model_range(images, device)                            # (B, C, H, W) in [-1, 1]
        output = model(x)
        sums += torch.stack(vqvae_losses(x, output, beta)).cpu().double() * len(x)
        num_images += len(x)
        counts += code_counts(output.indices, len(counts)).cpu()
    model.train(was_training)
    for total in (sums, num_images, counts):
        distributed.all_reduce_sum(total)
    return Losses(*(sums / num_images).tolist()), counts


@torch.no_grad()
def nats_per_code(prior, maps, labels, device):
    """−log p(map | label) of code maps (N, h, w), the mean over all codes, in evaluation mode.

    Of several processes each takes its shard of the maps, and all get the mean.
    """
    was_training, shard = prior.training, distributed.shard_slice()
    prior.eval()
    batch_size = maps_that_fit(prior)
    total = sum(prior.log_prob(map_batch.to(device), label_batch.to(device)).cpu().double().sum().item()
                for map_batch, label_batch in zip(maps[shard].split(batch_size), labels[shard].split(batch_size)))
    prior.train(was_training)
    return -distributed.all_reduce_sum(torch.tensor(total, dtype=torch.float64)).item() / maps.numel()
