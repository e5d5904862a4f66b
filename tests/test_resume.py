"""Runs interrupted by a signal or a kill and resumed, against uninterrupted runs, bit for bit."""

import copy
import functools
import io
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import ROOT, events, forkserver, import_script, run_script, snapshot
from PIL import Image
from tensorboard.plugins.custom_scalar.metadata import CONFIG_SUMMARY_TAG
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoint
from utils import files, train_state, trainer
from utils.interruptions import StopSignals

VQVAE = ("VQ-VAE.py", "--output-folder", "run", "--batch-size", "20", "--num-epochs", "3", "--hidden-size", "8", "--k",
         "32", "--lr", "4e-3", "--lr-schedule", "cosine", "--codebook-update", "ema", "--restart-after", "5",
         "--save-every", "7")
PRIOR = ("train_prior.py", "--model", "models/run/best.pt", "--batch-size", "20", "--num-epochs", "3", "--layers", "2",
         "--width", "16", "--heads", "2", "--dropout", "0.1", "--shift", "1", "--save-every", "7")
RESUME = {VQVAE: ("VQ-VAE.py", "--resume", "--output-folder", "run"),
          PRIOR: ("train_prior.py", "--resume", "--model", "models/run/best.pt")}
LAST = {VQVAE: Path("models/run/last.pt"), PRIOR: Path("models/run/prior-last.pt")}
KILLS = int(os.environ.get("KILLS", 4))


@pytest.fixture(scope="module")
def uninterrupted(mnist_folder, tmp_path_factory):
    """{run: a folder with that run, without interruption}. Read-only."""
    folders = {VQVAE: tmp_path_factory.mktemp("vqvae"), PRIOR: tmp_path_factory.mktemp("prior")}
    for run, folder in folders.items():
        if run is PRIOR:
            (folder / "models" / "run").mkdir(parents=True)
            shutil.copy(folders[VQVAE] / "models" / "run" / "best.pt", folder / "models" / "run")
        result = run_script(*run, "--data-folder", mnist_folder, cwd=folder)
        assert result.returncode == 0, result.stderr
    return folders


@pytest.fixture
def make_folder(uninterrupted, tmp_path):
    """A function that creates a folder in which a run can start."""
    def make(run, name="interrupted"):
        (tmp_path / name / "models" / "run").mkdir(parents=True)
        if run is PRIOR:
            shutil.copy(uninterrupted[VQVAE] / "models" / "run" / "best.pt", tmp_path / name / "models" / "run")
        return tmp_path / name
    return make


def differences(first, second, path=""):
    """The paths at which two nested structures of dictionaries, lists, tensors and values differ."""
    if isinstance(first, dict) and isinstance(second, dict) and first.keys() == second.keys():
        return [found for key in first for found in differences(first[key], second[key], f"{path}/{key}")]
    if isinstance(first, list | tuple) and type(first) is type(second) and len(first) == len(second):
        return [found for i, pair in enumerate(zip(first, second)) for found in differences(*pair, f"{path}/{i}")]
    same = torch.equal(first, second) and first.dtype == second.dtype if torch.is_tensor(first) else first == second
    return [] if same else [path]


def logged_values(logs):
    """{(kind, tag): values} in the logs of a run, sorted by step, without wall-clock times."""
    run = events(logs)
    readers = {"scalars": lambda tag: [(event.step, event.value) for event in run.Scalars(tag)],
               "images": lambda tag: [(event.step, event.encoded_image_string) for event in run.Images(tag)],
               }
    tags = run.Tags()
    logged = {(kind, tag): sorted(values(tag)) for kind, values in readers.items() for tag in tags[kind]}
    logged["graph"] = tags["graph"] and run.Graph()
    logged["charts"] = [event.tensor_proto for event in run.Tensors(CONFIG_SUMMARY_TAG)]
    if "at_end/test_mse" in tags["scalars"]:
        content = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        logged["hparams"] = HParamsPluginData.FromString(content)
    return logged


def without_times(contents):
    """The contents of a checkpoint without times and without the settings that may change."""
    if "training" in contents:
        progress, settings = contents["training"]["progress"], contents["training"]["settings"]
        progress["seconds"] = 0
        progress["track"] = [line.split()[:-1] for line in progress["track"]]
        for name in ("num_workers", "num_epochs", "save_every", "resume", "overwrite"):
            settings.pop(name, None)
    return contents


