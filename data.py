"""Data sets, held in memory as uint8 tensors and scaled on the device, a batch at a time."""

import http.client
import os
import signal
import socket
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, RandomSampler, SequentialSampler
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file

import processes

BUNDLED = Path(__file__).resolve().parent / "MNIST" / "MNIST-10k.npz"
BUNDLED_ALL = 10_000
BUNDLED_TRAIN = 9_000           # of the 10,000 bundled digits; the others are the test set
DOWNLOAD_TIMEOUT = 30           # seconds without an answer


class Images(Dataset):
    """uint8 images (N, C, H, W) and their int64 labels (N,), in memory."""

    def __init__(self, images, labels):
        self.images, self.labels = images, labels

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index], self.labels[index]

    def to(self, device):
        """The same on a device. No worker process can load from there."""
        return Images(self.images.to(device), self.labels.to(device))

    # The DataLoader calls this with the indices of a batch: one tensor look-up, no Python per image.
    __getitems__ = __getitem__


def batches(dataset, batch_size, generator=None, num_workers=0, pin_memory=False):
    """A DataLoader of (uint8 images (B, C, H, W), labels (B,)); shuffled by generator, if there is one.

    Of several processes each has then its own part of the one order.
    """
    order = SequentialSampler(dataset) if generator is None else RandomSampler(dataset, generator=generator)
    if generator is not None and processes.count() > 1:
        order = processes.Share(order)
    # A generator of its own in any case: without one, each pass draws from torch's.
    return DataLoader(dataset, batch_size, sampler=order, generator=generator or torch.Generator(),
                      num_workers=num_workers, pin_memory=pin_memory, collate_fn=_as_it_is,
                      worker_init_fn=_leave_signals_to_the_script)


def _as_it_is(batch):
    return batch


def _leave_signals_to_the_script(_worker):
    """A terminal's Ctrl-C reaches the workers too, and the script wants to end its step with them."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def to_model_range(images, device="cpu"):
    """uint8 images in [0, 255] → float32 in [-1, 1] on the device."""
    return images.to(device, non_blocking=True).float() / 127.5 - 1


def to_unit_range(images):
    """Images in [-1, 1] → [0, 1], to be looked at."""
    return ((images + 1) / 2).clamp(0, 1)


def load(name, folder):
    """The data set `name`, one of DATASETS, as (training Images, test Images).

    folder is where downloaded sets are kept; it is made if it is not there. Raises ValueError
    if the name is unknown or a file is damaged or foreign, OSError if files cannot be had.
    """
    if name not in DATASETS:
        raise ValueError(f"unknown data set {name!r}: choose from {', '.join(DATASETS)}")
    return DATASETS[name](Path(folder))


def _load_bundled(_folder):
    try:
        with np.load(BUNDLED) as arrays:
            images, labels = arrays["images"], arrays["labels"]
            if (images.shape, labels.shape, images.dtype, labels.dtype) != ((BUNDLED_ALL, 28, 28), (BUNDLED_ALL,),
                                                                            np.uint8, np.uint8):
                raise ValueError("other arrays")
    # What numpy meets in a damaged file, or in a sound one of another kind.
    except (ValueError, TypeError, KeyError, EOFError, NotImplementedError, RuntimeError, zipfile.BadZipFile,
            zlib.error) as error:
        raise ValueError(f"{BUNDLED} is damaged: restore it with git checkout MNIST") from error
    images, labels = torch.from_numpy(images).unsqueeze(1), torch.from_numpy(labels).long()
    return (Images(images[:BUNDLED_TRAIN], labels[:BUNDLED_TRAIN]),
            Images(images[BUNDLED_TRAIN:], labels[BUNDLED_TRAIN:]))


def _load_mnist(folder):
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError("is a file: give the path of a folder, there or not yet there")
    raw = folder / "MNIST" / "raw"
    names = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
    if not all((raw / name).is_file() for name in names):
        _download(datasets.MNIST, folder, raw, names)
    return tuple(_read_idx(raw / names[i], raw / names[i + 1]) for i in (0, 2))


def _read_idx(image_path, label_path):
    contents = []
    for path, read in ((image_path, read_image_file), (label_path, read_label_file)):
        try:
            contents.append(read(str(path)))
        # What torchvision's reader meets in a damaged file: asserts, look-ups, a reshape.
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is truncated or is no IDX file of MNIST: delete it, "
                             "and the next run downloads it again") from error
    images, labels = contents
    if len(images) != len(labels) or len(images) == 0 or images.shape[1:] != (28, 28) or labels.max() > 9:
        raise ValueError(f"{image_path} {tuple(images.shape)} and {label_path.name} {tuple(labels.shape)} "
                         "are not images and labels of MNIST: delete both, and the next run downloads them again")
    return Images(images.unsqueeze(1), labels)


def _download(dataset, folder, raw, names):
    """Let torchvision download a data set. Folders made for a download that fails are removed."""
    missing = [path for path in (raw, *raw.parents) if not path.exists()]
    try:
        raw.mkdir(parents=True, exist_ok=True)
        if not os.access(raw, os.W_OK):
            raise PermissionError(None, "no permission to write", str(raw))
        with _socket_timeout(DOWNLOAD_TIMEOUT):
            dataset(folder, download=True)
    except BaseException as error:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        # torchvision raises RuntimeError with what each mirror said; the network raises the others.
        if isinstance(error, (RuntimeError, http.client.HTTPException, TimeoutError, ConnectionError)):
            raise OSError(f"{dataset.__name__} could not be downloaded from {' or '.join(dataset.mirrors)} "
                          f"({' '.join(str(error).split())}). "
                          f"Put {', '.join(names)} (as they are or as .gz) into {raw} by hand, "
                          "or use --dataset MNIST-10k, which needs no download") from error
        raise


@contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)


DATASETS = {"MNIST": _load_mnist, "MNIST-10k": _load_bundled}
