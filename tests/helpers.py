"""What the tests share: the scripts run as a user runs them, small real data, a look at a folder."""

import ctypes
import gzip
import hashlib
import importlib.util
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent
# What the scripts import. A process that has done so takes seconds to start, and its children no time.
IMPORTED = ["downloads", "evaluate", "image_folder", "inputs", "pytest", "resume", "tensorboard", "tracking",
            "train_classifier", "train_prior", "torchvision"]


# ---------------------------------------------------------------- scripts in processes of their own

@cache
def processes():
    """A multiprocessing context, whose processes are forked from one that has imported IMPORTED and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        multiprocessing.forkserver.ensure_running()
    return context


def _run_script(script, arguments, cwd, environment, output, prepare):
    """What a process of start() does."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    multiprocessing.set_start_method(None, force=True)          # for processes of its own, as in any other script
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in enumerate(("stdin", "stdout", "stderr")):
        with open(os.devnull if stream == 0 else f"{output}/{name}", "r" if stream == 0 else "w") as file:
            os.dup2(file.fileno(), stream)
    sys.argv = [str(script), *arguments]
    if prepare:
        prepare()
    runpy.run_path(str(script), run_name="__main__")


class Running:
    """A script in a process of its own, with the methods of subprocess.Popen."""

    def __init__(self, script, arguments, cwd, prepare=None):
        self.args = [script, *map(str, arguments)]
        self.output = Path(tempfile.mkdtemp())
        self.process = processes().Process(target=_run_script, args=(
            ROOT / script, self.args[1:], str(cwd), dict(os.environ), str(self.output), prepare))
        self.process.start()

    def poll(self):
        return self.process.exitcode

    def wait(self):
        self.process.join()
        return self.process.exitcode

    def send_signal(self, number):
        os.kill(self.process.pid, number)

    def kill(self):
        self.process.kill()

    def communicate(self):
        """What it wrote to stdout and to stderr in all, when it has ended."""
        self.returncode = self.wait()
        said = [path.read_text() if path.exists() else "" for path in (self.output / "stdout", self.output / "stderr")]
        shutil.rmtree(self.output)
        return said


def start(script, *arguments, cwd, prepare=None):
    """Start a script of the repository in the folder cwd; prepare(), a picklable function, runs in it before."""
    return Running(script, arguments, cwd, prepare)


def run_script(script, *arguments, cwd, prepare=None):
    """Run a script of the repository to its end in a process of its own, in the folder cwd."""
    process = start(script, *arguments, cwd=cwd, prepare=prepare)
    said = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *said)


def run_command(*command, cwd=ROOT, **environment):
    """Run a command in which Python itself starts anew, with more environment variables."""
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=os.environ | environment, preexec_fn=obey_ctrl_c)


def obey_ctrl_c():
    """Take back that SIGINT is ignored, as it is in what a shell starts in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, process):
    """Until a condition holds, which it must before the process ends."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def readme_commands(title):
    """The shell commands in a section of the README, each as a list of words."""
    section = (ROOT / "README.md").read_text().split(f"# {title}\n")[1].split("\n#")[0]
    return [shlex.split(line) for block in re.findall(r"^```shell\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]


def give_up_privileges():
    """Let the modes of files and folders bind this process too if it is root's, on Linux."""
    if os.geteuid() == 0:
        header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()     # version 3 of capset(2)
        if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
            raise OSError(ctypes.get_errno(), "capset")


def import_script(name):
    """A script as a module, for its parser and for main(argv) without a new process."""
    spec = importlib.util.spec_from_file_location(Path(name).stem.replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def refuse(script, arguments, capsys):
    """Run a script's main() on arguments that it must refuse. → its one line."""
    with pytest.raises(SystemExit) as stopped:
        import_script(script).main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.out == "" and said.err.count("\n") == 1 and said.err.endswith("\n")
    assert said.err.startswith(f"{os.path.basename(sys.argv[0])}: error: ") and "Traceback" not in said.err
    return said.err


def snapshot(folder):
    """Every path below a folder, with the hash of each file."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(Path(folder).rglob("*"))}


def events(folder):
    """The TensorBoard events of a run, everything kept."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def bundled_digits():
    """Images (10000, 28, 28) and labels (10000,) as NumPy reads them."""
    with np.load(ROOT / "MNIST" / "MNIST-10k.npz") as arrays:
        return arrays["images"], arrays["labels"]


IDX_TYPES = {"uint8": 0x0800, "int32": 0x0C00}


def idx(array):
    """An array as the bytes of an IDX file, whose numbers have their high byte first."""
    contents = (IDX_TYPES[array.dtype.name] + array.ndim).to_bytes(4, "big")
    return contents + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.astype(
        array.dtype.newbyteorder(">")).tobytes()


def write_mnist(raw, train=600, test=200, compress=False):
    """Bundled digits as the four files of MNIST, in the IDX format, in the folder raw."""
    raw.mkdir(parents=True, exist_ok=True)
    images, labels = bundled_digits()
    for split, part in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            contents, path = idx(array), raw / f"{split}-{kind}-ubyte"
            if compress:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(contents))
            else:
                path.write_bytes(contents)
