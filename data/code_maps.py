"""The code maps of data sets, on which a prior is trained.

Letters: N images, B of them in a batch, S shifts, C channels, H×W pixels, h×w codes of one map.
"""

import math
from typing import NamedTuple

import torch
from tqdm import tqdm

import data
from utils import distributed
from utils.memory import items_that_fit


class CodeMaps(NamedTuple):
    """What a prior is trained and tested on."""

    train: torch.Tensor             # (S, N, h, w) int64, for each shift of the training images
    train_labels: torch.Tensor      # (N,)
    test: torch.Tensor              # (N', h, w)
    test_labels: torch.Tensor       # (N',)


@torch.no_grad()
def encode(model, batches, device, bar=None):
    """The code maps (N, h, w), on the CPU, of all images in batches of (uint8 images, labels).

    The model is in evaluation mode. bar, such as a tqdm, is advanced by update(n) after every n images.
    """
    maps = []
    for images, _ in batches:
        maps.append(model.encode(data.to_model_range(images, device)).cpu())
        if bar is not None:
            bar.update(len(images))
    return torch.cat(maps)


def encode_sets(model, train_set, test_set, offsets, device, num_workers=0):
    """The CodeMaps of both sets, the training images moved by each of S offsets (dy, dx) in pixels.

    Of several processes each encodes its shard, and all get the complete maps.
    """
    batch_size = items_that_fit(pixels=math.prod(train_set.shape[1:]))
    train_shard, test_shard = distributed.shard(train_set), distributed.shard(test_set)
    with tqdm(total=len(offsets) * len(train_shard) + len(test_shard), desc="encoding", unit="img", unit_scale=True,
              leave=False, disable=distributed.hide_progress_bar()) as bar:
        train = [[] for _ in offsets]
        for images, labels in data.batches(train_shard, batch_size, None, num_workers):       # each image is read once
            for maps, (dy, dx) in zip(train, offsets):
                maps.append(encode(model, [(shift_images(images, dy, dx), labels)], device, bar))
        test = encode(model, data.batches(test_shard, batch_size, None, num_workers), device, bar)
        train = torch.stack([distributed.gather_rows(torch.cat(maps), len(train_set)) for maps in train])
        return CodeMaps(train, _gather_labels(train_set), distributed.gather_rows(test, len(test_set)),
                        _gather_labels(test_set))


def _gather_labels(dataset):
    """The labels of a set of which each process has read its shard: a file that cannot be read changes one."""
    return distributed.gather_rows(dataset.labels[distributed.shard_slice()], len(dataset))


def shift_images(images, dy, dx):
    """Images (..., H, W) moved down by dy and right by dx pixels, zero-padded."""
    H, W = images.shape[-2:]
    shifted = torch.zeros_like(images)
    shifted[..., max(dy, 0):H + min(dy, 0), max(dx, 0):W + min(dx, 0)] = \
        images[..., max(-dy, 0):H + min(-dy, 0), max(-dx, 0):W + min(-dx, 0)]
    return shifted


def offsets_up_to(shift):
    """All (dy, dx) of at most so many pixels each, (0, 0) first."""
    steps = range(-shift, shift + 1)
    return sorted(((dy, dx) for dy in steps for dx in steps), key=lambda offset: offset != (0, 0))
