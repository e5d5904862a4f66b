"""Train a VQ-VAE: python3 VQ-VAE.py [--dataset MNIST-10k] [--output-folder NAME] ...

Writes models/NAME (checkpoints, arguments, a text track) and logs/NAME (TensorBoard).
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli

DOWNSAMPLES = 4, 8, 16
LARGEST_SIDE = 512          # pixels
SCHEDULES = "constant", "cosine", "onecycle"
CODEBOOK_UPDATES, CODEBOOK_INITS = ("gradient", "ema"), ("kmeans", "uniform")
QUANTIZER_ARGUMENTS = "codebook_update", "codebook_init", "restart_after", "levels"


def get_parser(quantizers=()):
    """The parser. quantizers: the names that --quantizer takes; empty before torch is imported, when it takes any."""
    parser = cli.Parser(check_arguments, description=__doc__)
    shown = "(default: %(default)s)"

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", type=arguments.one_of(*arguments.DATASETS), default="MNIST", metavar="NAME",
                       help=f"{', '.join(arguments.DATASETS)}; MNIST-10k are the 10,000 digits in MNIST/ that need no "
                            f"download, folder is any folder of images {shown}")
    group.add_argument("--data-folder", type=arguments.file_name, default="MNIST", metavar="PATH",
                       help=f"where the data set is, or is downloaded to once; the images of --dataset folder {shown}")
    group.add_argument("--image-size", type=arguments.multiple_of(DOWNSAMPLES[0], 8, LARGEST_SIDE), default=64,
                       metavar="S", help="with --dataset folder: images become S×S pixels, S is a multiple of "
                                         f"--downsample, at least twice as large, up to {LARGEST_SIDE} {shown}")
    group.add_argument("--channels", type=int, choices=(1, 3), default=3,
                       help=f"with --dataset folder: 3 for colour, 1 for grey {shown}")
    cli.add_validation_images(group)
    cli.add_num_workers(group)

    add_model_flags(parser.add_argument_group("model"), quantizers)

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=arguments.integer(1), default=128, metavar="N",
                       help=f"images per step, of all processes together {shown}")
    group.add_argument("--num-epochs", "--num_epoch", type=arguments.integer(1), default=10, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=arguments.number(above=0), default=2e-4, metavar="RATE",
                       help=f"peak learning rate of Adam {shown}")
    group.add_argument("--lr-schedule", type=arguments.one_of(*SCHEDULES), default="constant", metavar="NAME",
                       help=f"constant; cosine: falls to 0; onecycle: rises for 30 %% of the steps, then falls {shown}")
    group.add_argument("--beta", type=arguments.number(minimum=0, below=1e6), default=1.0, metavar="β",
                       help=f"weight of the commitment loss, useful from 0.1 to 2.0 {shown}")
    group.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                       help=f"seed of weights, data order and restarts {shown}")
    group.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                       help=f"{arguments.DEVICES} {shown}")
    cli.add_speed_arguments(group)

    group = parser.add_argument_group("output")
    group.add_argument("--output-folder", type=arguments.name_inside("models"), default="vqvae", metavar="NAME",
                       help=f"the run's name: writes models/NAME and logs/NAME {shown}")
    group.add_argument("--keep-every", type=arguments.integer(0), default=1, metavar="EPOCHS",
                       help="write model_EPOCH.pt every EPOCHS epochs, besides best.pt and last.pt; 0 means never "
                            "(default: %(default)s)")
    cli.add_run_arguments(group, "a run of that name, its prior included")
    return parser


def add_model_flags(group, quantizers):
    """The flags of network and quantizer."""
    shown = "(default: %(default)s)"
    group.add_argument("--hidden-size", "--hidden-size-vae", type=arguments.integer(1), default=40, metavar="D",
                       help=f"size D of a latent vector and of the hidden layers {shown}")
    group.add_argument("--k", type=arguments.integer(1), default=512, metavar="K",
                       help=f"number of codes; with fsq the product of --levels, and need not be given {shown}")
    group.add_argument("--downsample", type=int, choices=DOWNSAMPLES, default=DOWNSAMPLES[0],
                       help="side in pixels of the square that a code covers; 8 or 16, for larger images, give a "
                            f"quarter or a sixteenth of the codes {shown}")
    group.add_argument("--quantizer", type=arguments.one_of(*quantizers) if quantizers else str, default="vq",
                       metavar="NAME", help="vq: the nearest of K learned codes; fsq: finite scalar quantization, on a "
                                            "fixed grid; or another one of QUANTIZERS in vector_quantizer.py, which "
                                            f"takes those of the next four flags that it names {shown}")
    group.add_argument("--codebook-update", type=arguments.one_of(*CODEBOOK_UPDATES), default="gradient", metavar="HOW",
                       help=f"the codebook learns by the codebook loss (gradient) or by moving averages (ema) {shown}")
    group.add_argument("--codebook-init", type=arguments.one_of(*CODEBOOK_INITS), default="kmeans", metavar="HOW",
                       help=f"kmeans on the first batch's latents, or uniform in ±1/K {shown}")
    group.add_argument("--restart-after", type=arguments.integer(0), default=20, metavar="STEPS",
                       help="reset a code unused for STEPS steps to a random latent of the batch; 0 means never "
                            "(default: %(default)s)")
    group.add_argument("--levels", type=arguments.levels, default=arguments.LEVELS, metavar="L,L,...",
                       help=f"fsq only: number of levels of each dimension; K is their product {shown}")


def check_arguments(parser, args):
    """End with an error if arguments contradict each other."""
    if args.dataset != arguments.DATASETS[-1] and not args.resume:
        parser.check_unused(args, ("image_size", "channels"), "is used only with --dataset folder, add it")
    if args.image_size % args.downsample or args.image_size < 2 * args.downsample:
        parser.error(f"--image-size {args.image_size} --downsample {args.downsample}: the size is a multiple of "
                     "--downsample, and at least twice as large")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import inspect
import json
import math
import re
import time
from pathlib import Path

import torch
from torch.optim import lr_scheduler
from tqdm import tqdm

import checkpoint
import data
from metrics import code_counts, evaluate, perplexity
from modules import Losses, VectorQuantizedVAE, check_state, check_training_mode, vqvae_losses
from utils import distributed, files, inputs, speed, tensorboard_logs
from utils.run_files import RunFiles
from utils.train_state import check_metadata, seed_everything, set_deterministic
from utils.trainer import Trainer
from utils.training_data import describe_best, describe_split, load_batches
from vector_quantizer import QUANTIZERS

PROJECTOR_IMAGES = 1000     # test images, whose reconstructions give the codes' pictures in the projector
# Letters: B images, C channels, H×W pixels, h×w latents of size D, K codes.


# ---------------------------------------------------------------- the training

def train(trainer, batches):
    """Epoch after epoch: train, evaluate, save, log."""
    args, model, optimizer, schedule = trainer.args, trainer.model, trainer.optimizer, trainer.schedule

    def compute_losses(x):
        """The losses of images x (B, C, H, W), and the codes chosen for them (B, h, w)."""
        with trainer.autocast():
            output = model(x)
            return vqvae_losses(x, output, args.beta), output.indices

    # The first step is not compiled: a quantizer may initialise itself in it, as K-means does the codebook.
    compute_losses = trainer.accelerate(compute_losses, compile_if=lambda: trainer.state.step > 0)
    for epoch in trainer.epochs():                            # where it left off, if resumed
        model.train()
        for images, _ in trainer.batches(batches.train):
            x = data.to_model_range(images, args.device)              # (B, C, H, W) in [-1, 1]
            losses, indices = compute_losses(x)
            optimizer.zero_grad()
            losses.total.backward()
            optimizer.step()
            schedule.step()
            trainer.after_step(losses, code_counts(indices, args.k))  # log, save, notice signals

        validation, _ = evaluate_on(trainer, batches.validation, "validating")
        test, test_counts = evaluate_on(trainer, batches.test, "testing")            # nothing is chosen by it
        evaluated = {"validation": validation, "test": test} if args.validation_images else {"test": test}
        trainer.save_epoch(validation and validation.reconstruction,
                           {name: losses._asdict() for name, losses in evaluated.items()})
        if distributed.is_main_process():
            log_epoch(trainer, epoch, evaluated, test_counts, batches)


def evaluate_on(trainer, batches, what):
    """Losses, and how often each code was chosen (K,), over batches; without batches both None."""
    if batches is None:
        return None, None
    bar = tqdm(batches, desc=what, leave=False, disable=distributed.hide_progress_bar())
    return evaluate(trainer.model, bar, trainer.args.device, trainer.args.beta)


def log_epoch(trainer, epoch, evaluated, test_counts, batches):
    """The epoch's line in the track, its curves and its pictures; after the last epoch, the codebook's as well.

    evaluated: on the validation set, if there is one, and on the test set, {name: Losses}.
    """
    args, model, state, writer = trainer.args, trainer.model, trainer.state, trainer.writer
    restarts = state.restarts.item()
    position = trainer.position() if trainer.x_axis == "images" else epoch
    tensorboard_logs.log_epoch(writer, epoch, position, evaluated, test_counts, state.code_counts.cpu(), restarts)
    values = {"epoch": epoch, "step": state.step, "perplexity": perplexity(test_counts), "restarts": restarts,
              "used": int((test_counts > 0).sum()), "seconds": trainer.epoch_seconds()}
    for split, losses in {"train": state.mean_losses(), "val": evaluated.get("validation"), "test": evaluated["test"]
                          }.items():
        values |= zip((f"{split}_{loss}" for loss in ("recon", "codebook", "commit")), losses or ())
    with trainer.optional("the use of the codes"):
        tensorboard_logs.log_code_use(writer, test_counts, epoch)
    with trainer.optional("the reconstructions"):
        tensorboard_logs.log_images(writer, model, batches.shown, epoch)
    if epoch == args.num_epochs:
        with trainer.optional("the codebook in the projector"):
            max_images = tensorboard_logs.images_in_grid(PROJECTOR_IMAGES, *batches.test_set.shape[1:])
            tensorboard_logs.log_codebook(writer, model, test_counts, batches.test_set[:max_images][0].cpu(), epoch)
        best = values if state.best_epoch == epoch else tensorboard_logs.track_row(state.track, state.best_epoch)
        figures = {"at_end/test_mse": evaluated["test"].reconstruction, "at_end/test_perplexity": values["perplexity"],
                   "at_end/test_used": values["used"], "best/epoch": state.best_epoch,
                   "best/test_mse": best["test_recon"]}
        if "val_recon" in best:
            figures["best/validation_mse"] = best["val_recon"]
        tensorboard_logs.log_hparams(writer, hparams(trainer), figures)
    trainer.add_track_line(tensorboard_logs.TRACK_COLUMNS, values)


def hparams(trainer):
    """The hyperparameters that a run's metrics depend on."""
    args = trainer.args
    left_out = ("data_folder", "num_workers", "output_folder", "overwrite", "resume", "save_every", "keep_every",
                "compile", *set(QUANTIZER_ARGUMENTS) - quantizer_settings(args).keys())
    C, H, _ = trainer.metadata["dataset"]["shape"]
    settings = {**vars(args), "channels": C, "image_size": H, "amp": trainer.bfloat16}
    return {name: value for name, value in settings.items() if name not in left_out}


