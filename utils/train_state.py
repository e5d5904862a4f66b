"""The state of a training and of all random generators: what a checkpoint needs for an exact resume."""

import math
import os
import random
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from utils import distributed

LOG_EVERY = 10          # steps between two logs, at which the losses are copied from the device
# Names in the checkpoints of earlier versions.
FORMER_NAMES = {"pending_losses": "waiting", "code_counts": "counts"}
FORMER_COLUMNS = {"bits_per_pixel": "bits_per_dimension"}       # of their tracks


@dataclass(kw_only=True)
class TrainState:
    """Counters, sums and records of a training with L losses a step."""

    order: torch.Tensor             # state of the data order's generator when the current epoch began
    sums: torch.Tensor              # (L,), sums over the epoch's images, float64, on the CPU: see sum_losses()
    pending_losses: torch.Tensor    # (LOG_EVERY, L), of the steps not logged yet, on the device
    epoch: int = 1                  # the current one
    batches: int = 0                # steps done in it
    images: int = 0                 # images seen in it
    step: int = 0                   # steps since the training began
    best: float = math.inf          # the lowest validation loss
    best_epoch: int = 0
    seconds: float = 0.0            # spent in the epoch
    track: list = field(default_factory=list)           # lines of the text track
    code_counts: torch.Tensor | None = None             # (K,), how often the epoch's steps chose each code (VQ-VAE)
    restarts: torch.Tensor | None = None                # the quantizer's count of codes reset in the epoch (VQ-VAE)

    def __post_init__(self):
        self._images_to_sum = []    # of each step whose losses are not in the sums yet

    def add_step(self, losses, images):
        """Count one more step, with its losses (L,) and its number of images."""
        self.pending_losses[self.batches % LOG_EVERY] = losses
        self._images_to_sum.append(images)
        self.batches, self.step, self.images = self.batches + 1, self.step + 1, self.images + images

    def losses_since_log(self):
        """(n, L): the losses of the steps since the last log."""
        return self.pending_losses[:(self.batches - 1) % LOG_EVERY + 1 if self.batches else 0]

    def sum_losses(self, losses):
        """Add losses (n, L), those since the last log, on the CPU, to the sums, unless they are in them.

        It is done when they are read anyway, at a log or a save, since a device would be waited for at every step.
        """
        for step_losses, images in zip(losses[len(losses) - len(self._images_to_sum):], self._images_to_sum):
            self.sums += step_losses.double() * images
        self._images_to_sum.clear()

    def mean_losses(self):
        """The L means over the epoch's images."""
        return (self.sums / self.images).tolist()

    def next_epoch(self, generator):
        self.order = generator.get_state()
        self.epoch, self.batches, self.images, self.seconds = self.epoch + 1, 0, 0, 0.0
        for total in (self.sums, self.code_counts, self.restarts):
            if total is not None:
                total.zero_()

    def as_dict(self):
        """Plain values and tensors, as a checkpoint holds them."""
        return {name: value for name, value in vars(self).items() if value is not None and not name.startswith("_")}

    def load(self, saved, steps_per_epoch):
        """Restore the values of as_dict(). Raises ValueError or KeyError if they do not fit."""
        own_columns = self.track[0].split()
        for name, own in self.as_dict().items():
            value = saved[FORMER_NAMES.get(name, name) if name not in saved else name]
            setattr(self, name, _checked(own, value, name))
        if (len(self.track) != self.epoch       # before the next line, which would count to any number
                or [line.split()[0] for line in self.track[1:]] != [str(epoch) for epoch in range(1, self.epoch)]
                or self.best_epoch >= self.epoch or self.batches > steps_per_epoch
                or self.step != (self.epoch - 1) * steps_per_epoch + self.batches):
            raise ValueError(f"step {self.step} is not step {self.batches} of epoch {self.epoch}, "
                             f"of {steps_per_epoch} steps each")
        header, *lines = ([FORMER_COLUMNS.get(name, name) for name in line.split()] for line in self.track)
        if (header != [name for name in own_columns if name in header or not name.startswith("val_")]
                or any(len(line) != len(header) for line in lines)):
            raise ValueError(f"the track's columns are not {' '.join(own_columns)}")


def _checked(own, saved, name):
    """A saved value, if its type and shape are those of the state's own. Tensors are copied into the state's own."""
    fits = type(saved) is type(own)
    if fits and torch.is_tensor(own):
        fits = saved.shape == own.shape and saved.dtype == own.dtype
    elif fits and isinstance(own, list):
        fits = all(isinstance(line, str) for line in saved)
    elif fits:
        fits = saved >= 0
    if not fits:
        raise ValueError(f"{name} has another type, shape or sign")
    return own.copy_(saved) if torch.is_tensor(own) else saved


