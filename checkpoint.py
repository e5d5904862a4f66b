"""Checkpoints: plain dictionaries of tensors, numbers, strings, lists and dictionaries.

A checkpoint of a VQ-VAE rebuilds its own model:

    format    1
    kind      "vqvae"
    config    the arguments of VectorQuantizedVAE
    dataset   {"name": "MNIST", "shape": [C, H, W]}; "classes", names, where they are not the ten digits;
              "folder", where the images of an image folder are
    model     the state_dict
    epoch, step, test   where the training stood, and the test metrics there
    training  in last.pt alone, what is needed to resume: settings, progress, optimizer, schedule and random states,
              bfloat16 (whether --amp was found to be faster), environments (versions, processor, threads)

One of a prior rebuilds its own as well, and names the VQ-VAE that its codes belong to:

    format    1
    kind      "prior"
    config    the arguments of CodePrior
    vqvae     the SHA-256 of the VQ-VAE's file
    dataset   the data set's name; classes, its classes' names, where they are not the ten digits
    model, epoch, step, test   as above, and in prior-last.pt training

A classifier that judges sampled digits has format, kind ("classifier"), config, dataset, model, epoch, step and test,
and in NAME-last.pt training. The config names its architecture; without one it is the CNN. The first ones have no epoch
and step.
"""

import hashlib
import io
import warnings
import zipfile
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode

from metrics.classifier import ARCHITECTURES
from modules import VectorQuantizedVAE
from prior import TAIL_KNOTS, CodePrior
from utils.files import command, read_file, write_atomically
from vector_quantizer import QUANTIZERS

FORMAT = 1
PRETRAINED = Path(__file__).resolve().parent / "pretrained" / "vqvae.pt"
PRETRAINED_PRIOR = PRETRAINED.with_name("prior.pt")
CLASSIFIER = PRETRAINED.with_name("classifier.pt")
CLASSIFIERS = CLASSIFIER, PRETRAINED.with_name("classifier-transformer.pt")
MAX_DEPTH = 9               # of nested dictionaries and lists
LARGEST_SIDE = 512          # pixels; a damaged file must not ask for any amount of memory
PUBLISHED_CODEBOOK = "codeBook.embedding.weight"
WRAPPERS = "state_dict", "model_state_dict"         # names under which other code saves a state_dict


def save(path, contents):
    """Write a checkpoint; path holds the old file or the new one at any time. Raises OSError if that fails."""
    buffer = io.BytesIO()
    torch.save(contents, buffer)
    write_atomically(path, buffer.getbuffer())


def load(path):
    """The contents, on the CPU, of a VQ-VAE's checkpoint, or of a bare state_dict of the published network.

    "path" and "sha256", which are not in the file, are those of the file. A state_dict may be wrapped in a dictionary
    of one of WRAPPERS. Raises OSError if the file cannot be opened, ValueError if it is not a checkpoint of a VQ-VAE.
    """
    contents, sha256 = _read(path)
    if isinstance(contents, dict) and "kind" not in contents:
        contents = next((contents[name] for name in WRAPPERS if name in contents), contents)
    if isinstance(contents, dict) and contents and all(
            isinstance(name, str) and torch.is_tensor(value) for name, value in contents.items()):
        contents = _from_state_dict(contents)
    _check_kind(contents, "vqvae", "a VQ-VAE")
    contents |= {"path": str(path), "sha256": sha256}
    match contents.get("dataset"):
        case {"name": str(), "shape": [int(), int(), int()], **more}:
            names = more.get("classes", [])
            if isinstance(names, list) and all(isinstance(text, str) for text in (*names, more.get("folder", ""))):
                return contents
    raise ValueError("the checkpoint does not say which data set its model was trained on")


