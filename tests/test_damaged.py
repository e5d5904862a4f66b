"""Damaged and hostile checkpoints, more than a thousand, to every script that reads them: one line, or it works."""

import contextlib
import copy
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from helpers import import_script, processes, run_script, write_mnist
from test_published_network import published_state

import checkpoint
import files

resource = pytest.importorskip("resource", reason="no limits on memory on this system")

DAMAGED = 210               # of each of five files
SECONDS = 30                # of the processor, for one script on one of them
MEMORY = 300 * 2**20        # bytes that all of it together may add
VALUES = [None, True, -1, 0, 7, 2**31, 2**62, 10**30, 1e308, math.nan, "", "text", "\n" * 9, b"\0", [], {}, [[[]]],
          torch.zeros(()), torch.zeros(0), torch.full((3,), math.nan), torch.zeros(1).expand(2**40),
          torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(), torch.zeros(3, dtype=torch.int8)]


class Bomb:
    """Whoever reads it as pickles are read makes the file EXPLODED."""

    def __reduce__(self):
        return open, ("EXPLODED", "w")


# ---------------------------------------------------------------- damage

def places(value, place=()):
    """Every key of every dictionary and list in a checkpoint, as paths. Of long lists, the first ones."""
    found = [place] if place else []
    keys = value if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list | tuple) else ()
    return found + [other for key in keys for other in places(value[key], (*place, key))]


def changed(contents, place, change):
    """A copy of a checkpoint in which change(container, key) has been done at a place."""
    contents = copy.deepcopy(contents)
    container = contents
    for key in place[:-1]:
        container = container[key]
    if isinstance(container, tuple):
        return None
    change(container, place[-1])
    return contents


