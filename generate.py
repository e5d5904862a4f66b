"""Write a 10×10 grid of images: python3 generate.py [--model models/NAME/best.pt] [--input random] ...

`--input prior` draws new digits from the learned prior, row i the digit i; `--input MNIST` reconstructs 100 test
images; `--input random` decodes Gaussian noise, quantized. Without --model it uses the shipped one.
"""

from pathlib import Path

import torch
from torchvision.utils import save_image

import checkpoint
import cli
import data

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
    group = parser.add_argument_group("with --input prior")
    group.add_argument("--prior", type=cli.file_name, metavar="PATH",
                       help="checkpoint of train_prior.py (default: prior.pt beside the model)")
    group.add_argument("--label", type=cli.whole_number(0), metavar="DIGIT",
                       help="draw this digit alone (default: row i holds digit i)")
    group.add_argument("--temperature", type=cli.number(above=0), default=1.0, metavar="T",
                       help=f"below 1 the probable codes become more probable {shown}")
    group.add_argument("--top-k", type=cli.whole_number(1), metavar="N",
                       help="draw from the N most probable codes alone (default: from all)")
    group.add_argument("--guidance", type=cli.number(minimum=0), default=1.0, metavar="G",
                       help=f"above 1 the digit weighs more, 1 is none {shown}")
    return parser


@torch.no_grad()
def reconstruct(model, dataset, generator, device):
    """100 test images drawn by generator, encoded and decoded: (100, C, H, W) in [-1, 1]."""
    chosen = torch.randperm(len(dataset), generator=generator)[:ROWS**2]
    return model(data.to_model_range(dataset.images[chosen], device)).reconstruction


@torch.no_grad()
def decode_noise(model, shape, generator, device):
    """z from a unit Gaussian (100, D, H/4, W/4), quantized and decoded: (100, C, H, W) in [-1, 1]."""
    _, H, W = shape
    z = torch.randn(ROWS**2, model.quantizer.dim, H // 4, W // 4, generator=generator)
    return model.decoder(model.quantizer(z.to(device)).z_q)


@torch.no_grad()
def draw_digits(model, path, generator, args):
    """100 new images from the prior: row i the digit i, or all of them args.label. (100, C, H, W) in [-1, 1]."""
    prior_path = args.prior or Path(path).with_name("prior.pt")
    with cli.named("--prior", prior_path):
        prior, _ = checkpoint.load_prior(prior_path, path, args.device)
    labels = torch.arange(ROWS).repeat_interleave(ROWS) if args.label is None else torch.full((ROWS**2,), args.label)
    if labels.max() >= prior.num_classes:
        raise ValueError(f"--label {args.label}: the prior knows the digits 0 to {prior.num_classes - 1}")
    return model.decode(prior.sample(labels.to(args.device), args.temperature, args.top_k, args.guidance, generator))


def generate(args):
    model, contents, path = cli.open_model(args)
    generator = torch.Generator().manual_seed(args.seed)        # on the CPU: the same on every device
    if args.input == "prior":
        images = draw_digits(model, path, generator, args)
    elif args.input == "random":
        images = decode_noise(model, contents["dataset"]["shape"], generator, args.device)
    else:
        dataset, _, test_set = cli.open_data(args, contents)
        with cli.named(f"--model {path} --dataset", dataset):
            images = reconstruct(model, test_set, generator, args.device)

    name = args.filename or args.input
    path = Path(FOLDER, name if Path(name).suffix.lower() == ".png" else f"{name}.png")
    with cli.named("--filename", name):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_image(data.to_unit_range(images), path, nrow=ROWS)
    print(path)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        generate(args)


if __name__ == "__main__":
    main()
