"""Train the classifier that judges sampled digits: python3 train_classifier.py [--data-folder PATH] ...

A small CNN on real digits, slightly rotated, scaled and shifted. Writes models/NAME.pt and prints its test accuracy.
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
    parser.add_argument("--data-folder", default="MNIST", metavar="PATH",
                        help=f"where the data set is, or is downloaded to once {shown}")
    parser.add_argument("--output", type=arguments.name_inside("models"), default="classifier", metavar="NAME",
                        help=f"writes models/NAME.pt {shown}")
    parser.add_argument("--num-epochs", type=arguments.integer(1), default=10, metavar="N",
                        help=f"passes over the training set {shown}")
    parser.add_argument("--batch-size", type=arguments.integer(2), default=128, metavar="N",
                        help=f"images per step {shown}")
    parser.add_argument("--lr", type=arguments.number(above=0), default=3e-3, metavar="RATE",
                        help=f"highest learning rate of AdamW, on a one-cycle schedule {shown}")
    parser.add_argument("--seed", type=arguments.integer(0), default=0, metavar="N",
                        help=f"seed of weights, data order and augmentation {shown}")
    parser.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                        help=f"{arguments.DEVICES} {shown}")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace a classifier of that name (default: leave it unchanged and stop)")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

import checkpoint
import data
from metrics.classifier import HIDDEN_SIZE, DigitClassifier
from utils import inputs, speed
from utils.memory import images_that_fit

MAX_ROTATION, MAX_ZOOM, MAX_SHIFT = math.radians(12), 0.1, 0.1      # radians, of the size, of half the width
WEIGHT_DECAY = 0.05


def augment(x):
    """Images (B, 1, H, W), each rotated, scaled and shifted a little; draws from torch's generator."""
    B = len(x)
    rotation, zoom, shift_x, shift_y = (torch.rand(4, B, device=x.device) * 2 - 1)
    cosine = torch.cos(rotation * MAX_ROTATION) * (1 + zoom * MAX_ZOOM)
    sine = torch.sin(rotation * MAX_ROTATION) * (1 + zoom * MAX_ZOOM)
    rows = torch.stack([cosine, -sine, shift_x * MAX_SHIFT, sine, cosine, shift_y * MAX_SHIFT], dim=1).view(B, 2, 3)
    grid = F.affine_grid(rows, list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1        # black outside the image


def train(args):
    args.device = inputs.find_device(args.device)
    target = Path("models", f"{args.output}.pt")
    with cli.errors_name_flag("--output", args.output):
        inputs.check_target(target, "classifier", args.overwrite)
    with cli.errors_name_flag(f"--dataset {args.dataset} --data-folder", args.data_folder):
        train_set, test_set = data.load(args.dataset, args.data_folder)
    torch.manual_seed(args.seed)
    batches = data.batches(train_set, args.batch_size, torch.Generator().manual_seed(args.seed))
    model = DigitClassifier().to(args.device, memory_format=speed.memory_format(args.device))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=WEIGHT_DECAY,
                                  fused=args.device != "mps")
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.num_epochs * len(batches),
                                                   cycle_momentum=False)
    with cli.errors_name_flag("--output", args.output):
        target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Training on {args.dataset}: {len(train_set):,} images, {len(test_set):,} to test, on {args.device}.")
    for epoch in range(1, args.num_epochs + 1):
        start = time.perf_counter()
        model.train()
        for images, labels in tqdm(batches, desc=f"epoch {epoch}/{args.num_epochs}", leave=False, disable=None):
            x = augment(data.to_model_range(images, args.device))
            loss = F.cross_entropy(model(x), labels.to(args.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not math.isfinite(loss.item()):
            raise ValueError(f"--lr {args.lr:g}: the loss of epoch {epoch} is not finite, "
                             "try a lower rate")
        accuracy = test_accuracy(model, test_set, args.device)
        print(f"epoch {epoch}: test accuracy {accuracy:.4f}, {time.perf_counter() - start:.0f} s", flush=True)
    checkpoint.save(target, {"format": checkpoint.FORMAT, "kind": "classifier", "dataset": args.dataset,
                             "model": model.state_dict(), "test": {"accuracy": accuracy}})
    print(f"Test accuracy {accuracy:.2%}\n  classifier  {target}")


@torch.no_grad()
def test_accuracy(model, test_set, device):
    """The share of test images that the classifier recognises, in evaluation mode."""
    model.eval()
    correct = 0
    for images, labels in data.batches(test_set, images_that_fit(*test_set.shape[1:], HIDDEN_SIZE)):
        correct += (model(data.to_model_range(images, device)).argmax(dim=1).cpu() == labels).sum().item()
    return correct / len(test_set)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        train(args)


if __name__ == "__main__":
    main()
