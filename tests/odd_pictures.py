"""A folder of a thousand odd files: pictures of every mode, depth and format that Pillow writes, turned and damaged.

Beside each picture stands what its pixels are, by NumPy from the values that were written.
"""

import colorsys
import random
import struct
import zlib
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, features

SIZES = (32, 24), (13, 17)              # width and height
LOSSY = 6                               # levels, on average, that a lossy format may be off on a smooth picture
COLOUR = "1 L LA P PA RGB RGBA RGBX CMYK"
PLAIN = "1 L P RGB"
ALPHA = "L LA RGB RGBA"
# Suffix, options of Image.save(), the modes in which this format keeps what it is given.
LOSSLESS = (
    ("png", {}, "1 L LA P RGB RGBA I;16"), ("bmp", {}, PLAIN), ("dib", {}, PLAIN), ("gif", {}, "1 L P"),
    ("ico", {"sizes": SIZES}, "1 L LA P RGB RGBA I;16"), ("im", {}, f"{COLOUR} YCbCr I I8 I;16 I;16B"),
    ("jp2", {}, f"{ALPHA} I;16"), ("j2k", {}, f"{ALPHA} I;16"), ("msp", {}, "1"), ("xbm", {}, "1"), ("pcx", {}, PLAIN),
    ("ppm", {}, "1 L RGB I"), ("pgm", {}, "L I"), ("pbm", {}, "1"), ("sgi", {}, "L RGB RGBA"),
    ("rgb", {"bpc": 2}, "L RGB RGBA"), ("tga", {}, "1 L LA P RGB RGBA"), ("tga", {"orientation": 1}, ALPHA),
    ("tga", {"compression": "tga_rle"}, f"P {ALPHA}"), ("tif", {}, f"{COLOUR} I I8 I;16 I;16B"),
    *(("tif", {"compression": name}, f"{COLOUR} YCbCr I I8 I;16 I;16B")
      for name in ("tiff_lzw", "tiff_adobe_deflate", "packbits", "lzma", "zstd")),
    *(("tif", {"compression": name}, "1") for name in ("group3", "group4", "tiff_ccitt")),
    ("tiff", {"big_tiff": True}, f"{COLOUR} I"), ("dds", {}, ALPHA), ("blp", {}, "P"),
    ("blp", {"blp_version": "BLP1"}, "P"), ("qoi", {}, "RGB RGBA"),
    ("webp", {"lossless": True, "exact": True}, f"{COLOUR} YCbCr HSV"))
# The same for what comes close; "" is a format whose suffix Pillow does not know.
APPROXIMATE = (
    ("jpg", {"quality": 95, "subsampling": 0}, "1 L RGB RGBX CMYK YCbCr"),
    ("jpeg", {"progressive": True}, "L RGB CMYK"),
    ("tif", {"compression": "jpeg", "quality": 95}, "L RGB CMYK"), ("mpo", {"save_all": True, "quality": 95}, "L RGB"),
    ("webp", {"quality": 90}, "L RGB RGBA"), ("avif", {"quality": 90, "subsampling": "4:4:4"}, "L LA RGB RGBA"),
    ("jp2", {"irreversible": True}, "L RGB"), *(("dds", {"pixel_format": f"DXT{i}"}, "L RGB") for i in (1, 3, 5)))
FLOATS = ("tif", {}, "F"), ("im", {}, "F"), ("pfm", {}, "F"), ("", {"format": "SPIDER"}, "F L RGB")
ORIENTATION = 274


class Picture(NamedTuple):
    path: Path
    rgb: np.ndarray         # its pixels on white, float (H, W, 3) from 0 to 255
    is_exact: bool          # or a lossy format has changed them
    mode: str = ""          # in which Pillow has written it


# ---------------------------------------------------------------- values of every mode

def on_white(rgb, alpha):
    """Colours (H, W, 3) behind which alpha (H, W), from 0 to 255, leaves room for white."""
    share = np.asarray(alpha, float)[..., None] / 255
    return rgb * share + 255 * (1 - share)


def grey(values):
    return np.repeat(np.asarray(values, float)[..., None], 3, axis=2)


