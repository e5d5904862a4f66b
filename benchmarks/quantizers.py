"""Quantizers side by side, with one network, one data set and one budget of bits: python3 benchmarks/quantizers.py

For each quantizer a few learning rates with few epochs; with the best of them, by the error on 1,000 training images,
a training for each seed, and a short prior for the first one; then the time of a step. It takes hours. Interrupted, the
same command goes on where it was. All is in --folder: the runs, and results.json with what has been measured.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli

# Of each quantizer the flags of VQ-VAE.py.
OWN = {
    "published codebook": "--codebook-init uniform --restart-after 0",
    "without restarts": "--restart-after 0",
    "without K-means": "--codebook-init uniform",
    "VQ, gradient": "",
    "VQ, EMA": "--codebook-update ema",
    "FSQ": "--quantizer fsq --levels 8,8,8",
}
ADAPTED = {                     # of vector-quantize-pytorch
    "VQ, cosine similarity": "--quantizer cosine",
    "VQ, rotation trick": "--quantizer rotation",
    "SimVQ": "--quantizer simvq",
    "BSQ": "--quantizer bsq",
    "residual VQ, 16 × 32": "--quantizer residual",
}
NAMES = *OWN, *ADAPTED


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("names", nargs="*", type=arguments.one_of(*NAMES), metavar="NAME",
                        help=f"{'; '.join(NAMES)} (default: all of them)")
    parser.add_argument("--data-folder", type=Path, default=Path("MNIST"), metavar="PATH",
                        help=f"where the complete MNIST is, or is downloaded to once {shown}")
    parser.add_argument("--folder", type=Path, default=Path("quantizers"), metavar="PATH",
                        help=f"where the runs and results.json are kept {shown}")
    parser.add_argument("--rates", nargs="+", type=arguments.number(above=0),
                        default=[2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2], metavar="RATE",
                        help="learning rates to choose from (default: 2e-3 4e-3 8e-3 1.6e-2 3.2e-2)")
    parser.add_argument("--rate-epochs", type=arguments.integer(1), default=2, metavar="N",
                        help=f"epochs of a training that only compares rates {shown}")
    parser.add_argument("--num-epochs", type=arguments.integer(1), default=10, metavar="N",
                        help=f"epochs of the trainings that are reported {shown}")
    parser.add_argument("--seeds", type=arguments.integer(1), default=3, metavar="N",
                        help=f"trainings that are reported, with the seeds 0, 1, … {shown}")
    parser.add_argument("--prior-epochs", type=arguments.integer(1), default=2, metavar="N",
                        help=f"epochs of a prior {shown}")
    parser.add_argument("--dataset", type=arguments.one_of(*arguments.DIGIT_SETS), default="MNIST", metavar="NAME",
                        help=f"{', '.join(arguments.DIGIT_SETS)} {shown}")
    parser.add_argument("--processes", type=arguments.integer(1), default=1, metavar="N",
                        help=f"trainings at the same time, of one thread each {shown}")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import json
import math
import os
import re
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from threading import Event, Lock

import torch
from compare import mean_and_deviation
from documents import shown
from run_rows import Script, stop
from timed_trainers import load_script
from tqdm import tqdm

import checkpoint
import data
from metrics import evaluate
from modules import VectorQuantizedVAE, vqvae_losses
from utils import files
from utils.environment import processor
from utils.memory import images_that_fit
from utils.speed import keep_freed_memory

# The same for all: the network and batches of the defaults, K = 512, 9 bits a code.
TRAINING = "--batch-size 128 --hidden-size 40 --k 512 --beta 0.25 --lr-schedule cosine --validation-images 0"
PRIOR = "--layers 2 --width 96 --heads 4 --shift 0 --batch-size 64 --lr 4e-3 --sample-every 0"
WARM_UP_STEPS, TIMED_STEPS, TIMED_ROUNDS = 3, 10, 5
RUNNING, STARTING, STOPPED = [], Lock(), Event()    # scripts; held to start one; no more are started


# ---------------------------------------------------------------- a training, a prior

def run_script(folder, words):
    """Run a script of this repository in a folder, with one thread, and the quantizers of the library if it is there.

    Raises ValueError with its last line if it fails.
    """
    runner = [] if not has_library() else [ROOT / "benchmarks" / "quantizer_adapters.py"]
    script = words[0] if runner else ROOT / words[0]
    with open(folder / f"output-{log_name(words)}.txt", "a") as output:
        with STARTING:
            if STOPPED.is_set():
                raise ValueError(f"{words[0]} was not started")
            process = Script([sys.executable, *runner, script, *map(str, words[1:])], cwd=folder, stdout=output,
                             stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)
            RUNNING.append(process)
        code = process.wait()
        RUNNING.remove(process)
    if code:
        last = (Path(output.name).read_text().strip().splitlines() or [f"ended with status {code}"])[-1]
        raise ValueError(f"{words[0]}: {last} (all of it is in {output.name})")


def log_name(words):
    """A file name for the output of a command: the run's."""
    return next(re.sub(r"\W+", "-", str(word)) for flag, word in pairwise(words)
                if flag in ("--output-folder", "--model"))


