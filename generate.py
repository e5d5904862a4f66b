"""Write a 10×10 grid of images: python3 generate.py [--model models/NAME/best.pt] [--input random] ...

`--input prior` draws new digits from the learned prior, row i the digit i; `--input MNIST` reconstructs 100 test
images, or with --originals 50 under their originals; `--input random` decodes Gaussian noise, quantized. Without
--model it uses the shipped one.
"""

import io
from pathlib import Path

import torch
from torchvision.utils import save_image

import cli
import data
import quality
from files import write_whole

ROWS = 10
FOLDER = "generatedImages"


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)
    parser.add_argument("--input", type=cli.one_of("MNIST", "random", "prior"), default="MNIST", metavar="WHAT",
                        help=f"MNIST for test images, random for noise, or prior for new digits {shown}")
    parser.add_argument("--filename", type=cli.name_inside(FOLDER), metavar="NAME",
                        help=f"writes {FOLDER}/NAME.png (default: the input's name)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N",
                        help=f"seed of the choice of test images, of the noise, or of the new digits {shown}")
    parser.add_argument("--originals", action="store_true",
                        help="with --input MNIST: a row of ten originals above each row of their reconstructions "
                             "(default: reconstructions alone)")
    group = parser.add_argument_group("with --input prior")
    cli.add_sampling_arguments(group, without="prior.pt beside the model")
    group.add_argument("--label", type=cli.whole_number(0), metavar="DIGIT",
                       help="draw this digit alone (default: row i holds digit i)")
    return parser


def reconstruct(model, dataset, generator, args):
    """100 test images drawn by generator, encoded and decoded: (100, C, H, W) in [-1, 1].

    With --originals the first 50 of them: ten originals, their ten reconstructions, the next ten originals, …
    """
    chosen = torch.randperm(len(dataset), generator=generator)[:ROWS**2]
    if not args.originals:
        return model(data.to_model_range(dataset.images[chosen], args.device)).reconstruction
    x = data.to_model_range(dataset.images[chosen[:ROWS**2 // 2]], args.device)       # (50, C, H, W)
    return torch.stack([x, model(x).reconstruction]).unflatten(1, (-1, ROWS)).transpose(0, 1).flatten(0, 2)


def draw_digits(model, path, generator, args):
    """100 new images from the prior: row i the digit i, or all of them args.label. (100, C, H, W) in [-1, 1]."""
    prior, _ = cli.open_prior(args, path)
    if args.label is not None and args.label >= prior.num_classes:
        raise ValueError(f"--label {args.label}: the prior knows the digits 0 to {prior.num_classes - 1}")
    labels = torch.arange(ROWS).repeat_interleave(ROWS) if args.label is None else torch.full((ROWS**2,), args.label)
    return model.decode(prior.sample(labels.to(args.device), **cli.sampling(args), generator=generator))


@torch.no_grad()
def generate(args):
    model, contents, path = cli.open_model(args)
    generator = torch.Generator().manual_seed(args.seed)        # on the CPU: the same on every device
    if args.input == "prior":
        images = draw_digits(model, path, generator, args)
    elif args.input == "random":
        _, H, W = contents["dataset"]["shape"]
        images = model.decode(quality.noise_maps(model, ROWS**2, H // 4, W // 4, generator, args.device))
    else:
        dataset, _, test_set = cli.open_data(args, contents)
        with cli.named(f"--model {path} --dataset", dataset):
            images = reconstruct(model, test_set, generator, args)

    name = args.filename or args.input
    path = Path(FOLDER, name if Path(name).suffix.lower() == ".png" else f"{name}.png")
    with cli.named("--filename", name):
        path.parent.mkdir(parents=True, exist_ok=True)
        picture = io.BytesIO()
        save_image(data.to_unit_range(images), picture, format="png", nrow=ROWS)
        write_whole(path, picture.getbuffer())
    print(path)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.input != "prior":
        parser.check_unused(args, (*cli.SAMPLING, "label"), "is used with --input prior alone, add it")
    if args.input != "MNIST":
        parser.check_unused(args, ("originals",), f"is used with --input MNIST, not {args.input}")
    with parser.bad_input_in_one_line():
        generate(args)


if __name__ == "__main__":
    main()
