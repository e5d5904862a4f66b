"""Errors during training: full disk, removed folder, second run on the same folder, non-finite losses."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from unittest import mock

import pytest
import torch
from helpers import build_trainer, drop_capabilities, expect_usage_error, run_script, snapshot, start_script, wait_for
from test_resume import assert_same_run

import checkpoint
import data
import metrics
from modules import VectorQuantizedVAE
from utils import files, interruptions, tensorboard_logs

RUN = ("VQ-VAE.py", "--output-folder", "run", "--batch-size", "20", "--num-epochs", "4", "--hidden-size", "8", "--k",
       "32", "--lr", "1e-3", "--save-every", "3")
RESUME = ("VQ-VAE.py", "--resume", "--output-folder", "run")
LAST = "models/run/last.pt"


def assert_checkpoints_readable(folder):
    """Every checkpoint loads, and no temporary file is left."""
    for path in (folder / "models").rglob("*.pt"):
        assert torch.load(path, weights_only=True)["model"]
    assert not list(folder.rglob(f"*{files.TEMPORARY}"))


def assert_one_line_error(result, *words):
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr, result.stderr


def test_out_of_memory_error_names_what_asked_for_memory(tmp_path):
    def out_of_memory():
        return "--batch-size 600: memory has run out"

    for allocate in (lambda: torch.empty(2**58), lambda: [None] * 2**60):
        with pytest.raises(ValueError, match=r"^--batch-size 600: memory has run out$"), \
                interruptions.explain_errors(out_of_memory):
            allocate()
    with pytest.raises(RuntimeError, match="must match the size"), interruptions.explain_errors(out_of_memory):
        torch.zeros(2) + torch.zeros(3)         # a bug is not hidden
    for batch_size, in_step, parts in ((8, True, ("--batch-size 8", "a training step", "choose a smaller one")),
                                       (1, True, ("--batch-size 1", "a training step", "smaller --hidden-size or --k")),
                                       (8, False, ("the evaluation after epoch 1", "smaller --hidden-size or --k"))):
        trainer = build_trainer(tmp_path, "--dataset", "MNIST-10k", "--batch-size", batch_size)[1]
        trainer.in_step = in_step
        assert all(part in trainer.out_of_memory() for part in parts), trainer.out_of_memory()


def kill_worker():
    """Kill the process that loads images, when it loads the tenth batch."""
    load, calls = data.Images.__getitem__, []

    def load_or_die(self, rows):
        calls.append(rows)
        if torch.utils.data.get_worker_info() and len(calls) == 10:
            os.kill(os.getpid(), signal.SIGKILL)
        return load(self, rows)

    data.Images.__getitems__ = load_or_die


def test_killed_worker_process_is_one_line(mnist_folder, tmp_path):
    result = run_script(*RUN, "--num-workers", 1, "--data-folder", mnist_folder, cwd=tmp_path, prepare=kill_worker)
    assert_one_line_error(result, "a process that loads images has died", f"{LAST} is intact, resume with: ")
    assert 0 < torch.load(tmp_path / LAST, weights_only=True)["step"] < 30


@pytest.mark.skipif(not files.fcntl, reason="no locks")
def test_folder_that_cannot_be_locked_is_used_with_a_warning(tmp_path, monkeypatch, capsys):
    for number in (errno.ENOLCK, errno.ENOSYS):
        monkeypatch.setattr(files.fcntl, "flock", mock.Mock(side_effect=OSError(number, "No locks available")))
        with files.locked_folder(tmp_path / "run", "--output-folder run"):
            pass
        assert f"{tmp_path / 'run'} cannot be locked (No locks available)" in capsys.readouterr().err
    monkeypatch.setattr(files.fcntl, "flock", mock.Mock(side_effect=OSError(errno.EIO, "a disk that fails")))
    with pytest.raises(OSError, match="a disk that fails"), files.locked_folder(tmp_path / "run", ""):
        pass


# ---------------------------------------------------------------- save first, log later

def break_pictures():
    def fail(*_, **__):
        raise RuntimeError("can't allocate memory: you tried to allocate 99 bytes")

    tensorboard_logs.log_images = tensorboard_logs.log_codebook = fail


def test_failing_pictures_cost_a_line_each_and_no_model(mnist_folder, tmp_path):
    result = run_script(*RUN, "--num-epochs", 2, "--data-folder", mnist_folder, cwd=tmp_path, prepare=break_pictures)
    lines = result.stderr.splitlines()
    assert result.returncode == 0 and len(lines) == 4, result.stderr        # epochs 0, 1 and 2, and the projector
    assert all(line.startswith("Not logged: ") and line.endswith("; the training continues") for line in lines)
    for name in ("best.pt", "last.pt", "model_1.pt", "model_2.pt"):
        assert (tmp_path / "models" / "run" / name).is_file()
    assert_checkpoints_readable(tmp_path)


def crash_in_pictures():
    tensorboard_logs.log_images = lambda *_, **__: os._exit(139)


def test_crash_in_the_first_pictures_leaves_a_run_to_resume(mnist_folder, tmp_path):
    run = (*RUN, "--num-epochs", 1, "--data-folder", mnist_folder)
    assert run_script(*run, cwd=tmp_path, prepare=crash_in_pictures).returncode == 139
    assert torch.load(tmp_path / LAST, weights_only=True)["step"] == 0
    assert run_script(*RESUME, cwd=tmp_path).returncode == 0
    assert torch.load(tmp_path / LAST, weights_only=True)["epoch"] == 1


def break_evaluation():
    def fail(*_):
        raise MemoryError

    metrics.evaluate = fail


def test_failing_evaluation_loses_no_step_of_its_epoch(mnist_folder, tmp_path):
    run = (*RUN, "--num-epochs", 2, "--save-every", 0, "--data-folder", mnist_folder)
    for name in ("uninterrupted", "interrupted"):
        (tmp_path / name).mkdir()
    assert run_script(*run, cwd=tmp_path / "uninterrupted").returncode == 0
    folder = tmp_path / "interrupted"
    result = run_script(*run, cwd=folder, prepare=break_evaluation)
    assert_one_line_error(result, "memory has run out in the evaluation after epoch 1: choose a smaller "
                          "--hidden-size or --k", f"{LAST} is intact, with more memory resume")
    assert torch.load(folder / LAST, weights_only=True)["step"] == 28       # all of the first epoch
    assert run_script(*RESUME, cwd=folder).returncode == 0
    assert_same_run(tmp_path / "uninterrupted", folder)


# ---------------------------------------------------------------- disks

@pytest.fixture
def disk(tmp_path):
    """A function mount(size in kB) → a folder with a tmpfs of that size."""
    mounted = []

    def mount(size, access="rw"):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k,{access}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system needs Linux and root")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_ends_the_run_and_the_saved_state_resumes(disk, mnist_folder):
    """Each size fills up at a different file: the first files, a checkpoint, the logs, the projector."""
    outcomes, command = set(), (*RUN, "--data-folder", mnist_folder)
    for size in (12, 260, 420, 700, 1600):
        folder = disk(size)
        result = run_script(*command, cwd=folder)
        if result.returncode == 0:
            outcomes.add("enough")
            continue
        assert_one_line_error(result, "No space left on device")
        assert_checkpoints_readable(folder)
        last = folder / LAST
        if last.is_file():
            outcomes.add("saved")
            assert f"{LAST} is intact, resume with: python3 " in result.stderr
            assert "/VQ-VAE.py --resume --output-folder run" in result.stderr
            subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
            step = torch.load(last, weights_only=True)["step"]
            resumed = run_script(*RESUME, cwd=folder)
            assert resumed.returncode == 0 and f"from step {step} on" in resumed.stdout, resumed.stderr
        else:
            outcomes.add("nothing saved")
            assert "resume with" not in result.stderr and not list(folder.rglob("*.pt"))
    assert outcomes == {"enough", "saved", "nothing saved"}


def limit_file_size():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def test_file_size_limit_ends_the_run_with_a_one_line_error(tmp_path, mnist_folder):
    """The same where nothing can be mounted: files are limited to 64 kB, and the first checkpoint is larger."""
    pytest.importorskip("resource", reason="no limits on this system")
    result = run_script(*RUN, "--k", "512", "--data-folder", mnist_folder, cwd=tmp_path, prepare=limit_file_size)
    assert_one_line_error(result, "--output-folder run: models/run/last.pt: File too large")
    assert not list(tmp_path.iterdir())


def test_full_disk_errors_of_the_other_scripts(disk, trained, mnist_folder):
    folder, model = disk(8), trained / "models" / "run" / "best.pt"
    result = run_script("generate.py", "--model", model, "--input", "random", cwd=folder)
    assert_one_line_error(result, "--filename random", "No space left on device")
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    with pytest.raises(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 1024)
    result = run_script("evaluate.py", "--model", model, "--json", "out.json", cwd=folder)
    assert_one_line_error(result, "--json out.json", "No space left on device")
    assert snapshot(folder).keys() == {"filler", "generatedImages"}

    folder = disk(400)
    (folder / "models" / "run").mkdir(parents=True)
    contents = {"format": 1, "kind": "vqvae", "dataset": {"name": "MNIST", "shape": [1, 28, 28]},
                "config": {"channels": 1, "hidden_size": 8, "num_codes": 16},
                "model": VectorQuantizedVAE(1, 8, 16).state_dict()}
    checkpoint.save(folder / "models" / "run" / "best.pt", contents)
    result = run_script("train_prior.py", "--model", "models/run/best.pt", "--data-folder", mnist_folder, "--layers", 1,
                       "--width", 60, "--num-epochs", 1, "--batch-size", 200, "--shift", 0, cwd=folder)
    assert_one_line_error(result, "No space left on device",
                          "models/run/prior-last.pt is intact, resume with: python3 ", "/train_prior.py --resume ")
    assert_checkpoints_readable(folder)


def test_read_only_disk_is_detected_before_any_work(disk, trained, mnist_folder, monkeypatch, capsys):
    folder = disk(20000)
    shutil.copytree(trained / "models", folder / "models")
    (folder / "prior").mkdir()
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "prior")
    before = snapshot(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    monkeypatch.chdir(folder)
    small_flags = ("--hidden-size", 8, "--data-folder", mnist_folder)
    for script, arguments, words in (
            ("VQ-VAE.py", small_flags, "--output-folder vqvae: no permission to write in models"),
            ("VQ-VAE.py", (*small_flags, "--overwrite", "--output-folder", "run"),
             "no permission to write in models/run"),
            ("VQ-VAE.py", ("--resume", "--output-folder", "run", "--num-epochs", 3),
             "--output-folder run: no permission to write in models/run"),
            ("train_prior.py", ("--model", "prior/best.pt"), "--model prior/best.pt: no permission to write in prior"),
            ("generate.py", ("--model", "prior/best.pt", "--input", "random"), "no permission to write in .")):
        assert words in expect_usage_error(script, arguments, capsys)
        assert snapshot(folder) == before
    monkeypatch.undo()


# ---------------------------------------------------------------- folders removed or locked

@pytest.mark.parametrize("folder", ["logs", "models"])
def test_removed_folder_ends_the_run_with_a_one_line_error(folder, tmp_path, mnist_folder):
    process = start_script(*RUN, "--num-epochs", "10000", "--data-folder", mnist_folder, cwd=tmp_path)
    wait_for((tmp_path / "models" / "run" / "model_1.pt").is_file, process)
    os.rename(tmp_path / folder, tmp_path / "elsewhere")
    process.stderr = process.communicate()[1]
    if folder == "logs":
        assert_one_line_error(process, "logs/run: the folder has been removed", f"{LAST} is intact, resume with: ")
        assert_checkpoints_readable(tmp_path)
        epoch = torch.load(tmp_path / LAST, weights_only=True)["training"]["progress"]["epoch"]
        resumed = run_script(*RESUME, "--num-epochs", epoch, cwd=tmp_path)
        assert resumed.returncode == 0 and (tmp_path / "logs" / "run").is_dir(), resumed.stderr
    else:
        assert_one_line_error(process, "models/run/", ": No such file or directory", "nothing had been saved")


def lock_folder_after_first_epoch():
    def lock_folder():
        while not os.path.exists("models/run/model_1.pt"):
            time.sleep(0.001)
        os.chmod("models/run", 0o500)

    drop_capabilities()
    threading.Thread(target=lock_folder, daemon=True).start()


def test_locked_folder_ends_the_run_with_a_one_line_error(tmp_path, mnist_folder):
    result = run_script(*RUN, "--num-epochs", "10000", "--data-folder", mnist_folder, cwd=tmp_path,
                        prepare=lock_folder_after_first_epoch)
    os.chmod(tmp_path / "models" / "run", 0o700)
    assert_one_line_error(result, "models/run/", "Permission denied", "is intact, resume with: ")
    assert torch.load(tmp_path / LAST, weights_only=True)["model"]      # the temporary file cannot be removed there


# ---------------------------------------------------------------- two runs at once

def test_second_run_on_a_folder_is_rejected_while_the_first_lives(tmp_path, mnist_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "run").mkdir(parents=True)
    process = start_script(*RUN, "--num-epochs", "10000", "--num-workers", 1, "--overwrite", "--data-folder",
                           mnist_folder, cwd=tmp_path)
    wait_for((tmp_path / "models" / "run" / "best.pt").is_file, process)
    process.send_signal(signal.SIGSTOP)         # it keeps its lock and uses no CPU time
    small_flags = ("--data-folder", mnist_folder, "--num-epochs", 1)
    for script, *arguments in ((*RUN, *small_flags, "--overwrite"), (*RESUME, *small_flags),
                               ("train_prior.py", "--model", "models/run/best.pt", *small_flags)):
        flag = "--model models/run/best.pt" if script == "train_prior.py" else "--output-folder run"
        assert f"{flag}: another run writes to models/run: wait" in expect_usage_error(script, arguments, capsys)
    assert process.poll() is None
    other = run_script(*RUN[:1], "--output-folder", "other", *RUN[3:], *small_flags, cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    process.kill()
    process.wait()
    resumed = run_script(*RUN, *small_flags, "--overwrite", cwd=tmp_path)
    assert resumed.returncode == 0, resumed.stderr
    assert not [path for path in (tmp_path / "models" / "run").iterdir() if path.suffix not in (".pt", ".json", ".txt")]


def test_lock_is_released_by_its_holder(tmp_path):
    for _ in range(2):
        with files.locked_folder(tmp_path / "a" / "b", "--flag"):
            assert (tmp_path / "a" / "b").is_dir()
            with pytest.raises(ValueError, match=r"^--flag: another run"), \
                    files.locked_folder(tmp_path / "a" / "b", "--flag"):
                pass
    assert not list(tmp_path.iterdir())         # empty folders that it created are removed


# ---------------------------------------------------------------- losses that are not finite

@pytest.mark.parametrize("script", ["VQ-VAE.py", "train_prior.py"])
def test_nonfinite_loss_is_named_and_the_good_checkpoint_kept(script, tmp_path, trained, mnist_folder):
    """A run of one good epoch resumes with a huge learning rate, written into its checkpoint."""
    folder = tmp_path / "models" / "run"
    if script == "VQ-VAE.py":
        start, resume, last = (*RUN, "--num-epochs", 1, "--save-every", 0), RESUME, folder / "last.pt"
    else:
        folder.mkdir(parents=True)
        shutil.copy(trained / "models" / "run" / "best.pt", folder)
        start = (script, "--model", "models/run/best.pt", "--dataset", "MNIST", "--width", 12, "--layers", 1,
                 "--num-epochs", 1, "--shift", 0)
        resume, last = (script, "--resume", "--model", "models/run/best.pt"), folder / "prior-last.pt"
    result = run_script(*start, "--data-folder", mnist_folder, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    contents = torch.load(last, weights_only=True)
    contents["training"]["settings"]["lr"] = 1e30
    checkpoint.save(last, contents)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "args.json"}
    result = run_script(*resume, "--num-epochs", 3, cwd=tmp_path)
    assert_one_line_error(result, "--lr 1e+30: the ")
    step = re.search(r"(\w+) loss of step (\d+), in epoch 2, is (nan|inf): try a lower rate; the files saved so far "
                     "predate it", result.stderr)
    assert step and contents["step"] < int(step[2]) <= contents["step"] + 10
    assert step[1] in (("reconstruction", "codebook", "commitment") if script == "VQ-VAE.py" else ("prior",))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "args.json"} == before


def test_nonfinite_weights_are_not_saved(tmp_path, mnist_folder):
    """The losses of a step are computed before its update, and may still be finite."""
    _, trainer, _ = build_trainer(tmp_path, "--data-folder", mnist_folder, "--hidden-size", 8)
    trainer.writer = mock.Mock()
    trainer.save_checkpoint()
    before = snapshot(tmp_path)
    with torch.no_grad():
        trainer.model.decoder[3].bias[2] = torch.inf
    with pytest.raises(ValueError, match=r"--lr 0.0002: a weight is not finite after step 0, in epoch 1"):
        trainer.save_checkpoint()
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- invalid --resume

def test_resume_rejects_missing_runs_and_contradicting_settings(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("models", "logs"):
        shutil.copytree(trained / name, tmp_path / name)
    model = torch.load(tmp_path / "models" / "run" / "model_1.pt", weights_only=True)
    (tmp_path / "models" / "weights").mkdir()
    checkpoint.save(tmp_path / "models" / "weights" / "last.pt", model)
    before = snapshot(tmp_path)
    for arguments, words in (
            (("--output-folder", "no"), "--output-folder no: there is no models/no/last.pt to --resume: start"),
            (("--output-folder", "run", "--num-epochs", 3, "--lr", "1e-3"), "--lr 0.001 contradicts the run, which has "
             "--lr 0.004: leave it out; what may change is --num-epochs, --device, --data-folder, --num-workers"),
            (("--output-folder", "run", "--num-epochs", 3, "--beta", "2"), "--beta 2.0 contradicts"),
            (("--output-folder", "run", "--num-epochs", 3, "--overwrite"), "not allowed with argument"),
            (("--output-folder", "run"), "the run ended after epoch 2, ask for more"),
            (("--output-folder", "run", "--num-epochs", 1), "the run ended after epoch 2, ask for more"),
            (("--output-folder", "weights"),
             "--resume models/weights/last.pt: it holds a model, but not what is needed")):
        assert words in expect_usage_error("VQ-VAE.py", ["--resume", *arguments], capsys)
        assert snapshot(tmp_path) == before
    line = expect_usage_error("train_prior.py", ["--resume", "--model", "models/run/best.pt"], capsys)
    assert "there is no models/run/prior-last.pt to --resume" in line
    assert snapshot(tmp_path) == before
    assert json.loads((tmp_path / "models" / "run" / "args.json").read_text())["resume"] is False
