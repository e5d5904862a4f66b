"""Measure a model on the whole test set: python3 evaluate.py [--model models/NAME/best.pt] [--json FILE]

With --prior models/NAME/prior.pt also the prior, and digits sampled from it. Without --model it measures the shipped
one, whose prior is pretrained/prior.pt.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from pathlib import Path

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--json", type=arguments.file_name, metavar="FILE",
                        help="also write the figures to this file, as JSON; its folders are created (default: none)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such a file at --json (default: leave it unchanged and stop)")
    group = parser.add_argument_group("the prior, and digits sampled from it")
    cli.add_sampling_arguments(group, without="none is measured")
    group.add_argument("--classifier", type=arguments.file_name, metavar="PATH",
                       help="checkpoint of train_classifier.py (default: the shipped one, pretrained/classifier.pt)")
    group.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                       help="seed of the samples (default: %(default)s)")
    return parser


def check_arguments(parser, args):
    """End with an error if arguments contradict each other."""
    if not args.json:
        parser.check_unused(args, ("overwrite",), "is used only with --json, add it")
    if not args.prior:
        parser.check_unused(args, (*cli.SAMPLING_ARGUMENTS, "classifier", "seed"), "is used only with --prior, add it")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import json
import math

import torch
from tqdm import tqdm

import checkpoint
import data
from data import code_maps, image_folder
from metrics import evaluate, nats_per_code, perplexity, samples
from metrics.classifier import HIDDEN_SIZE
from utils import files, inputs
from utils.memory import images_that_fit

NUM_SAMPLES = 10_000            # equally many of each class


def measure_model(model, test_set, args):
    """The figures of the model on a data set, as a plain dictionary.

    mse is on the [-1, 1] scale; psnr (dB) is that of the MSE, with a range of 2 from black to white. bits_per_pixel:
    the h·w codes of log2 K bits each, over the C·H·W bytes of the image. Raises ValueError if a loss is not finite.
    """
    C, H, W = test_set.shape
    batches = data.batches(test_set, images_that_fit(H, W, model.quantizer.dim), None, args.num_workers)
    losses, counts = evaluate(model, tqdm(batches, desc="testing", leave=False, disable=None), args.device)
    if not math.isfinite(losses.total):
        raise ValueError(f"the model's losses are not finite: {losses.reconstruction} in the reconstructions, "
                         f"{losses.codebook} in the codes")
    K, (h, w) = model.quantizer.num_codes, model.map_size(H, W)
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
    """The figures as lines of text, each with its unit."""
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
    """The classifier that the arguments name, else the shipped one; None if the images are not digits."""
    path = args.classifier or checkpoint.CLASSIFIER
    with cli.errors_name_flag("--classifier", path):
        if are_digits:
            return checkpoint.load_classifier(path, args.device)[0]
        if args.classifier:
            raise ValueError("it classifies digits of 28×28 pixels as MNIST's, and these are others: leave it out")


def measure_prior(model, prior, classifier, train_set, test_set, args):
    """The figures of the prior and of images sampled from it, as a plain dictionary.

    nats_per_code and bits_per_pixel are of the test set's code maps with their labels; memorised is the share of
    samples whose code map is in the training set. With a classifier: recognised is the share of images in which it sees
    the digit asked for, frechet the distance to the test set in its feature space. Both are measured of the samples,
    and for comparison of the test set itself (recognised there is the classifier's accuracy), of its reconstructions
    and of decoded noise.
    """
    device, generator = args.device, torch.Generator().manual_seed(args.seed)
    labels = samples.balanced_labels(prior.num_classes, NUM_SAMPLES)
    batch_size = images_that_fit(*test_set.shape[1:], model.quantizer.dim)
    with tqdm(total=len(train_set) + len(test_set) + len(labels), desc="sampling and encoding", unit="img",
              unit_scale=True, leave=False, disable=None) as bar:
        sampled = samples.sample_maps(prior, labels, cli.sampling_arguments(args), generator, device, bar)
        test_maps, train_maps = (
            code_maps.encode(model, data.batches(dataset, batch_size, None, args.num_workers), device, bar)
            for dataset in (test_set, train_set))
    nats = nats_per_code(prior, test_maps, test_set.labels)
    measured = {"nats_per_code": nats, "samples_drawn": len(labels),
                "bits_per_pixel": nats / math.log(2) * prior.height * prior.width / math.prod(test_set.shape),
                "memorised": samples.memorised_share(sampled, train_maps)}
    if classifier:
        noise = samples.noise_maps(model, len(labels), prior.height, prior.width, generator, device)
        maps = {"samples": (sampled, labels), "reconstructions": (test_maps, test_set.labels),
                "random": (noise, labels)}
        measured |= measure_images(model, classifier, test_set, maps, args)
    return measured


def measure_images(model, classifier, test_set, maps, args):
    """recognised and frechet of the test set, and of maps by name: code maps (N, h, w) and the digits asked for."""
    with tqdm(total=len(test_set) + sum(len(asked) for _, asked in maps.values()), desc="classifying", unit="img",
              unit_scale=True, leave=False, disable=None) as bar:
        batches = data.batches(test_set, images_that_fit(*test_set.shape[1:], HIDDEN_SIZE), None, args.num_workers)
        real = samples.classify(classifier, (data.to_model_range(images, args.device) for images, _ in batches), bar)
        predictions = {"test_set": (real, test_set.labels)}
        for name, (indices, asked) in maps.items():
            images = samples.decode_batches(model, indices)
            predictions[name] = samples.classify(classifier, images, bar), asked
    return {name: {"recognised": (predicted.digits == asked).double().mean().item(),
                   "frechet": samples.frechet_distance(predicted.features, real.features)}
            for name, (predicted, asked) in predictions.items()}


def prior_table(measured):
    """The prior's figures as lines of text."""
    rows = [("nats per code", f"{measured['nats_per_code']:.4f}", "on the test set, the class given"),
            ("bits per pixel", f"{measured['bits_per_pixel']:.4f}", "of the same"),
            ("memorised", f"{measured['memorised']:.2%}", "of the samples have a code map of the training set")]
    lines = [f"{name:<16}{value:>10}  {unit}" for name, value, unit in rows]
    if "samples" not in measured:
        return "\n".join([*lines, "Not digits of 28×28 pixels: the samples have not been classified."])
    lines.append(f"\n{'':<26}{'recognised':>12}{'Fréchet distance':>20}")
    for name, title in (("samples", f"{measured['samples_drawn']:,} samples"),
                        ("reconstructions", "reconstructed test set"), ("random", "decoded noise"),
                        ("test_set", "test set")):
        lines.append(f"{title:<26}{measured[name]['recognised']:>12.2%}{measured[name]['frechet']:>20.2f}")
    return "\n".join(lines)


# ---------------------------------------------------------------- JSON

def holds_figures(path):
    """Whether the file at path is one that --json has written."""
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, dict) and {"model", "dataset", "mse"} <= contents.keys()


