"""figures.py as a user runs it, its pictures opened again."""

import io

import numpy as np
import pytest
from helpers import events, import_script, run_script, snapshot
from PIL import Image
from torch.utils.tensorboard import SummaryWriter

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


def write_logs(folder, steps, epochs, used, K=4):
    """A run's logs with one digit and made-up figures: ten steps an epoch, some more after the last."""
    with SummaryWriter(folder) as writer:
        writer.add_image("images/original", np.zeros((1, 30, 242)), 0)
        for step in range(1, steps + 1):
            for name in ("total", "reconstruction", "codebook"):
                writer.add_scalar(f"loss/train/{name}", 1 / step, step)
            epoch, rest = divmod(step, 10)
            if rest == 0 and epoch <= epochs:
                for name in ("total", "reconstruction", "codebook"):
                    writer.add_scalar(f"loss/test/{name}", 2 / epoch, epoch)
                writer.add_scalar("codebook/used", used, epoch)
                writer.add_histogram_raw("codebook/use", 0, K - 1, 10, 10, 10, np.arange(K) + 0.5,
                                         [1, 10 - used, used - 1, 0], epoch)
    return events(folder)


def test_curves_are_drawn_from_the_logged_values(tmp_path):
    script = import_script("figures.py")
    one, other = write_logs(tmp_path / "one", 29, 2, used=3), write_logs(tmp_path / "other", 20, 2, used=7)
    train, test = script.draw_losses(one).axes[0].lines            # broken off in its third epoch
    assert train.get_xdata() == pytest.approx(np.arange(1, 30) / 10)
    assert train.get_ydata() == pytest.approx(1 / np.arange(1, 30))
    assert test.get_xdata().tolist() == [1, 2] and test.get_ydata().tolist() == [2, 1]

    by_epoch, by_code = script.draw_code_use(one, other).axes
    assert [line.get_ydata().tolist() for line in by_epoch.lines] == [[3, 3], [7, 7]]
    assert [line.get_label().split()[0] for line in by_epoch.lines] == ["uniform,", "K-means"]
    assert [line.get_ydata().tolist() for line in by_code.lines] == [[70, 20, 10, 0], [60, 30, 10, 0]]


def test_logs_that_are_not_there_are_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    logs = str(trained / "logs" / "run")
    with SummaryWriter("young") as writer:                      # a run in its first epoch
        writer.add_image("images/reconstruction", np.zeros((1, 30, 242)), 0)
    before = snapshot(tmp_path)
    for flag, path in (("--run", "missing"), ("--published", "empty"), ("--ours", "young"), ("--run", "young")):
        arguments = ["--run", logs, "--published", logs, "--ours", logs, flag, path]
        with pytest.raises(SystemExit) as stopped:
            import_script("figures.py").main(arguments)
        said = capsys.readouterr()
        assert stopped.value.code == 2 and f"{flag} {path}" in said.err and said.err.count("\n") == 1
    assert snapshot(tmp_path) == before
