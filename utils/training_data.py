"""The data of a training: what is held out, and the batches.

Letters: N images, B of them in a batch, C channels, H×W pixels.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

import data
from data import image_folder
from utils import distributed, inputs
from utils.cli import errors_name_flag
from utils.memory import images_that_fit
from utils.tensorboard_logs import images_in_grid, track_row

SHOWN_IMAGES = 64           # test images in TensorBoard, of large ones fewer


def hold_out(args, train_set, test_set):
    """data.hold_out() by the arguments, in which the number held out is then set: (training set, validation set).

    A run that began before anything was held out is resumed as it began: its test set takes the place of a validation
    set.
    """
    if args.resume and args.validation_images is None:
        return train_set, test_set
    count, processes = args.validation_images, distributed.world_size()
    if count is None and len(train_set) // data.VALIDATION_PART < processes:
        count = 0                               # too few for each process to have one
    with errors_name_flag("--validation-images", count):
        train_set, validation_set = data.hold_out(train_set, count)
        if validation_set and len(validation_set) < processes:
            raise ValueError(f"{processes} processes share them: hold out as many at least, or none")
    args.validation_images = len(validation_set or ())
    return train_set, validation_set


def describe_split(args, train_set, test_set):
    """How many images a training trains on, chooses its best epoch on, if on any, and is tested on."""
    validated = f"{args.validation_images:,} to validate, " if args.validation_images else ""
    return f"{len(train_set):,} images, {validated}{len(test_set):,} to test"


def describe_best(trainer, column, what):
    """What the best model of a finished training is, in a sentence. column: that of `what` in the track, by set."""
    if not distributed.is_main_process():       # which alone prints, and has the track
        return ""
    state, validation_images = trainer.state, trainer.args.validation_images
    row = track_row(state.track, state.best_epoch)
    if not validation_images:       # None of runs that began before any were held out
        which = "Lowest test" if validation_images is None else "Test"
        return f"{which} {what}: {row[f'test_{column}']:.4f}, in epoch {state.best_epoch}"
    return (f"Lowest validation {what}: {row[f'val_{column}']:.4f}, in epoch {state.best_epoch}; on the test set: "
            f"{row[f'test_{column}']:.4f}")


class Batches(NamedTuple):
    """The data of a training."""

    dataset: dict                   # data.describe()
    train_set: Dataset              # without the images held out
    validation_set: Dataset | None
    test_set: Dataset
    train: Iterable                 # of this process's shard of each batch
    validation: Iterable | None
    test: Iterable
    generator: torch.Generator      # of the training images' order
    shown: torch.Tensor             # uint8 test images (B, C, H, W) for TensorBoard


def load_batches(args):
    """The Batches of a VQ-VAE's training. Sets the number of validation images in the arguments."""
    distributed.use_own_gpu(args.device)
    with errors_name_flag("--batch-size", args.batch_size):
        batch_size = distributed.per_process_batch_size(args.batch_size, fixed=args.resume)
    train_set, test_set = inputs.load_data(
        args.dataset, args.data_folder, [args.channels, args.image_size, args.image_size])
    dataset = data.describe(args.dataset, args.data_folder, train_set)
    train_set, validation_set = hold_out(args, train_set, test_set)
    sets, pin_memory = (train_set, validation_set, test_set), args.device.startswith("cuda")
    if args.dataset == data.FOLDER:
        image_folder.keep_in_memory(*dict.fromkeys(part for part in reversed(sets) if part))
    elif pin_memory and not args.num_workers:               # the bytes of the whole set are few
        sets, pin_memory = [part and part.to(args.device) for part in sets], False
    generator, (H, W) = torch.Generator().manual_seed(args.seed), train_set.shape[1:]

    def evaluated(part):
        return part and data.batches(distributed.shard(part), images_that_fit(H, W, args.hidden_size), None,
                                     args.num_workers, pin_memory)

    train_set, validation_set, test_set = sets
    return Batches(dataset, *sets, data.batches(train_set, batch_size, generator, args.num_workers, pin_memory),
                   evaluated(validation_set), evaluated(test_set), generator,
                   test_set[:images_in_grid(SHOWN_IMAGES, H, W)][0].cpu())
