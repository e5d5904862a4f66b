"""Event files that are damaged, in the wrong order, or another program's, when a run is resumed or replaced."""

import os
import re
import time

import pytest
from helpers import events
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from utils import event_files
from utils.tensorboard_logs import open_writer


def write_run(folder, steps=range(10, 60, 10), suffix=""):
    """Log a loss at these steps, as a training does."""
    with open_writer(folder, suffix) as writer:
        for step in steps:
            writer.add_scalar("loss/train/total" if not suffix else "prior/train", 1 / step, step)
    return max(folder.glob(f"events*{suffix}"), key=os.path.getmtime)


def logged_steps(folder):
    """In the order in which TensorBoard reads them."""
    return [event.step for event in events(folder).Scalars("loss/train/total")]


def first_bytes_of_records(path):
    """Where the data of each record begin."""
    start, starts = 0, []
    for record in RawEventFileLoader(str(path)).Load():
        starts.append(start + 12)
        start += len(record) + event_files.FRAME
    return starts


@pytest.mark.parametrize("where", ["data", "length", "checksum"])
def test_damaged_event_file_is_kept_aside_whole_and_said(where, tmp_path, capsys):
    path = write_run(tmp_path)
    start = first_bytes_of_records(path)[5]         # of step 40, after the version, the layout and three losses
    contents = bytearray(path.read_bytes())
    contents[start + {"data": 5, "length": -12, "checksum": -1}[where]] ^= 4
    path.write_bytes(contents)
    event_files.truncate_logs(tmp_path, position=50, evaluated=1, epoch=1)
    assert logged_steps(tmp_path) == [10, 20, 30]
    [aside] = tmp_path.glob("*.damaged.*")
    assert aside.read_bytes() == contents and "tfevents" not in aside.name
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error and "first 5 events" in error and str(aside) in error


def test_sound_record_that_is_no_event_is_damage_too(tmp_path, capsys):
    path = write_run(tmp_path)
    with open(path, "ab") as file:
        RecordWriter(file).write(b"\xff not an event")
    event_files.truncate_logs(tmp_path, position=30, evaluated=1, epoch=1)
    assert logged_steps(tmp_path) == [10, 20, 30] and len(list(tmp_path.glob("*.damaged.*"))) == 1
    assert "damaged" in capsys.readouterr().err


def test_unfinished_last_record_of_a_killed_run_is_cut_without_a_word(tmp_path, capsys):
    path = write_run(tmp_path)
    contents = path.read_bytes()
    for cut in (1, 10, 30):
        path.write_bytes(contents[:-cut])
        event_files.truncate_logs(tmp_path, position=50, evaluated=1, epoch=1)
        assert logged_steps(tmp_path) == [10, 20, 30, 40]
        [path] = tmp_path.iterdir()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("epoch_images, position, kept", [
    (300, 450, {"loss/train/total": [150, 300, 450], "lr": [150, 300, 450], "loss/test/total": [300],
                "codebook/used": [1]}),
    (1, 15, {"loss/train/total": [5, 10, 15], "lr": [5, 10, 15], "loss/test/total": [1], "codebook/used": [1]}),
], ids=["images", "steps"])
def test_what_is_logged_after_the_last_whole_epoch_goes_on_either_axis(epoch_images, position, kept, tmp_path):
    """The run was killed in its second epoch, with the third line of the training losses saved, and all logged."""
    with SummaryWriter(tmp_path) as writer:
        for line in range(1, 5):
            for tag in ("loss/train/total", "lr"):
                writer.add_scalar(tag, line, line * position // 3)
        for epoch in (1, 2):
            writer.add_scalar("loss/test/total", epoch, epoch * epoch_images)
            writer.add_scalar("codebook/used", epoch, epoch)
        writer.add_scalar("at_end/test_mse", 1, 1)
    event_files.truncate_logs(tmp_path, position, epoch_images, epoch=1)
    run = events(tmp_path)
    assert {tag: [event.step for event in run.Scalars(tag)] for tag in run.Tags()["scalars"]} == kept


def test_clock_that_was_set_back_does_not_change_the_order(tmp_path, monkeypatch):
    now = time.time()
    for start, seconds_later in ((10, 0), (20, -5000), (30, -9000), (40, -9000), (50, 3)):
        if start > 10:
            monkeypatch.setattr(time, "time", lambda moment=now + seconds_later: moment)
            event_files.truncate_logs(tmp_path, position=start - 10, evaluated=1, epoch=1)
        write_run(tmp_path, [start])
    assert logged_steps(tmp_path) == [10, 20, 30, 40, 50] and len(list(tmp_path.iterdir())) == 5


def test_no_file_takes_the_name_of_another_one(tmp_path):
    """Names that differ in the time alone, as in a container, where host and process number are always the same."""
    now = int(time.time())
    for i, moment in enumerate((now - 10, now - 3, now + 500)):
        path = write_run(tmp_path, [10 * (i + 1)])
        path.rename(tmp_path / f"events.out.tfevents.{moment}.host.1.0")
    event_files.truncate_logs(tmp_path, position=30, evaluated=1, epoch=1)
    assert logged_steps(tmp_path) == [10, 20, 30]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
def test_other_programs_files_and_pipes_stay(tmp_path, capsys):
    write_run(tmp_path)
    write_run(tmp_path, suffix=event_files.PRIOR_SUFFIX)
    write_run(tmp_path, suffix=event_files.CLASSIFIER_SUFFIX)
    others = tmp_path / "others"
    for tag in ("loss", "lr-Adam", "hp_metric"):
        with SummaryWriter(others / tag) as writer:
            writer.add_scalar(tag, 1, 1000)
        [path] = (others / tag).iterdir()
        path.rename(tmp_path / path.name.replace("tfevents.", f"tfevents.{len(tag)}"))
    os.mkfifo(tmp_path / "events.out.tfevents.1.pipe.0")
    (tmp_path / "events.out.tfevents.1.empty.0").write_bytes(b"")
    kept = {path for path in tmp_path.iterdir() if re.search(r"tfevents\.(4|7|9)\d{10}|tfevents\.1\.", path.name)}
    contents = {path: path.read_bytes() for path in kept if path.is_file()}
    assert len(kept) == 5
    event_files.truncate_logs(tmp_path, position=20, evaluated=1, epoch=1)
    assert len(list(tmp_path.glob("events*"))) == 8
    event_files.remove_logs(tmp_path)
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "events.out.tfevents.1.empty.0 cannot be read, and stays" in error
    left = set(tmp_path.glob("events*")) - kept
    assert len(left) == 1 and next(iter(left)).name.endswith(event_files.CLASSIFIER_SUFFIX)
    assert {path: path.read_bytes() for path in contents} == contents
