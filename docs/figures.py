"""Draw the pictures of the README and of docs/: python3 docs/figures.py [--run logs/NAME] ...

codes.png and samples.png show the shipped model and prior. digits-by-epoch.png, digits-by-epoch.gif and losses.png are
drawn from the logs of one run, and code-use.png from the logs of two: one with the published codebook (uniform, no
restarts) and one with the codebook of this repository (K-means and restarts). quantizers.png shows what
benchmarks/quantizers.py has measured.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import cli

LOGS, QUANTIZERS = Path("logs_VQ-VAE"), Path("docs/results/quantizers.json")            # in the repository


def get_parser():
    parser = cli.Parser(description=__doc__)
    for flag, name, what in (("--run", "recommended", "logs of the run whose digits and losses are drawn"),
                             ("--published", "published", "logs of a run with --codebook-init uniform "
                                                          "--restart-after 0"),
                             ("--ours", "defaults", "logs of a run with the same flags except these two")):
        parser.add_argument(flag, type=Path, default=ROOT / LOGS / name, metavar="PATH",
                            help=f"{what} (default: {LOGS / name} of the repository)")
    parser.add_argument("--quantizers", type=Path, default=ROOT / QUANTIZERS, metavar="PATH",
                        help=f"figures to draw quantizers.png from (default: {QUANTIZERS} of the repository)")
    parser.add_argument("--folder", type=Path, default=Path("readme_images"), metavar="PATH",
                        help="folder to write the pictures to, created if need be (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such pictures there (default: leave them unchanged and stop)")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before the rest is imported, which takes seconds

import io
import json

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator
from PIL import Image, ImageDraw, ImageFont
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import checkpoint
import data
from data import image_file
from metrics import samples
from utils import files
from utils.code_pictures import code_patches
from utils.tensorboard_logs import GRID_COLUMNS, GRID_PADDING

NAMES = ("codes.png", "samples.png", "digits-by-epoch.png", "digits-by-epoch.gif", "losses.png", "code-use.png",
         "quantizers.png")
FONT = Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"        # distinct under any colour vision
CURVES = {"font.size": 13, "figure.dpi": 100}

TEST_DIGITS = (5, 4, 9, 1)      # rows of the bundled test set: a 0, a 3, a 5 and a 7
CODES_SCALE = 10                # pixels of codes.png for one pixel of a digit
CODES_GAP = 20                  # pixels of white between digits
NUMBER_SIZE = 17                # pixels, the font size of a code's index
NUMBER_COLOR, EDGE_COLOR = "#ffc20a", "#3a5a80"

GRID_SCALE = 2                  # of the other pictures of digits
LABEL_SIZE = 22                 # pixels, the font size of labels
GRID_ROWS = 2                   # of the logged grid, for each epoch of digits-by-epoch.png
ROW_GAP = 8                     # pixels of white between its epochs
MIN_CHANGE = 3                  # grey levels of 255, mean over pixels: smaller changes are hard to see
FRAME_MS = 1200

# Of the shipped model.
CODES_CAPTIONS = ("image, 28×28 pixels",
                  "7×7 indices into the codebook of 512, each on the patch that its code decodes to",
                  "reconstruction from these 49 indices")
LOSS_TITLES = {"reconstruction": "Reconstruction loss\n(MSE on [−1, 1])",
               "codebook": "Codebook loss $\\Vert\\mathrm{sg}[z_e] - e\\Vert^2$\n"
                           "(the commitment loss has the same value)"}
SAMPLES_CAPTION = "Sampled from the prior: ten of each digit"


# ---------------------------------------------------------------- reading the logs

def read_logs(flag, path):
    """The events of a run. Raises ValueError, naming the flag, if the folder holds none of a whole epoch."""
    if path.is_dir():
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0}).Reload()
        if "codebook/used" in events.Tags()["scalars"]:
            return events
    raise ValueError(f"{flag} {path}: the folder has no logs of VQ-VAE.py, or its run has not finished an epoch")


def read_scalars(events, tag):
    """Steps and values of a tag, as two arrays."""
    return np.array([(event.step, event.value) for event in events.Scalars(tag)]).T


def read_code_counts(events):
    """How often each code was used on the test set, after the last epoch: (K,), from the projector's table."""
    path = max(Path(events.path).glob("*/codebook/metadata.tsv"), default=None)
    if path is None:
        raise ValueError(f"{events.path} has no codebook in the projector: its run has not finished")
    return np.loadtxt(path, skiprows=1, dtype=int, ndmin=2)[:, 1]