def _read(path):
    """The contents, on the CPU, of a file of torch.save, and its SHA-256: both from the same bytes.

    Tensors and plain values only: objects that could run code are refused.
    """
    data = read_file(path)                          # outside the try, so that an OSError passes
    file, size = io.BytesIO(data), len(data)
    if not size:
        raise ValueError("the file is empty")
    try:
        if zipfile.is_zipfile(file):
            with zipfile.ZipFile(file) as archive:
                parts = archive.infolist()
                # torch checks no checksums, and compresses nothing: an archive that unpacks to more is malicious.
                if any(part.compress_type != zipfile.ZIP_STORED for part in parts) or sum(
                        part.file_size for part in parts) > size or archive.testzip():
                    raise ValueError("a part of the archive")
        if b"bytearray\n" in data:      # torch would allocate one of any size
            raise ValueError("a bytearray")
        file.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")         # of the pickle protocol
            contents = torch.load(file, map_location="cpu", weights_only=True)
        _check_values(contents, size)
        return contents, hashlib.sha256(data).hexdigest()
    except Exception as error:                      # a damaged file can make torch.load raise anything
        raise ValueError("not a checkpoint: the file is damaged or of another kind, "
                         "or it holds objects that could run code, which are never read") from error


def _check_values(contents, size):
    """Raise ValueError unless the contents are plain tensors and values that a file of `size` bytes can hold.

    Shared references and deep nesting could turn a small file into large contents.
    """
    pending, seen = [(contents, 0)], set()
    while pending:
        value, depth = pending.pop()
        if isinstance(value, dict | list | tuple) and value:
            if id(value) in seen or depth > MAX_DEPTH:
                raise ValueError("a shared or deeply nested value")
            seen.add(id(value))
            pending += ((inner, depth + 1) for inner in (value.values() if isinstance(value, dict) else value))
        elif torch.is_tensor(value):
            size -= value.numel() * value.element_size()
            if size < 0 or value.layout != torch.strided or value.is_meta or value.is_quantized or value.is_complex():
                raise ValueError("a tensor larger than the file")
            last = value.storage_offset() + value.numel()
            if last * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor larger than its storage")


def _check_kind(contents, kind, name):
    if not isinstance(contents, dict) or contents.get("kind") != kind:
        raise ValueError(f"the file is not a checkpoint of {name}")
    if type(contents.get("format")) is not int or contents["format"] != FORMAT:
        found = contents.get("format")
        raise ValueError(f"the checkpoint has format {found if type(found) is int else 'unknown'}; "
                         f"this version of the code reads format {FORMAT}")


def is_of_kind(kind, path):
    """Whether there is a checkpoint of a kind at path, of any format: "vqvae", "prior" or "classifier"."""
    try:
        contents = _read(path)[0]
    except (ValueError, FileNotFoundError):
        return False
    return isinstance(contents, dict) and contents.get("kind") == kind


def load_model(path, device="cpu", hidden_size=None, num_codes=None):
    """The model in a checkpoint, in evaluation mode, and the checkpoint's contents.

    hidden_size and num_codes, where given, must be those of the file. Raises what load() raises,
    and ValueError if the sizes contradict each other.
    """
    contents = load(path)
    name = contents["config"].get("quantizer", "vq") if isinstance(contents.get("config"), dict) else "vq"
    if isinstance(name, str) and name not in QUANTIZERS:
        raise ValueError(f"its quantizer {name[:50]!r} is not in vector_quantizer.QUANTIZERS, which has "
                         f"{', '.join(QUANTIZERS)}: add its class there")
    model = _rebuild(VectorQuantizedVAE, contents, device)
    for flag, given, own in (("--hidden-size", hidden_size, model.quantizer.dim),
                             ("--k", num_codes, model.quantizer.num_codes)):
        if given is not None and given != own:
            raise ValueError(f"{flag} {given} contradicts the file, which holds a model with {flag} {own}: "
                             f"leave {flag} out")
    C, H, W = contents["dataset"]["shape"]
    factor = model.downsample
    if model.channels != C or not (0 < H <= LARGEST_SIDE and 0 < W <= LARGEST_SIDE) or H % factor or W % factor:
        raise ValueError(f"the checkpoint's images of {C}×{H}×{W} do not fit its model: "
                         f"C is {model.channels}, H and W are multiples of {factor} up to {LARGEST_SIDE}")
    return model, contents


class OtherModelError(ValueError):
    """A prior is of another VQ-VAE than the one that it was to be used with."""


