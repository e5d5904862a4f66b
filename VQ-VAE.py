"""Train a VQ-VAE: python3 VQ-VAE.py [--dataset MNIST-10k] [--output-folder NAME] ...

Writes models/NAME (checkpoints, arguments, a text track) and logs/NAME (TensorBoard).
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

import arguments
import cli

LARGEST_SIDE = 512          # pixels
SCHEDULES = "constant", "cosine", "onecycle"
CODEBOOK_UPDATES, CODEBOOK_INITS = ("gradient", "ema"), ("kmeans", "uniform")


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"

    group = parser.add_argument_group("data")
    group.add_argument("--dataset", type=arguments.one_of(*arguments.DATASETS), default="MNIST", metavar="NAME",
                       help=f"{', '.join(arguments.DATASETS)}; MNIST-10k are the 10,000 digits in MNIST/ that need no "
                            f"download, folder is any folder of images {shown}")
    group.add_argument("--data-folder", default="MNIST", metavar="PATH",
                       help=f"where the data set is, or is downloaded to once; the images of --dataset folder {shown}")
    group.add_argument("--image-size", type=arguments.multiple_of_4(LARGEST_SIDE), default=64, metavar="S",
                       help=f"with --dataset folder: images become S×S pixels, S is a multiple of 4 {shown}")
    group.add_argument("--channels", type=int, choices=(1, 3), default=3,
                       help=f"with --dataset folder: 3 for colour, 1 for grey {shown}")
    group.add_argument("--num-workers", type=arguments.whole_number(0, 256), default=0, metavar="N",
                       help=f"processes that load batches; 0 is fastest for data held in memory {shown}")

    group = parser.add_argument_group("model")
    group.add_argument("--hidden-size", type=arguments.whole_number(1), default=40, metavar="D",
                       help=f"size D of a latent vector and of the hidden layers {shown}")
    group.add_argument("--k", type=arguments.whole_number(1), default=512, metavar="K",
                       help=f"number of codes in the codebook {shown}")
    group.add_argument("--codebook-update", type=arguments.one_of(*CODEBOOK_UPDATES), default="gradient", metavar="HOW",
                       help=f"the codebook learns by the codebook loss (gradient) or by moving averages (ema) {shown}")
    group.add_argument("--codebook-init", type=arguments.one_of(*CODEBOOK_INITS), default="kmeans", metavar="HOW",
                       help=f"kmeans on the first batch's latents, or uniform in ±1/K {shown}")
    group.add_argument("--restart-after", type=arguments.whole_number(0), default=20, metavar="STEPS",
                       help=f"move a code unused for so many steps onto a latent; 0 means never {shown}")

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=arguments.whole_number(1), default=128, metavar="N",
                       help=f"images per step, of all processes together {shown}")
    group.add_argument("--num-epochs", "--num_epoch", type=arguments.whole_number(1), default=10, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=arguments.number(above=0), default=2e-4, metavar="RATE",
                       help=f"learning rate of Adam, the highest one of a schedule {shown}")
    group.add_argument("--lr-schedule", type=arguments.one_of(*SCHEDULES), default="constant", metavar="NAME",
                       help=f"constant; cosine: falls to 0; onecycle: rises for 30 %% of the steps, then falls {shown}")
    group.add_argument("--beta", type=arguments.number(minimum=0), default=1.0, metavar="β",
                       help=f"weight of the commitment loss, useful from 0.1 to 2.0 {shown}")
    group.add_argument("--seed", type=arguments.whole_number(0), default=0, metavar="N",
                       help=f"seed of weights, data order and restarts {shown}")
    group.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                       help=f"{arguments.DEVICES} {shown}")
    cli.add_speed_arguments(group)

    group = parser.add_argument_group("output")
    group.add_argument("--output-folder", type=arguments.name_inside("models"), default="vqvae", metavar="NAME",
                       help=f"the run's name: writes models/NAME and logs/NAME {shown}")
    cli.add_run_arguments(group, "a run of that name")
    return parser


def parse_arguments(argv=None):
    """The parser and its arguments, held against each other."""
    parser = get_parser()
    args = parser.parse_args(argv)
    if args.dataset != arguments.DATASETS[-1] and not args.resume:
        parser.check_unused(args, ("image_size", "channels"), "is used only with --dataset folder, add it")
    return parser, args


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before torch is imported, which takes seconds

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.optim import lr_scheduler

import checkpoint
import data
import fast
import files
import inputs
import processes
import resume
import tracking
from metrics import evaluate, perplexity
from modules import Losses, VectorQuantizedVAE, vqvae_losses

SHOWN_IMAGES = 64           # test images in TensorBoard


# ---------------------------------------------------------------- the run's folders

def check_folders(args, models, logs, last):
    """Raise ValueError if the run could not be written, or not go on from the file `last`."""
    with cli.named("--output-folder", args.output_folder):
        if not args.resume:
            files.check_free((models, logs), args.overwrite)
        elif not last.is_file():
            raise ValueError(f"there is no {last} to --resume: start the run anew, with --overwrite if it has a folder")
        else:
            files.check_writable(last)
            files.check_writable(logs / "events")


def prepare_folders(models, logs):
    """Make the run's folders, without the files of a former run. Other files in them are kept."""
    logs.mkdir(parents=True, exist_ok=True)
    files.remove_temporary(models)
    # last.pt first: without the others it is nothing to resume.
    for pattern in ("last.pt", "best.pt", "model_[0-9]*.pt", "prior.pt", "prior-last.pt", "args.json",
                    tracking.TRACK, tracking.PRIOR_TRACK):
        for path in models.glob(pattern):
            path.unlink()
    tracking.remove_logs(logs)


