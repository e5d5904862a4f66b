"""Checkpoints: plain dictionaries of tensors, numbers, strings, lists and dictionaries.

A checkpoint of a VQ-VAE rebuilds its own model:

    format    1
    kind      "vqvae"
    config    the arguments of VectorQuantizedVAE
    dataset   {"name": "MNIST", "shape": [C, H, W]}; "classes", names, where they are not the ten digits;
              "folder", where the images of an image folder are
    model     the state_dict
    epoch, step, test   where the training stood, and the test metrics there
    training  in last.pt alone: settings, progress, optimizer and random states, bfloat16 (whether --amp was found to
              be faster), environments (versions, processor, threads) (resume.py)

One of a prior rebuilds its own as well, and knows the VQ-VAE that its codes belong to:

    format    1
    kind      "prior"
    config    the arguments of CodePrior
    vqvae     the SHA-256 of the VQ-VAE's file
    dataset   the data set's name; classes, its classes' names, where they are not the ten digits
    model, epoch, test         as above, and in prior-last.pt step and training

The classifier that judges sampled digits has format, kind ("classifier"), dataset, model and test.
"""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from classifier import DigitClassifier
from files import write_whole
from modules import VectorQuantizedVAE
from prior import TAIL_BINS, CodePrior

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "vqvae.pt"
CLASSIFIER = PRETRAINED.with_name("classifier.pt")
DEEPEST = 9                 # dictionaries and lists inside each other
LARGEST_SIDE = 512          # pixels; what a damaged file says must not fill the memory
PUBLISHED_CODEBOOK = "codeBook.embedding.weight"


