"""Train a VQ-VAE: python3 VQ-VAE.py [--dataset MNIST-10k] [--output-folder NAME] ...

Writes models/NAME (checkpoints, arguments, a text track) and logs/NAME (TensorBoard).
"""

import json
import math
import os
import platform
import time
from pathlib import Path

import torch
import torchvision
from torch.optim import lr_scheduler
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import cli
import data
import tracking
from metrics import evaluate, perplexity
from modules import Losses, VectorQuantizedVAE, vqvae_losses
from vector_quantizer import CODEBOOK_INITS, CODEBOOK_UPDATES

LOG_EVERY = 10              # steps between two moments when the losses come from the device
SHOWN_IMAGES = 64           # test images in TensorBoard

# From the optimizer and the number of steps. --lr is the highest rate of each.
SCHEDULES = {
    "constant": lambda optimizer, steps: lr_scheduler.ConstantLR(optimizer, factor=1),
    "cosine": lambda optimizer, steps: lr_scheduler.CosineAnnealingLR(optimizer, steps),
    "onecycle": lambda optimizer, steps: lr_scheduler.OneCycleLR(optimizer, optimizer.defaults["lr"], steps,
                                                                 cycle_momentum=False),
}


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", type=cli.one_of(*data.DATASETS), default="MNIST", metavar="NAME",
                       help=f"{' or '.join(data.DATASETS)}, the 10,000 digits in MNIST/ that need no download {shown}")
    group.add_argument("--data-folder", default="MNIST", metavar="PATH",
                       help=f"where MNIST is, or is downloaded to once {shown}")
    group.add_argument("--num-workers", type=cli.whole_number(0), default=0, metavar="N",
                       help=f"processes that load batches; 0 is fastest for data held in memory {shown}")

    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=cli.whole_number(1), default=40, metavar="D",
                       help=f"size D of a latent vector and of the hidden layers {shown}")
    group.add_argument("--k", type=cli.whole_number(1), default=512, metavar="K",
                       help=f"number of codes in the codebook {shown}")
    group.add_argument("--codebook-update", type=cli.one_of(*CODEBOOK_UPDATES), default="gradient", metavar="HOW",
                       help=f"the codebook learns by the codebook loss (gradient) or by moving averages (ema) {shown}")
    group.add_argument("--codebook-init", type=cli.one_of(*CODEBOOK_INITS), default="kmeans", metavar="HOW",
                       help=f"kmeans on the first batch's latents, or uniform in ±1/K {shown}")
    group.add_argument("--restart-after", type=cli.whole_number(0), default=20, metavar="STEPS",
                       help=f"move a code unused for so many steps onto a latent; 0 means never {shown}")

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=cli.whole_number(1), default=128, metavar="N",
                       help=f"images per step {shown}")
    group.add_argument("--num-epochs", "--num_epoch", type=cli.whole_number(1), default=10, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=cli.number(above=0), default=2e-4, metavar="RATE",
                       help=f"learning rate of Adam, the highest one of a schedule {shown}")
    group.add_argument("--lr-schedule", type=cli.one_of(*SCHEDULES), default="constant", metavar="NAME",
                       help=f"constant; cosine: falls to 0; onecycle: rises for 30 %% of the steps, then falls {shown}")
    group.add_argument("--beta", type=cli.number(minimum=0), default=1.0, metavar="β",
                       help=f"weight of the commitment loss, useful from 0.1 to 2.0 {shown}")
    group.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N",
                       help=f"seed of weights, data order and restarts {shown}")
    group.add_argument("--device", type=cli.device, default="cpu", metavar="NAME",
                       help=f"cpu, cuda or cuda:N {shown}")

    group = parser.add_argument_group("output")
    group.add_argument("--output-folder", type=cli.name_inside("models"), default="vqvae", metavar="NAME",
                       help=f"the run's name: writes models/NAME and logs/NAME {shown}")
    group.add_argument("--overwrite", action="store_true",
                       help="replace a run of that name (default: leave it untouched and stop)")
    return parser