def assert_same_run(first, second):
    """Two folders must hold the same run: checkpoints, logs, text track and projector files."""
    for folder in ("models", "logs"):
        names = [{re.sub(r"events\..*", "events", str(path.relative_to(root))) for path in (root / folder).rglob("*")}
                 for root in (first, second)]
        assert names[0] == names[1]
    for path in (first / "models" / "run").iterdir():
        other = second / path.relative_to(first)
        if path.suffix == ".pt":
            contents = [without_times(torch.load(each, weights_only=True)) for each in (path, other)]
            assert not differences(*contents), path.name
        elif path.suffix == ".txt":
            lines = [[line.split()[:-1] for line in each.read_text().splitlines()] for each in (path, other)]
            assert lines[0] == lines[1], path.name
    logged = [logged_values(root / "logs" / "run") for root in (first, second)]
    assert logged[0].keys() == logged[1].keys()
    for tag, values in logged[0].items():
        if tag == ("images", "prior/samples"):      # as many columns as there was time for
            values, others = [[(step, np.asarray(Image.open(io.BytesIO(picture)))) for step, picture in run[tag]]
                              for run in logged]
            for (step, picture), (other_step, other) in zip(values, others, strict=True):
                width = min(picture.shape[1], other.shape[1]) - 2           # without the last border
                assert step == other_step and np.array_equal(picture[:, :width], other[:, :width])
        else:
            assert values == logged[1][tag], tag
    for path in (first / "logs" / "run").rglob("*.tsv"):
        assert path.read_bytes() == (second / path.relative_to(first)).read_bytes()


# ---------------------------------------------------------------- signals

def send_signal_at(step, signal_number):
    save_checkpoint = trainer.Trainer.save_checkpoint

    def save_then_signal(run):
        save_checkpoint(run)
        if run.state.step == step:
            os.kill(os.getpid(), signal_number)

    trainer.Trainer.save_checkpoint = save_then_signal


def signal_at(step, signal_number):
    """A prepare function: the run sends itself a signal after saving this step."""
    return functools.partial(send_signal_at, step, signal_number)


@pytest.mark.parametrize("run, signal_number", [(VQVAE, signal.SIGINT), (VQVAE, signal.SIGTERM),
                                                (VQVAE, signal.SIGHUP), (PRIOR, signal.SIGTERM)])
def test_signalled_run_resumes_bit_for_bit(run, signal_number, uninterrupted, make_folder,
                                           mnist_folder):
    folder = make_folder(run)
    result = run_script(*run, "--data-folder", mnist_folder, cwd=folder, prepare=signal_at(35, signal_number))
    assert result.returncode == 128 + signal_number and not result.stderr, result.stderr
    step = torch.load(folder / LAST[run], weights_only=True)["step"]
    assert step == 35 and f"Stopped by {signal_number.name} in epoch 2, after step 35;" in result.stdout
    python, script, *flags = result.stdout.splitlines()[-1].split()
    assert python == "python3" and (folder / script).samefile(ROOT / run[0])            # as started from another folder
    command = (run[0], *flags)
    assert command == RESUME[run]
    assert not list(folder.rglob(f"*{files.TEMPORARY}"))

    resumed = run_script(*command, cwd=folder)
    assert resumed.returncode == 0 and f"from step {step} on" in resumed.stdout, resumed.stderr
    assert_same_run(uninterrupted[run], folder)


def kill_in_evaluation():
    """The run is killed in its second epoch when all is logged, and the end of the epoch is not saved yet."""
    add_track_line = trainer.Trainer.add_track_line

    def log_then_kill(run, formats, values):
        add_track_line(run, formats, values)
        if values["epoch"] == 2:
            run.writer.flush()
            os.kill(os.getpid(), signal.SIGKILL)

    trainer.Trainer.add_track_line = log_then_kill


