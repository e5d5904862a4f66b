"""The data sets of torchvision, from small files in their real formats, against torchvision's own loaders."""

import hashlib
import pickle
import string

import numpy as np
import pytest
import torch
from helpers import events, expect_usage_error, idx_bytes, import_script, readme_commands, run_script, write_mnist
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import checkpoint
import data
from data import downloads

RNG = np.random.default_rng(0)
IDX_SETS = [name for name, source in downloads.SOURCES.items() if source.folder]
NUM_TRAIN, NUM_TEST = 60, 30


def write_idx_set(folder, name):
    """Write NUM_TRAIN + NUM_TEST images of noise, with labels that cycle through the classes."""
    source = downloads.SOURCES[name]
    (folder / source.folder).mkdir(parents=True)
    for i, count in ((0, NUM_TRAIN), (2, NUM_TEST)):
        images = RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % len(source.classes) + source.first).astype(np.uint8)
        if name == "QMNIST":        # eight numbers per image, the first of which is the class
            labels = np.stack([labels, *RNG.integers(0, 100, (7, count))], axis=1).astype(np.int32)
        for file, array in zip(source.files[i:], (images, labels)):
            (folder / source.folder / file).write_bytes(idx_bytes(array))


@pytest.mark.parametrize("name", IDX_SETS)
def test_idx_data_sets_match_torchvision(tmp_path, name):
    write_idx_set(tmp_path, name)
    source = downloads.SOURCES[name]
    for part, options in zip(data.load(name, tmp_path), source.options):
        reference = source.kind(tmp_path, **options)
        expected = [np.asarray(image).T if name.startswith("EMNIST") else np.asarray(image) for image, _ in reference]
        assert np.array_equal(part.images.squeeze(1).numpy(), np.stack(expected))
        assert [reference.classes[label].split(" ")[0] if name in ("MNIST", "QMNIST") else reference.classes[label]
                for _, label in reference] == [part.classes[label] for label in part.labels]
        assert part.labels.min() == 0 and part.labels.max() == min(len(part), len(part.classes)) - 1


def test_files_of_the_first_torchvision_get_one_line(tmp_path):
    folder = tmp_path / "MNIST" / "processed"
    folder.mkdir(parents=True)
    for name, content in (("training.pt", b""), ("test.pt", b"damaged, too")):
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match="processed is of an old version of torchvision: move it away"):
        data.load("MNIST", tmp_path)


@pytest.mark.parametrize("place", ["MNIST/raw", "."])
@pytest.mark.parametrize("dot", ["-", "."])
def test_files_that_were_put_there_by_hand_are_found(dot, place, tmp_path):
    """Under either of the names that the web has for them, where torchvision looks or directly in --data-folder."""
    write_mnist(tmp_path / "MNIST" / "raw", 60, 30)
    expected = data.load("MNIST", tmp_path)
    for path in (tmp_path / "MNIST" / "raw").iterdir():
        path.rename(tmp_path / place / path.name.replace("-idx", f"{dot}idx"))
    for part, other in zip(data.load("MNIST", tmp_path), expected):
        assert torch.equal(part.images, other.images) and torch.equal(part.labels, other.labels)


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST"])
def test_mnist_files_are_not_taken_for_another_set_with_the_same_names(name, tmp_path, monkeypatch):
    write_mnist(tmp_path, 60, 30)
    monkeypatch.setattr(downloads, "_torchvision_sets", lambda *_: (_ for _ in ()).throw(OSError("no network")))
    assert len(data.load("MNIST", tmp_path)[0]) == 60
    with pytest.raises(OSError, match="no network"):
        data.load(name, tmp_path)


def test_emnist_letters_classes_are_the_alphabet(tmp_path):
    write_idx_set(tmp_path, "EMNIST-letters")
    train, _ = data.load("EMNIST-letters", tmp_path)
    assert "".join(train.classes) == string.ascii_lowercase and train.labels[0] == 0


