"""Your own images as a data set: any tree of files that Pillow opens, brought to one size.

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

import processes

IN_MEMORY = 2**31               # bytes; more are read anew in every epoch
TEST_SHARE = 0.1                # of the images where there is no test folder
AT_ONCE = 16                    # files that a worker reads before it hands them over
LOOSE = "."                     # the class of images that lie beside the folders of the others


def read(path, height, width, channels):
    """The image in a file as uint8 (C, H, W): upright, on white, resized and cropped around its middle.

    Raises OSError if the system cannot read it, ValueError if Pillow cannot.
    """
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("ignore")         # of metadata that are damaged, and of sizes that are large
            image = _plain(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
            pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:      # a damaged file makes Pillow raise whatever it trips over
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is no image that Pillow can read ({' '.join(str(error).split())})") from error
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def _plain(image, mode):
    """An image of any mode as L or RGB. What is transparent is white. Raises ValueError if it is of floating point."""
    if image.mode == "F":
        raise ValueError("its numbers are of floating point, and which of them is white is not known")
    if image.mode.startswith("I"):          # 16 bits, which Pillow would cut off at 255
        pixels = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((pixels / (257 if pixels.max() > 255 else 1)).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)


class ImageFiles(Dataset):
    """Images that are read when they are asked for: by their files' paths, with int64 labels (N,)."""

    def __init__(self, paths, labels, shape, classes):
        self.paths, self.labels, self.shape, self.classes = paths, labels, shape, classes

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, rows):
        """uint8 images (B, C, H, W) and labels (B,) of rows: a slice, a list or a tensor of their numbers."""
        C, H, W = self.shape
        labels = self.labels[rows]
        rows = torch.arange(len(self))[rows].tolist()
        try:
            return torch.stack([read(self.paths[row], H, W, C) for row in rows]), labels
        except ValueError as error:         # it could be read when the folder was looked at
            raise OSError(str(error)) from error

    __getitems__ = __getitem__


class _Tried(ImageFiles):
    """The same, with whether each could be read in the place of its label."""

    def __getitem__(self, rows):
        C, H, W = self.shape
        images, good = torch.zeros(len(rows), C, H, W, dtype=torch.uint8), torch.ones(len(rows), dtype=torch.bool)
        for i, row in enumerate(rows):
            try:
                images[i] = read(self.paths[row], H, W, C)
            except (FileNotFoundError, PermissionError, ValueError):
                good[i] = False
        return images, good

    __getitems__ = __getitem__


def load(folder, shape, num_workers=0, **loading):
    """The images below a folder as [C, H, W] = shape, with a bar while all of them are looked at.

    Its sub-folders are the classes. If there are folders train and test, then they are the two sets,
    each with its sub-folders; else a tenth of all, always the same, is the test set. loading: other
    arguments of the DataLoader that reads them, in num_workers processes.

    → for training and for testing each uint8 images (N, C, H, W) and labels (N,), or one ImageFiles
    if there are too many to be held in memory; the classes' names; the files left out, which Pillow
    cannot read. Raises ValueError if there are no two images, OSError if the folder is not there.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    apart = (folder / "train").is_dir() and (folder / "test").is_dir()
    roots = [folder / "train", folder / "test"] if apart else [folder]
    found = [(path, _class(path, root)) for root in roots for path in files_in(root)]
    if not found:
        raise ValueError("there is no file in it" + " but in folders other than train and test" * apart)
    held = len(found) * math.prod(shape) <= IN_MEMORY // processes.count()
    images, good = _try([path for path, _ in found], shape, held, num_workers, loading)
    left_out = [path for (path, _), fine in zip(found, good.tolist()) if not fine]
    found = [file for file, fine in zip(found, good.tolist()) if fine]
    classes = sorted({name for _, name in found}) or [LOOSE]
    number = {name: i for i, name in enumerate(classes)}
    paths, labels = [path for path, _ in found], torch.tensor([number[name] for _, name in found])
    parts = []
    for rows in _split(paths, folder, apart):
        part = ImageFiles([paths[row] for row in rows.tolist()], labels[rows], shape, classes)
        parts.append((images[rows], part.labels) if held else part)
    return parts, classes, left_out


def files_in(root):
    """All files below a folder in the order of their names, without hidden ones. Links are followed, but for loops.

    Raises OSError if a folder cannot be read.
    """
    def fail(error):
        raise error

    found, above = [], {str(root): {Path(os.path.realpath(root))}}          # what each folder lies in, links resolved
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


def _class(path, root):
    inside = path.relative_to(root).parts
    return inside[0] if len(inside) > 1 else LOOSE


def _try(paths, shape, held, num_workers, loading):
    """→ uint8 images (N, C, H, W) of the files that can be read, or None if they are not to be held; which can (M,)."""
    images, good = [], []
    with tqdm(total=len(paths), desc="reading images", unit="img", unit_scale=True, leave=False,
              disable=processes.no_bar()) as bar:
        for some, fine in DataLoader(_Tried(paths, torch.zeros(len(paths)), shape, []), AT_ONCE,
                                     num_workers=num_workers, collate_fn=_as_it_is, **loading):
            images += [some[fine]] if held else []
            good.append(fine.clone())               # what comes from a worker holds a file open
            bar.update(len(fine))
    return torch.cat(images) if held else None, torch.cat(good)


def _as_it_is(batch):
    return batch


def _split(paths, folder, apart):
    """Rows of the training and of the test set. Raises ValueError if one would be empty."""
    if apart:
        tested = torch.tensor([folder / "test" in path.parents for path in paths], dtype=torch.bool)
    else:
        # By what their names look like when hashed: an image more or less moves hardly another one.
        hashes = [hashlib.sha256(path.relative_to(folder).as_posix().encode("utf-8", "surrogateescape")).digest()
                  for path in paths]
        count = max(1, round(TEST_SHARE * len(paths)))
        chosen = set(sorted(hashes)[:count])
        tested = torch.tensor([digest in chosen for digest in hashes], dtype=torch.bool)
    rows = [(~tested).nonzero().flatten(), tested.nonzero().flatten()]
    if not all(len(some) for some in rows):
        raise ValueError(f"{len(paths)} of its files are images that Pillow can read: "
                         "at least one to train and one to test are needed")
    return rows
