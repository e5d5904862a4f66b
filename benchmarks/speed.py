"""Benchmarks against the usual implementation and the machine's limit: python3 benchmarks/speed.py [PART ...]

Parts: training, quantizer, quality, sampling, limit, profile (a training step, operation by operation). The candidates
of a part are measured alternately, each in its own process, except for quality, which runs one training after the
other. With --device cuda all of it is measured there.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli

PARTS = "training", "quantizer", "quality", "sampling", "limit", "profile"


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("parts", nargs="*", type=arguments.one_of(*PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: all of them)")
    parser.add_argument("--device", type=arguments.device, default="cpu",
                        help=f"{arguments.DEVICES} {shown}")
    parser.add_argument("--rounds", type=arguments.integer(1), default=5, metavar="N",
                        help=f"measurements of each, of which the median is shown {shown}")
    parser.add_argument("--data-folder", type=arguments.file_name, default="MNIST", metavar="PATH",
                        help=f"where the complete MNIST is, for quality; the other parts need none {shown}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there (default: nowhere)")
    parser.add_argument("--overwrite", action="store_true", help="replace such a file at --json (default: stop)")
    return parser


def check_arguments(parser, args):
    if not args.json:
        parser.check_unused(args, ("overwrite",), "is used only with --json, add it")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import json
import os
import platform
import statistics
import threading
import time
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter, itemgetter

import baseline
import torch
from timed_trainers import (
    LOW_MSE,
    TARGET_MSE,
    TargetMSETrainer,
    TimedTrainer,
    TrainingStopped,
    load_script,
    prepare_training,
)
from torch.autograd import DeviceType
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm
from workers import WORKERS, Worker, json_file, peak_memory, reset_peak_memory, run_rounds, spread

import checkpoint
import data
from modules import vqvae_losses
from utils import inputs
from utils.speed import keep_freed_memory, memory_format, synchronize
from utils.trainer import Trainer
from vector_quantizer import VectorQuantizer

D = 40
SIZES = [(6_272, 64), (6_272, 512), (6_272, 4_096), (6_272, 16_384), (100_000, 64), (100_000, 512), (100_000, 4_096),
         (1_000_000, 64), (1_000_000, 512), (1_000_000, 8_192)]      # N latents, K codes
LARGEST_ON_GPU = 1_000_000, 65_536
MAX_MATRIX = 6e8                # N × K above which implementations with a full matrix are skipped: it takes gigabytes
BYTES_OF_MATRIX = 40            # for each of its numbers, at the peak, with gradients and copies
RECIPES = {
    "published": "--codebook-init uniform --restart-after 0 --validation-images 0",
    "recommended": "--batch-size 64 --lr 2e-3 --lr-schedule cosine --beta 0.35 --codebook-update ema "
                   "--restart-after 100 --num-epochs 12",
}
MATMUL_SIZE, MATMUL_SIZE_ON_GPU = 2048, 8192        # side of the matrices whose product gives the machine's peak rate
ELAPSED = "elapsed, with the waits for a kernel to start"
PROFILED_STEPS, MIN_SHARE = 10, 0.01        # operations below this share of a step's time are not listed
MAX_TIME_RATIO = 40             # limit for the published recipe, relative to the recommended one: it may never arrive


# ---------------------------------------------------------------- training

def make_training(flags):
    """→ a function that trains for one epoch on the bundled digits and returns images/s."""
    script = load_script()
    trainer, batches = prepare_training(script, ["--dataset", "MNIST-10k", *flags.split()], TimedTrainer)
    script.log_epoch = lambda *_: None
    failed = []

    def train():
        try:
            script.train(trainer, batches)
        except BaseException as error:
            failed.append(error)
        finally:
            trainer.epoch_done.release()

    threading.Thread(target=train, daemon=True).start()

    def epoch():
        trainer.start_epoch.release()
        trainer.epoch_done.acquire()
        if failed:
            raise ValueError(f"VQ-VAE.py {flags}: {failed[0]}") from failed[0]
        return trainer.images_per_second
    return epoch


def training(args):
    flags = {"eager": "", "--compile": "--compile", "bfloat16": "--amp", "--compile, bfloat16": "--compile --amp"}
    workers = {"the usual way": Worker(baseline.training, 128, args.device),
               **{name: Worker(make_training, f"{flag} --device {args.device}") for name, flag in flags.items()}}
    speeds = run_rounds(workers, args.rounds)
    for worker in workers.values():
        worker.close()
    rows, baseline_speed = [], statistics.median(speeds["the usual way"])
    for name, values in speeds.items():
        median, relative_range = spread(values)
        rows.append({"what": name, "images_per_second": round(median), "spread": round(relative_range, 3),
                     "times": round(median / baseline_speed, 2)})
    return rows


# ---------------------------------------------------------------- the quantizer

def shape_of(N):
    side = 7 if N % 49 == 0 else 4
    return N // side**2, D, side, side


def make_quantizer(name, device):
    """→ a function (N, K) → seconds and peak extra bytes of one forward and backward pass."""
    if name == "vector-quantize-pytorch":
        from vector_quantize_pytorch import VectorQuantize

    constructors = {
        "this repository": lambda K: VectorQuantizer(K, D, codebook_init="uniform", restart_after=0),
        "full matrix": lambda K: baseline.Quantizer(K, D, baseline.full_matrix),
        "torch.cdist": lambda K: baseline.Quantizer(K, D, baseline.cdist),
        # Codebook loss instead of EMA and no rotation trick: the quantizer of the paper, as in the others.
        "vector-quantize-pytorch": lambda K: VectorQuantize(
            D, K, accept_image_fmap=True, learnable_codebook=True, ema_update=False, rotation_trick=False),
    }
    cache = {}

    def measure(N, K):
        if (N, K) not in cache:
            torch.manual_seed(0)
            cache.clear()
            z_e = torch.randn(shape_of(N)).to(device, memory_format=memory_format(device))
            cache[N, K] = constructors[name](K).to(device), z_e
        module, z_e = cache[N, K]
        z_e = z_e.detach().requires_grad_()
        reset_peak_memory(device)
        before = peak_memory(device)
        repeats = max(1, round((3e7 if device == "cpu" else 3e9) / (N * K)))
        start = time.perf_counter()
        for _ in range(repeats):
            z_q, _, *losses = module(z_e)
            (z_q.sum() + sum(loss.sum() for loss in losses)).backward()
        synchronize(device)
        seconds = (time.perf_counter() - start) / repeats
        return seconds, before and peak_memory(device) - before
    return measure


def quantizer(args):
    names = ["this repository", "full matrix", "torch.cdist"]
    try:
        version("vector-quantize-pytorch")
        names.append("vector-quantize-pytorch")
    except PackageNotFoundError:
        print("vector-quantize-pytorch is left out: pip install -r benchmarks/requirements.txt", file=sys.stderr)
    workers = {name: Worker(make_quantizer, name, args.device) for name in names}
    rows, sizes, largest = [], SIZES, MAX_MATRIX
    if args.device.startswith("cuda"):
        sizes = [*SIZES, LARGEST_ON_GPU]
        largest = torch.cuda.get_device_properties(args.device).total_memory / BYTES_OF_MATRIX
    for N, K in tqdm(sizes, desc="sizes", leave=False, disable=None):
        included = {name: worker for name, worker in workers.items()
                    if largest >= N * K or name == "this repository"}
        results = run_rounds(included, args.rounds if N * K <= MAX_MATRIX else 1, N, K)
        for name, values in results.items():
            median, relative_range = spread([seconds for seconds, _ in values])
            memory = max(extra for _, extra in values) if values[0][1] is not None else None
            rows.append({"N": N, "K": K, "what": name, "ms": round(median * 1e3, 2), "spread": round(relative_range, 3),
                         "peak_MB": memory and round(memory / 1e6),
                         "times": round(median / statistics.median(s for s, _ in results["this repository"]), 2)})
    for worker in workers.values():
        worker.close()
    return rows


# ---------------------------------------------------------------- time to quality

def quality(args):
    """The recommended settings until TARGET_MSE, on a GPU also until LOW_MSE; the published ones until TARGET_MSE, or
    for MAX_TIME_RATIO times as long as the recommended ones took.
    """
    rows, script = [], load_script()
    script.log_epoch = lambda *_: None
    runs = [("recommended", TARGET_MSE), ("published", TARGET_MSE)]
    if args.device.startswith("cuda"):
        runs.append(("recommended", LOW_MSE))
    for name, target in runs:
        trainer, batches = prepare_training(
            script, ["--data-folder", args.data_folder, "--device", args.device, *RECIPES[name].split()],
            TargetMSETrainer)
        trainer.test_batches, trainer.target = batches.test, target
        if name == "published":
            trainer.max_seconds = MAX_TIME_RATIO * rows[0]["seconds"]
        with suppress(TrainingStopped):
            script.train(trainer, batches)
        rows.append({"what": name, "target": target, "seconds": round(trainer.train_seconds, 1),
                     "steps": trainer.state.step, "batch_size": trainer.args.batch_size,
                     "test_mse": round(trainer.mse, 4), "reached": trainer.mse <= target,
                     "times": round(trainer.train_seconds / rows[0]["seconds"], 1) if rows else 1.0})
    return rows


# ---------------------------------------------------------------- sampling

def make_sampler(cached, device):
    prior = checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, checkpoint.PRETRAINED)[0].to(device)

    def measure(count):
        labels, generator = torch.arange(count) % prior.num_classes, torch.Generator().manual_seed(0)
        start = time.perf_counter()
        for chunk in labels.split(500):
            prior.sample(chunk, generator=generator) if cached else baseline.uncached_sample(prior, chunk, generator)
        synchronize(device)
        return time.perf_counter() - start
    return measure


def sampling(args):
    workers = {"cached": Worker(make_sampler, True, args.device), "uncached": Worker(make_sampler, False, args.device)}
    rows = []
    for count in (100, 10_000):         # many take minutes on a CPU: they are drawn once
        results = run_rounds(workers, args.rounds, count) if count == 100 or args.device != "cpu" else \
            {name: [worker(count)] for name, worker in workers.items()}
        for name, values in results.items():
            median, relative_range = spread(values)
            rows.append({"digits": count, "what": name, "seconds": round(median, 3), "spread": round(relative_range, 3),
                         "times": round(median / statistics.median(results["cached"]), 2)})
    for worker in workers.values():
        worker.close()
    return rows


# ---------------------------------------------------------------- limit of the machine

def make_limit(device):
    """→ a function → float32 operations per second of matrix products and of training, operations per image."""
    keep_freed_memory()
    epoch = make_training(f"--device {device}")
    epoch()         # K-means runs in the first epoch
    trainer, _ = prepare_training(load_script(), ["--dataset", "MNIST-10k", "--device", device], Trainer)
    x, model = torch.randn(trainer.args.batch_size, 1, 28, 28, device=device), trainer.model
    model(x)
    with FlopCounterMode(display=False) as counter:
        vqvae_losses(x, model(x), beta=1.0).total.backward()
    per_image = counter.get_total_flops() / len(x)
    side = matmul_size(device)
    a = torch.randn(side, side, device=device)

    def measure():
        start = time.perf_counter()
        for _ in range(20):
            a @ a
        synchronize(device)
        return 20 * 2 * len(a)**3 / (time.perf_counter() - start), per_image * epoch(), per_image
    return measure


def matmul_size(device):
    return MATMUL_SIZE_ON_GPU if device.startswith("cuda") else MATMUL_SIZE


def limit(args):
    worker = Worker(make_limit, args.device)
    results = run_rounds({"eager": worker}, args.rounds)["eager"]
    worker.close()
    matmul_rate, training_rate, per_image = (statistics.median(values) for values in zip(*results))
    side = matmul_size(args.device)
    return [{"what": f"product of two {side:,} × {side:,} matrices",
             "GFLOP_per_second": round(matmul_rate / 1e9)},
            {"what": "training, eager", "GFLOP_per_second": round(training_rate / 1e9),
             "MFLOP_per_image": round(per_image / 1e6, 1), "share_of_limit": round(training_rate / matmul_rate, 2)}]


# ---------------------------------------------------------------- where the time goes

def make_profile(device):
    """→ a function → {operation: milliseconds of a training step}, with one thread on a CPU.

    On a GPU an operation's time is that of its kernels, and ELAPSED that of the whole step, with their pauses.
    """
    torch.set_num_threads(1)
    keep_freed_memory()
    trainer, batches = prepare_training(load_script(), ["--dataset", "MNIST-10k", "--device", device], Trainer)
    model, optimizer, time_of = trainer.model, trainer.optimizer, attrgetter(
        "self_device_time_total" if device.startswith("cuda") else "self_cpu_time_total")
    x = data.to_model_range(batches.train_set[:trainer.args.batch_size][0], device)

    def step():
        optimizer.zero_grad()
        vqvae_losses(x, model(x), beta=1.0).total.backward()
        optimizer.step()

    def measure():
        found = {}
        if device.startswith("cuda"):
            synchronize(device)
            start = time.perf_counter()
            for _ in range(PROFILED_STEPS):
                step()
            synchronize(device)
            found[ELAPSED] = (time.perf_counter() - start) * 1e3 / PROFILED_STEPS
        with torch.profiler.profile() as profiler:
            for _ in range(PROFILED_STEPS):
                step()
        # A GPU's kernels are listed besides the operations that they are part of.
        operations = [event for event in profiler.key_averages() if event.device_type == DeviceType.CPU]
        return found | {event.key: time_of(event) / 1e3 / PROFILED_STEPS for event in operations}
    step()          # K-means runs in the first one
    return measure


def profile(args):
    worker = Worker(make_profile, args.device)
    rounds = run_rounds({"eager": worker}, args.rounds)["eager"]
    worker.close()
    medians = {name: statistics.median(found.get(name, 0) for found in rounds) for name in rounds[0]}
    elapsed = medians.pop(ELAPSED, None)
    total = sum(medians.values())
    rows = [{"what": name, "ms": round(ms, 3), "share": round(ms / total, 3)}
            for name, ms in sorted(medians.items(), key=itemgetter(1), reverse=True) if ms >= MIN_SHARE * total]
    rows.append({"what": "all operations", "ms": round(total, 3), "share": 1.0})
    return [*rows, {"what": ELAPSED, "ms": round(elapsed, 3), "share": round(elapsed / total, 3)}] if elapsed else rows


MEASURE = dict(zip(PARTS, (training, quantizer, quality, sampling, limit, profile)))


# ---------------------------------------------------------------- the report

def table(rows):
    """Rows (dictionaries) as a text table with a column for each key."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [names] + [["–" if row.get(name) is None else f"{row[name]:,}" if isinstance(row[name], int | float)
                        and not isinstance(row[name], bool) else str(row[name]) for name in names] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in cells)


