"""Measure a model on the whole test set: python3 evaluate.py [--model models/NAME/best.pt] [--json FILE]

With --prior models/NAME/prior.pt also the prior, and digits sampled from it. Without --model it measures the shipped
one, whose prior is pretrained/prior.pt.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

import os
from pathlib import Path

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    cli.add_model_arguments(parser)
    parser.add_argument("--json", type=arguments.file_name, metavar="FILE",
                        help="also write the figures to this file, as JSON; its folders are created (default: none)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such files at --json and --pairs (default: leave them unchanged and stop)")
    group = parser.add_argument_group("the prior, and digits sampled from it")
    cli.add_sampling_arguments(group, without="none is measured")
    group.add_argument("--classifier", type=arguments.file_name, metavar="PATH",
                       help="checkpoint of train_classifier.py, used alone (default: the shipped ones, "
                            "pretrained/classifier.pt and, if it is there, classifier-transformer.pt)")
    group.add_argument("--pairs", type=arguments.file_name, metavar="FILE",
                       help="also write a picture to this PNG file: the ten samples most like copies, each above its "
                            "nearest training image, and below them the ten such test images; its folders are created "
                            "(default: none)")
    group.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                       help="seed of the samples (default: %(default)s)")
    return parser


def check_arguments(parser, args):
    """End with an error if arguments contradict each other."""
    if args.json and args.pairs and os.path.realpath(args.json) == os.path.realpath(args.pairs):
        parser.error(f"--json {args.json} --pairs {args.pairs}: choose another name for one of them")
    if not args.json and not args.pairs:
        parser.check_unused(args, ("overwrite",), "is used only with --json or --pairs, add one of them")
    if not args.prior:
        parser.check_unused(args, (*cli.SAMPLING_ARGUMENTS, "classifier", "pairs", "seed"),
                            "is used only with --prior, add it")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import json
import math

import torch
import torch.nn.functional as F
from torch.utils.data import Subset
from tqdm import tqdm

import checkpoint
import data
from data import code_maps, image_file, image_folder
from metrics import copies, evaluate, nats_per_code, perplexity, samples
from metrics.classifier import ACTIVATIONS_PER_PIXEL
from utils import files, inputs
from utils.memory import images_that_fit

NUM_SAMPLES = 10_000            # equally many of each class
MAX_COMPARED = 2_000            # images of each kind that are compared with the training images; of large images only
COMPARED_BYTES, MIN_COMPARED = 2**25, 100           # as many as fit into COMPARED_BYTES, at least MIN_COMPARED
PAIRS = 10                      # of samples, and of test images, each with its nearest training image
PAIR_SIDE = 84                  # pixels, to which the images in the picture of pairs are enlarged


def measure_model(model, test_set, args):
    """The figures of the model on a data set, as a plain dictionary.

    mse is on the [-1, 1] scale; psnr (dB) is that of the MSE, with a range of 2 from black to white.
    bits_per_dimension: the h·w codes of log2 K bits each, over the C·H·W numbers of the image. Raises ValueError if a
    loss is not finite.
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
        "bits_per_dimension": math.log2(K) * h * w / (C * H * W),
    }


def table(measured, is_test):
    """The figures as lines of text, each with its unit. is_test: whether the model has not seen these images."""
    psnr = "perfect" if measured["psnr"] is None else f"{measured['psnr']:.2f}"
    rows = [("test MSE" if is_test else "MSE", f"{measured['mse']:.5f}", "per pixel, on the [-1, 1] scale"),
            ("PSNR", psnr, "dB, of that MSE"),
            ("codebook loss", f"{measured['codebook_loss']:.5f}", "squared distance from latent to code, per element"),
            ("perplexity", f"{measured['perplexity']:.1f}", f"of at most {measured['codes']}"),
            ("codes used", f"{measured['codes_used']}", f"of {measured['codes']}"),
            ("bits per dimension", f"{measured['bits_per_dimension']:.4f}", "of the codes; 8 in the images")]
    return "\n".join(f"{name:<20}{value:>10}  {unit}" for name, value, unit in rows)


# ---------------------------------------------------------------- the prior

def open_classifiers(args, are_digits):
    """{path: (classifier, name of the data set that it was trained on, if known)}, empty if the images are no digits.

    The one that the arguments name, else the shipped ones.
    """
    first, *others = checkpoint.CLASSIFIERS
    shipped = [files.typed_path(path) for path in (first, *others) if path == first or path.exists()]
    paths = [args.classifier] if args.classifier else shipped
    if are_digits:
        return {str(path): _open_classifier(path, args.device) for path in paths}
    if args.classifier:
        raise ValueError(f"--classifier {args.classifier}: it classifies digits of 28×28 pixels as MNIST's, and these "
                         "are others: leave it out")
    return {}