@pytest.mark.parametrize("name", ["QMNIST", "EMNIST-letters"])
def test_labels_of_another_data_set_are_rejected(tmp_path, name):
    write_idx_set(tmp_path, name)
    path = tmp_path / downloads.SOURCES[name].folder / downloads.SOURCES[name].files[1]
    path.write_bytes(path.read_bytes()[:-4] + b"\x7f\x7f\x7f\x7f")
    if name == "QMNIST":
        path.write_bytes(idx_bytes(np.full((NUM_TRAIN, 8), 10, np.int32)))
    with pytest.raises(ValueError, match=f"{path.name}.*are not images and labels of {name}: delete both"):
        data.load(name, tmp_path)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def colour_sets(tmp_path, monkeypatch):
    """A --data-folder with a small CIFAR10 and SVHN, their checksums patched. → folder, images, labels"""
    images = RNG.integers(0, 256, (70, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(70) % 10
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for i, (file, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        rows = slice(10 * i, 10 * i + 10)
        entry = {"data": images[rows].reshape(10, -1), "labels": labels[rows].tolist()}
        (batches / file).write_bytes(pickle.dumps(entry))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(downloads.SOURCES["CIFAR10"].classes)}))
    for attribute in ("train_list", "test_list"):
        patched = [[file, md5(batches / file)] for file, _ in getattr(datasets.CIFAR10, attribute)]
        monkeypatch.setattr(datasets.CIFAR10, attribute, patched)
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(batches / "batches.meta")})
    split_list = {}
    for split, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images[rows].transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[rows, None]})
        url, file, _ = datasets.SVHN.split_list[split]
        split_list[split] = [url, file, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", split_list)
    return tmp_path, torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_colour_data_sets_load_exactly(colour_sets, name):
    folder, images, labels = colour_sets
    train, test = data.load(name, folder)
    assert torch.equal(train.images, images[:50]) and torch.equal(test.images, images[50:60])
    assert torch.equal(train.labels, labels[:50]) and torch.equal(test.labels, labels[50:60])
    assert train.shape == [3, 32, 32] and len(train.classes) == 10


def test_colour_data_set_works_in_every_script(colour_sets, tmp_path, monkeypatch, capsys):
    folder, _, _ = colour_sets
    monkeypatch.chdir(tmp_path)
    data_flags = ("--data-folder", str(folder))
    model = ("--model", "models/run/best.pt")
    import_script("VQ-VAE.py").main(["--dataset", "CIFAR10", *data_flags, "--num-epochs", "1", "--batch-size", "25",
                                     "--k", "16", "--output-folder", "run"])
    import_script("train_prior.py").main([*model, *data_flags, "--num-epochs", "1", "--width", "8", "--heads", "1"])
    assert checkpoint.load_model("models/run/best.pt")[1]["dataset"]["classes"][3] == "cat"
    for number, name in enumerate(("frog", "6", "cat")):
        import_script("generate.py").main([*model, "--input", "prior", "--label", name, "--filename", str(number)])
    import_script("generate.py").main([*model, *data_flags])
    pictures = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "generatedImages").iterdir()}
    assert set(pictures) == {"0", "1", "2", "CIFAR10"}
    assert pictures["CIFAR10"].shape == (36, 342, 3) and pictures["0"].shape == (342, 342, 3)
    assert np.array_equal(pictures["0"], pictures["1"]) and not np.array_equal(pictures["0"], pictures["2"])
    capsys.readouterr()
    evaluate = import_script("evaluate.py")
    monkeypatch.setattr(evaluate, "NUM_SAMPLES", 100)
    evaluate.main([*model, *data_flags, "--prior", "models/run/prior.pt"])
    output = capsys.readouterr().out
    assert "10 test images of CIFAR10" in output and "nats per code" in output and "recognised" not in output
    for script, arguments, words in (
            ("generate.py", ["--input", "prior", "--label", "kitten"], ("--label kitten", "airplane", "cat")),
            ("generate.py", ["--input", "prior", "--label", "10"], ("--label 10", "0 to 9")),
            ("generate.py", ["--dataset", "MNIST-10k"], ("[3, 32, 32]", "[1, 28, 28]")),
            ("evaluate.py", ["--dataset", "SVHN", *data_flags, "--prior", "models/run/prior.pt"],
             ("--dataset SVHN", "airplane", "32×32")),
            ("evaluate.py", [*data_flags, "--prior", "models/run/prior.pt", "--classifier", str(checkpoint.CLASSIFIER)],
             ("--classifier", "leave it out"))):
        line = expect_usage_error(script, [*model, *arguments], capsys)
        assert all(word in line for word in words), line


def test_fashion_mnist_commands_of_the_docs_run(tmp_path):
    write_idx_set(tmp_path / "MNIST", "FashionMNIST")
    for _, script, *words in readme_commands("docs/own-images.md", "Data sets by name"):
        extra = ("--num-epochs", 1, "--k", 8) if script == "VQ-VAE.py" else ()
        result = run_script(script, *words, *extra, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    assert (tmp_path / "generatedImages" / "FashionMNIST.png").is_file()


def test_complete_files_load_without_write_access(colour_sets, monkeypatch):
    folder, images, _ = colour_sets
    monkeypatch.setattr("os.access", lambda *_: False)
    assert torch.equal(data.load("SVHN", folder)[0].images, images[:50])


def test_emnist_letters_train_and_sample_by_label(tmp_path):
    write_idx_set(tmp_path / "data", "EMNIST-letters")
    data_flags = ("--data-folder", "data", "--num-epochs", "1")
    assert run_script("VQ-VAE.py", "--dataset", "emnist-letters", *data_flags, "--k", "8", cwd=tmp_path).returncode == 0
    result = run_script("train_prior.py", "--model", "models/vqvae/best.pt", *data_flags, "--width", "8",
                        "--heads", "1", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "prior/samples" in events(tmp_path / "logs" / "vqvae").Tags()["images"]
    prior, _ = checkpoint.load_prior(tmp_path / "models/vqvae/prior.pt", tmp_path / "models/vqvae/best.pt")
    assert prior.num_classes == 26
    result = run_script("generate.py", "--model", "models/vqvae/best.pt", "--input", "prior", "--label", "f",
                        cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_missing_network_error_names_the_needed_files(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    for name, words in (("FashionMNIST", ("train-images-idx3-ubyte", "FashionMNIST/raw")),
                        ("SVHN", ("train_32x32.mat",)),
                        ("EMNIST-letters", ("emnist-letters-train-images-idx3-ubyte", "gzip.zip", "EMNIST/raw")),
                        ("QMNIST", ("qmnist-test-labels-idx2-int",)), ("CIFAR10", ("cifar-10-python.tar.gz",))):
        line = expect_usage_error("VQ-VAE.py", ["--dataset", name, "--data-folder", "new"], capsys)
        for word in (*words, f"--dataset {name} --data-folder new", "could not be downloaded", "http", "MNIST-10k"):
            assert word in line, line
        assert not list(tmp_path.iterdir())
