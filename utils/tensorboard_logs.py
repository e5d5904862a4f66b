"""What a run logs: its text track, and everything in TensorBoard.

Letters: B images, C channels, H×W pixels, h×w latents, K codes.
"""

import errno
import io
import threading
import warnings
from contextlib import contextmanager, redirect_stdout, suppress
from itertools import accumulate
from pathlib import Path

import torch
from torch.utils.tensorboard import SummaryWriter

from data import grid, to_bytes, to_model_range
from metrics import perplexity
from modules import Losses
from utils.event_files import EMBEDDING_TAG
from utils.files import write_atomically
from utils.memory import images_that_fit

TRACK, PRIOR_TRACK = "track.txt", "prior-track.txt"
TRACK_COLUMNS = ("epoch", "step", "train_recon", "train_codebook", "train_commit",
                 "test_recon", "test_codebook", "test_commit", "perplexity", "used", "restarts", "seconds")
NOT_PRINTED = "train_codebook", "train_commit", "test_codebook", "test_commit"       # the rest fits into 80 characters
GRID_COLUMNS, GRID_PADDING = 8, 2           # of the grids of images; the padding in pixels
GRID_PIXELS = 2**20             # of the images in a grid, together
THUMBNAIL = 32                  # pixels: the largest side of a code's image in the projector, and in the graph
PROJECTOR_CODES = 4096          # the most codes in the projector
HISTOGRAM_BARS = 1024           # the most of them
# Charts of several curves each. A folder has one layout, and may hold the logs of a VQ-VAE and of its prior.
CHARTS = {
    "losses": {f"the three losses, {title}": ["Multiline", [f"loss/{split}/{name}" for name in Losses._fields[:3]]]
               for split, title in (("train", "training"), ("test", "test"))},
    "prior": {"nats per code, training and test": ["Multiline", ["prior/train", "prior/test"]]},
}


@contextmanager
def open_writer(folder, suffix=""):
    """A SummaryWriter for a folder, with the layout of CHARTS written.

    An OSError of its writing thread is raised where it is used next, and is not printed by the thread too.
    """
    def print_others(failed, former=threading.excepthook):
        if not issubclass(failed.exc_type, OSError):
            former(failed)

    former, threading.excepthook = threading.excepthook, print_others
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

def track_line(*values):
    """One value for each of TRACK_COLUMNS, under its name."""
    formats = ("d", "d", *6 * (".5f",), ".1f", "d", "d", ".1f")
    return "  ".join(f"{value:{form}}".rjust(len(name)) for name, form, value in zip(TRACK_COLUMNS, formats, values))


def is_track(path):
    """Whether the file at path is a text track."""
    with open(path, "rb") as file:
        return file.read(5) == b"epoch"


def write_track(path, lines):
    write_atomically(path, "".join(f"{line}\n" for line in lines).encode())


# ---------------------------------------------------------------- TensorBoard

def log_steps(writer, step, tag, losses, lr):
    """The mean losses of the steps since the last call, by name, and the learning rate of the latest step."""
    for name, value in losses.items():
        writer.add_scalar(f"{tag}{name}", value, step)
    writer.add_scalar("lr", lr, step)


