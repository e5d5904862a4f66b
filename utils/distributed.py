"""Training in several processes that torchrun has started: the process group, and what the processes share.

In a script that is started in any other way, the only process of its training, all functions here are no-ops. Image i
of a batch goes to process i % world_size, so that the batches of all processes together are those of a single one.
"""

import gc
import hashlib
import os
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

from utils import files
from utils.speed import first_line

RENDEZVOUS_PORT = 29400                 # torchrun's own default
TIMEOUT = timedelta(minutes=10)         # without an answer from another process


def world_size():
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank():
    """This process's number, from 0 on."""
    return dist.get_rank() if world_size() > 1 else 0


def is_main_process():
    """Whether this is the process that prints and writes files."""
    return rank() == 0


def main_process_only(context):
    """A context manager for the main process alone; in the others it is None and does nothing."""
    return context if is_main_process() else nullcontext()


def describe_processes():
    """What the first line of a training says about its processes."""
    return f", in {world_size()} processes" if world_size() > 1 else ""


def hide_progress_bar():
    """tqdm's `disable`: the main process shows a bar if it has a terminal."""
    return None if is_main_process() else True


# ---------------------------------------------------------------- the process group

@contextmanager
def process_group():
    """Form the group of the processes that torchrun has started. Only the main process prints inside."""
    if _launched_processes() == 1:
        yield
        return
    if not dist.is_available():
        raise ValueError("this build of torch has no torch.distributed: start the script with python3")
    store, own_rank, total = _rendezvous()
    # Control messages (signals, shapes) travel by gloo, so that they never wait for a GPU.
    on_gpus = torch.cuda.is_available() and dist.is_nccl_available()
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpus else "gloo", store=store, rank=own_rank,
                                world_size=total, timeout=TIMEOUT)
    except RuntimeError as error:
        raise ValueError(f"the processes cannot reach each other: {first_line(error)}") from error
    with open(os.devnull, "w") as devnull, nullcontext() if is_main_process() else redirect_stdout(devnull):
        yield
    # A training is a cycle of references, and its DistributedDataParallel holds the group. Both have to be freed before
    # the interpreter shuts down: a group's threads that outlive it may abort the process.
    gc.collect()
    dist.destroy_process_group()


def _launched_processes():
    """How many processes torchrun has started. Other launchers set WORLD_SIZE too, for a single process."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


@cache
def _rendezvous():
    """→ a key-value store that all processes see, the rank of this one, and their number."""
    return next(dist.rendezvous("env://", timeout=TIMEOUT))


def use_own_gpu(device):
    """Make "cuda" this process's own GPU. Raises ValueError if there are not enough GPUs, or for another device."""
    if world_size() == 1 or device == "cpu":
        return
    if device != "cuda":
        raise ValueError(f"--device {device}: several processes take --device cpu, or --device cuda and a GPU each")
    local = int(os.environ["LOCAL_RANK"])
    if local >= torch.cuda.device_count():
        raise ValueError(f"--device cuda: each process takes a GPU of its own, and this machine has "
                         f"{torch.cuda.device_count()}: start no more with --nproc-per-node")
    torch.cuda.set_device(local)


@contextmanager
def main_process_first():
    """The main process runs the body first, the others after it: they find what it has downloaded."""
    if world_size() == 1:
        yield
        return
    store = _rendezvous()[0]
    while not is_main_process() and not store.check(["main process done"]):     # may take longer than TIMEOUT
        if store.add("error reported", 0):
            raise SystemExit(2)
        time.sleep(0.1)
    yield
    if is_main_process():
        store.set("main process done", "")


def check_same_everywhere(*values):
    """Raise ValueError unless all processes have the same values."""
    number = int.from_bytes(hashlib.sha256(repr(values).encode()).digest()[:7], "big")
    if all_reduce_max(number) != -all_reduce_max(-number):
        raise ValueError("the processes have different arguments or data: start all of them alike, "
                         "on folders that they share")


def launch_command(script, *arguments):
    """The command that starts a script in as many processes as this one runs in; for several machines, on each."""
    launcher = ("python3",)
    if world_size() > 1:
        launcher = ["torchrun", "--nproc-per-node", os.environ.get("LOCAL_WORLD_SIZE", str(world_size()))]
        if (machines := os.environ.get("GROUP_WORLD_SIZE", "1")) != "1":
            launcher += ["--nnodes", machines, "--rdzv-backend", "c10d", "--rdzv-endpoint",
                         f"{os.environ['MASTER_ADDR']}:{RENDEZVOUS_PORT}"]
    return files.command(script, *arguments, launcher=launcher)


# ---------------------------------------------------------------- errors

def should_report_error():
    """Whether this process prints why the run ends: the first one that asks, since all may find the same fault."""
    if _launched_processes() == 1:
        return True
    try:
        return _rendezvous()[0].add("error reported", 1) == 1
    except (AttributeError, ValueError, RuntimeError):          # no store, or it has ended with its process
        return True


