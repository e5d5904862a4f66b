"""What the tests share: the scripts run as a user runs them, small real data, a look at a folder."""

import gzip
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).resolve().parent.parent


def run_script(name, *arguments, cwd):
    """Run a script of the repository in a process of its own, in the folder cwd."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, arguments)],
                          cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def readme_commands(title):
    """The shell commands in a section of the README, each as a list of words."""
    section = (ROOT / "README.md").read_text().split(f"# {title}\n")[1].split("\n#")[0]
    return [shlex.split(line) for block in re.findall(r"^```shell\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)
            for line in block.splitlines()]


def start(script, *arguments, cwd):
    return subprocess.Popen([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=cwd, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)


def wait_for(condition, process):
    """Until a condition holds, which it must before the process ends."""
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def run_without_privileges(script, *arguments, cwd, **environment):
    """Run a script so that the modes of folders bind it, even when the tests are run by root."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    if os.geteuid() == 0:
        if not shutil.which("setpriv"):
            pytest.skip("root may write everywhere, and there is no setpriv to give that up")
        command = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", *command]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=os.environ | environment)


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
