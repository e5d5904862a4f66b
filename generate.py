"""Write a 10×10 grid of images: python3 generate.py [--model models/NAME/best.pt] [--input random] ...

`--input MNIST` reconstructs 100 test images; `--input random` decodes Gaussian noise, quantized.
Without --model it uses the shipped one.
"""

from pathlib import Path

import torch
from torchvision.utils import save_image

import cli
import data

ROWS = 10
FOLDER = "generatedImages"


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)
    parser.add_argument("--input", type=cli.one_of("MNIST", "random"), default="MNIST", metavar="WHAT",
                        help=f"MNIST for test images, or random for noise {shown}")
    parser.add_argument("--filename", type=cli.name_inside(FOLDER), metavar="NAME",
                        help=f"writes {FOLDER}/NAME.png (default: the input's name)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N",
                        help=f"seed of the choice of test images, or of the noise {shown}")
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


def generate(args):
    model, contents, path = cli.open_model(args)
    generator = torch.Generator().manual_seed(args.seed)        # on the CPU: the same on every device
    if args.input == "random":
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
