"""How fast is it, against the usual way and against the machine's limit: python3 benchmarks/speed.py [PART ...]

Parts: training, quantizer, quality, sampling, limit. What is compared in a part is measured in turn, in one run, each
in a process of its own; but for quality, which is one training after the other.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

import arguments
import cli

PARTS = "training", "quantizer", "quality", "sampling", "limit"


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("parts", nargs="*", type=arguments.one_of(*PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all of them)")
    parser.add_argument("--rounds", type=arguments.whole_number(1), default=5, metavar="N",
                        help=f"measurements of each, of which the median is shown {shown}")
    parser.add_argument("--data-folder", default="MNIST", metavar="PATH",
                        help=f"where the complete MNIST is, for quality; the other parts need none {shown}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there (default: nowhere)")
    return parser


def parse_arguments(argv=None):
    """The parser and its arguments."""
    parser = get_parser()
    return parser, parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before torch is imported, which takes seconds

import ctypes
import importlib.util
import json
import multiprocessing
import os
import platform
import signal
import statistics
import tempfile
import time
from importlib.metadata import PackageNotFoundError, version

import torch
import usual
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import data
import fast
import files
from metrics import evaluate
from vector_quantizer import VectorQuantizer

D = 40
SIZES = [(6_272, 64), (6_272, 512), (6_272, 4_096), (6_272, 16_384), (100_000, 64), (100_000, 512), (100_000, 4_096),
         (1_000_000, 64), (1_000_000, 512), (1_000_000, 8_192)]      # N latents, K codes
MOST_SCORES = 6e8               # N × K above which those with a full matrix are left out: it takes gigabytes
AIM = 0.0278                    # the test MSE at which the published training ended
RECIPES = {
    "published": "--codebook-init uniform --restart-after 0",
    "recommended": "--batch-size 64 --lr 2e-3 --lr-schedule cosine --beta 0.35 --codebook-update ema "
                   "--restart-after 100",
}
PRODUCT = 2048                  # side of the matrices whose product is the machine's limit
GIVE_UP = 40                    # times what the recommended recipe took: the published settings may not get there


# ---------------------------------------------------------------- measuring

STARTED = []            # every Contender: one that is left waiting would keep the script from ending


class Contender:
    """A process that makes something to measure, and measures it whenever it is called."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, make, arguments))
        former = signal.signal(signal.SIGINT, signal.SIG_IGN)           # Ctrl-C is this script's, which ends them all
        self.process.start()
        signal.signal(signal.SIGINT, former)
        theirs.close()
        STARTED.append(self)

    def __call__(self, *arguments):
        try:
            self.pipe.send(arguments)
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise ValueError("a process that measured has ended by itself: memory may have run out") from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        self.pipe.close()
        self.process.join()


