"""The data sets of torchvision, downloaded once: where their files are, and checks of what is in them.

Letters: N images, C channels, H×W pixels.
"""

import http.client
import os
import socket
from contextlib import contextmanager, suppress
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_sn3_pascalvincent_tensor

from data import DIGITS
from utils.files import created_folder

DOWNLOAD_TIMEOUT = 30           # seconds without an answer


class Source(NamedTuple):
    """A data set of torchvision: what reads it, and the files that a user may put there by hand."""

    kind: type                  # of torchvision.datasets
    options: tuple              # of kind, for the training set and for the test set
    folder: str                 # of the files, inside --data-folder
    files: tuple                # images and labels of both sets in the IDX format; else the files that kind reads
    classes: tuple = DIGITS     # names
    first: int = 0              # the label of the first class
    upright: bool = True        # otherwise the files are transposed

    def addresses(self):
        """The addresses that it is downloaded from."""
        if self.kind is datasets.SVHN:
            return [url for url, *_ in (self.kind.split_list[split] for split in ("train", "test"))]
        if self.kind is datasets.QMNIST:
            return [self.kind.resources["train"][0][0].rpartition("/")[0] + "/"]
        return [self.kind.url] if hasattr(self.kind, "url") else self.kind.mirrors


BOTH = {"train": True}, {"train": False}


def _idx_source(kind, parts=("train", "t10k"), labels="labels-idx1-ubyte", options=BOTH, **more):
    files = tuple(f"{part}-{what}" for part in parts for what in ("images-idx3-ubyte", labels))
    return Source(kind, options, f"{kind.__name__}/raw", files, **more)


def _emnist(split):
    classes = tuple(datasets.EMNIST.classes_split_dict[split])
    letters = split == "letters"        # its labels begin at 1, and torchvision names a class 0 that does not exist
    return _idx_source(datasets.EMNIST, [f"emnist-{split}-{part}" for part in ("train", "test")], upright=False,
                       options=tuple({"split": split, **option} for option in BOTH),
                       classes=classes[letters:], first=int(letters))


SOURCES = {
    "MNIST": _idx_source(datasets.MNIST),
    "FashionMNIST": _idx_source(datasets.FashionMNIST, classes=tuple(datasets.FashionMNIST.classes)),
    "KMNIST": _idx_source(datasets.KMNIST, classes=tuple(datasets.KMNIST.classes)),
    "QMNIST": _idx_source(datasets.QMNIST, ("qmnist-train", "qmnist-test"), "labels-idx2-int"),
    **{f"EMNIST-{split}": _emnist(split) for split in datasets.EMNIST.splits},
    "CIFAR10": Source(datasets.CIFAR10, BOTH, "", ("cifar-10-python.tar.gz",), (
        "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")),
    "SVHN": Source(datasets.SVHN, ({"split": "train"}, {"split": "test"}), "",
                   ("train_32x32.mat", "test_32x32.mat")),
}


def load(name, folder):
    """The data set `name` of SOURCES in a folder, downloaded if it is not there.

    → for each of training and test set uint8 images (N, C, H, W) and int64 labels (N,). Raises ValueError if a file is
    damaged or of another kind, OSError if files cannot be downloaded or read.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError("is a file: give the path of a folder, which need not exist yet")
    source = SOURCES[name]
    if not source.files[0].endswith("-ubyte"):
        return [_arrays(name, one) for one in _torchvision_sets(name, source, folder)]
    # Where torchvision puts them, or people do, under either of the names that they have on the web. Of the sets whose
    # files have the same names, those directly in the folder are MNIST's.
    folders = [folder / source.folder] + [folder] * (name == "MNIST" or source.files != SOURCES["MNIST"].files)
    places = [[place / (file.replace("-idx", ".idx") if dotted else file) for file in source.files]
              for place in folders for dotted in (False, True)]
    paths = next((paths for paths in places if all(path.is_file() for path in paths)), places[0])
    if not all(path.is_file() for path in paths):
        former = (folder / source.folder).with_name("processed")
        if (former / "training.pt").exists():       # torchvision would be content with the files of its first versions
            raise ValueError(f"{former} is of an old version of torchvision: move it away, so that the data set is "
                             "downloaded")
        _torchvision_sets(name, source, folder)
    return [_read_idx(name, source, *paths[:2]), _read_idx(name, source, *paths[2:])]


def _arrays(name, dataset):
    """Images and labels of CIFAR10 or SVHN, whose files torchvision has compared with their checksums."""
    images = torch.from_numpy(np.ascontiguousarray(dataset.data))
    if name == "CIFAR10":
        return images.permute(0, 3, 1, 2).contiguous(), torch.tensor(dataset.targets)
    return images, torch.from_numpy(dataset.labels)


def _read_idx(name, source, image_path, label_path):
    contents = []
    for path in (image_path, label_path):
        try:
            read = read_image_file if path == image_path else read_sn3_pascalvincent_tensor
            contents.append(read(str(path)))
        # What torchvision's reader raises for a damaged file.
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is truncated or not an IDX file of {name}: delete it, "
                             "and the next run downloads it again") from error
    images, labels = contents
    labels = (labels[:, 0] if source.kind is datasets.QMNIST and labels.dim() == 2 else labels).long() - source.first
    if (labels.shape != images.shape[:1] or len(images) == 0 or images.shape[1:] != (28, 28)
            or not 0 <= labels.min() <= labels.max() < len(source.classes)):
        raise ValueError(f"{image_path} {tuple(images.shape)} and {label_path.name} {tuple(contents[1].shape)} "
                         f"are not images and labels of {name}: delete both, and the next run downloads them again")
    return (images if source.upright else images.transpose(1, 2).contiguous()).unsqueeze(1), labels


def _torchvision_sets(name, source, folder):
    """torchvision's training and test set, downloaded. Folders created for a download that fails are removed."""
    raw = folder / source.folder
    try:
        with suppress(RuntimeError):        # already there, possibly in a read-only folder
            return [source.kind(folder, **options) for options in source.options]
        with created_folder(raw), _socket_timeout(DOWNLOAD_TIMEOUT):
            if not os.access(raw, os.W_OK):
                raise PermissionError(None, "no permission to write", str(raw))
            return [source.kind(folder, **options, download=True) for options in source.options]
    except Exception as error:
        if isinstance(error, ModuleNotFoundError):
            raise ValueError(f"torchvision reads {name} with {error.name}: install it with pip install {error.name}"
                             ) from error
        # torchvision raises RuntimeError with each mirror's error; the others come from the network.
        if isinstance(error, (RuntimeError, http.client.HTTPException, TimeoutError, ConnectionError, URLError)):
            where = " or ".join(source.addresses())
            raise OSError(f"{name} could not be downloaded from {where} ({' '.join(str(error).split())}). "
                          f"Put {', '.join(source.files)} ({_accepted_forms(source)}) into {raw} by hand, "
                          "or use --dataset MNIST-10k, which needs no download") from error
        raise


def _accepted_forms(source):
    """Which other forms of its files torchvision accepts."""
    if source.kind is datasets.EMNIST:
        return "or gzip.zip, which holds them"
    return "as they are or as .gz" if source.folder else "as they are"


@contextmanager
def _socket_timeout(seconds):
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(seconds)
    try:
        yield
    finally:
        socket.setdefaulttimeout(before)