def written(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def in_the_archive(whole, change, compression=zipfile.ZIP_STORED):
    """The archive with its parts changed by change(name, bytes), the checksums made to fit."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, change(name, old.read(name)))
    return buffer.getvalue()


def flipped(chance, data, most=8):
    data = bytearray(data)
    for _ in range(chance.randint(1, most)):
        if data:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    return bytes(data)


def damaged(whole, chance):
    """Endlessly, (what was done, bytes) from the bytes of a good checkpoint."""
    contents = torch.load(io.BytesIO(whole), weights_only=True)
    everywhere = places(contents)
    numbers = [place for place in everywhere if place[0] in ("config", "dataset") or place[:2] in (
        ("training", "settings"), ("training", "progress"))] or everywhere
    tensors = [place for place in everywhere if place[0] == "model" and len(place) > 1] or everywhere

    def other_value(container, key):
        container[key] = chance.choice(VALUES)

    def other_tensor(container, key):
        value = container[key]
        if not torch.is_tensor(value):
            return
        container[key] = chance.choice([
            lambda: value.flatten(), lambda: value[:-1] if value.dim() else value, lambda: value.double(),
            lambda: value.unsqueeze(0), lambda: value.T if value.dim() == 2 else value, lambda: value * math.nan,
            lambda: value * math.inf, lambda: value * 1e30, lambda: value.half(),
            lambda: value.new_zeros(1).expand(10**6, 10**6)])()

    def remove(container, key):
        del container[key]

    def add(container, _key):
        if isinstance(container, dict):
            container[chance.choice(["extra", "", 5, None])] = chance.choice(VALUES)

    def explode(container, key):
        container[key] = Bomb()

    def huge(container, key):
        container[key] = chance.choice([10**5, 10**6, 10**9, 2**31, 2**40, 2**62])

    def trap():
        """What a file can ask for that it does not hold, or holds once and shows often."""
        bad = copy.deepcopy(contents)
        training = bad.get("training", {"settings": {}, "progress": {}, "optimizer": {0: {}}})
        config, settings, progress = bad.get("config", {}), training["settings"], training["progress"]
        nested, often = ["x"], "text" * 10**5
        for _ in range(40):
            nested = [nested, nested]
        deep = []
        for _ in range(150):
            deep = [deep]
        zero_stride = next(iter(training["optimizer"].values()))
        chance.choice([
            lambda: settings.update(num_workers=10**5), lambda: config.update(layers=10**6),
            lambda: settings.update(layers=10**6), lambda: settings.update(k=3 * 10**8, hidden_size=6000, width=60000),
            lambda: progress.update(track=["1 2"] * 10**5, epoch=10**5), lambda: progress.update(epoch=2**40),
            lambda: bad.update(format=nested), lambda: bad.update(format=deep), lambda: config.update(channels=nested),
            lambda: settings.update(lr=nested), lambda: bad.update(training=chance.choice([7, "text", [1], deep])),
            lambda: zero_stride.update(exp_avg=torch.zeros(1).expand(300, 300), padding=often),
            lambda: settings.update(device="cuda:999", seed=often), lambda: settings.update(lr=[often] * 10**5),
            lambda: bad.update(dataset={"name": "MNIST", "shape": [1, 4096, 4096]})])()
        return bad

    def overlapping():
        """An archive whose directory names the same bytes again and again."""
        with zipfile.ZipFile(io.BytesIO(whole)) as archive:
            largest = max(archive.infolist(), key=lambda part: part.file_size)
        buffer = io.BytesIO(whole)
        with zipfile.ZipFile(buffer, "a") as archive:
            for i in range(2000):
                again = copy.copy(largest)
                again.filename = again.orig_filename = f"{largest.filename}{i}"
                archive.filelist.append(again)
            archive._didModify = True
        return buffer.getvalue()

    kinds = {
        "trap": trap, "overlapping parts": overlapping,
        "bytearray": lambda: in_the_archive(whole, lambda name, data: b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R."
                                            if name.endswith("data.pkl") else data),
        "cut off": lambda: whole[:chance.randrange(len(whole))],
        "flipped bits": lambda: flipped(chance, whole),
        "zeros": lambda: (lambda i: whole[:i] + bytes(min(512, len(whole) - i)) + whole[i + 512:])(
            chance.randrange(len(whole))),
        "more bytes": lambda: (lambda i: whole[:i] + chance.randbytes(chance.randint(1, 99)) + whole[i:])(
            chance.randrange(len(whole))),
        "flipped pickle": lambda: in_the_archive(whole, lambda name, data: flipped(chance, data, 3)
                                                 if name.endswith("data.pkl") else data),
        "flipped numbers": lambda: in_the_archive(whole, lambda name, data: flipped(chance, data)
                                                  if "/data/" in name and chance.random() < 0.3 else data),
        "compressed": lambda: in_the_archive(whole, lambda name, data: data + bytes(2**20)
                                             if name.endswith("/data/0") else data, zipfile.ZIP_DEFLATED),
        "other value": lambda: changed(contents, chance.choice(everywhere), other_value),
        "other number": lambda: changed(contents, chance.choice(numbers), other_value),
        "huge number": lambda: changed(contents, chance.choice(numbers), huge),
        "other tensor": lambda: changed(contents, chance.choice(tensors), other_tensor),
        "missing": lambda: changed(contents, chance.choice(everywhere), remove),
        "more keys": lambda: changed(contents, chance.choice(everywhere), add),
        "bomb": lambda: changed(contents, chance.choice(everywhere), explode),
        "bare bomb": lambda: pickle.dumps(chance.choice([Bomb(), {"model": Bomb()}, [Bomb()] * 3])),
        "old format": lambda: written(changed(contents, chance.choice(everywhere), chance.choice([explode, remove])),
                                      _use_new_zipfile_serialization=False)}
    while True:
        for name, damage in kinds.items():
            result = damage()
            if result is not None:
                yield name, result if isinstance(result, bytes) else written(result)


# ---------------------------------------------------------------- the scripts

def readers(data):
    """For each file, the command lines that read it; all are over in a second if it is good."""
    model, small, stop = ["--model", "models/run/best.pt"], ["--data-folder", data], ["--data-folder", "a file"]
    return {
        "last.pt": [["VQ-VAE.py", "--resume", "--output-folder", "run"],
                    ["generate.py", "--model", "models/run/last.pt", *small],
                    ["evaluate.py", "--model", "models/run/last.pt", *small],
                    ["train_prior.py", "--model", "models/run/last.pt", "--overwrite", *stop]],
        "published.pt": [["generate.py", "--model", "models/run/published.pt", *small],
                         ["evaluate.py", "--model", "models/run/published.pt", *small]],
        "prior-last.pt": [["train_prior.py", "--resume", *model],
                          ["generate.py", *model, "--input", "prior", "--prior", "models/run/prior-last.pt"],
                          ["evaluate.py", *model, *small, "--prior", "models/run/prior-last.pt"]],
        "prior.pt": [["generate.py", *model, "--input", "prior"],
                     ["train_prior.py", *model, "--overwrite", *stop]],
        "classifier.pt": [["evaluate.py", *model, *small, "--prior", "models/run/prior.pt", "--classifier",
                           "models/run/classifier.pt"],
                          ["train_classifier.py", "--output", "run/classifier", "--overwrite", *stop]]}


class Late(BaseException):
    """No error that a script may take for bad input."""


def late(*_):
    raise Late(f"not done after {SECONDS} s")


def attempt(main, arguments):
    """Run a script's main(). → 0, "refused", or what it did instead."""
    said, complaint, status = io.StringIO(), io.StringIO(), 0
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(complaint):
            main(arguments)
    except SystemExit as stopped:
        status = stopped.code
    except BaseException as error:
        status = f"{type(error).__name__}: {error}"
    signal.setitimer(signal.ITIMER_PROF, 0)
    *before, line = complaint.getvalue().splitlines() or [""]
    if status == 2 and not before and len(line) < 4000 and ".py: error: " in line:
        return "refused"
    return 0 if status == 0 else f"{status} {complaint.getvalue()[:2000]}"


def feed(folder, data, results):
    """Give every script many damaged files, in this process, which may not take much memory."""
    os.chdir(folder)
    signal.signal(signal.SIGPROF, late)
    mains = {name: import_script(name) for name in ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py",
                                                    "evaluate.py")}
    mains["evaluate.py"].SAMPLES = 20
    sys.argv = ["script.py"]
    outcomes = []

    def feed_to(readers, name, kind, content):
        path = Path("models", "run", name)
        for script, *arguments in readers:
            path.write_bytes(content)
            outcome = attempt(mains[script].main, arguments)
            if outcome == "refused" and path.read_bytes() != content:
                outcome = "the file is another one now"
            if outcome != "refused":        # it ran, and wrote
                for part in ("models", "logs"):
                    shutil.rmtree(part)
                    shutil.copytree(Path("good", part), part)
            outcomes.append([name, kind, " ".join([script, *arguments]), outcome])
        shutil.copy(Path("good", "models", "run", name), path)

    for name in readers(data):
        feed_to(readers(data)[name], name, "good", Path("models", "run", name).read_bytes())
    usual = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 8 * 2**30          # should all else fail; MEMORY is what is asked for
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    for name in readers(data):
        whole = Path("models", "run", name).read_bytes()
        in_turn = itertools.cycle([reader] for reader in readers(data)[name])         # every kind comes to every script
        for kind, content in itertools.islice(damaged(whole, random.Random(name)), DAMAGED):
            feed_to(next(in_turn), name, kind, content)
    grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - usual)
    results.write_text(json.dumps({"outcomes": outcomes, "grown": grown}))


