"""Trainings in several processes: against one process, against each other, and when one of them goes away."""

import copy
import functools
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import helpers
import pytest
import torch
from helpers import ROOT, import_script, snapshot, write_mnist
from test_resume import assert_same, differences
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import data
import processes
import resume
import tracking
from metrics import evaluate
from modules import VectorQuantizedVAE

pytestmark = pytest.mark.rounding

VQVAE = ("VQ-VAE.py", "--output-folder", "run", "--hidden-size", "8", "--k", "32", "--lr", "4e-3", "--batch-size", "60",
         "--restart-after", "3", "--num-epochs", "1")
PRIOR = ("train_prior.py", "--model", "models/run/best.pt", "--batch-size", "60", "--num-epochs", "2", "--layers", "2",
         "--width", "16", "--heads", "2")
GO_ON = ("VQ-VAE.py", "--resume", "--output-folder", "run")
HANGS = 500             # seconds: processes that wait for each other do so for ten minutes, and a busy machine is slow


@pytest.fixture(scope="module")
def uneven_folder(tmp_path_factory):
    """599 + 199 digits: neither two nor three processes get as many each."""
    folder = tmp_path_factory.mktemp("uneven")
    write_mnist(folder / "MNIST" / "raw", 599, 199)
    return folder


def child(rank, count, port, folder, function, arguments):
    """What one of several processes does, in the environment that torchrun would give it."""
    os.chdir(folder)
    with open(f"said-{rank}.log", "w") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(count), LOCAL_WORLD_SIZE=str(count),
                      MASTER_ADDR="localhost", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
                      TORCHELASTIC_RUN_ID="test")
    torch.set_num_threads(1)
    function(*arguments)


def in_processes(count, folder, function, *arguments):
    """Run a function in so many processes. → their exit statuses and all that they said."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)      # torchrun's part
    started = [helpers.processes().Process(target=child, args=(rank, count, store.port, folder, function, arguments))
               for rank in range(count)]
    for process in started:
        process.start()
    until = time.monotonic() + HANGS
    for process in started:
        process.join(max(0, until - time.monotonic()))
    hang = [process for process in started if process.is_alive()]
    for process in hang:
        process.kill()
    said = [(folder / f"said-{rank}.log").read_text() for rank in range(count)]
    assert not hang, said
    for rank in range(count):
        (folder / f"said-{rank}.log").unlink()
    return [process.exitcode for process in started], "".join(said)


class GroupNorm(torch.nn.GroupNorm):
    """In the place of BatchNorm, which sees a process's own part of the batch alone."""

    def __init__(self, channels):
        super().__init__(1, channels)
        self.register_buffer("running_mean", torch.zeros(1))
        self.register_buffer("running_var", torch.ones(1))


def train(script, *arguments, group_norm=False, end=(), reference=None):
    """A script's main(), which leaves what it had after every step in seen-RANK.pt.

    end: the rank, step and number of a signal that this process sends to itself then. reference: a seen-RANK.pt that
    another run left. Its state after a step is where this run's next step starts from, so that the two can be compared
    step by step: left alone, they would part where a latent rounds to another code.
    """
    if group_norm:
        torch.nn.BatchNorm2d = GroupNorm
    SummaryWriter.add_graph = lambda *_: None           # takes longer than all the rest
    rank, learn, steps_seen = int(os.environ["RANK"]), resume.Run.learn, []
    there = torch.load(reference, weights_only=True) if reference else None

    def observed(run, *given):
        take_steps, maps = run.take_steps, getattr(run, "train_maps", torch.zeros(0))
        if there:
            assert (maps != there["maps"]).sum() <= 0.001 * maps.numel()
            run.train_maps = there["maps"]

        def steps(*given):
            for _ in take_steps(*given):
                figures = {name: torch.as_tensor(value) for name, value in vars(run.progress).items()
                           if name in ("sums", "counts", "images")}
                steps_seen.append(copy.deepcopy({"state": run.model.state_dict(), "figures": figures,
                                                 "optimizer": run.optimizer.state_dict()["state"]}))
                if end[:2] == (rank, run.progress.step):
                    os.kill(os.getpid(), end[2])
                if there:
                    begin = there["steps"][len(steps_seen) - 1]
                    run.model.load_state_dict(begin["state"])
                    groups = run.optimizer.state_dict()["param_groups"]
                    run.optimizer.load_state_dict({"state": begin["optimizer"], "param_groups": groups})
                yield

        run.take_steps = steps
        try:
            learn(run, *given)
        finally:
            torch.save({"steps": steps_seen, "maps": maps, "progress": vars(run.progress)}, f"seen-{rank}.pt")

    resume.Run.learn = observed
    import_script(script).main([str(argument) for argument in arguments])


