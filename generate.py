"""Write a 10×10 grid of images: python3 generate.py [--model models/NAME/best.pt] [--input random] ...

`--input test` reconstructs 100 test images of the model's data set, `--input PATH` your own image or up to 100 images
of a folder; with --originals there are at most 50, each row below its originals. `--complete 3` keeps the upper three
rows of codes of ten such images, and has the prior draw the others. `--input prior` samples new images from the prior,
equally many of each class (for digits, row i shows digit i), and `--input random` decodes Gaussian noise, quantized.
Without --model it uses the shipped one.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

import argparse
import os
from pathlib import Path

from utils import arguments, cli

ROWS = 10
INPUTS = "test", "MNIST", "random", "prior"          # MNIST is the published name of the first
FOLDER = "generatedImages"


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)
    parser.add_argument("--input", type=input_source, default="test", metavar="WHAT",
                        help="test for test images (MNIST means the same), random for noise, prior for new images, "
                             f"or the path of an image or of a folder of images {shown}")
    parser.add_argument("--filename", type=arguments.name_inside(FOLDER), metavar="NAME",
                        help=f"writes {FOLDER}/NAME.png (default: the input's or the data set's name)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace a picture of that name (default: leave it unchanged and stop)")
    parser.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                        help=f"seed of the choice of test images, of the noise, or of the samples {shown}")
    parser.add_argument("--originals", action="store_true",
                        help="with images as input: a row of ten originals above each row of reconstructions, "
                             "at most fifty (default: only reconstructions)")
    parser.add_argument("--invert", action="store_true",
                        help="with your own images as input: dark becomes light, for ink on paper and a model that "
                             "learned light on dark, as MNIST is (default: images as they are)")
    group = parser.add_argument_group("with --input prior or --complete")
    group.add_argument("--complete", type=arguments.integer(0), metavar="ROWS",
                       help="with images as input: keep the upper ROWS rows of each image's code map and sample the "
                            "others; writes a row for each of ten images, the image itself and ten completions of it "
                            "(default: only reconstructions)")
    cli.add_sampling_arguments(group, without="prior.pt beside the model")
    group.add_argument("--label", metavar="CLASS",
                       help="sample only this class, by its number or its name (default: equally many of each; with "
                            "--complete no class, so that the codes kept alone decide)")
    return parser


def input_source(text):
    """A type for --input: one of INPUTS, or else a path. An existing path is none of them in other letters."""
    if text not in INPUTS and os.path.exists(text):
        return Path(text)
    try:
        return arguments.one_of(*INPUTS)(text)
    except argparse.ArgumentTypeError:
        return Path(arguments.file_name(text))


def check_arguments(parser, args):
    """End with an error if arguments contradict each other."""
    if args.input != "prior" and args.complete is None:
        parser.check_unused(args, (*cli.SAMPLING_ARGUMENTS, "label"),
                            "is used only with --input prior or --complete, add one of them")
    if args.complete is not None:
        parser.check_unused(args, ("originals",), "has no effect with --complete, which shows them: leave it out")
        if args.label is None:
            parser.check_unused(args, ("guidance",), "needs a class, add one with --label")
    if args.input in ("random", "prior"):
        parser.check_unused(args, ("originals", "complete"), f"is used with images as --input, not with {args.input}")
    if not isinstance(args.input, Path):
        parser.check_unused(args, ("invert",), f"is used with the path of images as --input, not with {args.input}")
    if args.input not in ("test", "MNIST"):
        parser.check_unused(args, ("dataset", "data_folder", "num_workers"),
                            f"is used with --input test, not with {args.input}")
    if isinstance(args.input, Path) and not os.path.exists(args.input):
        hint = arguments.did_you_mean(str(args.input), INPUTS).strip()
        parser.error(f"--input {str(args.input)!r} is none of {', '.join(INPUTS)}, and there is no such file or folder"
                     + f": {hint}" * bool(hint))


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import sys

import torch
from torch.utils.data import Subset
from tqdm import tqdm

import data
from data import code_maps, image_file, image_folder
from metrics import samples
from utils import files, inputs
from utils.memory import images_that_fit


def test_images(args, contents, path, count, generator):
    """Images of the test set, chosen by generator: uint8 (count, C, H, W)."""
    dataset, _, test_set = inputs.open_data(args, contents)
    if test_set.shape != contents["dataset"]["shape"]:
        raise ValueError(f"--model {path} --dataset {dataset}: the model's images are {contents['dataset']['shape']}, "
                         f"those of the data set {test_set.shape}")
    if note := data.seen_in_training(contents["dataset"]["name"], dataset)[1]:
        print(note, file=sys.stderr)
    rows = torch.randperm(len(test_set), generator=generator)[:count].tolist()
    batches = data.batches(Subset(test_set, rows), ROWS, num_workers=args.num_workers)
    return torch.cat([images for images, _ in batches])


def own_images(path, shape, max_images, generator):
    """The image at a path, or up to max_images of those in a folder, chosen by generator: uint8 (B, C, H, W)."""
    C, H, W = shape
    with cli.errors_name_flag("--input", path):
        if not path.is_dir() and not path.is_file():
            raise ValueError("it is neither a regular file nor a folder")
        if not path.is_dir():
            return image_file.read_image(path, H, W, C).unsqueeze(0)

        def read(file):
            try:
                return image_file.read_image(file, H, W, C)
            except (ValueError, PermissionError) as error:          # a folder may hold other things too
                return error

        paths, images = image_folder.list_files(path), []
        order = torch.randperm(len(paths), generator=generator).tolist()
        while order and len(images) < max_images:
            count = max_images - len(images)
            for image in image_folder.map_in_threads(read, [paths[row] for row in order[:count]]):
                if isinstance(image, Exception):
                    print(f"left out: {cli.printable(cli.describe_error(image))}", file=sys.stderr)
                else:
                    images.append(image)
            order = order[count:]
        if not images:
            raise ValueError("there is no image in it that can be used")
        return torch.stack(images)


def report_light_backgrounds(images, path):
    """Print in one line how many of uint8 images (B, C, H, W), those at a path, are dark on a light background.

    The background is the median at an image's borders.
    """
    borders = torch.cat([images[:, :, [0, -1]].flatten(1), images[..., [0, -1]].flatten(1)], dim=1)
    background = borders.median(dim=1).values                                                   # (B,)
    count = int(((background > 127) & (images.flatten(1).double().mean(dim=1) < background)).sum())
    if count:
        which = f"{count} of {len(images)} images in {path}" if path.is_dir() else path
        print(cli.printable(f"{which}: dark on a light background, while the model learned light on dark: try "
                            "--invert, with --overwrite or another --filename"), file=sys.stderr)


def interleaved(originals, reconstructions):
    """Rows of ten originals, each above the row of its reconstructions, the last ones filled up with black images; one
    row of each if there are fewer than ten.
    """
    count = min(len(originals), ROWS**2 // 2)
    columns = min(ROWS, count)
    pairs = torch.stack([originals[:count], reconstructions[:count]])                 # (2, count, C, H, W)
    pairs = torch.cat([pairs, torch.zeros_like(pairs[:, :1]).expand(-1, -count % columns, -1, -1, -1)], dim=1)
    return pairs.unflatten(1, (-1, columns)).transpose(0, 1).flatten(0, 2)


def sample_prior(model, contents, generator, args):
    """100 code maps (100, h, w) from the prior: equally many of each class, or all of args.label."""
    prior, prior_contents, _ = inputs.open_prior(args, model, contents)
    labels = samples.balanced_labels(prior.num_classes, ROWS**2)
    if args.label is not None:
        labels = torch.full((ROWS**2,), class_number(args.label, prior_contents["classes"]))
    with tqdm(total=len(labels), desc="sampling", unit="img", leave=False, disable=None) as bar:
        return samples.sample_maps(prior, labels, cli.sampling_arguments(args), generator, bar)


def open_completing_prior(model, contents, args):
    """→ the prior, and the class of all completions.

    Raises ValueError if its maps have less than args.complete rows, or it needs a class and none is given.
    """
    prior, prior_contents, path = inputs.open_prior(args, model, contents)
    if args.complete > prior.height:
        raise ValueError(f"--complete {args.complete}: the model's code maps have {prior.height} rows")
    if args.label is None and not prior.drop_label:
        raise ValueError(f"--complete {args.complete}: the prior in {path} was trained with --drop-label 0 and knows "
                         "no images without a class: give one with --label")
    return prior, prior.num_classes if args.label is None else class_number(args.label, prior_contents["classes"])


def complete(model, prior, label, images, generator, args):
    """Each of uint8 images (B, C, H, W), followed by ten completions of it: (11·B, C, H, W).

    They have the codes of the image in the upper args.complete rows, and others from the prior below.
    """
    batches = images.split(images_that_fit(*images.shape[2:], model.quantizer.dim))
    maps = code_maps.encode(model, [(batch, None) for batch in batches], args.device)           # (B, h, w)
    maps = maps.repeat_interleave(ROWS, dim=0)                                                  # (10·B, h, w)
    given = maps.flatten(1)[:, :args.complete * prior.width]
    with tqdm(total=len(maps), desc="sampling", unit="img", leave=False, disable=None) as bar:
        maps = samples.sample_maps(prior, torch.full((len(maps),), label), cli.sampling_arguments(args), generator, bar,
                                   given)
    completed = code_maps.decode(model, maps)
    return torch.cat([images.unsqueeze(1), completed.unflatten(0, (-1, ROWS))], dim=1).flatten(0, 1)


def reconstruct(model, images, args):
    """uint8 images (B, C, H, W) → their reconstructions, with --originals those as well."""
    batch_size = images_that_fit(*images.shape[2:], model.quantizer.dim)
    reconstructions = torch.cat([data.to_uint8(model(data.to_model_range(batch, args.device)).reconstruction)
                                 for batch in images.split(batch_size)])
    return interleaved(images, reconstructions) if args.originals else reconstructions


def class_number(text, classes):
    """The class with this name or number. Raises ValueError if there is none."""
    if text in classes:
        return classes.index(text)
    is_number = text.isdecimal() and len(text) < 10 and not any(name.isdecimal() for name in classes)
    if is_number and int(text) < len(classes):
        return int(text)
    known = ", ".join(classes[:100])
    raise ValueError(f"--label {text[:50]}: the prior knows the classes 0 to {len(classes) - 1}: {known}")


def input_images(args, contents, path, generator):
    """The images that --input names, as the model is to see them: uint8 (B, C, H, W)."""
    max_images = ROWS**2 if args.complete is None else ROWS
    if not isinstance(args.input, Path):
        return test_images(args, contents, path, max_images, generator)
    images = own_images(args.input, contents["dataset"]["shape"], max_images, generator)
    if args.invert:
        return 255 - images
    if contents["dataset"]["name"] in data.LIGHT_ON_DARK:
        report_light_backgrounds(images, args.input)
    return images


def default_name(args, contents):
    """A name for the picture: that of what it shows."""
    if args.input in ("random", "prior"):
        return args.input
    if not isinstance(args.input, Path):
        return args.dataset or contents["dataset"]["name"]
    absolute = args.input.resolve()
    return (absolute.name if absolute.is_dir() else absolute.stem) or "images"


@torch.no_grad()
def generate(args):
    args.device = inputs.find_device(args.device)
    model, contents, path = inputs.open_model(args)
    name = args.filename or default_name(args, contents)
    picture = files.OutputFile(Path(FOLDER, name if Path(name).suffix.lower() == ".png" else f"{name}.png"),
                               args.overwrite, "a PNG file", image_file.is_png, " or choose another --filename")
    with cli.errors_name_flag("--filename", name):
        check_picture(picture, args.input)
    generator = torch.Generator().manual_seed(args.seed)        # on the CPU: the same on every device
    if args.input in ("random", "prior"):
        map_size = model.map_size(*contents["dataset"]["shape"][1:])
        maps = (sample_prior(model, contents, generator, args) if args.input == "prior" else
                samples.noise_maps(model, ROWS**2, *map_size, generator, args.device))
        images = code_maps.decode(model, maps)
    else:
        prior = None if args.complete is None else open_completing_prior(model, contents, args)
        images = input_images(args, contents, path, generator)
        images = complete(model, *prior, images, generator, args) if prior else reconstruct(model, images, args)
    columns = ROWS if args.complete is None else 1 + ROWS
    png = image_file.as_png(data.grid(images, min(columns, len(images) // 2) if args.originals else columns))
    with cli.errors_name_flag("--filename", name):
        picture.write(png)
    print(picture.path)


def check_picture(picture, source):
    """Raise ValueError if the picture, an OutputFile, could not be written, or is one of those read from source."""
    picture.check()
    if isinstance(source, Path) and picture.path.exists():
        own = picture.path.resolve()
        if source.resolve() in (own, *own.parents):
            raise ValueError(f"{picture.path}: is in --input {source}, choose another name")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        generate(args)


if __name__ == "__main__":
    main()