def run(args):
    args.device = inputs.find_device(args.device)
    if args.json:
        output = files.OutputFile(Path(args.json), args.overwrite, "a file of figures", holds_figures)
        with cli.errors_name_flag("--json", output.path):
            output.check()
    model, contents, path = inputs.open_model(args)
    if args.prior:
        prior, classes, prior_path = inputs.open_prior(args, model, contents)
    dataset, train_set, test_set = inputs.open_data(args, contents)
    if args.prior:
        classifier = open_classifier(args, data.are_digits(data.describe(dataset, "", test_set)))
        H, W = model.image_size(prior.height, prior.width)
        if (classes, [H, W]) != (test_set.classes, test_set.shape[1:]):
            raise ValueError(f"--dataset {dataset}: the prior in {prior_path} was trained on other images: its "
                             f"classes are {', '.join(classes[:50])}, of {H}×{W} pixels")
        if dataset == data.FOLDER:
            image_folder.keep_in_memory(test_set)           # which is looked at three times
    with cli.errors_name_flag(f"--model {path} --dataset", dataset):
        measured = measure_model(model, test_set, args)
    print(f"{path} on the {len(test_set):,} test images of {dataset}\n{table(measured)}", flush=True)
    if args.prior:
        measured["prior"] = measure_prior(model, prior, classifier, train_set, test_set, args)
        print(f"\n{prior_path}\n{prior_table(measured['prior'])}")
    if args.json:
        figures = {"model": str(path), "dataset": dataset, **measured}
        with cli.errors_name_flag("--json", output.path):
            output.write((json.dumps(figures, indent=2, allow_nan=False) + "\n").encode())
        print(f"{'as JSON':<16}{output.path}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
