"""What reproduce.py runs: for each row of the documents' tables its command, and the figures to take from its output.

A figure's path is its place in the output: of a training {"epochs": [a line of its track as {column: number}, …]}, of
evaluate.py and the other scripts the JSON that they write; "*" is every key there. The tables themselves are in
result_tables.py.
"""

import re
from math import inf
from typing import NamedTuple


class Kind(NamedTuple):
    """A kind of figure, and how far a measured one may be from that of the documents.

    deviation is the standard deviation of a single training, over seeds or over processors, which round differently;
    where the seeds of the documents deviate by more, theirs is taken. The means of n and m runs may differ by three
    standard deviations of their difference, 3·√(1/n + 1/m) times it.
    rounding is by how much a figure of the shipped weights may differ. Each is (share of the documents' figure,
    absolute), of which the larger counts.
    """

    title: str
    form: str                   # how reproduce.py prints it
    deviation: tuple
    rounding: tuple


# Over three seeds of the complete MNIST the standard deviation is 0.1 to 2.8 % of the MSE, 2 to 14 % of the perplexity,
# and up to 3 of the codes used (docs/results.md); of the bundled digits, at a high constant rate, 8 % of the MSE. A
# share of 10,000 samples has a standard error of up to 0.38 points, one of 1,000 completions of up to 1.6. The nats of
# two priors trained alike differ by 0.5 %.
KINDS = {
    "mse": Kind("test MSE", ".5f", (0.035, 0), (0.01, 0)),
    "validation": Kind("validation MSE", ".5f", (0.035, 0), (0.01, 0)),
    "training": Kind("training MSE", ".5f", (0.035, 0), (0.01, 0)),
    "codebook": Kind("codebook loss", ".5f", (0.035, 0), (0.01, 0)),
    "psnr": Kind("PSNR in dB", ".2f", (0, 0.15), (0, 0.05)),            # 3.5 % and 1 % of the MSE
    "perplexity": Kind("perplexity", ".1f", (0.06, 1), (0.01, 0.5)),
    "used": Kind("codes used", ".0f", (0.01, 3), (0, 2)),
    "nats": Kind("nats per code", ".4f", (0.005, 0), (0.002, 0)),
    "bits": Kind("bits", ".4f", (0.005, 0), (0.002, 0)),
    "recognised": Kind("recognised", ".2%", (0, 0.003), (0, 0.005)),
    "frechet": Kind("Fréchet distance", ".2f", (0.05, 0.015), (0.05, 0.02)),
    "precision": Kind("precision", ".2%", (0, 0.006), (0, 0.01)),
    "recall": Kind("recall", ".2%", (0, 0.006), (0, 0.01)),
    "copies": Kind("counted as copies", ".2%", (0, 0.003), (0, 0.005)),
    "ratio": Kind("median ratio of distances", ".3f", (0, 0.01), (0, 0.01)),
    "accuracy": Kind("accuracy", ".2%", (0, 0.0005), (0, 0.0005)),
    "read": Kind("read as the true digit", ".1%", (0, 0.016), (0, 0.03)),
    "error": Kind("standard error", ".2%", (0, 0.001), (0, 0.003)),
    # Of quantizers.py: the root mean square of the eleven deviations over three seeds. The nats of the same seed differ
    # by 1 % from processor to processor, but where two rates are equally good either may be chosen, and those of VQ by
    # gradient were then 14 % apart.
    "compared_mse": Kind("test MSE", ".5f", (0.06, 0), (0, 0)),
    "compared_perplexity": Kind("perplexity", ".1f", (0.17, 1), (0, 0)),
    "compared_used": Kind("codes used", ".0f", (0.14, 3), (0, 0)),
    "compared_nats": Kind("nats per map", ".1f", (0.035, 0), (0, 0)),
    "compared_bits": Kind("bits", ".4f", (0.035, 0), (0, 0)),
    # Two rates may be equally good, and times differ from machine to machine.
    "rate": Kind("learning rate", "g", (0, inf), (0, inf)),
    "ms": Kind("milliseconds per step", ".1f", (0, inf), (0, inf)),
}


class Row(NamedTuple):
    """A command of the documents, run once for each seed."""

    name: str
    group: str                  # under which it is listed and can be asked for
    command: str                # as the documents show it; reproduce.py adds where the data and the output are
    figures: dict               # {name: path in the output}; the first word of a name is its kind
    minutes: float              # of a run, with one thread of an AMD EPYC (AVX2)
    seeds: tuple = (0,)
    after: tuple = ()           # names of all rows whose models it needs
    dataset: str = "MNIST"      # which has to be there, or is downloaded
    given: bool = False         # whether it measures the shipped weights
    repeats: str | None = None  # the row whose figures in the documents it measures again, on weights made anew

    @property
    def slug(self):
        """The row's name in names of files."""
        return re.sub(r"[^a-z0-9.]+", "-", self.name.lower()).strip("-")


