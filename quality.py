"""How good sampled digits are: recognised by a judge, near to real ones as a set, and not copied.

Letters: N images, C×H×W their shape, h×w codes of one map.
"""

import torch

from classifier import frechet_distance
from data import to_model_range

SAMPLES = 10_000
AT_ONCE = 500


@torch.no_grad()
def encode(model, images, device):
    """uint8 images (N, C, H, W) → their code maps (N, h, w), on the CPU."""
    return torch.cat([model.encode(to_model_range(some, device)).cpu() for some in images.split(AT_ONCE)])


@torch.no_grad()
def judged(classifier, model, maps, device):
    """What the judge sees in decoded maps (N, h, w): the digits (N,), and the features (N, E)."""
    digits, features = [], []
    for some in maps.split(AT_ONCE):
        seen = classifier.features(model.decode(some.to(device)))
        features.append(seen.cpu())
        digits.append(classifier.head(seen).argmax(dim=1).cpu())
    return torch.cat(digits), torch.cat(features)


@torch.no_grad()
def real_features(classifier, images, device):
    """The judge's features (N, E) of real uint8 images."""
    return torch.cat([classifier.features(to_model_range(some, device)).cpu() for some in images.split(AT_ONCE)])


def noise_maps(model, count, height, width, generator):
    """Code maps nearest to Gaussian noise, as generate.py --input random draws them: (count, h, w)."""
    z = torch.randn(count, model.quantizer.dim, height, width, generator=generator)
    return torch.cat([model.quantizer(some.to(model.quantizer.codebook.device)).indices.cpu()
                      for some in z.split(AT_ONCE)])


def memorised(samples, train_maps):
    """The share of sampled maps that stand, code for code, among the training maps (N, h, w)."""
    known = {row.tobytes() for row in train_maps.flatten(1).short().numpy()}
    return sum(row.tobytes() in known for row in samples.flatten(1).short().numpy()) / len(samples)


@torch.no_grad()
def sample_figures(model, prior, classifier, train_set, test_set, device, generator):
    """The prior's figures, as a plain dictionary.

    nats_per_code and prior_bits_per_pixel over the test set; for 10,000 samples, a thousand of each
    class at temperature 1 without guidance, the share recognised as the digit asked for, the Fréchet
    distance to the test set, and the share memorised; the first two for reconstructions of the test
    set, the distance for decoded noise, as yardsticks.
    """
    test_maps, train_maps = (encode(model, part.images, device) for part in (test_set, train_set))
    log_probs = torch.cat([prior.log_prob(maps.to(device), labels.to(device)).cpu().double()
                           for maps, labels in zip(test_maps.split(AT_ONCE), test_set.labels.split(AT_ONCE))])
    nats = -log_probs.sum().item() / test_maps.numel()
    labels = torch.arange(prior.num_classes).repeat_interleave(SAMPLES // prior.num_classes)
    samples = torch.cat([prior.sample(some.to(device), generator=generator).cpu() for some in labels.split(AT_ONCE)])
    digits, features = judged(classifier, model, samples, device)
    again, again_features = judged(classifier, model, test_maps, device)
    _, noise_features = judged(classifier, model, noise_maps(model, SAMPLES, *test_maps.shape[1:], generator), device)
    real = real_features(classifier, test_set.images, device)
    return {
        "nats_per_code": nats,
        "prior_bits_per_pixel": nats / torch.log(torch.tensor(2.0)).item() * test_maps[0].numel()
        / test_set.images[0].numel(),
        "recognised": (digits == labels).double().mean().item(),
        "frechet": frechet_distance(features, real),
        "recognised_reconstructions": (again == test_set.labels).double().mean().item(),
        "frechet_reconstructions": frechet_distance(again_features, real),
        "frechet_random": frechet_distance(noise_features, real),
        "memorised": memorised(samples, train_maps),
    }
