"""What a run leaves to look at: its text track, and everything in TensorBoard.

Letters: B images, C channels, H×W pixels, h×w latents, K codes.
"""

import shutil
import warnings

import torch
from torchvision.utils import make_grid

from data import to_unit_range
from metrics import perplexity
from modules import Losses

TRACK, PRIOR_TRACK = "track.txt", "prior-track.txt"
TRACK_COLUMNS = ("epoch", "step", "train_recon", "train_codebook", "train_commit",
                 "test_recon", "test_codebook", "test_commit", "perplexity", "used", "restarts", "seconds")
PRIOR_SUFFIX = ".prior"         # of the event file of train_prior.py
EMBEDDING = "codebook"          # the projector's tag, and the name of its folders
DECODED_AT_ONCE = 512           # codes
SHOWN_IN_A_ROW, IMAGE_PADDING = 8, 2        # of the grids of images, the padding in pixels


def remove_logs(folder):
    """Remove what a former run left in logs/NAME. Other files in it are kept."""
    for pattern in ("events.out.tfevents.*", "projector_config.pbtxt"):
        for path in folder.glob(pattern):
            path.unlink()
    for path in folder.glob(f"[0-9][0-9][0-9][0-9][0-9]/{EMBEDDING}"):
        shutil.rmtree(path)
        if not any(path.parent.iterdir()):
            path.parent.rmdir()


def remove_prior_logs(folder):
    """Remove what a former training of a prior left in logs/NAME."""
    for path in folder.glob(f"events.out.tfevents.*{PRIOR_SUFFIX}"):
        path.unlink()


# ---------------------------------------------------------------- the text track

def track_line(*values):
    """One value for each of TRACK_COLUMNS, under its name."""
    formats = ("d", "d", *6 * (".5f",), ".1f", "d", "d", ".1f")
    return "  ".join(f"{value:{form}}".rjust(len(name)) for name, form, value in zip(TRACK_COLUMNS, formats, values))


def tell(track, line):
    """Print a line and add it to a text track."""
    print(line, flush=True)
    with open(track, "a") as file:
        print(line, file=file)


# ---------------------------------------------------------------- TensorBoard

def log_steps(writer, step, losses, lr):
    """The mean losses of the steps since the last call, and the learning rate of the latest step."""
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


def grid(images):
    """Images (B, C, H, W) in [-1, 1] as one picture in [0, 1]."""
    return make_grid(to_unit_range(images), nrow=SHOWN_IN_A_ROW, padding=IMAGE_PADDING)


@torch.no_grad()
def log_images(writer, model, images, epoch):
    """The reconstructions of images (B, C, H, W); in epoch 0 the originals and the model's graph too."""
    model.eval()
    if epoch == 0:
        writer.add_image("images/original", grid(images), 0)
        with warnings.catch_warnings():     # its tracer warns of every shape that Python looks at
            warnings.simplefilter("ignore")
            writer.add_graph(model, images[:1])
    reconstruction = model(images).reconstruction
    writer.add_image("images/reconstruction", grid(reconstruction), epoch)


@torch.no_grad()
def log_codebook(writer, model, counts, shape, epoch):
    """The codes in the embedding projector, each with its use and the image that it decodes to.

    That image is the decoder's for a map of this code alone. It is square, as the projector
    needs: of images (C, H, W) the shorter side.
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


def mean_losses(losses):
    """The mean of stacked losses (n, 4), fetched from the device at once."""
    return Losses(*torch.stack(losses).mean(dim=0).tolist())


def log_prior(writer, epoch, trained, tested, bits_per_pixel, images):
    """Nats per code on both sets, what the test set's come to for a pixel, and samples (100, C, H, W)."""
    writer.add_scalar("prior/train", trained, epoch)
    writer.add_scalar("prior/test", tested, epoch)
    writer.add_scalar("prior/bits_per_pixel", bits_per_pixel, epoch)
    writer.add_image("prior/samples", make_grid(to_unit_range(images), nrow=10), epoch)
