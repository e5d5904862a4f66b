"""Trainings that are broken off by a signal or a kill, and go on: against ones in one go, bit for bit."""

import functools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers import events, import_script, processes, run_script, snapshot
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoint
import files
import resume

VQVAE = ("VQ-VAE.py", "--output-folder", "run", "--batch-size", "20", "--num-epochs", "3", "--hidden-size", "8", "--k",
         "32", "--lr", "4e-3", "--lr-schedule", "cosine", "--codebook-update", "ema", "--restart-after", "5",
         "--save-every", "7")
PRIOR = ("train_prior.py", "--model", "models/run/best.pt", "--batch-size", "20", "--num-epochs", "3", "--layers", "2",
         "--width", "16", "--heads", "2", "--dropout", "0.1", "--shift", "1", "--save-every", "7")
GO_ON = {VQVAE: ("VQ-VAE.py", "--resume", "--output-folder", "run"),
         PRIOR: ("train_prior.py", "--resume", "--model", "models/run/best.pt")}
LAST = {VQVAE: Path("models/run/last.pt"), PRIOR: Path("models/run/prior-last.pt")}
KILLS = 20


@pytest.fixture(scope="module")
def in_one_go(mnist_folder, tmp_path_factory):
    """For each of both, a folder where it has run without a break. Not to be changed."""
    folders = {VQVAE: tmp_path_factory.mktemp("vqvae"), PRIOR: tmp_path_factory.mktemp("prior")}
    for run, folder in folders.items():
        if run is PRIOR:
            (folder / "models" / "run").mkdir(parents=True)
            shutil.copy(folders[VQVAE] / "models" / "run" / "best.pt", folder / "models" / "run")
        done = run_script(*run, "--data-folder", mnist_folder, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folders


@pytest.fixture
def prepare(in_one_go, tmp_path):
    """A function that makes a folder in which a run can start."""
    def make(run, name="broken-off"):
        (tmp_path / name / "models" / "run").mkdir(parents=True)
        if run is PRIOR:
            shutil.copy(in_one_go[VQVAE] / "models" / "run" / "best.pt", tmp_path / name / "models" / "run")
        return tmp_path / name
    return make


def differences(one, two, place=""):
    """Where two nests of dictionaries, lists, tensors and values are not the same, bit for bit."""
    if isinstance(one, dict) and isinstance(two, dict) and one.keys() == two.keys():
        return [found for key in one for found in differences(one[key], two[key], f"{place}/{key}")]
    if isinstance(one, list | tuple) and type(one) is type(two) and len(one) == len(two):
        return [found for i, pair in enumerate(zip(one, two)) for found in differences(*pair, f"{place}/{i}")]
    same = torch.equal(one, two) and one.dtype == two.dtype if torch.is_tensor(one) else one == two
    return [] if same else [place]


def curves(logs):
    """All that a run's logs hold, by kind and tag, sorted by step, without the clock's time."""
    run = events(logs)
    read = {"scalars": lambda tag: [(event.step, event.value) for event in run.Scalars(tag)],
            "images": lambda tag: [(event.step, event.encoded_image_string) for event in run.Images(tag)],
            "histograms": lambda tag: [(event.step, event.histogram_value.bucket) for event in run.Histograms(tag)]}
    tags = run.Tags()
    found = {(kind, tag): sorted(values(tag)) for kind, values in read.items() for tag in tags[kind]}
    found["graph"] = tags["graph"] and run.Graph()
    found["charts"] = [event.tensor_proto for event in run.Tensors(CONFIG_SUMMARY_TAG)]
    if "final/mse" in tags["scalars"]:
        content = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        found["hparams"] = HParamsPluginData.FromString(content)
    return found


def without_clock(contents):
    """A checkpoint's contents without what may differ: seconds, and the settings that may change."""
    if "training" in contents:
        progress, settings = contents["training"]["progress"], contents["training"]["settings"]
        progress["seconds"] = 0
        progress["track"] = [line.split()[:-1] for line in progress["track"]]
        for name in ("num_workers", "num_epochs", "save_every", "resume", "overwrite"):
            settings.pop(name, None)
    return contents


def assert_same(one, two):
    """Two folders hold the same run: weights, optimizer, figures, curves, track and projector."""
    for folder in ("models", "logs"):
        names = [{re.sub(r"events\..*", "events", str(path.relative_to(root))) for path in (root / folder).rglob("*")}
                 for root in (one, two)]
        assert names[0] == names[1]
    for path in (one / "models" / "run").iterdir():
        other = two / path.relative_to(one)
        if path.suffix == ".pt":
            contents = [without_clock(torch.load(each, weights_only=True)) for each in (path, other)]
            assert not differences(*contents), path.name
        elif path.suffix == ".txt":
            lines = [[line.split()[:-1] for line in each.read_text().splitlines()] for each in (path, other)]
            assert lines[0] == lines[1], path.name
    found = [curves(root / "logs" / "run") for root in (one, two)]
    assert found[0].keys() == found[1].keys()
    for tag, values in found[0].items():
        assert values == found[1][tag], tag
    for path in (one / "logs" / "run").rglob("*.tsv"):
        assert path.read_bytes() == (two / path.relative_to(one)).read_bytes()


# ---------------------------------------------------------------- signals

def send_signal_at(step, number):
    keep = resume.Run.keep

    def observed(run, *given):
        keep(run, *given)
        if run.progress.step == step:
            os.kill(os.getpid(), number)

    resume.Run.keep = observed


def signal_at(step, number):
    """What makes a training send itself a signal when it has saved this step."""
    return functools.partial(send_signal_at, step, number)


@pytest.mark.parametrize("run", [VQVAE, PRIOR], ids=["vqvae", "prior"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_says_how_to_go_on_and_does_so_exactly(run, number, in_one_go, prepare,
                                                                           mnist_folder):
    folder = prepare(run)
    done = run_script(*run, "--data-folder", mnist_folder, cwd=folder, prepare=signal_at(35, number))
    assert done.returncode == 128 + number and not done.stderr, done.stderr
    step = torch.load(folder / LAST[run], weights_only=True)["step"]
    assert step == 36 and f"Stopped by {number.name} in epoch 2, after step 36;" in done.stdout
    command = done.stdout.splitlines()[-1].split()
    assert command[:2] == ["python3", run[0]] and tuple(command[1:]) == GO_ON[run]
    assert not list(folder.rglob(f"*{files.TEMPORARY}"))

    again = run_script(*command[1:], cwd=folder)
    assert again.returncode == 0 and f"from step {step} on" in again.stdout, again.stderr
    assert_same(in_one_go[run], folder)


def test_what_may_change_changes_nothing_that_was_learned(in_one_go, prepare, mnist_folder):
    """Stopped in the second epoch, then on with processes that load batches and other moments to save at."""
    folder = prepare(VQVAE)
    done = run_script(*VQVAE, "--num-workers", 1, "--data-folder", mnist_folder, cwd=folder,
                      prepare=signal_at(35, signal.SIGTERM))
    assert done.returncode == 143 and not done.stderr, done.stderr
    assert json.loads((folder / "models" / "run" / "args.json").read_text())["num_workers"] == 1
    again = run_script(*GO_ON[VQVAE], "--num-workers", 2, "--save-every", 4, "--batch-size", 20, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert_same(in_one_go[VQVAE], folder)
    settings = checkpoint.load(folder / LAST[VQVAE])["training"]["settings"]
    assert settings["num_workers"] == 2 and settings["save_every"] == 4


# ---------------------------------------------------------------- another environment

def use_other_threads():
    torch.set_num_threads(torch.get_num_threads() + 1)


@pytest.mark.parametrize("run", [VQVAE, PRIOR], ids=["vqvae", "prior"])
def test_a_run_that_goes_on_with_other_threads_or_another_torch_says_so(run, prepare, mnist_folder):
    """Once; args.json keeps all that there were. A run that was begun by older code, which kept none, goes on too."""
    folder, threads = prepare(run), torch.get_num_threads()
    last, kept = folder / LAST[run], lambda: json.loads((folder / "models" / "run" / "args.json").read_text())
    done = run_script(*run, "--num-epochs", 1, "--data-folder", mnist_folder, cwd=folder)
    assert done.returncode == 0 and "differ" not in done.stdout, done.stderr
    for epochs, prepared, said in ((2, use_other_threads, True), (3, use_other_threads, False), (4, None, True)):
        done = run_script(*GO_ON[run], "--num-epochs", epochs, cwd=folder, prepare=prepared)
        assert done.returncode == 0, done.stderr
        assert ("can differ by rounding" in done.stdout) == said, done.stdout
        now, before = (threads + 1, threads) if prepared else (threads, threads + 1)
        assert not said or f"threads {now} (before: {before})" in done.stdout
    environments = torch.load(last, weights_only=True)["training"]["environments"]
    assert [(one["from_step"], one["threads"]) for one in environments] == [
        ("0", str(threads)), ("30", str(threads + 1)), ("90", str(threads))]
    assert run is PRIOR or kept()["environments"] == environments

    contents = torch.load(last, weights_only=True)
    contents["training"]["environments"][-1]["torch"] = "1.0"
    checkpoint.save(last, contents)
    done = run_script(*GO_ON[run], "--num-epochs", 5, cwd=folder)
    assert done.returncode == 0 and "torch " in done.stdout and "(before: 1.0)" in done.stdout, done.stderr
    for name in ("environments", "bfloat16"):
        del contents["training"][name]
    checkpoint.save(last, contents)
    done = run_script(*GO_ON[run], "--num-epochs", 5, "--save-every", 100, cwd=folder)
    assert done.returncode == 0 and "differ" not in done.stdout, done.stderr


@pytest.mark.parametrize("run", [VQVAE, PRIOR], ids=["vqvae", "prior"])
def test_a_finished_run_goes_on_for_more_epochs_alone(run, in_one_go, prepare, mnist_folder, tmp_path):
    """Two epochs and then a third give what three give, where the rate does not depend on how many are to come."""
    constant = [*run, "--lr-schedule", "constant"] if run is VQVAE else [*run, "--lr", "1e-12"]
    folders = [prepare(run, name) for name in ("three", "two")]
    for folder, epochs in zip(folders, (3, 2)):
        done = run_script(*constant, "--data-folder", mnist_folder, "--num-epochs", epochs, cwd=folder)
        assert done.returncode == 0, done.stderr
    before = snapshot(tmp_path)
    refused = run_script(*GO_ON[run], cwd=folders[1])
    assert refused.returncode == 2 and "--num-epochs 2: the run ended after epoch 2, ask for more" in refused.stderr
    assert snapshot(tmp_path) == before
    done = run_script(*GO_ON[run], "--num-epochs", 3, cwd=folders[1])
    assert done.returncode == 0, done.stderr
    if run is VQVAE:
        assert_same(*folders)
    else:       # its rate, all but 0, does differ
        assert (folders[1] / "models" / "run" / "prior-track.txt").read_text().count("\n") == 4


# ---------------------------------------------------------------- kills

def run_in_child(script, arguments, folder):
    """What a process that may be killed at any moment does. It starts without importing torch again."""
    os.chdir(folder)
    with open(folder / "said.log", "a") as said:
        os.dup2(said.fileno(), 1)
        os.dup2(said.fileno(), 2)
    import_script(script).main(list(arguments))


def assert_whole(run, folder):
    """Every file under its final name can be read to its end."""
    for path in (folder / "models" / "run").iterdir():
        if path.suffix == ".pt":
            assert torch.load(path, weights_only=True)["model"], path
        elif path.suffix == ".json":
            assert json.loads(path.read_text())["seed"] == 0
        elif path.suffix == ".txt":
            header, *lines = path.read_text().splitlines()
            assert all(len(line.split()) == len(header.split()) for line in lines)
            assert [int(line.split()[0]) for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.parametrize("run, kills", [(VQVAE, KILLS), (PRIOR, KILLS // 2)], ids=["vqvae", "prior"])
def test_killed_at_any_moment_and_resumed_it_is_the_same_run(run, kills, in_one_go, prepare, mnist_folder):
    moments, done, trial = random.Random(0), 0, 0
    whole = (*run[1:], "--data-folder", str(mnist_folder))
    while done < kills:
        trial += 1
        folder, finished, longest = prepare(run, f"trial {trial}"), False, 0.5
        while not finished:
            # Killed before the first save, it has nothing to resume.
            arguments = GO_ON[run][1:] if (folder / LAST[run]).is_file() else (*whole, "--overwrite")
            child = processes().Process(target=run_in_child, args=(run[0], arguments, folder))
            child.start()
            child.join(moments.uniform(0, longest))
            killed = child.is_alive()
            child.kill()
            child.join()
            killed = killed and child.exitcode == -signal.SIGKILL
            said = (folder / "said.log").read_text() if not killed else ""
            assert killed or child.exitcode == 0 or said.endswith("the run ended after epoch 3, ask for more\n"), said
            done, finished = done + (killed and (folder / LAST[run]).is_file()), not killed
            longest *= 1.5
            assert_whole(run, folder)
        (folder / "said.log").unlink()
        assert_same(in_one_go[run], folder)