def kind_of(figure):
    """The Kind of a figure, by the first word of its name."""
    return KINDS[figure.split()[0]]


# ---------------------------------------------------------------- the figures of an output

TRAINED = {"mse": "epochs.-1.test_recon", "perplexity": "epochs.-1.perplexity", "used": "epochs.-1.used"}
LONG = {f"{name} epoch {epoch}": f"epochs.{epoch - 1}.{column}" for epoch in (10, 20, 30) for name, column in (
    ("training", "train_recon"), ("mse", "test_recon"), ("perplexity", "perplexity"), ("used", "used"))}
MODEL = {"mse": "mse", "psnr": "psnr", "codebook": "codebook_loss", "perplexity": "perplexity", "used": "codes_used",
         "bits": "bits_per_dimension"}
PRIOR = {"nats": "prior.nats_per_code", "bits prior": "prior.bits_per_dimension"}
JUDGED = "recognised", "frechet", "precision", "recall"
SAMPLES = {"recognised samples": "prior.samples.recognised",
           "error recognised samples": "prior.samples.recognised_error", "frechet samples": "prior.samples.frechet"}
JUDGED_IMAGES = {"samples": "samples", "reconstructions": "reconstructions", "noise": "random", "test set": "test_set"}


def judgements(judge, place):
    """The figures of all images by one classifier, whose name their names end with; the place is that in the output."""
    found = {f"{figure} {name}{judge}": f"{place}.{part}.{figure}" for figure in JUDGED
             for name, part in JUDGED_IMAGES.items()}
    # Shares are shown with their standard errors.
    return found | {f"error {name}": f"{path}_error" for name, path in found.items() if "frechet" not in name}


JUDGEMENTS = judgements("", "prior") | judgements(" by the transformer", "prior.second_classifier")
COPIES = {f"{figure} {name}": f"prior.copies.{part}.{key}" for figure, key in (
    ("copies", "flagged"), ("error copies", "flagged_error"), ("ratio", "median_ratio")) for name, part in (
    ("samples", "samples"), ("reconstructions", "reconstructions"), ("planted", "noisy_copies"),
    ("planted reconstructed", "reconstructed_copies"), ("test set", "test_set"))}
ACCURACY = {"accuracy": "epochs.-1.test_accuracy"}
COMPLETED = {f"{figure} {kept} rows": f"rows.{kept}.{key}" for kept in range(8) for figure, key in (
    ("read", "share"), ("error", "error"))}
QUANTIZERS = ("published codebook", "without restarts", "without K-means", "VQ, gradient", "VQ, EMA", "FSQ",
              "VQ, cosine similarity", "VQ, rotation trick", "SimVQ", "BSQ", "residual VQ, 16 × 32")
COMPARED = {f"{figure} {name}": path.format(name) for name in QUANTIZERS for figure, path in (
    ("rate", "seeds.{}.0.rate"), ("compared_mse", "seeds.{}.*.mse"), ("compared_perplexity", "seeds.{}.*.perplexity"),
    ("compared_used", "seeds.{}.*.codes_used"), ("compared_nats", "seeds.{}.0.nats_per_map"),
    ("compared_bits", "seeds.{}.0.bits_per_dimension"), ("ms", "milliseconds.{}"))}

# ---------------------------------------------------------------- the rows

TRAIN, ALL_IMAGES = "python3 VQ-VAE.py", "--validation-images 0"
LOWEST = "--batch-size 64 --lr 4e-3 --lr-schedule onecycle --beta 0.1 --restart-after 100"
RECOMMENDED = "--batch-size 64 --lr 2e-3 --lr-schedule cosine --beta 0.35 --codebook-update ema --restart-after 100"
BUNDLED = "--dataset MNIST-10k --batch-size 32 --lr 4e-3 --beta 0.25"
COLOUR = ("--dataset folder --data-folder cifar10 --image-size 32 --hidden-size 64 --batch-size 64 --lr 2e-3 "
          "--lr-schedule cosine --beta 0.25 --restart-after 100 --num-epochs 20 --validation-images 0")
EVALUATE, COMPLETE = "python3 evaluate.py", "python3 benchmarks/completions.py"
SAMPLING = [f"temperature {value}" for value in ("0.9", "0.8", "0.7")] + ["guidance 1.5", "guidance 2"]
SEEDS = 0, 1, 2
# One flag of the lowest-loss settings, over three epochs; the values that they have are the row "three epochs".
SETTINGS = {"hidden-size": (8, 16, 24, 32, 48, 64), "beta": (0.25, 0.5, 1, 2), "k": (64, 128, 256, 1024)}
THREE_EPOCHS = {"hidden-size": 40, "beta": 0.1, "k": 512}
CODEBOOKS = [(init, restart, update) for restart in (0, 20) for init in ("uniform", "kmeans")
             for update in ("gradient", "ema")]

