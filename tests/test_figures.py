"""figures.py as a user runs it, its pictures opened again."""

import io

import numpy as np
import pytest
from helpers import events, import_script, run_script, snapshot
from PIL import Image

NAMES = {"digits-by-epoch.png", "digits-by-epoch.gif", "losses.png", "code-use.png"}


@pytest.fixture(scope="module")
def drawn(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("drawn")
    logs = trained / "logs" / "run"
    done = run_script("figures.py", "--run", logs, "--published", logs, "--ours", logs, "--folder", "new/pictures",
                      cwd=folder)
    assert done.returncode == 0, done.stderr
    assert {line.removeprefix("new/pictures/") for line in done.stdout.splitlines()} == NAMES
    assert {path.name for path in (folder / "new" / "pictures").iterdir()} == NAMES
    return folder / "new" / "pictures"


def logged(trained):
    """The grids of digits in the event file: originals, then reconstructions after 0, 1 and 2 epochs."""
    run = events(trained / "logs" / "run")
    return [np.array(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
            for tag in ("images/original", "images/reconstruction") for event in run.Images(tag)]


def test_still_picture_shows_the_logged_digits_epoch_by_epoch(trained, drawn):
    picture = np.array(Image.open(drawn / "digits-by-epoch.png").convert("L"))
    parts = logged(trained)
    width = parts[0].shape[1]
    assert picture.shape == (4 * 60, 64 + width)
    for i, part in enumerate(parts):
        assert np.array_equal(picture[60 * i:60 * i + 60, 64:], part[1:61])
        assert (picture[60 * i:60 * i + 60, :64] < 128).any()                       # its name


def test_moving_picture_has_a_frame_for_each_epoch(trained, drawn):
    original, *epochs = logged(trained)
    with Image.open(drawn / "digits-by-epoch.gif") as moving:
        assert moving.n_frames == len(epochs) == 3 and moving.info["loop"] == 0
        for i, epoch in enumerate(epochs):
            moving.seek(i)
            frame = np.array(moving.convert("L")).astype(int)
            assert np.abs(frame[20:, :original.shape[1]] - original).mean() < 2     # a GIF has 256 colours
            assert np.abs(frame[20:, -original.shape[1]:] - epoch).mean() < 2


def test_curves_are_drawn_from_the_logged_values(trained):
    script = import_script("figures.py")
    run = events(trained / "logs" / "run")
    figure = script.draw_losses(run)
    train, test = figure.axes[0].lines
    assert train.get_ydata().tolist() == [event.value for event in run.Scalars("loss/train/reconstruction")]
    assert test.get_ydata().tolist() == [event.value for event in run.Scalars("loss/test/reconstruction")]
    assert train.get_xdata()[-1] == test.get_xdata()[-1] == 2
    by_epoch, by_code = script.draw_code_use(run, run).axes
    assert by_epoch.lines[0].get_ydata().tolist() == [event.value for event in run.Scalars("codebook/used")]
    shares = by_code.lines[0].get_ydata()
    assert shares.sum() == pytest.approx(100) and (np.diff(shares) <= 0).all()


def test_logs_that_are_not_there_are_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    logs = str(trained / "logs" / "run")
    before = snapshot(tmp_path)
    for flag, path in (("--run", "missing"), ("--published", "empty"), ("--ours", "missing")):
        arguments = ["--run", logs, "--published", logs, "--ours", logs, flag, path]
        with pytest.raises(SystemExit) as stopped:
            import_script("figures.py").main(arguments)
        said = capsys.readouterr()
        assert stopped.value.code == 2 and f"{flag} {path}" in said.err and said.err.count("\n") == 1
    assert snapshot(tmp_path) == before
