"""Whether samples are copies of training images: the nearest ones, how near they are, and pictures of the pairs.

Letters: N images, B of them in a batch, M training images, C channels, H×W pixels, F numbers that an image is reduced
to, n neighbours.

An image is a copy if a single training image is far nearer to it than all others are. So what is compared is the ratio
of two distances, that to the nearest training image and that to the tenth nearest. A fixed distance does not tell
copies from new images: a 1 has training images everywhere around it, and one written by someone else is nearer to one
of them than the VQ-VAE's reconstruction of a training 8 is to its original. The tenth, not the second: a few duplicates
in the training set must not hide the copies of them. Each training image is compared as it is and moved by a pixel in
each direction, since after a single pixel another digit is as near as the original. The features of a classifier are no
help: a little noise and a shift move a copy farther in them than other images of its class are.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.data import Subset

import data
from data.code_maps import offsets_up_to, shift_images
from utils.memory import items_that_fit

MAX_NUMBERS = 256           # F: what is left of an image is compared
NEIGHBOURS = 10             # n
SHIFTS = offsets_up_to(1)
QUANTILE = 0.01             # of the test images, whose ratio is below the threshold
NOISE = 5                   # standard deviation of the noise on a copy, of 255


class Nearest(NamedTuple):
    """The training images nearest to each of N images."""

    distances: torch.Tensor     # (N, n), ascending
    rows: torch.Tensor          # (N, n) int64, which images of the training set they are


def reduced(images):
    """uint8 images (B, C, H, W) as rows of at most MAX_NUMBERS numbers in [0, 1]: float32 (B, F).

    Means over equal squares, as large as need be. Noise and other small differences of single pixels disappear.
    """
    C, H, W = images.shape[1:]
    side = 1
    while C * (H // side) * (W // side) > MAX_NUMBERS and side < min(H, W):
        side += 1
    return F.avg_pool2d(images.float() / 255, side).flatten(1)


@torch.no_grad()
def nearest_images(images, batches, device="cpu", bar=None):
    """The Nearest training images of each of uint8 images (N, C, H, W), by an exact search.

    batches: of (uint8 training images (B, C, H, W), labels). The distance to a training image is that to the nearest of
    its SHIFTS. If there are fewer than n of them, the last one is repeated. bar is advanced by update(B).
    """
    parts = images.split(items_that_fit(math.prod(images.shape[1:])))
    queries = torch.cat([reduced(part.to(device)) for part in parts])                 # (N, F)
    squares = queries.square().sum(dim=1, keepdim=True)               # (N, 1)
    best = queries.new_full((len(queries), NEIGHBOURS), torch.inf)    # squared distances
    rows = torch.zeros(best.shape, dtype=torch.int64, device=device)
    block, first = items_that_fit(3 * len(queries)), 0
    for batch, _ in batches:
        for part in batch.to(device).split(block):
            found = None
            for offset in SHIFTS:
                keys = reduced(shift_images(part, *offset))           # (B, F)
                # ‖k‖² − 2 q·k, to which ‖q‖² is added below.
                scores = torch.addmm(keys.square().sum(dim=1), queries, keys.T, alpha=-2)             # (N, B)
                found = scores if found is None else torch.minimum(found, scores, out=found)
            numbers = torch.arange(first, first + len(part), device=device).expand_as(found)
            best, order = torch.cat([best, found + squares], dim=1).topk(NEIGHBOURS, dim=1, largest=False)
            rows = torch.cat([rows, numbers], dim=1).gather(1, order)
            first += len(part)
        if bar is not None:
            bar.update(len(batch))
    count = min(first, NEIGHBOURS)
    last = torch.arange(NEIGHBOURS, device=device).clamp(max=count - 1)
    return Nearest(best[:, last].clamp(min=0).sqrt().cpu(), rows[:, last].cpu())


def ratios(nearest):
    """The distance to the nearest training image as a share of that to the tenth nearest: (N,), in [0, 1].

    Of a training image itself it is 0; 1 if all ten are equally near, and if they are all equal to it.
    """
    first, last = nearest.distances[:, 0], nearest.distances[:, -1]
    return torch.where(last > 0, first / last, 1)


def noisy_shifted(images, generator):
    """Copies of uint8 images (N, C, H, W) that differ from them in every pixel: moved by one pixel, with noise."""
    directions = torch.randint(1, len(SHIFTS), (len(images),), generator=generator).tolist()
    moved = torch.stack([shift_images(image, *SHIFTS[direction]) for image, direction in zip(images, directions)])
    for part in moved.split(items_that_fit(images[0].numel())):
        noise = torch.randn(part.shape, generator=generator).mul_(NOISE)
        part.copy_(noise.add_(part).round_().clamp_(0, 255))
    return moved


def evenly(labels, count):
    """count rows, or all if there are less, that take as many as possible from each class of labels (N,), in order.

    Within a class the first ones; without a generator, so that they are always the same.
    """
    order = labels.argsort(stable=True)
    sizes = labels.bincount()[labels.unique()].tolist()
    places = torch.cat([torch.arange(size) for size in sizes])        # of an image within its class
    return order[places.argsort(stable=True)[:count]].sort().values


def closest_pairs(images, nearest, train_set, count):
    """The images of lowest ratio, each above its nearest training image: uint8 (2·count, C, H, W), lowest ratio first.

    Row by row, of a grid of `count` columns.
    """
    order = ratios(nearest).argsort(stable=True)[:count]
    rows = nearest.rows[order, 0].tolist()
    [(originals, _)] = data.batches(Subset(train_set, rows), len(rows), num_workers=0)
    return torch.cat([images[order], originals])
