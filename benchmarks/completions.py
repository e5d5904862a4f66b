"""How often completed digits are read as the true digit, by the rows of codes kept: python3 benchmarks/completions.py

Of random test images, the upper rows of codes are kept, the prior samples the others without the class, and the
classifier reads the decoded images. Without --model it measures the shipped model, with the prior beside it.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    cli.add_model_arguments(parser)
    cli.add_sampling_arguments(parser, without="prior.pt beside the model")
    parser.add_argument("--classifier", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of train_classifier.py (default: the shipped one, pretrained/classifier.pt)")
    parser.add_argument("--images", type=arguments.integer(2), default=1000, metavar="N",
                        help="test images, each completed once for every number of rows (default: %(default)s)")
    parser.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                        help="seed of the choice of images and of the samples (default: %(default)s)")
    parser.add_argument("--json", type=arguments.file_name, metavar="FILE",
                        help="also write the figures to this file, as JSON; its folders are created (default: none)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such a file at --json (default: leave it unchanged and stop)")
    return parser


def check_arguments(parser, args):
    parser.check_unused(args, ("guidance",), "needs a class, and none is given here")
    if not args.json:
        parser.check_unused(args, ("overwrite",), "is used only with --json, add it")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import json

import torch
from torch.utils.data import Subset
from tqdm import tqdm

import checkpoint
import data
from data import code_maps
from metrics import samples
from utils import files, inputs
from utils.memory import images_that_fit


@torch.no_grad()
def measure(model, prior, classifier, test_set, args, bar):
    """For 0 to h rows kept, the share of completions that the classifier reads as the true digit, and its error."""
    order = torch.randperm(len(test_set), generator=torch.Generator().manual_seed(args.seed))[:args.images]
    digits, no_class = test_set.labels[order], torch.full((len(order),), prior.num_classes)
    batch_size = images_that_fit(*test_set.shape[1:], model.quantizer.dim)
    batches = data.batches(Subset(test_set, order.tolist()), batch_size, None, args.num_workers)
    flat = code_maps.encode(model, batches, args.device).flatten(1)                   # (N, T)
    for rows in range(prior.height + 1):
        maps = samples.sample_maps(prior, no_class, cli.sampling_arguments(args),
                                   torch.Generator().manual_seed(args.seed), bar,
                                   flat[:, :rows * prior.width])
        read = samples.classify(classifier, code_maps.decode_batches(model, maps), bar).digits
        share = (read == digits).double().mean().item()
        yield rows, share, samples.standard_error(share, len(digits))


def holds_completions(path):
    """Whether the file at path is one that --json has written."""
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, dict) and {"images", "rows"} <= contents.keys()


def run(args):
    args.device = inputs.find_device(args.device)
    if args.json:
        output = files.OutputFile(Path(args.json), args.overwrite, "a file of completions", holds_completions)
        with cli.errors_name_flag("--json", output.path):
            output.check()
    model, contents, model_path = inputs.open_model(args)
    prior, _, path = inputs.open_prior(args, model, contents)
    if not prior.drop_label:
        raise ValueError(f"--prior {path}: it was trained with --drop-label 0 and knows no images without a class")
    classifier_path = args.classifier or checkpoint.CLASSIFIER
    with cli.errors_name_flag("--classifier", classifier_path):
        classifier, _ = checkpoint.load_classifier(classifier_path, args.device)
    name, _, test_set = inputs.open_data(args, contents)
    if not data.are_digits(test_set) or test_set.shape != contents["dataset"]["shape"]:
        raise ValueError(f"--dataset {name}: the classifier knows only digits of 28×28 pixels as MNIST's")
    count = min(args.images, len(test_set))
    seen, note = data.seen_in_training(contents["dataset"]["name"], name)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads: {count:,} {'' if seen else 'test '}images of "
          f"{name}\n{note}\n"
          "| rows kept | read as the true digit |\n| --- | --- |")
    measured = []
    with tqdm(total=2 * count * (prior.height + 1), unit="img", leave=False, disable=None) as bar:
        for rows, share, error in measure(model, prior, classifier, test_set, args, bar):
            measured.append({"kept": rows, "share": share, "error": error})
            tqdm.write(f"| {rows} of {prior.height} | {share:.1%} ± {error:.1%} |".replace("%", " %"))
    if args.json:
        figures = {"model": str(model_path), "dataset": name, "images": count, "rows": measured}
        with cli.errors_name_flag("--json", output.path):
            output.write((json.dumps(figures, indent=2) + "\n").encode())


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