def _open_classifier(path, device):
    with cli.errors_name_flag("--classifier", path):
        classifier, contents = checkpoint.load_classifier(path, device)
        return classifier, contents["dataset"]


def measure_prior(model, prior, classifiers, train_set, test_set, args):
    """The figures of the prior and of images sampled from it, as a plain dictionary; the pairs for --pairs.

    nats_per_code and bits_per_dimension are of the test set's code maps with their labels; copies is what
    measure_copies() returns. With classifiers, what classify_images() returns of the first, and as second_classifier
    what it returns of another one.
    """
    device, generator = args.device, torch.Generator().manual_seed(args.seed)
    labels = samples.balanced_labels(prior.num_classes, NUM_SAMPLES)
    batch_size = images_that_fit(*test_set.shape[1:], model.quantizer.dim)
    with tqdm(total=len(test_set) + len(labels), desc="sampling and encoding", unit="img", unit_scale=True, leave=False,
              disable=None) as bar:
        sampled = samples.sample_maps(prior, labels, cli.sampling_arguments(args), generator, bar)
        test_maps = code_maps.encode(model, data.batches(test_set, batch_size, None, args.num_workers), device, bar)
    nats = nats_per_code(prior, test_maps, test_set.labels)
    measured = {"nats_per_code": nats, "samples_drawn": len(labels),
                "bits_per_dimension": nats / math.log(2) * prior.height * prior.width / math.prod(test_set.shape)}
    noise = samples.noise_maps(model, len(labels), prior.height, prior.width, generator, device)
    maps = {"samples": (sampled, labels), "reconstructions": (test_maps, test_set.labels), "random": (noise, labels)}
    measured["copies"], pairs = measure_copies(model, maps, train_set, test_set, args)
    if classifiers:
        first, *others = classify_images(model, classifiers, test_set, maps, args)
        measured |= first | dict(zip(["second_classifier"], others))
    return measured, pairs