# ---------------------------------------------------------------- the quantizer

def quantizer_settings(args):
    """{name: value} of the QUANTIZER_ARGUMENTS that the constructor of the quantizer has."""
    names = inspect.signature(QUANTIZERS[args.quantizer]).parameters
    return {name: getattr(args, name) for name in QUANTIZER_ARGUMENTS if name in names}


def check_quantizer_arguments(parser, args, argv):
    """End with an error if the quantizer has no such argument as one given. With levels, K becomes their product."""
    given, settings = parser.given_arguments(argv), quantizer_settings(args)
    for name in QUANTIZER_ARGUMENTS:
        if name in given and name not in settings:
            parser.error(f"{cli.flag_name(name)} {given[name]}: --quantizer {args.quantizer} has no such setting, "
                         "leave it out")
    if "levels" in settings:
        K = math.prod(map(int, args.levels.split(",")))
        if given.get("k", K) != K:
            parser.error(f"--k {args.k} contradicts --levels {args.levels}, which make {K} codes: leave --k out")
        args.k = K


# ---------------------------------------------------------------- model, optimizer

def build_trainer(args, files, batches, saved=None):
    """The Trainer of a new model. saved: the contents of the checkpoint to resume from, if there is one."""
    set_deterministic(args.device)
    seed_everything(args.seed)
    config = {"channels": batches.train_set.shape[0], "hidden_size": args.hidden_size, "num_codes": args.k,
              "downsample": args.downsample, "quantizer": args.quantizer, **quantizer_settings(args)}
    metadata = {"format": checkpoint.FORMAT, "kind": "vqvae", "config": config,
                "dataset": batches.dataset}
    if saved:
        check_metadata(metadata, saved)
    with inputs.explain_out_of_memory(f"--hidden-size {args.hidden_size} --k {args.k}"):
        model = VectorQuantizedVAE(**config)
        check_training_mode(model.quantizer)
        check_state(model.quantizer,
                    lambda: QUANTIZERS[args.quantizer](args.k, args.hidden_size, **quantizer_settings(args)))
        model.to(args.device, memory_format=speed.memory_format(args.device))
    with cli.errors_name_flag("--downsample", args.downsample):
        model.map_size(*batches.train_set.shape[1:])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=args.device != "mps")
    schedule = make_schedule(args.lr_schedule, optimizer, args.lr, args.num_epochs * len(batches.train))
    size_flags = "--hidden-size or --k"
    if args.dataset == data.FOLDER:
        size_flags = f"--image-size, {size_flags}, or a larger --downsample"
    no_restarts = torch.zeros((), dtype=torch.int64, device=args.device)
    return Trainer(
        args, files, metadata, model, optimizer, schedule, batches.generator, len(batches.train_set), Losses._fields,
        size_flags, step_tag="loss/train/",
        track=[tensorboard_logs.track_header(tensorboard_logs.TRACK_COLUMNS, batches.validation is not None)],
        restarts=getattr(model.quantizer, "restarts", no_restarts),
        code_counts=torch.zeros(args.k, dtype=torch.int64, device=args.device))


