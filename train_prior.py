"""Learn which codes go together: python3 train_prior.py [--model models/NAME/best.pt] ...

The second stage of the paper (section 3.3): the VQ-VAE is frozen, its code maps of the training set are learned by a
transformer. Writes prior.pt beside the model, and prior/* into logs/NAME. Without --model it takes the shipped one.
"""

import math
import time
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import cli
import tracking
from metrics import code_maps, nats_per_code
from prior import CodePrior

WARM_UP = 0.05                  # of all steps
WEIGHT_DECAY = 0.1
PATIENCE = 3                    # epochs without a lower test loss, then the training stops
CLASSES = 10
COLUMNS = ("epoch", "train_nats", "test_nats", "bits_per_pixel", "seconds")


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    cli.add_model_arguments(parser)

    group = parser.add_argument_group("prior")
    group.add_argument("--layers", type=cli.whole_number(1), default=4, metavar="N",
                       help=f"blocks of the transformer {shown}")
    group.add_argument("--width", type=cli.whole_number(1), default=192, metavar="E",
                       help=f"size of its hidden vectors {shown}")
    group.add_argument("--heads", type=cli.whole_number(1), default=6, metavar="N",
                       help=f"attention heads, a divisor of the width {shown}")
    group.add_argument("--dropout", type=cli.number(minimum=0, below=1), default=0.0, metavar="P",
                       help=f"share of activations dropped in training, against overfitting {shown}")
    group.add_argument("--drop-label", type=cli.number(minimum=0, below=1), default=0.1, metavar="P",
                       help=f"share of maps learned without their class {shown}")

    group = parser.add_argument_group("training")
    group.add_argument("--batch-size", type=cli.whole_number(1), default=32, metavar="N",
                       help=f"code maps per step {shown}")
    group.add_argument("--num-epochs", type=cli.whole_number(1), default=20, metavar="N",
                       help=f"passes over the training set {shown}")
    group.add_argument("--lr", type=cli.number(above=0), default=2e-3, metavar="RATE",
                       help=f"highest learning rate of AdamW, after a warm-up and before a cosine {shown}")
    group.add_argument("--shift", type=cli.whole_number(0, 4), default=1, metavar="PIXELS",
                       help=f"learn from images shifted by up to so many pixels as well, and know them apart {shown}")
    group.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N",
                       help=f"seed of weights, data order, shifts and samples {shown}")
    group.add_argument("--overwrite", action="store_true",
                       help="replace a prior that stands beside the model (default: leave it untouched and stop)")
    return parser


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


def encode_sets(model, train_set, test_set, offsets, device):
    """→ training maps (S, N, h, w), one set for each of S offsets, and test maps (N, h, w)."""
    with tqdm(total=len(offsets) * len(train_set) + len(test_set), desc="encoding", unit="img", unit_scale=True,
              leave=False, disable=None) as bar:
        train = torch.stack([code_maps(model, shifted(train_set.images, dy, dx), device, bar) for dy, dx in offsets])
        return train, code_maps(model, test_set.images, device, bar)


# ---------------------------------------------------------------- training

def warm_up_then_cosine(optimizer, steps):
    """The rate rises from 0 to --lr over the first WARM_UP of the steps, then falls to 0 on a cosine."""
    rise = max(1, round(WARM_UP * steps))

    def factor(step):
        if step < rise:
            return (step + 1) / rise
        return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2
    return LambdaLR(optimizer, factor)


