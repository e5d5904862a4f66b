"""Runs with several processes on this machine, recorded step by step, for the tests of distributed training."""

import copy
import functools
import os
import time

import pytest
import torch
from helpers import forkserver, import_script
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import data
from data import code_maps
from metrics import evaluate
from utils import trainer

VQVAE = ("VQ-VAE.py", "--output-folder", "run", "--hidden-size", "8", "--k", "32", "--lr", "4e-3", "--batch-size", "60",
         "--restart-after", "3", "--num-epochs", "1", "--validation-images", "0")     # as many in each process
PRIOR = ("train_prior.py", "--model", "models/run/best.pt", "--batch-size", "60", "--num-epochs", "2", "--layers", "2",
         "--width", "16", "--heads", "2")
RESUME = ("VQ-VAE.py", "--resume", "--output-folder", "run")
LAST = "models/run/last.pt"
TIMEOUT = 500           # seconds: less than the ten minutes of torch.distributed, and enough for a busy machine


def process_target(rank, world_size, port, folder, function, arguments):
    """Call the function in the environment that torchrun would set, with its output in output-RANK.log."""
    os.chdir(folder)
    with open(f"output-{rank}.log", "w") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size),
                      LOCAL_WORLD_SIZE=str(world_size), MASTER_ADDR="localhost", MASTER_PORT=str(port),
                      TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    function(*arguments)


def run_processes(world_size, folder, function, *arguments):
    """Call a function in world_size processes. → their exit codes, their joined output"""
    # torchrun's part
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    processes = [forkserver().Process(target=process_target, args=(
        rank, world_size, store.port, folder, function, arguments)) for rank in range(world_size)]
    for process in processes:
        process.start()
    deadline = time.monotonic() + TIMEOUT
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.is_alive()]
    for process in hanging:
        process.kill()
    outputs = [(folder / f"output-{rank}.log").read_text() for rank in range(world_size)]
    assert not hanging, outputs
    for rank in range(world_size):
        (folder / f"output-{rank}.log").unlink()
    return [process.exitcode for process in processes], "".join(outputs)


class GroupNorm(torch.nn.GroupNorm):
    """Replaces BatchNorm, whose statistics in each process are those of its part of the batch."""

    def __init__(self, channels):
        super().__init__(1, channels)
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))


def train(script, *arguments, group_norm=False, send_signal=(), reference=None):
    """Run a script's main(), and record its state after every step in record-RANK.pt.

    send_signal: rank, step and number of a signal that the process sends to itself. reference: the record-RANK.pt of
    another run. After each step, its state replaces the one of this run, so that the two can be compared step by step:
    otherwise they would diverge as soon as a latent rounds to another code.
    """
    if group_norm:
        torch.nn.BatchNorm2d = GroupNorm
    SummaryWriter.add_graph = lambda *_: None           # slower than everything else
    rank, stop_if_asked, trainers, steps, maps = int(os.environ["RANK"]), trainer.Trainer.stop_if_asked, [], [], []
    expected, script = torch.load(reference, weights_only=True) if reference else None, import_script(script)

    def record_step(run):
        """Replaces stop_if_asked(), which after_step() and epochs() call last."""
        trainers[:] = [run]
        if run.state.step > len(steps) + first_step:
            run.finite_losses()                 # which adds them to the sums
            totals = {name: torch.as_tensor(value) for name, value in run.state.as_dict().items()
                      if name in ("sums", "code_counts", "images")}
            steps.append(copy.deepcopy({"state": run.model.state_dict(), "totals": totals,
                                        "optimizer": run.optimizer.state_dict()["state"]}))
            if send_signal[:2] == (rank, run.state.step):
                os.kill(os.getpid(), send_signal[2])
            if expected:
                start = expected["steps"][len(steps) - 1]
                run.model.load_state_dict(start["state"])
                groups = run.optimizer.state_dict()["param_groups"]
                run.optimizer.load_state_dict({"state": start["optimizer"], "param_groups": groups})
        stop_if_asked(run)

    def encode_sets(*args):
        encoded = code_maps.encode_sets(*args)
        maps.append(encoded.train)
        if not expected:
            return encoded
        assert (encoded.train != expected["maps"]).sum() <= 0.001 * encoded.train.numel()
        return encoded._replace(train=expected["maps"])

    first_step = checkpoint.load(LAST)["step"] if "--resume" in arguments else 0
    trainer.Trainer.stop_if_asked, script.encode_sets = record_step, encode_sets
    try:
        script.main([str(argument) for argument in arguments])
    finally:
        torch.save({"steps": steps, "maps": maps[0] if maps else None, "progress": trainers[0].state.as_dict()},
                   f"record-{rank}.pt")


def load_record(folder, rank=0):
    return torch.load(folder / f"record-{rank}.pt", map_location="cpu", weights_only=True)      # of GPUs, too


def train_processes(world_size, folder, *arguments, status=0, **options):
    """Train in world_size processes, which must have equal exit codes, and equal weights after every step. → record"""
    folder.mkdir(exist_ok=True)
    codes, output = run_processes(world_size, folder, functools.partial(train, **options), *arguments)
    assert codes == [status] * world_size, output
    first, *others = [load_record(folder, rank) for rank in range(world_size)]
    for other in others:
        assert len(other["steps"]) == len(first["steps"])
        for step, other_step in zip(first["steps"], other["steps"]):
            assert all(torch.equal(value, other_step["state"][name]) for name, value in step["state"].items())
        for name in ("epoch", "step", "best", "best_epoch"):
            assert first["progress"][name] == other["progress"][name]
    return first


def assert_losses_are_exact(folder, data_folder, validation_images=0):
    """The validation and the test loss in best.pt must count each image once."""
    model, contents = checkpoint.load_model(folder / "models" / "run" / "best.pt")
    train_set, test_set = data.load("MNIST", data_folder)
    sets = {"validation": data.hold_out(train_set, validation_images)[1], "test": test_set}
    for name, part in sets.items():
        if part is None:
            assert name not in contents
            continue
        losses, _ = evaluate(model, data.batches(part, 50), "cpu")
        assert contents[name]["reconstruction"] == pytest.approx(losses.reconstruction, rel=1e-5)