def describe_machine(device):
    packages = {name: version(name) for name in ("torch", "torchvision", "numpy")}
    card = {"device": torch.cuda.get_device_name(device)} if device.startswith("cuda") else {}
    return {**card, "python": platform.python_version(), **packages, "threads": torch.get_num_threads(),
            "cores": os.cpu_count(), "vector_instructions": torch.backends.cpu.get_cpu_capability()}


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        output = json_file(args)
        parts = args.parts or PARTS
        if "quality" in parts:          # fail before the other parts have taken their minutes
            with cli.errors_name_flag("--data-folder", args.data_folder):
                data.load("MNIST", args.data_folder)
        args.device = inputs.find_device(args.device)
        report = {"about": describe_machine(args.device)}
        print(*(f"{name} {value}" for name, value in report["about"].items()), sep=", ")
        try:
            for part in parts:
                report[part] = measure_part(part, args)
                print(f"\n{part}\n{table(report[part])}", flush=True)
        finally:                            # what has been measured is not lost if a later part fails
            if output and len(report) > 1:
                with cli.errors_name_flag("--json", args.json):
                    output.write((json.dumps(report, indent=2) + "\n").encode())


def measure_part(part, args):
    try:
        return MEASURE[part](args)
    except KeyboardInterrupt:
        for worker in WORKERS:
            worker.process.kill()
        raise
    finally:
        for worker in WORKERS:
            worker.close()


if __name__ == "__main__":
    main()
