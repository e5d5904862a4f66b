"""Data sets: uint8 images, in memory or in files, scaled to [-1, 1] on the device a batch at a time.

Letters: N images, B of them in a batch, C channels, H×W pixels.
"""

import math
import os
import signal
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler, Subset

from data import image_folder
from utils import distributed
from utils.arguments import DATASETS

BUNDLED = Path(__file__).resolve().parent.parent / "MNIST" / "MNIST-10k.npz"
BUNDLED_ALL = 10_000
BUNDLED_TRAIN = 9_000           # of the 10,000 bundled digits; the others are the test set
FOLDER = DATASETS[-1]           # the data set that is any folder of images
VALIDATION_PART, MAX_VALIDATION = 12, 5000          # by default 1/12 of the training images, at most 5,000
LIGHT_ON_DARK = set(DATASETS) - {"CIFAR10", "SVHN", FOLDER}         # MNIST and its relatives
DIGITS = tuple("0123456789")
# Made from the same handwriting, NIST's Special Database 19.
MNIST_RELATIVES = {name for name in DATASETS if name == "MNIST-10k" or name.endswith("MNIST") or "EMNIST" in name} - {
    "FashionMNIST", "KMNIST"}


class Images(Dataset):
    """uint8 images (N, C, H, W) and their int64 labels (N,), in memory. classes: the labels' names."""

    def __init__(self, images, labels, classes=DIGITS):
        self.images, self.labels, self.classes = images, labels, list(classes)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, rows):
        """uint8 images (B, C, H, W) and labels (B,) of rows: a slice, a list or a tensor of indices."""
        if isinstance(rows, list):          # with which indexing on a GPU would wait for it, twice
            rows = to_device(torch.tensor(rows, dtype=torch.int64), self.images.device)
        return self.images[rows], self.labels[rows]

    @property
    def shape(self):
        """[C, H, W]"""
        return list(self.images.shape[1:])

    def to(self, device):
        """The same on a device, from which worker processes cannot load."""
        return Images(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, rows):
        """The images of these rows alone, a tensor of indices."""
        return Images(self.images[rows], self.labels[rows], self.classes)

    # The DataLoader calls this with the indices of a batch: one tensor look-up, no Python per image.
    __getitems__ = __getitem__


def batches(dataset, batch_size, generator=None, num_workers=None, pin_memory=False):
    """Batches of (uint8 images (B, C, H, W), labels (B,)), an iterable with a length; shuffled by generator, if any.

    With several processes and a generator, each has its own shard of the same order. num_workers: the processes that
    load the batches, by default none for images in memory and image_folder.default_num_workers() for an image folder.
    """
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    if generator is not None and distributed.world_size() > 1:
        order = distributed.ShardSampler(order)
    # Always a generator of its own: without one, each epoch would draw from torch's.
    loading = {"generator": generator or torch.Generator(), "collate_fn": identity, "worker_init_fn": ignore_signals}
    whole, rows = dataset, range(len(dataset))
    while isinstance(whole, Subset):
        whole, rows = whole.dataset, [whole.indices[row] for row in rows]
    if isinstance(whole, image_folder.ImageFiles):
        num_workers = image_folder.default_num_workers() if num_workers is None else num_workers
        return image_folder.FileBatches(whole, rows, BatchSampler(order, batch_size, drop_last=False), num_workers,
                                        pin_memory, **loading)
    if not num_workers:
        return DataLoader(dataset, batch_size, sampler=order, pin_memory=pin_memory, **loading)
    loading["collate_fn"] = as_arrays
    return ArrayBatches(image_folder.data_loader(dataset, batch_size, sampler=order, num_workers=num_workers,
                                                 **loading), pin_memory)


class ArrayBatches:
    """A DataLoader's batches as tensors. Its worker processes send NumPy arrays: tensors need space in /dev/shm."""

    def __init__(self, loader, pin_memory):
        self.loader, self.pin_memory = loader, pin_memory

    def __len__(self):
        return len(self.loader)

    def __iter__(self):
        for batch in self.loader:
            images, labels = map(torch.from_numpy, batch)
            yield images.pin_memory() if self.pin_memory else images, labels


def identity(batch):
    return batch


def as_arrays(batch):
    return [tensor.numpy() for tensor in batch]


def ignore_signals(_worker):
    """Ctrl-C in a terminal reaches the workers too, but the script first finishes its step with them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_device(tensor, device):
    """A tensor on a device. A GPU copies it from pinned memory, so that nothing waits for it."""
    if _copies_in_order(device) and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=_copies_in_order(device))


def to_model_range(images, device="cpu"):
    """uint8 images in [0, 255] → float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=_copies_in_order(device)).float() / 127.5 - 1


def _copies_in_order(device):
    """Whether a copy to the device may still be under way when its source is freed: only where torch holds it."""
    return torch.device(device).type == "cuda"


def to_uint8(images):
    """Images in [-1, 1] → uint8 in [0, 255] on the CPU, for display."""
    return ((images + 1) / 2).clamp(0, 1).mul(255).round().byte().cpu()