def has_library():
    try:
        return bool(version("vector-quantize-pytorch"))
    except PackageNotFoundError:
        return False


def train(args, name, rate, epochs, seed):
    """Train a VQ-VAE, or go on with it. → the path of its model after the last epoch"""
    run = f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}-{rate:g}-{epochs}-{seed}"
    folder = args.folder / "models" / run
    model, last = folder / f"model_{epochs}.pt", folder / "last.pt"
    if not last.exists() or checkpoint.load(last)["epoch"] < epochs:         # the track's last line is written before
        flags = ["--dataset", args.dataset, "--data-folder", os.path.realpath(args.data_folder), *TRAINING.split(),
                 *{**OWN, **ADAPTED}[name].split(), "--lr", rate, "--num-epochs", epochs, "--seed", seed,
                 "--keep-every", epochs, "--save-every", 200]
        more = ["--resume"] if last.exists() else [*flags, "--overwrite"]
        run_script(args.folder, ["VQ-VAE.py", "--output-folder", run, *more])
    return model


@torch.no_grad()
def error_on_training_images(path):
    """The MSE on 1,000 digits of the training set, of MNIST and of MNIST-10k: what a learning rate is chosen by."""
    model, _ = checkpoint.load_model(path)
    images = data.Images(*data.load("MNIST-10k", "")[0][:1000])
    losses, _ = evaluate(model, data.batches(images, images_that_fit(28, 28, model.quantizer.dim)), "cpu")
    return losses.reconstruction


def figures_of_model(path):
    """Those of the last epoch of a training, from its model and its track."""
    columns, *_, last = (path.parent / "track.txt").read_text().splitlines()
    row = dict(zip(columns.split(), last.split()))
    return {"mse": checkpoint.load(path)["test"]["reconstruction"], "perplexity": float(row["perplexity"]),
            "codes_used": int(row["used"])}


def figures_of_prior(args, path):
    """Train a short prior on a model's codes, or go on with it. → its test nats a map, and bits per dimension"""
    words = ["train_prior.py", "--model", path.relative_to(args.folder), "--data-folder",
             os.path.realpath(args.data_folder)]
    last = path.with_name("prior-last.pt")
    if not last.exists():
        run_script(args.folder, [*words, *PRIOR.split(), "--num-epochs", args.prior_epochs, "--save-every", 200,
                                 "--overwrite"])
    elif checkpoint.load_prior(last, path)[1]["epoch"] < args.prior_epochs:
        run_script(args.folder, [*words, "--resume"])
    prior, contents = checkpoint.load_prior(path.with_name("prior.pt"), path)
    test = contents["test"]
    return {"nats_per_map": test["nats_per_code"] * prior.height * prior.width,
            "bits_per_dimension": test["bits_per_dimension"]}


# ---------------------------------------------------------------- the time of a step

def milliseconds_of_steps(names):
    """{name: milliseconds of the fastest training step}: all take turns in this process, with one thread."""
    script = load_script()
    torch.set_num_threads(1)
    keep_freed_memory()             # as a training does
    x = data.to_model_range(data.load("MNIST-10k", "")[0][:128][0])
    steps, seconds = {}, {name: [] for name in names}
    for name in names:
        args = script.get_parser().parse_args([*TRAINING.split(), *{**OWN, **ADAPTED}[name].split()])
        torch.manual_seed(0)
        model = VectorQuantizedVAE(1, args.hidden_size, args.k, quantizer=args.quantizer,
                                   **script.quantizer_settings(args)).to(memory_format=torch.channels_last)
        steps[name] = model, torch.optim.Adam(model.parameters(), lr=1e-3, fused=True)
    for number in range(1 + TIMED_ROUNDS):
        for name, (model, optimizer) in steps.items():
            for _ in range(TIMED_STEPS if number else WARM_UP_STEPS):
                start = time.perf_counter()
                optimizer.zero_grad()
                vqvae_losses(x, model(x), 0.25).total.backward()
                optimizer.step()
                if number:
                    seconds[name].append(time.perf_counter() - start)
    return {name: 1000 * min(values) for name, values in seconds.items()}


# ---------------------------------------------------------------- everything

