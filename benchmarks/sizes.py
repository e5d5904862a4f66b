"""Time and memory by image size and codebook, and of whole scripts: python3 benchmarks/sizes.py [PART ...]

Parts: steps (a training step of the VQ-VAE and of its prior), scripts (the peak memory of every script on generated
pictures), folder (seconds and peak memory of every script on the images in --data-folder).
"""

import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli

PARTS = "steps", "scripts", "folder"


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    parser.add_argument("parts", nargs="*", type=arguments.one_of(*PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (default: the first two)")
    parser.add_argument("--data-folder", type=Path, metavar="PATH",
                        help="the images of the part folder (default: none, it has to be given)")
    parser.add_argument("--image-size", type=arguments.multiple_of(4, 8, 512), default=32, metavar="S",
                        help="their size in the part folder (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured there (default: nowhere)")
    parser.add_argument("--overwrite", action="store_true", help="replace such a file at --json (default: stop)")
    return parser


def check_arguments(parser, args):
    if not args.json:
        parser.check_unused(args, ("overwrite",), "is used only with --json, add it")
    if "folder" in args.parts and not (args.data_folder and os.path.isdir(args.data_folder)):
        parser.error(f"--data-folder {args.data_folder}: give the folder of images for the part folder")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import json
import subprocess
import tempfile
import time

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from workers import Worker, json_file, peak_memory, reset_peak_memory

from modules import VectorQuantizedVAE, vqvae_losses
from prior import CodePrior
from utils.environment import processor
from utils.speed import keep_freed_memory

# Image size, --downsample, K.
STEPS = [(64, 4, 512), (128, 4, 512), (128, 8, 512), (256, 8, 512), (256, 16, 512), (512, 8, 512), (512, 16, 512),
         (28, 4, 512), (28, 4, 8_192), (28, 4, 65_536), (256, 16, 8_192), (256, 16, 65_536)]
SCRIPTS = [(64, 4, 512), (64, 4, 8_192), (256, 16, 512), (256, 16, 8_192), (512, 16, 512), (512, 16, 8_192)]
BATCH_SIZE = 8
PRIOR_CODES = 2_048             # in a batch of the prior, but at least one map
ROUNDS = 3                      # of which the fastest counts, after one to warm up
PICTURES = 20                   # in the generated folder: 18 to train
PRIOR = "--layers 4 --width 192 --heads 6"


# ---------------------------------------------------------------- steps

def make_step(size, downsample, K):
    """→ a function that measures the steps of a VQ-VAE for colour images, and of its prior, in its process."""
    def measure():
        keep_freed_memory()
        torch.manual_seed(0)
        model = VectorQuantizedVAE(3, 40, K, downsample, codebook_init="uniform").to(memory_format=torch.channels_last)
        x = torch.rand(BATCH_SIZE, 3, size, size) * 2 - 1
        seconds, memory = measure_step(lambda: vqvae_losses(x, model(x), 1.0).total)
        h, w = model.map_size(size, size)
        rows = max(1, PRIOR_CODES // (h * w))
        prior, maps = CodePrior(K, h, w, embedding=192, heads=6, dropout=0), torch.randint(K, (rows, h, w))
        prior_seconds, prior_memory = measure_step(lambda: -prior.log_prob(maps).mean())
        return {"size": size, "downsample": downsample, "K": K, "codes": h * w, "step_seconds": seconds,
                "step_megabytes": memory, "prior_seconds_per_1000_images": 1000 * prior_seconds / rows,
                "prior_megabytes": prior_memory}
    return measure


def measure_step(compute_loss):
    """→ the seconds of a loss and its backward pass, and the extra memory in MB that they take at most."""
    reset_peak_memory()
    before, seconds = peak_memory(), []
    for _ in range(1 + ROUNDS):
        start = time.perf_counter()
        compute_loss().backward()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:]), (peak_memory() - before) / 1e6 if before else None


def megabytes(value):
    """A number as text; – where the system does not tell."""
    return "–" if value is None else f"{value:.0f}"


def steps(_args):
    rows = []
    print(f"Steps with {BATCH_SIZE} colour images (28 to 512 pixels), D = 40, and with a prior of {PRIOR}\n"
          f"{'size':>5}{'f':>4}{'K':>8}{'codes':>7}{'step s':>9}{'MB':>7}{'prior, s per 1,000 images':>27}{'MB':>7}")
    for case in STEPS:
        worker = Worker(make_step, *case)
        row = worker()
        worker.close()
        rows.append(row)
        print(f"{row['size']:>5}{row['downsample']:>4}{row['K']:>8,}{row['codes']:>7,}{row['step_seconds']:>9.3f}"
              f"{megabytes(row['step_megabytes']):>7}{row['prior_seconds_per_1000_images']:>27.1f}"
              f"{megabytes(row['prior_megabytes']):>7}", flush=True)
    return rows


# ---------------------------------------------------------------- scripts

def write_pictures(folder):
    """Smooth random pictures of 512 pixels in two classes."""
    rng = np.random.default_rng(0)
    for i in range(PICTURES):
        path = folder / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8))
        small.resize((512, 512), Image.Resampling.BICUBIC).save(path)