# ---------------------------------------------------------------- the run's folders

def check_folders(folders, overwrite):
    """Raise ValueError if a run stands in the folders, or they could not be made. Touches nothing."""
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise ValueError(f"{folder} holds a run already: choose another name, or replace it with --overwrite")
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"no permission to write in {existing}")


def prepare_folders(models, logs):
    """Make the run's folders, without the files of a former run. Other files in them are kept."""
    for folder in (models, logs):
        folder.mkdir(parents=True, exist_ok=True)
    for pattern in ("*.pt", "args.json", tracking.TRACK, tracking.PRIOR_TRACK):
        for path in models.glob(pattern):
            path.unlink()
    tracking.remove_logs(logs)


def settings(args):
    """The arguments and the versions that a run's figures come from, as plain values."""
    return {**vars(args), "versions": {"python": platform.python_version(), "torch": torch.__version__,
                                       "torchvision": torchvision.__version__},
            "threads": torch.get_num_threads()}


def hparams(args):
    """The arguments that a run's figures depend on."""
    left_out = ("data_folder", "num_workers", "output_folder", "overwrite")
    return {name: value for name, value in vars(args).items() if name not in left_out}


# ---------------------------------------------------------------- training

def seed_everything(seed, device):
    torch.manual_seed(seed)
    if device.startswith("cuda"):       # on the CPU the same seed gives the same run by itself
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def build_model(args, channels):
    """The model on its device, and the configuration that rebuilds it."""
    config = {"channels": channels, "hidden_size": args.hidden_size, "num_codes": args.k,
              "codebook_update": args.codebook_update, "codebook_init": args.codebook_init,
              "restart_after": args.restart_after}
    try:
        # Channels last: the layout in which convolutions are fastest, and the quantizer's own.
        return VectorQuantizedVAE(**config).to(args.device, memory_format=torch.channels_last), config
    except RuntimeError as error:       # torch's way to say that memory is short
        raise ValueError(f"--hidden-size {args.hidden_size} --k {args.k}: "
                         "no memory for a model of this size, choose smaller ones") from error


def train_one_epoch(model, batches, optimizer, schedule, args, writer, step, bar):
    """One pass over the training set, from step on.

    → the step after it, the mean Losses, and counts (K,) of the codes' use on the way.
    """
    model.train()
    waiting, chosen, sums, images_seen = [], [], 0, 0
    counts = torch.zeros(args.k, dtype=torch.int64)
    last_step = step + len(batches)
    for images, _ in batches:
        x = data.to_model_range(images, args.device)                  # (B, C, H, W)
        output = model(x)
        losses = vqvae_losses(x, output, args.beta)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        lr = schedule.get_last_lr()[0]
        schedule.step()

        step += 1
        waiting.append(torch.stack(losses).detach())                  # (4,), still on the device
        sums = sums + waiting[-1].double() * len(x)
        images_seen += len(x)
        chosen.append(output.indices.flatten())                       # (B·h·w,)
        bar.update(len(x))
        if len(waiting) == LOG_EVERY or step == last_step:            # here alone the device is waited for
            counts += torch.bincount(torch.cat(chosen), minlength=args.k).cpu()
            mean = tracking.mean_losses(waiting)
            tracking.log_steps(writer, step, mean, lr)
            bar.set_postfix({name: f"{value:.4f}" for name, value in mean._asdict().items()}, refresh=False)
            waiting, chosen = [], []
    return step, Losses(*(sums / images_seen).tolist()), counts