def log_epoch(writer, epoch, test_losses, test_counts, train_counts, restarts):
    """The test losses, how often each of K codes was used on both sets, and how many codes were restarted."""
    for name, value in test_losses._asdict().items():
        writer.add_scalar(f"loss/test/{name}", value, epoch)
    for family, counts in (("codebook", test_counts), ("codebook/train", train_counts)):
        writer.add_scalar(f"{family}/perplexity", perplexity(counts), epoch)
        writer.add_scalar(f"{family}/used", (counts > 0).sum(), epoch)
    writer.add_scalar("codebook/restarts", restarts, epoch)
    numbers = torch.arange(len(test_counts))
    bars = test_counts.split(-(-len(test_counts) // HISTOGRAM_BARS))          # a code each, of large codebooks several
    writer.add_histogram_raw("codebook/use", min=0, max=len(numbers) - 1, num=test_counts.sum().item(),
                             sum=(test_counts * numbers).sum().item(),
                             sum_squares=(test_counts * numbers**2).sum().item(),
                             bucket_limits=[limit - 0.5 for limit in accumulate(len(bar) for bar in bars)],
                             bucket_counts=[bar.sum().item() for bar in bars], global_step=epoch)


def images_in_grid(most, height, width):
    """How many images of so many pixels a grid shows: at most `most`, of large images fewer, but four of any size."""
    return min(most, max(4, GRID_PIXELS // (height * width)))


@torch.no_grad()
def log_images(writer, model, images, epoch):
    """The reconstructions of uint8 images (B, C, H, W); in epoch 0 the originals too.

    Leaves the model in evaluation mode.
    """
    model.eval()
    device, (H, W) = next(model.parameters()).device, images.shape[2:]
    if epoch == 0:
        writer.add_image("images/original", grid(images, GRID_COLUMNS, GRID_PADDING), 0)
    reconstructions = [to_bytes(model(to_model_range(batch, device)).reconstruction)
                       for batch in images.split(images_that_fit(H, W, model.quantizer.dim))]
    writer.add_image("images/reconstruction", grid(torch.cat(reconstructions), GRID_COLUMNS, GRID_PADDING), epoch)


def log_graph(writer, model, images):
    """The model's graph, for one of uint8 images (B, C, H, W). Leaves the model in evaluation mode."""
    x = to_model_range(images[:1, :, :THUMBNAIL, :THUMBNAIL], next(model.parameters()).device)
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):     # of every shape that Python reads; of an error
        warnings.simplefilter("ignore")
        writer.add_graph(model.eval(), x)


@torch.no_grad()
def log_codebook(writer, model, counts, shape, epoch):
    """The codebook in the embedding projector, each code with its use and the image that it decodes to.

    That image is the decoder's for a map of this code alone. It is square, as the projector needs: of images (C, H, W)
    the shorter side, at most THUMBNAIL pixels. Of more than PROJECTOR_CODES codes, those used most. Leaves the model in
    evaluation mode.
    """
    model.eval()
    side = min(*shape[1:], THUMBNAIL)
    h, w = model.map_size(side, side)
    codes = counts.topk(min(len(counts), PROJECTOR_CODES)).indices.sort().values              # (n,)
    maps = codes.to(next(model.parameters()).device).view(-1, 1, 1)                           # (n, 1, 1)
    pictures = [model.decode(batch.expand(-1, h, w)).cpu()
                for batch in maps.split(images_that_fit(side, side, model.quantizer.dim))]
    vectors = model.quantizer.lookup(maps).flatten(1).cpu()                                   # (n, D)
    writer.add_embedding(vectors, tag=EMBEDDING_TAG, global_step=epoch,
                         metadata=list(zip(codes.tolist(), counts[codes].tolist())), metadata_header=["code", "used"],
                         label_img=(torch.cat(pictures) + 1) / 2)


def log_hparams(writer, settings, test_losses, counts):
    """The run's settings (plain values) and its final test figures, for the HPARAMS tab. Call it last."""
    final = {"final/mse": test_losses.reconstruction, "final/codebook": test_losses.codebook,
             "final/commitment": test_losses.commitment, "final/perplexity": perplexity(counts),
             "final/used": int((counts > 0).sum())}
    writer.flush()                      # they go to a second file, which readers open after the first one
    writer.add_hparams(settings, final, run_name=".")


def log_prior(writer, epoch, train_nats, test_nats, bits_per_pixel):
    """Nats per code on both sets, and the test set's in bits per pixel."""
    writer.add_scalar("prior/train", train_nats, epoch)
    writer.add_scalar("prior/test", test_nats, epoch)
    writer.add_scalar("prior/bits_per_pixel", bits_per_pixel, epoch)


def log_classifier(writer, epoch, train_loss, accuracy):
    """The classifier's cross-entropy in training, in nats, and its accuracy on the test set."""
    writer.add_scalar("classifier/train", train_loss, epoch)
    writer.add_scalar("classifier/accuracy", accuracy, epoch)


def log_samples(writer, epoch, images, columns):
    """A grid of sampled uint8 images (B, C, H, W)."""
    writer.add_image("prior/samples", grid(images, columns), epoch)