def measure_copies(model, maps, train_set, test_set, args):
    """How many images are copies of training images, by kind, as a plain dictionary; the closest pairs of samples.

    threshold is the ratio of metrics.copies.ratios() that a hundredth of the test images are below, flagged the share
    of images below it, closest_samples the ratios of those in the pairs. Of each kind up to MAX_COMPARED images are
    taken, evenly over the classes. Beside samples, test images and their reconstructions there are true copies, to show
    that they are found: training images with noise, moved by a pixel, and what the model makes of these.
    """
    generator = torch.Generator().manual_seed(args.seed)
    batch_size = images_that_fit(*test_set.shape[1:], model.quantizer.dim)
    count = min(MAX_COMPARED, max(MIN_COMPARED, COMPARED_BYTES // math.prod(test_set.shape)))
    rows = copies.evenly(train_set.labels, count)
    originals = _images(Subset(train_set, rows.tolist()), args)
    images = {"test_set": _images(Subset(test_set, copies.evenly(test_set.labels, count).tolist()), args)}
    for name in ("samples", "reconstructions"):
        indices, labels = maps[name]
        images[name] = code_maps.decode(model, indices[copies.evenly(labels, count)])
    images["noisy_copies"] = copies.noisy_shifted(originals, generator)
    images["reconstructed_copies"] = code_maps.decode(model, code_maps.encode(
        model, [(batch, None) for batch in images["noisy_copies"].split(batch_size)], args.device))
    batches = data.batches(train_set, batch_size, None, args.num_workers)
    with tqdm(total=len(train_set), desc="looking for copies", unit="img", unit_scale=True, leave=False,
              disable=None) as bar:
        found = copies.nearest_images(torch.cat(list(images.values())), batches, args.device, bar)
    sizes = [len(batch) for batch in images.values()]
    nearest = {name: copies.Nearest(*parts) for name, *parts in zip(
        images, found.distances.split(sizes), found.rows.split(sizes))}
    ratios = {name: copies.ratios(one) for name, one in nearest.items()}
    threshold = ratios["test_set"].quantile(copies.QUANTILE).item()
    figures = {name: {"images": len(one), "median_ratio": one.median().item(),
                      **_share("flagged", (one < threshold).double().mean().item(), len(one))}
               for name, one in ratios.items()}
    closest = {f"closest_{name}": ratios[name].sort().values[:PAIRS].tolist() for name in ("samples", "test_set")}
    pairs = [copies.closest_pairs(images[name], nearest[name], train_set, PAIRS) for name in ("samples", "test_set")]
    return {"threshold": threshold, **closest, **figures}, pairs


def draw_pairs(pairs):
    """Of samples and of test images (2·n, C, H, W), n images and their nearest training images, as a picture (3, ...).

    It has four rows. Where there are fewer samples or test images than PAIRS, the rest of their rows is black.
    """
    columns, scale = max(map(len, pairs)) // 2, max(1, PAIR_SIDE // pairs[0].shape[-1])
    rows = [F.pad(part, (0, 0, 0, 0, 0, 0, 0, columns - len(part))) for both in pairs
            for part in both.split(len(both) // 2)]
    return data.grid(torch.cat(rows), columns).repeat_interleave(scale, 1).repeat_interleave(scale, 2)


def _images(dataset, args):
    """All images of a data set: uint8 (N, C, H, W)."""
    return torch.cat([images for images, _ in data.batches(dataset, MAX_COMPARED, None, args.num_workers)])


def _share(name, share, count):
    """A share of `count` images and its standard error, by name."""
    return {name: share, f"{name}_error": samples.standard_error(share, count)}


def classify_images(model, classifiers, test_set, maps, args):
    """What each classifier makes of the test set and of maps by name: code maps (N, h, w), and the digits asked for.

    → for each its path, as "classifier", and by name: recognised, the share of images in which it sees the digit asked
    for (of the test set its accuracy), frechet, the distance to the test set in its feature space, and precision and
    recall against it.
    """
    predictions = {path: {} for path in classifiers}
    with tqdm(total=len(classifiers) * (len(test_set) + sum(len(asked) for _, asked in maps.values())),
              desc="classifying", unit="img", unit_scale=True, leave=False, disable=None) as bar:
        batches = [data.to_model_range(images, args.device) for images, _ in data.batches(
            test_set, images_that_fit(*test_set.shape[1:], ACTIVATIONS_PER_PIXEL), None, args.num_workers)]
        for name, (indices, asked) in {"test_set": (None, test_set.labels), **maps}.items():
            images = batches if indices is None else list(code_maps.decode_batches(model, indices))
            for path, classifier in classifiers.items():
                predictions[path][name] = samples.classify(classifier, images, bar), asked
    return [{"classifier": path, **{name: compare(*predicted, *named["test_set"]) for name, predicted in named.items()}}
            for path, named in predictions.items()]


def compare(predicted, asked, real, labels):
    """The figures of one kind of images against the real ones, from Predictions of both and the digits asked for."""
    rows, real_rows = (copies.evenly(digits, min(len(asked), len(labels))) for digits in (asked, labels))
    precision, recall = samples.precision_and_recall(predicted.features[rows], real.features[real_rows])
    return {**_share("recognised", (predicted.digits == asked).double().mean().item(), len(asked)),
            "frechet": samples.frechet_distance(predicted.features, real.features),
            **_share("precision", precision, len(rows)), **_share("recall", recall, len(rows))}


def prior_table(measured, words):
    """The prior's figures as lines of text. words: what the set is called that the figures are of."""
    rows = [("nats per code", f"{measured['nats_per_code']:.4f}", f"of the {words}, the class given"),
            ("bits per dimension", f"{measured['bits_per_dimension']:.4f}", "of the same")]
    lines = [f"{name:<20}{value:>10}  {unit}" for name, value, unit in rows]
    titles = {"samples": f"{measured['samples_drawn']:,} samples", "reconstructions": f"reconstructed {words}",
              "random": "decoded noise", "test_set": words}
    judged = [figures for figures in (measured, measured.get("second_classifier", {})) if "classifier" in figures]
    for figures in judged:
        lines.append(f"\n{figures['classifier']}\n{'':<26}{'recognised':>16}{'Fréchet distance':>18}{'precision':>18}"
                     f"{'recall':>18}")
        for name, title in titles.items():
            recognised, precision, recall = (percent(figures[name], key) for key in (
                "recognised", "precision", "recall"))
            lines.append(f"{title:<26}{recognised:>16}{figures[name]['frechet']:>18.2f}{precision:>18}{recall:>18}")
    if not judged:
        lines.append("Not digits of 28×28 pixels: the samples have not been classified.")
    found = measured["copies"]
    lines.append(f"\nCopies of training images: far nearer to one than to the others, by a ratio of distances below "
                 f"{found['threshold']:.3f},\nwhich 1% of the {words} have\n{'':<42}{'images':>8}{'median ratio':>15}"
                 f"{'copies':>18}")
    for name, title in (("samples", "samples"), ("test_set", words), ("reconstructions", f"reconstructed {words}"),
                        ("noisy_copies", "training images moved by a pixel, noise"),
                        ("reconstructed_copies", "these, reconstructed")):
        figures = found[name]
        lines.append(f"{title:<42}{figures['images']:>8,}{figures['median_ratio']:>15.3f}"
                     f"{percent(figures, 'flagged'):>18}")
    return "\n".join(lines)


def notes_on_training(trained_on, prior, dataset, train_images):
    """Sentences on what the prior and the classifiers were trained on, where that makes figures better than they are.

    trained_on: {path: name of a data set}, with the path of the prior among them.
    """
    notes = [data.seen_in_training(known, dataset, path)[1] for path, known in trained_on.items()]
    if trained_on[prior] != dataset:
        notes.append(f"Copies have been looked for among the {train_images:,} training images of {dataset}, not of "
                     f"{trained_on[prior]}, which the prior was trained on.")
    return filter(None, notes)


def percent(figures, name):
    """A share and its standard error as text."""
    return f"{figures[name]:.2%} ± {figures[f'{name}_error']:.2%}"


# ---------------------------------------------------------------- JSON

def holds_figures(path):
    """Whether the file at path is one that --json has written."""
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, dict) and {"model", "dataset", "mse"} <= contents.keys()


def open_outputs(args):
    """{flag: OutputFile} of the files that the arguments name, all of which could be written."""
    kinds = {"--json": (args.json, "a file of figures", holds_figures),
             "--pairs": (args.pairs, "a PNG file", image_file.is_png)}
    outputs = {flag: files.OutputFile(Path(path), args.overwrite, *kind)
               for flag, (path, *kind) in kinds.items() if path}
    for flag, output in outputs.items():
        with cli.errors_name_flag(flag, output.path):
            output.check()
    return outputs


def run(args):
    args.device = inputs.find_device(args.device)
    outputs = open_outputs(args)
    model, contents, path = inputs.open_model(args)
    if args.prior:
        prior, prior_contents, prior_path = inputs.open_prior(args, model, contents)
    dataset, train_set, test_set = inputs.open_data(args, contents)
    if args.prior:
        classifiers = open_classifiers(args, data.are_digits(test_set))
        H, W = model.image_size(prior.height, prior.width)
        classes = prior_contents["classes"]
        if (classes, [H, W]) != (test_set.classes, test_set.shape[1:]):
            raise ValueError(f"--dataset {dataset}: the prior in {prior_path} was trained on other images: its "
                             f"classes are {', '.join(classes[:50])}, of {H}×{W} pixels")
        if classifiers and len(test_set) <= samples.NEIGHBOURS:
            raise ValueError(f"--dataset {dataset}: precision and recall take more than {samples.NEIGHBOURS} test "
                             f"images, and there are {len(test_set)}")
        if dataset == data.FOLDER:
            image_folder.keep_in_memory(test_set, train_set)            # which are looked at more than once
    with cli.errors_name_flag(f"--model {path} --dataset", dataset):
        measured = measure_model(model, test_set, args)
    seen, note = data.seen_in_training(contents["dataset"]["name"], dataset)
    print(f"{path} on the {len(test_set):,} {'' if seen else 'test '}images of {dataset}" + f"\n{note}" * bool(note)
          + f"\n{table(measured, not seen)}", flush=True)
    figures, written = {"model": str(path), "dataset": dataset, "seen_in_training": seen, **measured}, {}
    if args.prior:
        networks = {name: classifier for name, (classifier, _) in classifiers.items()}
        figures["prior"], pairs = measure_prior(model, prior, networks, train_set, test_set, args)
        trained_on = {prior_path: prior_contents["dataset"]} | {name: known for name, (_, known) in classifiers.items()}
        print("\n".join(["", prior_path, prior_table(figures["prior"], "images" if seen else "test set"),
                         *notes_on_training(trained_on, prior_path, dataset, len(train_set))]))
        written["--pairs"] = image_file.as_png(draw_pairs(pairs))
    written["--json"] = (json.dumps(figures, indent=2, allow_nan=False) + "\n").encode()
    for flag, output in outputs.items():
        with cli.errors_name_flag(flag, output.path):
            output.write(written[flag])
        print(f"{'as JSON' if flag == '--json' else 'closest pairs':<20}{output.path}")
        if flag == "--pairs":
            for rows, name, words in (("1 and 2", "samples", "samples"), ("3 and 4", "test_set", "test images")):
                closest = " ".join(f"{ratio:.3f}" for ratio in figures["prior"]["copies"][f"closest_{name}"])
                print(f"{'':<20}rows {rows}: {words}, and their nearest training images; ratios {closest}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
