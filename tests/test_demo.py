"""demo.py without a browser: its pictures against independent computations, its answers, odd input."""

import base64
import io
import itertools
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
from urllib.request import urlopen

import numpy as np
import pytest
import torch
from helpers import ROOT, expect_usage_error, import_script, restore_sigint, run_command
from PIL import Image

import checkpoint
import data
from modules import VectorQuantizedVAE
from prior import CodePrior
from utils import code_pictures, demo_session
from utils.demo_session import ANY, Demo

SEVEN = [[[10, 20], [60, 20]], [[60, 20], [30, 90]]]
OTHER_MODELS = {"colour 64×64": (3, 64, 512, {}), "5,000 codes": (1, 16, 5000, {}), "grey 32×32": (1, 32, 8, {}),
                "fsq": (1, 28, 512, {"quantizer": "fsq"}), "downsample 8": (3, 64, 64, {"downsample": 8})}


@pytest.fixture(scope="module")
def demo():
    """A Demo of the shipped model and prior."""
    model, contents = checkpoint.load_model(checkpoint.PRETRAINED)
    prior, _ = checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, (model, contents))
    return Demo(model, contents, prior, data.DIGITS)


def other_demo(name, with_prior=False):
    """A Demo of an untrained model of other sizes."""
    channels, side, num_codes, settings = OTHER_MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VectorQuantizedVAE(channels, 8, num_codes, **settings).eval()
        prior = CodePrior(num_codes, *model.map_size(side, side), 3, 1, 8, 1).eval() if with_prior else None
    contents = {"path": "models/x/best.pt", "dataset": {"name": "folder", "shape": [channels, side, side]}}
    return Demo(model, contents, prior, ["a", "b", "<c>"] if with_prior else ())


def sheet(page):
    """The picture that the tiles of some HTML share, as an array (H, W) or (H, W, 3)."""
    encoded, = set(re.findall(r"--patches:url\(data:image/png;base64,([^)]+)\)", page))
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))


def pictures(page):
    return [np.array(Image.open(io.BytesIO(base64.b64decode(encoded))))
            for encoded in re.findall(r'<img src="data:image/png;base64,([^"]+)"', page)]


def numbers(page):
    return [int(text) for text in re.findall(r"<b>(\d+)</b>", page)]


# ---------------------------------------------------------------- patches and tiles

def test_patch_is_the_middle_of_a_map_of_its_code(demo):
    codes = torch.tensor([[3, 500], [3, 7]])
    patches = code_pictures.code_patches(demo.model, codes, 7, 7)
    assert patches.shape == (2, 2, 1, 4, 4)
    with torch.no_grad():
        for patch, code in zip(patches.flatten(0, 1), codes.flatten()):
            expected = demo.model.decode(torch.full((1, 7, 7), int(code)))[0, :, 12:16, 12:16]
            assert torch.allclose(patch, expected, atol=1e-5)


@pytest.mark.parametrize("downsample", [4, 16])
def test_few_codes_are_enough_for_the_patch_of_a_large_map(downsample):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VectorQuantizedVAE(3, 8, 4, downsample=downsample, codebook_init="uniform").eval()
    p = downsample
    with torch.no_grad():
        expected = model.decode(torch.full((1, 20, 20), 2))[0, :, 10 * p:11 * p, 10 * p:11 * p]
    assert torch.allclose(code_pictures.code_patches(model, torch.tensor([2]), 20, 20)[0], expected, atol=1e-5)


