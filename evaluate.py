"""Measure a model on a whole test set: python3 evaluate.py [--model models/NAME/best.pt] [--json FILE]

Without --model it measures the shipped one.
"""

import json
import math
import os
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

    mse is on the [-1, 1] scale; psnr (dB) belongs to it, with a range of 2 from black to white.
    bits_per_pixel: the h·w codes of log2 K bits each, over the C·H·W bytes of the image.
    Raises ValueError if a loss is no finite number.
    """
    losses, counts = evaluate(model, data.batches(test_set, BATCH_SIZE), device)
    if not math.isfinite(losses.total):
        raise ValueError(f"the model's losses are no finite numbers: {losses.reconstruction} in the "
                         f"reconstructions, {losses.codebook} in the codes")
    K, (C, H, W) = model.quantizer.num_codes, test_set.images.shape[1:]
    h, w = H // 4, W // 4
    return {
        "images": len(test_set),
        "mse": losses.reconstruction,
        "psnr": 10 * math.log10(2**2 / losses.reconstruction) if losses.reconstruction else None,
        "codebook_loss": losses.codebook,
        "perplexity": perplexity(counts),
        "codes_used": int((counts > 0).sum()),
        "codes": K,
        "bits_per_pixel": math.log2(K) * h * w / (C * H * W),
    }


def table(measured):
    """The figures as lines for a reader, each with its unit."""
    psnr = "perfect" if measured["psnr"] is None else f"{measured['psnr']:.2f}"
    rows = [("test MSE", f"{measured['mse']:.5f}", "per pixel, on the [-1, 1] scale"),
            ("PSNR", psnr, "dB, of that MSE"),
            ("codebook loss", f"{measured['codebook_loss']:.5f}", "squared distance from latent to code, per element"),
            ("perplexity", f"{measured['perplexity']:.1f}", f"of at most {measured['codes']}"),
            ("codes used", f"{measured['codes_used']}", f"of {measured['codes']}"),
            ("bits per pixel", f"{measured['bits_per_pixel']:.4f}", "of the codes; 8 in the images")]
    return "\n".join(f"{name:<16}{value:>10}  {unit}" for name, value, unit in rows)


def check_json(path, model):
    """Raise ValueError if the file could not be written, or is the model's own. Touches nothing."""
    existing = path if path.exists() else path.parent
    if not existing.exists():
        raise ValueError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError("is a folder, give the name of a file")
    if path.exists() and Path(model).exists() and path.samefile(model):
        raise ValueError("is the model's own file, give another name")
    if not os.access(existing, os.W_OK):
        raise ValueError("no permission to write there")


def write_json(path, contents):
    text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)           # a link, a pipe, /dev/stdout: what it leads to gets the text
    else:
        checkpoint.write_whole(path, text.encode())


def measure(args):
    if args.json:
        with cli.named("--json", args.json):
            check_json(args.json, args.model or checkpoint.PRETRAINED)
    model, contents, path = cli.open_model(args)
    dataset, _, test_set = cli.open_data(args, contents)
    with cli.named(f"--model {path} --dataset", dataset):
        measured = figures(model, test_set, args.device)
    print(f"{path} on the {len(test_set):,} test images of {dataset}\n{table(measured)}")
    if args.json:
        with cli.named("--json", args.json):
            write_json(args.json, {"model": str(path), "dataset": dataset, **measured})
        print(f"{'as JSON':<16}{args.json}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        measure(args)


if __name__ == "__main__":
    main()
