"""Runs the rows of result_rows.py, side by side, and goes on with those that were interrupted.

Each is a script of this repository in a process of its own. The folder of reproduce.py then has models/ and logs/,
output/ (what the scripts print), json/ (what they measure) and results/ (ROW.json: all that was measured of a row).
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from compare import mean_and_deviation, read_track
from tqdm import tqdm

import checkpoint
from utils import cli, files
from utils.environment import environment
from utils.interruptions import StopSignals

ROOT = Path(__file__).resolve().parents[1]
# Of a training's folder its state and its track; and how many epochs it has by default.
TRAININGS = {"VQ-VAE.py": ("last.pt", "track.txt", 10), "train_prior.py": ("prior-last.pt", "prior-track.txt", 24),
             "train_classifier.py": ("{}-last.pt", "{}-track.txt", 10)}              # {} is its --output
SAVE_EVERY = 500                # steps, for a machine that loses its power
POLL_SECONDS, STOP_SECONDS = 0.2, 120


# ---------------------------------------------------------------- one run

class Run:
    """A row's command with one seed.

    folder: of reproduce.py; data_folder: of the row's data set. Paths of shipped files become those of the repository.
    """

    def __init__(self, row, seed, folder, data_folder):
        self.row, self.seed, self.folder = row, seed, folder
        self.title = row.name + (f", seed {seed}" if len(row.seeds) > 1 else "")
        self.slug = row.slug + (f"-seed{seed}" if seed else "")
        _, self.script, *words = shlex.split(row.command)
        self.words = [str(ROOT / word) if word.startswith("pretrained/") else word for word in words]
        self.words += ["--data-folder", os.path.realpath(data_folder)]
        if seed:
            self.words += ["--seed", str(seed)]
        if self.script == "VQ-VAE.py":
            name = self.word_after("--output-folder") or row.slug
            name += f"-seed{seed}" if seed else ""
            self.words += ["--output-folder", name, "--keep-every", "0"]        # the last one given counts
            self.models = folder / "models" / name
        elif self.script == "train_prior.py":
            self.models = folder / Path(self.word_after("--model")).parent
        else:
            self.models = folder / "models"
        self.json = folder / "json" / f"{self.slug}.json"
        if self.script == "benchmarks/quantizers.py":
            self.json = folder / "quantizers" / "results.json"

    def word_after(self, flag):
        return self.words[self.words.index(flag) + 1] if flag in self.words else None

    @property
    def is_training(self):
        return self.script in TRAININGS

    def files(self):
        """The paths of a training's state and of its track."""
        name = self.word_after("--output") or "classifier"
        return [self.models / file.format(name) for file in TRAININGS[self.script][:2]]

    def is_finished(self):
        """Whether a training's last save is of its end. Raises ValueError if that file is damaged."""
        last, _ = self.files()
        if self.script == "VQ-VAE.py":
            contents = checkpoint.load(last)
        elif self.script == "train_prior.py":
            contents = checkpoint.load_prior(last, self.models / "best.pt")[1]
        else:
            contents = checkpoint.load_classifier(last)[1]
        training, done = contents["training"], contents["epoch"]
        if self.script == "train_prior.py":
            from train_prior import PATIENCE  # epochs without a lower loss, after which it stops early
            if done - training["progress"]["best_epoch"] >= PATIENCE:
                return True
        return done >= training["settings"]["num_epochs"]

    def command(self):
        """The words of the command that begins the run, or goes on with it; None if it is finished."""
        if not self.is_training:
            flags = ["--json", str(self.json.resolve()), "--overwrite"]
            if self.script == "benchmarks/quantizers.py":       # which goes on by itself, and has a file of its own
                flags = []
        elif not self.files()[0].exists():
            flags = ["--save-every", str(SAVE_EVERY), "--overwrite"]
        elif not self.is_finished():
            flags = ["--save-every", str(SAVE_EVERY), "--resume"]
        else:
            return None
        return [self.script, *self.words, *flags]

    def progress(self):
        """How far the run is: the epochs done and to do, of a training that has begun; else 0 and 1."""
        with suppress(OSError, ValueError, KeyError):
            epochs = self.word_after("--num-epochs") or TRAININGS[self.script][2]
            return len(read_track(self.files()[1])), int(epochs)
        return 0, 1

    def describe(self):
        done, epochs = self.progress()
        return f"{self.title}: epoch {min(done + 1, epochs)}/{epochs}" if epochs > 1 else self.title

    def minutes_left(self):
        """By the estimate of the row."""
        done, epochs = self.progress()
        return self.row.minutes * max(0, 1 - done / epochs)

    def result(self, seconds):
        """What the run has measured, for ROW.json. seconds: of a command that is no training, or None."""
        environments = [environment("cpu") | {"threads": "1"}]
        if self.is_training:
            output = {"epochs": read_track(self.files()[1])}
            seconds = sum(epoch["seconds"] for epoch in output["epochs"])
        else:
            output = self.with_short_paths(json.loads(self.json.read_bytes()))
            output.pop("model", None)               # its path is of this machine
        if self.script == "VQ-VAE.py":              # which records the changes
            environments = json.loads((self.models / "args.json").read_bytes())["environments"]
        return {"seed": self.seed, "seconds": round(seconds, 1), "environments": environments, "output": output}


    def with_short_paths(self, value):
        """The output of a script, in which the paths of models in this repository begin at its root."""
        if isinstance(value, dict):
            return {key: self.with_short_paths(part) for key, part in value.items()}
        if isinstance(value, str) and value.endswith(".pt"):
            path = (self.folder / value).resolve()
            return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else value
        return value


