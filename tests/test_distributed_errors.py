"""Distributed training: processes that die, bad input, and the torchrun commands of the documentation."""

import functools
import os
import signal
import socket
from pathlib import Path

import pytest
import torch
from distributed_helpers import (
    LAST,
    RESUME,
    TIMEOUT,
    VQVAE,
    assert_losses_are_exact,
    run_processes,
    train,
    train_processes,
)
from helpers import ROOT, forkserver, import_script, readme_commands, snapshot
from test_resume import assert_same_run

from utils import distributed

# ---------------------------------------------------------------- a process dies

def test_run_resumes_bit_for_bit_after_a_process_dies(uneven_folder, tmp_path):
    """Either process is killed at step 16. The last run is then stopped by a signal at step 19, and resumed again."""
    flags = (*VQVAE, "--num-epochs", 3, "--save-every", 7, "--codebook-update", "ema", "--data-folder", uneven_folder)
    train_processes(2, tmp_path / "uninterrupted", *flags)
    assert_losses_are_exact(tmp_path / "uninterrupted", uneven_folder)
    start, end = "torchrun --nproc-per-node 2 ", " ".join(RESUME)           # the script's path is between them
    for killed_rank in (1, 0):
        folder = tmp_path / str(killed_rank)
        folder.mkdir()
        train_and_kill = functools.partial(train, send_signal=(killed_rank, 16, signal.SIGKILL))
        codes, output = run_processes(2, folder, train_and_kill, *flags)
        assert codes[killed_rank] == -signal.SIGKILL and codes[1 - killed_rank] == 2
        assert "error: another process of this run has died, or does not answer (" in output
        assert f"); the training has stopped, {LAST} is intact, resume with: {start}" in output
        assert output.endswith(f"/{end}\n")
        assert output.count(": error: ") == 1 and "Traceback" not in output
        assert torch.load(folder / LAST, weights_only=True)["step"] == 14

    train_and_stop = functools.partial(train, send_signal=(1, 19, signal.SIGTERM))
    codes, output = run_processes(2, folder, train_and_stop, *RESUME)
    assert codes == [128 + signal.SIGTERM] * 2 and output.count("Stopped by SIGTERM in epoch 2, after step 19;") == 1
    line = output.splitlines()[-1].strip()
    assert line.startswith(start) and line.endswith(f"/{end}")
    assert torch.load(folder / LAST, weights_only=True)["step"] == 19
    train_processes(2, folder, *RESUME)
    assert_same_run(tmp_path / "uninterrupted", folder)


def train_and_check_threads(script, *arguments):
    import_script(script).main([str(argument) for argument in arguments])
    names = [(task / "comm").read_text() for task in Path("/proc/self/task").iterdir()]
    assert not any("gloo" in name for name in names), names


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="needs /proc, for the names of threads")
def test_process_group_threads_end_before_interpreter_exit(mnist_folder, tmp_path):
    """Threads of gloo that are still running then may abort the process."""
    codes, output = run_processes(2, tmp_path, train_and_check_threads, *VQVAE, "--data-folder", mnist_folder)
    assert codes == [0, 0], output


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize("batch_size, words", [(61, "choose 60 or 62"), (1, "choose 2, or")])
def test_indivisible_batch_size_error_suggests_neighbours(batch_size, words, monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    assert distributed.per_process_batch_size(60) == 30
    with pytest.raises(ValueError, match=words):
        distributed.per_process_batch_size(batch_size)


def run_main(arguments, second_process_arguments=()):
    """VQ-VAE.py's main(), with additional arguments in the second process."""
    extra = second_process_arguments if os.environ["RANK"] == "1" else ()
    import_script("VQ-VAE.py").main([*arguments, *extra])


def test_bad_input_is_reported_once_by_any_process(mnist_folder, tmp_path):
    (tmp_path / "models" / "existing").mkdir(parents=True)
    (tmp_path / "models" / "existing" / "last.pt").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    before, flags = snapshot(tmp_path), ["--data-folder", str(mnist_folder), "--k", "16", "--hidden-size", "4"]
    for arguments, second_process_arguments, words in (
            (["--batch-size", "61"], [], "--batch-size 61: cannot be divided evenly by 2 processes: choose 60"),
            (["--k", "0"], [], "argument --k"),
            (["--output-folder", "existing"], [],                                               # found by rank 0
             "--output-folder existing: models/existing holds a run already"),
            ([], ["--data-folder", "file"], "--data-folder file: is a file"),                   # found by rank 1
            ([], ["--lr", "0.1"], "the processes have different arguments or data")):
        codes, output = run_processes(2, tmp_path, run_main, [*flags, *arguments], second_process_arguments)
        assert codes == [2, 2] and output.count("\n") == 1 and words in output and ": error: " in output, output
        assert snapshot(tmp_path) == before


# ---------------------------------------------------------------- docs/distributed.md

def launch(arguments, folder, log):
    """What torchrun does, in a process that has imported torch."""
    from torch.distributed import run

    os.chdir(folder)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    run.main(arguments)


def test_torchrun_commands_of_the_docs_train(mnist_folder, tmp_path):
    """With smaller settings, and two launchers on this machine in place of several machines."""
    commands = readme_commands("docs/distributed.md", "Distributed training")
    assert len(commands) == 3 and all(command[0] == "torchrun" for command in commands)
    small_flags = {"VQ-VAE.py": ["--hidden-size", "4", "--k", "16", "--batch-size", "60", "--num-epochs", "1"],
                   "train_prior.py": ["--layers", "1", "--width", "8", "--heads", "1", "--batch-size", "60",
                                      "--num-epochs", "1", "--shift", "0"]}
    with socket.create_server(("localhost", 0)) as server:
        free_port = str(server.getsockname()[1])
    for command in commands:
        num_launchers = 2 if "--nnodes" in command else 1
        words = [word.replace("HOST:29400", f"localhost:{free_port}") for word in command]
        if num_launchers == 2:
            words[words.index("--nproc-per-node") + 1] = "1"
        script = next(word for word in words if word.endswith(".py"))
        words[words.index(script)] = str(ROOT / script)
        if "--resume" in words:
            words += ["--num-epochs", "2"]
        else:
            words += [*small_flags[script], "--data-folder", str(mnist_folder)]
        logs = [tmp_path / f"launcher-{i}.log" for i in range(num_launchers)]
        launchers = [forkserver().Process(target=launch, args=(words[1:], tmp_path, log)) for log in logs]
        for launcher in launchers:
            launcher.start()
        for launcher in launchers:
            launcher.join(TIMEOUT)
        outputs = [log.read_text() for log in logs]
        assert [launcher.exitcode for launcher in launchers] == [0] * num_launchers, outputs
        assert sum(output.count("in 2 processes") for output in outputs) == 1, outputs