ROWS = [
    Row("published", "results",
        f"{TRAIN} --codebook-init uniform --restart-after 0 {ALL_IMAGES} --output-folder published", TRAINED, 11,
        SEEDS),
    Row("defaults", "results", f"{TRAIN} {ALL_IMAGES} --output-folder defaults", TRAINED, 11, SEEDS),
    Row("EMA", "results", f"{TRAIN} --codebook-update ema {ALL_IMAGES} --output-folder ema", TRAINED, 11, SEEDS),
    Row("lowest loss", "results", f"{TRAIN} {LOWEST} --num-epochs 15 --output-folder lowest", TRAINED, 18, SEEDS),
    Row("recommended", "results", f"{TRAIN} {RECOMMENDED} --num-epochs 12 --output-folder recommended",
        TRAINED | {"mse epoch 1": "epochs.0.test_recon", "validation": "epochs.-1.val_recon"}, 15, SEEDS),

    Row("MNIST-10k", "bundled digits", f"{TRAIN} {BUNDLED} --output-folder MNIST-10k", TRAINED, 3,
        SEEDS, dataset="MNIST-10k"),
    Row("uniform", "bundled digits",
        f"{TRAIN} {BUNDLED} --codebook-init uniform --restart-after 0 {ALL_IMAGES} --output-folder uniform", TRAINED, 3,
        SEEDS, dataset="MNIST-10k"),

    *(Row(f"codebook {init} {restart} {update}", "codebook",
          f"{TRAIN} --num-epochs 3 {ALL_IMAGES} --codebook-init {init} --restart-after {restart} "
          f"--codebook-update {update}", TRAINED, 4) for init, restart, update in CODEBOOKS),

    Row("three epochs", "settings", f"{TRAIN} {LOWEST} --num-epochs 3", TRAINED, 4),
    Row("three epochs EMA", "settings", f"{TRAIN} {LOWEST} --num-epochs 3 --codebook-update ema", TRAINED, 4),
    *(Row(f"{flag} {value}", "settings", f"{TRAIN} {LOWEST} --num-epochs 3 --{flag} {value}", TRAINED, 4)
      for flag, values in SETTINGS.items() for value in values),
    Row("thirty epochs", "long run", f"{TRAIN} --num-epochs 30 {ALL_IMAGES} --output-folder defaults-30", LONG, 33),

    Row("shipped", "samples", f"{EVALUATE} --prior pretrained/prior.pt", MODEL | PRIOR | JUDGEMENTS | COPIES, 7,
        given=True),
    *(Row(flags, "samples", f"{EVALUATE} --prior pretrained/prior.pt --{flags}", SAMPLES, 7, given=True)
      for flags in SAMPLING),
    Row("completions", "samples", COMPLETE, COMPLETED, 2, given=True),
    Row("classifier", "samples", "python3 train_classifier.py", ACCURACY, 20),
    Row("classifier transformer", "samples", "python3 train_classifier.py --architecture transformer "
        "--output classifier-transformer --num-epochs 15 --batch-size 64 --lr 1.5e-3", ACCURACY, 50),

    # The shipped files made again, from nothing: the prior of the row "recommended", and its samples.
    Row("prior", "pipeline", "python3 train_prior.py --model models/recommended/best.pt --amp", {}, 230,
        after=("recommended",)),
    Row("pipeline samples", "pipeline",
        f"{EVALUATE} --model models/recommended/best.pt --prior models/recommended/prior.pt",
        MODEL | PRIOR | JUDGEMENTS | COPIES, 7, after=("recommended", "prior"), repeats="shipped"),
    *(Row(f"pipeline {flags}", "pipeline",
          f"{EVALUATE} --model models/recommended/best.pt --prior models/recommended/prior.pt --{flags}", SAMPLES, 7,
          after=("recommended", "prior"), repeats=flags) for flags in SAMPLING),
    Row("pipeline completions", "pipeline", f"{COMPLETE} --model models/recommended/best.pt", COMPLETED, 2,
        after=("recommended", "prior"), repeats="completions"),

    Row("CIFAR-10", "photographs", f"{TRAIN} {COLOUR} --output-folder cifar10", {}, 64, dataset="CIFAR-10"),
    Row("CIFAR-10 prior", "photographs", "python3 train_prior.py --model models/cifar10/best.pt --width 128 --heads 4 "
        "--batch-size 64 --lr 2e-3 --num-epochs 8 --shift 0", {}, 61, after=("CIFAR-10",), dataset="CIFAR-10"),
    Row("CIFAR-10 pipeline", "photographs",
        f"{EVALUATE} --model models/cifar10/best.pt --prior models/cifar10/prior.pt", MODEL | PRIOR, 10,
        after=("CIFAR-10", "CIFAR-10 prior"), dataset="CIFAR-10"),
    Row("CIFAR-10 shipped", "photographs", f"{EVALUATE} --model pretrained/vqvae-cifar10.pt", MODEL, 0.3,
        dataset="CIFAR-10", given=True),

    Row("quantizers", "quantizers", "python3 benchmarks/quantizers.py", COMPARED, 700),
]
