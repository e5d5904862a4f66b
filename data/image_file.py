"""A picture's file as an image of one size: which formats are read, and how any mode becomes grey or RGB.

Letters: C channels, H×W pixels.
"""

import warnings

import numpy as np
import torch
from PIL import Image, ImageOps

# Which Pillow recognises and leaves to others: to Ghostscript, to libraries that are not there, to the system.
FOREIGN_FORMATS = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}


def read_image(path, height, width, channels):
    """The image in a file as uint8 (C, H, W): upright, on white, resized and cropped around its middle.

    Raises OSError if the system cannot read it, ValueError if Pillow cannot.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of damaged metadata, and of large sizes
            with _open(path) as image:
                image = _to_mode(ImageOps.exif_transpose(image), "L" if channels == 1 else "RGB")
                pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:      # a damaged file makes Pillow raise whatever it trips over
        if isinstance(error, OSError) and error.errno:
            raise
        raise ValueError(f"{path} is no image that Pillow can read ({' '.join(str(error).split())})") from error
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def has_image_header(path):
    """Whether Pillow recognises a file of any name. Raises OSError if the system cannot read it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _open(path).close()
            return True
    except Exception as error:      # as in read_image()
        if isinstance(error, OSError) and error.errno and not isinstance(error, PermissionError):
            raise
        return False


def suffixes():
    """The suffixes, such as .png, of the formats that are read."""
    formats = _formats()
    return {suffix for suffix, name in Image.registered_extensions().items() if name in formats}


def _formats():
    """The formats that Pillow decodes itself."""
    Image.init()
    return [name for name in Image.OPEN if name not in FOREIGN_FORMATS]


def _open(path):
    return Image.open(path, formats=_formats())


def _to_mode(image, mode):
    """An image of any mode as L or RGB, transparency on white. Raises ValueError if it is of floating point."""
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers, of which the white one is not known")
    if image.mode.startswith("I"):          # which Pillow would clip at 255
        pixels, transparent = np.asarray(image).clip(0, 65535), image.info.get("transparency")
        # 16 bits, whatever the values; of 32-bit integers, which no format defines the white of, the values decide.
        is_16_bit = image.mode != "I" or image.format == "PNG" or pixels.max() > 255
        shades = (pixels / (257 if is_16_bit else 1)).round().astype(np.uint8)
        image = Image.fromarray(np.where(pixels == transparent, np.uint8(255), shades) if transparent else shades)
    if image.mode == "LAB":                 # which Pillow does not convert to grey
        image = image.convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(mode)