def make_picture(mode, size, rng, smooth=False):
    """A picture of noise, or a smooth one. → an Image, and its pixels as float (H, W, 3), None of mode F

    I8 are 32-bit integers of 8 bits.
    """
    W, H = size
    x, y = np.meshgrid(np.arange(W), np.arange(H))
    bands = len(Image.new("I" if mode == "I8" else mode, (1, 1)).getbands())
    slopes = rng.uniform(0.5, 4, (bands, 2))
    v = (np.stack([40 + a * x + b * y for a, b in slopes], axis=2) if smooth else rng.integers(0, 256, (H, W, bands)))
    v = v.clip(0, 255).astype(np.uint8)
    first, last, colours = v[..., 0], v[..., -1], v[..., :3].astype(float)
    if mode == "F":
        return Image.fromarray(first.astype(np.float32)), None
    if mode == "1":
        return Image.fromarray(first).point(lambda value: 255 * (value > 127), "1"), grey(255 * (first > 127))
    if mode == "I8":
        return Image.fromarray(first.astype(np.int32)), grey(first)
    if mode.startswith("I"):
        deep = rng.integers(0, 65536, (H, W))
        stored = {"I": "<i4", "I;16": "<u2", "I;16B": ">u2"}[mode]
        return Image.frombytes(mode, size, deep.astype(stored).tobytes()), grey(deep / 257)
    image = Image.frombytes(mode, size, v.tobytes())
    if mode in ("P", "PA"):
        palette = rng.integers(0, 256, (256, 3)).astype(np.uint8)
        image.putpalette(palette.tobytes())
        return image, palette[first].astype(float) if mode == "P" else on_white(palette[first], last)
    if mode == "CMYK":
        return image, (255 - colours) * (255 - last[..., None].astype(float)) / 255
    if mode == "YCbCr":
        return image, from_ycbcr(colours)
    if mode == "HSV":
        return image, np.array([[colorsys.hsv_to_rgb(*pixel) for pixel in row] for row in colours / 255]) * 255
    rgb = grey(first) if mode in ("L", "LA") else colours
    return image, on_white(rgb, last) if mode in ("LA", "RGBA") else rgb


def from_ycbcr(pixels):
    """ITU-R BT.601, as JPEG uses it."""
    y, cb, cr = np.moveaxis(pixels - np.array([0, 128, 128]), 2, 0)
    return np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb], axis=2).clip(0, 255)


def from_lab(pixels):
    """CIE L*a*b* at D50, L* from 0 to 255, to sRGB."""
    L, a, b = np.moveaxis(pixels, 2, 0)
    y = (L / 2.55 + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], axis=2)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29)**2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    linear = xyz @ np.array([[3.1338561, -0.9787684, 0.0719453], [-1.6168667, 1.9161415, -0.2289914],
                             [-0.4906146, 0.0334540, 1.4052427]])
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear.clip(0)**(1 / 2.4) - 0.055).clip(0, 1)


# ---------------------------------------------------------------- formats that Pillow reads and does not write

def png_bytes(size, depth, colour_type, rows, interlace=0, **chunks):
    """A PNG file of unfiltered rows. chunks: those to stand before the pixels."""
    def chunk(name, contents):
        return (struct.pack(">I", len(contents)) + name + contents
                + struct.pack(">I", zlib.crc32(name + contents)))

    header = struct.pack(">IIBBBBB", *size, depth, colour_type, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
            + b"".join(chunk(name.encode(), contents) for name, contents in chunks.items())
            + chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))) + chunk(b"IEND", b""))


def interlaced(pixels):
    """The rows of the seven passes of Adam7, of uint8 pixels (H, W)."""
    for y, x, rows, columns in ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2),
                                (1, 0, 2, 1)):
        yield from (row.tobytes() for row in pixels[y::rows, x::columns] if row.size)


