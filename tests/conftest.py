import pytest
from helpers import run_script, write_mnist

# Large batches and a narrow network: few and fast steps, since the tests want a finished run rather than a good one.
TRAINING = ("--dataset", "MNIST-10k", "--num-epochs", "2", "--batch-size", "256", "--lr", "4e-3", "--hidden-size", "16",
            "--output-folder", "run")


# Begun first, so that no core is left waiting for them at the end.
LONGEST = ["test_resume.py", "test_damaged.py", "test_processes.py", "test_train_prior.py", "test_trouble.py",
           "test_image_folder.py", "test_notebook.py", "test_fast.py"]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    for item in items:
        if item.path.name == "testers.py":          # which does without pytest
            item.add_marker(pytest.mark.rounding)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder in which VQ-VAE.py has trained on the bundled digits as models/run. Not to be changed."""
    folder = tmp_path_factory.mktemp("trained")
    done = run_script("VQ-VAE.py", *TRAINING, cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def mnist_folder(tmp_path_factory):
    """A --data-folder with 600 + 200 digits in MNIST's own files. Not to be changed."""
    folder = tmp_path_factory.mktemp("mnist")
    write_mnist(folder / "MNIST" / "raw")
    return folder