def seen(folder, rank=0):
    return torch.load(folder / f"seen-{rank}.pt", weights_only=True)


def trained(count, folder, *arguments, status=0, **how):
    """Train in so many processes, which must end alike and with the same weights after every step. → what one saw."""
    folder.mkdir(exist_ok=True)
    codes, said = in_processes(count, folder, functools.partial(train, **how), *arguments)
    assert codes == [status] * count, said
    first, *others = [seen(folder, rank) for rank in range(count)]
    for other in others:
        assert len(other["steps"]) == len(first["steps"])
        for one, two in zip(first["steps"], other["steps"]):
            assert all(torch.equal(value, two["state"][name]) for name, value in one["state"].items())
        for name in ("epoch", "step", "best", "best_epoch"):
            assert first["progress"][name] == other["progress"][name]
    return first


# ---------------------------------------------------------------- the same training as by one process

def assert_same_steps(expected, found, first=0):
    """From the first one on, each step of `found` is the one that `expected` took from the same state, to rounding.

    In a step where a latent between two codes has gone to the other one, the choices alone are compared.
    """
    same, before = 0, None
    for number, (one, two) in enumerate(zip(expected, found, strict=True)):
        if before and one["figures"]["images"] < before[0]["images"]:           # a new epoch
            before = None
        figures = [{name: value - (before[i][name] if before else 0) for name, value in step["figures"].items()}
                   for i, step in enumerate((one, two))]
        before = one["figures"], two["figures"]
        if number < first:
            continue
        torch.testing.assert_close(figures[1]["sums"], figures[0]["sums"], rtol=1e-3, atol=1e-6)
        assert figures[0]["images"] == figures[1]["images"]
        if "counts" in figures[0]:
            moved = (figures[0]["counts"] - figures[1]["counts"]).abs().sum()
            assert moved <= 4           # two latents
            if moved:
                continue
        same += 1
        # Not the weights themselves: Adam makes a whole step of a gradient that is rounding alone.
        averages = [[state["exp_avg"] for state in step["optimizer"].values()] for step in (one, two)]
        atol = 1e-4 * max(average.abs().max().item() for average in averages[0])
        torch.testing.assert_close(averages[1], averages[0], rtol=1e-3, atol=atol)
        learned_by_adam = set() if "quantizer.cluster_sums" in one["state"] else {"quantizer.codebook"}
        for name in {name for name in one["state"] if name.startswith("quantizer.")} - learned_by_adam:
            torch.testing.assert_close(two["state"][name], one["state"][name], rtol=1e-4, atol=1e-5, msg=name)
    assert same >= (len(expected) - first) / 2


def test_each_step_of_several_processes_is_that_of_one(mnist_folder, tmp_path):
    flags = (*VQVAE, "--codebook-init", "uniform", "--data-folder", mnist_folder)
    one = trained(1, tmp_path / "1", *flags, group_norm=True)
    three = trained(3, tmp_path / "3", *flags, group_norm=True, reference=tmp_path / "1" / "seen-0.pt")
    assert len(one["steps"]) == 10
    assert_same_steps(one["steps"], three["steps"])
    restarts = one["progress"]["track"][-1].split()[tracking.TRACK_COLUMNS.index("restarts")]
    assert int(restarts) > 10


def test_a_run_goes_on_in_any_number_of_processes_as_in_one(mnist_folder, tmp_path):
    """In two, then in three and stopped in mid-epoch, then in one, whose end is bit for bit that of one all the way."""
    flags, go_on = (*VQVAE, "--codebook-update", "ema", "--data-folder", mnist_folder), (*GO_ON, "--num-epochs", 3)
    one, run, there = tmp_path / "one", tmp_path / "run", tmp_path / "one" / "seen-0.pt"
    expected = trained(1, one, *flags, group_norm=True)
    found = trained(2, run, *flags, group_norm=True, reference=there)
    first = [each["steps"][0]["figures"]["sums"] for each in (expected, found)]
    torch.testing.assert_close(*first, rtol=0.02, atol=0)           # of K-means, in which latents may change sides
    assert_same_steps(expected["steps"], found["steps"], first=1)
    names = checkpoint.load(run / "models" / "run" / "last.pt")["model"].keys()
    assert names == expected["steps"][0]["state"].keys()

    stopped = {"status": 128 + signal.SIGTERM, "group_norm": True}
    expected = trained(1, one, *go_on, **stopped, end=(0, 14, signal.SIGTERM))
    found = trained(3, run, *go_on, **stopped, end=(2, 14, signal.SIGTERM), reference=there)
    assert len(expected["steps"]) == 4
    assert_same_steps(expected["steps"], found["steps"])

    ends = [trained(1, folder, *go_on, group_norm=True) for folder in (one, run)]
    assert [len(end["steps"]) for end in ends] == [16, 16] and ends[1]["progress"]["step"] == 30
    assert not differences(*(end["steps"][-1]["state"] for end in ends))
    assert [line.split()[0] for line in ends[1]["progress"]["track"]] == ["epoch", "1", "2", "3"]


