"""What ends a training against its will: a full disk, a folder that goes, another run, a loss without bounds."""

import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time

import pytest
import torch
from helpers import give_up_privileges, import_script, refuse, run_script, snapshot, start, wait_for

import checkpoint
import files
import resume
from modules import VectorQuantizedVAE

RUN = ("VQ-VAE.py", "--output-folder", "run", "--batch-size", "20", "--num-epochs", "4", "--hidden-size", "8", "--k",
       "32", "--lr", "1e-3", "--save-every", "3")
RESUME = ("VQ-VAE.py", "--resume", "--output-folder", "run")
LAST = "models/run/last.pt"


def assert_whole(folder):
    """Every checkpoint can be read, and nothing temporary is left."""
    for path in (folder / "models").rglob("*.pt"):
        assert torch.load(path, weights_only=True)["model"]
    assert not list(folder.rglob(f"*{files.TEMPORARY}"))


def one_line(done, *words):
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


def test_memory_that_runs_out_in_a_training_is_told_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"^--batch-size 600: memory has run out"), \
            resume.kept(tmp_path / "last.pt", "", 600):
        torch.empty(2**58)
    with pytest.raises(RuntimeError, match="must match the size"), resume.kept(tmp_path / "last.pt", "", 600):
        torch.zeros(2) + torch.zeros(3)         # a fault of the code's is not hidden


# ---------------------------------------------------------------- disks

@pytest.fixture
def disk(tmp_path):
    """A function that mounts a file system of so many kB; it can be read-only."""
    mounted = []

    def mount(size, mode="rw"):
        folder = tmp_path / f"disk-{size}"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}k,{mode}", "tmpfs", str(folder)]
        if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("a file system cannot be mounted here: only root may, on Linux")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_ends_the_run_in_one_line_and_what_was_saved_goes_on(disk, mnist_folder):
    """At every size the disk is full at another file: the first ones, a checkpoint, the logs, the projector."""
    ends, whole = set(), (*RUN, "--data-folder", mnist_folder)
    for size in (12, 260, 420, 700, 1600):
        folder = disk(size)
        done = run_script(*whole, cwd=folder)
        if done.returncode == 0:
            ends.add("enough")
            continue
        one_line(done, "No space left on device")
        assert_whole(folder)
        last = folder / LAST
        if last.is_file():
            ends.add("saved")
            assert f"{LAST} is whole, go on with: python3 VQ-VAE.py --resume --output-folder run" in done.stderr
            subprocess.run(["mount", "-o", "remount,size=20m", str(folder)], check=True)
            step = torch.load(last, weights_only=True)["step"]
            again = run_script(*RESUME, cwd=folder)
            assert again.returncode == 0 and f"from step {step} on" in again.stdout, again.stderr
        else:
            ends.add("nothing saved")
            assert "nothing had been saved" in done.stderr and "go on with" not in done.stderr
    assert ends == {"enough", "saved", "nothing saved"}


def limit_files():
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))


def test_a_limit_on_the_size_of_files_ends_the_run_in_one_line(tmp_path, mnist_folder):
    """The same where nothing can be mounted: no file may be larger than 64 kB, and the first checkpoint is."""
    pytest.importorskip("resource", reason="no limits on this system")
    done = run_script(*RUN, "--k", "512", "--data-folder", mnist_folder, cwd=tmp_path, prepare=limit_files)
    one_line(done, "File too large", "nothing had been saved")
    assert_whole(tmp_path)


