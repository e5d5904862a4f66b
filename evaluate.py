"""Measure a model on a whole test set: python3 evaluate.py [--model models/NAME/best.pt] [--json FILE]

Without --model it measures the shipped one.
"""

import json
import math
from pathlib import Path

import checkpoint
import cli
import data
from metrics import evaluate, perplexity

BATCH_SIZE = 250


def get_parser():
    parser = cli.Parser(description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write the figures to this file, as JSON (default: none)")
    return parser


def figures(model, test_set, device):
    """What the model is worth on Images, as a plain dictionary.

    mse is on the [-1, 1] scale; psnr (dB) belongs to it, with a peak-to-peak range of 2. A pixel
    has one byte for each of its C channels, and bits_per_pixel is counted for each such byte:
    log2 K bits for each of the h·w codes, over C·H·W.
    """
    losses, counts = evaluate(model, data.batches(test_set, BATCH_SIZE), device)
    K, (C, H, W) = model.quantizer.num_codes, test_set.images.shape[1:]
    h, w = H // 4, W // 4
    return {
        "images": len(test_set),
        "mse": losses.reconstruction,
        "psnr": 10 * math.log10(2**2 / losses.reconstruction) if losses.reconstruction else math.inf,
        "codebook_loss": losses.codebook,
        "perplexity": perplexity(counts),
        "codes_used": int((counts > 0).sum()),
        "codes": K,
        "bits_per_pixel": math.log2(K) * h * w / (C * H * W),
    }


def table(measured):
    """The figures as lines for a reader, each with its unit."""
    rows = [("test MSE", f"{measured['mse']:.5f}", "per pixel, on the [-1, 1] scale"),
            ("PSNR", f"{measured['psnr']:.2f}", "dB, of that MSE"),
            ("codebook loss", f"{measured['codebook_loss']:.5f}", "per element of a latent, ‖z_e − e‖²"),
            ("perplexity", f"{measured['perplexity']:.1f}", f"of at most {measured['codes']}"),
            ("codes used", f"{measured['codes_used']}", f"of {measured['codes']}"),
            ("bits per pixel", f"{measured['bits_per_pixel']:.4f}", "of the codes; 8 in the images")]
    return "\n".join(f"{name:<16}{value:>10}  {unit}" for name, value, unit in rows)


def measure(args):
    if args.json and not args.json.parent.is_dir():
        raise ValueError(f"--json {args.json}: there is no folder {args.json.parent}")
    if args.json and args.json.is_dir():
        raise ValueError(f"--json {args.json}: is a folder, give the name of a file")
    model, contents, path = cli.open_model(args)
    dataset, test_set = cli.open_test_set(args, contents)
    with cli.named(f"--model {path} --dataset", dataset):
        measured = figures(model, test_set, args.device)
        if not math.isfinite(measured["mse"]):
            raise ValueError("the model's reconstructions are no finite numbers")
    print(f"{path} on the {len(test_set):,} test images of {dataset}\n{table(measured)}")
    if args.json:
        contents = {"model": str(path), "dataset": dataset, **measured}
        with cli.named("--json", args.json):
            checkpoint.write_whole(args.json, json.dumps(contents, indent=2).encode() + b"\n")
        print(f"{'as JSON':<16}{args.json}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        measure(args)


if __name__ == "__main__":
    main()