# ---------------------------------------------------------------- checks of a checkpoint

def check_metadata(expected, saved):
    """Raise ValueError if a checkpoint's contents are of another model or data set than its settings say.

    To be called before the model is built: a damaged file must not make it arbitrarily large.
    """
    for name, value in expected.items():
        found = saved.get(name)
        if name == "dataset" and isinstance(value, dict) and isinstance(found, dict) and "folder" in value:
            # It may have been moved. Older files have no "files".
            if {"files": value["files"], **found, "folder": None} != {**value, "folder": None}:
                raise ValueError(f"the images in {value['folder']} are not those that the run began with")
        # A setting that an older file does not have was its default then, as it is now.
        elif found != value and not (name == "config" and isinstance(found, dict) and {**value, **found} == value):
            raise ValueError(f"its {name} is not the one that its settings say: the file is damaged")


def check_optimizer(optimizer):
    """Raise ValueError if an Adam's averages do not fit its parameters. They get the parameters' memory format."""
    for parameter, state in optimizer.state.items():
        if len(state) != 3 or state["step"].shape != ():
            raise ValueError("the optimizer's state")
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape or not state[name].isfinite().all():
                raise ValueError("the optimizer's averages")
            state[name] = torch.empty_like(parameter).copy_(state[name])


def schedule_fits(initial, saved, step, max_lr):
    """Whether `saved` can be the state after `step` steps of the schedule whose first state is `initial`.

    max_lr: the highest learning rate of the schedule.
    """
    return (isinstance(saved, dict) and _same_but_for_steps(initial, saved, step, max_lr * (1 + 1e-9))
            and saved["last_epoch"] == step)


def _same_but_for_steps(initial, saved, step, max_lr):
    if isinstance(initial, list):
        return (isinstance(saved, list) and len(initial) == len(saved)
                and all(_same_but_for_steps(one, other, step, max_lr) for one, other in zip(initial, saved)))
    if not isinstance(initial, dict):
        return type(initial) is type(saved) and initial == saved
    if not isinstance(saved, dict) or initial.keys() != saved.keys():
        return False
    for name, value in initial.items():
        if name in ("last_epoch", "_step_count"):
            fits = type(saved[name]) is int and -1 <= saved[name] <= step + 1
        elif name == "_last_lr":
            fits = isinstance(saved[name], list) and len(value) == len(saved[name]) and all(
                type(lr) is float and 0 <= lr <= max_lr for lr in saved[name])
        else:
            fits = _same_but_for_steps(value, saved[name], step, max_lr)
        if not fits:
            return False
    return True


# ---------------------------------------------------------------- random states

def seed_everything(seed):
    """Seed every generator that a training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)        # the range of its seeds
    torch.manual_seed(seed)


def set_deterministic(device):
    """Let the same seed give the same run on a GPU too. On a CPU it does as it is."""
    if device.startswith("cuda"):
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # Filling takes time, and nothing reads such memory.
        torch.utils.deterministic.fill_uninitialized_memory = False


@contextmanager
def strictly_deterministic():
    """Where deterministic algorithms are asked for, do not let torch take another one with a warning.

    The backward pass of its attention has a deterministic form, and takes it only then.
    """
    if not torch.are_deterministic_algorithms_enabled():
        yield
        return
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


def random_states():
    """The states of every generator that a training may draw from, as plain values and tensors."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {"python": [version, list(numbers), gauss],
              "numpy": [kind, keys.tolist(), position, has_gauss, cached], "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():         # a training on the CPU must not start CUDA
        states["cuda"] = [torch.cuda.get_rng_state()]
    if torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def restore_random_states(states):
    """Bring every generator back to the state that random_states() recorded. Raises an error if a state is invalid."""
    if not isinstance(states, dict):        # a tensor would print warnings
        raise TypeError("no states of random generators")
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    if not 0 <= position <= len(keys):
        raise ValueError(f"position {position} of {len(keys)}")
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_initialized() and states.get("cuda"):          # older files have the states of all GPUs
        own = torch.cuda.current_device() if distributed.world_size() == 1 else 0
        torch.cuda.set_rng_state(states["cuda"][own if own < len(states["cuda"]) else 0].cpu())
    if torch.backends.mps.is_available() and "mps" in states:       # older files have none
        torch.mps.set_rng_state(states["mps"].cpu())
