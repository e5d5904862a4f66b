"""A thousand odd pictures in one folder: each value against an independent reading, and no stray word on stderr."""

import ctypes
import os
import re
import shutil
import subprocess

import numpy as np
import pytest
from helpers import expect_usage_error, start_script
from odd_pictures import LOSSY, write_folder
from PIL import Image

import checkpoint
from data import image_file

pytestmark = pytest.mark.filterwarnings("ignore")       # pytest undoes the filter of data/image_file.py
TIMEOUT = 300       # seconds for a script, which needs ten on an idle machine
# What ImageMagick understands as Pillow does: in TIFF, it takes an unspecified fourth band for alpha.
IN_IMAGEMAGICK = {".png", ".bmp", ".gif", ".ppm", ".sgi", ".tif", ".xbm"}, {"1", "L", "LA", "P", "RGB", "RGBA", "CMYK",
                                                                          "I;16", "I;16B"}
GREY = np.array([0.299, 0.587, 0.114])          # ITU-R BT.601


@pytest.fixture(scope="module")
def odd(tmp_path_factory):
    """The folder, its pictures, and the paths of those of floating point. Read-only."""
    folder = tmp_path_factory.mktemp("odd pictures")
    pictures, floats = write_folder(folder)
    (folder / "folder.png").mkdir()
    (folder / "dangling.png").symlink_to("nowhere")
    if hasattr(os, "mkfifo"):
        os.mkfifo(folder / "pipe.png")
    return folder, pictures, floats


def read(path, rgb, channels):
    """The product's reading at the picture's own size, (H, W, C)."""
    return image_file.read_image(path, *rgb.shape[:2], channels).permute(1, 2, 0).numpy().astype(int)


def run(script, *arguments, cwd):
    """Run a script. → the lines on stderr. Fails if it does not end well, and in time."""
    process = start_script(script, *arguments, cwd=cwd)
    process.process.join(TIMEOUT)
    if process.poll() is None:
        process.kill()
        pytest.fail(f"{script} hangs: {process.communicate()}")
    stderr = process.communicate()[1]
    assert process.returncode == 0, stderr
    return stderr.splitlines()


# ---------------------------------------------------------------- values

def test_every_picture_is_read_within_one_grey_level(odd):
    folder, pictures, _ = odd
    assert len(list(folder.iterdir())) > 1000 and len({picture.path.suffix for picture in pictures}) >= 20
    wrong = []
    for path, rgb, is_exact, _ in pictures:
        for channels, expected in ((3, rgb), (1, (rgb @ GREY)[..., None])):
            errors = abs(read(path, rgb, channels) - expected.round())
            if (errors.max() > 1) if is_exact else (errors.mean() > LOSSY):
                wrong.append((path.name, channels, errors.max(), errors.mean()))
    assert not wrong


def test_imagemagick_reads_the_same(odd):
    command = next((name for name in ("magick", "convert") if shutil.which(name) and subprocess.run(
        [name, "-version"], capture_output=True).stdout.startswith(b"Version: ImageMagick")), None)
    if not command:
        pytest.skip("needs ImageMagick")
    suffixes, modes = IN_IMAGEMAGICK
    compared = 0
    for path, rgb, _, mode in odd[1]:
        if path.suffix in suffixes and mode in modes and rgb.shape[1] == 32:
            raw = subprocess.run([command, f"{path}[0]", "-background", "white", "-alpha", "remove", "-colorspace",
                                  "sRGB", "-depth", "8", "rgb:-"], capture_output=True).stdout
            if len(raw) == rgb.size:            # else this build of ImageMagick lacks the format
                theirs = np.frombuffer(raw, np.uint8).reshape(rgb.shape).astype(int)
                assert abs(read(path, rgb, 3) - theirs).max() <= 1, path.name
                compared += 1
    assert compared > 50


def test_floating_point_is_refused_in_a_sentence_of_its_own(odd, tmp_path, monkeypatch, capsys):
    floats = odd[2]
    assert {path.suffix for path in floats} >= {".tif", ".im", ""}
    for path in floats:
        with pytest.raises(ValueError) as excinfo:
            image_file.read_image(path, 8, 8, 1)
        assert str(excinfo.value) == (f"{path}: its pixels are floating-point numbers, which have no known white: "
                                      "save it with 8 or 16 bits")
    monkeypatch.chdir(tmp_path)
    line = expect_usage_error("generate.py", ["--model", checkpoint.PRETRAINED, "--input", floats[0]], capsys)
    assert line.count(str(floats[0])) == 1 and "Pillow" not in line and "floating-point numbers" in line
    for i in range(4):
        shutil.copy(floats[0], tmp_path / f"{i}.tif")
    line = expect_usage_error("VQ-VAE.py", ["--dataset", "folder", "--data-folder", ".", "--num-workers", 0], capsys)
    assert "not one of the" in line and "can be used" in line and "floating-point numbers" in line


def test_a_position_before_the_file_is_damage_and_no_error_of_the_system(tmp_path):
    path = tmp_path / "short.pcx"
    Image.new("P", (8, 8)).save(path)
    path.write_bytes(path.read_bytes()[:200])           # the palette is looked for 769 bytes before the end
    with pytest.raises(OSError, match="Invalid argument"):
        Image.open(path)
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        image_file.read_image(path, 8, 8, 1)
    assert not image_file.has_image_header(path)
    for function in (lambda path: image_file.read_image(path, 8, 8, 1), image_file.has_image_header):
        with pytest.raises(FileNotFoundError):
            function(tmp_path / "missing.png")


# ---------------------------------------------------------------- no stray word

def test_scripts_print_only_their_own_lines_about_a_thousand_odd_files(odd, tmp_path):
    folder, pictures, floats = odd
    files = {path for path in folder.iterdir() if path.is_file()}
    usable, headless = set(), set()
    for path in files:
        try:
            image_file.read_image(path, 8, 8, 1)
            usable.add(path)
        except ValueError:
            if path.suffix not in image_file.suffixes() and not image_file.has_image_header(path):
                headless.add(path)
    assert {picture.path for picture in pictures} < usable and not usable.intersection(floats)
    left_out, *replaced = run("VQ-VAE.py", "--dataset", "folder", "--data-folder", folder, "--image-size", 16,
                              "--channels", 1, "--hidden-size", 8, "--k", 16, "--num-epochs", 1, "--batch-size", 128,
                              cwd=tmp_path)
    assert left_out.startswith(f"Left out of {folder}, {len(headless)} that Pillow cannot read: ")
    found = [re.match(r"(\d+) of (\d+) images cannot be used, the next image of the set was taken instead: ", line)
             for line in replaced]
    assert all(found) and len(found) == 3
    unusable, total = (sum(int(match[i]) for match in found) for i in (1, 2))
    assert (unusable, total) == (len(files - usable - headless), len(files - headless))

    shipped, *left_out, light = run("generate.py", "--input", folder, cwd=tmp_path)
    assert shipped.startswith("No --model given: ")
    assert all(line.startswith(f"left out: {folder}/") for line in left_out) and len(left_out) > 20
    assert re.fullmatch(r"\d+ of 100 images in .*: dark on a light background, .* try --invert, with .*", light)


def test_silence_needs_no_symbols_of_libtiff(monkeypatch):
    for library in (object(), None):
        def load(_name, library=library):
            if library is None:
                raise OSError("not a library")
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        image_file.silence_pillow()