def read_images(events, tag):
    """{epoch: PIL image} of a tag, in mode L if its channels are equal, which a GIF stores exactly."""
    images = {}
    for event in events.Images(tag):
        image = Image.open(io.BytesIO(event.encoded_image_string)).convert("RGB")
        is_grey = len({channel.tobytes() for channel in image.split()}) == 1
        images[event.step] = image.convert("L") if is_grey else image
    return images


def visibly_different(images):
    """Of {epoch: image} the first, the last, and each that differs by MIN_CHANGE from the one kept before it."""
    pixels = {epoch: np.array(image, dtype=int) for epoch, image in images.items()}
    first, *others = images
    kept = [first]
    for epoch in others:
        if epoch == others[-1] or np.abs(pixels[epoch] - pixels[kept[-1]]).mean() >= MIN_CHANGE:
            kept.append(epoch)
    return {epoch: images[epoch] for epoch in kept}


# ---------------------------------------------------------------- pixels and labels

def enlarge(image, scale):
    """The image with each pixel repeated scale × scale times."""
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)


def label(text, width, height, size=LABEL_SIZE):
    """An image of the given width and height with the text in its middle, black on white."""
    box = Image.new("L", (width, height), "white")
    ImageDraw.Draw(box).multiline_text((width / 2, height / 2), text, fill="black", anchor="mm", align="center",
                                       font=ImageFont.truetype(FONT, size))
    return box


def to_uint8_array(images):
    """Images in [-1, 1] → uint8 arrays of the same shape."""
    return data.to_uint8(images).numpy()


# ---------------------------------------------------------------- the shipped model
# Letters: B images, H×W pixels, h×w codes of one map, p×p pixels of the patch of a code.

def draw_code_map(indices, patches):
    """Indices (h, w), each written on its patch, of patches (h, w, p, p) in [-1, 1]."""
    cell = patches.shape[-1] * CODES_SCALE
    pixels = to_uint8_array(patches.transpose(1, 2).flatten(2, 3).flatten(0, 1))                # (h·p, w·p)
    image = enlarge(Image.fromarray(pixels), CODES_SCALE).convert("RGB")
    drawing, font = ImageDraw.Draw(image), ImageFont.truetype(FONT, NUMBER_SIZE)
    for i, row in enumerate(indices.tolist()):
        for j, k in enumerate(row):
            x, y = j * cell, i * cell
            drawing.rectangle((x, y, x + cell - 1, y + cell - 1), outline=EDGE_COLOR)
            drawing.text((x + cell / 2, y + cell / 2), str(k), fill=NUMBER_COLOR, anchor="mm", font=font,
                         stroke_width=2, stroke_fill="black")
    return image


@torch.no_grad()
def draw_codes(model, images):
    """uint8 images (B, 1, H, W), below them their code maps, and below these their reconstructions."""
    x = data.to_model_range(images)
    indices = model.encode(x)                                         # (B, h, w)
    patches = code_patches(model, indices, *indices.shape[1:])[:, :, :, 0]          # (B, h, w, p, p)
    plain = [[enlarge(Image.fromarray(pixels), CODES_SCALE) for pixels in to_uint8_array(batch[:, 0])]
             for batch in (x, model.decode(indices))]
    rows = plain[0], [draw_code_map(*pair) for pair in zip(indices, patches)], plain[1]
    side, caption_height = plain[0][0].width, 2 * CODES_GAP
    width = len(images) * (side + CODES_GAP) + CODES_GAP
    picture = Image.new("RGB", (width, len(rows) * (caption_height + side) + CODES_GAP), "white")
    for i, (caption, row) in enumerate(zip(CODES_CAPTIONS, rows)):
        y = i * (caption_height + side)
        picture.paste(label(caption, width, caption_height), (0, y))
        for j, image in enumerate(row):
            picture.paste(image, (CODES_GAP + j * (side + CODES_GAP), y + caption_height))
    return picture