def save(path, contents):
    """Write a checkpoint so that path holds the old file or the new one. Raises OSError if it cannot be written."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_whole(path, buffer.getbuffer())


def load(path, device="cpu"):
    """The contents of a checkpoint. A bare state_dict of the published network is one as well.

    Raises OSError if the file cannot be opened, ValueError if it is not a checkpoint of a VQ-VAE.
    """
    contents = _read(path, device)
    if isinstance(contents, dict) and contents and all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in contents.items()):
        contents = _from_state_dict(contents)
    _check_kind(contents, "vqvae", "a VQ-VAE")
    match contents.get("dataset"):
        case {"name": str(), "shape": [int(), int(), int()], **more}:
            names = more.get("classes", [])
            if isinstance(names, list) and all(isinstance(text, str) for text in (*names, more.get("folder", ""))):
                return contents
    raise ValueError("the checkpoint does not say which data set its model was trained on")


def _read(path, device):
    """What a file of torch.save holds, tensors and plain values only: a file that would run code is refused."""
    data = Path(path).read_bytes()                  # read here, so that an OSError is the system's
    file, size = io.BytesIO(data), len(data)
    if not size:
        raise ValueError("the file is empty")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                # torch looks at no checksum, and compresses nothing: what unpacks to more is a trap.
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(
                        part.file_size for part in parts) > size or archive.testzip():
                    raise ValueError("a part of the archive")
        if b"bytearray\n" in data:      # torch would make one, of any size
            raise ValueError("a bytearray")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of the pickle's protocol
            # A training's sums are float64, which MPS does not know; the model goes there when it is rebuilt.
            place = "cpu" if torch.device(device).type == "mps" else device
            contents = torch.load(file, map_location=place, weights_only=True)
        _check_values(contents, size)
        return contents
    except Exception as error:                      # torch.load answers damage with whatever it trips over
        raise ValueError("not a checkpoint: the file is damaged or of another kind, "
                         "or it holds objects that could run code, which are never read") from error


def _check_values(contents, size):
    """Raise ValueError unless a file of so many bytes can have held it all: plain tensors, lists and dictionaries.

    What is there once and shown many times, or nested without end, is how a small file becomes a large one.
    """
    waiting, seen = [(contents, 0)], set()
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, dict | list | tuple) and value:
            if id(value) in seen or depth > DEEPEST:
                raise ValueError("a value inside itself")
            seen.add(id(value))
            waiting += ((inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))
        elif torch.is_tensor(value):
            size -= value.numel() * value.element_size()
            if size < 0 or value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
                raise ValueError("a tensor that is not there")
            last = value.storage_offset() + value.numel()
            if last * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor with less memory than numbers")


def _check_kind(contents, kind, name):
    if not isinstance(contents, dict) or contents.get("kind") != kind:
        raise ValueError(f"the file is not a checkpoint of {name}")
    if type(contents.get("format")) is not int or contents["format"] != FORMAT:
        found = contents.get("format")
        raise ValueError(f"the checkpoint has format {found if type(found) is int else 'unknown'}; "
                         f"this version of the code reads format {FORMAT}")


def check_kind(path, kind):
    """Raise ValueError if the file at path is no checkpoint of a kind: "prior" or "classifier"."""
    _check_kind(_read(path, "cpu"), kind, f"a {kind}")


def load_model(path, device="cpu", hidden_size=None, num_codes=None):
    """The model in a checkpoint, in evaluation mode, and the checkpoint's contents.

    hidden_size and num_codes, where given, must be those of the file. Raises what load() raises,
    and ValueError if the sizes contradict each other.
    """
    contents = load(path, device)
    model = _rebuilt(VectorQuantizedVAE, contents, device)
    for flag, given, own in (("--hidden-size", hidden_size, model.quantizer.dim),
                             ("--k", num_codes, model.quantizer.num_codes)):
        if given is not None and given != own:
            raise ValueError(f"{flag} {given} contradicts the file, which holds a model with {flag} {own}: "
                             f"leave {flag} out")
    C, H, W = contents["dataset"]["shape"]
    if model.channels != C or not (0 < H <= LARGEST_SIDE and 0 < W <= LARGEST_SIDE) or H % 4 or W % 4:
        raise ValueError(f"the checkpoint's images of {C}×{H}×{W} do not fit its model: "
                         f"C is {model.channels}, H and W are multiples of 4 up to {LARGEST_SIDE}")
    return model, contents


def load_prior(path, vqvae_path, device="cpu"):
    """The prior in a checkpoint, in evaluation mode, and the checkpoint's contents.

    Raises OSError if a file cannot be opened, ValueError if the file at path is not a checkpoint of
    a prior, or its codes are those of another VQ-VAE than the one in vqvae_path.
    """
    contents = _read(path, device)
    _check_kind(contents, "prior", "a prior")
    if contents.get("vqvae") != sha256(vqvae_path):
        raise ValueError(f"this prior belongs to another VQ-VAE than {vqvae_path}: learn one for it with "
                         f"python3 train_prior.py --model {vqvae_path}")
    if isinstance(contents.get("model"), dict):     # the first priors were not calibrated
        contents["model"].setdefault("tail", torch.zeros(1 + TAIL_BINS))
    prior, vqvae = _rebuilt(CodePrior, contents, device), load(vqvae_path)
    names = contents.get("classes", [str(i) for i in range(prior.num_classes)])
    if not isinstance(names, list) or len(names) != prior.num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"it does not name its {prior.num_classes} classes: the file is damaged")
    K, (_, H, W) = len(vqvae["model"]["quantizer.codebook"]), vqvae["dataset"]["shape"]
    if (prior.num_codes, prior.height, prior.width) != (K, H // 4, W // 4):
        raise ValueError(f"its maps of {prior.height}×{prior.width} of {prior.num_codes} codes are not those of "
                         f"{vqvae_path}, of {H // 4}×{W // 4} of {K}")
    return prior, contents


def load_classifier(path, device="cpu"):
    """The classifier in a checkpoint, in evaluation mode, and the checkpoint's contents.

    Raises OSError if the file cannot be opened, ValueError if it is not a checkpoint of a classifier.
    """
    contents = _read(path, device)
    _check_kind(contents, "classifier", "a classifier")
    return _rebuilt(DigitClassifier, {**contents, "config": {}}, device), contents


class _Uninitialised(TorchFunctionMode):
    """Inside, torch.nn.init does nothing: for a tensor without memory it would import torch's compiler, for seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def _rebuilt(kind, contents, device):
    """A model made from what its checkpoint says, in evaluation mode."""
    try:
        config, state = contents["config"], dict(contents["model"])
        if not all(isinstance(value, int | float | str) for value in config.values()):
            raise ValueError("a setting that is no number and no name")
        if config.get("layers", 0) > len(state):
            raise ValueError(f"{config['layers']} layers in {len(state)} tensors")
        # First without memory: sizes that a damaged file only says it has must not ask for any.
        with torch.device("meta"), _Uninitialised():
            expected = kind(**config).state_dict()
        for name, value in expected.items():
            if name in state and state[name].shape != value.shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}")
        if missing := expected.keys() ^ state.keys():
            raise ValueError(f"{min(missing)} is missing, or is no part of it")
        model = kind(**config).to(device)
        model.load_state_dict(state)
    except Exception as error:                      # a damaged file makes torch raise whatever it trips over
        raise ValueError(f"the checkpoint's weights do not fit its configuration: {type(error).__name__}: {error}"
                         ) from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError("the checkpoint's weights are not all finite numbers")
    return model.eval()


def sha256(path):
    """The SHA-256 of a file, in hexadecimal digits."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


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
