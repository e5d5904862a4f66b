"""How good sampled digits are: recognised by a classifier, close to real ones in distribution, and as varied.

Letters: N and M images, B of them in a batch, h×w codes of one map, F features of the classifier.
"""

import math
import time
from typing import NamedTuple

import torch

from data.code_maps import smallest_dtype
from utils.memory import images_that_fit, items_that_fit, samples_that_fit

NEIGHBOURS = 3              # k of precision and recall


class Predictions(NamedTuple):
    """What the classifier makes of N images, on the CPU."""

    digits: torch.Tensor        # (N,) int64, the most probable one
    features: torch.Tensor      # (N, F), the inputs of its last layer


@torch.no_grad()
def classify(classifier, batches, bar):
    """Predictions for an iterable of images (B, 1, H, W) in [-1, 1]. bar is advanced by update(n)."""
    digits, features = [], []
    for x in batches:
        features.append(classifier.features(x))
        digits.append(classifier.head(features[-1]).argmax(dim=1))
        bar.update(len(x))
    return Predictions(torch.cat(digits).cpu(), torch.cat(features).cpu())


def balanced_labels(num_classes, count):
    """count labels in order, equally many of each class: of ten classes and a hundred, ten times ten."""
    return torch.arange(count) * num_classes // count


@torch.no_grad()
def sample_maps(prior, labels, sampling, generator, bar=None, given=None):
    """A code map for each of labels (N,), on the CPU: (N, h, w) of the smallest_dtype().

    sampling: temperature, top_k and guidance of CodePrior.sample(). bar, such as a tqdm, is advanced by update(n).
    given (N, n) are the first n codes of each map, which are kept.
    """
    maps, dtype = [], smallest_dtype(prior.num_codes)
    size = samples_that_fit(prior, guided=sampling.get("guidance", 1) != 1)
    given = torch.empty(len(labels), 0, dtype=dtype) if given is None else given
    for batch, first in zip(labels.split(size), given.split(size)):
        maps.append(prior.sample(batch, **sampling, generator=generator, given=first).to(dtype).cpu())
        if bar is not None:
            bar.update(len(batch))
    return torch.cat(maps)


def sample_columns(prior, max_maps, seconds, generator):
    """Sample columns of code maps, in up to ten rows of a class each, until max_maps are there or the time is up.

    → maps (rows · columns, h, w), on the CPU, row by row; the number of columns. Raises RuntimeError if the time is too
    short for one column.
    """
    start, columns, rows = time.perf_counter(), [], min(10, max_maps, samples_that_fit(prior))
    labels = balanced_labels(prior.num_classes, rows)
    while not columns or (len(columns) < max_maps // rows and (
            time.perf_counter() - start) * (1 + 1 / len(columns)) < seconds):
        codes = []
        for code in prior.sample_in_order(labels, generator=generator):
            codes.append(code.cpu())        # waits for the device, so that the clock is right
            if not columns and time.perf_counter() - start > seconds:
                raise RuntimeError(f"{rows} of them take longer than the {seconds:.0f} s that they may: "
                                   "--sample-every 0 leaves them out")
        columns.append(torch.stack(codes, dim=1))                     # (rows, T)
    return torch.stack(columns, dim=1).view(-1, prior.height, prior.width), len(columns)


@torch.no_grad()
def noise_maps(model, count, height, width, generator, device):
    """The codes nearest to Gaussian noise, as the published sampling draws them, on the CPU: (count, h, w).

    They are of the smallest_dtype().
    """
    batch_size = images_that_fit(*model.image_size(height, width), model.quantizer.dim)
    maps = []
    for rows in torch.arange(count).split(batch_size):
        z = torch.randn(len(rows), model.quantizer.dim, height, width, generator=generator)
        maps.append(model.quantizer.encode(z.to(device)).to(smallest_dtype(model.quantizer.num_codes)).cpu())
    return torch.cat(maps)


def frechet_distance(one, other):
    """‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2(Σ₁Σ₂)^½) of two sets of features (N, F), (M, F), as Gaussians, in float64.

    Heusel et al. 2017, "GANs Trained by a Two Time-Scale Update Rule …", there with Inception's features. The trace of
    the root is the sum of the roots of the eigenvalues of Σ₁Σ₂, which are real and non-negative up to rounding.
    Raises ValueError if a feature is not finite, or a set has a single image.
    """
    if min(len(one), len(other)) < 2:
        raise ValueError("a single image has no distribution: the Fréchet distance takes two and more")
    if not (one.isfinite().all() and other.isfinite().all()):
        raise ValueError("some of the classifier's features are not finite: it or the model is damaged")
    one, other = one.double(), other.double()
    difference = one.mean(dim=0) - other.mean(dim=0)
    covariances = [torch.cov(features.T) for features in (one, other)]
    roots = torch.linalg.eigvals(covariances[0] @ covariances[1]).real.clamp(min=0).sqrt()
    distance = difference.square().sum() + covariances[0].trace() + covariances[1].trace() - 2 * roots.sum()
    return max(distance.item(), 0.0)            # of equal sets it may be below 0 by rounding


def standard_error(share, count):
    """The standard error of a share of `count` independent images.

    It is the standard deviation of its posterior under a uniform prior, a Beta distribution: close to
    √(share · (1 − share) / count), but not 0 for a share of 0 or 1.
    """
    expected = (share * count + 1) / (count + 2)
    return math.sqrt(expected * (1 - expected) / (count + 3))


def precision_and_recall(features, real):
    """Precision and recall of images with features (N, F), against real ones (M, F), for the same number of each.

    Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric for Assessing Generative Models", there with VGG's
    features. Around each image of a set is a ball that reaches to its third nearest neighbour in the set. Precision is
    the share of images that are in a ball of the real ones, so that they look real; recall the share of real ones that
    are in a ball of the images, so that the images have all their variety. Of the larger set the first images count. In
    float64: an image's distance to itself must not be a matter of rounding. Raises ValueError if there are too few.
    """
    count = min(len(features), len(real))
    if count <= NEIGHBOURS:
        raise ValueError(f"precision and recall take more than {NEIGHBOURS} images of each kind, not {count}")
    features, real = features[:count].double(), real[:count].double()
    return _share_in_balls(features, real), _share_in_balls(real, features)


def _share_in_balls(points, centres):
    """The share of points (N, F) that are in the ball of one of the centres (M, F), in blocks of rows."""
    block = items_that_fit(4 * len(centres))                          # two float64 numbers each
    radii = torch.cat([_squared_distances(rows, centres).kthvalue(NEIGHBOURS + 1, dim=1).values       # with itself
                       for rows in centres.split(block)])             # (M,)
    inside = sum((_squared_distances(rows, centres) <= radii).any(dim=1).sum().item() for rows in points.split(block))
    return inside / len(points)


def _squared_distances(rows, centres):
    """‖r − c‖², (B, M) of rows (B, F) and centres (M, F)."""
    squares = rows.square().sum(dim=1, keepdim=True) + centres.square().sum(dim=1)
    return squares.addmm_(rows, centres.T, alpha=-2)
