"""Worker processes that are measured alternately, the peak memory of a process, and the file of what is measured."""

import ctypes
import json
import multiprocessing
import signal
import statistics
from pathlib import Path

import torch
from tqdm import tqdm

from utils import cli, files

WORKERS = []            # all workers: one that still waits would keep the script from exiting


class Worker:
    """A process that calls make(*arguments) once, and the function it returns for each call of the worker."""

    def __init__(self, make, *arguments):
        context = multiprocessing.get_context("spawn")
        self.pipe, child_pipe = context.Pipe()
        self.process = context.Process(target=_worker_loop, args=(child_pipe, make, arguments))
        previous = signal.signal(signal.SIGINT, signal.SIG_IGN)         # the main process handles Ctrl-C, for all
        self.process.start()
        signal.signal(signal.SIGINT, previous)
        child_pipe.close()
        WORKERS.append(self)

    def __call__(self, *arguments):
        try:
            self.pipe.send(arguments)
            result = self.pipe.recv()
        except (EOFError, OSError):
            raise ValueError("a process that measured has ended by itself: memory may have run out") from None
        if isinstance(result, Exception):
            raise result
        return result

    def close(self):
        self.pipe.close()
        self.process.join()


def _worker_loop(pipe, make, arguments):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    measure = None
    while True:
        try:
            inputs = pipe.recv()
        except EOFError:
            return
        try:
            measure = measure or make(*arguments)
            pipe.send(measure(*inputs))
        except Exception as error:
            pipe.send(error)


def run_rounds(workers, rounds, *arguments):
    """{name: [result of each round]} of workers {name: Worker}, called alternately, after a warm-up round."""
    results = {name: [] for name in workers}
    for number in tqdm(range(rounds + 1), desc="rounds", leave=False, disable=None):
        for name, worker in workers.items():
            result = worker(*arguments)
            if number:
                results[name].append(result)
    return results


def spread(values):
    """Median, and the range relative to it."""
    median = statistics.median(values)
    return median, (max(values) - min(values)) / median


def peak_memory(device="cpu"):
    """Peak memory (bytes) of this process since reset_peak_memory(): on a GPU, or resident; or None if not on Linux."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if not status.exists():
        return None
    return 1024 * int(next(line for line in status.read_text().splitlines() if line.startswith("VmHWM")).split()[1])


def reset_peak_memory(device="cpu"):
    """Also returns freed memory to the system, since its reuse would not be counted."""
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")


def json_file(args):
    """The OutputFile of --json and --overwrite, or None. Raises ValueError if it could not be written."""
    if not args.json:
        return None
    output = files.OutputFile(args.json, args.overwrite, "a file of measurements", holds_measurements)
    with cli.errors_name_flag("--json", args.json):
        output.check()
    return output


def holds_measurements(path):
    """Whether the file at path is one that --json has written: a JSON object of lists and objects."""
    try:
        contents = json.loads(path.read_bytes())
    except (ValueError, RecursionError):
        return False
    return isinstance(contents, dict) and all(isinstance(part, dict | list) for part in contents.values())