def test_each_tile_shows_the_patch_of_its_number(demo):
    codes = [5, 5, 17, None, 300, 4, 9]
    patches = demo._patches([0 if code is None else code for code in codes])
    page = code_pictures.tiles(codes, patches, 3, "map", [f"code <{code}>" for code in codes], attribute="place")
    pixels = sheet(page)
    assert pixels.shape == (12, 12)             # three rows of three, of 4×4 pixels
    pattern = r'<button class="([^"]*)" type="button" data-place="(\d)".*?position:([\d.]+)% ([\d.]+)%">'
    found = re.findall(pattern, page)
    assert len(found) == len(codes) and "<5>" not in page and "code &lt;5&gt;" in page
    for i, (classes, place, x, y) in enumerate(found):
        top, left = round(float(y) / 100 * 8), round(float(x) / 100 * 8)
        assert int(place) == i and np.array_equal(pixels[top:top + 4, left:left + 4], patches[i, 0].numpy())
        assert ("empty" in classes) == (codes[i] is None)
    assert numbers(page) == [code for code in codes if code is not None]


# ---------------------------------------------------------------- drawings

def rasterise(strokes, side=28, fine=20):
    """The same drawing by another way: the distance of every point of a fine grid to every segment."""
    points = np.concatenate([np.array(stroke, dtype=float) for stroke in strokes])
    scale = (20 - code_pictures.PEN) / np.ptp(points, axis=0).max()
    y, x = (np.mgrid[:side * fine * 2, :side * fine * 2] + 0.5) / fine - side / 2         # twice as large, to be cut
    ink = np.zeros(x.shape, dtype=bool)
    for stroke in strokes:
        scaled = (np.array(stroke, dtype=float) - points.mean(axis=0)) * scale + side / 2
        for start, end in itertools.pairwise(scaled):
            along = ((x - start[0]) * (end - start)[0] + (y - start[1]) * (end - start)[1]) / ((end - start)**2).sum()
            nearest = start[:, None, None] + along.clip(0, 1) * (end - start)[:, None, None]
            ink |= np.hypot(x - nearest[0], y - nearest[1]) < code_pictures.PEN / 2
    dy, dx = (round((where.mean() + 0.5) - side * fine) for where in np.nonzero(ink))
    half = side * fine // 2
    cut = np.roll(ink, (-dy, -dx), axis=(0, 1))[half:half + side * fine, half:half + side * fine]
    return cut.reshape(side, fine, side, fine).mean(axis=(1, 3)) * 255


def test_drawing_is_scaled_and_centred_as_mnist():
    drawn = code_pictures.draw_strokes(SEVEN, 28, 28)
    assert drawn.shape == (1, 28, 28) and drawn.dtype == torch.uint8
    pixels, expected = drawn[0].numpy().astype(float), rasterise(SEVEN)
    assert np.abs(pixels - expected).mean() < 3 and np.abs(pixels - expected).max() < 70
    rows, columns = np.flatnonzero(pixels.any(axis=1)), np.flatnonzero(pixels.any(axis=0))
    assert 20 <= np.ptp(rows) + 1 <= 21 and np.ptp(columns) + 1 < 18       # 20 pixels, perhaps across 21
    centre = [(pixels.sum(axis=axis) * (np.arange(28) + 0.5)).sum() / pixels.sum() for axis in (0, 1)]
    assert np.abs(np.array(centre) - 14).max() < 0.1


@pytest.mark.parametrize(("scale", "dx", "dy"), [(0.01, 0, 0), (3, -500, 70), (0.2, 0.5, 0.9)])
def test_size_and_place_on_the_pad_do_not_count(scale, dx, dy):
    moved = [[[x * scale + dx, y * scale + dy] for x, y in stroke] for stroke in SEVEN]
    one, other = (code_pictures.draw_strokes(strokes, 28, 28).int() for strokes in (SEVEN, moved))
    assert (one - other).abs().float().mean() < 1


def test_drawings_are_as_bold_as_mnist_and_fit_other_sizes():
    images = data.load("MNIST-10k", "")[1].images
    ones = (images.float().flatten(1).mean(dim=1)).median()         # of all digits
    assert 0.6 < code_pictures.draw_strokes(SEVEN, 28, 28).float().mean() / ones < 1.3
    assert code_pictures.draw_strokes(SEVEN, 64, 48).shape == (1, 64, 48)
    dot = code_pictures.draw_strokes([[[5, 5]]], 28, 28)
    assert dot[0, 13:15, 13:15].min() > 200 and dot.count_nonzero() < 25


