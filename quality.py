"""How good sampled digits are: recognised by a classifier, near to real ones as a set, and not copied.

Letters: N images, h×w codes of one map, E features of the classifier.
"""

from typing import NamedTuple

import torch

from data import to_model_range
from metrics import AT_ONCE, at_once


class Seen(NamedTuple):
    """What the classifier sees in N images."""

    digits: torch.Tensor        # (N,) int64, the most probable one
    features: torch.Tensor      # (N, E), what its last layer sees


@torch.no_grad()
def look_at(classifier, batches, bar):
    """Images as an iterable of (B, 1, H, W) in [-1, 1] → Seen, on the CPU. bar is told of them by update(n)."""
    digits, features = [], []
    for x in batches:
        features.append(classifier.features(x))
        digits.append(classifier.head(features[-1]).argmax(dim=1))
        bar.update(len(x))
    return Seen(torch.cat(digits).cpu(), torch.cat(features).cpu())


def spread_labels(num_classes, count):
    """count labels in order, as many of each class as of the others: of ten classes and a hundred, ten times ten."""
    return torch.arange(count) * num_classes // count


def real(images, device):
    """uint8 images (N, 1, H, W), a batch at a time."""
    return (to_model_range(some, device) for some in images.split(AT_ONCE))


def decoded(model, maps, device):
    """The images of code maps (N, h, w), a batch at a time."""
    return (model.decode(some.to(device)) for some in maps.split(at_once(4 * maps.shape[1], 4 * maps.shape[2])))


@torch.no_grad()
def sampled_maps(prior, labels, sampling, generator, device, bar=None):
    """A map for each of labels (N,), on the CPU: (N, h, w), drawn as many at once as the memory of MNIST's allows.

    sampling: temperature, top_k and guidance of CodePrior.sample(). bar, such as a tqdm, is told by update(n).
    """
    maps = []
    for some in labels.split(at_once(4 * prior.height, 4 * prior.width)):
        maps.append(prior.sample(some.to(device), **sampling, generator=generator).cpu())
        if bar is not None:
            bar.update(len(some))
    return torch.cat(maps)


@torch.no_grad()
def noise_maps(model, count, height, width, generator, device):
    """The codes nearest to Gaussian noise, as the published sampling draws them, on the CPU: (count, h, w)."""
    z = torch.randn(count, model.quantizer.dim, height, width, generator=generator)
    return torch.cat([model.quantizer(some.to(device)).indices.cpu() for some in z.split(AT_ONCE)])


def frechet_distance(one, other):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets of features (N, E), (M, E), as Gaussians, in float64.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule …", there with Inception's
    features. The trace of the root is the sum of the roots of the eigenvalues of Σ₁Σ₂, which are
    real and not negative but for rounding. Raises ValueError if a feature is no finite number.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("a single image has no distribution: the Fréchet distance takes two and more")
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("some of the classifier's features are no finite numbers: it or the model is damaged")
    one, other = one.double(), other.double()
    difference = one.mean(dim=0) - other.mean(dim=0)
    covariances = [torch.cov(features.T) for features in (one, other)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    return (difference.square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()).item()


def memorised(maps, training_maps):
    """The share of maps (N, h, w) that stand, code for code, among training_maps (M, h, w)."""
    known = {row.tobytes() for row in training_maps.flatten(1).numpy()}
    return sum(row.tobytes() in known for row in maps.flatten(1).numpy()) / len(maps)
