"""What a run leaves to look at: its text track, and everything in TensorBoard.

Letters: B images, C channels, H×W pixels, h×w latents, K codes.
"""

import errno
import io
import shutil
import threading
import warnings
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard import SummaryWriter

from data import grid, to_unit_range
from files import remove_temporary, write_whole
from metrics import perplexity
from modules import Losses

TRACK, PRIOR_TRACK = "track.txt", "prior-track.txt"
TRACK_COLUMNS = ("epoch", "step", "train_recon", "train_codebook", "train_commit",
                 "test_recon", "test_codebook", "test_commit", "perplexity", "used", "restarts", "seconds")
PRIOR_SUFFIX = ".prior"         # of the event file of train_prior.py
BY_STEP = ("loss/train/", "lr")             # tags; the others are by epoch
# Tags that are written once, when a run is over or when its file is opened.
ONCE = ("final/", "_hparams_/", CONFIG_SUMMARY_TAG)
EMBEDDING = "codebook"          # the projector's tag, and the name of its folders
DECODED_AT_ONCE = 512           # codes
SHOWN_IN_A_ROW, IMAGE_PADDING = 8, 2        # of the grids of images, the padding in pixels
# Charts of several curves each. A folder may hold the logs of both trainings, and one layout alone.
CHARTS = {
    "losses": {f"the three losses, {title}": ["Multiline", [f"loss/{split}/{name}" for name in Losses._fields[:3]]]
               for split, title in (("train", "training"), ("test", "test"))},
    "prior": {"nats per code, training and test": ["Multiline", ["prior/train", "prior/test"]]},
}


def remove_logs(folder, suffix=""):
    """Remove what a former run left in logs/NAME, with PRIOR_SUFFIX that of a prior alone. Other files are kept."""
    remove_temporary(folder)
    for path in event_files(folder, suffix):
        path.unlink()
    if not suffix:
        remove_logs(folder, PRIOR_SUFFIX)
        remove_projector(folder)


def event_files(folder, suffix=""):
    """The event files of a VQ-VAE's run, or with PRIOR_SUFFIX of a prior's, oldest first."""
    return [path for path in sorted(folder.glob("events.out.tfevents.*"))
            if path.name.endswith(PRIOR_SUFFIX) == bool(suffix)]


def remove_projector(folder):
    (folder / "projector_config.pbtxt").unlink(missing_ok=True)
    for path in folder.glob(f"[0-9][0-9][0-9][0-9][0-9]/{EMBEDDING}"):
        shutil.rmtree(path)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def keep_until(folder, step, epoch, suffix=""):
    """Take back what a run logged after a step and an epoch, when it is about to do them again.

    A SummaryWriter's purge_step would do this on one axis, but losses are logged by step and most
    of the rest by epoch. What is logged at the end of a run goes as well, and what opened() writes again.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_temporary(folder)
    for path in event_files(folder, suffix):
        buffer = io.BytesIO()
        records = RecordWriter(buffer)
        for record in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(record)
            tags = [value.tag for value in event.summary.value]
            last = step if any(tag.startswith(BY_STEP) for tag in tags) else epoch
            if event.step <= last and not any(tag.startswith(ONCE) for tag in tags):
                records.write(record)
        write_whole(path, buffer.getbuffer())
    if not suffix:
        remove_projector(folder)


@contextmanager
def opened(folder, suffix=""):
    """A SummaryWriter for a folder, with the layout of CHARTS written.

    An error of its writing thread is raised where it is used next, and there alone.
    """
    def printed(failed, former=threading.excepthook):
        if not issubclass(failed.exc_type, OSError):
            former(failed)

    former, threading.excepthook = threading.excepthook, printed
    try:
        writer = SummaryWriter(folder, filename_suffix=suffix)
        try:
            writer.add_custom_scalars(CHARTS)
            yield writer
        except BaseException:
            with suppress(OSError):
                writer.close()
            raise
        writer.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            error.filename = error.filename or str(folder)
        raise
    finally:
        threading.excepthook = former


def check_there(writer):
    """Raise FileNotFoundError if a writer's folder has gone: what is written to its file would be lost in silence."""
    if not Path(writer.log_dir).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder has gone", str(writer.log_dir))


# ---------------------------------------------------------------- the text track