@pytest.mark.parametrize("strokes", [[], [[]], None, "drawing", 3, [[1]], [[[1, 2, 3]]], [[[1, "x"]]], [[[None, 1]]],
                                     [[[math.nan, 1]]], [[[1e9, 1]]], {"a": 1}, [[[0.5, 0.5]] * 20_001]])
def test_what_is_no_drawing_is_a_sentence(strokes, demo):
    with pytest.raises(ValueError, match="draw"):
        demo.draw(strokes)


# ---------------------------------------------------------------- palette and favourites

@pytest.mark.parametrize("name", ["shipped", "fsq", "5,000 codes"])
def test_palette_is_sorted_by_distance(name, demo):
    shown = demo if name == "shipped" else other_demo(name)
    quantizer = shown.model.quantizer
    with torch.no_grad():
        codebook = np.concatenate([quantizer.lookup(torch.tensor([[[k]]])).double().numpy().reshape(1, -1)
                                   for k in range(quantizer.num_codes)])
    for code in (0, 123):
        found = code_pictures.similar_codes(shown.model, code, 200).numpy()
        distances = np.sqrt(((codebook - codebook[code])**2).sum(axis=1))
        assert found[0] == code and len(set(found)) == 200
        assert np.all(np.diff(distances[found]) > -1e-4)
        assert distances[found].max() <= np.sort(distances)[199] + 1e-4


@pytest.mark.parametrize("label", [None, 3])
def test_favourites_are_the_priors_most_probable_codes(label, demo):
    codes, place = demo.start().codes, 17
    best, chances = code_pictures.favourites(demo.prior, codes, place, label)
    labels = torch.tensor([10 if label is None else label])
    with torch.no_grad():
        logits = demo.prior(codes.unsqueeze(0), labels)[0, place].double().numpy()
    expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    assert best == np.argsort(-expected)[:5].tolist() and np.allclose(chances, expected[best], atol=1e-5)
    later = codes.clone()
    later.view(-1)[place:] = 0                  # the codes from this place on do not count
    assert code_pictures.favourites(demo.prior, later, place, label)[0] == best


def test_palette_shows_use_and_marks_favourites(demo):
    session = demo.choose_place(demo.start(), 24)
    page = demo.show_palette(session, 3)
    best, palette = page.split('<div class="tiles palette"')
    favourites, _ = code_pictures.favourites(demo.prior, session.codes, 24, 3)
    assert numbers(best)[-5:] == favourites and "class 3" in best
    assert numbers(palette) == code_pictures.similar_codes(demo.model, int(session.codes.view(-1)[24]), 512).tolist()
    marked = re.findall(r'class="tile marked" type="button" data-code="(\d+)"', palette)
    assert sorted(map(int, marked)) == sorted(favourites)
    with torch.no_grad():
        maps = demo.model.encode(data.to_model_range(data.load("MNIST-10k", "")[1].images))
        used = maps.flatten().bincount(minlength=512)
    uses = [int(text.replace(",", "")) for text in re.findall(r"<small>([\d,]+)×</small>", palette)]
    assert sum(uses) == 49_000 and np.abs(used[numbers(palette)].numpy() - uses).max() <= 2        # batches round


# ---------------------------------------------------------------- what a visitor does

