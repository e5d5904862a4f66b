"""metrics/samples.py and train_classifier.py, against independent computations."""

import numpy as np
import pytest
import torch
from helpers import bundled_digits, import_script, run_script, snapshot

import checkpoint
import data
from metrics import samples
from metrics.classifier import DigitClassifier, DigitTransformer


class CountingBar:
    """A stand-in for tqdm that only counts."""

    def __init__(self):
        self.n = 0

    def update(self, n):
        self.n += n


@pytest.mark.rounding
def test_frechet_distance_matches_the_symmetric_root_formula():
    generator = np.random.default_rng(0)
    features_1 = generator.normal(size=(400, 6)) @ generator.normal(size=(6, 6))
    features_2 = generator.normal(size=(300, 6)) @ generator.normal(size=(6, 6)) + 2
    cov_1, cov_2 = np.cov(features_1, rowvar=False), np.cov(features_2, rowvar=False)
    values, vectors = np.linalg.eigh(cov_1)
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    trace_root = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root)).sum()       # tr (Σ₁^½ Σ₂ Σ₁^½)^½
    squared_distance = np.square(features_1.mean(0) - features_2.mean(0)).sum()
    expected = squared_distance + np.trace(cov_1) + np.trace(cov_2) - 2 * trace_root
    actual = samples.frechet_distance(torch.from_numpy(features_1), torch.from_numpy(features_2))
    assert actual == pytest.approx(expected, rel=1e-8)


def test_frechet_distance_of_identical_and_shifted_sets():
    features = torch.randn(500, 8, generator=torch.Generator().manual_seed(0))
    features[:, 3] = 0                                                       # a feature that never fires
    assert 0 <= samples.frechet_distance(features, features) < 1e-4
    assert samples.frechet_distance(features, features + 3) == pytest.approx(8 * 9, rel=1e-4)


def test_precision_and_recall_match_brute_force():
    """Balls around three neighbours, in NumPy, for two overlapping sets, one larger than the other."""
    generator = np.random.default_rng(0)
    sampled, real = generator.normal(size=(40, 3)), generator.normal(size=(60, 3)) * 1.3 + 1.5

    def share_in_balls(points, centres):
        between = np.linalg.norm(centres[:, None] - centres, axis=2)
        radii = np.sort(between, axis=1)[:, 3]                                # [0] is the distance to itself
        return np.mean([any(np.linalg.norm(point - centre) <= radius for centre, radius in zip(centres, radii))
                        for point in points])

    expected = share_in_balls(sampled, real[:40]), share_in_balls(real[:40], sampled)
    assert 0.2 < expected[1] < expected[0] < 0.99
    assert samples.precision_and_recall(torch.from_numpy(sampled), torch.from_numpy(real)) == pytest.approx(expected)


