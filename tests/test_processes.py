"""Trainings in several processes: against one process, against each other, and when one of them goes away."""

import functools
import multiprocessing
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers import ROOT, import_script, snapshot, write_mnist
from test_resume import assert_same
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import data
import processes
import resume
import tracking
from metrics import evaluate
from modules import VectorQuantizedVAE

VQVAE = ("VQ-VAE.py", "--output-folder", "run", "--hidden-size", "8", "--k", "32", "--lr", "4e-3", "--batch-size", "60",
         "--restart-after", "3", "--num-epochs", "1")
PRIOR = ("train_prior.py", "--model", "models/run/best.pt", "--batch-size", "60", "--num-epochs", "2", "--layers", "2",
         "--width", "16", "--heads", "2")
GO_ON = ("VQ-VAE.py", "--resume", "--output-folder", "run")


@pytest.fixture(scope="module")
def children():
    """Processes that are forked from one which has imported all that they need, and has done nothing with it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_processes"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


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


def in_processes(children, count, folder, function, *arguments):
    """Run a function in so many processes. → their exit statuses and all that they said."""
    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)      # torchrun's part
    started = [children.Process(target=child, args=(rank, count, store.port, folder, function, arguments))
               for rank in range(count)]
    for process in started:
        process.start()
    until = time.monotonic() + 60
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


def train(script, *arguments, group_norm=False, end=()):
    """A script's main(), which leaves the weights and the epoch's sums after every step in seen-RANK.pt.

    end: the rank, step and number of a signal that this process sends to itself then.
    """
    if group_norm:
        torch.nn.BatchNorm2d = GroupNorm
    SummaryWriter.add_graph = lambda *_: None           # takes longer than all the rest
    rank, learn, seen = int(os.environ["RANK"]), resume.Run.learn, []

    def observed(run, *given):
        take_steps = run.take_steps

        def steps(*given):
            for _ in take_steps(*given):
                figures = {name: torch.as_tensor(value) for name, value in vars(run.progress).items()
                           if name in ("sums", "counts", "images")}
                seen.append({name: value.clone() for name, value in {**run.model.state_dict(), **figures}.items()})
                if end[:2] == (rank, run.progress.step):
                    os.kill(os.getpid(), end[2])
                yield

        run.take_steps = steps
        learn(run, *given)
        torch.save({"weights": seen, "progress": vars(run.progress)}, f"seen-{rank}.pt")

    resume.Run.learn = observed
    import_script(script).main([str(argument) for argument in arguments])


def seen(folder, rank=0):
    return torch.load(folder / f"seen-{rank}.pt", weights_only=True)


def trained(children, count, folder, *arguments, **how):
    """Train in so many processes, which must end well and with the same weights after every step. → what one saw."""
    folder.mkdir(exist_ok=True)
    codes, said = in_processes(children, count, folder, functools.partial(train, **how), *arguments)
    assert codes == [0] * count, said
    first, *others = [seen(folder, rank) for rank in range(count)]
    for other in others:
        assert len(other["weights"]) == len(first["weights"])
        for one, two in zip(first["weights"], other["weights"]):
            assert all(torch.equal(value, two[name]) for name, value in one.items())
        for name in ("epoch", "step", "best", "best_epoch"):
            assert first["progress"][name] == other["progress"][name]
    return first


def assert_close(one, two, tolerance):
    for name, value in one.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, two[name], rtol=tolerance, atol=tolerance, msg=name)
        else:           # a latent halfway between two codes may go to the other one
            value, found = value.long(), two[name].long()
            assert (value - found).abs().sum() <= 0.01 * value.sum(), name
            assert name != "counts" or value.sum() == found.sum()


# ---------------------------------------------------------------- the same training as by one process

def assert_same_steps(expected, found):
    for step, (one, two) in enumerate(zip(expected, found)):
        assert_close(one, two, 1e-5 if step == 0 else 2e-3)         # at first K-means alone


def test_several_processes_take_the_steps_of_one(children, mnist_folder, tmp_path):
    # K-means leaves a gradient of 0 but for rounding, and Adam makes a whole step of that.
    flags = (*VQVAE, "--codebook-init", "uniform", "--data-folder", mnist_folder)
    one, three = [trained(children, count, tmp_path / str(count), *flags, group_norm=True) for count in (1, 3)]
    assert len(one["weights"]) == len(three["weights"]) == 10
    assert_same_steps(one["weights"], three["weights"])
    restarts = one["progress"]["track"][-1].split()[tracking.TRACK_COLUMNS.index("restarts")]
    assert int(restarts) > 10


def test_a_run_goes_on_in_any_number_of_processes_as_in_one(children, mnist_folder, tmp_path):
    flags = (*VQVAE, "--codebook-update", "ema", "--data-folder", mnist_folder)
    one = trained(children, 1, tmp_path / "one", *flags, "--num-epochs", 3, group_norm=True)
    two = trained(children, 2, tmp_path / "run", *flags, group_norm=True)
    assert len(two["weights"]) == 10
    assert_same_steps(one["weights"], two["weights"])
    asked = functools.partial(train, group_norm=True, end=(2, 14, signal.SIGTERM))                # in mid-epoch
    codes, said = in_processes(children, 3, tmp_path / "run", asked, *GO_ON, "--num-epochs", 3)
    assert codes == [128 + signal.SIGTERM] * 3, said
    found = trained(children, 1, tmp_path / "run", *GO_ON, "--num-epochs", 3, group_norm=True)
    assert len(found["weights"]) == 16
    assert found["progress"]["step"] == 30
    columns = [[[float(word) for word in line.split()[:-1]] for line in each["progress"]["track"][1:]]
               for each in (one, found)]
    assert len(columns[0]) == len(columns[1]) == 3
    for expected, line in zip(*columns):
        assert line == pytest.approx(expected, rel=0.02, abs=1) and line[5] == pytest.approx(expected[5], rel=0.01)
    names = checkpoint.load(tmp_path / "run" / "models" / "run" / "last.pt")["model"].keys()
    assert {*names, "sums", "counts", "images"} == set(one["weights"][0])


def test_several_processes_learn_the_prior_that_one_learns(children, mnist_folder, tmp_path):
    """Maps, withheld digits and all."""
    torch.manual_seed(0)
    model = {"format": 1, "kind": "vqvae", "config": {"hidden_size": 4, "num_codes": 16},
             "model": VectorQuantizedVAE(hidden_size=4, num_codes=16).state_dict(),
             "dataset": {"name": "MNIST", "shape": [1, 28, 28]}}
    found = []
    for count in (1, 2):
        (tmp_path / str(count) / "models" / "run").mkdir(parents=True)
        checkpoint.save(tmp_path / str(count) / "models" / "run" / "best.pt", model)
        found.append(trained(children, count, tmp_path / str(count), *PRIOR, "--data-folder", mnist_folder))
    one, two = found
    assert len(one["weights"]) == len(two["weights"]) == 20
    for expected, weights in zip(one["weights"], two["weights"]):
        assert_close(expected, weights, 1e-3)
    assert one["progress"]["best"] == pytest.approx(two["progress"]["best"], rel=1e-5)


def draw(folder):
    with processes.joined():
        before = torch.get_rng_state()
        with processes.own_draws(7):
            drawn = torch.rand(100)
        torch.save([drawn, torch.equal(before, torch.get_rng_state())], folder / f"{processes.rank()}.pt")


def test_draws_of_their_own_differ_and_leave_the_common_ones_alone(children, tmp_path):
    assert in_processes(children, 2, tmp_path, draw, tmp_path) == ([0, 0], "")
    (one, kept), (two, kept_too) = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert kept and kept_too and not torch.equal(one, two)


# ---------------------------------------------------------------- uneven data, another number of processes

def assert_measured_once(folder, data_folder):
    """The test loss in best.pt is that of each test image once."""
    model, contents = checkpoint.load_model(folder / "models" / "run" / "best.pt")
    tested, _ = evaluate(model, data.batches(data.load("MNIST", data_folder)[1], 50), "cpu")
    assert contents["test"]["reconstruction"] == pytest.approx(tested.reconstruction, rel=1e-5)


def test_uneven_data_end_the_epoch_and_each_test_image_counts_once(children, uneven_folder, tmp_path):
    found = trained(children, 3, tmp_path, *VQVAE, "--data-folder", uneven_folder)
    assert found["progress"]["step"] == len(found["weights"]) == 10
    assert [step["images"].item() for step in found["weights"]] == [*range(60, 600, 60), 599]
    assert_measured_once(tmp_path, uneven_folder)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_on_gpus_all_have_the_same_weights_and_those_of_one(children, mnist_folder, tmp_path):
    """To rounding, BatchNorm and all: after the first step, for Adam makes much of little."""
    flags = (*VQVAE, "--codebook-update", "ema", "--device", "cuda", "--data-folder", mnist_folder)
    one, two = [trained(children, count, tmp_path / str(count), *flags)["weights"][0] for count in (1, 2)]
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

def test_one_that_dies_ends_the_run_and_it_goes_on_exactly(children, uneven_folder, tmp_path):
    """Killed at step 16, one or the other; then one alone is asked to stop, at step 19; then to the end."""
    flags = (*VQVAE, "--num-epochs", 3, "--save-every", 7, "--codebook-update", "ema", "--data-folder", uneven_folder)
    trained(children, 2, tmp_path / "unbroken", *flags)
    assert_measured_once(tmp_path / "unbroken", uneven_folder)
    last, go_on = "models/run/last.pt", f"torchrun --nproc-per-node 2 {' '.join(GO_ON)}"
    for dies in (1, 0):
        folder, dead = tmp_path / str(dies), functools.partial(train, end=(dies, 16, signal.SIGKILL))
        folder.mkdir()
        codes, said = in_processes(children, 2, folder, dead, *flags)
        assert codes[dies] == -signal.SIGKILL and codes[1 - dies] == 2
        assert "error: another process of this run has died, or does not answer (" in said
        assert said.endswith(f"); the training has stopped, {last} is whole, go on with: {go_on}\n")
        assert said.count(": error: ") == 1 and "Traceback" not in said
        assert torch.load(folder / last, weights_only=True)["step"] == 14

    asked = functools.partial(train, end=(1, 19, signal.SIGTERM))
    codes, said = in_processes(children, 2, folder, asked, *GO_ON)
    assert codes == [128 + signal.SIGTERM] * 2 and said.count("Stopped by SIGTERM in epoch 2, after step 19;") == 1
    assert said.splitlines()[-1].strip() == go_on and torch.load(folder / last, weights_only=True)["step"] == 19
    trained(children, 2, folder, *GO_ON)
    assert_same(tmp_path / "unbroken", folder)


# ---------------------------------------------------------------- bad input

def train_and_look_for_threads(script, *arguments):
    import_script(script).main([str(argument) for argument in arguments])
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in names), names


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads have no names here")
def test_the_groups_threads_end_before_the_interpreter_which_they_may_abort(children, mnist_folder, tmp_path):
    codes, said = in_processes(children, 2, tmp_path, train_and_look_for_threads, *VQVAE, "--data-folder",
                               mnist_folder)
    assert codes == [0, 0], said


def main_of_each(arguments, more=()):
    """VQ-VAE.py's main(), with more arguments for the second process."""
    import_script("VQ-VAE.py").main([*arguments, *(more if os.environ["RANK"] == "1" else ())])


