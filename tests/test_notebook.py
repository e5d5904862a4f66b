"""VQ-VAE.ipynb, executed from top to bottom as in Jupyter, with its pictures read back."""

import base64
import io
import os
import shutil
import subprocess
import tempfile
from importlib.util import find_spec

import nbformat
import numpy as np
import pytest
import torch
from helpers import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image
from test_generate import cells

import checkpoint
import data
from metrics import evaluate, perplexity

EPOCHS = "EPOCHS = 10\n"


def read_notebook():
    return nbformat.read(ROOT / "VQ-VAE.ipynb", as_version=nbformat.NO_CONVERT)


def execute(notebook, folder):
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setenv("HOME", home)          # Jupyter writes kernel files there
        NotebookClient(notebook, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    return notebook


def copy_repository(folder):
    listed = subprocess.run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT,
                            capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("needs git, to list the files of the repository")
    for name in listed.stdout.splitlines():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The folder in which the notebook ran, with one epoch, and its cells {id: cell}. Read-only."""
    folder, notebook = tmp_path_factory.mktemp("notebook"), read_notebook()
    copy_repository(folder)
    training_cell = next(cell for cell in notebook.cells if EPOCHS in cell.source)
    training_cell.source = training_cell.source.replace(EPOCHS, "EPOCHS = 1\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HEADLESS", "1")
        execute(notebook, folder)
    return folder, {cell.id: cell for cell in notebook.cells}


def read_picture(cell):
    """The only picture in the output of a cell, in grey."""
    encoded, = (output.data["image/png"] for output in cell.outputs if "image/png" in output.get("data", {}))
    return np.array(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("L")).astype(int)


def printed_text(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def test_notebook_is_valid_and_has_no_outputs():
    notebook = read_notebook()
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert notebook.metadata == {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    for cell in notebook.cells:
        assert not cell.metadata and not cell.get("outputs") and cell.get("execution_count") is None, cell.id


def test_every_cell_runs_without_errors(executed):
    folder, by_id = executed
    for cell in by_id.values():
        if cell.cell_type == "code":
            text = printed_text(cell)
            assert cell.execution_count and "rror:" not in text and "Traceback" not in text, cell.id
    assert "checkpoint  models/notebook/best.pt" in printed_text(by_id["train"])
    assert (folder / "models" / "notebook" / "model_1.pt").is_file()
    assert not (folder / "models" / "notebook" / "model_2.pt").exists()
    assert not by_id["tensorboard"].outputs


def test_reconstructions_match_the_originals_above_them(executed):
    _, by_id = executed
    rows = cells(read_picture(by_id["reconstruct"])).reshape(5, 2, 10, 28, 28)
    originals, reconstructions = rows[:, 0].reshape(50, 784), rows[:, 1].reshape(50, 784)
    assert originals.max() == 255 and 20 < originals.mean() < 60
    errors = np.square(originals[:, None] - reconstructions[None]).mean(axis=2)         # (50, 50)
    assert (errors.argmin(axis=1) == np.arange(50)).mean() > 0.95
    assert errors.diagonal().mean() < 0.2 * np.square(originals).mean()


def test_sampled_digits_match_their_rows(executed):
    _, by_id = executed
    digits = cells(read_picture(by_id["sample"]))
    classifier, _ = checkpoint.load_classifier(checkpoint.CLASSIFIER)
    with torch.no_grad():
        predicted = classifier(torch.from_numpy(digits).float().unsqueeze(1) / 127.5 - 1).argmax(dim=1)
    assert (predicted == torch.arange(10).repeat_interleave(10)).float().mean() > 0.85


def panels(cell, count):
    """The images side by side in the picture of a cell: (count, 28, 28), in grey."""
    pixels, images = read_picture(cell), []
    for part in np.array_split(pixels, count, axis=1):
        dark = part < 200
        rows, columns = (np.flatnonzero(dark.mean(axis=axis) > 0.4) for axis in (1, 0))         # excludes the title
        (top, bottom), (left, right) = rows[[0, -1]], columns[[0, -1]]
        centres = (np.arange(28) + 0.5) / 28
        images.append(part[(top + centres * (bottom + 1 - top)).astype(int)][
            :, (left + centres * (right + 1 - left)).astype(int)])
    return np.array(images)


def to_grey(x):
    return (x.numpy().reshape(-1, 28, 28) + 1) * 127.5


def test_codes_are_shown_as_their_decoded_patches(executed):
    folder, by_id = executed
    model, _ = checkpoint.load_model(folder / "models" / "notebook" / "best.pt")
    x = data.to_model_range(data.load("MNIST-10k", "MNIST")[1].images[:1])
    with torch.no_grad():
        indices = model.encode(x)
        decoded = torch.stack([model.decode(torch.full((1, 7, 7), k)) for k in indices.flatten()]).view(49, 28, 28)
        reconstruction = model.decode(indices)
    shown_digit, shown_codes, shown_reconstruction = panels(by_id["codes"], 3)
    assert np.abs(shown_digit - to_grey(x)).max() < 8
    assert np.abs(shown_reconstruction - to_grey(reconstruction)).max() < 8
    patches = to_grey(decoded)[:, 12:16, 12:16]
    shown_patches = shown_codes.reshape(7, 4, 7, 4).swapaxes(1, 2).reshape(49, 4, 4)
    assert np.abs(shown_patches - patches)[:, [0, 3]].max() < 8             # the number covers the rows between
    assert np.abs(shown_patches - patches)[:, [1, 2]].max() > 50


def test_changed_code_changes_the_image_around_it(executed):
    _, by_id = executed
    before, after = panels(by_id["change"], 2)
    changed = np.abs(after - before) > 20
    assert not changed[:, 24:].any() and not changed[:4].any()          # three codes away and more
    assert np.abs(before - panels(by_id["codes"], 3)[2]).max() < 8


def test_page_is_shown_or_its_requirement_named(executed):
    _, by_id = executed
    if find_spec("gradio"):
        assert any("127.0.0.1" in str(output.get("data")) for output in by_id["demo"].outputs)
    else:
        assert "%pip install gradio" in printed_text(by_id["demo"])


def test_code_use_is_counted_over_the_test_set(executed):
    folder, by_id = executed
    model, _ = checkpoint.load_model(folder / "models" / "notebook" / "best.pt")
    _, test_set = data.load("MNIST-10k", "MNIST")
    _, counts = evaluate(model, data.batches(test_set, 500), "cpu")
    text = printed_text(by_id["use"])
    assert f"{(counts > 0).sum()} of 512 codes are used, perplexity {perplexity(counts):.1f}" in text
    assert (read_picture(by_id["use"]) < 200).mean() > 0.05


def test_user_digit_is_reconstructed(executed):
    _, by_id = executed
    assert float(printed_text(by_id["own"]).split()[-1]) < 0.1
    digit, reconstruction = panels(by_id["own"], 2)
    assert (digit < 20).mean() > 0.6 and digit.max() > 250 and digit[7, 8:18].min() > 200       # the bar of the 7
    assert np.abs(digit - reconstruction).mean() < 20


def test_first_cell_clones_the_repository_if_missing(tmp_path, monkeypatch):
    (tmp_path / "origin").mkdir()
    (tmp_path / "empty").mkdir()
    (tmp_path / "origin" / "VQ-VAE.py").write_text("")
    for command in (["init", "--quiet"], ["add", "."],
                    ["-c", "user.name=x", "-c", "user.email=x@localhost", "commit", "--quiet", "-m", "Begin"]):
        subprocess.run(["git", *command], cwd=tmp_path / "origin", check=True)
    notebook = read_notebook()
    first_cell = next(cell for cell in notebook.cells if cell.id == "get")
    first_cell.source = first_cell.source.replace('URL = ""', f'URL = "{tmp_path / "origin"}"')
    notebook.cells = [first_cell, nbformat.v4.new_code_cell("os.getcwd()")]
    for _ in range(2):          # the second time, the clone exists
        execute(notebook, tmp_path / "empty")
        assert os.path.samefile(eval(notebook.cells[1].outputs[0].data["text/plain"]), tmp_path / "empty" / "vq-vae")


def test_first_cell_says_what_to_do_without_an_address(tmp_path):
    notebook = read_notebook()
    notebook.cells = [cell for cell in notebook.cells if cell.id == "get"]
    with pytest.raises(CellExecutionError, match="Set URL in this cell to the address of this repository"):
        execute(notebook, tmp_path)