@pytest.mark.parametrize("run", [VQVAE, PRIOR], ids=["vqvae", "prior"])
def test_run_killed_between_logs_and_save_logs_no_epoch_twice(run, uninterrupted, make_folder, mnist_folder):
    folder = make_folder(run)
    result = run_script(*run, "--data-folder", mnist_folder, cwd=folder, prepare=kill_in_evaluation)
    assert result.returncode == -signal.SIGKILL, result.stderr
    resumed = run_script(*RESUME[run], cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(uninterrupted[run], folder)


def test_changed_workers_and_save_interval_keep_the_result(uninterrupted, make_folder, mnist_folder):
    """Stopped in the second epoch, then resumed with more loader processes and another save interval."""
    folder = make_folder(VQVAE)
    result = run_script(*VQVAE, "--num-workers", 1, "--data-folder", mnist_folder, cwd=folder,
                        prepare=signal_at(35, signal.SIGTERM))
    assert result.returncode == 143 and not result.stderr, result.stderr
    assert json.loads((folder / "models" / "run" / "args.json").read_text())["num_workers"] == 1
    resumed = run_script(*RESUME[VQVAE], "--num-workers", 2, "--save-every", 4, "--batch-size", 20, cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_run(uninterrupted[VQVAE], folder)
    settings = checkpoint.load(folder / LAST[VQVAE])["training"]["settings"]
    assert settings["num_workers"] == 2 and settings["save_every"] == 4


def send_signal_at_start(signal_number):
    enter = StopSignals.__enter__

    def enter_then_signal(signals):
        enter(signals)
        os.kill(os.getpid(), signal_number)
        return signals

    StopSignals.__enter__ = enter_then_signal


def test_signal_before_the_first_step_of_an_extended_run_keeps_the_extension(make_folder, mnist_folder):
    folder = make_folder(VQVAE)
    result = run_script(*VQVAE, "--num-epochs", 1, "--data-folder", mnist_folder, cwd=folder)
    assert result.returncode == 0, result.stderr
    result = run_script(*RESUME[VQVAE], "--num-epochs", 2, cwd=folder,
                        prepare=functools.partial(send_signal_at_start, signal.SIGTERM))
    assert result.returncode == 128 + signal.SIGTERM and not result.stderr, result.stderr
    result = run_script(*result.stdout.splitlines()[-1].split()[1:], cwd=folder)
    assert result.returncode == 0 and "epoch 2" in result.stdout, result.stderr


# ---------------------------------------------------------------- schedules

SCHEDULES = {
    **{name: lambda optimizer, name=name: import_script("VQ-VAE.py").make_schedule(name, optimizer, 2.0, 40)
       for name in ("constant", "cosine", "onecycle")},
    "prior": lambda optimizer: import_script("train_prior.py").warm_up_then_cosine(optimizer, 40)}


@pytest.mark.parametrize("make_schedule", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("steps", [0, 1, 2, 30])
def test_saved_schedule_continues_bit_for_bit(make_schedule, steps):
    def rates(schedule, optimizer, count):
        for _ in range(count):
            optimizer.step()
            schedule.step()
            yield optimizer.param_groups[0]["lr"]

    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = make_schedule(optimizer)
    initial = copy.deepcopy(schedule.state_dict())
    list(rates(schedule, optimizer, steps))
    saved = copy.deepcopy(schedule.state_dict())
    assert train_state.schedule_fits(initial, saved, steps, 2.0)
    new_optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    resumed = make_schedule(new_optimizer)
    resumed.load_state_dict(saved)
    new_optimizer.param_groups[0]["lr"] = resumed.get_last_lr()[0]
    assert list(rates(resumed, new_optimizer, 9)) == list(rates(schedule, optimizer, 9))

    for name, value in (("last_epoch", 2**62), ("last_epoch", -5), ("last_epoch", steps + 1),
                        ("_last_lr", [float("nan")]), ("_last_lr", 1.0), ("_last_lr", [-1.0]), ("_last_lr", [9.0]),
                        ("base_lrs", [1.0]), ("T_max", 0), ("total_steps", 0), ("_schedulers", []), ("more", 1)):
        if name in saved or name == "more":
            assert not train_state.schedule_fits(initial, {**saved, name: value}, steps, 2.0), name
    assert not train_state.schedule_fits(initial, [], steps, 2.0)
    assert not train_state.schedule_fits(initial, {**saved, "last_epoch": torch.zeros(2)}, steps, 2.0)


# ---------------------------------------------------------------- the state

def state_with_track(*track):
    return train_state.TrainState(order=torch.zeros(3), sums=torch.zeros(1), pending_losses=torch.zeros(10, 1),
                                  track=list(track))


@pytest.mark.parametrize(("header", "line", "fits"), [
    ("epoch  val_nats  bits_per_dimension", "1 2.0 0.2", True),
    ("epoch  bits_per_pixel", "1 0.2", True),           # of an earlier version, without validation images
    ("epoch  val_nats  bits", "1 2.0 0.2", False), ("epoch  val_nats", "1 2.0", False), ("text", "1", False),
    ("epoch  bits_per_dimension  val_nats", "1 2.0 0.2", False),
    ("epoch  val_nats  bits_per_dimension", "1 2.0", False)])
def test_track_of_other_columns_is_refused(header, line, fits):
    saved = state_with_track(header, line)
    saved.epoch, saved.step = 2, 5
    state = state_with_track("epoch  val_nats  bits_per_dimension")
    if fits:
        state.load(saved.as_dict(), 5)
        assert state.track == [header, line] and state.epoch == 2
    else:
        with pytest.raises(ValueError, match="columns are not epoch val_nats bits_per_dimension"):
            state.load(saved.as_dict(), 5)


def test_random_states_of_another_type_are_refused_without_a_warning(recwarn):
    with pytest.raises(TypeError, match="random generators"):
        train_state.restore_random_states(torch.zeros(3))
    assert not recwarn.list


# ---------------------------------------------------------------- changed environment

def add_thread():
    torch.set_num_threads(torch.get_num_threads() + 1)


def test_resume_reports_changed_threads_and_torch_version(make_folder, mnist_folder):
    """Each change is reported once and recorded. Checkpoints without a record of environments resume too."""
    run = VQVAE
    folder, threads = make_folder(run), torch.get_num_threads()
    last, read_args = folder / LAST[run], lambda: json.loads((folder / "models" / "run" / "args.json").read_text())
    result = run_script(*run, "--num-epochs", 1, "--data-folder", mnist_folder, cwd=folder)
    assert result.returncode == 0 and "differ" not in result.stdout, result.stderr
    for epochs, prepare, reported in ((2, add_thread, True), (3, add_thread, False), (4, None, True)):
        result = run_script(*RESUME[run], "--num-epochs", epochs, cwd=folder, prepare=prepare)
        assert result.returncode == 0, result.stderr
        assert ("can differ by rounding" in result.stdout) == reported, result.stdout
        current, before = (threads + 1, threads) if prepare else (threads, threads + 1)
        assert not reported or f"threads {current} (before: {before})" in result.stdout
    environments = torch.load(last, weights_only=True)["training"]["environments"]
    assert [(environment["from_step"], environment["threads"]) for environment in environments] == [
        ("0", str(threads)), ("28", str(threads + 1)), ("84", str(threads))]
    assert read_args()["environments"] == environments

    contents = torch.load(last, weights_only=True)
    contents["training"]["environments"][-1]["torch"] = "1.0"
    checkpoint.save(last, contents)
    result = run_script(*RESUME[run], "--num-epochs", 5, cwd=folder)
    assert result.returncode == 0 and "torch " in result.stdout and "(before: 1.0)" in result.stdout, result.stderr
    for name in ("environments", "bfloat16"):
        del contents["training"][name]
    checkpoint.save(last, contents)
    result = run_script(*RESUME[run], "--num-epochs", 5, "--save-every", 100, cwd=folder)
    assert result.returncode == 0 and "differ" not in result.stdout, result.stderr


def test_finished_run_resumes_only_for_more_epochs(uninterrupted, make_folder, mnist_folder, tmp_path):
    """Two epochs plus a third equal three epochs, if the learning rate does not depend on their number."""
    run = VQVAE
    constant = [*run, "--lr-schedule", "constant"]
    folders = [make_folder(run, name) for name in ("three", "two")]
    for folder, epochs in zip(folders, (3, 2)):
        result = run_script(*constant, "--data-folder", mnist_folder, "--num-epochs", epochs, cwd=folder)
        assert result.returncode == 0, result.stderr
    before = snapshot(tmp_path)
    rejected = run_script(*RESUME[run], cwd=folders[1])
    assert rejected.returncode == 2 and "--num-epochs 2: the run ended after epoch 2, ask for more" in rejected.stderr
    assert snapshot(tmp_path) == before
    result = run_script(*RESUME[run], "--num-epochs", 3, cwd=folders[1])
    assert result.returncode == 0, result.stderr
    assert_same_run(*folders)


# ---------------------------------------------------------------- kills

def run_in_child(script, arguments, folder):
    """Target of the processes to be killed. They are forked, so that torch is not imported again."""
    os.chdir(folder)
    with open(folder / "output.log", "a") as output:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
    import_script(script).main(list(arguments))


def assert_files_complete(run, folder):
    """Every file under its final name must be complete."""
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
def test_killed_run_resumes_bit_for_bit(run, kills, uninterrupted, make_folder, mnist_folder):
    rng, num_kills, trial = random.Random(0), 0, 0
    start_flags = (*run[1:], "--data-folder", str(mnist_folder))
    while num_kills < kills:
        trial += 1
        folder, finished, max_seconds = make_folder(run, f"trial {trial}"), False, 0.5
        while not finished:
            # After a kill before the first save there is nothing to resume.
            arguments = RESUME[run][1:] if (folder / LAST[run]).is_file() else (*start_flags, "--overwrite")
            child = forkserver().Process(target=run_in_child, args=(run[0], arguments, folder))
            child.start()
            child.join(rng.uniform(0, max_seconds))
            killed = child.is_alive()
            child.kill()
            child.join()
            killed = killed and child.exitcode == -signal.SIGKILL
            output = (folder / "output.log").read_text() if not killed else ""
            run_had_ended = output.endswith("the run ended after epoch 3, ask for more\n")
            assert killed or child.exitcode == 0 or run_had_ended, output
            num_kills, finished = num_kills + (killed and (folder / LAST[run]).is_file()), not killed
            max_seconds *= 1.5
            assert_files_complete(run, folder)
        (folder / "output.log").unlink()
        assert_same_run(uninterrupted[run], folder)
