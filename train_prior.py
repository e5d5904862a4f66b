"""Train a prior on the codes of a VQ-VAE: python3 train_prior.py [--model models/NAME/best.pt] ...

The second stage of the paper (section 3.3): the VQ-VAE is frozen, and a transformer is trained on its code maps of the
training set. Writes prior.pt beside the model, and prior/* into logs/NAME. Without --model it takes the shipped model,
whose prior it replaces only with --overwrite.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)

    cli.add_validation_images(parser)

    group = parser.add_argument_group("prior")
    group.add_argument("--layers", type=arguments.integer(1), default=4, metavar="N",
                       help=f"blocks of the transformer {shown}")
    group.add_argument("--width", type=arguments.integer(1), default=192, metavar="E",
                       help=f"width of the transformer, the size of its embeddings {shown}")
    group.add_argument("--heads", type=arguments.integer(1), default=6, metavar="N",
                       help=f"attention heads, a divisor of the width {shown}")
    group.add_argument("--dropout", type=arguments.number(minimum=0, below=1), default=0.0, metavar="P",
                       help=f"share of activations dropped in training, against overfitting {shown}")
    group.add_argument("--drop-label", type=arguments.number(minimum=0, below=1), default=0.1, metavar="P",
                       help=f"probability of dropping the class in training, for classifier-free guidance {shown}")

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=arguments.integer(1), default=32, metavar="N",
                       help=f"code maps per step, of all processes together {shown}")
    group.add_argument("--num-epochs", type=arguments.integer(1), default=24, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=arguments.number(above=0), default=3e-3, metavar="RATE",
                       help=f"peak learning rate of AdamW: linear warm-up, then cosine decay {shown}")
    group.add_argument("--shift", type=arguments.integer(0, 4), default=1, metavar="PIXELS",
                       help=f"also train on images shifted by up to PIXELS pixels, conditioned on the shift {shown}")
    group.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                       help=f"seed of weights, data order, shifts and samples {shown}")
    group.add_argument("--sample-every", type=arguments.integer(0), default=1, metavar="EPOCHS",
                       help="log samples from the prior every EPOCHS epochs, as many as can be drawn in a tenth of an "
                            f"epoch's time; 0 means never {shown}")
    cli.add_speed_arguments(group)
    cli.add_run_arguments(group, "a prior that exists beside the model")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import math
import os
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR
from torch.utils.data import Dataset

import checkpoint
import data
from data.code_maps import decode, encode_sets, offsets_up_to, smallest_dtype
from metrics import nats_per_code, samples
from modules import DOWNSAMPLES
from prior import CodePrior
from utils import cost, distributed, event_files, files, inputs, tensorboard_logs
from utils.memory import maps_that_fit
from utils.run_files import RunFiles
from utils.train_state import check_metadata, seed_everything, set_deterministic, strictly_deterministic
from utils.trainer import Trainer
from utils.training_data import describe_best, describe_split, hold_out

WARM_UP = 0.05                  # of all steps
WEIGHT_DECAY = 0.1
BETAS = 0.9, 0.99               # with 0.999 for the second one the test loss falls more slowly
OLD_CALIBRATION_MAPS = 3000     # that a prior is calibrated on if it began before there were validation maps
SAMPLED_MAPS = 100              # in TensorBoard after an epoch, at most
SAMPLE_SHARE = 0.1              # of an epoch's time, for these samples
MEASURED_CODES = 2048           # in the steps whose time is measured before the training
LONG_TRAINING = 3600            # seconds: a longer training prints how to shorten it
LARGE_MAPS = 10**9              # bytes: larger code maps print their size
PATIENCE = 3                    # epochs without a lower validation loss, after which the training stops
# Letters: N images, B of them in a batch, h×w codes of one map, S shifts of the images.


# ---------------------------------------------------------------- the training

def train(trainer, maps, vqvae, bits_per_nat):
    """Epoch after epoch: train, evaluate, save, log. bits_per_nat: bits per dimension of one nat per code."""
    args, prior, optimizer, schedule = trainer.args, trainer.model, trainer.optimizer, trainer.schedule

    def compute_loss(indices, labels, shifts):
        """Nats per code of maps (B, h, w), given the classes and shifts (B,)."""
        with trainer.autocast():
            return nats(prior, indices, labels, shifts)

    compute_loss = trainer.accelerate(compute_loss)
    for epoch in trainer.epochs():                            # where it left off, if resumed
        prior.train()
        for batch in trainer.batches(epoch_batches(maps, trainer.generator, args.batch_size)):
            indices, labels, shifts = (data.to_device(tensor, args.device) for tensor in batch)    # (B, h, w), (B,)
            optimizer.zero_grad()
            with strictly_deterministic():
                with per_process_dropout(args, trainer.state.step):
                    loss = compute_loss(indices, labels, shifts)
                loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            trainer.after_step([loss])                                # save, notice signals

        validation_nats = calibrate_and_evaluate(prior, maps, args.validation_images)
        test_nats = nats_per_code(prior, maps.test, maps.test_labels)                # nothing is chosen by it
        bits, losses = test_nats * bits_per_nat, {"validation": validation_nats} if args.validation_images else {}
        losses["test"] = test_nats
        figures = {name: {"nats_per_code": value} for name, value in losses.items()}
        figures["test"]["bits_per_dimension"] = bits
        trainer.save_epoch(validation_nats, figures)
        if distributed.is_main_process():
            [train_nats] = trainer.state.mean_losses()
            tensorboard_logs.log_prior(trainer.writer, epoch, {"train": train_nats, **losses}, bits)
            if args.sample_every and epoch % args.sample_every == 0:
                with trainer.optional("samples"):
                    log_samples(trainer, vqvae, epoch)
            trainer.add_track_line(tensorboard_logs.PRIOR_COLUMNS, {
                "epoch": epoch, "train_nats": train_nats, "val_nats": validation_nats, "test_nats": test_nats,
                "bits_per_dimension": bits, "seconds": trainer.epoch_seconds()})


def nats(prior, indices, labels, shifts):
    """−log p(map | class) of maps (B, h, w), the mean over all codes."""
    return -prior.log_prob(indices, labels, shifts).mean() / indices[0].numel()


def epoch_batches(maps, generator, batch_size):
    """This process's shard of an epoch's batches: maps (B, h, w), classes and shifts (B,). Each image has one shift."""
    S, N = maps.train.shape[:2]
    shifts = torch.randint(S, (N,), generator=generator)
    order = torch.randperm(N, generator=generator)
    if distributed.world_size() > 1:
        order = order[list(distributed.shard_indices(N))]
    for rows in order.split(distributed.per_process_batch_size(batch_size)):
        yield maps.train[shifts[rows], rows], maps.train_labels[rows], shifts[rows]


def per_process_dropout(args, step):
    """With several processes, each draws its own dropout masks. Without dropout all draw the same: dropped classes."""
    if distributed.world_size() == 1 or not args.dropout:
        return nullcontext()
    return distributed.per_process_rng(args.seed + step * distributed.world_size())


def calibrate_and_evaluate(prior, maps, validation_images):
    """Calibrate the prior on the validation maps. → its nats per code on them, or None if there are none

    validation_images: None of runs that began before any were held out, in which the test maps take their place; those
    are calibrated on training maps, if that lowers their nats.
    """
    if maps.validation is None:
        return None
    held_out = maps.validation, maps.validation_labels
    if validation_images:
        prior.calibrate(*held_out, maps_that_fit(prior))
        return nats_per_code(prior, *held_out)
    prior.tail.zero_()
    plain, N = nats_per_code(prior, *held_out), len(maps.train_labels)
    rows = torch.linspace(0, N - 1, min(OLD_CALIBRATION_MAPS, N)).long()
    prior.calibrate(maps.train[0, rows], maps.train_labels[rows], maps_that_fit(prior))
    calibrated = nats_per_code(prior, *held_out)
    if calibrated >= plain:
        prior.tail.zero_()
    return min(plain, calibrated)


def log_samples(trainer, vqvae, epoch):
    """A grid of sampled images, as many as take a tenth of the epoch's time, but at least two seconds.

    The other processes wait for it, but no longer than a tenth of their time limit: a minute.
    """
    prior, generator = trainer.model, torch.Generator().manual_seed(trainer.args.seed)
    seconds = min(max(2, SAMPLE_SHARE * trainer.epoch_seconds()), distributed.TIMEOUT.total_seconds() / 10)
    max_maps = tensorboard_logs.images_in_grid(SAMPLED_MAPS, *vqvae.image_size(prior.height, prior.width))
    with warnings.catch_warnings():     # on a GPU cumsum() has no deterministic form
        warnings.simplefilter("ignore")
        maps, columns = samples.sample_columns(prior, max_maps, seconds, generator)
    tensorboard_logs.log_samples(trainer.writer, epoch, decode(vqvae, maps), columns)


# ---------------------------------------------------------------- what it will cost

def random_batch(prior, args):
    """Maps (B, h, w) with classes and shifts (B,), as a training step takes them, but of long maps fewer."""
    rows = min(distributed.per_process_batch_size(args.batch_size), max(1, MEASURED_CODES // len(prior.positions)))
    maps = torch.randint(prior.num_codes, (rows, prior.height, prior.width), generator=torch.Generator())
    return maps.to(args.device), *torch.zeros(2, rows, dtype=torch.int64, device=args.device)


def describe_cost(trainer, source):
    """What is printed before a training: the codes of an image, the time that it will take, how to shorten it."""
    args, vqvae, N, (H, W) = trainer.args, source.vqvae, trainer.num_images, source.shape[1:]
    h, w = vqvae.map_size(H, W)
    # A map that is evaluated takes a third of one in a step; the validation maps are calibrated on as well.
    validated = len(source.validation_set or ())
    maps = (N + (validated + len(source.test_set)) / 3) / distributed.world_size() + validated / 3
    seconds = maps * cost.seconds_per_item(trainer, nats, random_batch(trainer.model, args))
    seconds, epochs = (1 + SAMPLE_SHARE) * seconds, args.num_epochs - trainer.state.epoch + 1
    line = (f"An image is {h}×{w} = {h * w:,} codes. An epoch takes about {cost.duration(seconds)}, "
            f"the whole training about {cost.duration(epochs * seconds)}.")
    size = len(offsets_up_to(args.shift)) * N * h * w * smallest_dtype(vqvae.quantizer.num_codes).itemsize
    if size > LARGE_MAPS:
        line += f" The code maps take {size / 1e9:.1f} GB of memory" + ", less with --shift 0" * (args.shift > 0) + "."
    if epochs * seconds < LONG_TRAINING:
        return line
    fewer = 2 * vqvae.downsample
    fits = fewer in DOWNSAMPLES and not (H % fewer or W % fewer)
    return (f"{line} It takes less with fewer --num-epochs, a smaller --width or --layers"
            + ", on a GPU (--device auto)" * (args.device == "cpu")
            + f", or with a VQ-VAE trained with --downsample {fewer}: a quarter of the codes" * fits + ".")


# ---------------------------------------------------------------- data, model, optimizer

class FirstStage(NamedTuple):
    """The frozen VQ-VAE, and the images that it encodes."""

    vqvae: torch.nn.Module
    path: str
    sha256: str                     # of its file
    shape: list                     # [C, H, W]
    dataset: str                    # its name
    folder: tuple | None            # of --dataset folder: its path, and the fingerprint of its files
    train_set: Dataset              # without the images held out
    validation_set: Dataset | None
    test_set: Dataset


def load_first_stage(args, vqvae, contents, path):
    with cli.errors_name_flag("--batch-size", args.batch_size):
        distributed.per_process_batch_size(args.batch_size, fixed=args.resume)
    dataset, train_set, test_set = inputs.open_data(args, contents)
    shape = contents["dataset"]["shape"]
    if train_set.shape != shape:
        raise ValueError(f"--model {path}: its images are {shape}, those of --dataset {dataset} {train_set.shape}")
    folder = (train_set.folder, train_set.fingerprint) if dataset == data.FOLDER else None
    train_set, validation_set = hold_out(args, train_set, test_set)
    return FirstStage(vqvae.to(args.device), path, contents["sha256"], shape, dataset, folder, train_set,
                      validation_set, test_set)


def build_trainer(args, files, source, saved=None):
    """The Trainer of a new prior. saved: the contents of the checkpoint to resume from, if there is one."""
    set_deterministic(args.device)
    seed_everything(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    (h, w), classes = source.vqvae.map_size(*source.shape[1:]), source.train_set.classes
    config = {"num_codes": source.vqvae.quantizer.num_codes, "height": h, "width": w, "num_classes": len(classes),
              "layers": args.layers, "embedding": args.width, "heads": args.heads, "dropout": args.dropout,
              "drop_label": args.drop_label, "num_shifts": len(offsets_up_to(args.shift)),
              "gated": saved is None or saved["config"].get("gated", False)}        # the first priors were not
    metadata = {"format": checkpoint.FORMAT, "kind": "prior", "config": config,
                "vqvae": source.sha256, "dataset": source.dataset}
    if classes != list(data.DIGITS):
        metadata["classes"] = classes
    if saved:
        check_metadata(metadata, saved)
    if source.folder:
        folder, metadata["files"] = source.folder
        if saved and saved.get("files", metadata["files"]) != metadata["files"]:        # older files have none
            raise ValueError(f"the images in {folder} are not those that the run began with")
    with inputs.explain_out_of_memory(f"--layers {args.layers} --width {args.width}"), cli.errors_name_flag(
            f"--heads {args.heads} --width", args.width):
        prior = CodePrior(**config).to(args.device)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY,
                                  fused=args.device != "mps")
    steps = args.num_epochs * math.ceil(len(source.train_set) / args.batch_size)
    return Trainer(args, files, metadata, prior, optimizer, warm_up_then_cosine(optimizer, steps), generator,
                   len(source.train_set), ("prior",), "--width or --layers", patience=PATIENCE,
                   track=[tensorboard_logs.track_header(tensorboard_logs.PRIOR_COLUMNS, bool(source.validation_set))])


def warm_up_then_cosine(optimizer, steps):
    """The rate rises from almost 0 to --lr over the first WARM_UP of the steps, then falls to 0 on a cosine."""
    rise = max(1, round(WARM_UP * steps))
    return SequentialLR(optimizer, [LinearLR(optimizer, 1 / rise, total_iters=rise - 1),
                                    CosineAnnealingLR(optimizer, max(1, steps - rise))], milestones=[rise])


# ---------------------------------------------------------------- the prior's files

def logs_of(path):
    """logs/NAME for models/NAME/FILE, and logs/FOLDER for a model in another folder."""
    folder, models = Path(os.path.realpath(path)).parent, Path(os.path.realpath("models"))
    return Path("logs", folder.relative_to(models) if models in folder.parents else folder.name)


def run(args, parser, argv):
    """Train from the start, or with --resume from the state in prior-last.pt."""
    args.device = inputs.find_device(args.device)
    distributed.use_own_gpu(args.device)
    vqvae, contents, path = inputs.open_model(args)
    folder, logs, flag = Path(path).parent, logs_of(Path(path)), f"--model {path}"
    run_files = RunFiles(folder / "prior-last.pt", folder / "prior.pt", folder / tensorboard_logs.PRIOR_TRACK, logs,
                         event_files.PRIOR_SUFFIX,
                         distributed.launch_command("train_prior.py", "--resume", "--model", path))
    if distributed.is_main_process():
        with cli.errors_name_flag("--model", path):
            run_files.check("prior", args.resume, args.overwrite)
    # Whatever can be wrong is found, by all processes, before a file is written.
    only = distributed.main_process_only
    with only(files.locked_folder(folder, flag)), only(files.locked_folder(logs, flag)):
        if args.resume:
            with cli.errors_name_flag("--resume", run_files.last):
                _, saved = checkpoint.load_prior(run_files.last, (vqvae, contents))
                args = parser.resumed_arguments(args, argv, saved)
                args.device = inputs.find_device(args.device)
                distributed.use_own_gpu(args.device)
                source = load_first_stage(args, vqvae, contents, path)
                trainer = build_trainer(args, run_files, source, saved)
                trainer.load_state(saved)
        else:
            source = load_first_stage(args, vqvae, contents, path)
            trainer = build_trainer(args, run_files, source)
        trainer.check_same_everywhere(source.test_set.labels.tolist())
        print(f"Training a prior on the codes of {path} for {source.dataset}: "
              + describe_split(args, source.train_set, source.test_set) + distributed.describe_processes()
              + (f", from step {trainer.state.step:,} on." if args.resume else "."))
        if args.resume:
            trainer.note_environment()
        else:
            with strictly_deterministic():          # as the steps of the training
                trainer.choose_precision(nats, random_batch(trainer.model, args))
        with strictly_deterministic():
            print(describe_cost(trainer, source), flush=True)
        with inputs.explain_out_of_memory(
                f"--shift {args.shift}", "for the code maps, choose a smaller shift or another model"):
            maps = encode_sets(source.vqvae, source.train_set, source.validation_set, source.test_set,
                               offsets_up_to(args.shift), args.device, args.num_workers)
        if distributed.is_main_process():
            with cli.errors_name_flag("--model", path):
                run_files.check("prior", args.resume, args.overwrite)           # after minutes of encoding
                trainer.begin()
        trainer.print_track()
        h, w = maps.test.shape[1:]
        with trainer.running():
            train(trainer, maps, source.vqvae, bits_per_nat=h * w / (math.prod(source.shape) * math.log(2)))
    if trainer.should_stop_early():
        print(f"Stopped: the validation loss has not fallen for {PATIENCE} epochs.")
    print(f"{describe_best(trainer, 'nats', 'nats per code')}.\n"
          f"  prior  {run_files.best}\n  logs   {logs}\n"
          "Next: " + files.command("generate.py", "--model", path, "--input", "prior"))


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line(), distributed.process_group():
        run(args, parser, argv)


if __name__ == "__main__":
    main()
