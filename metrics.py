"""What a VQ-VAE and its prior are measured by, over a whole data set."""

import torch

import processes
from data import to_model_range
from modules import Losses, vqvae_losses

AT_ONCE = 500                   # images or code maps of MNIST's size


def at_once(height, width):
    """How many images of that size, or maps of their codes, are taken at once: as much memory as for MNIST."""
    return max(1, AT_ONCE * 28**2 // max(28**2, height * width))


def perplexity(counts):
    """exp(entropy) of the codes' use, from counts (K,): 1 if one code does all, K if all do the same."""
    shares = counts.double() / counts.sum()
    return torch.special.entr(shares).sum().exp().item()


@torch.no_grad()
def evaluate(model, batches, device, beta=1.0):
    """Measure model over batches of (uint8 images, labels), in evaluation mode.

    → (losses, counts): Losses of numbers, means over images whatever the sizes of the batches;
    int64 counts (K,), how often each code was chosen in the whole set. No parameter, buffer or
    random state changes, and the model's mode is restored. Of several processes each brings its own
    part of the set, and all get the figures of the whole.
    """
    was_training = model.training
    model.eval()
    sums, images_seen = torch.zeros(len(Losses._fields), dtype=torch.float64), torch.tensor(0)
    counts = torch.zeros(model.quantizer.num_codes, dtype=torch.int64)
    for images, _ in batches:
        x = to_model_range(images, device)
        output = model(x)
        sums += torch.stack(vqvae_losses(x, output, beta)).cpu().double() * len(x)
        images_seen += len(x)
        counts += torch.bincount(output.indices.flatten(), minlength=len(counts)).cpu()
    model.train(was_training)
    for total in (sums, images_seen, counts):
        processes.all_sum(total)
    return Losses(*(sums / images_seen).tolist()), counts


@torch.no_grad()
def code_maps(model, batches, device, bar=None):
    """The code maps (N, h, w), on the CPU, of all images in batches of (uint8 images, labels).

    The model is in evaluation mode. bar, such as a tqdm, is told by update(n) of every n images.
    """
    maps = []
    for images, _ in batches:
        maps.append(model.encode(to_model_range(images, device)).cpu())
        if bar is not None:
            bar.update(len(images))
    return torch.cat(maps)


@torch.no_grad()
def nats_per_code(prior, maps, labels, device):
    """−log p(map | label) of code maps (N, h, w), the mean over all their codes, in evaluation mode.

    Of several processes each takes its part of the maps, and all get the mean.
    """
    was_training, own = prior.training, processes.rows()
    prior.eval()
    some = at_once(4 * prior.height, 4 * prior.width)
    total = sum(prior.log_prob(some_maps.to(device), their.to(device)).cpu().double().sum().item()
                for some_maps, their in zip(maps[own].split(some), labels[own].split(some)))
    prior.train(was_training)
    return -processes.all_sum(torch.tensor(total, dtype=torch.float64)).item() / maps.numel()