def test_bad_input_is_told_once_whoever_finds_it(children, mnist_folder, tmp_path):
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
        codes, said = in_processes(children, 2, tmp_path, main_of_each, [*flags, *arguments], more)
        assert codes == [2, 2] and said.count("\n") == 1 and words in said and ": error: " in said, said
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- the commands of the README

def test_commands_of_the_readme_train_under_torchrun(mnist_folder, tmp_path):
    """With fewer and smaller steps, and the machines' one on this one: two launchers that find each other."""
    section = (ROOT / "README.md").read_text().split("## Several processes\n")[1].split("\n## ")[0]
    commands = [line for block in re.findall(r"^```shell\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
                for line in block.splitlines()]
    assert len(commands) == 3 and all(line.startswith("torchrun ") for line in commands)
    small = {"VQ-VAE.py": ["--hidden-size", 4, "--k", 16, "--batch-size", 60, "--num-epochs", 1],
             "train_prior.py": ["--layers", 1, "--width", 16, "--heads", 2, "--batch-size", 100, "--num-epochs", 1]}
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
        data_flags = ["--dataset", "MNIST", "--data-folder", str(mnist_folder)] if "--resume" not in words else []
        started = [subprocess.Popen([sys.executable, "-m", "torch.distributed.run", *words[1:], *more, *data_flags],
                                    cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
                   for _ in range(machines)]
        said = [process.communicate(timeout=100) for process in started]
        assert [process.returncode for process in started] == [0] * machines, said
        assert sum(out.count("in 2 processes") for out, _ in said) == 1, said
