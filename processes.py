"""A training by several processes at once, which torchrun starts: the group that they form, and what they share.

Started in any other way a script is the only process of its training, and then nothing here does anything. Image i
of a batch is image i // N of process i % N, so that the batches of N processes, put together, are those of one.
"""

import gc
import hashlib
import os
import shlex
import time
import warnings
from contextlib import contextmanager, nullcontext, redirect_stdout
from datetime import timedelta
from functools import cache

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler, Sampler, Subset

from fast import first_line

MEETING_PORT = 29400                    # torchrun's own choice
TIMEOUT = timedelta(minutes=10)         # without an answer from another process


def count():
    """N, how many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """Which of them this one is, from 0 on."""
    return dist.get_rank() if count() > 1 else 0


def leads():
    """Whether this process is the one that writes and prints."""
    return rank() == 0


def told():
    """What a training says of them when it begins."""
    return f", in {count()} processes" if count() > 1 else ""


def no_bar():
    """A progress bar's `disable`: it is shown in a terminal, by the first process."""
    return None if leads() else True


# ---------------------------------------------------------------- together

@contextmanager
def joined():
    """Form the group with the other processes that torchrun has started. All but the first print nothing inside."""
    if _started() == 1:
        yield
        return
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed: start the script with python3")
    store, number, total = _rendezvous()
    # Numbers that decide what comes next travel by gloo: a GPU need not be waited for.
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=number,
                                world_size=total, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"the processes cannot reach each other: {first_line(error)}") from error
    with open(os.devnull, "w") as nowhere, nullcontext() if leads() else redirect_stdout(nowhere):
        yield
    # A training is a cycle of references. With its DistributedDataParallel, which holds the group, it has to be gone
    # before the interpreter is: the group's threads, should they outlive it, may abort the process.
    gc.collect()
    dist.destroy_process_group()


def _started():
    """How many processes torchrun has started. Others set WORLD_SIZE as well, and start scripts that stay alone."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@cache
def _rendezvous():
    """→ a store that all processes see, this one's rank, and their number."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))


def use_device(device):
    """Let "cuda" mean a GPU of this process's own. Raises ValueError if that is not possible."""
    if count() == 1 or device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"--device {device}: several processes take --device cpu, or --device cuda and a GPU each")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: each process takes a GPU of its own, and this machine has "
                         f"{torch.cuda.device_count()}: start no more with --nproc-per-node")
    torch.cuda.set_device(local)


@contextmanager
def first_goes_ahead():
    """What is inside the first process does before the others, which find what it has downloaded."""
    if count() == 1:
        yield
        return
    store = _rendezvous()[0]
    while not leads() and not store.check(["went ahead"]):          # a download may take longer than TIMEOUT
        if store.add("told", 0):        # why the first one ends
            raise SystemExit(2)
        time.sleep(0.1)
    yield
    if leads():
        store.set("went ahead", "")


def check_alike(*values):
    """Raise ValueError if the processes do not all bring the same values."""
    number = int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7], "big")
    if highest(number) != -highest(-number):
        raise ValueError("the processes have different arguments or data: start all of them alike, "
                         "on folders that they share")


def by_the_first(context):
    """A context manager for the first process; to the others it is None, and does nothing."""
    return context if leads() else nullcontext()


def command(script, *arguments):
    """The command that starts a script in as many processes as this one runs in; for several machines, on each."""
    launcher = ["python3"]
    if count() > 1:
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(count()))]
        if (machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
            launcher += ["--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-endpoint",
                         f"{os.environ['MASTER_ADDR']}:{MEETING_PORT}"]
    return shlex.join([*launcher, script, *arguments])


# ---------------------------------------------------------------- when a run ends early

def speaks():
    """Whether this process tells why the run ends: the first that asks does, since all may find the same."""
    if _started() == 1:
        return True
    try:
        return _rendezvous()[0].add("told", 1) == 1
    except (AttributeError, ValueError, RuntimeError):          # no store, or it has gone with its process
        return True


def lost(error):
    """Whether an error of torch means that another process has gone, or has not answered for TIMEOUT."""
    return _started() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def why_lost(error):
    """The same in words, with torch's own first ones."""
    return f"another process of this run has died, or does not answer ({first_line(error)})"


# ---------------------------------------------------------------- shares of a batch, an epoch and a set

def split(batch_size, fixed=False):
    """How many images of a batch each process takes. Raises ValueError if they cannot all take as many."""
    if batch_size % count() and fixed:
        raise ValueError(f"cannot be shared evenly by {count()} processes: start another number of them")
    if batch_size % count():
        fewer = batch_size // count() * count()
        either = " or ".join(str(size) for size in (fewer, fewer + count()) if size)
        raise ValueError(f"cannot be shared evenly by {count()} processes: choose {either}, or another number of them")
    return batch_size // count()


def places(total):
    """This process's places in an order of so many: all processes get as many, if need be some of the first again."""
    return DistributedSampler(range(total), count(), rank(), shuffle=False)


class Share(Sampler):
    """This process's places in another sampler's order."""

    def __init__(self, order):
        self.order, self.places = order, places(len(order))

    def __iter__(self):
        order = list(self.order)
        return (order[place] for place in self.places)

    def __len__(self):
        return len(self.places)


def part(dataset):
    """This process's part of a data set. Together they are the whole one, each item once.

    Raises ValueError if there is not an item for each.
    """
    if len(dataset) < count():
        raise ValueError(f"a data set of {len(dataset)} cannot be shared by {count()} processes: start fewer")
    return dataset if count() == 1 else Subset(dataset, range(rank(), len(dataset), count()))


def rows():
    """This process's part of a tensor that lies in all of them, as a slice."""
    return slice(rank(), None, count())


# ---------------------------------------------------------------- sums over all processes

def all_sum(tensor):
    """A tensor's sum over all processes, which takes its place."""
    if count() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_mean(tensor):
    return all_sum(tensor).div_(count()) if count() > 1 else tensor


def highest(number):
    """The highest of the processes' whole numbers."""
    if count() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.item()


def whole(own, total):
    """A tensor (total, ...) from the parts of it, its rows(), that the processes have made."""
    if count() == 1:
        return own
    everything = own.new_zeros(total, *own.shape[1:])
    everything[rows()] = own
    return all_sum(everything)


# ---------------------------------------------------------------- a training step

class Step(nn.Module):
    """A function of a training step as a module, which is what DistributedDataParallel takes."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *tensors):
        return self.function(*tensors)


def replicated(model, function):
    """function, which runs the model on this process's part of a batch; a backward pass after it leaves the gradients
    of the whole batch in the model.
    """
    if count() == 1:
        return function
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)          # the same names, parameters and buffers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)          # newer versions of torch have another name for the flag
        return DistributedDataParallel(Step(model, function), broadcast_buffers=False)


def average_statistics(model):
    """Let BatchNorm's running statistics be their means over all processes. SyncBatchNorm sees to its own.

    To be called after the backward pass, which looks at them.
    """
    running = [buffer for module in model.modules() if isinstance(module, nn.BatchNorm2d)
               for buffer in (module.running_mean, module.running_var)]
    if count() == 1 or not running:
        return
    means = all_mean(torch.cat(running))                        # all of them at once
    for buffer, mean in zip(running, means.split([len(buffer) for buffer in running])):
        buffer.copy_(mean)


@contextmanager
def own_draws(seed):
    """Let each process draw its own random numbers inside, from seed + rank; all generators stand as before then."""
    if count() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed((seed + rank()) % 2**63)
        yield
