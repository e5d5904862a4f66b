"""What a run logs: its text track, and everything in TensorBoard.

Letters: B images, C channels, H×W pixels, h×w latents, K codes.
"""

import errno
import io
import threading
import warnings
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from data import grid, to_model_range, to_uint8
from metrics import perplexity
from modules import Losses
from utils import code_use
from utils.event_files import EMBEDDING_TAG, PRIOR_SUFFIX, own_files
from utils.files import write_atomically
from utils.memory import images_that_fit
from utils.train_state import FORMER_COLUMNS

TRACK, PRIOR_TRACK = "track.txt", "prior-track.txt"
# Columns of the tracks, those of the validation set only where there is one, each with its format.
TRACK_COLUMNS = {"epoch": "d", "step": "d", **{f"{split}_{loss}": ".5f" for split in ("train", "val", "test")
                                               for loss in ("recon", "codebook", "commit")},
                 "perplexity": ".1f", "used": "d", "restarts": "d", "seconds": ".1f"}
PRIOR_COLUMNS = {"epoch": "d", "train_nats": ".4f", "val_nats": ".4f", "test_nats": ".4f", "bits_per_dimension": ".4f",
                 "seconds": ".1f"}
# The rest fits into 80 characters.
NOT_PRINTED = "step", *(f"{split}_{loss}" for split in ("train", "val", "test") for loss in ("codebook", "commit"))
GRID_COLUMNS, GRID_PADDING = 8, 2           # of the grids of images; the padding in pixels
GRID_PIXELS = 2**20             # of the images in a grid, together
GRAPH_SIDE = 32                 # pixels: the largest side of the image that the graph is traced with
PROJECTOR_CODES = 4096          # the most codes in the projector
SPLITS = "train", "validation", "test"
# Charts of several curves each, of a VQ-VAE and, by the suffix of its event files, of a prior.
CHARTS = {
    "": {"losses": {
        **{f"the three losses, {title}": ["Multiline", [f"loss/{split}/{name}" for name in Losses._fields[:3]]]
           for split, title in (("train", "training"), ("test", "test"))},
        "reconstruction loss by set": ["Multiline", [f"loss/{split}/reconstruction" for split in SPLITS]]}},
    PRIOR_SUFFIX: {"prior": {"nats per code by set": ["Multiline", [f"prior/{split}" for split in SPLITS]]}},
}


@contextmanager
def open_writer(folder, suffix=""):
    """A SummaryWriter for a folder, with a layout of the CHARTS written: for its own curves, and for those there are.

    An OSError of its writing thread is raised where it is used next, and is not printed by the thread too.
    """
    def print_others(failed, former=threading.excepthook):
        if not issubclass(failed.exc_type, OSError):
            former(failed)

    former, threading.excepthook = threading.excepthook, print_others
    try:
        writer = SummaryWriter(folder, filename_suffix=suffix)
        try:
            # A folder has one layout, the last one written, and may hold the logs of a VQ-VAE and of its prior.
            charts = [charts for kind, charts in CHARTS.items() if kind == suffix or own_files(Path(folder), kind)]
            if charts:
                writer.add_custom_scalars({title: chart for part in charts for title, chart in part.items()})
            yield writer
        except BaseException:
            with suppress(OSError):
                writer.close()
            raise
        writer.close()
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            error.filename = error.filename or str(folder)
        if error.errno == errno.ENOENT:
            check_folder_exists(folder)
        raise
    finally:
        threading.excepthook = former


def check_folder_exists(folder):
    """Raise FileNotFoundError if a writer's folder has been removed: it would write to a deleted file in silence."""
    if not Path(folder).is_dir():
        raise FileNotFoundError(errno.ENOENT, "the folder has been removed", str(folder))


# ---------------------------------------------------------------- the text track

def track_header(columns, validation):
    """The first line of a track, with or without the columns of a validation set."""
    return "  ".join(name for name in columns if validation or not name.startswith("val_"))


def track_line(header, formats, values):
    """The line under a track's header: of values {name: number} those that it names, each in its format."""
    names = {name: FORMER_COLUMNS.get(name, name) for name in header.split()}
    return "  ".join(f"{values[name]:{formats[name]}}".rjust(len(shown)) for shown, name in names.items())


def track_row(track, epoch):
    """{name: number} of an epoch's line in a track."""
    return {name: float(value) for name, value in zip(track[0].split(), track[epoch].split())}


def is_track(path):
    """Whether the file at path is a text track."""
    with open(path, "rb") as file:
        return file.read(5) == b"epoch"


def write_track(path, lines):
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


# ---------------------------------------------------------------- TensorBoard

def log_steps(writer, position, tag, losses, lr):
    """The mean losses of the steps since the last call, by name, and the learning rate of the latest step.

    position: on the x axis of these curves, Trainer.position().
    """
    for name, value in losses.items():
        writer.add_scalar(f"{tag}{name}", value, position)
    writer.add_scalar("lr", lr, position)