def test_several_processes_learn_the_prior_that_one_learns(mnist_folder, tmp_path):
    """Maps, withheld digits and all."""
    torch.manual_seed(0)
    model = {"format": 1, "kind": "vqvae", "config": {"hidden_size": 4, "num_codes": 16},
             "model": VectorQuantizedVAE(hidden_size=4, num_codes=16).state_dict(),
             "dataset": {"name": "MNIST", "shape": [1, 28, 28]}}
    found = []
    for count, reference in ((1, None), (2, tmp_path / "1" / "seen-0.pt")):
        (tmp_path / str(count) / "models" / "run").mkdir(parents=True)
        checkpoint.save(tmp_path / str(count) / "models" / "run" / "best.pt", model)
        found.append(trained(count, tmp_path / str(count), *PRIOR, "--data-folder", mnist_folder, reference=reference))
    one, two = found
    assert len(one["steps"]) == 20
    assert_same_steps(one["steps"], two["steps"])
    assert one["progress"]["best"] == pytest.approx(two["progress"]["best"], rel=1e-3)


def draw(folder):
    with processes.joined():
        before = torch.get_rng_state()
        with processes.own_draws(7):
            drawn = torch.rand(100)
        torch.save([drawn, torch.equal(before, torch.get_rng_state())], folder / f"{processes.rank()}.pt")


def test_draws_of_their_own_differ_and_leave_the_common_ones_alone(tmp_path):
    assert in_processes(2, tmp_path, draw, tmp_path) == ([0, 0], "")
    (one, kept), (two, kept_too) = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert kept and kept_too and not torch.equal(one, two)


# ---------------------------------------------------------------- uneven data, another number of processes

def assert_measured_once(folder, data_folder):
    """The test loss in best.pt is that of each test image once."""
    model, contents = checkpoint.load_model(folder / "models" / "run" / "best.pt")
    tested, _ = evaluate(model, data.batches(data.load("MNIST", data_folder)[1], 50), "cpu")
    assert contents["test"]["reconstruction"] == pytest.approx(tested.reconstruction, rel=1e-5)