def settings(run):
    """The arguments and the environments that a run's figures come from, as plain values."""
    return {**vars(run.args), "bfloat16": run.bfloat16, "environments": run.environments}


def hparams(args):
    """The arguments that a run's figures depend on."""
    left_out = ("data_folder", "num_workers", "output_folder", "overwrite", "resume", "save_every", "compile")
    return {name: value for name, value in vars(args).items() if name not in left_out}


# ---------------------------------------------------------------- training

def be_deterministic(device):
    if device.startswith("cuda"):       # on the CPU the same seed gives the same run by itself
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def make_schedule(name, optimizer, lr, steps):
    """The learning rate over so many steps; lr is its highest value."""
    if name == "onecycle":
        return lr_scheduler.OneCycleLR(optimizer, lr, steps, cycle_momentum=False)
    if name == "cosine":
        return lr_scheduler.CosineAnnealingLR(optimizer, steps)
    return lr_scheduler.ConstantLR(optimizer, factor=1)


def build_model(config, device):
    """The VectorQuantizedVAE of a configuration. Raises ValueError if there is no memory for it."""
    try:
        return VectorQuantizedVAE(**config).to(device, memory_format=fast.layout(device))
    except RuntimeError as error:       # torch's way to say that memory is short
        raise ValueError(f"--hidden-size {config['hidden_size']} --k {config['num_codes']}: "
                         "no memory for a model of this size, choose smaller ones") from error


@dataclass(kw_only=True)
class Progress(resume.Progress):
    """Where the training of a VQ-VAE stands."""

    counts: torch.Tensor            # (K,), the use of the codes in the epoch's steps
    restarts: torch.Tensor          # the quantizer's own count of codes that moved in the epoch

    def next_epoch(self, generator):
        super().next_epoch(generator)
        self.counts.zero_()
        self.restarts.zero_()