def test_precision_and_recall_in_blocks_of_one_row(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    sets = torch.randn(30, 4, generator=generator), torch.randn(30, 4, generator=generator) * 1.5
    whole = samples.precision_and_recall(*sets)
    monkeypatch.setattr(samples, "items_that_fit", lambda numbers: 1)
    assert samples.precision_and_recall(*sets) == whole


def test_precision_falls_with_unreal_images_and_recall_with_missing_ones():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(400, 2, generator=generator)
    real[:200] += 20                                                          # two kinds, far apart
    half_missing = torch.randn(400, 2, generator=generator)
    precision, recall = samples.precision_and_recall(half_missing, real[torch.randperm(400, generator=generator)])
    assert precision > 0.9 and 0.4 < recall < 0.55
    assert samples.precision_and_recall(real, real) == (1, 1)
    assert samples.precision_and_recall(real + 1000, real) == (0, 0)
    with pytest.raises(ValueError, match="more than 3 images"):
        samples.precision_and_recall(real[:3], real)


@pytest.mark.parametrize("hits, count", [(0, 2000), (969, 1000), (30, 60)])
def test_standard_error_is_that_of_the_beta_distribution(hits, count):
    drawn = np.random.default_rng(0).beta(hits + 1, count - hits + 1, size=200_000)
    assert samples.standard_error(hits / count, count) == pytest.approx(drawn.std(), rel=0.02)


@pytest.mark.rounding
def test_classify_matches_the_classifier():
    torch.manual_seed(0)
    classifier, bar = DigitClassifier().eval(), CountingBar()
    images = torch.from_numpy(bundled_digits()[0][:1200]).unsqueeze(1)
    predictions = samples.classify(classifier, (data.to_model_range(batch) for batch in images.split(500)), bar)
    with torch.no_grad():
        x = images[700:720].double().div(127.5).sub(1).float()
        assert torch.allclose(predictions.features[700:720], classifier.features(x), atol=1e-5)
        assert torch.equal(predictions.digits[700:720], classifier(x).argmax(dim=1))
    assert bar.n == 1200 == len(predictions.digits) == len(predictions.features)


@pytest.mark.rounding
def test_augmented_digits_stay_near_their_originals():
    """Small rotations, scales and shifts: closer to the same digit than to most other images."""
    torch.manual_seed(0)
    script = import_script("train_classifier.py")
    x = data.to_model_range(torch.from_numpy(bundled_digits()[0][:100]).unsqueeze(1))
    augmented = script.augment(x)
    assert augmented.shape == x.shape and augmented.min() >= -1 and augmented.max() <= 1
    assert (augmented - x).abs().amax(dim=(1, 2, 3)).min() > 0.1              # none is unchanged
    distances = torch.cdist(augmented.flatten(1), x.flatten(1))              # (100, 100)
    assert (distances.argsort(dim=1).argsort(dim=1).diagonal() < 10).float().mean() > 0.8


@pytest.fixture(scope="module")
def classifier_folder(mnist_folder, tmp_path_factory):
    """A folder with a classifier trained on few digits. Read-only."""
    classifier_folder = tmp_path_factory.mktemp("classifier")
    result = run_script("train_classifier.py", "--data-folder", mnist_folder, "--num-epochs", 8, "--batch-size", 32,
                        "--output", "new/judge", cwd=classifier_folder)
    assert result.returncode == 0, result.stderr
    (classifier_folder / "stdout.txt").write_text(result.stdout)
    return classifier_folder


def test_classifier_reaches_its_reported_accuracy(classifier_folder):
    path = classifier_folder / "models" / "new" / "judge.pt"
    classifier, contents = checkpoint.load_classifier(path)
    images, labels = (torch.from_numpy(array[600:800]) for array in bundled_digits())
    with torch.no_grad():
        accuracy = (classifier(data.to_model_range(images.unsqueeze(1))).argmax(dim=1) == labels).double().mean().item()
    assert accuracy == pytest.approx(contents["test"]["accuracy"], abs=0.0101)   # one or two may differ by rounding
    assert accuracy > 0.9
    stdout = (classifier_folder / "stdout.txt").read_text()
    assert f"{contents['test']['accuracy']:.2%}" in stdout and "models/new/judge.pt" in stdout


def test_existing_classifier_is_kept_and_bad_input_is_rejected(classifier_folder, monkeypatch, capsys):
    monkeypatch.chdir(classifier_folder)
    before = snapshot(classifier_folder)
    for arguments, words in ((["--output", "new/judge"], "--output new/judge: models/new/judge.pt: exists"),
                             (["--output", "../judge"], "--output: '../judge'"),
                             (["--output", "new/judge.pt/deeper"], "models/new/judge.pt is not a folder"),
                             (["--batch-size", "1"], "--batch-size: '1' is not an integer of at least 2"),
                             (["--lr", "0"], "--lr: '0'")):
        with pytest.raises(SystemExit) as excinfo:
            import_script("train_classifier.py").main([*arguments, "--dataset", "MNIST-10k"])
        captured = capsys.readouterr()
        assert excinfo.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert words in captured.err, captured.err
    assert snapshot(classifier_folder) == before


def test_transformer_sees_patches_only_by_their_content_and_position():
    """Patches that change places with their positions give the same features, patches alone do not."""
    torch.manual_seed(0)
    model, order = DigitTransformer().eval(), torch.randperm(49)
    x = torch.rand(3, 1, 28, 28) * 2 - 1
    patches = x.view(3, 7, 4, 7, 4).transpose(2, 3).reshape(3, 49, 4, 4)
    moved = patches[:, order].view(3, 7, 7, 4, 4).transpose(2, 3).reshape(3, 1, 28, 28)
    with torch.no_grad():
        features = model.features(x)
        assert not torch.allclose(model.features(moved), features, atol=1e-3)
        model.positions.copy_(model.positions[order])
        assert torch.allclose(model.features(moved), features, atol=1e-5)
    assert features.shape == (3, 64) and model(x).shape == (3, 10)


def test_transformer_is_trained_resumed_and_rebuilt_from_its_file(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given: [data.Images(*part[:128]) for part in load(*given)])
    script, words = import_script("train_classifier.py"), ["--dataset", "MNIST-10k", "--output", "judge"]
    script.main([*words, "--architecture", "transformer", "--num-epochs", "1", "--batch-size", "32"])
    with pytest.raises(SystemExit):
        script.main([*words, "--resume", "--architecture", "cnn", "--num-epochs", "2"])
    assert "--architecture cnn contradicts the run, which has --architecture transformer" in capsys.readouterr().err
    script.main([*words, "--resume", "--num-epochs", "2"])
    classifier, contents = checkpoint.load_classifier("models/judge.pt")
    assert isinstance(classifier, DigitTransformer) and contents["config"] == {"architecture": "transformer"}
    assert contents["epoch"] == 2 and contents["step"] == 8
    contents["config"] = {"architecture": "mlp"}
    checkpoint.save("other.pt", contents)
    with pytest.raises(ValueError, match="none of cnn, transformer"):
        checkpoint.load_classifier("other.pt")


def test_classifier_file_without_architecture_is_the_cnn(classifier_folder, tmp_path):
    contents = torch.load(classifier_folder / "models" / "new" / "judge.pt", weights_only=True)
    assert contents.pop("config") == {"architecture": "cnn"}
    checkpoint.save(tmp_path / "old.pt", contents)
    classifier, loaded = checkpoint.load_classifier(tmp_path / "old.pt")
    assert isinstance(classifier, DigitClassifier) and loaded["config"] == {"architecture": "cnn"}