def test_uneven_data_end_the_epoch_and_each_test_image_counts_once(uneven_folder, tmp_path):
    found = trained(3, tmp_path, *VQVAE, "--data-folder", uneven_folder)
    assert found["progress"]["step"] == len(found["steps"]) == 10
    assert [step["figures"]["images"].item() for step in found["steps"]] == [*range(60, 600, 60), 599]
    assert_measured_once(tmp_path, uneven_folder)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_on_gpus_all_have_the_same_weights_and_those_of_one(mnist_folder, tmp_path):
    """To rounding, BatchNorm and all: after the first step, for Adam makes much of little."""
    flags = (*VQVAE, "--codebook-update", "ema", "--device", "cuda", "--data-folder", mnist_folder)
    one, two = [trained(count, tmp_path / str(count), *flags)["steps"][0]["state"] for count in (1, 2)]
    torch.testing.assert_close(one["encoder.1.running_var"], two["encoder.1.running_var"], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(one["quantizer.codebook"], two["quantizer.codebook"], rtol=1e-2, atol=1e-2)


def test_the_batchnorm_of_gpus_has_the_names_and_the_parameters_of_the_other():
    model = VectorQuantizedVAE(hidden_size=4, num_codes=16)
    names, parameters = list(model.state_dict()), [id(each) for each in model.parameters()]
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == names and [id(each) for each in model.parameters()] == parameters


def test_a_script_that_something_else_starts_is_alone(monkeypatch):
    """Other launchers tell each of their processes how many there are, and start one script in one of them."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with processes.joined():
        assert processes.count() == 1 and processes.speaks()


@pytest.mark.parametrize("batch_size, words", [(61, "choose 60 or 62"), (1, "choose 2, or")])
def test_a_batch_that_cannot_be_shared_is_refused_with_its_neighbours(batch_size, words, monkeypatch):
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert processes.split(60) == 30
    with pytest.raises(ValueError, match=words):
        processes.split(batch_size)


# ---------------------------------------------------------------- one of them goes away

def test_one_that_dies_ends_the_run_and_it_goes_on_exactly(uneven_folder, tmp_path):
    """Killed at step 16, one or the other; then one alone is asked to stop, at step 19; then to the end."""
    flags = (*VQVAE, "--num-epochs", 3, "--save-every", 7, "--codebook-update", "ema", "--data-folder", uneven_folder)
    trained(2, tmp_path / "unbroken", *flags)
    assert_measured_once(tmp_path / "unbroken", uneven_folder)
    last, go_on = "models/run/last.pt", f"torchrun --nproc-per-node 2 {' '.join(GO_ON)}"
    for dies in (1, 0):
        folder, dead = tmp_path / str(dies), functools.partial(train, end=(dies, 16, signal.SIGKILL))
        folder.mkdir()
        codes, said = in_processes(2, folder, dead, *flags)
        assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 2
        assert "error: another process of this run has died, or does not answer (" in said
        assert said.endswith(f"); the training has stopped, {last} is whole, go on with: {go_on}\n")
        assert said.count(": error: ") == 1 and "Traceback" not in said
        assert torch.load(folder / last, weights_only=True)["step"] == 14

    asked = functools.partial(train, end=(1, 19, signal.SIGTERM))
    codes, said = in_processes(2, folder, asked, *GO_ON)
    assert codes == [128 + signal.SIGTERM] * 2 and said.count("Stopped by SIGTERM in epoch 2, after step 19;") == 1
    assert said.splitlines()[-1].strip() == go_on and torch.load(folder / last, weights_only=True)["step"] == 19
    trained(2, folder, *GO_ON)
    assert_same(tmp_path / "unbroken", folder)


# ---------------------------------------------------------------- bad input

def train_and_look_for_threads(script, *arguments):
    import_script(script).main([str(argument) for argument in arguments])
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in names), names


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have no names here")
def test_the_groups_threads_end_before_the_interpreter_which_they_may_abort(mnist_folder, tmp_path):
    codes, said = in_processes(2, tmp_path, train_and_look_for_threads, *VQVAE, "--data-folder",
                               mnist_folder)
    assert codes == [0, 0], said


def main_of_each(arguments, more=()):
    """VQ-VAE.py's main(), with more arguments for the second process."""
    import_script("VQ-VAE.py").main([*arguments, *(more if os.environ["RANK"] == "1" else ())])


def test_bad_input_is_told_once_whoever_finds_it(mnist_folder, tmp_path):
    (tmp_path / "models" / "there").mkdir(parents=True)
    (tmp_path / "models" / "there" / "last.pt").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    before, flags = snapshot(tmp_path), ["--data-folder", str(mnist_folder), "--k", "16", "--hidden-size", "4"]
    for arguments, more, words in (
            (["--batch-size", "61"], [], "--batch-size 61: cannot be shared evenly by 2 processes: choose 60"),
            (["--k", "0"], [], "argument --k"),
            (["--output-folder", "there"], [], "--output-folder there: models/there holds a run already"),      # rank 0
            ([], ["--data-folder", "file"], "--data-folder file: is a file"),                                   # rank 1
            ([], ["--lr", "0.1"], "the processes have different arguments or data")):
        codes, said = in_processes(2, tmp_path, main_of_each, [*flags, *arguments], more)
        assert codes == [2, 2] and said.count("\n") == 1 and words in said and ": error: " in said, said
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- the commands of the README

def test_commands_of_the_readme_train_under_torchrun(tmp_path):
    """With fewer and smaller steps, and the machines' one on this one: two launchers that find each other."""
    section = (ROOT / "README.md").read_text().split("## Several processes\n")[1].split("\n## ")[0]
    commands = [line for block in re.findall(r"^```shell\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
                for line in block.splitlines()]
    assert len(commands) == 3 and all(line.startswith("torchrun ") for line in commands)
    small = {"VQ-VAE.py": ["--hidden-size", 4, "--k", 16, "--batch-size", 900, "--num-epochs", 1],
             "train_prior.py": ["--layers", 1, "--width", 8, "--heads", 1, "--batch-size", 900, "--num-epochs", 1,
                                "--shift", 0]}
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    for line in commands:
        machines = 2 if "--nnodes 2" in line else 1
        words = shlex.split(line.replace("HOST:29400", f"localhost:{port}"))
        if machines == 2:
            words[words.index("--nproc-per-node") + 1] = "1"
        script = next(word for word in words if word.endswith(".py"))
        words[words.index(script)] = str(ROOT / script)
        more = [str(word) for word in small[script]] if "--resume" not in words else ["--num-epochs", "2"]
        data_flags = ["--dataset", "MNIST-10k"] if "--resume" not in words else []
        started = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words[1:], *more, *data_flags],
                                    cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for _ in range(machines)]
        said = [process.communicate(timeout=HANGS) for process in started]
        assert [process.returncode for process in started] == [0] * machines, said
        assert sum(out.count("in 2 processes") for out, _ in said) == 1, said
