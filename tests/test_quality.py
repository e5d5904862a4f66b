"""The figures of sampled digits, against slower or older ways to reach them."""

import numpy as np
import pytest
import torch
from helpers import bundled_digits, import_script, run_script, snapshot

import checkpoint
import data
import quality
from classifier import DigitClassifier

pytestmark = pytest.mark.rounding


class Bar:
    """Stands for a tqdm: counts."""

    def __init__(self):
        self.n = 0

    def update(self, n):
        self.n += n


def test_frechet_distance_is_that_of_the_gaussians_by_a_symmetric_root():
    generator = np.random.default_rng(0)
    one = generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6))
    other = generator.normal(size=(300, 6)) @ generator.normal(size=(6, 6)) + 2
    first, second = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    values, vectors = np.linalg.eigh(first)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    between = np.sqrt(np.linalg.eigvalsh(root @ second @ root)).sum()       # tr (Σ₁^½ Σ₂ Σ₁^½)^½
    expected = np.square(one.mean(0) - other.mean(0)).sum() + np.trace(first) + np.trace(second) - 2 * between
    assert quality.frechet_distance(torch.from_numpy(one), torch.from_numpy(other)) == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero_and_of_moved_ones_the_square_of_the_way():
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0                                                       # a feature that never fires
    assert abs(quality.frechet_distance(features, features)) < 1e-4
    assert quality.frechet_distance(features, features + 3) == pytest.approx(8 * 9, rel=1e-4)


def test_memorised_counts_maps_that_stand_in_the_training_set():
    training = torch.randint(512, (50, 7, 7), generator=torch.Generator().manual_seed(0))
    maps = training[[3, 3, 8, 9]].clone()
    maps[3, 6, 6] = (maps[3, 6, 6] + 1) % 512
    assert quality.memorised(maps, training) == 0.75
    assert quality.memorised(maps[3:], training) == 0


def test_look_at_gives_what_the_classifier_says_batch_by_batch():
    torch.manual_seed(0)
    classifier, bar = DigitClassifier().eval(), Bar()
    images = torch.from_numpy(bundled_digits()[0][:1200]).unsqueeze(1)
    seen = quality.look_at(classifier, quality.real(images, "cpu"), bar)
    with torch.no_grad():
        x = images[700:720].double().div(127.5).sub(1).float()
        assert torch.allclose(seen.features[700:720], classifier.features(x), atol=1e-5)
        assert torch.equal(seen.digits[700:720], classifier(x).argmax(dim=1))
    assert bar.n == 1200 == len(seen.digits) == len(seen.features)


def test_augmented_digits_stay_the_digits_that_they_were():
    """Turned, scaled and moved by little: nearer to the digit itself than to most others."""
    torch.manual_seed(0)
    script = import_script("train_classifier.py")
    x = data.to_model_range(torch.from_numpy(bundled_digits()[0][:100]).unsqueeze(1))
    augmented = script.augment(x)
    assert augmented.shape == x.shape and augmented.min() >= -1 and augmented.max() <= 1
    assert (augmented - x).abs().amax(dim=(1, 2, 3)).min() > 0.1              # none as it was
    distances = torch.cdist(augmented.flatten(1), x.flatten(1))              # (100, 100)
    assert (distances.argsort(dim=1).argsort(dim=1).diagonal() < 10).float().mean() > 0.8


@pytest.fixture(scope="module")
def folder(mnist_folder, tmp_path_factory):
    """A folder with a classifier trained on a few digits. Not to be changed."""
    folder = tmp_path_factory.mktemp("classifier")
    done = run_script("train_classifier.py", "--data-folder", mnist_folder, "--num-epochs", 8, "--batch-size", 32,
                      "--output", "new/judge",
                      cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_trained_classifier_recognises_digits_as_often_as_it_says(folder):
    path = folder / "models" / "new" / "judge.pt"
    classifier, contents = checkpoint.load_classifier(path)
    images, labels = (torch.from_numpy(array[600:800]) for array in bundled_digits())
    with torch.no_grad():
        right = (classifier(data.to_model_range(images.unsqueeze(1))).argmax(dim=1) == labels).double().mean().item()
    assert right == pytest.approx(contents["test"]["accuracy"], abs=0.0101)  # rounding may turn a digit or two
    assert right > 0.9
    said = (folder / "stdout.txt").read_text()
    assert f"{contents['test']['accuracy']:.2%}" in said and "models/new/judge.pt" in said


def test_classifier_that_is_there_is_kept_and_bad_input_gets_one_line(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = snapshot(folder)
    for arguments, words in ((["--output", "new/judge"], "--output new/judge: models/new/judge.pt is there already"),
                             (["--output", "../judge"], "--output: '../judge'"),
                             (["--output", "new/judge.pt/deeper"], "models/new/judge.pt is in the way"),
                             (["--batch-size", "1"], "--batch-size: '1' is not a whole number from 2 on"),
                             (["--lr", "0"], "--lr: '0'")):
        with pytest.raises(SystemExit) as stopped:
            import_script("train_classifier.py").main([*arguments, "--dataset", "MNIST-10k"])
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1 and words in said.err, said.err
    assert snapshot(folder) == before
