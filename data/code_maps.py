"""Code maps: encoded and decoded in batches, and those of data sets, on which a prior is trained.

Letters: N images, B of them in a batch, S shifts, C channels, H×W pixels, h×w codes of one map.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from tqdm import tqdm

import data
from utils import distributed
from utils.memory import images_that_fit


class CodeMaps(NamedTuple):
    """What a prior is trained, chosen and tested on. The codes are of the smallest_dtype()."""

    train: torch.Tensor             # (S, N, h, w), for each shift of the training images
    train_labels: torch.Tensor      # (N,)
    validation: torch.Tensor | None                 # (N', h, w)
    validation_labels: torch.Tensor | None          # (N',)
    test: torch.Tensor              # (N″, h, w)
    test_labels: torch.Tensor       # (N″,)


def smallest_dtype(num_codes):
    """The smallest integer type of torch for codes from 0 to num_codes − 1. uint16 lacks too many operations."""
    return torch.uint8 if num_codes <= 2**8 else torch.int16 if num_codes <= 2**15 else torch.int32


@torch.no_grad()
def encode(model, batches, device, bar=None):
    """The code maps (N, h, w), on the CPU, of all images in batches of (uint8 images, labels), of the smallest_dtype().

    The model must be in evaluation mode: else BatchNorm would use and update the statistics of the batch. bar, such as
    a tqdm, is advanced by update(n) after every n images.
    """
    maps, dtype = [], smallest_dtype(model.quantizer.num_codes)
    for images, _ in batches:
        maps.append(model.encode(data.to_model_range(images, device)).to(dtype).cpu())
        if bar is not None:
            bar.update(len(images))
    return torch.cat(maps)


@torch.no_grad()
def decode_batches(model, maps):
    """The images in [-1, 1] of code maps (N, h, w), a batch (B, C, H, W) at a time, without gradients."""
    for batch in maps.split(images_that_fit(*model.image_size(*maps.shape[1:]), model.quantizer.dim)):
        yield model.decode(batch)


def decode(model, maps):
    """The images of code maps (N, h, w): uint8 (N, C, H, W), on the CPU. model: in evaluation mode."""
    return torch.cat([data.to_uint8(batch) for batch in decode_batches(model, maps)])


def encode_sets(model, train_set, validation_set, test_set, offsets, device, num_workers=0):
    """The CodeMaps of the sets, the training images moved by each of S offsets (dy, dx) in pixels.

    validation_set may be None. With several processes, each encodes its shard, and all get the complete maps.
    """
    (H, W), dtype = train_set.shape[1:], smallest_dtype(model.quantizer.num_codes)
    batch_size = images_that_fit(H, W, model.quantizer.dim)
    train_shard, evaluated = distributed.shard(train_set), []
    shards = [part and distributed.shard(part) for part in (validation_set, test_set)]
    with tqdm(total=len(offsets) * len(train_shard) + sum(map(len, filter(None, shards))), desc="encoding", unit="img",
              unit_scale=True, leave=False, disable=distributed.hide_progress_bar()) as bar:
        train, rows = torch.empty(len(offsets), len(train_shard), *model.map_size(H, W), dtype=dtype), 0
        for images, labels in data.batches(train_shard, batch_size, None, num_workers):       # each image is read once
            for maps, (dy, dx) in zip(train, offsets):
                maps[rows:rows + len(images)] = encode(model, [(shift_images(images, dy, dx), labels)], device, bar)
            rows += len(images)
        if distributed.world_size() > 1:
            train = torch.stack([distributed.gather_rows(maps, len(train_set)) for maps in train])
        for part, part_shard in zip((validation_set, test_set), shards):
            if part is None:
                evaluated += None, None
                continue
            maps = encode(model, data.batches(part_shard, batch_size, None, num_workers), device, bar)
            evaluated += distributed.gather_rows(maps, len(part)), _gather_labels(part)
        return CodeMaps(train, _gather_labels(train_set), *evaluated)


def _gather_labels(dataset):
    """The labels of a set of which each process has read its shard: a file that cannot be read changes one."""
    return distributed.gather_rows(dataset.labels[distributed.shard_slice()], len(dataset))


def shift_images(images, dy, dx):
    """Images (..., H, W) moved down by dy and right by dx pixels, zero-padded."""
    return F.pad(images, (dx, -dx, dy, -dy))        # a negative number crops


def offsets_up_to(shift):
    """All (dy, dx) of at most so many pixels each, (0, 0) first."""
    steps = range(-shift, shift + 1)
    return sorted(((dy, dx) for dy in steps for dx in steps), key=lambda offset: offset != (0, 0))