def train(args):
    # Everything that can be wrong is found before a file is written.
    models, logs = Path("models", args.output_folder), Path("logs", args.output_folder)
    with cli.named("--output-folder", args.output_folder):
        check_folders((models, logs), args.overwrite)
    with cli.named(f"--dataset {args.dataset} --data-folder", args.data_folder):
        train_set, test_set = data.load(args.dataset, args.data_folder)
    seed_everything(args.seed, args.device)
    order = torch.Generator().manual_seed(args.seed)
    pinned = args.device.startswith("cuda")
    train_batches = data.batches(train_set, args.batch_size, order, args.num_workers, pinned)
    test_batches = data.batches(test_set, args.batch_size, None, args.num_workers, pinned)
    shape = list(train_set.images.shape[1:])                          # [C, H, W]
    model, config = build_model(args, shape[0])
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=True)
    schedule = SCHEDULES[args.lr_schedule](optimizer, args.num_epochs * len(train_batches))

    with cli.named("--output-folder", args.output_folder):
        prepare_folders(models, logs)
        checkpoint.write_whole(models / "args.json", json.dumps(settings(args), indent=2).encode())
    writer = SummaryWriter(logs)
    shown = data.to_model_range(test_set.images[:SHOWN_IMAGES], args.device)
    tracking.log_images(writer, model, shown, epoch=0)
    print(f"Training on {args.dataset}: {len(train_set):,} images, {len(test_set):,} to test, on {args.device}.")
    tracking.tell(models / tracking.TRACK, "  ".join(tracking.TRACK_COLUMNS))

    step, best, best_epoch, start = 0, math.inf, 0, time.perf_counter()
    for epoch in range(1, args.num_epochs + 1):
        epoch_start = time.perf_counter()
        with tqdm(total=len(train_set), desc=f"epoch {epoch}/{args.num_epochs}", unit="img", unit_scale=True,
                  leave=False, disable=None) as bar:
            step, trained, train_counts = train_one_epoch(model, train_batches, optimizer, schedule, args,
                                                          writer, step, bar)
        if not math.isfinite(trained.total):
            raise ValueError(f"--lr {args.lr:g}: the losses of epoch {epoch} are no longer finite numbers, "
                             f"try a lower rate; what {models} holds is from before")
        tested, counts = evaluate(model, test_batches, args.device, args.beta)
        restarts = model.quantizer.restarts.item()
        model.quantizer.restarts.zero_()
        tracking.log_epoch(writer, epoch, tested, counts, train_counts, restarts)
        tracking.log_images(writer, model, shown, epoch)

        is_best = tested.reconstruction < best
        if is_best:
            best, best_epoch = tested.reconstruction, epoch
        contents = {"format": checkpoint.FORMAT, "kind": "vqvae", "config": config,
                    "dataset": {"name": args.dataset, "shape": shape},
                    "model": model.state_dict(), "epoch": epoch, "step": step, "test": tested._asdict()}
        save_epoch(models, contents, optimizer, schedule, order, is_best)
        line = tracking.track_line(epoch, step, *trained[:3], *tested[:3], perplexity(counts),
                                   int((counts > 0).sum()), restarts, time.perf_counter() - epoch_start)
        tracking.tell(models / tracking.TRACK, line)
    tracking.log_codebook(writer, model, counts, shape, epoch)
    tracking.log_hparams(writer, hparams(args), tested, counts)
    writer.close()
    print(f"Done in {time.perf_counter() - start:.0f} s. "
          f"Lowest test reconstruction loss: {best:.4f}, in epoch {best_epoch}.\n"
          f"  checkpoint  {models / 'best.pt'}\n  track       {models / tracking.TRACK}\n  logs        {logs}\n"
          f"Next: python3 generate.py --model {models / 'best.pt'} --input MNIST\n"
          f"      tensorboard --logdir logs")


def save_epoch(models, contents, optimizer, schedule, order, is_best):
    """Write last.pt, best.pt if it is the best, and model_EPOCH.pt at the very end of the epoch."""
    random = {"torch": torch.get_rng_state(), "order": order.get_state()}
    if torch.cuda.is_available():
        random["cuda"] = torch.cuda.get_rng_state_all()
    training = {"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict(), "random": random}
    checkpoint.save(models / "last.pt", {**contents, "training": training})
    if is_best:
        checkpoint.save(models / "best.pt", contents)
    checkpoint.save(models / f"model_{contents['epoch']}.pt", contents)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        train(args)


if __name__ == "__main__":
    main()
