"""generate.py as a user runs it, its pictures opened again."""

import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, refuse, run_script
from PIL import Image

import checkpoint
import data

SIDE = 10 * 28 + 11 * 2         # ten digits, with two pixels around each


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with the trained model as model.pt, and nothing else."""
    shutil.copy(trained / "models" / "run" / "best.pt", tmp_path / "model.pt")
    return tmp_path


def generate(folder, *arguments):
    done = run_script("generate.py", "--model", "model.pt", *arguments, cwd=folder)
    assert done.returncode == 0, done.stderr
    path = folder / done.stdout.strip()
    return path, np.array(Image.open(path).convert("L")).astype(int)


def cells(picture):
    """The hundred images of a grid, (100, 28, 28), row by row."""
    assert picture.shape == (SIDE, SIDE)
    return np.array([picture[2 + 30 * i:, 2 + 30 * j:][:28, :28] for i in range(10) for j in range(10)])


def test_mnist_writes_a_hundred_reconstructions_white_on_black(folder):
    path, picture = generate(folder, "--filename", "grid", "--seed", 3)
    assert path == folder / "generatedImages" / "grid.png"
    digits = bundled_digits()[0][9000:].astype(int)
    errors = np.square(cells(picture)[:, None] - digits[None]).mean(axis=(2, 3))         # (100, 1000)
    nearest = errors.argmin(axis=1)
    assert len(set(nearest)) > 95                            # a hundred test images, each its own
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:100].numpy()
    assert (nearest == chosen).mean() > 0.9
    assert errors[range(100), chosen].mean() < 0.2 * np.square(digits[chosen]).mean()
    assert np.median(cells(picture)) < 20 and cells(picture).max() > 230


def test_originals_stand_in_rows_above_their_reconstructions(folder):
    _, plain = generate(folder, "--seed", 3)
    _, picture = generate(folder, "--seed", 3, "--originals")
    rows = cells(picture).reshape(5, 2, 10, 28, 28)
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:50].numpy()
    assert np.abs(rows[:, 0].reshape(50, 28, 28) - bundled_digits()[0][9000:][chosen]).max() <= 1
    assert np.abs(rows[:, 1].reshape(50, 28, 28) - cells(plain)[:50]).max() <= 1


def test_originals_are_refused_where_there_are_none(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("random", "prior"):
        line = refuse("generate.py", ["--model", "model.pt", "--input", name, "--originals"], capsys)
        assert f"--originals: is used with images as --input, not with {name}" in line
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


@pytest.mark.parametrize("given", ["random", "prior", "."])
def test_flags_of_the_data_are_refused_where_none_is_read(given, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for flag, value in (("--dataset", "MNIST-10k"), ("--data-folder", "here"), ("--num-workers", "2")):
        line = refuse("generate.py", ["--model", "model.pt", "--input", given, flag, value], capsys)
        assert f"{flag} {value}: is used with --input test, not with {given}" in line
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


def test_random_decodes_the_codes_nearest_to_gaussian_noise(folder):
    _, picture = generate(folder, "--input", "RANDOM", "--seed", 5)
    model, _ = checkpoint.load_model(folder / "model.pt")
    noise = torch.randn(100, 16, 7, 7, generator=torch.Generator().manual_seed(5))
    codebook = model.quantizer.codebook.detach().double()
    nearest = torch.cdist(noise.permute(0, 2, 3, 1).reshape(-1, 16).double(), codebook).argmin(dim=1)
    with torch.no_grad():
        expected = model.decode(nearest.view(100, 7, 7)).squeeze(1).add(1).mul(127.5).numpy()
    # A latent between two codes may go to either by rounding, and changes its surroundings.
    assert (np.abs(cells(picture) - expected).max(axis=(1, 2)) <= 1).sum() >= 97


def test_the_seed_decides_and_the_name_follows_the_input(folder):
    pictures = {}
    for name in ("MNIST", "random"):
        path, first = generate(folder, "--input", name)
        assert path.name == {"MNIST": "MNIST-10k.png"}.get(name, f"{name}.png")
        pictures[name] = [first, generate(folder, "--input", name, "--seed", 0, "--filename", "again")[1],
                          generate(folder, "--input", name, "--seed", 1, "--filename", "other")[1]]
        assert np.array_equal(*pictures[name][:2]) and not np.array_equal(*pictures[name][1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("given", ["test", "random"])
def test_a_gpu_draws_the_same(given, folder):
    pictures = [generate(folder, "--input", given, "--device", device)[1] for device in ("cpu", "cuda")]
    assert np.abs(pictures[0] - pictures[1]).mean() < 1             # a tie may fall to another code


@pytest.mark.parametrize("name, written", [("a.png", "a.png"), ("a.PNG", "a.PNG"), ("a.b", "a.b.png"), ("b/", "b.png"),
                                           (".png", ".png.png"),
                                           ("new/folder/a", "new/folder/a.png")])
def test_png_is_not_doubled_and_missing_folders_are_made(name, written, folder):
    assert generate(folder, "--input", "random", "--filename", name)[0] == folder / "generatedImages" / written


def test_the_data_set_may_be_another_than_the_models(folder, mnist_folder):
    _, picture = generate(folder, "--dataset", "MNIST", "--data-folder", mnist_folder)
    _, test_set = data.load("MNIST", mnist_folder)
    errors = np.square(cells(picture)[:, None] - test_set.images.squeeze(1).numpy().astype(int)[None]).mean(axis=(2, 3))
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100].numpy()
    assert (errors.argmin(axis=1) == chosen).mean() > 0.9