def is_peer_failure(error):
    """Whether an error of torch means that another process has died, or has not answered for TIMEOUT."""
    return _launched_processes() > 1 and (isinstance(error, dist.DistError) or "gloo" in str(error).lower())


def describe_peer_failure(error):
    return f"another process of this run has died, or does not answer ({first_line(error)})"


# ---------------------------------------------------------------- shards of a batch, an epoch and a data set

def per_process_batch_size(batch_size, fixed=False):
    """How many images of a batch each process takes.

    Raises ValueError if the batch cannot be divided evenly; fixed: it cannot be changed, as in a run that is resumed.
    """
    if batch_size % world_size() and fixed:
        raise ValueError(f"cannot be divided evenly by {world_size()} processes: start another number of them")
    if batch_size % world_size():
        fewer = batch_size // world_size() * world_size()
        either = " or ".join(str(size) for size in (fewer, fewer + world_size()) if size)
        raise ValueError(f"cannot be divided evenly by {world_size()} processes: choose {either}, "
                         "or another number of them")
    return batch_size // world_size()


def shard_indices(total):
    """This process's indices in an order of `total` items. All get equally many: the first few repeat if need be."""
    return DistributedSampler(range(total), world_size(), rank(), shuffle=False)


class ShardSampler(Sampler):
    """This process's shard of another sampler's order."""

    def __init__(self, sampler):
        self.sampler, self.indices = sampler, shard_indices(len(sampler))

    def __iter__(self):
        order = list(self.sampler)
        return (order[index] for index in self.indices)

    def __len__(self):
        return len(self.indices)


def shard(dataset):
    """This process's shard of a data set; all shards together hold each item once.

    Raises ValueError if there is not an item for each.
    """
    if len(dataset) < world_size():
        raise ValueError(f"a data set of {len(dataset)} cannot be shared by {world_size()} processes: start fewer")
    return dataset if world_size() == 1 else Subset(dataset, range(rank(), len(dataset), world_size()))


def shard_slice():
    """The slice of this process's rows in a tensor that all processes have."""
    return slice(rank(), None, world_size())


# ---------------------------------------------------------------- reductions

def all_reduce_sum(tensor):
    """Replace a tensor by its sum over all processes, and return it."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def all_reduce_sums(*tensors):
    """The sums of tensors over all processes, in one message, each of its own type."""
    if world_size() == 1:
        return tensors
    # In float64, which holds every count.
    message = all_reduce_sum(torch.cat([tensor.flatten().double() for tensor in tensors]))
    parts = message.split([tensor.numel() for tensor in tensors])
    return [part.view_as(tensor).to(tensor.dtype) for tensor, part in zip(tensors, parts)]


def all_reduce_max(number):
    """The largest of the processes' integers."""
    if world_size() == 1:
        return number
    numbers = torch.tensor(number)
    dist.all_reduce(numbers, dist.ReduceOp.MAX)
    return numbers.item()


def gather_rows(rows, total):
    """A tensor (total, ...) from each process's shard_slice() of it."""
    if world_size() == 1:
        return rows
    gathered = rows.new_zeros(total, *rows.shape[1:], dtype=torch.int32 if rows.dtype == torch.int16 else rows.dtype)
    gathered[shard_slice()] = rows
    return all_reduce_sum(gathered).to(rows.dtype)      # gloo does not add 16-bit integers


# ---------------------------------------------------------------- a training step

class StepModule(nn.Module):
    """A forward function as a module, which is what DistributedDataParallel wraps."""

    def __init__(self, model, function):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *tensors):
        return self.function(*tensors)


def data_parallel(model, function):
    """function, which runs the model on this process's shard of a batch; backward leaves the gradients of the whole
    batch in the model.
    """
    if world_size() == 1:
        return function
    if next(model.parameters()).is_cuda:
        nn.SyncBatchNorm.convert_sync_batchnorm(model)          # the same names, parameters and buffers
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)          # newer versions of torch rename the flag
        return DistributedDataParallel(StepModule(model, function), broadcast_buffers=False)


def average_step(model, losses, code_counts=None):
    """→ the means of a step's losses (L,) over all processes, and the sums of code_counts (K,), if there are any.

    BatchNorm's running statistics become their means; SyncBatchNorm synchronises its own. One message for all. Call it
    after the backward pass, which reads the statistics.
    """
    if world_size() == 1:
        return losses, code_counts
    running = [buffer for module in model.modules() if isinstance(module, nn.BatchNorm2d)
               for buffer in (module.running_mean, module.running_var)]
    counted = [] if code_counts is None else [code_counts]
    losses, *others = all_reduce_sums(losses, *running, *counted)
    for buffer, total in zip(running, others):
        buffer.copy_(total / world_size())
    return losses / world_size(), others[-1] if counted else None


@contextmanager
def per_process_rng(seed):
    """Within the block each process draws its own random numbers, from seed + rank; then all states are restored."""
    if world_size() == 1:
        yield
        return
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if torch.cuda.is_initialized() else []):
        torch.manual_seed((seed + rank()) % 2**63)
        yield