def test_codes_are_changed_undone_and_reset(demo):
    first = demo.start()
    with pytest.raises(ValueError, match="choose a place"):
        demo.choose_code(first, 3)
    with pytest.raises(ValueError, match="nothing to undo"):
        demo.undo(first)
    second = demo.choose_code(demo.choose_place(first, 24), 77)
    third = demo.choose_code(demo.choose_place(second, 3), 5)
    expected = first.codes.clone()
    expected[3, 3], expected[0, 3] = 77, 5
    assert torch.equal(third.changed, expected) and torch.equal(first.changed, first.codes)
    before, after = pictures(demo.show_changed_picture(third))
    with torch.no_grad():
        for picture, codes in ((before, first.codes), (after, expected)):
            assert np.array_equal(picture, data.to_uint8(demo.model.decode(codes[None]))[0, 0].numpy())
    assert "2 of 49 codes changed" in demo.show_changed_map(third)
    assert numbers(demo.show_changed_map(third)) == expected.flatten().tolist()
    assert torch.equal(demo.undo(third).changed, second.changed)
    assert torch.equal(demo.undo(demo.undo(third)).changed, first.codes)
    assert torch.equal(demo.reset(third).changed, first.codes) and not demo.reset(third).history


def test_guidance_without_a_class_is_a_sentence(demo):
    for guidance in (0, 2):
        with pytest.raises(ValueError, match="guidance is towards a class: choose one"):
            next(demo.sample(ANY, 1, 512, guidance, 0))
    assert next(demo.sample(ANY, 1, 512, 1, 0)) and next(demo.sample(0, 1, 512, 2, 0))


def test_bundled_digits_are_offered_to_models_of_digits_only_which_say_whether_they_have_seen_them(demo):
    assert "MNIST, whose training set has the same digits: it has seen" in demo.digits_note
    model, contents = checkpoint.load_model(checkpoint.PRETRAINED)
    for name, has_digits in (("MNIST-10k", True), ("EMNIST-letters", True), ("FashionMNIST", False), ("folder", False)):
        other = Demo(model, contents | {"dataset": contents["dataset"] | {"name": name}})
        assert (other.digits is not None) == (other.counts is not None) == has_digits, name
        assert bool(other.digits_note) == name.startswith("EMNIST")
        assert other.start().codes.shape == (7, 7)


@pytest.mark.parametrize("value", [None, "x", math.nan, []])
def test_sampling_values_of_no_browser_are_a_sentence(value, demo):
    for values in ((value, 5, 1), (1, value, 1), (1, 5, value)):
        with pytest.raises(ValueError, match="is not a "):
            next(demo.sample(3, *values, 0))


@pytest.mark.parametrize("value", [None, "x", 49, -1, 2.5, math.nan, math.inf, [], {}, "9" * 500])
def test_values_of_no_browser_are_a_sentence(value, demo):
    session = demo.start()
    for answer in (lambda: demo.choose_place(session, value), lambda: demo.complete(session, value, ANY, 0),
                   lambda: demo.show_kept(session, value),
                   lambda: demo.complete(session, 3, "3" if value == ANY else value, value)):
        with pytest.raises(ValueError, match="give an integer"):
            answer()


def test_picture_shows_reconstruction_and_error(demo):
    session = demo.bundled_digit(12)
    page = demo.show_picture(session)
    x = data.to_model_range(data.load("MNIST-10k", "")[1].images[12:13])
    with torch.no_grad():
        output = demo.model(x)
    original, reconstruction = pictures(page)
    assert np.array_equal(original, demo.digits[12, 0].numpy())
    assert np.abs(reconstruction - (output.reconstruction[0, 0].numpy() + 1) * 127.5).max() <= 1
    assert numbers(page) == output.indices.flatten().tolist()
    assert f"{(output.reconstruction - x).square().mean():.4f}</b>" in page


def test_sample_fills_up_to_the_map_that_the_prior_samples(demo, monkeypatch):
    monkeypatch.setattr(demo_session, "FRAME_SECONDS", 0)
    frames = list(demo.sample(7, 0.9, 50, 1.5, 11))
    expected = demo.prior.sample(torch.tensor([7]), 0.9, 50, 1.5, torch.Generator().manual_seed(11))[0]
    assert [len(numbers(frame)) for frame in frames] == list(range(1, 50))
    assert all(frame.count("empty") == 49 - i for i, frame in enumerate(frames, 1))
    assert numbers(frames[-1]) == expected.flatten().tolist()
    with torch.no_grad():
        decoded = data.to_uint8(demo.model.decode(expected[None]))[0, 0].numpy()
    assert np.array_equal(pictures(frames[-1])[0], decoded)
    assert (pictures(frames[9])[0][8:] == demo_session.HIDDEN).all()


