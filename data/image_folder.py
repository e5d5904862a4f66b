"""A folder of images as a data set: any tree of pictures, each read and brought to one size when it is needed.

Letters: N images, B of them in a batch, C channels, H×W pixels.
"""

import hashlib
import math
import os
import shutil
import sys
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from data import image_file
from utils import distributed
from utils.cli import describe_error, printable

MAX_IN_MEMORY = 2**31           # bytes; larger sets are read from their files in every epoch
MAX_WORKERS = 8                 # that read files, unless another number is asked for
LARGE_BATCH = 2**24             # bytes: each worker prefetches one batch above this size, two below
TEST_SHARE = 0.1                # of the images, if there is no test folder
NO_CLASS = "."                  # the class of images outside the sub-folders
# Names of the folders of the training, the test and the validation set, in upper or lower case.
SETS = ("train", "training"), ("test", "testing"), ("val", "valid", "validation")
MAX_LEVELS = 10                 # of folders that hold nothing but a folder
OWN_FOLDERS = "models", "logs", "generatedImages"       # which the scripts write; their pictures are no data

class ImageFiles(Dataset):
    """uint8 images of the shape [C, H, W], each read from its file when it is needed, and their int64 labels (N,).

    In place of a file that cannot be read, the next one of the set that can is taken, with its label. classes: the
    labels' names.
    """

    def __init__(self, paths, labels, shape, classes):
        self.paths, self.labels, self.shape, self.classes = paths, labels, shape, classes
        self.cache = self.is_cached = None         # (N, C, H, W) and (N,), after enable_cache()
        self.unreadable, self.reported = set(), False           # rows whose file cannot be read, as far as is known
        self.last_error = ""                                    # what one of them was refused for

    def __len__(self):
        return len(self.paths)

    def __getstate__(self):
        """What worker processes receive: not the images that are kept, nor the paths of other sets."""
        return {**vars(self), "cache": None, "is_cached": None, "all_paths": None}

    def subset(self, rows):
        """The images of these rows alone, a tensor of indices, none of them kept in memory yet."""
        part = ImageFiles([self.paths[row] for row in rows.tolist()], self.labels[rows], self.shape, self.classes)
        part.description, part.left_out = self.description, self.left_out
        return part

    @cached_property
    def fingerprint(self):
        """A hash of the names and sizes of the files of both sets.

        Another one if a file was added, removed, renamed, moved or edited.
        """
        digest = hashlib.sha256()
        for path in sorted(self.all_paths):
            name = path.relative_to(self.folder).as_posix()
            digest.update(f"{name}/{path.stat().st_size}/".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def __getitem__(self, rows):
        """uint8 images (B, C, H, W) and labels (B,) of rows: a slice, a list or a tensor of indices."""
        rows = torch.arange(len(self))[rows].tolist()
        return self.collect(rows, self._read(self.missing(rows), map_in_threads))

    def __getitems__(self, rows):
        """rows, the rows of the files that were read for them, uint8 images (B, C, H, W): what a worker returns.

        As NumPy arrays, which come through a pipe: tensors would need space in /dev/shm.
        """
        return self._read(rows, map)

    def _read(self, rows, map_rows):
        images, sources = np.empty((len(rows), *self.shape), np.uint8), []
        for image, (source, pixels) in zip(images, map_rows(self._read_row, rows)):
            image[:] = pixels.numpy()
            sources.append(source)
        return rows, sources, images

    def _read_row(self, row):
        """The row of the first file from this one on that can be read, and its image.

        Raises ValueError if none can, OSError if a file or its disk has vanished.
        """
        C, H, W = self.shape
        for source in chain(range(row, len(self)), range(row)):
            if source not in self.unreadable:           # however many there are, each is tried once
                try:
                    return source, image_file.read_image(self.paths[source], H, W, C)
                except (ValueError, PermissionError) as error:
                    self.last_error = describe_error(error)
                    self.unreadable.add(source)
        raise ValueError(f"not one of the {len(self):,} images in this set can be used: {self.last_error}")

    def enable_cache(self):
        """Keep images in memory once they have been read, if there is room for all of them."""
        with suppress(RuntimeError):        # torch's lack of memory
            self.cache = torch.empty(len(self), *self.shape, dtype=torch.uint8)
            self.is_cached = np.zeros(len(self), bool)

    def missing(self, rows):
        """Those of rows that have to be read."""
        return rows if self.cache is None else [row for row in rows if not self.is_cached[row]]

    def collect(self, rows, read):
        """uint8 images (B, C, H, W) and labels (B,) of rows. read: __getitems__() of the missing ones."""
        read_rows, sources, images = read
        for row, source in zip(read_rows, sources):
            if row != source:
                self.unreadable.add(row)
                self.labels[row] = self.labels[source]
        images = torch.from_numpy(images)
        if self.cache is not None:
            self.cache[read_rows], self.is_cached[read_rows] = images, True
            images = self.cache[rows]
        return images, self.labels[rows]

    def report_replaced(self, rows):
        """Print once which of rows have files that cannot be read."""
        rows = sorted(self.unreadable.intersection(rows))
        if rows and not self.reported:
            self.reported = True
            names = ", ".join(printable(str(self.paths[row])) for row in rows[:3]) + ", …" * (len(rows) > 3)
            tqdm.write(f"{len(rows):,} of {len(self):,} images cannot be used, the next image of the set was taken "
                       f"instead: {names}", file=sys.stderr)


class FileBatches:
    """Batches of ImageFiles, (uint8 images (B, C, H, W), labels (B,)), read by num_workers processes.

    batch_sampler: of indices into rows, which are those of the set. loading: other arguments of the DataLoader.
    """

    def __init__(self, files, rows, batch_sampler, num_workers, pin_memory, **loading):
        self.files, self.rows, self.batch_sampler, self.loading = files, rows, batch_sampler, loading
        self.num_workers, self.pin_memory = num_workers, pin_memory

    def __len__(self):
        return len(self.batch_sampler)

    def __iter__(self):
        files, ordered, all_rows = self.files, deque(), []

        def rows_to_read():         # of each batch, which may be none
            for indices in self.batch_sampler:
                ordered.append([self.rows[index] for index in indices])
                yield files.missing(ordered[-1])

        num_workers = min(self.num_workers, len(self)) if files.missing(self.rows) else 0
        is_large = self.batch_sampler.batch_size * math.prod(files.shape) > LARGE_BATCH
        ahead = (1 if is_large else 2) if num_workers else None
        for read in data_loader(files, batch_sampler=rows_to_read(), num_workers=num_workers, prefetch_factor=ahead,
                                **self.loading):
            rows = ordered.popleft()
            images, labels = files.collect(rows, read)
            yield images.pin_memory() if self.pin_memory else images, labels
            all_rows += rows
        files.report_replaced(all_rows)


def data_loader(*args, **kwargs):
    """A DataLoader that does not warn of more processes than there are cores."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DataLoader(*args, **kwargs)


def keep_in_memory(*sets):
    """Keep the images of these ImageFiles in memory, once read: of each set that still fits into MAX_IN_MEMORY."""
    free = MAX_IN_MEMORY // distributed.world_size()
    for files in sets:
        size = len(files) * math.prod(files.shape)
        if size <= free:
            files.enable_cache()
            free -= size


def default_num_workers():
    """As many as there are cores for this process, at most MAX_WORKERS."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) if distributed.world_size() > 1 else 1
    return max(1, min(MAX_WORKERS, cores // local))


def map_in_threads(function, items):
    """[function(item) for each item], in threads."""
    with ThreadPoolExecutor(default_num_workers()) as pool:
        return list(pool.map(function, items))


# ---------------------------------------------------------------- the files in a folder

def load(folder, shape):
    """The images below a folder as [C, H, W] = shape: training set and test set. No image is read yet.

    Its sub-folders are the classes. Folders train and test, or else val, are the two sets, each with its sub-folders;
    without them a tenth of all images, always the same, is the test set. Both sets have left_out, the files that are no
    images, and description, how the folder was read. Raises ValueError if there are fewer than two images, OSError if
    it is no folder.
    """
    folder, roots, ignored = _find_sets(Path(folder))
    files = [(path, root) for root in roots for path in list_files(root)]
    if not files:
        raise ValueError(f"there is no file in {' or '.join(map(str, roots))}")
    suffixes, images, left_out = image_file.suffixes(), [], []
    for path, root in files:
        if path.suffix.lower() in suffixes or image_file.has_image_header(path):
            images.append((path, root))
        else:
            left_out.append(path)
    is_test = [root == roots[1] for _, root in images] if len(roots) == 2 else _in_test_share(images)
    names = [_class_name(path, root) for path, root in images]
    classes = sorted(set(names))
    number = {name: i for i, name in enumerate(classes)}
    sets = []
    for in_test in (False, True):
        rows = [row for row, value in enumerate(is_test) if value == in_test]
        sets.append(ImageFiles([images[row][0] for row in rows], torch.tensor([number[names[row]] for row in rows]),
                               shape, classes))
    if not all(len(part) for part in sets):
        archive = next((f"; unpack {path} first" for path in left_out if _is_archive(path)), "")
        raise ValueError(f"{len(images)} of its files are images: at least one to train and one to test are needed"
                         + archive)
    for part in sets:
        part.left_out, part.description = left_out, _describe(folder, classes, roots, ignored)
        part.all_paths, part.folder = [path for path, _ in images], folder
    return tuple(sets)


def _find_sets(folder):
    """→ the folder that holds the images; the folders of the training and the test set, or the folder; those ignored.

    Where a folder holds nothing but another one with sub-folders, it is that one.
    """
    if folder.is_file():
        raise NotADirectoryError("is a file; " + ("unpack it and give the folder" if _is_archive(folder)
                                                  else "give the folder that holds the images"))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    for _ in range(MAX_LEVELS):
        inside = [path for path in sorted(folder.iterdir()) if not path.name.startswith(".")]
        if len(inside) != 1 or not inside[0].is_dir() or not any(path.is_dir() for path in inside[0].iterdir()):
            break
        folder = inside[0]
    by_name = {path.name.lower(): path for path in inside if path.is_dir()}
    train, test, validation = (next((by_name[name] for name in names if name in by_name), None) for names in SETS)
    if not train or not (test or validation):
        return folder, [folder], []
    roots = [train, test or validation]
    return folder, roots, [path.name for path in inside if path not in roots]


def _is_archive(path):
    return path.name.lower().endswith(tuple(ending for _, group, _ in shutil.get_unpack_formats() for ending in group))


def _describe(folder, classes, roots, ignored):
    """One line on how the folder was read."""
    names = ", ".join(printable(name) for name in classes[:5]) + ", …" * (len(classes) > 5)
    where = f"; to train: {roots[0].name}, to test: {roots[1].name}" if len(roots) == 2 else ""
    return (f"{folder} ({len(classes)} class{'es' * (len(classes) > 1)}: {names}{where}"
            + f"; ignored: {', '.join(map(printable, ignored[:5]))}" * bool(ignored) + ")")


def list_files(root):
    """All files below a folder, sorted, without hidden ones. Links are followed, except in loops.

    Raises OSError if a folder cannot be read.
    """
    def fail(error):
        raise error

    found, above = [], {str(root): {Path(os.path.realpath(root))}}          # the parents of each folder, links resolved
    own = [Path(os.path.realpath(name)) for name in OWN_FOLDERS]
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        outer = above.pop(folder)
        for name in folders.copy():
            path = os.path.join(folder, name)
            real = Path(os.path.realpath(path))
            if name.startswith(".") or real in own or any(other.is_relative_to(real) for other in outer):
                folders.remove(name)
            else:
                above[path] = outer | {real}
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.parts)       # faster than paths


def _class_name(path, root):
    inside = path.parts[len(root.parts):]
    return inside[0] if len(inside) > 1 else NO_CLASS


def _in_test_share(images):
    """Whether each of (path, root) is a test image, by the hash of its name.

    Adding or removing an image moves hardly any other between the sets.
    """
    hashes = [hashlib.sha256("/".join(path.parts[len(root.parts):]).encode("utf-8", "surrogateescape")).digest()
              for path, root in images]
    in_test = set(sorted(hashes)[:max(1, round(TEST_SHARE * len(images)))])
    return [digest in in_test for digest in hashes]