class Script(subprocess.Popen):
    """A script in a session of its own: Ctrl-C does not reach it, and signals also reach what it has started."""

    def send_signal(self, number):
        if not hasattr(os, "killpg"):
            super().send_signal(number)
        elif self.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, number)


def start(words, folder, log):
    """Start a script of this repository in a folder, with one thread, its output appended to a file. → its process"""
    with open(log, "a") as output:
        return Script([sys.executable, ROOT / words[0], *words[1:]], cwd=folder, stdin=subprocess.DEVNULL,
                      stdout=output, stderr=output, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def stop(processes):
    """Have scripts save what they have done and end."""
    for process in processes:
        process.send_signal(signal.SIGTERM)
    end = time.monotonic() + STOP_SECONDS
    for process in processes:
        while process.poll() is None:
            if time.monotonic() > end:
                process.kill()
            time.sleep(0.05)


# ---------------------------------------------------------------- ROW.json

class Record:
    """What has been measured of a row, in results/ROW.json, which is written after each run.

    Raises ValueError if the file is damaged, or of another command.
    """

    def __init__(self, row, folder):
        self.row, self.path = row, folder / "results" / f"{row.slug}.json"
        self.contents = {"row": row.name, "command": row.command, "runs": [], "figures": {}}
        if self.path.exists():
            try:
                self.contents = json.loads(self.path.read_bytes())
                command, _ = self.contents["command"], [(run["seed"], run["output"]) for run in self.contents["runs"]]
                if not isinstance(self.contents["figures"], dict):
                    raise TypeError("figures")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{self.path} is damaged: move it away") from error
            if command != row.command:
                raise ValueError(f"{self.path} is of another command, {command}: choose another --folder")
        else:
            self.write()                # so that a run which is interrupted goes on as what it began as

    def lacks(self, seed):
        """Whether no run with this seed has all of the row's figures."""
        return not any(run["seed"] == seed and self.has_figures(run) for run in self.contents["runs"])

    def has_figures(self, run):
        try:
            for path in self.row.figures.values():
                self.values_at(path, run["output"])
        except ValueError:
            return False
        return True

    def is_complete(self):
        return not any(self.lacks(seed) for seed in self.row.seeds)

    def add(self, result):
        """Add the result of a run. Raises ValueError if it lacks one of the row's figures."""
        others = [run for run in self.contents["runs"] if run["seed"] != result["seed"]]
        self.contents["runs"] = sorted([*others, result], key=lambda run: run["seed"])
        self.write()                # first, as it may have taken hours
        self.count_figures()

    def count_figures(self):
        """Take the row's figures from the runs' outputs: mean and standard deviation over the seeds."""
        runs, former = self.contents["runs"], self.contents["figures"]
        self.contents["figures"] = {} if not runs else {
            name: mean_and_deviation([value for run in runs for value in self.values_at(path, run["output"])])
            for name, path in self.row.figures.items()}
        if self.contents["figures"] != former:
            self.write()

    def values_at(self, path, output):
        """The numbers at a path such as "epochs.-1.test_recon" or "seeds.*.mse" of an output.

        Raises ValueError if there is none.
        """
        values = [output]
        try:
            for key in path.split("."):
                values = [part for value in values for part in (
                    value.values() if key == "*" else [value[int(key) if isinstance(value, list) else key]])]
            if not values:
                raise KeyError("*")
            return [value + 0 for value in values]
        except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"row {self.row.name!r}: its output has no number at {path}, where result_rows.py looks "
                             "for it") from error

    def write(self):
        text = json.dumps(self.contents, indent=1, ensure_ascii=False)
        # The innermost lists and dictionaries take a line each.
        text = re.sub(r"[\[{][^\[\]{}]*[\]}]", lambda part: re.sub(r"\s*\n\s*", " ", part[0]), text)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(self.path, (text + "\n").encode())