def grid(images, columns=8, padding=2):
    """uint8 images (B, C, H, W) as one picture (3, ...), row by row on black; a single one unframed.

    As torchvision.utils.make_grid(), without importing torchvision, which takes seconds and is needed only to download.
    """
    B = len(images)
    if B == 1:
        return images[0].expand(3, -1, -1)
    columns, rows = min(columns, B), math.ceil(B / columns)
    cells = F.pad(images, (padding, 0, padding, 0))                   # (B, C, H + padding, W + padding)
    cells = torch.cat([cells, torch.zeros_like(cells[:1]).expand(rows * columns - B, -1, -1, -1)])
    picture = cells.unflatten(0, (rows, columns)).permute(2, 0, 3, 1, 4).flatten(3, 4).flatten(1, 2)
    return F.pad(picture, (0, padding, 0, padding)).expand(3, -1, -1)


def load(name, folder, shape=None):
    """The data set `name`, one of DATASETS, as (training set, test set), each Images or, of a folder, ImageFiles.

    folder: where downloaded sets are kept, created if need be; or an image folder, whose images are brought to the
    shape [C, H, W] when they are read. Raises ValueError if the name is unknown, or a file is damaged or of another
    kind, OSError if files cannot be downloaded or read.
    """
    if name == "MNIST-10k":
        return _load_bundled()
    if name == FOLDER:
        return image_folder.load(folder, shape)
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    from data import downloads  # imports torchvision, which takes seconds and is needed only here

    return tuple(Images(*part, downloads.SOURCES[name].classes) for part in downloads.load(name, Path(folder)))


def hold_out(train_set, count=None):
    """Split a training set into images to train on and `count` of them to validate: (training set, validation set).

    By default a twelfth is held out, at most MAX_VALIDATION. Which ones depends only on the size of the set, and a
    smaller count is a subset of a larger one. With count 0 there is no validation set, but None. Raises ValueError if
    no image to train on would be left.
    """
    N = len(train_set)
    count = min(N // VALIDATION_PART, MAX_VALIDATION) if count is None else count
    if count >= N:
        raise ValueError(f"the data set has {N:,} training images: hold out fewer")
    if not count:
        return train_set, None
    order = torch.randperm(N, generator=torch.Generator().manual_seed(0))
    return train_set.subset(order[count:].sort().values), train_set.subset(order[:count].sort().values)


def describe(name, folder, dataset):
    """What a checkpoint records of the data set, as plain values: name, shape, and what differs from MNIST.

    dataset: the complete training set.
    """
    description = {"name": name, "shape": dataset.shape}
    if dataset.classes != list(DIGITS):
        description["classes"] = dataset.classes
    if name == FOLDER:
        description |= {"folder": os.path.abspath(folder), "images": len(dataset), "files": dataset.fingerprint}
    return description


def are_digits(dataset):
    """Whether a data set holds images of the ten digits as MNIST does."""
    return dataset.shape == [1, 28, 28] and dataset.classes == list(DIGITS)


def seen_in_training(trained_on, name, model="The model"):
    """Whether a model trained on one data set has seen the test images of another, and a sentence that says so.

    True, False (then the sentence is empty), or None where it is not known. The sentence begins with `model`, the name
    or the path of the model. MNIST-10k is a part of MNIST's training images. QMNIST's training images are MNIST's, made
    again from the scans, and none of its test images is among them (Yadav and Bottou 2019, "Cold Case: the Lost MNIST
    Digits"). EMNIST's sets (Cohen et al. 2017) are chosen from the same scans as MNIST, and from the same images as
    each other, but which of them are training images in one set and test images in another is not recorded.
    """
    if name == trained_on or not {trained_on, name} <= MNIST_RELATIVES:
        return False, ""
    if any(each.startswith("EMNIST") for each in (trained_on, name)):
        return None, (f"{model} was trained on {trained_on}, which is made from the same handwriting as {name} "
                      "(NIST's Special Database 19): it may have seen some of these images.")
    if name == "MNIST-10k":
        return True, (f"{model} was trained on {trained_on}, whose training set has the same digits: it has seen "
                      "these images, except for those held out, so this is not a test.")
    return False, ""


def _load_bundled():
    try:
        with np.load(BUNDLED) as arrays:
            images, labels = arrays["images"], arrays["labels"]
            if (images.shape, labels.shape, images.dtype, labels.dtype) != ((BUNDLED_ALL, 28, 28), (BUNDLED_ALL,),
                                                                            np.uint8, np.uint8):
                raise ValueError("not these arrays")
    # What numpy raises for a damaged file, or an intact one of another kind.
    except (ValueError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f"{BUNDLED} is damaged: restore it with git checkout MNIST") from error
    images, labels = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()
    return (Images(images[:BUNDLED_TRAIN], labels[:BUNDLED_TRAIN]),
            Images(images[BUNDLED_TRAIN:], labels[BUNDLED_TRAIN:]))
