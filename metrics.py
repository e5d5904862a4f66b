"""What a VQ-VAE is measured by, over a whole data set."""

import torch

from data import to_model_range
from modules import Losses, vqvae_losses


def perplexity(counts):
    """exp(entropy) of the codes' use, from counts (K,): 1 if one code does all, K if all do the same."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def evaluate(model, batches, device, beta=1.0):
    """Measure model over batches of (uint8 images, labels), in evaluation mode.

    → (losses, counts): Losses of numbers, means over images whatever the sizes of the batches;
    int64 counts (K,), how often each code was chosen in the whole set. No parameter, buffer or
    random state changes, and the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    sums, images_seen = torch.zeros(len(Losses._fields), dtype=torch.float64), 0
    counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64)
    for images, _ in batches:
        x = to_model_range(images, device)
        output = model(x)
        sums += torch.stack(vqvae_losses(x, output, beta)).double().cpu() * len(x)
        images_seen += len(x)
        counts += torch.bincount(output.indices.flatten(), minlength=len(counts)).cpu()
    model.train(was_training)
    return Losses(*(sums / images_seen).tolist()), counts
