"""The event files of TensorBoard that a training has written: which are its own, removed or cut for a new start."""

import io
import re
import struct
import sys
import time
from contextlib import suppress
from itertools import count, islice

from google.protobuf.message import DecodeError
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.summary.writer.record_writer import RecordWriter, masked_crc32c

from utils.files import remove_temporary_files, write_atomically

PRIOR_SUFFIX, CLASSIFIER_SUFFIX = ".prior", ".classifier"       # of the event files of the two trainings
# Tags that are logged within an epoch, and those of the losses after it. Both have the images seen as x axis; in runs
# that an earlier version began, the first have steps and the second epochs. All others are logged by epoch.
IN_EPOCH, LOSSES = ("loss/train/", "lr"), "loss/"
# Tags that are logged once: at the end of a run, or when its file is opened.
LOGGED_ONCE = "at_end/", "best/", "final/", "_hparams_/", CONFIG_SUMMARY_TAG         # final/: of earlier versions
# All tags but "lr" begin with one of these. They tell a training's files from those of other programs.
OWN_TAGS = (*LOGGED_ONCE, "loss/train/", "loss/validation/", "loss/test/", "images/", "codebook/", "prior/",
            "classifier/")
EMBEDDING_TAG = "codebook"      # of the projector, and the name of its folders
EVENT_FILES = "events.out.tfevents.*"
FRAME = 16                      # bytes around each record of an event file: its length, and two checksums


def remove_logs(folder, suffix=""):
    """Remove the logs of a former run from logs/NAME: of a VQ-VAE, and of its prior, or those with a suffix alone.

    Other files stay, those of other programs too.
    """
    remove_temporary_files(folder, EVENT_FILES)
    own = own_files(folder, suffix)
    for path in event_files(folder, suffix):
        if path in own:
            path.unlink()
        elif not any(True for _ in first_events(path)):
            print(f"{path} cannot be read, and stays: remove it if it is of a former run", file=sys.stderr)
    if not suffix:
        remove_logs(folder, PRIOR_SUFFIX)
        remove_projector(folder)


def event_files(folder, suffix=""):
    """The event files of trainings with this suffix, none for a VQ-VAE's, oldest first."""
    files = [path for path in sorted(folder.glob(EVENT_FILES)) if path.is_file()]
    return [path for path in files
            if (path.name.endswith(suffix) if suffix else not path.name.endswith((PRIOR_SUFFIX, CLASSIFIER_SUFFIX)))]


def own_files(folder, suffix=""):
    """Those of event_files() that a training of this repository has written, as far as they can be read."""
    return [path for path in event_files(folder, suffix) if are_own(tags_of(first_events(path)))]


def first_events(path):
    """The first events of a file, up to a damaged one."""
    with suppress(ValueError):
        for event, _ in islice(read_events(path), 20):
            yield event


def read_events(path):
    """The events of a file, each with its record. Raises ValueError where one is damaged.

    A last one that is not complete, as a killed process leaves it, is left out.
    """
    size = 0
    for record in RawEventFileLoader(str(path)).Load():         # which ends without a word where it cannot read on
        try:
            event = Event.FromString(record)
        except DecodeError as error:
            raise ValueError("not an event") from error
        size += FRAME + len(record)
        yield event, record
    with open(path, "rb") as file:
        file.seek(size)
        rest = file.read()
    length, checksum = rest[:8], rest[8:12]
    if len(rest) >= 12 and (checksum != struct.pack("<I", masked_crc32c(length))
                            or FRAME + int.from_bytes(length, "little") <= len(rest)):
        raise ValueError("a damaged record")


def tags_of(events):
    return {value.tag for event in events for value in event.summary.value}


def are_own(tags):
    """Whether an event file with these tags is of a training of this repository."""
    return bool(tags) and all(tag == "lr" or tag.startswith(OWN_TAGS) for tag in tags)


def remove_projector(folder):
    (folder / "projector_config.pbtxt").unlink(missing_ok=True)
    for path in folder.glob(f"[0-9][0-9][0-9][0-9][0-9]/{EMBEDDING_TAG}"):
        for name in ("tensors.tsv", "metadata.tsv", "sprite.png"):
            (path / name).unlink(missing_ok=True)
        for empty in (path, path.parent):
            if not any(empty.iterdir()):
                empty.rmdir()


def truncate_logs(folder, position, evaluated, epoch, suffix=""):
    """Remove what a run logged after its last whole epoch, which it is about to do again.

    position, evaluated: the x of the last step that has been done, and of the losses after the last whole epoch.
    SummaryWriter's purge_step knows a single axis. What is logged at the end of a run is removed too, and what
    open_writer() writes again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary_files(folder, EVENT_FILES)
    kept = []
    for path in event_files(folder, suffix):
        buffer, found, found_tags, is_damaged = io.BytesIO(), 0, set(), False
        records = RecordWriter(buffer)
        try:
            for event, record in read_events(path):
                tags = [value.tag for value in event.summary.value]
                found, found_tags = found + 1, found_tags.union(tags)
                last = next((x for start, x in ((IN_EPOCH, position), (LOSSES, evaluated))
                             if any(tag.startswith(start) for tag in tags)), epoch)
                if event.step <= last and not any(tag.startswith(LOGGED_ONCE) for tag in tags):
                    records.write(record)
        except ValueError:
            is_damaged = True
        if not are_own(found_tags) and (found or not is_damaged):             # another program's, or empty
            continue
        if is_damaged:
            name = path.name.replace("tfevents", "damaged")             # which TensorBoard does not read
            aside = next(free for n in count(1) if not (free := path.with_name(f"{name}.{n}")).exists())
            write_atomically(aside, path.read_bytes())
            print(f"{path} is damaged: its first {found:,} events are kept in it, and all of it in {aside}",
                  file=sys.stderr)
        write_atomically(path, buffer.getbuffer())
        kept.append(path)
    keep_in_order(kept)
    if not suffix:
        remove_projector(folder)


def keep_in_order(paths):
    """Rename event files, oldest first, so that TensorBoard reads them before one that is created now.

    It goes by the time in their names, which is later than now if the clock has been set back.
    """
    now = int(time.time())
    times = [int(time_of[1]) for path in paths if (time_of := re.search(r"tfevents\.(\d+)\.", path.name))]
    if len(times) == len(paths) and max(times, default=0) >= now:
        first = min(now, *times) - len(paths)           # each new name is before all old ones, so that none is taken
        for earlier, path in enumerate(paths, first):
            path.rename(path.with_name(re.sub(r"(?<=tfevents\.)\d+", f"{earlier:010}", path.name, count=1)))
