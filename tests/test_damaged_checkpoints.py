"""Hundreds of damaged or hostile checkpoints for every script that reads them: a one-line error, or success."""

import contextlib
import io
import itertools
import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch
from damage import damaged_copies
from helpers import forkserver, import_script, run_script, write_mnist
from test_published_network import published_state

import checkpoint
from utils import files

resource = pytest.importorskip("resource", reason="no limits on memory on this system")

# Damaged copies of each of five files: 80 are enough for every kind of damage in every script.
COPIES = int(os.environ.get("DAMAGED_COPIES", 80))
MAX_SECONDS = 30                # limit of CPU time for one script and file
MAX_MEMORY = 300 * 2**20        # limit of memory growth over all runs, in bytes


def readers(data):
    """{file: the command lines that read it}. Each takes less than a second on an undamaged file."""
    model, small_flags = ["--model", "models/run/best.pt"], ["--data-folder", data]
    stop = ["--data-folder", "a file"]         # an error after the checkpoint has been read
    return {
        "last.pt": [["VQ-VAE.py", "--resume", "--output-folder", "run"],
                    ["generate.py", "--model", "models/run/last.pt", *small_flags],
                    ["evaluate.py", "--model", "models/run/last.pt", *small_flags],
                    ["train_prior.py", "--model", "models/run/last.pt", "--overwrite", *stop]],
        "published.pt": [["generate.py", "--model", "models/run/published.pt", *small_flags],
                         ["evaluate.py", "--model", "models/run/published.pt", *small_flags]],
        "prior-last.pt": [["train_prior.py", "--resume", *model],
                          ["generate.py", *model, "--input", "prior", "--prior", "models/run/prior-last.pt"],
                          ["evaluate.py", *model, *small_flags, "--prior", "models/run/prior-last.pt"]],
        "prior.pt": [["generate.py", *model, "--input", "prior"],
                     ["train_prior.py", *model, "--overwrite", *stop]],
        "classifier.pt": [["evaluate.py", *model, *small_flags, "--prior", "models/run/prior.pt", "--classifier",
                           "models/run/classifier.pt"],
                          ["train_classifier.py", "--output", "run/classifier", "--overwrite", *stop]]}


class TimeLimitExceeded(BaseException):
    """A BaseException, so that no script reports it as bad input."""


def raise_time_limit(*_):
    raise TimeLimitExceeded(f"more than {MAX_SECONDS} s")


def run_main(main, arguments):
    """Run a script's main(). → 0, "refused" for a one-line error, or a description of any other end."""
    stdout, stderr, status = io.StringIO(), io.StringIO(), 0
    signal.setitimer(signal.ITIMER_PROF, MAX_SECONDS)
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main(arguments)
    except SystemExit as error:
        status = error.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    *before, line = stderr.getvalue().splitlines() or [""]
    if status == 2 and not before and len(line) < 4000 and ".py: error: " in line:
        return "refused"
    return 0 if status == 0 else f"{status} {stderr.getvalue()[:2000]}"


def run_all(folder, data, results):
    """Run every script on many damaged files, in this process, and write outcomes and memory growth."""
    os.chdir(folder)
    signal.signal(signal.SIGPROF, raise_time_limit)
    mains = {name: import_script(name) for name in ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py",
                                                    "evaluate.py")}
    mains["evaluate.py"].NUM_SAMPLES = 20
    sys.argv = ["script.py"]
    outcomes = []

    def run_readers(readers, name, kind, content):
        path = Path("models", "run", name)
        for script, *arguments in readers:
            path.write_bytes(content)
            outcome = run_main(mains[script].main, arguments)
            if outcome == "refused" and path.read_bytes() != content:
                outcome = "the file was changed"
            if outcome != "refused":        # it ran, and may have written files
                shutil.rmtree("generatedImages", ignore_errors=True)
                for part in ("models", "logs"):
                    shutil.rmtree(part)
                    shutil.copytree(Path("good", part), part)
            outcomes.append([name, kind, " ".join([script, *arguments]), outcome])
        shutil.copy(Path("good", "models", "run", name), path)

    for name in readers(data):
        run_readers(readers(data)[name], name, "good", Path("models", "run", name).read_bytes())
    initial_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 8 * 2**30          # only a safety net, far above MAX_MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in readers(data):
        checkpoint_bytes = Path("models", "run", name).read_bytes()
        reader_cycle = itertools.cycle([reader] for reader in readers(data)[name])   # every kind reaches every script
        for kind, content in itertools.islice(damaged_copies(checkpoint_bytes, random.Random(name)), COPIES):
            run_readers(next(reader_cycle), name, kind, content)
    memory_growth = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - initial_memory)
    results.write_text(json.dumps({"outcomes": outcomes, "memory_growth": memory_growth}))


@pytest.fixture
def folder(tmp_path):
    """A small run with every kind of checkpoint, to be resumed for one epoch, and a copy of it in good/."""
    write_mnist(tmp_path / "data" / "MNIST" / "raw", train=120, test=40)
    run, small_flags = tmp_path / "models" / "run", ("--data-folder", "data", "--num-epochs", 1, "--batch-size", 20)
    for command in (("VQ-VAE.py", "--output-folder", "run", "--hidden-size", 8, "--k", 16, *small_flags),
                    ("train_prior.py", "--model", "models/run/best.pt", "--layers", 1, "--width", 12, *small_flags)):
        result = run_script(*command, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    for name in ("last.pt", "prior-last.pt"):
        contents = torch.load(run / name, weights_only=True)
        contents["training"]["settings"]["num_epochs"] = 2
        checkpoint.save(run / name, contents)
    checkpoint.save(run / "published.pt", published_state())
    shutil.copy(checkpoint.CLASSIFIER, run)
    (tmp_path / "a file").touch()
    for part in ("models", "logs"):
        shutil.copytree(tmp_path / part, tmp_path / "good" / part)
    return tmp_path


def test_damaged_checkpoints_get_one_line_errors(folder):
    results = folder / "results.json"
    process = forkserver().Process(target=run_all, args=(folder, "data", results))
    process.start()
    process.join()
    assert process.exitcode == 0
    report = json.loads(results.read_text())
    failures = [outcome for outcome in report["outcomes"] if outcome[-1] not in (0, "refused")]
    assert not failures, f"{len(failures)}: " + "\n".join(map(str, failures[:9]))
    assert report["memory_growth"] < MAX_MEMORY
    assert not list(folder.rglob("EXPLODED")) and not list(folder.rglob(f"*{files.TEMPORARY}"))

    by_kind = {}
    for name, kind, command, outcome in report["outcomes"]:
        by_kind.setdefault((kind, command, name), []).append(outcome)
    for (kind, command, _), outcomes in by_kind.items():
        if kind == "good":
            assert outcomes == ["refused" if "a file" in command else 0], command
        elif kind in ("truncated", "compressed", "code", "only code", "huge bytearray", "overlapping parts"):
            assert set(outcomes) == {"refused"}, (kind, command)
    assert sum(kind != "good" for _, kind, *_ in report["outcomes"]) == 5 * COPIES
    kinds_by_command = {}
    for _, kind, command, _ in report["outcomes"]:
        kinds_by_command.setdefault(command, set()).add(kind)
    all_kinds = set.union(*kinds_by_command.values())        # two kinds do not apply to every file
    assert all(len(kinds) >= len(all_kinds) - 2 for kinds in kinds_by_command.values())
