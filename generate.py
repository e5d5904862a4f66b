"""Write a 10×10 grid of images: python3 generate.py [--model models/NAME/best.pt] [--input random] ...

`--input test` reconstructs 100 test images of the model's data set, and the path of an image or of a folder your own;
with --originals at most 50 of them, each row below its originals. `--input prior` draws new images from the learned
prior, as many of each class (of digits, row i is the digit i), and `--input random` decodes Gaussian noise, quantized.
Without --model it uses the shipped one.
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

import argparse
from pathlib import Path

import arguments
import cli

ROWS = 10
INPUTS = "test", "MNIST", "random", "prior"          # MNIST is the published name of the first
FOLDER = "generatedImages"


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)
    parser.add_argument("--input", type=what_to_draw, default="test", metavar="WHAT",
                        help="test for test images (MNIST says the same), random for noise, prior for new images, "
                             f"or the path of an image or of a folder of images {shown}")
    parser.add_argument("--filename", type=arguments.name_inside(FOLDER), metavar="NAME",
                        help=f"writes {FOLDER}/NAME.png (default: the input's or the data set's name)")
    parser.add_argument("--seed", type=arguments.whole_number(0), default=0, metavar="N",
                        help=f"seed of the choice of test images, of the noise, or of the new digits {shown}")
    parser.add_argument("--originals", action="store_true",
                        help="with images as input: a row of ten originals above each row of their reconstructions, "
                             "at most fifty (default: only reconstructions)")
    group = parser.add_argument_group("with --input prior")
    cli.add_sampling_arguments(group, without="prior.pt beside the model")
    group.add_argument("--label", metavar="CLASS",
                       help="draw only this class, by its number or its name (default: as many of each)")
    return parser


def what_to_draw(text):
    """A type for --input: one of INPUTS, or else a path."""
    try:
        return arguments.one_of(*INPUTS)(text)
    except argparse.ArgumentTypeError:
        return Path(arguments.file_name(text))


def parse_arguments(argv=None):
    """The parser and its arguments, held against each other."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.input != "prior":
        parser.check_unused(args, (*cli.SAMPLING, "label"), "is used only with --input prior, add it")
    if args.input in ("random", "prior"):
        parser.check_unused(args, ("originals",), f"is used with images as --input, not with {args.input}")
    if args.input not in ("test", "MNIST"):
        parser.check_unused(args, ("dataset", "data_folder", "num_workers"),
                            f"is used with --input test, not with {args.input}")
    if isinstance(args.input, Path) and not args.input.exists():
        hint = arguments.did_you_mean(str(args.input), INPUTS).strip()
        parser.error(f"--input {str(args.input)!r} is none of {', '.join(INPUTS)}, and there is no such file or folder"
                     + f": {hint}" * bool(hint))
    return parser, args


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before torch is imported, which takes seconds

import io
import sys

import torch
from PIL import Image

import data
import image_folder
import inputs
import quality
from files import write_whole


def test_images(args, contents, path, generator):
    """100 images of the test set, chosen by generator: uint8 (100, C, H, W), and the data set's name."""
    dataset, _, test_set = inputs.open_data(args, contents)
    if test_set.shape != contents["dataset"]["shape"]:
        raise ValueError(f"--model {path} --dataset {dataset}: the model's images are {contents['dataset']['shape']}, "
                         f"those of the data set {test_set.shape}")
    return test_set[torch.randperm(len(test_set), generator=generator)[:ROWS**2]][0], dataset


def own_images(path, shape, generator):
    """The image at a path, or up to 100 of those in a folder, chosen by generator: uint8 (B, C, H, W)."""
    C, H, W = shape
    with cli.named("--input", path):
        if not path.is_dir():
            return image_folder.read(path, H, W, C).unsqueeze(0)
        paths, images = image_folder.files_in(path), []
        for row in torch.randperm(len(paths), generator=generator).tolist():
            try:
                images.append(image_folder.read(paths[row], H, W, C))
            except ValueError as error:         # a folder may hold other things too
                print(f"left out: {error}", file=sys.stderr)
            if len(images) == ROWS**2:
                break
        if not images:
            raise ValueError("there is no image in it that Pillow can read")
        return torch.stack(images)


def interleaved(originals, reconstructions):
    """Rows of ten originals, each above the row of their reconstructions; or one row of each, if there are no ten."""
    columns = min(ROWS, len(originals))
    count = min(len(originals) // columns * columns, ROWS**2 // 2)
    pairs = torch.stack([originals[:count], reconstructions[:count]])                 # (2, count, C, H, W)
    return pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)


def draw(path, generator, args):
    """100 code maps (100, h, w) from the prior: as many of each class, or all of them args.label."""
    prior, classes, _ = inputs.open_prior(args, path)
    labels = quality.spread_labels(prior.num_classes, ROWS**2)
    if args.label is not None:
        labels = torch.full((ROWS**2,), class_number(args.label, classes))
    return quality.sampled_maps(prior, labels, cli.sampling(args), generator, args.device)


def class_number(text, classes):
    """The class that a name or a number stands for. Raises ValueError if there is none."""
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes) and not any(name.isdecimal() for name in classes):
        return int(text)
    known = ", ".join(classes[:100])
    raise ValueError(f"--label {text}: the prior knows the classes 0 to {len(classes) - 1}: {known}")


@torch.no_grad()
def generate(args):
    args.device = inputs.find_device(args.device)
    model, contents, path = inputs.open_model(args)
    generator = torch.Generator().manual_seed(args.seed)        # on the CPU: the same on every device
    shape, name = contents["dataset"]["shape"], args.input
    if args.input in ("random", "prior"):
        _, H, W = shape
        maps = (draw(path, generator, args) if args.input == "prior" else
                quality.noise_maps(model, ROWS**2, H // 4, W // 4, generator, args.device))
        images = torch.cat([*quality.decoded(model, maps, args.device)])
    else:
        if isinstance(args.input, Path):
            images, name = own_images(args.input, shape, generator), args.input.resolve()
            name = (name.name if name.is_dir() else name.stem) or "images"
        else:
            images, name = test_images(args, contents, path, generator)
        images = data.to_model_range(images, args.device)
        reconstructions = model(images).reconstruction
        images = interleaved(images, reconstructions) if args.originals else reconstructions

    name = args.filename or name
    path = Path(FOLDER, name if Path(name).suffix.lower() == ".png" else f"{name}.png")
    with cli.named("--filename", name):
        is_read = isinstance(args.input, Path) and args.input.resolve() in (path.resolve(), *path.resolve().parents)
        if is_read and path.exists():
            raise ValueError(f"{path} is there already, in --input {args.input}: choose another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        columns = len(images) // 2 if args.originals else ROWS
        pixels = data.grid(images.cpu(), min(ROWS, columns)).mul(255).round().byte()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(picture, format="png")
        write_whole(path, picture.getbuffer())
    print(path)


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line():
        generate(args)


if __name__ == "__main__":
    main()