# ---------------------------------------------------------------- all runs

def run_all(runs, records, processes):
    """Do the runs, so many at a time. records: {row's name: Record}. → {row's name: why it failed}

    A signal is answered with KeyboardInterrupt, when the scripts have saved what they have done and ended.
    """
    waiting, running, failed = sorted(runs, key=lambda run: -chain_minutes(run.row, runs)), {}, {}
    minutes = sum(run.row.minutes for run in runs)
    with StopSignals() as signals, tqdm(
            total=minutes, initial=minutes - sum(run.minutes_left() for run in runs), disable=None, leave=False,
            bar_format="{percentage:3.0f}%|{bar:20}| {elapsed}, {remaining} left{postfix}") as bar:
        try:
            while waiting or running:
                if signals.received:
                    raise KeyboardInterrupt(signals.received)
                start_ready(waiting, running, failed, processes)
                bar.n = minutes - sum(run.minutes_left() for run in (*waiting, *running))
                bar.set_postfix_str("; ".join(run.describe() for run in running))
                time.sleep(POLL_SECONDS)
                for run, (process, began) in list(running.items()):
                    if process is not None and process.poll() is None:
                        continue
                    del running[run]
                    finish(run, process, time.monotonic() - began, records[run.row.name], failed)
        except BaseException:
            stop([process for process, _ in running.values() if process is not None])
            raise
    return failed


def chain_minutes(row, runs):
    """The minutes of a row and of what has to wait for it: the longest chain begins first."""
    return row.minutes + max((chain_minutes(run.row, runs) for run in runs if row.name in run.row.after), default=0)


def start_ready(waiting, running, failed, processes):
    """Start as many runs as may run now, taken from the waiting ones."""
    for run in list(waiting):
        unfinished = {other.row.name for other in (*waiting, *running)}
        if missing := [name for name in run.row.after if name in failed]:
            failed[run.row.name] = f"it needs {missing[0]!r}, which has failed"
            waiting.remove(run)
        elif len(running) < processes and not unfinished & set(run.row.after):
            waiting.remove(run)
            log = run.folder / "output" / f"{run.slug}.txt"
            log.parent.mkdir(parents=True, exist_ok=True)
            try:
                words = run.command()
            except (OSError, ValueError, KeyError) as error:        # its last save is damaged
                failed[run.row.name] = f"{run.models}: {cli.describe_error(error)}"
            else:
                running[run] = words and start(words, run.folder, log), time.monotonic()


def finish(run, process, seconds, record, failed):
    """Record what a run has measured, or why it failed."""
    log, why = run.folder / "output" / f"{run.slug}.txt", None
    if process is not None and (code := process.wait()):
        lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
        why = f"{lines[-1] if lines else f'it ended with status {code}'} (all of it is in {log})"
    else:
        try:
            record.add(run.result(seconds))
        except (OSError, ValueError, KeyError) as error:
            why = cli.describe_error(error)
    if why:
        failed.setdefault(run.row.name, why)
    tqdm.write(f"{run.title}: " + (f"failed: {why}" if why else f"done in {seconds / 60:.1f} min"))