def _serve(pipe, make, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    measure = None
    while True:
        try:
            given = pipe.recv()
        except EOFError:
            return
        try:
            measure = measure or make(*arguments)
            pipe.send(measure(*given))
        except Exception as error:
            pipe.send(error)


def in_turn(contenders, rounds, *arguments):
    """{name: [result of each round]} of contenders {name: Contender}, after a round that does not count."""
    results = {name: [] for name in contenders}
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name, contender in contenders.items():
            result = contender(*arguments)
            if number:
                results[name].append(result)
    return results


def spread(values):
    """Median, and the range as a share of it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median


def peak_memory():
    """The most memory (bytes) that this process has held since reset_peak_memory(); None where Linux is not there."""
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak_memory():
    """What the C library has kept goes back to the system first: it would hide what is taken anew."""
    if Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


# ---------------------------------------------------------------- training

def our_run(flags):
    """A run of VQ-VAE.py, ready to train, and a writer for its logs."""
    spec = importlib.util.spec_from_file_location("vqvae_script", ROOT / "VQ-VAE.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script.Run(script.get_parser().parse_args(flags)), SummaryWriter(tempfile.mkdtemp())


def our_training(flags):
    """→ a function that trains for an epoch of the bundled digits and returns its images/s."""
    run, writer = our_run(["--dataset", "MNIST-10k", *flags.split()])

    def epoch():
        start = time.perf_counter()
        for _ in run.take_steps(writer, tqdm(disable=True)):
            pass
        speed = run.progress.images / (time.perf_counter() - start)
        run.progress.next_epoch(run.generator)
        return speed
    return epoch


def training(args):
    flags = {"eager": "", "--compile": "--compile", "bfloat16": "--amp", "--compile, bfloat16": "--compile --amp"}
    contenders = {"the usual way": Contender(usual.training, 128),
                  **{name: Contender(our_training, given) for name, given in flags.items()}}
    speeds = in_turn(contenders, args.rounds)
    for contender in contenders.values():
        contender.close()
    measured, usually = [], statistics.median(speeds["the usual way"])
    for name, values in speeds.items():
        median, width = spread(values)
        measured.append({"what": name, "images_per_second": round(median), "spread": round(width, 3),
                         "times": round(median / usually, 2)})
    return measured


# ---------------------------------------------------------------- the quantizer

def shape_of(N):
    side = 7 if N % 49 == 0 else 4
    return N // side**2, D, side, side


def quantizer(kind):
    """→ a function (N, K) → seconds and peak extra bytes of one forward and backward pass."""
    if kind == "vector-quantize-pytorch":
        from vector_quantize_pytorch import VectorQuantize

    makers = {
        "this repository": lambda K: VectorQuantizer(K, D, codebook_init="uniform", restart_after=0),
        "full matrix": lambda K: usual.Quantizer(K, D, usual.full_matrix),
        "torch.cdist": lambda K: usual.Quantizer(K, D, usual.cdist),
        # Its codebook learned by its own loss, no rotation trick: the paper's, as the others.
        "vector-quantize-pytorch": lambda K: VectorQuantize(
            D, K, accept_image_fmap=True, learnable_codebook=True, ema_update=False, rotation_trick=False),
    }
    made = {}

    def measure(N, K):
        if (N, K) not in made:
            torch.manual_seed(0)
            made.clear()
            made[N, K] = makers[kind](K), torch.randn(shape_of(N)).contiguous(memory_format=torch.channels_last)
        module, z_e = made[N, K]
        z_e = z_e.detach().requires_grad_()
        reset_peak_memory()
        before = peak_memory()
        repeats = max(1, round(3e7 / (N * K)))
        start = time.perf_counter()
        for _ in range(repeats):
            z_q, _, *losses = module(z_e)
            (z_q.sum() + sum(loss.sum() for loss in losses)).backward()
        seconds = (time.perf_counter() - start) / repeats
        return seconds, before and peak_memory() - before
    return measure


def quantizers(args):
    names = ["this repository", "full matrix", "torch.cdist"]
    try:
        version("vector-quantize-pytorch")
        names.append("vector-quantize-pytorch")
    except PackageNotFoundError:
        print("vector-quantize-pytorch is left out: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    contenders = {name: Contender(quantizer, name) for name in names}
    measured = []
    for N, K in tqdm(SIZES, desc="sizes", leave=False, disable=None):
        some = {name: contender for name, contender in contenders.items()
                if N * K <= MOST_SCORES or name == "this repository"}
        results = in_turn(some, args.rounds if N * K <= MOST_SCORES else 1, N, K)
        for name, values in results.items():
            median, width = spread([seconds for seconds, _ in values])
            memory = max(extra for _, extra in values) if values[0][1] is not None else None
            measured.append({"N": N, "K": K, "what": name, "ms": round(median * 1e3, 2), "spread": round(width, 3),
                             "peak_MB": memory and round(memory / 1e6),
                             "times": round(median / statistics.median(s for s, _ in results["this repository"]), 2)})
    for contender in contenders.values():
        contender.close()
    return measured


# ---------------------------------------------------------------- time to quality

def time_to_quality(args):
    """Seconds of training until the test MSE is AIM or lower; the tests themselves are not counted."""
    measured, most = [], None
    for name in ("recommended", "published"):
        run, writer = our_run(["--data-folder", args.data_folder, *RECIPES[name].split()])
        seconds, mse, check, start = 0.0, float("inf"), 10, time.perf_counter()
        with tqdm(desc=name, total=run.steps * run.args.num_epochs, unit="step", leave=False, disable=None) as bar:
            while mse > AIM and not run.finished() and (most is None or seconds < most):
                for _ in run.take_steps(writer, tqdm(disable=True)):
                    bar.update()
                    if run.progress.step < check:
                        continue
                    seconds += time.perf_counter() - start
                    mse = evaluate(run.model, run.test_batches, "cpu")[0].reconstruction
                    run.model.train()
                    check, start = max(check + 5, round(check * 1.05)), time.perf_counter()
                    bar.set_postfix(mse=f"{mse:.4f}", refresh=False)
                    if mse <= AIM or (most is not None and seconds >= most):
                        break
                else:
                    run.progress.next_epoch(run.generator)
        measured.append({"what": name, "seconds": round(seconds, 1), "steps": run.progress.step,
                         "batch_size": run.args.batch_size, "test_mse": round(mse, 4), "reached": mse <= AIM,
                         "times": round(seconds / measured[0]["seconds"], 1) if measured else 1.0})
        most = most or GIVE_UP * seconds
    return measured


# ---------------------------------------------------------------- sampling

def sampler(cached):
    prior = checkpoint.load_prior(checkpoint.PRETRAINED.with_name("prior.pt"), checkpoint.PRETRAINED)[0]

    def measure(count):
        labels, generator = torch.arange(count) % prior.num_classes, torch.Generator().manual_seed(0)
        start = time.perf_counter()
        for some in labels.split(500):
            prior.sample(some, generator=generator) if cached else usual.uncached_sample(prior, some, generator)
        return time.perf_counter() - start
    return measure


def sampling(args):
    contenders = {"cached": Contender(sampler, True), "uncached": Contender(sampler, False)}
    measured = []
    for count, rounds in ((100, args.rounds), (10_000, 1)):
        results = in_turn(contenders, rounds, count) if count == 100 else \
            {name: [contender(count)] for name, contender in contenders.items()}
        for name, values in results.items():
            median, width = spread(values)
            measured.append({"digits": count, "what": name, "seconds": round(median, 3), "spread": round(width, 3),
                             "times": round(median / statistics.median(results["cached"]), 2)})
    for contender in contenders.values():
        contender.close()
    return measured


# ---------------------------------------------------------------- the limit

def limits(flags):
    """→ a function that measures the rate of products and of training, in float32 operations per second."""
    fast.keep_freed_memory()
    epoch = our_training(flags)
    epoch()         # K-means is over
    run, _ = our_run(["--dataset", "MNIST-10k"])
    x = torch.randn(run.args.batch_size, 1, 28, 28)
    run.losses_of(x)
    with FlopCounterMode(display=False) as counter:
        run.losses_of(x)[0].total.backward()
    per_image = counter.get_total_flops() / len(x)
    a = torch.randn(PRODUCT, PRODUCT)

    def measure():
        start = time.perf_counter()
        for _ in range(20):
            a @ a
        return 20 * 2 * len(a)**3 / (time.perf_counter() - start), per_image * epoch(), per_image
    return measure


def limit(args):
    contender = Contender(limits, "")
    results = in_turn({"eager": contender}, args.rounds)["eager"]
    contender.close()
    rate, reached, per_image = (statistics.median(values) for values in zip(*results))
    return [{"what": f"product of two {PRODUCT:,} × {PRODUCT:,} matrices", "GFLOP_per_second": round(rate / 1e9)},
            {"what": "training, eager", "GFLOP_per_second": round(reached / 1e9),
             "MFLOP_per_image": round(per_image / 1e6, 1), "share_of_limit": round(reached / rate, 2)}]


MEASURE = dict(zip(PARTS, (training, quantizers, time_to_quality, sampling, limit)))


# ---------------------------------------------------------------- the report

def table(rows):
    """Rows of the same kind as text, a column for each of their keys."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [["–" if row.get(name) is None else f"{row[name]:,}" if isinstance(row[name], int | float)
                        and not isinstance(row[name], bool) else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def about():
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    return {"python": platform.python_version(), **packages, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "vector_instructions": torch.backends.cpu.get_cpu_capability()}


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line():
        if args.json:
            with cli.named("--json", args.json):
                files.check_writable(args.json)
        parts = args.parts or PARTS
        if "quality" in parts:          # found out before the others have taken their minutes
            with cli.named("--data-folder", args.data_folder):
                data.load("MNIST", args.data_folder)
        report = {"about": about()}
        print(*(f"{name} {value}" for name, value in report["about"].items()), sep=", ")
        for part in parts:
            try:
                report[part] = MEASURE[part](args)
            except KeyboardInterrupt:
                for contender in STARTED:
                    contender.process.kill()
                raise
            finally:
                for contender in STARTED:
                    contender.close()
            print(f"\n{part}\n{table(report[part])}", flush=True)
        if args.json:
            files.write_whole(args.json, (json.dumps(report, indent=2) + "\n").encode())


if __name__ == "__main__":
    main()
