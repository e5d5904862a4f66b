"""Types for add_argument(), whose errors say in one line what is wrong with a value. Imports no torch."""

import argparse
import difflib
import math
import os
import re
from pathlib import Path

DEVICES = "cpu, cuda, cuda:N, mps (an Apple GPU), or auto for the best that is there"
# The names that data.load() takes; folder is any folder of images.
DATASETS = ("MNIST-10k", "MNIST", "FashionMNIST", "KMNIST", "QMNIST", "EMNIST-byclass", "EMNIST-bymerge",
            "EMNIST-balanced", "EMNIST-letters", "EMNIST-digits", "EMNIST-mnist", "CIFAR10", "SVHN", "folder")
# Sets of digits like MNIST's, on which the classifier can be trained.
DIGIT_SETS = "MNIST-10k", "MNIST", "QMNIST", "EMNIST-digits", "EMNIST-mnist"
ARCHITECTURES = "cnn", "transformer"            # of the classifier
LEVELS, MAX_LEVELS, MAX_LEVELS_PRODUCT = "8,8,8", 1000, 2**20          # of finite scalar quantization
MAX_FOLDERS, MAX_NAME = 20, 200         # of a name: file systems allow 255 bytes, temporary files add some


def integer(minimum, maximum=2**63 - 1):
    """A type for integers from minimum to maximum."""
    def convert(text):
        try:
            value = int(text)
        except ValueError:
            value = None
        if value is None or not minimum <= value <= maximum:
            bound = f"of at least {minimum}" if maximum == 2**63 - 1 else f"from {minimum} to {maximum}"
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer {bound}")
        return value
    return convert


def number(above=None, minimum=None, below=math.inf):
    """A type for finite numbers: value > above or value >= minimum, and value < below."""
    def convert(text):
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not math.isfinite(value) or (above is not None and value <= above) \
                or (minimum is not None and value < minimum) or value >= below:
            bound = f"above {above}" if above is not None else f"of at least {minimum}"
            bound += f" and below {below}" if below < math.inf else ""
            raise argparse.ArgumentTypeError(f"{text!r} is not a number {bound}")
        return value
    return convert


def multiple_of(factor, minimum, maximum):
    """A type for multiples of an integer, from minimum to maximum."""
    def convert(text):
        value = integer(minimum, maximum)(text)
        if value % factor:
            raise argparse.ArgumentTypeError(f"{text!r} is not a multiple of {factor}")
        return value
    return convert


def one_of(*names):
    """A type for one of these names, in upper or lower case."""
    def convert(text):
        for name in names:
            if text.lower() == name.lower():
                return name
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: {did_you_mean(text, names)}"
                                         f"choose from {', '.join(names)}")
    return convert


def levels(text):
    """A type for the levels of finite scalar quantization: integers with commas between, as text."""
    sizes = [size.strip() for size in text.split(",")]
    if not all(re.fullmatch("[0-9]{1,7}", size) and 2 <= int(size) <= MAX_LEVELS for size in sizes) or (
            math.prod(map(int, sizes)) > MAX_LEVELS_PRODUCT):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list such as {LEVELS}, of integers from 2 to {MAX_LEVELS} "
                                         f"with a product of up to {MAX_LEVELS_PRODUCT:,}")
    return ",".join(str(int(size)) for size in sizes)


def did_you_mean(text, names):
    """A suggestion of the name closest to the text, to begin a message with; empty if none is close."""
    lower = {name.lower(): name for name in names}
    close = difflib.get_close_matches(text.lower(), lower, n=1)
    return f"did you mean {lower[close[0]]}? " if close else ""


def name_inside(folder):
    """A type for names and relative paths inside a folder."""
    def convert(text):
        path = Path(text)
        if not path.parts or path.anchor or ".." in path.parts or not text.isprintable() or text[0] == "-":
            raise argparse.ArgumentTypeError(f"{text!r} is not a name inside {folder}/: "
                                             "give one without a leading / or - and without ..")
        if len(path.parts) > MAX_FOLDERS or any(len(os.fsencode(part)) > MAX_NAME for part in path.parts):
            raise argparse.ArgumentTypeError(f"{text!r} is too long: at most {MAX_FOLDERS} folders deep, with "
                                             f"names of up to {MAX_NAME} bytes")
        return str(path)
    return convert


def file_name(text):
    """A type for paths of files and folders: any text but the empty one."""
    if not text:
        raise argparse.ArgumentTypeError("'' is not a path")
    return text


def device(text):
    """A type for names of devices. inputs.find_device() checks whether this machine has the device."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: choose from auto, cpu, mps, cuda, cuda:0, cuda:1, …")
    return text