def log_epoch(writer, epoch, position, losses, test_counts, train_counts, restarts):
    """The losses on the validation and the test set, {name: Losses}, at a position on the x axis of the training
    losses; how often each of K codes was used on the test and the training set, and how many codes were restarted, by
    epoch.
    """
    for split, split_losses in losses.items():
        for name, value in split_losses._asdict().items():
            writer.add_scalar(f"loss/{split}/{name}", value, position)
    for family, counts in (("codebook", test_counts), ("codebook/train", train_counts)):
        writer.add_scalar(f"{family}/perplexity", perplexity(counts), epoch)
        writer.add_scalar(f"{family}/used", (counts > 0).sum(), epoch)
    writer.add_scalar("codebook/restarts", restarts, epoch)


def log_code_use(writer, counts, epoch):
    """A chart of how often each of K codes was used on the test set, counts (K,)."""
    writer.add_image("codebook/use", code_use.draw(counts), epoch)


def images_in_grid(max_images, height, width):
    """How many images of a size a grid shows: at most max_images, of large images fewer, but four of any size."""
    return min(max_images, max(4, GRID_PIXELS // (height * width)))


@torch.no_grad()
def log_images(writer, model, images, epoch):
    """The reconstructions of uint8 images (B, C, H, W); in epoch 0 the originals too.

    Leaves the model in evaluation mode.
    """
    model.eval()
    device, (H, W) = next(model.parameters()).device, images.shape[2:]
    if epoch == 0:
        writer.add_image("images/original", grid(images, GRID_COLUMNS, GRID_PADDING), 0)
    reconstructions = [to_uint8(model(to_model_range(batch, device)).reconstruction)
                       for batch in images.split(images_that_fit(H, W, model.quantizer.dim))]
    writer.add_image("images/reconstruction", grid(torch.cat(reconstructions), GRID_COLUMNS, GRID_PADDING), epoch)


def log_graph(writer, model, images):
    """The model's graph, for one of uint8 images (B, C, H, W). Leaves the model in evaluation mode."""
    x = to_model_range(images[:1, :, :GRAPH_SIDE, :GRAPH_SIDE], next(model.parameters()).device)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):     # of every shape that Python reads; of an error
        warnings.simplefilter("ignore")
        writer.add_graph(model.eval(), x)


@torch.no_grad()
def log_codebook(writer, model, counts, images, epoch):
    """The codebook in the embedding projector, each code with its use and a picture of what it stands for.

    The picture is that of code_use.pictures_of_codes() for uint8 images (B, C, H, W), in a frame whose colour shows the
    use. Only the PROJECTOR_CODES most used codes are shown. Leaves the model in evaluation mode.
    """
    codes = counts.topk(min(len(counts), PROJECTOR_CODES)).indices.sort().values              # (n,)
    pictures = code_use.pictures_of_codes(model, codes, images)                               # (n, C, 3f, 3f)
    maps = codes.to(next(model.parameters()).device).view(-1, 1, 1)                           # (n, 1, 1)
    vectors = model.quantizer.lookup(maps).flatten(1).cpu()                                   # (n, D)
    writer.add_embedding(vectors, tag=EMBEDDING_TAG, global_step=epoch,
                         metadata=list(zip(codes.tolist(), counts[codes].tolist())), metadata_header=["code", "used"],
                         label_img=code_use.framed(pictures, counts[codes]) / 255)


def log_hparams(writer, settings, figures):
    """The run's settings (plain values) and its figures {tag: number}, for the HPARAMS tab. Call it last.

    Not by add_hparams(), whose summary of an experiment would fix the columns to the settings of one run: without it
    TensorBoard takes them from all runs, those that differ first. The table begins with the five figures that are first
    in the alphabet.
    """
    _, start, end = hparams(settings, figures)
    writer.file_writer.add_summary(start)
    writer.file_writer.add_summary(end)
    for tag, value in figures.items():
        writer.add_scalar(tag, value)


def log_prior(writer, epoch, nats, bits_per_dimension):
    """Nats per code on each set, {name: number}, and the test set's in bits per dimension."""
    for split, value in nats.items():
        writer.add_scalar(f"prior/{split}", value, epoch)
    writer.add_scalar("prior/bits_per_dimension", bits_per_dimension, epoch)


def log_classifier(writer, epoch, train_loss, accuracy):
    """The classifier's cross-entropy in training, in nats, and its accuracy on the test set."""
    writer.add_scalar("classifier/train", train_loss, epoch)
    writer.add_scalar("classifier/accuracy", accuracy, epoch)


def log_samples(writer, epoch, images, columns):
    """A grid of sampled uint8 images (B, C, H, W)."""
    writer.add_image("prior/samples", grid(images, columns), epoch)
