"""What the flags of the scripts name, opened: the device, the model, its data, the prior."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

import checkpoint
import data
import files
import processes
from cli import named


def find_device(name):
    """The name of a device that this machine has, "auto" being the best one. Raises ValueError if it is not there."""
    if name == "auto":
        # What was chosen is what a run remembers: on another machine it does not go on elsewhere unasked.
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "mps" and not torch.backends.mps.is_available():
        raise ValueError("--device mps: there is no Apple GPU: use --device cpu; a Mac with Apple silicon and "
                         "a build of torch for it are needed")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no CUDA GPU: use --device cpu, or on Colab choose "
                         "Runtime > Change runtime type > GPU; a CUDA build of torch and the NVIDIA driver are needed")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    return name


def open_model(args):
    """The model that the arguments name, else the shipped one. → model, its checkpoint, its path."""
    shipped = min(str(checkpoint.PRETRAINED), os.path.relpath(checkpoint.PRETRAINED), key=len)
    path = args.model or shipped
    with named("--model", path):
        model, contents = checkpoint.load_model(path, args.device, args.hidden_size, args.k)
    if not args.model and processes.leads():
        print(f"No --model given: using the shipped one, {path}", file=sys.stderr)
    return model, contents, path


def open_data(args, contents):
    """The data that the arguments name, else those of the checkpoint. → name, training and test set."""
    own = contents["dataset"]
    name = args.dataset or own["name"]
    folder = args.data_folder or (own.get("folder", "MNIST") if name == own["name"] else "MNIST")
    return name, *load_data(name, folder, own["shape"], args.num_workers)


def load_data(name, folder, shape, num_workers):
    """data.load(), which says whose fault it is, and which files of an image folder it leaves out."""
    ahead = nullcontext() if name == data.FOLDER else processes.first_goes_ahead()
    with named(f"--dataset {name} --data-folder", folder), ahead:
        train_set, test_set = data.load(name, folder, shape, num_workers)
    left_out = train_set.left_out
    if left_out and processes.leads():
        print(f"Left out of {folder}, {len(left_out):,} that Pillow cannot read: "
              f"{', '.join(str(path) for path in left_out[:3])}" + ", …" * (len(left_out) > 3), file=sys.stderr)
    return train_set, test_set


def open_prior(args, model_path):
    """The prior that the arguments name, else the one beside the model at model_path. → prior, classes, its path."""
    path = args.prior or str(Path(model_path).with_name("prior.pt"))
    with named("--prior", path):
        prior, contents = checkpoint.load_prior(path, model_path, args.device)
        return prior, contents.get("classes", list(data.DIGITS)), path


def check_target(path, kind, overwrite, otherwise=""):
    """Raise ValueError if a checkpoint of a kind could not be written to path. Touches nothing.

    One that stands there is replaced with --overwrite alone, and no file of another kind is.
    otherwise: what else may be done then, for the message.
    """
    if path.is_file():
        if not overwrite:
            raise ValueError(f"{path} is there already: replace it with --overwrite{otherwise}")
        with named("--overwrite", path):
            checkpoint.check_kind(path, kind)
    files.check_writable(path)