class Run(resume.Run):
    """The training of a VQ-VAE, from the arguments: its data, its model, and all that changes on the way.

    saved: the contents of the checkpoint that it is to go on from, if there is one.
    """

    losses = Losses._fields

    def __init__(self, args, saved=None):
        processes.use_device(args.device)
        with cli.named("--batch-size", args.batch_size):
            self.share = processes.split(args.batch_size, fixed=args.resume)
        train_set, self.test_set = inputs.load_data(
            args.dataset, args.data_folder, [args.channels, args.image_size, args.image_size], args.num_workers)
        on_gpu, in_workers = args.device.startswith("cuda"), args.num_workers > 0
        if on_gpu and not in_workers and isinstance(train_set, data.Images):        # the bytes of the whole set are few
            train_set, self.test_set = train_set.to(args.device), self.test_set.to(args.device)
        be_deterministic(args.device)
        resume.seed_everything(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        self.train_batches = data.batches(train_set, self.share, generator, args.num_workers, on_gpu and in_workers)
        self.test_batches = data.batches(processes.part(self.test_set), self.share, None, args.num_workers,
                                         on_gpu and in_workers)
        self.shown = data.to_model_range(self.test_set[:SHOWN_IMAGES][0], args.device)
        config = {"channels": train_set.shape[0], "hidden_size": args.hidden_size, "num_codes": args.k,
                  "codebook_update": args.codebook_update, "codebook_init": args.codebook_init,
                  "restart_after": args.restart_after}
        about = {"format": checkpoint.FORMAT, "kind": "vqvae", "config": config,
                 "dataset": data.describe(args.dataset, args.data_folder, train_set)}
        if saved:
            resume.check_about(about, saved)
        model = build_model(config, args.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=args.lr, fused=args.device != "mps")
        steps = len(self.train_batches)
        schedule = make_schedule(args.lr_schedule, optimizer, args.lr, args.num_epochs * steps)
        super().__init__(args, about, model, optimizer, schedule, generator, steps, len(train_set),
                         Progress, track=["  ".join(tracking.TRACK_COLUMNS)], restarts=model.quantizer.restarts,
                         counts=torch.zeros(args.k, dtype=torch.int64, device=args.device))
        self.eager, self.compiled = self.losses_of, self.compiled_if_asked(self.losses_of)

    def losses_of(self, x):
        """Losses of images x (B, C, H, W), and the codes chosen (B·h·w,)."""
        with self.autocast():
            output = self.model(x)
            return vqvae_losses(x, output, self.args.beta), output.indices.flatten()

    def probe_batch(self, count):
        return (self.shown[:count],)

    def probe_loss(self, model, x):
        return vqvae_losses(x, model(x), self.args.beta).total

    def take_steps(self, writer, bar):
        """The steps of the epoch that are not done yet. Yields after each of them, so that the run can be saved."""
        self.model.train()
        args, progress, quantizer = self.args, self.progress, self.model.quantizer
        # Asked here, so that a run that goes on compiles the same steps as one that was not broken off.
        quantizer.known_initialised = quantizer.initialised.item()
        for number, (images, _) in enumerate(self.train_batches):
            if number < progress.batches:       # done before the run was broken off
                continue
            x = data.to_model_range(images, args.device)              # (B, C, H, W)
            # K-means asks the codebook whether it has been, and a batch that is not full would be compiled again.
            whole = len(x) == self.share and quantizer.known_initialised
            losses, chosen = (self.compiled if whole else self.eager)(x)
            self.optimizer.zero_grad()
            losses.total.backward()
            self.optimizer.step()
            processes.average_statistics(self.model)
            lr = self.schedule.get_last_lr()[0]
            self.schedule.step()

            images = self.images_of_all(len(x))
            progress.add(processes.all_mean(torch.stack(losses).detach()), images)
            used = torch.zeros_like(progress.counts).index_add_(0, chosen, torch.ones_like(chosen))
            progress.counts += processes.all_sum(used)
            bar.update(images)
            if progress.batches % resume.LOG_EVERY == 0 or progress.batches == self.steps:
                mean = Losses(*self.finite_losses().mean(dim=0).tolist())
                if processes.leads():
                    tracking.log_steps(writer, progress.step, mean, lr)
                bar.set_postfix({name: f"{value:.4f}" for name, value in mean._asdict().items()}, refresh=False)
            yield

    def finish_epoch(self, writer, models, start):
        """Test the model, log the epoch, and write best.pt, model_EPOCH.pt and the track."""
        args, model, progress, epoch = self.args, self.model, self.progress, self.progress.epoch
        tested, counts = evaluate(model, self.test_batches, args.device, args.beta)
        better = tested.reconstruction < progress.best
        if better:
            progress.best, progress.best_epoch = tested.reconstruction, epoch
        if not processes.leads():
            return
        trained = Losses(*(progress.sums / progress.images).tolist())
        restarts = progress.restarts.item()
        tracking.log_epoch(writer, epoch, tested, counts, progress.counts.cpu(), restarts)
        tracking.log_images(writer, model, self.shown, epoch)
        if epoch == args.num_epochs:
            tracking.log_codebook(writer, model, counts, self.about["dataset"]["shape"], epoch)
            tracking.log_hparams(writer, {**hparams(args), "amp": self.bfloat16}, tested, counts)

        contents = {**self.about, "model": model.state_dict(), "epoch": epoch, "step": progress.step,
                    "test": tested._asdict()}
        if better:
            checkpoint.save(models / "best.pt", contents)
        checkpoint.save(models / f"model_{epoch}.pt", contents)
        progress.track.append(tracking.track_line(
            epoch, progress.step, *trained[:3], *tested[:3], perplexity(counts), int((counts > 0).sum()), restarts,
            time.perf_counter() - start))
        tracking.write_track(models / tracking.TRACK, progress.track)
        print(progress.track[-1], flush=True)


def write_beginning(args, run, models, logs):
    """Prepare the folders for the steps to come."""
    if args.resume:
        files.remove_temporary(models)
        tracking.keep_until(logs, run.progress.step, run.progress.epoch - 1)
    else:
        files.check_free((models,), args.overwrite)         # another run may have been faster
        prepare_folders(models, logs)
    files.write_whole(models / "args.json", json.dumps(settings(run), indent=2).encode())
    tracking.write_track(models / tracking.TRACK, run.progress.track)


def train(args, parser, argv):
    """Train from the start, or with --resume from where last.pt stands."""
    args.device = inputs.find_device(args.device)
    models, logs = Path("models", args.output_folder), Path("logs", args.output_folder)
    last, flag = models / "last.pt", f"--output-folder {args.output_folder}"
    command = processes.command("VQ-VAE.py", "--resume", "--output-folder", args.output_folder)
    one = processes.by_the_first
    if processes.leads():
        check_folders(args, models, logs, last)
    # Everything that can be wrong is found, by all processes, before a file is written.
    with one(files.locked(models, flag)), one(files.locked(logs, flag)):
        if args.resume:
            with cli.named("--resume", last):
                _, saved = checkpoint.load_model(last)
                args = parser.continued(args, argv, saved)
                args.device = inputs.find_device(args.device)
                run = Run(args, saved)
                run.go_on(saved)
        else:
            run = Run(args)
        run.check_alike()
        if args.resume:
            run.note_environment()
        else:
            run.choose_precision()
        if processes.leads():
            with cli.named("--output-folder", args.output_folder):
                write_beginning(args, run, models, logs)
        print(f"Training on {run.about['dataset'].get('folder', args.dataset)}: {run.images:,} images, "
              f"{len(run.test_set):,} to test, on {args.device}"
              + processes.told() + (f", from step {run.progress.step:,} on." if args.resume else "."))
        print(*run.progress.track, sep="\n", flush=True)
        start = time.perf_counter()
        with resume.Signals() as signals, resume.kept(last, command, args.batch_size), one(
                tracking.opened(logs)) as writer:
            if not args.resume and processes.leads():
                tracking.log_images(writer, run.model, run.shown, epoch=0)
            run.learn(writer, last, signals)
    if not run.finished():
        resume.stop(signals.received, run.progress, last, command)
    print(f"Done in {time.perf_counter() - start:.0f} s. Lowest test reconstruction loss: {run.progress.best:.4f}, "
          f"in epoch {run.progress.best_epoch}.\n"
          f"  checkpoint  {models / 'best.pt'}\n  track       {models / tracking.TRACK}\n  logs        {logs}\n"
          f"Next: python3 generate.py --model {models / 'best.pt'} --input test\n"
          f"      tensorboard --logdir logs")


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line(), processes.joined():
        train(args, parser, argv)


if __name__ == "__main__":
    main()