def test_completions_keep_the_rows_and_differ_below(demo):
    session = demo.draw(SEVEN)
    maps = demo.complete(session, 3, ANY, 5)
    assert maps.shape == (10, 7, 7) and (maps[:, :3] == session.codes[:3]).all()
    assert len(maps.flatten(1).unique(dim=0)) > 1
    assert torch.equal(maps, demo.complete(session, 3, ANY, 5))
    assert not torch.equal(maps, demo.complete(session, 3, 7, 5))
    assert (demo.complete(session, 7, ANY, 0) == session.codes).all()
    assert len(pictures(demo.show_kept(session, 3, maps))) == 11 and "--kept:42.86%" in demo.show_kept(session, 3)


# ---------------------------------------------------------------- pictures from files

def write_pictures(folder):
    """Odd files, {name: whether the page can read it}."""
    Image.new("L", (1, 1), 200).save(folder / "pixel.png")
    frames = [Image.new("P", (20, 30), shade) for shade in (0, 9)]
    frames[0].save(folder / "animated.gif", save_all=True, append_images=frames[1:])
    Image.new("RGBA", (50, 40), (255, 0, 0, 60)).save(folder / "alpha.png")
    Image.new("CMYK", (3000, 10)).save(folder / "wide.jpg")
    (folder / "text.png").write_text("no picture")
    (folder / "empty.jpg").touch()
    (folder / "page.pdf").write_bytes(b"%PDF-1.4\n")
    Image.new("1", (9000, 9000)).save(folder / "huge.png")
    (folder / "cut.png").write_bytes((folder / "wide.jpg").read_bytes()[:200])
    return {"pixel.png": True, "animated.gif": True, "alpha.png": True, "wide.jpg": True, "text.png": False,
            "empty.jpg": False, "page.pdf": False, "huge.png": False, "cut.png": False}


def test_odd_files_are_read_or_a_sentence(demo, tmp_path):
    for name, readable in write_pictures(tmp_path).items():
        for shown in (demo, other_demo("colour 64×64")):
            if readable:
                session = shown.read(str(tmp_path / name))
                assert session.picture.shape == shown.shape and session.picture.dtype == torch.uint8
                assert torch.equal(shown.invert(session).picture, 255 - session.picture)
            else:
                with pytest.raises(ValueError, match=name) as excinfo:
                    shown.read(str(tmp_path / name))
                assert str(tmp_path) not in str(excinfo.value) and "\n" not in str(excinfo.value)


# ---------------------------------------------------------------- other models

@pytest.mark.parametrize("with_prior", [False, True])
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_other_models_have_a_page(name, with_prior):
    shown = other_demo(name, with_prior)
    session = shown.choose_place(shown.start(), 2)
    session = shown.choose_code(session, 7)
    h, w = shown.map_size
    assert len(numbers(shown.show_picture(session))) == h * w == len(numbers(shown.show_changed_map(session)))
    assert len(pictures(shown.show_changed_picture(session))) == 2
    page = shown.show_palette(session, 2 if with_prior else ANY)
    K = shown.num_codes
    assert (f"The 200 codes of {K:,} that are most similar" if K > 1024 else f"All {K} codes") in page
    assert ("favourites here" in page) == with_prior and "<c>" not in page
    if with_prior:
        assert shown.show_kept(session, 1, shown.complete(session, 1, 0, 0)).count("<img") == 11


