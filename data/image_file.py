"""A picture's file as an image of one size: which formats are read, and how pixels of any mode become grey or RGB.

The pictures that scripts write are PNG files. Letters: C channels, H×W pixels.
"""

import ctypes
import errno
import io
import logging
import warnings
from contextlib import suppress

import numpy as np
import torch
from PIL import Image, ImageOps

# Which Pillow recognises and leaves to others: to Ghostscript, to libraries that are not there, to the system.
FOREIGN_FORMATS = {"EPS", "PDF", "WMF", "BUFR", "GRIB", "HDF5", "MPEG"}
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC = 274, 258, 262           # tags of EXIF, and of TIFF
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
MIN_IS_WHITE = 0                                                    # a value of PHOTOMETRIC
# What turns an image upright, by the value of ORIENTATION; 1 is upright. ImageOps.exif_transpose() would lose the
# format and the tags that _to_mode() reads.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
         5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def silence_pillow():
    """Let Pillow and libtiff write nothing to stderr about large sizes, damaged metadata and damaged pixels.

    Called once, when this file is imported, also in a worker process: warnings.catch_warnings() around each reading
    would change the filters of all threads, and libtiff writes past sys.stderr.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with suppress(OSError, AttributeError):         # libtiff is linked so that its functions cannot be found
        library = ctypes.CDLL(Image.core.__file__)
        for name in ("TIFFSetWarningHandler", "TIFFSetErrorHandler"):
            function = getattr(library, name)
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_void_p
            function(None)


silence_pillow()


def read_image(path, height, width, channels):
    """The image in a file as uint8 (C, H, W): upright, on white, resized and cropped around its middle.

    Raises OSError if the system cannot read it, ValueError if Pillow cannot or its pixels are of floating point.
    """
    try:
        with _open(path) as image:
            is_float = image.mode == "F"
            if not is_float:
                image.load()
                turn = _turn(image)
                image = _to_mode(image, "L" if channels == 1 else "RGB")
                image = image if turn is None else image.transpose(turn)
                pixels = np.array(ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS))
    except Exception as error:      # a damaged file makes Pillow raise whatever it trips over
        if _is_of_the_system(error):
            raise
        raise ValueError(f"{path} is not an image that Pillow can read ({' '.join(str(error).split())})") from error
    if is_float:
        raise ValueError(f"{path}: its pixels are floating-point numbers, which have no known white: save it with 8 or "
                         "16 bits")
    return torch.from_numpy(pixels).view(height, width, channels).permute(2, 0, 1)


def has_image_header(path):
    """Whether Pillow recognises a file of any name. Raises OSError if the system cannot read it."""
    try:
        _open(path).close()
        return True
    except Exception as error:      # as in read_image()
        if _is_of_the_system(error) and not isinstance(error, PermissionError):
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


def _is_of_the_system(error):
    """Whether a file could not be read, in contrast to one with wrong contents, such as a position below 0."""
    return isinstance(error, OSError) and error.errno not in (None, errno.EINVAL)


def _turn(image):
    """The Image.Transpose that turns a loaded image upright, or None."""
    with suppress(Exception):       # damaged metadata leave the pixels as they are
        return TURNS.get(image.getexif().get(ORIENTATION))


def _to_mode(image, mode):
    """A loaded image of any mode but F as L or RGB, transparency on white."""
    if image.mode.startswith("I"):
        image = Image.fromarray(_deep_to_8_bits(image))
    elif image.format == "ICNS":            # the palette that may be in it is found by a copy
        image = image.copy()
    elif image.format == "XBM":             # its ones are black on white, and Pillow reads them as white on black
        image = ImageOps.invert(image)
    if image.mode in ("LAB", "YCbCr"):      # Pillow has no way from LAB to grey; a colour may be outside of RGB
        image = image.convert("RGB")
    if image.mode == "La":                  # multiplied by alpha, which Pillow does not convert to RGBA
        image = image.convert("LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image if image.mode == mode else image.convert(mode)


def _deep_to_8_bits(image):
    """A grey image of 12, 16 or 32 bits as uint8 (H, W). Pillow would clip it at 255."""
    pixels, tags = np.asarray(image).clip(0, 65535), getattr(image, "tag_v2", {})       # tags of a TIFF
    white = 4095 if tags.get(BITS_PER_SAMPLE) == (12,) else 65535       # by the depth, whatever the values
    # Of 32-bit integers, which no format defines the white of, the values decide. Pillow holds 16 bits in them too.
    if image.mode == "I" and image.format not in ("PNG", "PPM") and pixels.max() <= 255:
        white = 255
    shades = pixels.astype(np.uint32)
    shades *= 255                           # in place: there may be 96 million of them
    shades += white // 2
    shades //= white
    shades = shades.astype(np.uint8)
    if tags.get(PHOTOMETRIC) == MIN_IS_WHITE:
        shades = 255 - shades
    if (transparent := image.info.get("transparency")) is not None:     # one value, of a PNG
        shades[pixels == transparent] = 255
    return shades


# ---------------------------------------------------------------- written by the scripts

def as_png(picture):
    """A uint8 picture (C, H, W) of one or three channels, such as a grid, in the bytes of a PNG file."""
    buffer = io.BytesIO()
    pixels = picture[0] if len(picture) == 1 else picture.permute(1, 2, 0)
    Image.fromarray(pixels.numpy()).save(buffer, format="png")
    return buffer.getbuffer()


def is_png(path):
    """Whether the file at a path begins as a PNG file does."""
    with open(path, "rb") as file:
        return file.read(len(PNG_SIGNATURE)) == PNG_SIGNATURE
