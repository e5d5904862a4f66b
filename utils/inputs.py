"""Opens what the flags name: the device, the model, its data, the prior."""

import os
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch

import checkpoint
import data
from utils import distributed, files
from utils.cli import errors_name_flag, printable
from utils.memory import is_out_of_memory

MPS_VERSION = 2, 6              # of torch, from which on it has autocast on an Apple GPU, and the gradients are right


def find_device(name):
    """The name of a device of this machine, made torch's current one if it is a GPU; "auto" means the best one.

    Its convolutions are then in float32, as on a CPU: by default cuDNN rounds their operands to TF32, of ten bits, by
    which codes differ. Raises ValueError if the device is not there.
    """
    has_mps = torch.backends.mps.is_available() and tuple(map(int, torch.__version__.split(".")[:2])) >= MPS_VERSION
    if name == "auto":
        # A run records this choice, so that on another machine it is not resumed on another device unasked.
        name = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if name == "mps" and not has_mps:
        raise ValueError("--device mps: there is no Apple GPU, or torch cannot use it: use --device cpu; a Mac with "
                         f"Apple silicon and a build of torch {'.'.join(map(str, MPS_VERSION))} or newer are needed")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {name}: there is no CUDA GPU: use --device cpu, or on Colab choose "
                         "Runtime > Change runtime type > GPU; a CUDA build of torch and the NVIDIA driver are needed")
    if name.startswith("cuda:") and int(name[5:]) >= torch.cuda.device_count():
        raise ValueError(f"--device {name}: this machine has cuda:0 to cuda:{torch.cuda.device_count() - 1}")
    if name.startswith("cuda"):
        torch.backends.cudnn.allow_tf32 = False
    if name.startswith("cuda:"):        # not of "cuda", for which use_own_gpu() may choose another
        torch.cuda.set_device(int(name[5:]))
    return name


def open_model(args):
    """The model that the arguments name, else the shipped one. → model, its checkpoint's contents, its path."""
    path = args.model or files.typed_path(checkpoint.PRETRAINED)
    with errors_name_flag("--model", path):
        model, contents = checkpoint.load_model(path, args.device, args.hidden_size, args.k)
    if not args.model and distributed.is_main_process():
        print(f"No --model given: using the shipped one, {path}", file=sys.stderr)
    return model, contents, path


def open_data(args, contents):
    """The data set that the arguments name, else the model's own. → its name, training set and test set."""
    own = contents["dataset"]
    name = args.dataset or own["name"]
    folder = args.data_folder or (own.get("folder", "MNIST") if name == own["name"] else "MNIST")
    train_set, test_set = load_data(name, folder, own["shape"])
    is_changed = name == own["name"] == data.FOLDER and own.get("files", train_set.fingerprint) != train_set.fingerprint
    if is_changed and distributed.is_main_process():
        print(f"The images in {folder} are not those that the model was trained on: some of the "
              "test images may be among those", file=sys.stderr)
    return name, train_set, test_set


def load_data(name, folder, shape):
    """data.load(), whose errors name the flags; prints which files of an image folder it leaves out."""
    downloads = nullcontext() if name == data.FOLDER else distributed.main_process_first()
    with errors_name_flag(f"--dataset {name} --data-folder", folder), downloads:
        train_set, test_set = data.load(name, folder, shape)
    left_out = train_set.left_out if name == data.FOLDER else ()
    if left_out and distributed.is_main_process():
        names = ", ".join(printable(str(path)) for path in left_out[:3]) + ", …" * (len(left_out) > 3)
        print(f"Left out of {folder}, {len(left_out):,} that Pillow cannot read: {names}", file=sys.stderr)
    return train_set, test_set


def open_prior(args, model, contents):
    """The prior that the arguments name, else the one beside the model of open_model(). → prior, contents, path

    Raises ValueError if there is none.
    """
    path = args.prior or str(Path(contents["path"]).with_name("prior.pt"))
    with errors_name_flag("--prior", path):
        if not args.prior and not os.path.exists(path):
            raise ValueError("the model has no prior yet: train one with "
                             + files.command("train_prior.py", "--model", contents["path"]))
        prior, contents = checkpoint.load_prior(path, (model, contents), args.device)
        if args.guidance != 1 and not prior.drop_label:
            raise ValueError(f"--guidance {args.guidance:g}: it was trained with --drop-label 0 and knows no images "
                             "without a class: leave --guidance out")
        return prior, contents, path


def open_prior_if_any(path, model, contents, device):
    """→ the prior at a path, and its classes; without a path that beside the model of open_model(), or None and ().

    A prior beside the model that is of another model is left out, and a line says so.
    """
    beside = Path(contents["path"]).with_name("prior.pt")
    if not path and not beside.exists():
        return None, ()
    try:
        with errors_name_flag("--prior", path or beside):
            prior, prior_contents = checkpoint.load_prior(path or beside, (model, contents), device)
    except ValueError as error:
        if path or not isinstance(error.__cause__, checkpoint.OtherModelError):
            raise
        print(f"left out: {beside} belongs to another model", file=sys.stderr)
        return None, ()
    return prior, prior_contents["classes"]


@contextmanager
def explain_out_of_memory(flags, advice="for a model of this size, choose smaller ones"):
    """Turn an error for lack of memory into a ValueError that names the flags."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ValueError(f"{flags}: no memory {advice}") from error