@torch.no_grad()
def draw_samples(model, prior):
    """The hundred digits of generate.py --input prior, ten of each class, a row a class."""
    maps = samples.sample_maps(prior, samples.balanced_labels(prior.num_classes, 10 * prior.num_classes),
                               {"temperature": 1.0, "top_k": None, "guidance": 1.0},
                               torch.Generator().manual_seed(0))
    pixels = data.grid(data.to_uint8(model.decode(maps)), columns=10, padding=GRID_PADDING)[0].numpy()
    grid = enlarge(Image.fromarray(pixels), GRID_SCALE)
    margin = side = grid.height // prior.num_classes
    picture = Image.new("L", (margin + grid.width, margin + grid.height), "white")
    picture.paste(label(SAMPLES_CAPTION, grid.width, margin), (margin, 0))
    picture.paste(grid, (margin, margin))
    for i in range(prior.num_classes):
        picture.paste(label(str(i), margin, side), (0, margin + i * side))
    return picture


# ---------------------------------------------------------------- digits by epoch

def digits_by_epoch(events):
    """The first rows of test digits, then their reconstructions after some epochs, one below the other."""
    images = {"original": read_images(events, "images/original")[0]}
    images |= {f"reconstruction,\nepoch {epoch}": image for epoch, image
               in visibly_different(read_images(events, "images/reconstruction")).items()}
    original = images["original"]
    # The rows with half of the padding around them, so that all digits are equally far apart.
    top, height, margin = GRID_PADDING // 2, GRID_ROWS * (original.width // GRID_COLUMNS), 9 * LABEL_SIZE
    rows = [enlarge(image.crop((0, top, image.width, top + height)), GRID_SCALE) for image in images.values()]
    step = rows[0].height + ROW_GAP
    picture = Image.new(original.mode, (margin + rows[0].width, len(rows) * step - ROW_GAP), "white")
    for i, (name, row) in enumerate(zip(images, rows)):
        picture.paste(label(name, margin, row.height), (0, i * step))
        picture.paste(row, (margin, i * step))
    return picture


def digits_as_frames(events):
    """For some epochs, the original digits on the left and their reconstructions on the right."""
    original = enlarge(read_images(events, "images/original")[0], GRID_SCALE)
    (width, height), gap, header = original.size, 20, 2 * LABEL_SIZE
    frames = []
    for epoch, image in visibly_different(read_images(events, "images/reconstruction")).items():
        frame = Image.new(original.mode, (2 * width + gap, height + header), "white")
        frame.paste(label("original", width, header), (0, 0))
        frame.paste(label(f"reconstruction, epoch {epoch}", width, header), (width + gap, 0))
        frame.paste(original, (0, header))
        frame.paste(enlarge(image, GRID_SCALE), (width + gap, header))
        frames.append(frame)
    return frames


# ---------------------------------------------------------------- curves

