"""Draw the README's pictures from the logs of finished runs: python3 figures.py [--run logs/NAME] ...

Writes digits-by-epoch.png, digits-by-epoch.gif and losses.png of one run, and code-use.png, which sets a run with
the published codebook (uniform, no restarts) beside one with this repository's.
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

from pathlib import Path

import cli

LOGS = Path("logs_VQ-VAE")


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("--run", type=Path, default=LOGS / "recommended", metavar="PATH",
                        help=f"logs of the run to draw {shown}")
    parser.add_argument("--published", type=Path, default=LOGS / "published", metavar="PATH",
                        help=f"logs of a run with --codebook-init uniform --restart-after 0 {shown}")
    parser.add_argument("--ours", type=Path, default=LOGS / "defaults", metavar="PATH",
                        help=f"logs of a run with the same flags but these two {shown}")
    parser.add_argument("--folder", type=Path, default=Path("readme_images"), metavar="PATH",
                        help=f"where the pictures go; made if it is not there {shown}")
    return parser


def parse_arguments(argv=None):
    """The parser and its arguments."""
    parser = get_parser()
    return parser, parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before the rest is imported, which takes seconds

import io

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tracking import IMAGE_PADDING, SHOWN_IN_A_ROW

ROWS = 2                        # of TensorBoard's grid of digits, for each epoch of the still picture
FRAME_MS = 700
BLUE, ORANGE, GREY = "#0072b2", "#d55e00", "#777777"        # told apart with any colour vision


# ---------------------------------------------------------------- reading the logs

def read_logs(flag, path):
    """The events of a run. Raises ValueError, naming the flag, if the folder holds none of a whole epoch."""
    if path.is_dir():
        events = EventAccumulator(str(path), size_guidance={"scalars": 0, "images": 0, "histograms": 0}).Reload()
        if "codebook/use" in events.Tags()["histograms"]:           # the last thing logged in an epoch, but images
            return events
    raise ValueError(f"{flag} {path}: there are no logs of a run of VQ-VAE.py, or it has no whole epoch yet")


def scalars(events, tag):
    """Steps and values of a tag, as two arrays."""
    return np.array([(event.step, event.value) for event in events.Scalars(tag)]).T


def pictures(events, tag):
    """{epoch: PIL image} of a tag."""
    return {event.step: Image.open(io.BytesIO(event.encoded_image_string)) for event in events.Images(tag)}


# ---------------------------------------------------------------- digits

def label(name, width, height):
    """The name in black on white, at the right end of a box of that many pixels."""
    box = Image.new("RGB", (width, height), "white")
    ImageDraw.Draw(box).text((width - 6, height / 2), name, fill="black", anchor="rm")
    return box


def digits_by_epoch(events):
    """The first rows of test digits, then their reconstructions after each epoch, one below the other."""
    shown = {"original": pictures(events, "images/original")[0]}
    shown |= {f"epoch {epoch}": picture for epoch, picture in pictures(events, "images/reconstruction").items()}
    width, side = shown["original"].size[0], shown["original"].size[0] // SHOWN_IN_A_ROW
    height, names = ROWS * side, 64
    still = Image.new("RGB", (names + width, height * len(shown)), "white")
    for i, (name, picture) in enumerate(shown.items()):
        still.paste(label(name, names, height), (0, i * height))
        still.paste(picture.crop((0, IMAGE_PADDING // 2, width, IMAGE_PADDING // 2 + height)), (names, i * height))
    return still


def digits_as_frames(events):
    """For each epoch, the original digits on the left and their reconstructions on the right."""
    original, header = pictures(events, "images/original")[0], 20
    width, height = original.size
    frames = []
    for epoch, picture in pictures(events, "images/reconstruction").items():
        frame = Image.new("RGB", (2 * width + 10, height + header), "white")
        frame.paste(label("original", width, header), (0, 0))
        frame.paste(label(f"epoch {epoch}", width, header), (width + 10, 0))
        frame.paste(original, (0, header))
        frame.paste(picture, (width + 10, header))
        frames.append(frame)
    return frames


# ---------------------------------------------------------------- curves

def draw_losses(events):
    """The losses by epoch: training as it went, and test."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    panels = figure.subplots(1, 2)
    last = events.Scalars("loss/test/total")[-1]            # a run that was broken off has training steps after it
    steps_per_epoch = max(event.step for event in events.Scalars("loss/train/total")
                          if event.wall_time <= last.wall_time) / last.step
    for panel, name, title in ((panels[0], "reconstruction", "reconstruction loss"),
                               (panels[1], "codebook", "codebook loss; in value the commitment loss too")):
        steps, values = scalars(events, f"loss/train/{name}")
        panel.plot(steps / steps_per_epoch, values, color=BLUE, alpha=0.6, linewidth=0.8, label="train")
        panel.plot(*scalars(events, f"loss/test/{name}"), color=ORANGE, marker="o", markersize=3, label="test")
        panel.set(title=title, xlabel="epoch", yscale="log")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[0].legend(frameon=False)
    return figure


def draw_code_use(published, ours):
    """Codes used on the test set by epoch, and at the end how often each one is, the most used first."""
    figure = Figure(figsize=(10, 3), layout="constrained")
    by_epoch, by_code = figure.subplots(1, 2)
    for events, name, color in ((published, "uniform, no restarts (published)", GREY),
                                (ours, "K-means and restarts (ours)", BLUE)):
        by_epoch.plot(*scalars(events, "codebook/used"), color=color, marker="o", markersize=3, label=name)
        counts = np.array(events.Histograms("codebook/use")[-1].histogram_value.bucket)
        by_code.plot(100 * np.sort(counts)[::-1] / counts.sum(), color=color, drawstyle="steps-mid")
    by_epoch.set(title="codes used", xlabel="epoch", ylim=(0, None))
    by_epoch.xaxis.set_major_locator(MaxNLocator(integer=True))
    by_epoch.legend(frameon=False, loc="center right")
    by_code.set(title="how often each code is used", xlabel="codes, the most used first", ylabel="% of latents",
                yscale="log")
    return figure


def draw(args):
    run, published, ours = (read_logs(f"--{name}", getattr(args, name)) for name in ("run", "published", "ours"))
    still, (first, *others) = digits_by_epoch(run), digits_as_frames(run)
    losses, use = draw_losses(run), draw_code_use(published, ours)
    with cli.named("--folder", args.folder):
        args.folder.mkdir(parents=True, exist_ok=True)
        still.save(args.folder / "digits-by-epoch.png", optimize=True)
        first.save(args.folder / "digits-by-epoch.gif", save_all=True, append_images=others, duration=FRAME_MS, loop=0)
        losses.savefig(args.folder / "losses.png")
        use.savefig(args.folder / "code-use.png")
    for name in ("digits-by-epoch.png", "digits-by-epoch.gif", "losses.png", "code-use.png"):
        print(args.folder / name)


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line():
        draw(args)


if __name__ == "__main__":
    main()
