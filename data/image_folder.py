"""A folder of images as a data set: any tree of files that Pillow opens, brought to one size.

Letters: N images, B of them in a batch, M files, C channels, H×W pixels.
"""

import hashlib
import math
import os
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from utils import distributed

MAX_IN_MEMORY = 2**31           # bytes; larger sets are read from their files in every epoch
TEST_SHARE = 0.1                # of the images, if there is no test folder
WORKER_BATCH = 16               # files that a worker reads at a time
NO_CLASS = "."                  # the class of images outside the sub-folders


def read_image(path, height, width, channels):
    """The image in a file as uint8 (C, H, W): upright, on white, resized and cropped around its middle.

    Raises OSError if the system cannot read it, ValueError if Pillow cannot.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")         # of damaged metadata, and of large sizes
            image = _to_mode(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
            pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:      # a damaged file makes Pillow raise whatever it trips over
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is no image that Pillow can read ({' '.join(str(error).split())})") from error
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def _to_mode(image, mode):
    """An image of any mode as L or RGB, transparency on white. Raises ValueError if it is of floating point."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which the white one is not known")
    if image.mode.startswith("I"):          # 16 bits, which Pillow would clip at 255
        pixels = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((pixels / (257 if pixels.max() > 255 else 1)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


class ImageFiles(Dataset):
    """Images that are read from their files when a batch is taken, with int64 labels (N,)."""

    def __init__(self, paths, labels, shape, classes):
        self.paths, self.labels, self.shape, self.classes = paths, labels, shape, classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        """uint8 images (B, C, H, W) and labels (B,) of rows: a slice, a list or a tensor of indices."""
        C, H, W = self.shape
        labels = self.labels[rows]
        rows = torch.arange(len(self))[rows].tolist()
        try:
            return torch.stack([read_image(self.paths[row], H, W, C) for row in rows]), labels
        except ValueError as error:         # it could be read when the data set was loaded
            raise OSError(str(error)) from error

    __getitems__ = __getitem__


class _ReadableFiles(ImageFiles):
    """The same, with whether each could be read in place of its label."""

    def __getitem__(self, rows):
        C, H, W = self.shape
        images, readable = torch.zeros(len(rows), C, H, W, dtype=torch.uint8), torch.ones(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            try:
                images[i] = read_image(self.paths[row], H, W, C)
            except (FileNotFoundError, PermissionError, ValueError):
                readable[i] = False
        return images, readable

    __getitems__ = __getitem__


def load(folder, shape, num_workers=0, **loading):
    """The images below a folder as [C, H, W] = shape, under a progress bar while all of them are read.

    Its sub-folders are the classes. Folders train and test are the two sets, each with its sub-folders; without them a
    tenth of all images, always the same, is the test set. loading: other arguments of the DataLoader that reads them in
    num_workers processes.

    → for each of the two sets uint8 images (N, C, H, W) and labels (N,), or an ImageFiles if they do not fit into
    memory; the names of the classes; the files left out, which Pillow cannot read. Raises ValueError if there are fewer
    than two images, OSError if there is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    separate = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = [folder / "train", folder / "test"] if separate else [folder]
    found = [(path, _class_name(path, root)) for root in roots for path in list_files(root)]
    if not found:
        raise ValueError("there is no file in it" + " but in folders other than train and test" * separate)
    in_memory = len(found) * math.prod(shape) <= MAX_IN_MEMORY // distributed.world_size()
    images, readable = _read_all([path for path, _ in found], shape, in_memory, num_workers, loading)
    left_out = [path for (path, _), can_be_read in zip(found, readable.tolist()) if not can_be_read]
    found = [file for file, can_be_read in zip(found, readable.tolist()) if can_be_read]
    classes = sorted({name for _, name in found}) or [NO_CLASS]
    number = {name: i for i, name in enumerate(classes)}
    paths, labels = [path for path, _ in found], torch.tensor([number[name] for _, name in found])
    sets = []
    for rows in _split(paths, folder, separate):
        files = ImageFiles([paths[row] for row in rows.tolist()], labels[rows], shape, classes)
        sets.append((images[rows], files.labels) if in_memory else files)
    return sets, classes, left_out


def list_files(root):
    """All files below a folder, sorted, without hidden ones. Links are followed, except in loops.

    Raises OSError if a folder cannot be read.
    """
    def fail(error):
        raise error

    found, above = [], {str(root): {Path(os.path.realpath(root))}}          # the parents of each folder, links resolved
    for folder, folders, names in os.walk(root, onerror=fail, followlinks=True):
        outer = above.pop(folder)
        for name in folders.copy():
            path = os.path.join(folder, name)
            real = Path(os.path.realpath(path))
            if name.startswith(".") or any(other.is_relative_to(real) for other in outer):
                folders.remove(name)
            else:
                above[path] = outer | {real}
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _class_name(path, root):
    inside = path.relative_to(root).parts
    return inside[0] if len(inside) > 1 else NO_CLASS


def _read_all(paths, shape, keep, num_workers, loading):
    """→ uint8 images (N, C, H, W) of the readable files, or None unless they are kept; which are readable (M,)."""
    images, readable = [], []
    with tqdm(total=len(paths), desc="reading images", unit="img", unit_scale=True, leave=False,
              disable=distributed.hide_progress_bar()) as bar:
        for batch, can_be_read in DataLoader(_ReadableFiles(paths, torch.zeros(len(paths)), shape, []), WORKER_BATCH,
                                             num_workers=num_workers, collate_fn=_identity, **loading):
            images += [batch[can_be_read]] if keep else []
            readable.append(can_be_read.clone())    # a tensor from a worker process keeps a file open
            bar.update(len(can_be_read))
    return torch.cat(images) if keep else None, torch.cat(readable)


def _identity(batch):
    return batch


def _split(paths, folder, separate):
    """Rows of the training and of the test set. Raises ValueError if one would be empty."""
    if separate:
        is_test = torch.tensor([folder / "test" in path.parents for path in paths], dtype=torch.bool)
    else:
        # By the hashes of their names: adding or removing an image moves hardly any other between the sets.
        hashes = [hashlib.sha256(path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")).digest()
                  for path in paths]
        test_hashes = set(sorted(hashes)[:max(1, round(TEST_SHARE * len(paths)))])
        is_test = torch.tensor([digest in test_hashes for digest in hashes], dtype=torch.bool)
    rows = [(~is_test).nonzero().flatten(), is_test.nonzero().flatten()]
    if not all(len(part) for part in rows):
        raise ValueError(f"{len(paths)} of its files are images that Pillow can read: "
                         "at least one to train and one to test are needed")
    return rows
