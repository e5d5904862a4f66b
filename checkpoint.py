"""Checkpoints: plain dictionaries of tensors, numbers, strings, lists and dictionaries.

A checkpoint of a VQ-VAE rebuilds its own model:

    format    1
    kind      "vqvae"
    config    the arguments of VectorQuantizedVAE
    dataset   {"name": "MNIST", "shape": [C, H, W]}
    model     the state_dict
    epoch, step, test   where the training stood, and the test metrics there
    training  in last.pt alone: optimizer, schedule and random states
"""

import io
import os
import warnings
from pathlib import Path

import torch

from modules import VectorQuantizedVAE

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "vqvae.pt"
LARGEST_SIDE = 4096         # pixels; what a damaged file says must not fill the memory
PUBLISHED_CODEBOOK = "codeBook.embedding.weight"


def save(path, contents):
    """Write a checkpoint so that path holds the old file or the new one, never half of one.

    Raises OSError if it cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def write_whole(path, data):
    """Write bytes to a temporary file beside path, flush them to the disk, then rename it."""
    temporary = Path(path).with_name(f".{Path(path).name}.{os.getpid()}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load(path, device="cpu"):
    """The contents of a checkpoint. A bare state_dict of the published network is one as well.

    Only tensors and plain values are read: a file that would run code is refused. Raises OSError
    if the file cannot be opened, ValueError if it is not a checkpoint of a VQ-VAE.
    """
    file = io.BytesIO(Path(path).read_bytes())      # read here, so that an OSError is the system's
    if not file.getbuffer():
        raise ValueError("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of the pickle's protocol
            contents = torch.load(file, map_location=device, weights_only=True)
    except Exception as error:                      # torch.load answers damage with whatever it trips over
        raise ValueError("not a checkpoint: the file is damaged or of another kind, "
                         "or it holds objects that could run code, which are never read") from error

    if isinstance(contents, dict) and contents and all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in contents.items()):
        contents = _from_state_dict(contents)
    if not isinstance(contents, dict) or contents.get("kind") != "vqvae":
        raise ValueError("the file is not a checkpoint of a VQ-VAE")
    if type(contents.get("format")) is not int or contents["format"] != FORMAT:
        raise ValueError(f"the checkpoint has format {contents.get('format')}; "
                         f"this version of the code reads format {FORMAT}")
    match contents.get("dataset"):
        case {"name": str(), "shape": [int(), int(), int()]}:
            return contents
    raise ValueError("the checkpoint does not say which data set its model was trained on")


def load_model(path, device="cpu", hidden_size=None, num_codes=None):
    """The model in a checkpoint, in evaluation mode, and the checkpoint's contents.

    hidden_size and num_codes, where given, must be those of the file. Raises what load() raises,
    and ValueError if the sizes contradict each other.
    """
    contents = load(path, device)
    try:
        model = VectorQuantizedVAE(**contents["config"]).to(device)
        model.load_state_dict(contents["model"])
    except (RuntimeError, TypeError, ValueError, KeyError, AttributeError) as error:
        raise ValueError("the checkpoint's weights do not fit its configuration: "
                         f"{' '.join(str(error).split())}") from error
    for flag, given, own in (("--hidden-size", hidden_size, model.quantizer.dim),
                             ("--k", num_codes, model.quantizer.num_codes)):
        if given is not None and given != own:
            raise ValueError(f"{flag} {given} contradicts the file, which holds a model with {flag} {own}: "
                             f"leave {flag} out")
    C, H, W = contents["dataset"]["shape"]
    if model.channels != C or not (0 < H <= LARGEST_SIDE and 0 < W <= LARGEST_SIDE) or H % 4 or W % 4:
        raise ValueError(f"the checkpoint's images of {C}×{H}×{W} do not fit its model: "
                         f"C is {model.channels}, H and W are multiples of 4 up to {LARGEST_SIDE}")
    return model.eval(), contents


def _from_state_dict(state):
    """A checkpoint made of a bare state_dict, the sizes read from its tensors.

    Wrappers' prefixes are taken off. The published code kept the codebook in an embedding layer.
    """
    state = {name.removeprefix("module.").removeprefix("_orig_mod."): value for name, value in state.items()}
    if PUBLISHED_CODEBOOK in state:
        codebook = torch.atleast_1d(state.pop(PUBLISHED_CODEBOOK))
        state["quantizer.codebook"] = codebook
        state["quantizer.initialised"] = torch.tensor(True)
        state["quantizer.steps_unused"] = torch.zeros(len(codebook), dtype=torch.int64)
    if [state[name].dim() for name in ("quantizer.codebook", "encoder.0.weight") if name in state] != [2, 4]:
        raise ValueError("the file holds tensors, but not those of a VQ-VAE")
    hidden_size, channels = state["encoder.0.weight"].shape[:2]
    config = {"channels": channels, "hidden_size": hidden_size, "num_codes": len(state["quantizer.codebook"])}
    if "quantizer.cluster_sizes" in state:
        config["codebook_update"] = "ema"
    return {"format": FORMAT, "kind": "vqvae", "config": config, "model": state,
            "dataset": {"name": "MNIST", "shape": [channels, 28, 28]}}
