"""docs/figures.py from the command line, with its pictures read back."""

import io
import json
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, bundled_digits, events, expect_usage_error, import_script, run_script, snapshot
from PIL import Image, ImageDraw, ImageFont
from torch.utils.tensorboard import SummaryWriter

import checkpoint

PICTURES = ROOT / "readme_images"
NAMES = {"codes.png", "samples.png", "digits-by-epoch.png", "digits-by-epoch.gif", "losses.png", "code-use.png",
         "quantizers.png"}


@pytest.fixture(scope="module")
def pictures(trained, tmp_path_factory):
    """A folder with the pictures of the pretrained model and of the trained run. Read-only."""
    folder = tmp_path_factory.mktemp("pictures")
    logs = trained / "logs" / "run"
    result = run_script("docs/figures.py", "--run", logs, "--published", logs, "--ours", logs, "--folder",
                        "new/pictures", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert {line.removeprefix("new/pictures/") for line in result.stdout.splitlines()} == NAMES
    assert {path.name for path in (folder / "new" / "pictures").iterdir()} == NAMES
    return folder / "new" / "pictures"


def read_grey(path):
    return np.array(Image.open(path).convert("L")).astype(int)


def half_size(pixels):
    """An image at half its size. Its pixels must be in equal blocks of 2×2."""
    small = pixels[::2, ::2]
    assert np.array_equal(pixels, small.repeat(2, axis=0).repeat(2, axis=1))
    return small


# ---------------------------------------------------------------- the pretrained model

def digits_in_codes_picture(path):
    """The three rows of codes.png: (3, 4, 280, 280, 3), RGB, at ten times the size of the digits."""
    pixels = np.array(Image.open(path).convert("RGB")).astype(int)
    assert pixels.shape == (3 * 320 + 20, 4 * 300 + 20, 3)
    assert all((pixels[320 * i:320 * i + 40] < 128).any() for i in range(3))            # the caption
    return np.array([[pixels[320 * i + 40:320 * i + 320, 300 * j + 20:300 * j + 300] for j in range(4)]
                     for i in range(3)])


def test_codes_picture_shows_test_digits_and_their_reconstructions(pictures):
    digits = bundled_digits()[0][9000:][[5, 4, 9, 1]]
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    with torch.no_grad():
        reconstructions = model(torch.from_numpy(digits).unsqueeze(1) / 127.5 - 1).reconstruction
    for path in (pictures / "codes.png", PICTURES / "codes.png"):
        originals, _, decoded = digits_in_codes_picture(path)[:, :, 5::10, 5::10]
        assert np.array_equal(originals, np.stack([digits] * 3, axis=-1))
        assert np.abs((reconstructions[:, 0].numpy() + 1) * 127.5 - decoded[..., 0]).max() <= 1


def test_codes_picture_shows_the_patch_of_each_code(pictures):
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    with torch.no_grad():
        indices = model.encode(torch.from_numpy(bundled_digits()[0][9000:][[5, 4, 9, 1]]).unsqueeze(1) / 127.5 - 1)
        patches = torch.cat([model.decode(torch.full((1, 7, 7), k))[:, 0, 12:16, 12:16] for k in indices.flatten()])
    patches = ((patches + 1) * 127.5).view(4, 7, 7, 4, 4).numpy()
    for path in (pictures / "codes.png", PICTURES / "codes.png"):
        cells = digits_in_codes_picture(path)[1].reshape(4, 7, 40, 7, 40, 3).swapaxes(2, 3)
        for row in (0, 3):              # the number covers the other two
            assert np.abs(cells[..., 10 * row + 5, 5::10, 0] - patches[..., row, :]).max() <= 1


def test_codes_picture_numbers_are_the_code_indices(pictures):
    """Numbers are recognised by the most similar of all numbers drawn in the same font."""
    script = import_script("docs/figures.py")
    templates = []
    for k in range(512):
        cell = Image.new("L", (40, 40))
        ImageDraw.Draw(cell).text((20, 20), str(k), fill="white", anchor="mm",
                                  font=ImageFont.truetype(script.FONT, script.NUMBER_SIZE))
        templates.append(np.array(cell) > 100)
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    indices = model.encode(torch.from_numpy(bundled_digits()[0][9000:][[5, 4, 9, 1]]).unsqueeze(1) / 127.5 - 1)
    for path in (pictures / "codes.png", PICTURES / "codes.png"):
        cells = digits_in_codes_picture(path)[1].reshape(4, 7, 40, 7, 40, 3).swapaxes(2, 3).reshape(-1, 40, 40, 3)
        yellow = cells[..., 0] - cells[..., 2] > 100
        num_different_pixels = [np.logical_xor(cell, templates).sum(axis=(1, 2)) for cell in yellow]
        assert np.array_equal(np.argmin(num_different_pixels, axis=1), indices.flatten())


def test_samples_picture_matches_generate_with_row_labels(pictures, tmp_path):
    result = run_script("generate.py", "--input", "prior", cwd=tmp_path)
    grid, pixels = read_grey(tmp_path / result.stdout.strip()), read_grey(pictures / "samples.png")
    assert pixels.shape == (60 + 604, 60 + 604)
    assert np.array_equal(half_size(pixels[60:, 60:]), grid)
    labels = [pixels[60 * i:60 * i + 60, :60] for i in range(11)]
    assert labels[0].min() == 255 and all((image < 128).any() for image in labels[1:])
    assert len({image.tobytes() for image in labels}) == 11
    assert (pixels[:60, 60:] < 128).any()                                               # the caption


# ---------------------------------------------------------------- digits by epoch

def logged_grids(trained):
    """The grids of digits in the event file: originals, reconstructions after 0, 1 and 2 epochs."""
    run = events(trained / "logs" / "run")
    return [np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
            for tag in ("images/original", "images/reconstruction") for event in run.Images(tag)]


def test_png_shows_the_logged_digits_by_epoch(trained, pictures):
    pixels, grids = read_grey(pictures / "digits-by-epoch.png"), logged_grids(trained)
    margin = pixels.shape[1] - 2 * grids[0].shape[1]
    assert len(grids) == 4 and pixels.shape[0] == 4 * 128 - 8 and margin > 100
    for i, grid in enumerate(grids):
        assert np.array_equal(half_size(pixels[128 * i:128 * i + 120, margin:]), grid[1:61])
        assert (pixels[128 * i:128 * i + 120, :margin] < 128).any()                     # its label
    assert all(pixels[128 * i - 8:128 * i].min() == 255 for i in range(1, 4))


def test_gif_has_one_frame_per_visibly_different_epoch(trained, pictures):
    original, *epochs = logged_grids(trained)
    height, width = 2 * original.shape[0], 2 * original.shape[1]
    with Image.open(pictures / "digits-by-epoch.gif") as gif:
        assert gif.n_frames == len(epochs) == 3 and gif.info["loop"] == 0
        for i, epoch in enumerate(epochs):
            gif.seek(i)
            frame = np.array(gif.convert("L")).astype(int)
            assert np.array_equal(half_size(frame[-height:, :width]), original)
            assert np.array_equal(half_size(frame[-height:, -width:]), epoch)
            assert (frame[:-height, :width] < 128).any() and (frame[:-height, -width:] < 128).any()


def test_committed_gif_shows_the_recommended_run():
    run = events(ROOT / "logs_VQ-VAE" / "recommended")
    grids = [np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L")).astype(int)
             for event in run.Images("images/reconstruction")]
    expected = grids[:1]
    for grid in grids[1:-1]:
        if np.abs(grid - expected[-1]).mean() >= 3:
            expected.append(grid)
    expected.append(grids[-1])
    with Image.open(PICTURES / "digits-by-epoch.gif") as gif:
        assert 2 < gif.n_frames == len(expected) < len(grids)
        for i, grid in enumerate(expected):
            gif.seek(i)
            assert np.array_equal(np.array(gif.convert("L"))[-484::2, -484::2], grid)


def test_first_and_last_frames_are_kept_and_others_must_differ():
    def names(*greys):
        images = {epoch: Image.new("L", (4, 4), grey) for epoch, grey in enumerate(greys)}
        return list(import_script("docs/figures.py").visibly_different(images))

    assert names(7) == [0] and names(7, 7) == [0, 1] and names(7, 7, 7) == [0, 2]
    assert names(10, 12, 13, 15, 14, 100) == [0, 2, 5]          # compared with the last frame that was kept
    assert names(200, 0, 0, 255, 255) == [0, 1, 3, 4]


def test_colour_images_stay_in_colour(tmp_path):
    colours = np.random.default_rng(0).random((3, 30, 242))
    with SummaryWriter(tmp_path) as writer:
        writer.add_image("images/original", colours, 0)
        writer.add_image("images/reconstruction", colours[:1], 0)
    script, run = import_script("docs/figures.py"), events(tmp_path)
    assert script.read_images(run, "images/original")[0].mode == "RGB"
    assert script.read_images(run, "images/reconstruction")[0].mode == "L"
    frame, = script.digits_as_frames(run)
    assert np.array_equal(np.array(frame)[-60::2, :484:2], (colours * 255).astype(np.uint8).transpose(1, 2, 0))


# ---------------------------------------------------------------- curves

def write_logs(folder, steps, epochs, used, K=4):
    """Write logs of a run with one digit and made-up values: ten steps of 30 images per epoch, more after the last."""
    with SummaryWriter(folder) as writer:
        writer.add_image("images/original", np.zeros((1, 30, 242)), 0)
        for step in range(1, steps + 1):
            for name in ("total", "reconstruction", "codebook"):
                writer.add_scalar(f"loss/train/{name}", 1 / step, 30 * step)
            epoch, rest = divmod(step, 10)
            if rest == 0 and epoch <= epochs:
                for name in ("total", "reconstruction", "codebook"):
                    writer.add_scalar(f"loss/test/{name}", 2 / epoch, 300 * epoch)
                writer.add_scalar("codebook/used", used, epoch)
                writer.add_embedding(np.zeros((K, 2)), list(enumerate([1, 10 - used, used - 1, 0])), tag="codebook",
                                     global_step=epoch, metadata_header=["code", "used"])
    return events(folder)


def test_loss_curves_match_the_logged_values(tmp_path):
    run = write_logs(tmp_path, 29, 2, used=3)                   # interrupted in its third epoch
    panels = import_script("docs/figures.py").draw_losses(run).axes
    for panel, title in zip(panels, ("Reconstruction loss", "Codebook loss")):
        train, test = panel.lines
        assert train.get_xdata() == pytest.approx(np.arange(1, 30) / 10)
        assert train.get_ydata() == pytest.approx(1 / np.arange(1, 30))
        assert test.get_xdata().tolist() == [1, 2] and test.get_ydata().tolist() == [2, 1]
        assert panel.get_title().startswith(title) and panel.get_xlabel() == "epoch" and panel.get_ylabel()
        assert [text.get_text() for text in panel.get_legend().get_texts()] == ["training", "test"]
    assert "MSE on [−1, 1]" in panels[0].get_title() and "commitment loss" in panels[1].get_title()


def test_code_use_curves_match_the_logged_counts(tmp_path):
    first, second = write_logs(tmp_path / "first", 20, 2, used=3), write_logs(tmp_path / "second", 20, 2, used=10)
    by_epoch, *by_code = import_script("docs/figures.py").draw_code_use(first, second).axes
    assert [line.get_ydata().tolist() for line in by_epoch.lines] == [[3, 3], [10, 10]]
    assert [line.get_label() for line in by_epoch.lines] == ["published", "this repository"]
    for panel, counts, dead, labels in ((by_code[0], [7, 2, 1], [4], ["3 codes used", "1 dead code"]),
                                        (by_code[1], [9, 1], [3, 4], ["2 codes used", "2 dead codes"])):
        used_line, dead_line = panel.lines
        assert used_line.get_ydata().tolist() == counts
        assert dead_line.get_xdata().tolist() == dead and not dead_line.get_ydata().any()
        assert [line.get_label() for line in panel.lines] == labels
        assert used_line.get_color() != dead_line.get_color()
        low, high = panel.get_ylim()
        assert low < 0 and high > 9                             # zero is inside the axes


def test_dead_code_counts_match_the_committed_runs():
    script, runs = import_script("docs/figures.py"), [events(ROOT / "logs_VQ-VAE" / name)
                                                      for name in ("published", "defaults")]
    for panel, run in zip(script.draw_code_use(*runs).axes[1:], runs):
        used = int(run.Scalars("codebook/used")[-1].value)      # logged separately from the projector's table
        used_label, dead_label = (line.get_label() for line in panel.lines)
        assert used_label == f"{used} codes used" and dead_label.startswith(f"{512 - used} dead code")


def test_quantizers_are_drawn_where_their_figures_are():
    script = import_script("docs/figures.py")
    figures = script.read_quantizers(ROOT / script.QUANTIZERS)
    panel, = script.draw_quantizers(figures).axes
    drawn = {tuple(line.get_data()[i].item() for i in (0, 1)) for line in panel.lines if line.get_marker() == "o"}
    seeds = json.loads((ROOT / script.QUANTIZERS).read_text())["runs"][0]["output"]["seeds"]
    means = [[of["0"]["nats_per_map"], sum(seed["mse"] for seed in of.values()) / 3] for of in seeds.values()]
    assert sorted(drawn) == [pytest.approx(mean) for mean in sorted(map(tuple, means))] and len(drawn) == 11
    assert [text.get_text() for text in panel.texts] == list(figures) and panel.get_yscale() == "log"


# ---------------------------------------------------------------- the script

def test_default_logs_are_independent_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = import_script("docs/figures.py").get_parser().parse_args([])
    assert [path.relative_to(ROOT / "logs_VQ-VAE").name for path in (args.run, args.published, args.ours)] == [
        "recommended", "published", "defaults"]
    assert all(path.is_dir() for path in (args.run, args.published, args.ours))
    assert str(args.folder) == "readme_images"


def test_missing_logs_error_names_the_flag(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    logs = str(trained / "logs" / "run")
    with SummaryWriter("young") as writer:                      # a run in its first epoch
        writer.add_image("images/reconstruction", np.zeros((1, 30, 242)), 0)
    before = snapshot(tmp_path)
    for flag, path in (("--run", "missing"), ("--published", "empty"), ("--ours", "young"), ("--run", "young")):
        arguments = ["--run", logs, "--published", logs, "--ours", logs, flag, path]
        with pytest.raises(SystemExit) as excinfo:
            import_script("docs/figures.py").main(arguments)
        captured = capsys.readouterr()
        assert excinfo.value.code == 2 and f"{flag} {path}" in captured.err and captured.err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_file_without_figures_of_quantizers_gets_one_line(tmp_path, capsys):
    (tmp_path / "of-another-row.json").write_text('{"figures": {"mse": {"mean": 1, "std": null, "n": 1}}}')
    (tmp_path / "no-record.json").write_text("[]")
    for name in ("missing.json", "of-another-row.json", "no-record.json"):
        with pytest.raises(SystemExit) as excinfo:
            import_script("docs/figures.py").main(["--quantizers", str(tmp_path / name), "--folder", str(tmp_path)])
        line = capsys.readouterr().err
        assert excinfo.value.code == 2 and f"--quantizers {tmp_path / name}" in line and line.count("\n") == 1


def test_unwritable_folder_error_names_the_flag(trained, tmp_path, capsys):
    (tmp_path / "file").touch()
    logs = str(trained / "logs" / "run")
    with pytest.raises(SystemExit):
        import_script("docs/figures.py").main(["--run", logs, "--published", logs, "--ours", logs,
                                               "--folder", str(tmp_path / "file")])
    line = capsys.readouterr().err
    assert f"--folder {tmp_path / 'file'}" in line and line.count("\n") == 1


def test_only_pictures_are_replaced_and_only_with_overwrite(trained, pictures, tmp_path, capsys):
    shutil.copytree(pictures, tmp_path / "pictures")
    before, logs = snapshot(tmp_path), str(trained / "logs" / "run")
    words = ["--run", logs, "--published", logs, "--ours", logs, "--folder", str(tmp_path / "pictures")]
    assert "codes.png: exists, replace it with --overwrite" in expect_usage_error("docs/figures.py", words, capsys)
    assert snapshot(tmp_path) == before
    (tmp_path / "pictures" / "losses.png").write_text("mine")
    line = expect_usage_error("docs/figures.py", [*words, "--overwrite"], capsys)
    assert "losses.png: exists and is not a picture" in line
    assert (tmp_path / "pictures" / "losses.png").read_text() == "mine"
    (tmp_path / "pictures" / "losses.png").unlink()
    (tmp_path / "pictures" / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n, half of one")
    import_script("docs/figures.py").main([*words, "--overwrite"])
    assert snapshot(tmp_path) == before


def test_committed_pictures_are_small_and_wide_enough():
    for name in NAMES:
        path = PICTURES / name
        assert path.stat().st_size < (400_000 if name.endswith(".gif") else 200_000), name
        assert Image.open(path).width >= 600, name