def test_pictures_figures_and_priors_on_a_full_disk(disk, trained, mnist_folder):
    folder, model = disk(8), trained / "models" / "run" / "best.pt"
    picture = run_script("generate.py", "--model", model, "--input", "random", cwd=folder)
    one_line(picture, "--filename random", "No space left on device")
    assert [path for path in folder.rglob("*") if path.is_file()] == []
    with pytest.raises(OSError), open(folder / "filler", "wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 1024)
    figures = run_script("evaluate.py", "--model", model, "--json", "out.json", cwd=folder)
    one_line(figures, "--json out.json", "No space left on device")
    assert snapshot(folder).keys() == {"filler", "generatedImages"}

    folder = disk(400)
    (folder / "models" / "run").mkdir(parents=True)
    small = {"format": 1, "kind": "vqvae", "dataset": {"name": "MNIST", "shape": [1, 28, 28]},
             "config": {"channels": 1, "hidden_size": 8, "num_codes": 16},
             "model": VectorQuantizedVAE(1, 8, 16).state_dict()}
    checkpoint.save(folder / "models" / "run" / "best.pt", small)
    prior = run_script("train_prior.py", "--model", "models/run/best.pt", "--data-folder", mnist_folder, "--layers", 1,
                       "--width", 60, "--num-epochs", 1, "--batch-size", 200, "--shift", 0, cwd=folder)
    one_line(prior, "No space left on device", "models/run/prior-last.pt is whole, go on with: python3 train_prior.py ")
    assert_whole(folder)


def test_a_read_only_disk_is_found_before_anything_else(disk, trained, mnist_folder, monkeypatch, capsys):
    folder = disk(20000)
    shutil.copytree(trained / "models", folder / "models")
    (folder / "prior").mkdir()
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "prior")
    before = snapshot(folder)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    monkeypatch.chdir(folder)
    small = ("--hidden-size", 8, "--data-folder", mnist_folder)
    for script, arguments, words in (
            ("VQ-VAE.py", small, "--output-folder vqvae: no permission to write in models"),
            ("VQ-VAE.py", (*small, "--overwrite", "--output-folder", "run"), "no permission to write in models/run"),
            ("VQ-VAE.py", ("--resume", "--output-folder", "run", "--num-epochs", 3),
             "--output-folder run: no permission to write in models/run"),
            ("train_prior.py", ("--model", "prior/best.pt"), "--model prior/best.pt: no permission to write in prior"),
            ("generate.py", ("--model", "prior/best.pt", "--input", "random"), "Read-only file system")):
        assert words in refuse(script, arguments, capsys)
        assert snapshot(folder) == before
    monkeypatch.undo()


# ---------------------------------------------------------------- folders that go

@pytest.mark.parametrize("gone", ["logs", "models"])
def test_a_folder_that_goes_during_the_run_ends_it_in_one_line(gone, tmp_path, mnist_folder):
    process = start(*RUN, "--num-epochs", "10000", "--data-folder", mnist_folder, cwd=tmp_path)
    wait_for((tmp_path / LAST).is_file, process)
    os.rename(tmp_path / gone, tmp_path / "elsewhere")
    process.stderr = process.communicate()[1]
    if gone == "logs":
        one_line(process, "logs/run: the folder has gone", f"{LAST} is whole, go on with: ")
        assert_whole(tmp_path)
        epoch = torch.load(tmp_path / LAST, weights_only=True)["training"]["progress"]["epoch"]
        again = run_script(*RESUME, "--num-epochs", epoch, cwd=tmp_path)
        assert again.returncode == 0 and (tmp_path / "logs" / "run").is_dir(), again.stderr
    else:
        one_line(process, "models/run/", ": No such file or directory", "nothing had been saved")


def close_after_the_first_epoch():
    def close():
        while not os.path.exists("models/run/model_1.pt"):
            time.sleep(0.001)
        os.chmod("models/run", 0o500)

    give_up_privileges()
    threading.Thread(target=close, daemon=True).start()


def test_a_folder_that_may_no_longer_be_written_to_ends_the_run_in_one_line(tmp_path, mnist_folder):
    done = run_script(*RUN, "--num-epochs", "10000", "--data-folder", mnist_folder, cwd=tmp_path,
                      prepare=close_after_the_first_epoch)
    os.chmod(tmp_path / "models" / "run", 0o700)
    one_line(done, "models/run/", "Permission denied", "is whole, go on with: ")
    assert torch.load(tmp_path / LAST, weights_only=True)["model"]      # a temporary file cannot be removed there


# ---------------------------------------------------------------- two runs at once

