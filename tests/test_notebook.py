"""VQ-VAE.ipynb, executed from top to bottom as Jupyter does it, and its pictures opened again."""

import base64
import io
import os
import shutil
import subprocess
import tempfile

import nbformat
import numpy as np
import pytest
import torch
from helpers import ROOT
from nbclient import NotebookClient
from PIL import Image
from test_generate import cells

import checkpoint
import data
from metrics import evaluate, perplexity

EPOCHS = "EPOCHS = 10\n"


def read():
    return nbformat.read(ROOT / "VQ-VAE.ipynb", as_version=nbformat.NO_CONVERT)


def execute(notebook, folder):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setenv("HOME", home)          # where Jupyter keeps what belongs to a kernel
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def copy_repository(folder):
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("which files are the repository's is known to git alone")
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder in which the notebook ran, with one epoch, and {id: cell}, its cells. Not to be changed."""
    folder, notebook = tmp_path_factory.mktemp("notebook"), read()
    copy_repository(folder)
    training = next(cell for cell in notebook.cells if EPOCHS in cell.source)
    training.source = training.source.replace(EPOCHS, "EPOCHS = 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADLESS", "1")
        execute(notebook, folder)
    return folder, {cell.id: cell for cell in notebook.cells}


def picture(cell):
    """The one picture that a cell shows, as grey values."""
    shown, = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return np.array(Image.open(io.BytesIO(base64.b64decode(shown))).convert("L")).astype(int)


def said(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_the_file_is_clean_and_well_formed():
    notebook = read()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        assert not cell.metadata and not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def test_every_cell_runs_and_says_nothing_of_errors(executed):
    folder, by_id = executed
    for cell in by_id.values():
        if cell.cell_type == "code":
            assert cell.execution_count and "rror:" not in said(cell) and "Traceback" not in said(cell), cell.id
    assert "checkpoint  models/notebook/best.pt" in said(by_id["train"])
    assert (folder / "models" / "notebook" / "model_1.pt").is_file()
    assert not (folder / "models" / "notebook" / "model_2.pt").exists()
    assert not by_id["tensorboard"].outputs


def test_reconstructions_are_near_the_originals_above_them(executed):
    _, by_id = executed
    rows = cells(picture(by_id["reconstruct"])).reshape(5, 2, 10, 28, 28)
    originals, reconstructions = rows[:, 0].reshape(50, 784), rows[:, 1].reshape(50, 784)
    assert originals.max() == 255 and 20 < originals.mean() < 60
    errors = np.square(originals[:, None] - reconstructions[None]).mean(axis=2)         # (50, 50)
    assert (errors.argmin(axis=1) == np.arange(50)).mean() > 0.95
    assert errors.diagonal().mean() < 0.2 * np.square(originals).mean()


def test_new_digits_are_those_of_their_rows(executed):
    _, by_id = executed
    digits = cells(picture(by_id["sample"]))
    classifier, _ = checkpoint.load_classifier(checkpoint.CLASSIFIER)
    with torch.no_grad():
        seen = classifier(torch.from_numpy(digits).float().unsqueeze(1) / 127.5 - 1).argmax(dim=1)
    assert (seen == torch.arange(10).repeat_interleave(10)).float().mean() > 0.85


def test_pictures_of_the_codes_and_of_an_image_of_ones_own(executed):
    folder, by_id = executed
    model, _ = checkpoint.load_model(folder / "models" / "notebook" / "best.pt")
    _, test_set = data.load("MNIST-10k", "MNIST")
    _, counts = evaluate(model, data.batches(test_set, 500), "cpu")
    assert f"{(counts > 0).sum()} of 512 codes are used, perplexity {perplexity(counts):.1f}" in said(by_id["use"])
    assert float(said(by_id["own"]).split()[-1]) < 0.1
    for name, panels in (("codes", 3), ("own", 2)):
        shown = picture(by_id[name])
        height, width = shown.shape
        assert width > 200 * panels and height > 200
        dark = [(shown[:, i * width // panels:(i + 1) * width // panels] < 20).mean() for i in range(panels)]
        assert all(share > 0.3 for share in (dark[0], dark[-1])), name             # black around a digit
        first, last = shown[:, :width // panels], shown[:, -(width // panels):]
        assert first[height // 3:].max() == 255 and np.abs(first - last).mean() < 40, name
    assert (picture(by_id["use"]) < 200).mean() > 0.05


def test_the_first_cell_clones_the_repository_where_it_is_not(tmp_path, monkeypatch):
    (tmp_path / "origin").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "origin" / "VQ-VAE.py").write_text("")
    for command in (["init", "--quiet"], ["add", "."],
                    ["-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet", "-m", "Begin"]):
        subprocess.run(["git", *command], cwd=tmp_path / "origin", check=True)
    notebook = read()
    get = next(cell for cell in notebook.cells if cell.id == "get")
    get.source = get.source.replace('URL = ""', f'URL = "{tmp_path / "origin"}"')
    notebook.cells = [get, nbformat.v4.new_code_cell("os.getcwd()")]
    for _ in range(2):          # the second time it is there already
        execute(notebook, tmp_path / "empty")
        assert os.path.samefile(eval(notebook.cells[1].outputs[0].data["text/plain"]), tmp_path / "empty" / "vq-vae")