def tiff_bytes(contents, order="<", **tags):
    """An uncompressed TIFF file of one strip. tags: their numbers, as t256, and values, numbers or lists of them."""
    tags = {int(name[1:]): value if isinstance(value, list) else [value] for name, value in tags.items()}
    tags |= {273: [8], 279: [len(contents)]} if 324 not in tags else {324: [8], 325: [len(contents)]}
    entries, extra, offset = [], b"", 8 + len(contents)
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}H", *values)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", offset + 6 + 12 * len(tags) + len(extra)), extra + packed
        entries.append(struct.pack(f"{order}HHI", tag, 3, len(values)) + packed.ljust(4, b"\0"))
    return ((b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", offset) + contents
            + struct.pack(f"{order}H", len(entries)) + b"".join(entries) + b"\0" * 4 + extra)


def handmade(rng):
    """Names, contents and pixels of files that Pillow reads, but does not write."""
    size = W, H = 16, 16
    v, deep = rng.integers(0, 256, (H, W, 4)).astype(np.uint8), rng.integers(0, 65536, (H, W, 3))
    shades, alpha, shape = v[..., 0], v[..., 3], {"t256": W, "t257": H, "t259": 1}
    multiplied = np.minimum(v, alpha[..., None])
    yield "adam7.png", png_bytes(size, 8, 0, interlaced(shades), interlace=1), grey(shades)
    yield "deep.png", png_bytes(size, 16, 2, (row.astype(">u2").tobytes() for row in deep)), deep / 257
    for depth in (1, 2, 4):
        values, shift = shades >> (8 - depth), np.arange(8 // depth)[::-1] * depth
        rows = [(row.reshape(-1, 8 // depth) << shift).sum(axis=1).astype(np.uint8).tobytes() for row in values]
        yield f"{depth} bits.png", png_bytes(size, depth, 0, rows), grey(values * (255 // (2**depth - 1)))
    yield "min is white.tif", tiff_bytes(shades.tobytes(), **shape, t258=8, t262=0), 255 - grey(shades)
    for name, photometric in (("deep.tif", 1), ("deep, min is white.tif", 0)):
        contents = tiff_bytes(deep[..., 0].astype("<u2").tobytes(), **shape, t258=16, t262=photometric)
        yield name, contents, abs(255 * (1 - photometric) - grey(deep[..., 0] / 257))
    a, b = (deep[..., 0].ravel() >> 4).reshape(-1, 2).T
    packed = np.stack([a >> 4, (a & 15) << 4 | b >> 8, b & 255], axis=1).astype(np.uint8).tobytes()
    yield "12 bits.tif", tiff_bytes(packed, **shape, t258=12, t262=1), grey((deep[..., 0] >> 4) / 4095 * 255)
    yield ("multiplied grey.tif", tiff_bytes(multiplied[..., [0, 3]].tobytes(), **shape, t258=[8, 8], t262=1, t277=2,
                                             t338=1), grey(multiplied[..., 0]) + 255 - grey(alpha))
    yield ("multiplied.tif", tiff_bytes(multiplied.tobytes(), **shape, t258=[8] * 4, t262=2, t277=4, t338=1),
           multiplied[..., :3] + 255.0 - grey(alpha))
    for order in "<>":
        contents = tiff_bytes(deep.astype(f"{order}u2").tobytes(), order, **shape, t258=[16] * 3, t262=2, t277=3)
        yield f"deep {ord(order)}.tif", contents, deep / 257
    if features.check("littlecms2"):
        lab = np.stack([rng.integers(100, 200, (H, W)), *rng.integers(-8, 9, (2, H, W))], axis=2)
        contents = tiff_bytes(lab.astype(np.uint8).tobytes(), **shape, t258=[8] * 3, t262=8, t277=3)
        yield "lab.tif", contents, from_lab(lab)
    yield ("tiled.tif", tiff_bytes(shades.tobytes(), **shape, t258=8, t262=1, t322=16, t323=16, t324=0), grey(shades))


def transparent_colours(rng):
    """Names, images, what Image.save() is told of their transparent colour, and their pixels."""
    for mode, suffix in (("1", "png"), ("L", "png"), ("RGB", "png"), ("I;16", "png"), ("P", "png"), ("P", "gif")):
        image, rgb = make_picture(mode, SIZES[0], rng)
        values = np.asarray(image).reshape(SIZES[0][1], SIZES[0][0], -1)
        chosen = values[0, 0]
        is_chosen = (values == chosen).all(axis=2, keepdims=True)
        value = tuple(chosen.tolist()) if mode == "RGB" else int(chosen[0]) * (255 if mode == "1" else 1)
        yield f"transparent {mode.replace(';', '')}.{suffix}", image, value, np.where(is_chosen, 255, rgb)
    shades = np.arange(32 * 24).reshape(24, 32) * 80
    yield "transparent black.png", Image.fromarray(shades.astype(np.uint16)), 0, np.where(
        shades[..., None] == 0, 255, grey(shades / 257))
    image, rgb = make_picture("P", SIZES[0], rng)
    alphas = rng.integers(0, 256, 256).astype(np.uint8)
    yield "transparent palette.png", image, alphas.tobytes(), on_white(rgb, alphas[np.asarray(image)])


# ---------------------------------------------------------------- the folder

def try_to_save(image, path, options):
    """Whether the installed Pillow, and its libraries, write this format."""
    try:
        image.save(path, **options)
        return True
    except (OSError, KeyError, ValueError, RuntimeError, SystemError, AttributeError):
        path.unlink(missing_ok=True)
        return False


def write_folder(folder):
    """Write the files. → the pictures; the paths of those of floating point"""
    rng, pictures, floats = np.random.default_rng(0), [], []
    for table in (LOSSLESS, APPROXIMATE, FLOATS):
        for number, (suffix, options, modes) in enumerate(table):
            for mode in modes.split():
                for size in SIZES:
                    image, rgb = make_picture(mode, size, rng, smooth=table is APPROXIMATE)
                    name = f"{len(table)} {number} {mode.replace(';', '')} {size[0]}" + f".{suffix}" * bool(suffix)
                    if try_to_save(image, folder / name, options):
                        if table is FLOATS:
                            floats.append(folder / name)
                        elif suffix == "xbm":           # its ones are black, also those that Pillow writes for white
                            pictures.append(Picture(folder / name, 255 - rgb, True, mode))
                        else:
                            pictures.append(Picture(folder / name, rgb, table is LOSSLESS, mode))
    for name, contents, rgb in handmade(rng):
        (folder / name).write_bytes(contents)
        with suppress(OSError), Image.open(folder / name):           # older versions of Pillow do not know all of them
            pictures.append(Picture(folder / name, rgb, True))
    for name, image, transparency, rgb in transparent_colours(rng):
        image.save(folder / name, transparency=transparency)
        pictures.append(Picture(folder / name, rgb, True))
    pictures += write_turned(folder, rng)
    Image.new("RGB", (16, 16), (10, 200, 90)).save(folder / "resized.icns")
    pictures.append(Picture(folder / "resized.icns", np.full((16, 16, 3), (10., 200., 90.)), True))
    # 96 million pixels, more than Pillow takes without a warning.
    Image.new("1", (12000, 8000), 1).save(folder / "10 large.png")
    write_damaged(folder, [picture.path for picture in pictures if picture.path.stat().st_size < 50_000])
    return pictures, floats


def write_turned(folder, rng):
    """Pictures in the eight orientations of EXIF, and some with damaged EXIF data."""
    for suffix, options in (("png", {}), ("tif", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 95})):
        for orientation in range(1, 9):
            image, rgb = make_picture("RGB", SIZES[1], rng, smooth=suffix == "jpg")
            exif, path = Image.Exif(), folder / f"turned {orientation}.{suffix}"
            exif[ORIENTATION] = orientation
            image.save(path, exif=exif, **options)
            upright = rgb.transpose(1, 0, 2) if orientation > 4 else rgb
            rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(
                orientation, (1, 1))
            yield Picture(path, upright[::rows, ::columns], suffix != "jpg")
    for suffix, options in (("png", {}), ("webp", {"lossless": True}), ("jpg", {"quality": 95})):
        for i, damage in enumerate((b"", b"Exif\0\0", b"MM", b"MM\0*\0\0\0\x08\xff\xff", b"II*\0\xff\xff\xff\xff",
                                    b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x05\0\0\0\x09\0\0\0\x08")):
            image, rgb = make_picture("RGB", SIZES[1], rng, smooth=suffix == "jpg")
            path = folder / f"damaged EXIF {i}.{suffix}"
            if try_to_save(image, path, {"exif": b"Exif\0\0" + damage, **options}):
                yield Picture(path, rgb, suffix != "jpg")


def write_damaged(folder, paths):
    """Truncated and edited copies of pictures, and files that never were any."""
    choice, suffixes = random.Random(0), sorted({path.suffix for path in paths})
    for suffix in suffixes:
        alike = [path for path in paths if path.suffix == suffix]
        for i in range(8):
            contents = choice.choice(alike).read_bytes()
            cut = choice.randrange(len(contents)) if i else len(contents) - 1
            (folder / f"truncated {i}{suffix}").write_bytes(contents[:cut])
            edited = bytearray(contents)
            for _ in range(4):
                edited[choice.randrange(min(len(edited), 300))] = choice.randrange(256)
            (folder / f"edited {i}{suffix}").write_bytes(edited)
        (folder / f"empty{suffix}").write_bytes(b"")
        (folder / f"zeros{suffix}").write_bytes(bytes(300))
        (folder / f"noise{suffix}").write_bytes(choice.randbytes(300))
        (folder / f"text{suffix}").write_text("This is no picture.\n" * 20)