def make_schedule(name, optimizer, lr, steps):
    """The learning rate over so many steps; lr is its highest value."""
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return lr_scheduler.ConstantLR(optimizer, factor=1)


# ---------------------------------------------------------------- the run's folders

def check_folders(args, models, logs, last):
    """Raise ValueError if the run could not be written, or not be resumed from the file `last`. Writes nothing."""
    with cli.errors_name_flag("--output-folder", args.output_folder):
        if not args.resume:
            files.check_unused_folders((models, logs), args.overwrite)
        elif not last.is_file():
            raise ValueError(f"there is no {last} to --resume: start the run anew, with --overwrite if it has a folder")
        else:
            files.check_writable(last)
            files.check_writable(logs / "events")


def begin_run(trainer, models, logs, last):
    """Save the first checkpoint, remove the former run's files, and write args.json."""
    args = trainer.args
    check_folders(args, models, logs, last)         # another run may have been faster
    numbered = [path for path in models.glob("model_*.pt") if re.fullmatch(r"model_[1-9]\d*\.pt", path.name)]
    prior = [models / name for name in ("prior.pt", "prior-last.pt", tensorboard_logs.PRIOR_TRACK)]
    trainer.begin([*numbered, *prior])
    settings = {**vars(args), "bfloat16": trainer.bfloat16, "environments": trainer.environments}
    files.write_atomically(models / "args.json", json.dumps(settings, indent=2).encode())


