"""Train the classifier that judges sampled digits: python3 train_classifier.py [--data-folder PATH] ...

A small CNN, or with --architecture transformer a vision transformer, on real digits, slightly rotated, scaled and
shifted. Writes models/NAME.pt, and what is needed to resume into models/NAME-last.pt.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("--dataset", type=arguments.one_of(*arguments.DIGIT_SETS), default="MNIST", metavar="NAME",
                        help=f"{', '.join(arguments.DIGIT_SETS)} {shown}")
    parser.add_argument("--data-folder", type=arguments.file_name, default="MNIST", metavar="PATH",
                        help=f"where the data set is, or is downloaded to once {shown}")
    parser.add_argument("--output", type=arguments.name_inside("models"), default="classifier", metavar="NAME",
                        help=f"writes models/NAME.pt {shown}")
    parser.add_argument("--architecture", type=arguments.one_of(*arguments.ARCHITECTURES), default="cnn",
                        metavar="NAME", help=f"{' or '.join(arguments.ARCHITECTURES)} {shown}")
    parser.add_argument("--num-epochs", type=arguments.integer(1), default=10, metavar="N",
                        help=f"passes over the training set {shown}")
    parser.add_argument("--batch-size", type=arguments.integer(2), default=128, metavar="N",
                        help=f"images per step {shown}")
    parser.add_argument("--lr", type=arguments.number(above=0), default=3e-3, metavar="RATE",
                        help=f"peak learning rate of AdamW, on a one-cycle schedule {shown}")
    parser.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                        help=f"seed of weights, data order and augmentation {shown}")
    parser.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                        help=f"{arguments.DEVICES} {shown}")
    cli.add_run_arguments(parser, "a classifier of that name")
    parser.set_defaults(amp=False)          # a setting of every Trainer
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import OneCycleLR

import checkpoint
import data
from metrics.classifier import ACTIVATIONS_PER_PIXEL, ARCHITECTURES
from utils import event_files, files, inputs, speed, tensorboard_logs
from utils.distributed import launch_command
from utils.memory import images_that_fit
from utils.run_files import RunFiles
from utils.train_state import check_metadata, seed_everything, set_deterministic
from utils.trainer import Trainer

MAX_ROTATION, MAX_ZOOM, MAX_SHIFT = math.radians(12), 0.1, 0.1      # radians, of the size, of half the width
WEIGHT_DECAY = 0.05
COLUMNS = {"epoch": "d", "train_loss": ".4f", "test_accuracy": ".4f", "seconds": ".1f"}         # and their formats


def augment(x):
    """Images (B, 1, H, W), each rotated, scaled and shifted a little; draws from torch's generator.

    A transform for each image, where torchvision's RandomAffine draws one for the whole batch.
    """
    B = len(x)
    rotation, zoom, shift_x, shift_y = (torch.rand(4, B, device=x.device) * 2 - 1)
    cosine = torch.cos(rotation * MAX_ROTATION) * (1 + zoom * MAX_ZOOM)
    sine = torch.sin(rotation * MAX_ROTATION) * (1 + zoom * MAX_ZOOM)
    rows = torch.stack([cosine, -sine, shift_x * MAX_SHIFT, sine, cosine, shift_y * MAX_SHIFT], dim=1).view(B, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1        # black outside the image


def train(trainer, batches, test_set):
    """Epoch after epoch: train, evaluate, save, log."""
    args, model, optimizer, schedule = trainer.args, trainer.model, trainer.optimizer, trainer.schedule
    for epoch in trainer.epochs():                            # where it left off, if resumed
        model.train()
        for images, labels in trainer.batches(batches):
            labels = data.to_device(labels, args.device)
            x = augment(data.to_model_range(images, args.device))     # (B, 1, H, W) in [-1, 1]
            loss = F.cross_entropy(model(x), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            trainer.after_step([loss])                                # save, notice signals

        accuracy = test_accuracy(model, test_set, args.device)
        trainer.save_model(trainer.files.best, {"test": {"accuracy": accuracy}})     # the latest, whatever its accuracy
        [train_loss] = trainer.state.mean_losses()
        tensorboard_logs.log_classifier(trainer.writer, epoch, train_loss, accuracy)
        trainer.add_track_line(COLUMNS, {"epoch": epoch, "train_loss": train_loss, "test_accuracy": accuracy,
                                         "seconds": trainer.epoch_seconds()})
    return accuracy


@torch.no_grad()
def test_accuracy(model, test_set, device):
    """The share of test images that the classifier recognises, in evaluation mode."""
    model.eval()
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for images, labels in data.batches(test_set, images_that_fit(*test_set.shape[1:], ACTIVATIONS_PER_PIXEL)):
        correct += (model(data.to_model_range(images, device)).argmax(dim=1) == data.to_device(labels, device)).sum()
    return correct.item() / len(test_set)


def build_trainer(args, run_files, train_set, generator, saved=None):
    """The Trainer of a new classifier. saved: the contents of the checkpoint to resume from, if there is one."""
    set_deterministic(args.device)
    seed_everything(args.seed)
    metadata = {"format": checkpoint.FORMAT, "kind": "classifier", "config": {"architecture": args.architecture},
                "dataset": args.dataset}
    if saved:
        check_metadata(metadata, saved)
    model = ARCHITECTURES[args.architecture]().to(args.device, memory_format=speed.memory_format(args.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY,
                                  fused=args.device != "mps")
    steps = args.num_epochs * math.ceil(len(train_set) / args.batch_size)
    schedule = OneCycleLR(optimizer, args.lr, steps, cycle_momentum=False)
    return Trainer(args, run_files, metadata, model, optimizer, schedule, generator, len(train_set), ("classifier",),
                   "--batch-size", track=["  ".join(COLUMNS)])


def run(args, parser, argv):
    """Train from the start, or with --resume from the state in NAME-last.pt."""
    args.device = inputs.find_device(args.device)
    stem, logs, flag = f"models/{args.output}", Path("logs", args.output), f"--output {args.output}"
    run_files = RunFiles(Path(f"{stem}-last.pt"), Path(f"{stem}.pt"), Path(f"{stem}-track.txt"), logs,
                         event_files.CLASSIFIER_SUFFIX,
                         launch_command("train_classifier.py", "--resume", "--output", args.output))
    with cli.errors_name_flag("--output", args.output):
        run_files.check("classifier", args.resume, args.overwrite)
    with files.created_folder(run_files.best.parent), files.locked_folder(logs, flag):
        saved = None
        if args.resume:
            with cli.errors_name_flag("--resume", run_files.last):
                _, saved = checkpoint.load_classifier(run_files.last)
                args = parser.resumed_arguments(args, argv, saved)
                args.device = inputs.find_device(args.device)
        train_set, test_set = inputs.load_data(args.dataset, args.data_folder, None)
        generator = torch.Generator().manual_seed(args.seed)
        if args.device.startswith("cuda"):                      # the bytes of the whole set are few
            train_set, test_set = train_set.to(args.device), test_set.to(args.device)
        batches = data.batches(train_set, args.batch_size, generator)
        with cli.errors_name_flag("--resume", run_files.last) if saved else nullcontext():
            trainer = build_trainer(args, run_files, train_set, generator, saved)
            if saved:
                trainer.load_state(saved)
        print(f"Training on {args.dataset}: {len(train_set):,} images, {len(test_set):,} to test, on {args.device}"
              + (f", from step {trainer.state.step:,} on." if saved else "."))
        if saved:
            trainer.note_environment()
        with cli.errors_name_flag("--output", args.output):
            run_files.check("classifier", args.resume, args.overwrite)
            trainer.begin()
        trainer.print_track()
        with trainer.running():
            accuracy = train(trainer, batches, test_set)
    prior = files.typed_path(checkpoint.PRETRAINED_PRIOR)
    print(f"Test accuracy {accuracy:.2%}\n  classifier  {run_files.best}\n  logs        {logs}\n"
          "Next: " + files.command("evaluate.py", "--prior", prior, "--classifier", run_files.best))


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args, parser, argv)


if __name__ == "__main__":
    main()
