import os
from pathlib import Path

import pytest
from helpers import run_script, write_mnist

from vector_quantizer import QUANTIZERS

try:
    import fcntl
except ImportError:         # Windows: each worker creates its own folder
    fcntl = None

# Large batches and a narrow network for few, fast steps: the tests need a finished run, not a good one.
TRAIN_ARGS = ("--dataset", "MNIST-10k", "--num-epochs", "2", "--batch-size", "256", "--lr", "4e-3",
              "--hidden-size", "16", "--output-folder", "run")

# Run first, so that no worker is left with a long file at the end.
LONGEST = ["test_cuda.py", "test_resume.py", "test_distributed.py", "test_distributed_errors.py", "test_train_prior.py",
           "test_damaged_checkpoints.py", "test_quantizers.py", "test_export.py", "test_errors_while_training.py",
           "test_image_folder.py", "test_notebook.py", "test_outputs.py", "test_speed_options.py",
           "test_odd_pictures.py", "test_demo.py", "test_demo_browser.py", "test_reproduce.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.path.name == "testers.py":          # it does not import pytest and cannot mark itself
            item.add_marker(pytest.mark.rounding)


def shared_folder(tmp_path_factory, name, fill):
    """A folder filled by fill(folder), once for all workers of pytest-xdist. Read-only."""
    if not fcntl or "PYTEST_XDIST_WORKER" not in os.environ:
        folder = tmp_path_factory.mktemp(name)
        fill(folder)
        return folder
    folder = Path(tmp_path_factory.getbasetemp().parent, name)
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)            # the first worker fills it, the others wait
        if not folder.is_dir():
            temporary = tmp_path_factory.mktemp(name)
            fill(temporary)
            temporary.rename(folder)
    return folder


@pytest.fixture(autouse=True)
def restored_quantizers():
    """Quantizers that a test adds are gone after it."""
    before = QUANTIZERS.copy()
    yield
    QUANTIZERS.clear()
    QUANTIZERS.update(before)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which VQ-VAE.py has trained models/run on the bundled digits. Read-only."""
    def train(folder):
        result = run_script("VQ-VAE.py", *TRAIN_ARGS, cwd=folder)
        assert result.returncode == 0, result.stderr
        (folder / "stdout.txt").write_text(result.stdout)

    return shared_folder(tmp_path_factory, "trained", train)


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    """A --data-folder with 600 + 200 digits in the file format of MNIST. Read-only."""
    return shared_folder(tmp_path_factory, "mnist", lambda folder: write_mnist(folder / "MNIST" / "raw"))


@pytest.fixture(scope="session")
def uneven_folder(tmp_path_factory):
    """The same with 599 + 199 digits, which neither two nor three processes can divide evenly. Read-only."""
    return shared_folder(tmp_path_factory, "uneven", lambda folder: write_mnist(folder / "MNIST" / "raw", 599, 199))
