"""Measure a model on a whole test set: python3 evaluate.py [--model models/NAME/best.pt] [--json FILE]

With --prior models/NAME/prior.pt also the prior, and the digits drawn from it. Without --model it measures the
shipped one, whose prior is pretrained/prior.pt.
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

from pathlib import Path

import arguments
import cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE",
                        help="also write the figures to this file, as JSON (default: none)")
    group = parser.add_argument_group("the prior, and digits drawn from it")
    cli.add_sampling_arguments(group, without="none is measured")
    group.add_argument("--classifier", type=arguments.file_name, metavar="PATH",
                       help="checkpoint of train_classifier.py (default: the shipped one, pretrained/classifier.pt)")
    group.add_argument("--seed", type=arguments.whole_number(0), default=0, metavar="N",
                       help="seed of the digits drawn (default: %(default)s)")
    return parser


def parse_arguments(argv=None):
    """The parser and its arguments, held against each other."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if not args.prior:
        parser.check_unused(args, (*cli.SAMPLING, "classifier", "seed"), "is used only with --prior, add it")
    return parser, args


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before torch is imported, which takes seconds

import json
import math
import os

import torch
from tqdm import tqdm

import checkpoint
import data
import inputs
import quality
from files import write_whole
from metrics import at_once, code_maps, evaluate, nats_per_code, perplexity

SAMPLES = 10_000                # as many of each class


def figures(model, test_set, args):
    """What the model is worth on a data set, as a plain dictionary.

    mse is on the [-1, 1] scale; psnr (dB) belongs to it, with a range of 2 from black to white.
    bits_per_pixel: the h·w codes of log2 K bits each, over the C·H·W bytes of the image.
    Raises ValueError if a loss is no finite number.
    """
    C, H, W = test_set.shape
    losses, counts = evaluate(model, data.batches(test_set, at_once(H, W), None, args.num_workers), args.device)
    if not math.isfinite(losses.total):
        raise ValueError(f"the model's losses are no finite numbers: {losses.reconstruction} in the "
                         f"reconstructions, {losses.codebook} in the codes")
    K, h, w = model.quantizer.num_codes, H // 4, W // 4
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


# ---------------------------------------------------------------- the prior

def open_classifier(args, are_digits):
    """The classifier that the arguments name, else the shipped one; None if the images are not for it to judge."""
    path = args.classifier or checkpoint.CLASSIFIER
    with cli.named("--classifier", path):
        if are_digits:
            return checkpoint.load_classifier(path, args.device)[0]
        if args.classifier:
            raise ValueError("it judges digits of 28×28 pixels, as MNIST's, and these images are others: leave it out")


def prior_figures(model, prior, classifier, train_set, test_set, args):
    """What the prior and images drawn from it are worth, as a plain dictionary.

    nats_per_code and bits_per_pixel are of the test set's code maps with their labels; memorised is
    the share of samples whose code map stands in the training set. With a classifier: recognised
    is the share of images in which it sees the digit asked for, frechet the distance to the test
    set in its feature space: of the samples, and as yardsticks of the test set itself (recognised
    there is the classifier's accuracy), its reconstructions and decoded noise.
    """
    device, generator = args.device, torch.Generator().manual_seed(args.seed)
    labels, some = quality.spread_labels(prior.num_classes, SAMPLES), at_once(4 * prior.height, 4 * prior.width)
    with tqdm(total=len(train_set) + len(test_set) + len(labels), desc="drawing and encoding", unit="img",
              unit_scale=True, leave=False, disable=None) as bar:
        samples = quality.sampled_maps(prior, labels, cli.sampling(args), generator, device, bar)
        tested, trained = (code_maps(model, data.batches(part, some, None, args.num_workers), device, bar)
                           for part in (test_set, train_set))
    nats = nats_per_code(prior, tested, test_set.labels, device)
    measured = {"nats_per_code": nats, "samples_drawn": len(labels),
                "bits_per_pixel": nats / math.log(2) * prior.height * prior.width / math.prod(test_set.shape),
                "memorised": quality.memorised(samples, trained)}
    if classifier:
        noise = quality.noise_maps(model, len(labels), prior.height, prior.width, generator, device)
        maps = {"samples": (samples, labels), "reconstructions": (tested, test_set.labels), "random": (noise, labels)}
        measured |= judged(model, classifier, test_set, maps, device)
    return measured