class Results:
    """What has been measured so far, in a file that holds it after every measurement.

    rates: {name: {rate: error}}; seeds: {name: {seed: figures, and the rate that they were measured with}};
    milliseconds: {name: those of a step}. Raises ValueError if the file is damaged or of other settings.
    """

    def __init__(self, path, settings):
        self.path, self.lock = path, Lock()
        empty = {"settings": settings, "rates": {}, "seeds": {}, "milliseconds": {}}
        try:
            self.contents = json.loads(path.read_bytes()) if path.exists() else empty
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}): move it away") from error
        if not isinstance(self.contents, dict) or not empty.keys() <= self.contents.keys():
            raise ValueError(f"{path} is not a file of results: move it away")
        if self.contents["settings"] != settings:
            raise ValueError(f"{path} holds results of other settings ({self.contents['settings']}): choose another "
                             "--folder")

    def __getitem__(self, part):
        return self.contents[part]

    def add(self, part, name, value, key=None):
        with self.lock:
            if key is None:
                self[part][name] = value
            else:
                self[part].setdefault(name, {})[str(key)] = value
            text = json.dumps(self.contents, indent=1, ensure_ascii=False) + "\n"
            files.write_atomically(self.path, text.encode())

    def best_rate(self, name, rates):
        """Of the rates, the one with the lowest error."""
        return min(rates, key=lambda rate: self["rates"][name][str(rate)])

    def lacks(self, name, rate, seed):
        """Whether figures of this rate and seed have still to be measured."""
        return self["seeds"].get(name, {}).get(str(seed), {}).get("rate") != rate


def run_all(tasks, args, description):
    """Call functions, args.processes at a time, under a progress bar.

    The first error or signal ends it, and the scripts that they run, which save what they have done.
    """
    STOPPED.clear()
    with ThreadPoolExecutor(args.processes) as pool:
        futures = [pool.submit(task) for task in tasks]
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc=description, leave=False, disable=None):
                future.result()
        except BaseException:
            with STARTING:
                STOPPED.set()
            pool.shutdown(wait=False, cancel_futures=True)
            stop(list(RUNNING))
            raise


def measure(args, names, results):
    def compare(name, rate):
        try:
            error = error_on_training_images(train(args, name, rate, args.rate_epochs, 0))
        except ValueError as reason:
            if "try a lower rate" not in str(reason):
                raise
            error = math.inf                    # its losses are not finite
        results.add("rates", name, error, rate)

    def report(name, seed):
        rate = results.best_rate(name, args.rates)
        path = train(args, name, rate, args.num_epochs, seed)
        of_prior = figures_of_prior(args, path) if seed == 0 else {}
        results.add("seeds", name, {"rate": rate, **figures_of_model(path), **of_prior}, seed)

    run_all([lambda name=name, rate=rate: compare(name, rate) for name in names for rate in args.rates
             if str(rate) not in results["rates"].get(name, {})], args, "learning rates")
    best = {name: results.best_rate(name, args.rates) for name in names}
    run_all([lambda name=name, seed=seed: report(name, seed) for seed in range(args.seeds) for name in names
             if results.lacks(name, best[name], seed)], args, "trainings")
    if missing := [name for name in names if name not in results["milliseconds"]]:
        for name, milliseconds in milliseconds_of_steps(missing).items():
            results.add("milliseconds", name, milliseconds)
    return best


def table(best, results, seeds):
    """The figures as Markdown. best: {name of a quantizer: its learning rate}; means are over so many seeds."""
    lines = ["| quantizer | rate | test MSE | perplexity | codes used | nats per map | bits per dimension "
             "| ms per step |", "| --- | --- | --- | --- | --- | --- | --- | --- |"]
    for name, rate in best.items():
        rows = [results["seeds"][name][str(seed)] for seed in range(seeds)]
        cells = [shown(mean_and_deviation([row[key] for row in rows if key in row]), form) for key, form in (
            ("mse", "±.5f"), ("perplexity", ".0f"), ("codes_used", ".0f"), ("nats_per_map", ".1f"),
            ("bits_per_dimension", ".4f"))]
        lines.append(f"| {name} | {rate:g} | {' | '.join(cells)} | {results['milliseconds'][name]:.1f} |")
    return "\n".join(lines)


def run(args):
    names = args.names or list(NAMES)
    if has_library():
        import quantizer_adapters
        quantizer_adapters.add_to_quantizers()
    elif left_out := [name for name in names if name in ADAPTED]:
        print(f"Left out, since they need pip install -r benchmarks/requirements.txt: {'; '.join(left_out)}",
              file=sys.stderr)
        names = [name for name in names if name not in ADAPTED]
    with cli.errors_name_flag("--folder", args.folder), files.locked_folder(args.folder, "--folder"):
        settings = {"training": TRAINING, "prior": PRIOR, "dataset": args.dataset, "rate_epochs": args.rate_epochs,
                    "num_epochs": args.num_epochs, "prior_epochs": args.prior_epochs}
        results = Results(args.folder / "results.json", settings)
        results.contents["machine"] = (f"torch {torch.__version__}, {processor()}, one thread, {args.processes} at a "
                                       "time")
        best = measure(args, names, results)
    edges = {min(args.rates), max(args.rates)} if len(args.rates) > 1 else ()
    at_edge = [f"{name} ({rate:g})" for name, rate in best.items() if rate in edges]
    print(f"{table(best, results, args.seeds)}\n\nMeans over {args.seeds} seeds, with ± their standard deviation; "
          f"nats and bits: of seed 0, on the test set, of the best of {args.prior_epochs} epochs on held-out images. "
          f"All of it is in {results.path}.")
    if at_edge:
        print("The best rate is the lowest or highest that was tried, so that one beyond may be better: "
              f"{'; '.join(at_edge)}")


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