def train_one_epoch(prior, maps, labels, optimizer, schedule, args, order, bar):
    """One pass over the code maps (S, N, h, w), each image in one of its S shifts. → mean nats per code."""
    prior.train()
    N, codes = len(labels), prior.height * prior.width
    shift_of = torch.randint(len(maps), (N,), generator=order)
    total = 0
    for rows in torch.randperm(N, generator=order).split(args.batch_size):
        batch = maps[shift_of[rows], rows].to(args.device)            # (B, h, w)
        log_prob = prior.log_prob(batch, labels[rows].to(args.device), shift_of[rows].to(args.device))
        loss = -log_prob.mean() / codes
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(prior.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        total = total + loss.detach() * len(rows)
        bar.update(len(rows))
    return (total / N).item()


def logs_of(path):
    """logs/NAME for models/NAME/FILE, and logs/FOLDER for a model in another folder."""
    folder = path.resolve().parent
    inside = folder.is_relative_to(Path("models").resolve()) and folder != Path("models").resolve()
    return Path("logs", folder.relative_to(Path("models").resolve()) if inside else folder.name)


def start_records(logs, track):
    """Replace the event file and the text track of a former training by new ones. → the writer."""
    tracking.remove_prior_logs(logs)
    writer = SummaryWriter(logs, filename_suffix=tracking.PRIOR_SUFFIX)
    track.unlink(missing_ok=True)
    tracking.tell(track, "  ".join(COLUMNS))
    return writer


def train(args):
    # Everything that can be wrong is found before a file is written.
    model, contents, path = cli.open_model(args)
    target, logs = Path(path).with_name("prior.pt"), logs_of(Path(path))
    with cli.named("--model", path):
        belongs_to = checkpoint.sha256(path)
        cli.check_target(target, "prior", args.overwrite)
        cli.check_writable(logs / "events")
    dataset, train_set, test_set = cli.open_data(args, contents)
    if list(train_set.images.shape[1:]) != contents["dataset"]["shape"]:
        raise ValueError(f"--model {path}: its images are {contents['dataset']['shape']}, "
                         f"those of --dataset {dataset} {list(train_set.images.shape[1:])}")
    torch.manual_seed(args.seed)
    order = torch.Generator().manual_seed(args.seed)
    offsets = offsets_up_to(args.shift)
    C, H, W = contents["dataset"]["shape"]
    config = {"num_codes": model.quantizer.num_codes, "height": H // 4, "width": W // 4, "num_classes": CLASSES,
              "layers": args.layers, "embedding": args.width, "heads": args.heads, "dropout": args.dropout,
              "drop_label": args.drop_label, "num_shifts": len(offsets)}
    try:
        with cli.named(f"--heads {args.heads} --width", args.width):
            prior = CodePrior(**config).to(args.device)
    except RuntimeError as error:
        raise ValueError(f"--layers {args.layers} --width {args.width}: there is no memory for a prior of this size"
                         ) from error
    optimizer = torch.optim.AdamW(prior.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY, fused=True)
    schedule = warm_up_then_cosine(optimizer, args.num_epochs * math.ceil(len(train_set) / args.batch_size))

    print(f"Learning the code maps of {path} on {dataset}: {len(train_set):,} images, {len(test_set):,} to test.")
    train_maps, test_maps = encode_sets(model, train_set, test_set, offsets, args.device)
    bits_per_pixel = (H // 4) * (W // 4) / (C * H * W * math.log(2))            # of one nat per code
    track, writer = target.with_name(tracking.PRIOR_TRACK), None
    best, best_epoch = math.inf, 0
    for epoch in range(1, args.num_epochs + 1):
        start = time.perf_counter()
        with tqdm(total=len(train_set), desc=f"epoch {epoch}/{args.num_epochs}", unit="map", unit_scale=True,
                  leave=False, disable=None) as bar:
            trained = train_one_epoch(prior, train_maps, train_set.labels, optimizer, schedule, args, order, bar)
        tested = nats_per_code(prior, test_maps, test_set.labels, args.device)
        if not math.isfinite(trained + tested):
            raise ValueError(f"--lr {args.lr:g}: the loss of epoch {epoch} is no longer a finite number, "
                             "try a lower rate")
        if writer is None:          # only now, so that a training that fails at once leaves a former one as it was
            with cli.named("--model", path):
                writer = start_records(logs, track)
        tracking.log_prior(writer, epoch, trained, tested, tested * bits_per_pixel,
                           model.decode(samples(prior, args.seed, args.device)))
        if tested < best:
            best, best_epoch = tested, epoch
            checkpoint.save(target, {"format": checkpoint.FORMAT, "kind": "prior", "config": config,
                                     "vqvae": belongs_to, "dataset": dataset, "model": prior.state_dict(),
                                     "epoch": epoch, "test": {"nats_per_code": tested,
                                                              "bits_per_pixel": tested * bits_per_pixel}})
        tracking.tell(track, f"{epoch:5}  {trained:10.4f}  {tested:9.4f}  {tested * bits_per_pixel:14.4f}"
                             f"  {time.perf_counter() - start:7.1f}")
        if epoch - best_epoch >= PATIENCE:
            print(f"Stopped: the test loss has not fallen for {PATIENCE} epochs.")
            break
    writer.close()
    print(f"Lowest test loss: {best:.4f} nats per code, in epoch {best_epoch}.\n  prior  {target}\n  logs   {logs}\n"
          f"Next: python3 generate.py --model {path} --input prior")


@torch.no_grad()
def samples(prior, seed, device):
    """A hundred code maps, ten of each class."""
    labels = torch.arange(CLASSES, device=device).repeat_interleave(10)
    return prior.sample(labels, generator=torch.Generator().manual_seed(seed))


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        train(args)


if __name__ == "__main__":
    main()