def judged(model, classifier, test_set, maps, device):
    """What the classifier says of the test set, and of maps by name: code maps (N, h, w), the digits asked for (N,)."""
    with tqdm(total=len(test_set) + sum(len(asked) for _, asked in maps.values()), desc="judging", unit="img",
              unit_scale=True, leave=False, disable=None) as bar:
        seen = {"test_set": (quality.look_at(classifier, quality.real(test_set.images, device), bar), test_set.labels)}
        for name, (some, asked) in maps.items():
            seen[name] = quality.look_at(classifier, quality.decoded(model, some, device), bar), asked
    real, _ = seen["test_set"]
    return {name: {"recognised": (found.digits == asked).double().mean().item(),
                   "frechet": quality.frechet_distance(found.features, real.features)}
            for name, (found, asked) in seen.items()}


def prior_table(measured):
    """The prior's figures as lines for a reader."""
    rows = [("nats per code", f"{measured['nats_per_code']:.4f}", "on the test set, the class given"),
            ("bits per pixel", f"{measured['bits_per_pixel']:.4f}", "of the same"),
            ("memorised", f"{measured['memorised']:.2%}", "of the samples have a code map of the training set")]
    lines = [f"{name:<16}{value:>10}  {unit}" for name, value, unit in rows]
    if "samples" not in measured:
        return "\n".join([*lines, "No digits of 28×28 pixels: the classifier has not judged the samples."])
    lines.append(f"\n{'':<26}{'recognised':>12}{'Fréchet distance':>20}")
    for name, title in (("samples", f"{measured['samples_drawn']:,} samples"),
                        ("reconstructions", "reconstructed test set"), ("random", "decoded noise"),
                        ("test_set", "test set")):
        lines.append(f"{title:<26}{measured[name]['recognised']:>12.2%}{measured[name]['frechet']:>20.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- JSON

def check_json(path, inputs):
    """Raise ValueError if the file could not be written, or is one of the inputs. Touches nothing."""
    existing = path if path.exists() else path.parent
    if not existing.exists():
        raise ValueError(f"there is no folder {path.parent}")
    if path.is_dir():
        raise ValueError("is a folder, give the name of a file")
    if path.exists() and any(Path(given).exists() and path.samefile(given) for given in inputs):
        raise ValueError("is a file that is to be read, give another name")
    if not os.access(existing, os.W_OK):
        raise ValueError("no permission to write there")


def write_json(path, contents):
    text = json.dumps(contents, indent=2, allow_nan=False) + "\n"
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text)           # a link, a pipe, /dev/stdout: what it leads to gets the text
    else:
        write_whole(path, text.encode())


def measure(args):
    args.device = inputs.find_device(args.device)
    if args.json:
        with cli.named("--json", args.json):
            check_json(args.json, (args.model or checkpoint.PRETRAINED, args.classifier or checkpoint.CLASSIFIER,
                                   *([args.prior] if args.prior else [])))
    model, contents, path = inputs.open_model(args)
    if args.prior:
        prior, classes, prior_path = inputs.open_prior(args, path)
    dataset, train_set, test_set = inputs.open_data(args, contents)
    if args.prior:
        classifier = open_classifier(args, data.are_digits(data.describe(dataset, "", test_set)))
        if (classes, [4 * prior.height, 4 * prior.width]) != (test_set.classes, test_set.shape[1:]):
            raise ValueError(f"--dataset {dataset}: the prior in {prior_path} has been learned from other images: its "
                             f"classes are {', '.join(classes[:50])}, of {4 * prior.height}×{4 * prior.width} pixels")
    with cli.named(f"--model {path} --dataset", dataset):
        measured = figures(model, test_set, args)
    print(f"{path} on the {len(test_set):,} test images of {dataset}\n{table(measured)}", flush=True)
    if args.prior:
        measured["prior"] = prior_figures(model, prior, classifier, train_set, test_set, args)
        print(f"\n{prior_path}\n{prior_table(measured['prior'])}")
    if args.json:
        with cli.named("--json", args.json):
            write_json(args.json, {"model": str(path), "dataset": dataset, **measured})
        print(f"{'as JSON':<16}{args.json}")


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line():
        measure(args)


if __name__ == "__main__":
    main()