@matplotlib.rc_context(CURVES)
def draw_losses(events):
    """The losses by epoch: of the training set at every logged step, of the test set after each epoch."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 2)
    tests = events.Scalars("loss/test/total")
    # The x axis counts images, in older logs steps. An interrupted run has training steps after its last test.
    epoch = max(event.step for event in events.Scalars("loss/train/total")
                if event.wall_time <= tests[-1].wall_time) / len(tests)
    for panel, (name, title) in zip(panels, LOSS_TITLES.items()):
        positions, values = read_scalars(events, f"loss/train/{name}")
        panel.plot(positions / epoch, values, color=BLUE, alpha=0.6, linewidth=1, label="training")
        panel.plot(np.arange(1, len(tests) + 1), read_scalars(events, f"loss/test/{name}")[1], color=ORANGE,
                   marker="o", markersize=4, label="test")
        panel.set(title=title, xlabel="epoch", ylabel="loss (log scale)", yscale="log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.legend(frameon=False)
    return figure


@matplotlib.rc_context(CURVES)
def draw_code_use(published, ours):
    """Codes used on the test set by epoch, and for both runs how often each of the K codes is, at the end."""
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    by_epoch, *by_code = figure.subplots(1, 3)
    by_code[1].sharey(by_code[0])
    for events, panel, name, title, color in (
            (published, by_code[0], "published", "Published codebook\n(uniform, no restarts)", GREY),
            (ours, by_code[1], "this repository", "This repository\n(K-means and restarts)", BLUE)):
        by_epoch.plot(*read_scalars(events, "codebook/used"), color=color, marker="o", markersize=4, label=name)
        counts = np.sort(read_code_counts(events))[::-1]
        used = int((counts > 0).sum())
        dead, codes = len(counts) - used, np.arange(1, len(counts) + 1)
        panel.plot(codes[:used], counts[:used], color=color, linewidth=2.5, label=f"{used} codes used")
        panel.plot(codes[used:], counts[used:], color=ORANGE, linestyle="none", marker="s", markersize=5,
                   label=f"{dead} dead {'code' if dead == 1 else 'codes'}")
        panel.set_yscale("symlog", linthresh=1)             # logarithmic from 1 on, with 0 below
        panel.set(title=title, xlabel="codes, most used first")
        panel.legend(frameon=False)
    by_epoch.set(title="Codes used on the test set", xlabel="epoch", ylabel="codes", ylim=(0, None))
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.legend(frameon=False, loc="center right")
    by_code[0].set(ylabel="uses on the test set (log scale)", ylim=(-0.4, None))
    return figure


@matplotlib.rc_context(CURVES)
def draw_quantizers(figures):
    """The error of each quantizer against the nats of its prior. figures: as read_quantizers() returns them."""
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    panel = figure.subplots()
    positions = {name: (nats["mean"], mse["mean"]) for name, (nats, mse) in figures.items()}
    first, *_, last = sorted(nats for nats, _ in positions.values())
    for name, (nats, mse) in positions.items():
        panel.errorbar(nats, mse, yerr=figures[name][1]["std"], color=BLUE, marker="o", capsize=3)
        # To the left of its point, if another one or the edge is near on the right.
        is_left = nats > last - 0.2 * (last - first) or any(
            0 < other - nats < 0.3 * (last - first) and abs(error / mse - 1) < 0.06
            for other, error in positions.values())
        panel.annotate(name, (nats, mse), xytext=(-6 if is_left else 6, 4), textcoords="offset points",
                       ha="right" if is_left else "left")
    panel.set(xlabel="nats per map of a short prior, on the test set (fewer: easier to model)",
              ylabel="test MSE on [−1, 1] (log scale)", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)))
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_locator(NullLocator())
    return figure


def read_quantizers(path):
    """{name: (nats, mse)} of a file of docs/results, each {"mean", "std", "n"}. Raises ValueError if it has none."""
    try:
        figures = json.loads(path.read_bytes())["figures"]
        if not (names := [key.split(maxsplit=1)[1] for key in figures if key.startswith("compared_mse ")]):
            raise KeyError("compared_mse")
        return {name: tuple(figures[f"compared_{kind} {name}"] for kind in ("nats", "mse")) for name in names}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"--quantizers {path}: not what benchmarks/reproduce.py has measured of the row quantizers "
                         f"({cli.describe_error(error)})") from error


# ---------------------------------------------------------------- main

def is_picture(path):
    """Whether the file at a path is a PNG or a GIF file, by its first bytes."""
    with open(path, "rb") as file:
        return file.read(8).startswith((image_file.PNG_SIGNATURE, b"GIF8"))


def encoded(save, **options):
    """The bytes that save(file, **options) writes."""
    file = io.BytesIO()
    save(file, **options)
    return file.getvalue()


def draw(args):
    with cli.errors_name_flag("--folder", args.folder):
        outputs = {name: files.OutputFile(args.folder / name, args.overwrite, "a picture", is_picture,
                                          " or choose another folder") for name in NAMES}
        for output in outputs.values():
            output.check()
    run, published, ours = (read_logs(f"--{name}", getattr(args, name)) for name in ("run", "published", "ours"))
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    prior, _ = checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, checkpoint.PRETRAINED)
    _, test_set = data.load("MNIST-10k", "MNIST")
    pictures = {"codes.png": draw_codes(model, test_set.images[list(TEST_DIGITS)]),
                "samples.png": draw_samples(model, prior), "digits-by-epoch.png": digits_by_epoch(run)}
    figures = {"losses.png": draw_losses(run), "code-use.png": draw_code_use(published, ours),
               "quantizers.png": draw_quantizers(read_quantizers(args.quantizers))}
    first, *others = digits_as_frames(run)
    contents = {name: encoded(picture.save, format="PNG", optimize=True) for name, picture in pictures.items()}
    contents |= {name: encoded(figure.savefig, format="png") for name, figure in figures.items()}
    contents["digits-by-epoch.gif"] = encoded(first.save, format="GIF", save_all=True, append_images=others,
                                              duration=FRAME_MS, loop=0)
    with cli.errors_name_flag("--folder", args.folder):
        for name, output in outputs.items():
            output.write(contents[name])
            print(output.path)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        draw(args)


if __name__ == "__main__":
    main()