@pytest.fixture
def folder(tmp_path):
    """A small run with every kind of checkpoint, its last ones with an epoch to go, and a copy of it in good/."""
    write_mnist(tmp_path / "data" / "MNIST" / "raw", train=120, test=40)
    run, small = tmp_path / "models" / "run", ("--data-folder", "data", "--num-epochs", 1, "--batch-size", 20)
    for command in (("VQ-VAE.py", "--output-folder", "run", "--hidden-size", 8, "--k", 16, *small),
                    ("train_prior.py", "--model", "models/run/best.pt", "--layers", 1, "--width", 12, *small)):
        done = run_script(*command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
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


def test_no_damaged_file_gets_more_than_its_one_line(folder):
    results = folder / "results.json"
    process = processes().Process(target=feed, args=(folder, "data", results))
    process.start()
    process.join()
    assert process.exitcode == 0
    found = json.loads(results.read_text())
    wrong = [outcome for outcome in found["outcomes"] if outcome[-1] not in (0, "refused")]
    assert not wrong, f"{len(wrong)}: " + "\n".join(map(str, wrong[:9]))
    assert found["grown"] < MEMORY
    assert not list(folder.rglob("EXPLODED")) and not list(folder.rglob(f"*{files.TEMPORARY}"))

    by_kind = {}
    for name, kind, command, outcome in found["outcomes"]:
        by_kind.setdefault((kind, command, name), []).append(outcome)
    for (kind, command, _), outcomes in by_kind.items():
        if kind == "good":
            assert outcomes == ["refused" if "a file" in command else 0], command
        elif kind in ("cut off", "compressed", "bomb", "bare bomb", "bytearray", "overlapping parts"):
            assert set(outcomes) == {"refused"}, (kind, command)
    assert sum(kind != "good" for _, kind, *_ in found["outcomes"]) == 5 * DAMAGED > 1000
    seen_by = {}
    for _, kind, command, _ in found["outcomes"]:
        seen_by.setdefault(command, set()).add(kind)
    kinds = set.union(*seen_by.values())        # two of them cannot be done to every file
    assert all(len(seen) >= len(kinds) - 2 for seen in seen_by.values())