def run_script(words, folder, until=None):
    """Run a script of this repository to its end, or until a file exists. → seconds, peak memory in MB

    Raises ValueError if it fails.
    """
    start, stopped = time.perf_counter(), False
    with open(folder / "output.txt", "w") as output:
        process = subprocess.Popen([sys.executable, ROOT / words[0], *map(str, words[1:])], cwd=folder, stdout=output,
                                   stderr=output)
        try:
            while True:
                pid, status, usage = os.wait4(process.pid, os.WNOHANG)
                if pid:
                    process.returncode = os.waitstatus_to_exitcode(status)
                    break
                if until and until.exists() and not stopped:
                    seconds, stopped = time.perf_counter() - start, True
                    process.kill()
                time.sleep(0.01)
        finally:
            if process.returncode is None:      # interrupted
                process.kill()
                process.wait()
    if process.returncode and not stopped:
        lines = (folder / "output.txt").read_text().strip().splitlines()
        raise ValueError(f"{words[0]}: {lines[-1] if lines else f'ended with status {process.returncode}'}")
    unit = 1 if sys.platform == "darwin" else 1024          # bytes
    return seconds if stopped else time.perf_counter() - start, usage.ru_maxrss * unit / 1e6


def scripts(_args):
    rows = []
    print("Peak memory of each script in MB, on generated pictures; training with a batch of 1, a prior with 1 map\n"
          f"{'size':>5}{'f':>4}{'K':>8}  " + "".join(f"{name:>15}" for name in script_commands(0, 0, 0)))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_pictures(folder / "pictures")
        for case in tqdm(SCRIPTS, leave=False, disable=None):
            row = {name: run_script(words, folder)[1] for name, words in script_commands(*case).items()}
            rows.append({"size": case[0], "downsample": case[1], "K": case[2], "megabytes": row})
            figures = "".join(f"{value:>15.0f}" for value in row.values())
            tqdm.write(f"{case[0]:>5}{case[1]:>4}{case[2]:>8,}  {figures}")
    return rows


def script_commands(size, downsample, K):
    """{name: words of a command}, in the order in which they run."""
    model = ["--model", f"models/{size}-{K}/best.pt"]
    return {
        "training": ["VQ-VAE.py", "--dataset", "folder", "--data-folder", "pictures", "--image-size", size, "--k", K,
                     "--downsample", downsample, "--batch-size", 1, "--num-epochs", 1, "--output-folder",
                     f"{size}-{K}", "--overwrite"],
        "generate test": ["generate.py", *model, "--overwrite"],
        "random": ["generate.py", *model, "--input", "random", "--overwrite"],
        "codes": ["codes.py", *model, "--output", "codes.npz", "--overwrite"],
        "evaluate": ["evaluate.py", *model],
        "prior": ["train_prior.py", *model, *PRIOR.split(), "--batch-size", 1, "--num-epochs", 1, "--shift", 0],
        "generate prior": ["generate.py", *model, "--input", "prior", "--overwrite"],
    }


# ---------------------------------------------------------------- folder

def folder(args):
    """The start of a training, up to its first step; a hundred reconstructions; the test set; the start of a prior."""
    rows = {}
    print(f"Scripts on {args.data_folder} at {args.image_size} pixels\n{'':<24}{'seconds':>9}{'MB':>8}")
    with tempfile.TemporaryDirectory() as temporary:
        temporary, model = Path(temporary), ["--model", "models/vqvae/last.pt"]
        data_arguments = ["--dataset", "folder", "--data-folder", args.data_folder.resolve()]
        for name, words, until in (
                ("training's start", ["VQ-VAE.py", *data_arguments, "--image-size", args.image_size], "last.pt"),
                ("generate.py", ["generate.py", *model], None), ("evaluate.py", ["evaluate.py", *model], None),
                ("prior's start", ["train_prior.py", *model, "--shift", "0"], "prior-last.pt")):
            until = until and temporary / "models" / "vqvae" / until
            rows[name] = run_script(words, temporary, until)
            print(f"{name:<24}{rows[name][0]:>9.1f}{rows[name][1]:>8.0f}", flush=True)
    return rows


# ---------------------------------------------------------------- everything

def run(args):
    output = json_file(args)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {processor()}")
    measured = {part: {"steps": steps, "scripts": scripts, "folder": folder}[part](args)
                for part in args.parts or PARTS[:2]}
    if output:
        with cli.errors_name_flag("--json", args.json):
            output.write((json.dumps(measured, indent=2) + "\n").encode())


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