def test_a_second_run_on_a_folder_is_refused_until_the_first_is_dead(tmp_path, mnist_folder, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "run").mkdir(parents=True)
    process = start(*RUN, "--num-epochs", "10000", "--num-workers", 1, "--overwrite", "--data-folder", mnist_folder,
                    cwd=tmp_path)
    wait_for((tmp_path / "models" / "run" / "best.pt").is_file, process)
    process.send_signal(signal.SIGSTOP)         # it holds the folder, and leaves the processor to the others
    small = ("--data-folder", mnist_folder, "--num-epochs", 1)
    for script, *arguments in ((*RUN, *small, "--overwrite"), (*RESUME, *small),
                               ("train_prior.py", "--model", "models/run/best.pt", *small)):
        flag = "--model models/run/best.pt" if script == "train_prior.py" else "--output-folder run"
        assert f"{flag}: another run writes to models/run: wait" in refuse(script, arguments, capsys)
    assert process.poll() is None
    other = run_script(*RUN[:1], "--output-folder", "other", *RUN[3:], *small, cwd=tmp_path)
    assert other.returncode == 0, other.stderr
    process.kill()
    process.wait()
    again = run_script(*RUN, *small, "--overwrite", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert not [path for path in (tmp_path / "models" / "run").iterdir() if path.suffix not in (".pt", ".json", ".txt")]


def test_a_lock_is_free_when_its_holder_is_done(tmp_path):
    for _ in range(2):
        with files.locked(tmp_path / "a" / "b", "--flag"):
            assert (tmp_path / "a" / "b").is_dir()
            with pytest.raises(ValueError, match=r"^--flag: another run"), files.locked(tmp_path / "a" / "b", "--flag"):
                pass
    assert not list(tmp_path.iterdir())         # an empty folder that it made is no trace to leave


# ---------------------------------------------------------------- losses that are not finite

@pytest.mark.parametrize("script", ["VQ-VAE.py", "train_prior.py"])
def test_a_loss_that_is_not_finite_is_named_and_the_good_checkpoint_stays(script, tmp_path, trained, mnist_folder):
    """A run that was good for one epoch, and goes on with a rate that is written into its file."""
    folder = tmp_path / "models" / "run"
    if script == "VQ-VAE.py":
        begin, go_on, last = (*RUN, "--num-epochs", 1, "--save-every", 0), RESUME, folder / "last.pt"
    else:
        folder.mkdir(parents=True)
        shutil.copy(trained / "models" / "run" / "best.pt", folder)
        begin = (script, "--model", "models/run/best.pt", "--dataset", "MNIST", "--width", 12, "--layers", 1,
                 "--num-epochs", 1, "--shift", 0)
        go_on, last = (script, "--resume", "--model", "models/run/best.pt"), folder / "prior-last.pt"
    done = run_script(*begin, "--data-folder", mnist_folder, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    contents = torch.load(last, weights_only=True)
    contents["training"]["settings"]["lr"] = 1e30
    checkpoint.save(last, contents)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.name != "args.json"}
    failed = run_script(*go_on, "--num-epochs", 3, cwd=tmp_path)
    one_line(failed, "--lr 1e+30: the ")
    step = re.search(r"(\w+) loss of step (\d+), in epoch 2, is (nan|inf): try a lower rate; what was saved is from "
                     "before", failed.stderr)
    assert step and contents["step"] < int(step[2]) <= contents["step"] + 10
    assert step[1] in (("reconstruction", "codebook", "commitment") if script == "VQ-VAE.py" else ("prior",))
    assert {path: path.read_bytes() for path in folder.iterdir() if path.name != "args.json"} == before


def test_a_weight_that_is_not_finite_is_not_saved(tmp_path, mnist_folder):
    """The losses of a step are from before its update, and may still be finite."""
    script = import_script("VQ-VAE.py")
    run = script.Run(script.get_parser().parse_args(["--data-folder", str(mnist_folder), "--hidden-size", "8"]))
    run.save(tmp_path / "last.pt")
    before = snapshot(tmp_path)
    with torch.no_grad():
        run.model.decoder[3].bias[2] = torch.inf
    with pytest.raises(ValueError, match=r"--lr 0.0002: a weight is no finite number after step 0, in epoch 1"):
        run.save(tmp_path / "last.pt")
    assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- --resume that cannot be

def test_nothing_to_resume_and_settings_that_contradict_are_refused(tmp_path, trained, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("models", "logs"):
        shutil.copytree(trained / name, tmp_path / name)
    model_alone = torch.load(tmp_path / "models" / "run" / "model_1.pt", weights_only=True)
    (tmp_path / "models" / "alone").mkdir()
    checkpoint.save(tmp_path / "models" / "alone" / "last.pt", model_alone)
    before = snapshot(tmp_path)
    for arguments, words in (
            (("--output-folder", "no"), "--output-folder no: there is no models/no/last.pt to --resume: start"),
            (("--output-folder", "run", "--num-epochs", 3, "--lr", "1e-3"), "--lr 0.001 contradicts the run, which has "
             "--lr 0.004: leave it out; what may change is --num-epochs, --device, --data-folder, --num-workers"),
            (("--output-folder", "run", "--num-epochs", 3, "--beta", "2"), "--beta 2.0 contradicts"),
            (("--output-folder", "run", "--num-epochs", 3, "--overwrite"), "not allowed with argument"),
            (("--output-folder", "run"), "the run ended after epoch 2, ask for more"),
            (("--output-folder", "run", "--num-epochs", 1), "the run ended after epoch 2, ask for more"),
            (("--output-folder", "alone"), "--resume models/alone/last.pt: it holds a model, but not what is needed")):
        assert words in refuse("VQ-VAE.py", ["--resume", *arguments], capsys)
        assert snapshot(tmp_path) == before
    line = refuse("train_prior.py", ["--resume", "--model", "models/run/best.pt"], capsys)
    assert "there is no models/run/prior-last.pt to --resume" in line
    assert snapshot(tmp_path) == before
    assert json.loads((tmp_path / "models" / "run" / "args.json").read_text())["resume"] is False
