"""Held-out validation images: which they are, and that nothing but them chooses a model."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, events, expect_usage_error, import_script, run_script
from PIL import Image

import checkpoint
import data
from data.code_maps import CodeMaps
from metrics import nats_per_code
from modules import Losses
from prior import CodePrior

SMALL = ("--hidden-size", "8", "--k", "16", "--batch-size", "100", "--output-folder", "run")


def rows_of(part, images):
    """The rows of `images` (N, H, W) that a set holds, in its order."""
    numbers = {image.tobytes(): row for row, image in enumerate(images)}
    return [numbers[image.tobytes()] for image in part.images.squeeze(1).numpy()]


def test_held_out_images_are_a_part_of_the_training_images_and_always_the_same():
    images, labels = bundled_digits()
    train_set = data.load("MNIST-10k", "")[0]
    train, validation = data.hold_out(train_set)
    rows = rows_of(train, images), rows_of(validation, images)
    assert len(rows[1]) == 750 and sorted(rows[0] + rows[1]) == list(range(9000))
    assert rows[0] == sorted(rows[0]) and labels[rows[1]].tolist() == validation.labels.tolist()
    assert min(np.bincount(labels[rows[1]])) > 40                       # a random part, not the first ones
    assert rows_of(data.hold_out(train_set)[1], images) == rows[1]
    assert set(rows_of(data.hold_out(train_set, 40)[1], images)) < set(rows[1])           # a prior may hold out fewer
    assert data.hold_out(train_set, 0) == (train_set, None)
    assert len(data.hold_out(data.Images(torch.zeros(70_000, 1, 1, 1), torch.zeros(70_000)))[1]) == 5000


def test_held_out_pictures_of_a_folder_are_not_trained_on(tmp_path):
    for i in range(40):
        (tmp_path / f"class {i % 2}").mkdir(exist_ok=True)
        Image.new("L", (8, 8), 5 * i).save(tmp_path / f"class {i % 2}" / f"{i}.png")
    train_set, test_set = data.load("folder", tmp_path, [1, 8, 8])
    parts = *data.hold_out(train_set), test_set
    shades = [part[:][0][:, 0, 0, 0].tolist() for part in parts]
    assert [len(part) for part in shades] == [33, 3, 4] and sorted(itertools.chain(*shades)) == list(range(0, 200, 5))
    for part, values in zip(parts, shades):
        assert part.labels.tolist() == [value // 5 % 2 for value in values]


@pytest.mark.parametrize("validation, test, best", [((3, 1, 2), (1, 2, 3), 2), ((1, 2, 3), (3, 1, 2), 1)])
def test_best_epoch_is_that_of_the_lowest_validation_loss(validation, test, best, mnist_folder, tmp_path, monkeypatch):
    """The second case has the two sets exchanged."""
    monkeypatch.chdir(tmp_path)
    script = import_script("VQ-VAE.py")
    losses = {"validating": iter(validation), "testing": iter(test)}
    monkeypatch.setattr(script, "evaluate_on", lambda trainer, batches, what: (
        Losses(*[float(next(losses[what]))] * 4), torch.ones(16, dtype=torch.int64)))
    monkeypatch.setattr(script.Trainer, "batches", lambda trainer, _: setattr(trainer.state, "images", 1) or ())
    script.main(["--data-folder", str(mnist_folder), "--num-epochs", "3", *SMALL])
    contents = checkpoint.load(tmp_path / "models" / "run" / "best.pt")
    assert contents["epoch"] == best
    assert (contents["validation"]["total"], contents["test"]["total"]) == (validation[best - 1], test[best - 1])


def test_other_test_images_change_no_weight_and_no_choice(mnist_folder, tmp_path, monkeypatch):
    """Both trainings again, with the negatives of the test images in another order."""
    load, kept = data.load, []
    for name, change in (("given", lambda images: images), ("other", lambda images: 255 - images.flip(0))):
        def load_changed(*arguments, change=change):
            train_set, test_set = load(*arguments)
            return train_set, data.Images(change(test_set.images), test_set.labels, test_set.classes)

        monkeypatch.setattr(data, "load", load_changed)
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        flags = ["--data-folder", str(mnist_folder), "--num-epochs", "3", "--lr", "1e-2"]
        import_script("VQ-VAE.py").main([*flags, *SMALL])
        import_script("train_prior.py").main([*flags, "--model", "models/run/best.pt", "--layers", "1", "--width", "8",
                                              "--heads", "1", "--sample-every", "0"])
        run = tmp_path / name / "models" / "run"
        kept.append((checkpoint.load(run / "best.pt"), checkpoint.load_prior(run / "prior.pt", run / "best.pt")[1]))
    for first, second in zip(*kept):
        assert first["epoch"] == second["epoch"] and first["validation"] == second["validation"]
        assert all(torch.equal(value, second["model"][key]) for key, value in first["model"].items())
        assert first["test"] != second["test"]


def test_calibration_needs_the_validation_maps_alone():
    script = import_script("train_prior.py")
    torch.manual_seed(0)
    prior, labels = CodePrior(200, 2, 3, layers=1, embedding=8, heads=2).eval(), torch.arange(10).repeat(100)
    with torch.no_grad():
        prior.head.weight.mul_(40)          # makes some codes improbable
    maps = prior.sample(labels, top_k=5)
    nats = script.calibrate_and_evaluate(prior, CodeMaps(None, None, maps, labels, None, None), validation_images=1000)
    assert prior.tail.any() and nats == pytest.approx(nats_per_code(prior, maps, labels))
    prior.tail.zero_()
    assert nats < nats_per_code(prior, maps, labels) - 0.05
    assert script.calibrate_and_evaluate(prior, CodeMaps(maps[None], labels, None, None, maps, labels), 0) is None
    assert not prior.tail.any()


def test_run_from_before_validation_images_resumes_as_it_began(mnist_folder, tmp_path):
    """It trains on all images, and keeps the epoch with the lowest test loss. The reference is uninterrupted."""
    folders = [tmp_path / name for name in ("whole", "resumed")]
    for folder, epochs in zip(folders, (3, 2)):
        folder.mkdir()
        result = run_script("VQ-VAE.py", "--data-folder", mnist_folder, "--num-epochs", epochs, *SMALL, "--lr", "1e-2",
                            "--validation-images", 0, cwd=folder)
        assert result.returncode == 0, result.stderr
    run = folders[1] / "models" / "run"
    last = torch.load(run / "last.pt", weights_only=True)
    del last["training"]["settings"]["validation_images"]
    last["training"]["progress"] |= {"best": 0.001, "best_epoch": 1}          # no later test loss is as low
    checkpoint.save(run / "last.pt", last)
    shutil.copy(run / "model_1.pt", run / "best.pt")
    result = run_script("VQ-VAE.py", "--resume", "--output-folder", "run", "--num-epochs", 3, cwd=folders[1])
    assert result.returncode == 0, result.stderr
    first, second = (torch.load(folder / "models" / "run" / "model_3.pt", weights_only=True)["model"]
                     for folder in folders)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    best, last = (checkpoint.load(run / name) for name in ("best.pt", "last.pt"))
    assert best["epoch"] == 1 and last["training"]["settings"]["validation_images"] is None
    assert "validation" not in best and not any("validation" in tag for tag in events(
        folders[1] / "logs" / "run").Tags()["scalars"])
    assert "Lowest test reconstruction loss: " in result.stdout and "to validate" not in result.stdout
    assert (run / "track.txt").read_text().splitlines()[0] == (
        folders[0] / "models" / "run" / "track.txt").read_text().splitlines()[0]


def test_as_many_validation_images_as_training_images_are_refused(mnist_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    line = expect_usage_error("VQ-VAE.py", ["--data-folder", mnist_folder, "--validation-images", 600], capsys)
    assert "--validation-images 600: the data set has 600 training images: hold out fewer" in line
    assert not list(tmp_path.iterdir())