def track_line(*values):
    """One value for each of TRACK_COLUMNS, under its name."""
    formats = ("d", "d", *6 * (".5f",), ".1f", "d", "d", ".1f")
    return "  ".join(f"{value:{form}}".rjust(len(name)) for name, form, value in zip(TRACK_COLUMNS, formats, values))


def write_track(path, lines):
    write_whole(path, "".join(f"{line}\n" for line in lines).encode())


# ---------------------------------------------------------------- TensorBoard

def log_steps(writer, step, losses, lr):
    """The mean losses of the steps since the last call, and the learning rate of the latest step."""
    check_there(writer)
    for name, value in losses._asdict().items():
        writer.add_scalar(f"loss/train/{name}", value, step)
    writer.add_scalar("lr", lr, step)


def log_epoch(writer, epoch, tested, test_counts, train_counts, restarts):
    """The test losses, how the codes (K,) were used on both sets, and how many were restarted."""
    for name, value in tested._asdict().items():
        writer.add_scalar(f"loss/test/{name}", value, epoch)
    for family, counts in (("codebook", test_counts), ("codebook/train", train_counts)):
        writer.add_scalar(f"{family}/perplexity", perplexity(counts), epoch)
        writer.add_scalar(f"{family}/used", (counts > 0).sum(), epoch)
    writer.add_scalar("codebook/restarts", restarts, epoch)
    numbers = torch.arange(len(test_counts))
    writer.add_histogram_raw("codebook/use", min=0, max=len(numbers) - 1, num=test_counts.sum().item(),
                             sum=(test_counts * numbers).sum().item(),
                             sum_squares=(test_counts * numbers**2).sum().item(),
                             bucket_limits=(numbers + 0.5).tolist(), bucket_counts=test_counts.tolist(),
                             global_step=epoch)


@torch.no_grad()
def log_images(writer, model, images, epoch):
    """The reconstructions of images (B, C, H, W); in epoch 0 the originals and the model's graph too.

    Leaves the model in evaluation mode.
    """
    model.eval()
    if epoch == 0:
        writer.add_image("images/original", grid(images, SHOWN_IN_A_ROW, IMAGE_PADDING), 0)
        with warnings.catch_warnings():     # its tracer warns of every shape that Python looks at
            warnings.simplefilter("ignore")
            writer.add_graph(model, images[:1])
    reconstruction = model(images).reconstruction
    writer.add_image("images/reconstruction", grid(reconstruction, SHOWN_IN_A_ROW, IMAGE_PADDING), epoch)


@torch.no_grad()
def log_codebook(writer, model, counts, shape, epoch):
    """The codes in the embedding projector, each with its use and the image that it decodes to.

    That image is the decoder's for a map of this code alone. It is square, as the projector
    needs: of images (C, H, W) the shorter side. Leaves the model in evaluation mode.
    """
    model.eval()
    codebook, side = model.quantizer.codebook.detach(), min(shape[1:]) // 4
    numbers = torch.arange(len(codebook), device=codebook.device)
    pictures = [to_unit_range(model.decode(some.view(-1, 1, 1).expand(-1, side, side))).cpu()
                for some in numbers.split(DECODED_AT_ONCE)]           # (K, C, side, side) in all
    writer.add_embedding(codebook.cpu(), metadata=list(enumerate(counts.tolist())), metadata_header=["code", "used"],
                         label_img=torch.cat(pictures), global_step=epoch, tag=EMBEDDING)


def log_hparams(writer, settings, tested, counts):
    """The run's settings (plain values) and its final test figures, for the HPARAMS tab. Call it last."""
    final = {"final/mse": tested.reconstruction, "final/codebook": tested.codebook,
             "final/commitment": tested.commitment, "final/perplexity": perplexity(counts),
             "final/used": int((counts > 0).sum())}
    writer.flush()                      # they go to a second file, which readers open after the first
    writer.add_hparams(settings, final, run_name=".")


def log_prior(writer, epoch, trained, tested, bits_per_pixel, images):
    """Nats per code on both sets, what the test set's come to for a pixel, and samples (100, C, H, W)."""
    writer.add_scalar("prior/train", trained, epoch)
    writer.add_scalar("prior/test", tested, epoch)
    writer.add_scalar("prior/bits_per_pixel", bits_per_pixel, epoch)
    writer.add_image("prior/samples", grid(images, columns=10), epoch)