def test_maps_too_large_for_the_page_are_refused():
    model = VectorQuantizedVAE(1, 4, 4).eval()
    with pytest.raises(ValueError, match=r"128×128 codes are too large.*--downsample"):
        Demo(model, {"path": "x", "dataset": {"name": "folder", "shape": [1, 512, 512]}})


# ---------------------------------------------------------------- the command

def test_bad_flags_are_one_line(capsys):
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        port = server.getsockname()[1]
        line = expect_usage_error("demo.py", ["--port", port], capsys)
    assert f"--host 127.0.0.1 --port {port}: " in line and "choose another" in line
    assert "--host: 'x y' is not an address" in expect_usage_error("demo.py", ["--host", "x y"], capsys)
    assert "--port" in expect_usage_error("demo.py", ["--port", "0"], capsys)
    assert "--model nowhere.pt: " in expect_usage_error("demo.py", ["--model", "nowhere.pt", "--port", port], capsys)
    model, prior = ROOT / "pretrained" / "vqvae-cifar10.pt", ROOT / "pretrained" / "prior.pt"
    line = expect_usage_error("demo.py", ["--model", model, "--prior", prior, "--port", port], capsys)
    assert f"--prior {prior}: this prior belongs to another VQ-VAE" in line


def test_without_gradio_one_line_says_what_to_install(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ImportError('no gradio')")
    result = run_command(sys.executable, ROOT / "demo.py", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "demo.py: error: the page needs gradio: pip install -r requirements-demo.txt\n"


def test_command_serves_the_page_until_ctrl_c():
    pytest.importorskip("gradio", reason="gradio is not installed")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    process = subprocess.Popen([sys.executable, ROOT / "demo.py", "--port", str(port), "--model",
                                ROOT / "pretrained" / "vqvae-cifar10.pt"], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True, preexec_fn=restore_sigint,
                               env=os.environ | {"HTTP_PROXY": "http://127.0.0.1:9"})      # where no proxy is
    line = process.stdout.readline()
    assert line == f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it)\n", process.communicate()
    page = urlopen(f"http://127.0.0.1:{port}/").read().decode()
    assert "has no prior yet" in page and "train_prior.py --model" in page
    with pytest.raises(OSError):                # another address of this machine, as one seen from others would be
        socket.create_connection(("127.0.0.2", port), timeout=5)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=30)
    assert (process.returncode, output) == (130, "") and errors.endswith("demo.py: interrupted\n"), errors


def test_page_is_built_with_and_without_a_prior():
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    script = import_script("demo.py")
    for name, has_prior in (("vqvae.pt", True), ("vqvae-cifar10.pt", False)):
        page = script.build(ROOT / "pretrained" / name)
        assert isinstance(page, gradio.Blocks) and not page.analytics_enabled
        text = str(page.get_config_file())
        assert ("has no prior yet" in text) != has_prior and ("Draw a new one" in text) == has_prior


def test_errors_of_handlers_are_warnings_and_leave_the_page(monkeypatch):
    gradio = pytest.importorskip("gradio", reason="gradio is not installed")
    script, said = import_script("demo.py"), []
    monkeypatch.setattr(gradio, "Warning", lambda text, **_: said.append(text))

    def fail(*_):
        raise ValueError("too\x1b odd")

    answer = script.on_page(fail, "place")(gradio.EventData(None, {"place": 3}), 1)
    assert said == ["too\\x1b odd"] and answer == gradio.skip()
    assert script.on_page(lambda *values: values, "place")(gradio.EventData(None, None), 1) == (1, None)


def test_simultaneous_visitors_do_not_see_each_other(demo):
    from concurrent.futures import ThreadPoolExecutor

    def visit(number):
        session = demo.choose_place(demo.bundled_digit(number), number)
        session = demo.choose_code(session, number)
        time.sleep(0.01)
        return demo.show_changed_map(session), demo.show_changed_picture(session)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(visit, range(16)))
    assert together == [visit(number) for number in range(16)]