def load_prior(path, vqvae, device="cpu"):
    """The prior in a checkpoint, in evaluation mode, and the checkpoint's contents.

    vqvae: the path of its VQ-VAE, or what load_model() has returned for it. Raises OSError if a file cannot be opened,
    ValueError if the file at path is not a checkpoint of a prior, and OtherModelError, which is one, if its codes are
    those of another VQ-VAE.
    """
    contents, _ = _read(path)
    _check_kind(contents, "prior", "a prior")
    vqvae, vqvae_contents = vqvae if isinstance(vqvae, tuple) else load_model(vqvae)
    vqvae_path = vqvae_contents["path"]
    if contents.get("vqvae") != vqvae_contents["sha256"]:
        raise OtherModelError(f"this prior belongs to another VQ-VAE than {vqvae_path}: train one for it with "
                              + command("train_prior.py", "--model", vqvae_path))
    if isinstance(contents.get("model"), dict):     # the first version did not calibrate
        contents["model"].setdefault("tail", torch.zeros(1 + TAIL_KNOTS))
    prior = _rebuild(CodePrior, contents, device)
    if not isinstance(contents.get("dataset"), str):
        raise ValueError("it does not name the data set that it was trained on: the file is damaged")
    names = contents.setdefault("classes", [str(i) for i in range(prior.num_classes)])
    if not isinstance(names, list) or len(names) != prior.num_classes or not all(isinstance(n, str) for n in names):
        raise ValueError(f"it does not name its {prior.num_classes} classes: the file is damaged")
    K, (h, w) = vqvae.quantizer.num_codes, vqvae.map_size(*vqvae_contents["dataset"]["shape"][1:])
    if (prior.num_codes, prior.height, prior.width) != (K, h, w):
        raise ValueError(f"its maps of {prior.height}×{prior.width} of {prior.num_codes} codes are not those of "
                         f"{vqvae_path}, of {h}×{w} of {K}")
    return prior, contents


def load_classifier(path, device="cpu"):
    """The classifier in a checkpoint, in evaluation mode, and the checkpoint's contents.

    Raises OSError if the file cannot be opened, ValueError if it is not a checkpoint of a classifier.
    """
    contents, _ = _read(path)
    _check_kind(contents, "classifier", "a classifier")
    if not isinstance(contents.get("dataset"), str):
        raise ValueError("it does not name the data set that it was trained on: the file is damaged")
    match contents.setdefault("config", {"architecture": "cnn"}):           # the first ones have none
        case {"architecture": str(name)} if name in ARCHITECTURES:
            return _rebuild(ARCHITECTURES[name], {**contents, "config": {}}, device), contents
    raise ValueError(f"the checkpoint's architecture is none of {', '.join(ARCHITECTURES)}")


class _Uninitialised(TorchFunctionMode):
    """Makes torch.nn.init a no-op: on meta tensors it would import the compiler of torch, which takes seconds."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == "torch.nn.init":
            return kwargs["tensor"] if kwargs and "tensor" in kwargs else args[0]
        return function(*args, **(kwargs or {}))


def _rebuild(kind, contents, device):
    """A model rebuilt from the configuration and weights of its checkpoint, in evaluation mode."""
    try:
        config, state = contents["config"], dict(contents["model"])
        if not all(isinstance(value, int | float | str) for value in config.values()):
            raise ValueError("a setting that is neither a number nor a string")
        if config.get("layers", 0) > len(state):
            raise ValueError(f"{config['layers']} layers in {len(state)} tensors")
        # First without memory: a damaged configuration must not ask for any amount of it.
        with torch.device("meta"), _Uninitialised():
            expected = kind(**config).state_dict()
        for name, value in expected.items():
            if name in state and state[name].shape != value.shape:
                raise ValueError(f"{name} is {tuple(state[name].shape)}, not {tuple(value.shape)}")
        if missing := expected.keys() ^ state.keys():
            raise ValueError(f"{min(missing)} is missing or unexpected")
        model = kind(**config)
        model.load_state_dict(state)
    except Exception as error:                      # a damaged file can make torch raise anything
        raise ValueError(f"the checkpoint's weights do not fit its configuration: {type(error).__name__}: {error}"
                         ) from error
    if not all(value.isfinite().all() for value in model.state_dict().values()):
        raise ValueError("the checkpoint's weights are not all finite numbers")
    return model.eval().to(device)          # outside of the try, so that a GPU's error is not taken for the file's


def _from_state_dict(state):
    """A checkpoint from a bare state_dict, its configuration read from the shapes of its tensors.

    Prefixes of wrappers are removed. The published code keeps the codebook in an embedding layer.
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