def next_command(parser, args, model):
    """The command that shows what has been trained."""
    words = ["--model", model, "--input", "test"]
    if args.dataset != data.FOLDER and args.data_folder != parser.get_default("data_folder"):
        words += ["--data-folder", args.data_folder]
    return files.command("generate.py", *words)


def run(args, parser, argv):
    """Train from the start, or with --resume from the state in last.pt."""
    args.device = inputs.find_device(args.device)
    models, logs = Path("models", args.output_folder), Path("logs", args.output_folder)
    last, flag = models / "last.pt", f"--output-folder {args.output_folder}"
    resume_command = distributed.launch_command("VQ-VAE.py", "--resume", "--output-folder", args.output_folder)
    run_files = RunFiles(last, models / "best.pt", models / tensorboard_logs.TRACK, logs, "", resume_command,
                         every_epoch=f"{models}/model_{{}}.pt")
    if distributed.is_main_process():
        check_folders(args, models, logs, last)
    # Whatever can be wrong is found, by all processes, before a file is written.
    only = distributed.main_process_only
    with only(files.locked_folder(models, flag)), only(files.locked_folder(logs, flag)):
        if args.resume:
            with cli.errors_name_flag("--resume", last):
                _, saved = checkpoint.load_model(last)
                args = parser.resumed_arguments(args, argv, saved)
                args.device = inputs.find_device(args.device)
                batches = load_batches(args)
                trainer = build_trainer(args, run_files, batches, saved)
                trainer.load_state(saved)
        else:
            batches = load_batches(args)
            trainer = build_trainer(args, run_files, batches)
        trainer.check_same_everywhere(batches.test_set.labels.tolist())
        if args.resume:
            trainer.note_environment()
        else:
            x = data.to_model_range(batches.shown, args.device)
            trainer.choose_precision(lambda model, x: vqvae_losses(x, model(x), args.beta).total, (x,))
        if distributed.is_main_process():
            with cli.errors_name_flag("--output-folder", args.output_folder):
                begin_run(trainer, models, logs, last)
        described = args.dataset if args.dataset != data.FOLDER else batches.train_set.description
        print(f"Training on {described}: {describe_split(args, batches.train_set, batches.test_set)}, on {args.device}"
              + distributed.describe_processes() + (f", from step {trainer.state.step:,} on." if args.resume else "."))
        trainer.print_track()
        start = time.perf_counter()
        with trainer.running():
            if not trainer.state.step and distributed.is_main_process():
                with trainer.optional("the first reconstructions"):
                    tensorboard_logs.log_images(trainer.writer, trainer.model, batches.shown, epoch=0)
                with trainer.optional("the graph"):
                    tensorboard_logs.log_graph(trainer.writer, trainer.model, batches.shown)
            train(trainer, batches)
    print(f"Done in {time.perf_counter() - start:.0f} s. {describe_best(trainer, 'recon', 'reconstruction loss')}.\n"
          f"  checkpoint  {run_files.best}\n  track       {run_files.track}\n  logs        {logs}\n"
          f"Next: {next_command(parser, args, run_files.best)}\n"
          f"      tensorboard --logdir logs")


def main(argv=None):
    parser = get_parser(QUANTIZERS)
    args = parser.parse_args(argv)
    if not args.resume:                 # else they are those of the run
        check_quantizer_arguments(parser, args, argv)
    with parser.bad_input_in_one_line(), distributed.process_group():
        run(args, parser, argv)


if __name__ == "__main__":
    main()
