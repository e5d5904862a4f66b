"""Shared test helpers: running scripts, small data sets in their real formats, folder snapshots."""

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
# Imported once in the fork server: importing them takes seconds, forking a process that has them does not.
PRELOADED = ["data.downloads", "evaluate", "generate", "pytest", "tensorboard", "torchvision", "train_classifier",
             "train_prior", "utils.trainer"]


# ---------------------------------------------------------------- scripts in separate processes

@cache
def forkserver():
    """A multiprocessing context that forks from a server process with PRELOADED imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
        patch.setenv("OMP_WAIT_POLICY", "passive")      # two threads on a busy core would wait for each other in a loop
        multiprocessing.forkserver.ensure_running()
    return context


def _script_process(script, arguments, cwd, environment, output_folder, prepare):
    """Target of the processes that start_script() starts."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)                # ignored where nohup has started the tests
    multiprocessing.set_start_method(None, force=True)          # the default, as in any other script
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        path, mode = (os.devnull, "r") if name == "stdin" else (f"{output_folder}/{name}", "w")
        with open(path, mode) as file:
            os.dup2(file.fileno(), descriptor)
    sys.argv = [str(script), *arguments]
    if prepare:
        prepare()
    runpy.run_path(str(script), run_name="__main__")


class ScriptProcess:
    """A running script, with the interface of subprocess.Popen."""

    def __init__(self, script, arguments, cwd, prepare=None):
        self.args = [script, *map(str, arguments)]
        self.output_folder = Path(tempfile.mkdtemp())
        self.process = forkserver().Process(target=_script_process, args=(
            ROOT / script, self.args[1:], str(cwd), dict(os.environ), str(self.output_folder), prepare))
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
        """Wait for the end. → [stdout, stderr]"""
        self.returncode = self.wait()
        paths = (self.output_folder / "stdout", self.output_folder / "stderr")
        outputs = [path.read_text() if path.exists() else "" for path in paths]
        shutil.rmtree(self.output_folder)
        return outputs


def start_script(script, *arguments, cwd, prepare=None):
    """Start a script of the repository in the folder cwd. prepare(), if given, runs in its process first."""
    return ScriptProcess(script, arguments, cwd, prepare)


def run_script(script, *arguments, cwd, prepare=None):
    """Run a script of the repository to completion in a separate process, in the folder cwd."""
    process = start_script(script, *arguments, cwd=cwd, prepare=prepare)
    outputs = process.communicate()
    return subprocess.CompletedProcess(process.args, process.returncode, *outputs)


def run_command(*command, cwd=ROOT, **environment):
    """Run a command in a new process, without the fork server, with additional environment variables."""
    return subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True,
                          stdin=subprocess.DEVNULL, env=os.environ | environment, preexec_fn=restore_sigint)


def restore_sigint():
    """Restore the default handling of SIGINT, which shells ignore in background jobs."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def wait_for(condition, process):
    """Poll until condition() is true. Fails if the process ends first."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def readme_commands(page, title):
    """The shell commands in a section of README.md or of a page in docs/, each as a list of arguments."""
    section = (ROOT / page).read_text().split(f"# {title}\n")[1].split("\n#")[0]
    return [shlex.split(line) for block in re.findall(r"^```shell\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]


def drop_capabilities():
    """Drop the capabilities of root (Linux), so that file permissions apply to this process too."""
    if os.geteuid() == 0:
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)                   # version 3 of capset(2)
        no_capabilities = (ctypes.c_uint32 * 6)()
        if ctypes.CDLL(None, use_errno=True).capset(header, no_capabilities):
            raise OSError(ctypes.get_errno(), "capset")


def import_script(name):
    """A script as a module, to use its parser and main(argv) in this process."""
    spec = importlib.util.spec_from_file_location(Path(name).stem.replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def build_trainer(folder, *flags, trainer_class=None, saved=None):
    """A Trainer of VQ-VAE.py, or of trainer_class, that writes into folder. → script, trainer, batches"""
    from utils.run_files import RunFiles

    script = import_script("VQ-VAE.py")
    script.Trainer = trainer_class or script.Trainer
    args = script.get_parser().parse_args([str(flag) for flag in flags])
    files = RunFiles(folder / "last.pt", folder / "best.pt", folder / "track.txt", folder / "logs", "", "")
    batches = script.load_batches(args)
    return script, script.build_trainer(args, files, batches, saved), batches


def expect_usage_error(script, arguments, capsys):
    """Run a script's main(), which must exit with status 2 and one line on stderr. → that line"""
    with pytest.raises(SystemExit) as excinfo:
        import_script(script).main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert excinfo.value.code == 2
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.endswith("\n")
    assert captured.err.startswith(f"{os.path.basename(sys.argv[0])}: error: ") and "Traceback" not in captured.err
    return captured.err


def snapshot(folder):
    """{path below folder: SHA-256 of the file, or "folder"}."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            for path in sorted(Path(folder).rglob("*"))}


def events(folder):
    """The TensorBoard events of a run, without subsampling."""
    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "histograms": 0})
    accumulator.Reload()
    return accumulator


def bundled_digits():
    """Images (10000, 28, 28) and labels (10000,) as NumPy reads them."""
    with np.load(ROOT / "MNIST" / "MNIST-10k.npz") as arrays:
        return arrays["images"], arrays["labels"]


IDX_TYPES = {"uint8": 0x0800, "int32": 0x0C00}


def idx_bytes(array):
    """An array as the content of an IDX file (big-endian)."""
    contents = (IDX_TYPES[array.dtype.name] + array.ndim).to_bytes(4, "big")
    return contents + b"".join(size.to_bytes(4, "big") for size in array.shape) + array.astype(
        array.dtype.newbyteorder(">")).tobytes()


def write_mnist(raw, train=600, test=200, compress=False):
    """Write bundled digits as the four IDX files of MNIST into the folder raw."""
    raw.mkdir(parents=True, exist_ok=True)
    images, labels = bundled_digits()
    for split, part in (("train", slice(0, train)), ("t10k", slice(train, train + test))):
        for kind, array in (("images-idx3", images[part]), ("labels-idx1", labels[part])):
            contents, path = idx_bytes(array), raw / f"{split}-{kind}-ubyte"
            if compress:
                path.with_name(path.name + ".gz").write_bytes(gzip.compress(contents))
            else:
                path.write_bytes(contents)
