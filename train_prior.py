"""Learn which codes go together: python3 train_prior.py [--model models/NAME/best.pt] ...

The second stage of the paper (section 3.3): the VQ-VAE is frozen, its code maps of the training set are learned by a
transformer. Writes prior.pt beside the model, and prior/* into logs/NAME. Without --model it takes the shipped one,
whose prior it replaces only with --overwrite.
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

import arguments
import cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)

    group = parser.add_argument_group("prior")
    group.add_argument("--layers", type=arguments.whole_number(1), default=4, metavar="N",
                       help=f"blocks of the transformer {shown}")
    group.add_argument("--width", type=arguments.whole_number(1), default=192, metavar="E",
                       help=f"size of its hidden vectors {shown}")
    group.add_argument("--heads", type=arguments.whole_number(1), default=6, metavar="N",
                       help=f"attention heads, a divisor of the width {shown}")
    group.add_argument("--dropout", type=arguments.number(minimum=0, below=1), default=0.0, metavar="P",
                       help=f"share of activations dropped in training, against overfitting {shown}")
    group.add_argument("--drop-label", type=arguments.number(minimum=0, below=1), default=0.1, metavar="P",
                       help=f"share of maps learned without their class {shown}")

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=arguments.whole_number(1), default=32, metavar="N",
                       help=f"code maps per step, of all processes together {shown}")
    group.add_argument("--num-epochs", type=arguments.whole_number(1), default=40, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=arguments.number(above=0), default=2e-3, metavar="RATE",
                       help=f"highest learning rate of AdamW, after a warm-up and before a cosine {shown}")
    group.add_argument("--shift", type=arguments.whole_number(0, 4), default=1, metavar="PIXELS",
                       help=f"learn from images shifted by up to so many pixels as well, and know them apart {shown}")
    group.add_argument("--seed", type=arguments.whole_number(0), default=0, metavar="N",
                       help=f"seed of weights, data order, shifts and samples {shown}")
    cli.add_speed_arguments(group)
    cli.add_run_arguments(group, "a prior that stands beside the model")
    return parser


def parse_arguments(argv=None):
    """The parser and its arguments."""
    parser = get_parser()
    return parser, parser.parse_args(argv)


if __name__ == "__main__":
    parse_arguments()       # --help and mistakes are answered before torch is imported, which takes seconds

import math
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from tqdm import tqdm

import checkpoint
import data
import files
import inputs
import processes
import quality
import resume
import tracking
from metrics import at_once, code_maps, nats_per_code
from prior import CodePrior

WARM_UP = 0.05                  # of all steps
WEIGHT_DECAY = 0.1
BETAS = 0.9, 0.99               # with 0.999 for the second one the test loss falls more slowly
CALIBRATION = 3000              # training maps that calibrate the prior after each epoch
PATIENCE = 3                    # epochs without a lower test loss, then the training stops
COLUMNS = ("epoch", "train_nats", "test_nats", "bits_per_pixel", "seconds")


# ---------------------------------------------------------------- code maps

def shifted(images, dy, dx):
    """Images moved down by dy and right by dx pixels, black where nothing comes in."""
    H, W = images.shape[-2:]
    moved = torch.zeros_like(images)
    moved[..., max(dy, 0):H + min(dy, 0), max(dx, 0):W + min(dx, 0)] = \
        images[..., max(-dy, 0):H + min(-dy, 0), max(-dx, 0):W + min(-dx, 0)]
    return moved


def offsets_up_to(shift):
    """All (dy, dx) of at most so many pixels each, (0, 0) first."""
    steps = range(-shift, shift + 1)
    return sorted(((dy, dx) for dy in steps for dx in steps), key=lambda offset: offset != (0, 0))


def encode_sets(model, train_set, test_set, offsets, device, num_workers=0):
    """→ training maps (S, N, h, w), one set for each of S offsets, and test maps (N, h, w).

    Of several processes each encodes its part, and all get the whole.
    """
    size, own_train, own_test = at_once(*train_set.shape[1:]), processes.part(train_set), processes.part(test_set)
    with tqdm(total=len(offsets) * len(own_train) + len(own_test), desc="encoding", unit="img", unit_scale=True,
              leave=False, disable=processes.no_bar()) as bar:
        train = [[] for _ in offsets]
        for images, labels in data.batches(own_train, size, None, num_workers):       # each image is read once
            for maps, (dy, dx) in zip(train, offsets):
                maps.append(code_maps(model, [(shifted(images, dy, dx), labels)], device, bar))
        test = code_maps(model, data.batches(own_test, size, None, num_workers), device, bar)
        train = torch.stack([processes.whole(torch.cat(maps), len(train_set)) for maps in train])
        return train, processes.whole(test, len(test_set))


# ---------------------------------------------------------------- training

def warm_up_then_cosine(optimizer, steps):
    """The rate rises from 0 to --lr over the first WARM_UP of the steps, then falls to 0 on a cosine."""
    rise = max(1, round(WARM_UP * steps))

    def factor(step):
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
    return LambdaLR(optimizer, factor)


class Run(resume.Run):
    """The training of a prior, from the arguments and the frozen VQ-VAE.

    saved: the contents of the checkpoint that it is to go on from, if there is one.
    """

    losses = ("prior",)         # nats per code

    def __init__(self, args, vqvae, contents, path, saved=None):
        processes.use_device(args.device)
        with cli.named("--batch-size", args.batch_size):
            processes.split(args.batch_size, fixed=args.resume)
        dataset, self.train_set, self.test_set = inputs.open_data(args, contents)
        C, H, W = contents["dataset"]["shape"]
        if self.train_set.shape != [C, H, W]:
            raise ValueError(f"--model {path}: its images are {[C, H, W]}, "
                             f"those of --dataset {dataset} {self.train_set.shape}")
        resume.seed_everything(args.seed)
        generator = torch.Generator().manual_seed(args.seed)
        self.vqvae, self.offsets = vqvae.to(args.device), offsets_up_to(args.shift)
        self.bits_per_pixel = (H // 4) * (W // 4) / (C * H * W * math.log(2))         # of one nat per code
        config = {"num_codes": vqvae.quantizer.num_codes, "height": H // 4, "width": W // 4,
                  "num_classes": len(self.train_set.classes), "layers": args.layers, "embedding": args.width,
                  "heads": args.heads, "dropout": args.dropout, "drop_label": args.drop_label,
                  "num_shifts": len(self.offsets)}
        about = {"format": checkpoint.FORMAT, "kind": "prior", "config": config,
                 "vqvae": checkpoint.sha256(path), "dataset": dataset}
        if self.train_set.classes != list(data.DIGITS):
            about["classes"] = self.train_set.classes
        if saved:
            resume.check_about(about, saved)
        try:
            with cli.named(f"--heads {args.heads} --width", args.width):
                prior = CodePrior(**config).to(args.device)
        except RuntimeError as error:
            raise ValueError(f"--layers {args.layers} --width {args.width}: there is no memory for a prior of this size"
                             ) from error
        optimizer = torch.optim.AdamW(prior.parameters(), lr=args.lr, betas=BETAS, weight_decay=WEIGHT_DECAY,
                                      fused=args.device != "mps")
        steps = math.ceil(len(self.train_set) / args.batch_size)
        super().__init__(args, about, prior, optimizer, warm_up_then_cosine(optimizer, args.num_epochs * steps),
                         generator, steps, len(self.train_set), track=["  ".join(COLUMNS)])
        self.eager, self.compiled = self.loss_of, self.compiled_if_asked(self.loss_of)

    def encode(self):
        self.train_maps, self.test_maps = encode_sets(self.vqvae, self.train_set, self.test_set, self.offsets,
                                                      self.args.device, self.args.num_workers)

    def finished(self):
        return super().finished() or self.risen()

    def risen(self):
        """Whether the test loss has not fallen for PATIENCE epochs."""
        return self.progress.epoch - 1 - self.progress.best_epoch >= PATIENCE

    def loss_of(self, maps, labels, shifts):
        """Nats per code of maps (B, h, w)."""
        with self.autocast():
            return -self.model.log_prob(maps, labels, shifts).mean() / maps[0].numel()

    def probe_batch(self, count):
        labels = self.train_set.labels[:count].to(self.args.device)
        return self.train_maps[0, :count].to(self.args.device), labels, torch.zeros_like(labels)

    def probe_loss(self, prior, maps, labels, shifts):
        return -prior.log_prob(maps, labels, shifts).mean()

    def take_steps(self, writer, bar):
        """The steps of the epoch that are not done yet, each image in one of its shifts. Yields after each of them."""
        prior, args, progress, labels = self.model.train(), self.args, self.progress, self.train_set.labels
        N, share = len(labels), processes.split(args.batch_size)
        shift_of = torch.randint(len(self.train_maps), (N,), generator=self.generator)
        order = torch.randperm(N, generator=self.generator)
        if processes.count() > 1:
            order = order[list(processes.places(N))]
        for rows in order.split(share)[progress.batches:]:
            batch = self.train_maps[shift_of[rows], rows].to(args.device)             # (B, h, w)
            loss_of = self.compiled if len(rows) == share else self.eager
            # Without dropout the withheld digits are all that is drawn, and those of one process with the whole batch.
            own = processes.count() > 1 and args.dropout
            with processes.own_draws(args.seed + progress.step * processes.count()) if own else nullcontext():
                loss = loss_of(batch, labels[rows].to(args.device), shift_of[rows].to(args.device))
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
            self.optimizer.step()
            self.schedule.step()

            images = self.images_of_all(len(rows))
            progress.add(processes.all_mean(loss.detach().view(1)), images)
            bar.update(images)
            if progress.batches % resume.LOG_EVERY == 0 or progress.batches == self.steps:
                if processes.leads():
                    tracking.check_there(writer)
                bar.set_postfix({"nats": f"{self.finite_losses().mean().item():.4f}"}, refresh=False)
            yield

    def tested(self):
        """Nats per code on the test set, of the prior calibrated with some of the training maps where that helps.

        It does not where the training maps are known too well.
        """
        def nats():
            return nats_per_code(prior, self.test_maps, self.test_set.labels, self.args.device)

        prior, labels = self.model, self.train_set.labels
        prior.tail.zero_()
        plain = nats()
        some = torch.linspace(0, len(labels) - 1, min(CALIBRATION, len(labels))).long()
        prior.calibrate(self.train_maps[0, some], labels[some], max(1, at_once(4 * prior.height, 4 * prior.width) // 5))
        calibrated = nats()
        if calibrated >= plain:
            prior.tail.zero_()
        return min(plain, calibrated)

    def finish_epoch(self, writer, folder, start):
        """Test the prior, log the epoch, and write prior.pt, if it is the best so far, and the track."""
        args, prior, progress, epoch = self.args, self.model, self.progress, self.progress.epoch
        trained = progress.sums.item() / progress.images
        tested = self.tested()
        better = tested < progress.best
        if better:
            progress.best, progress.best_epoch = tested, epoch
        if not processes.leads():
            return
        bits = tested * self.bits_per_pixel
        tracking.log_prior(writer, epoch, trained, tested, bits, samples(prior, self.vqvae, args.seed, args.device))
        if better:
            checkpoint.save(folder / "prior.pt", {**self.about, "model": prior.state_dict(), "epoch": epoch,
                                                  "test": {"nats_per_code": tested, "bits_per_pixel": bits}})
        progress.track.append(f"{epoch:5}  {trained:10.4f}  {tested:9.4f}  {bits:14.4f}"
                              f"  {time.perf_counter() - start:7.1f}")
        tracking.write_track(folder / tracking.PRIOR_TRACK, progress.track)
        print(progress.track[-1], flush=True)


def logs_of(path):
    """logs/NAME for models/NAME/FILE, and logs/FOLDER for a model in another folder."""
    folder = path.resolve().parent
    inside = folder.is_relative_to(Path("models").resolve()) and folder != Path("models").resolve()
    return Path("logs", folder.relative_to(Path("models").resolve()) if inside else folder.name)


def check_folders(args, path, target, last, logs):
    """Raise ValueError if the prior could not be written, or not go on from the file `last`."""
    with cli.named("--model", path):
        if args.resume and not last.is_file():
            raise ValueError(f"there is no {last} to --resume: start anew, with --overwrite if there is a prior")
        for file in () if args.resume else (target, last):
            inputs.check_target(file, "prior", args.overwrite, ", or go on with one that was broken off with --resume")
        files.check_writable(target)
        files.check_writable(logs / "events")


def write_beginning(args, run, folder, logs):
    """Prepare the folders for the steps to come."""
    files.remove_temporary(folder)
    if args.resume:
        tracking.keep_until(logs, run.progress.step, run.progress.epoch - 1, tracking.PRIOR_SUFFIX)
    else:
        clear(folder, logs)
    tracking.write_track(folder / tracking.PRIOR_TRACK, run.progress.track)


def clear(folder, logs):
    """Remove what a former training of a prior left."""
    for name in ("prior-last.pt", "prior.pt", tracking.PRIOR_TRACK):
        (folder / name).unlink(missing_ok=True)
    tracking.remove_logs(logs, tracking.PRIOR_SUFFIX)


def train(args, parser, argv):
    """Train from the start, or with --resume from where prior-last.pt stands."""
    args.device = inputs.find_device(args.device)
    processes.use_device(args.device)
    vqvae, contents, path = inputs.open_model(args)
    folder, logs = Path(path).parent, logs_of(Path(path))
    target, last, flag = folder / "prior.pt", folder / "prior-last.pt", f"--model {path}"
    command = processes.command("train_prior.py", "--resume", "--model", path)
    one = processes.by_the_first
    if processes.leads():
        check_folders(args, path, target, last, logs)
    # Everything that can be wrong is found, by all processes, before a file is written.
    with one(files.locked(folder, flag)), one(files.locked(logs, flag)):
        if args.resume:
            with cli.named("--resume", last):
                _, saved = checkpoint.load_prior(last, path)
                args = parser.continued(args, argv, saved)
                args.device = inputs.find_device(args.device)
                run = Run(args, vqvae, contents, path, saved)
                run.go_on(saved)
                if run.risen():
                    raise ValueError(f"the training has ended, its test loss had not fallen for {PATIENCE} epochs")
        else:
            run = Run(args, vqvae, contents, path)
        run.check_alike()
        print(f"Learning the code maps of {path} on {run.about['dataset']}: {run.images:,} images, "
              f"{len(run.test_set):,} to test" + processes.told()
              + (f", from step {run.progress.step:,} on." if args.resume else "."))
        run.encode()
        if args.resume:
            run.note_environment()
        else:
            run.choose_precision()
        if processes.leads():
            with cli.named("--model", path):
                write_beginning(args, run, folder, logs)
        print(*run.progress.track, sep="\n", flush=True)
        with resume.Signals() as signals, resume.kept(last, command, args.batch_size), one(
                tracking.opened(logs, tracking.PRIOR_SUFFIX)) as writer:
            run.learn(writer, last, signals)
    if not run.finished():
        resume.stop(signals.received, run.progress, last, command)
    if run.risen():
        print(f"Stopped: the test loss has not fallen for {PATIENCE} epochs.")
    print(f"Lowest test loss: {run.progress.best:.4f} nats per code, in epoch {run.progress.best_epoch}.\n"
          f"  prior  {target}\n  logs   {logs}\nNext: python3 generate.py --model {path} --input prior")


@torch.no_grad()
def samples(prior, vqvae, seed, device):
    """A hundred new images (100, C, H, W) in [-1, 1], as many of each class."""
    maps = quality.sampled_maps(prior, quality.spread_labels(prior.num_classes, 100), {},
                                torch.Generator().manual_seed(seed), device)
    return torch.cat([*quality.decoded(vqvae, maps, device)])


def main(argv=None):
    parser, args = parse_arguments(argv)
    with parser.bad_input_in_one_line(), processes.joined():
        train(args, parser, argv)


if __name__ == "__main__":
    main()
