"""The other data sets of torchvision, from small files in their real formats, against torchvision's own reading."""

import hashlib
import pickle
import string

import numpy as np
import pytest
import torch
from helpers import events, idx, import_script, readme_commands, refuse, run_script
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

import checkpoint
import data
import downloads

RANDOM = np.random.default_rng(0)
IDX_SETS = [name for name, source in downloads.SOURCES.items() if source.folder]
TRAIN, TEST = 60, 30


def write_idx_set(folder, name):
    """TRAIN + TEST noisy images of every class, so that each is there and no image equals its transpose."""
    source = downloads.SOURCES[name]
    (folder / source.folder).mkdir(parents=True)
    for i, count in ((0, TRAIN), (2, TEST)):
        images = RANDOM.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels = (np.arange(count) % len(source.classes) + source.first).astype(np.uint8)
        if name == "QMNIST":        # eight numbers for each image, the first one its class
            labels = np.stack([labels, *RANDOM.integers(0, 100, (7, count))], axis=1).astype(np.int32)
        for file, array in zip(source.files[i:], (images, labels)):
            (folder / source.folder / file).write_bytes(idx(array))


@pytest.mark.parametrize("name", IDX_SETS)
def test_idx_sets_read_as_torchvision_reads_them(tmp_path, name):
    write_idx_set(tmp_path, name)
    source = downloads.SOURCES[name]
    for part, options in zip(data.load(name, tmp_path), source.options):
        reference = source.kind(tmp_path, **options)
        seen = [np.asarray(image).T if name.startswith("EMNIST") else np.asarray(image) for image, _ in reference]
        assert np.array_equal(part.images.squeeze(1).numpy(), np.stack(seen))
        assert [reference.classes[label].split(" ")[0] if name in ("MNIST", "QMNIST") else reference.classes[label]
                for _, label in reference] == [part.classes[label] for label in part.labels]
        assert part.labels.min() == 0 and part.labels.max() == min(len(part), len(part.classes)) - 1


def test_letters_are_the_alphabet_from_a_on(tmp_path):
    write_idx_set(tmp_path, "EMNIST-letters")
    train, _ = data.load("EMNIST-letters", tmp_path)
    assert "".join(train.classes) == string.ascii_lowercase and train.labels[0] == 0


@pytest.mark.parametrize("name", ["QMNIST", "EMNIST-letters"])
def test_labels_of_another_set_are_refused(tmp_path, name):
    write_idx_set(tmp_path, name)
    path = tmp_path / downloads.SOURCES[name].folder / downloads.SOURCES[name].files[1]
    path.write_bytes(path.read_bytes()[:-4] + b"\x7f\x7f\x7f\x7f")
    if name == "QMNIST":
        path.write_bytes(idx(np.full((TRAIN, 8), 10, np.int32)))
    with pytest.raises(ValueError, match=f"{path.name}.*are not images and labels of {name}: delete both"):
        data.load(name, tmp_path)


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


@pytest.fixture
def colour_sets(tmp_path, monkeypatch):
    """A --data-folder with small CIFAR10 and SVHN, whose checksums torchvision is told. → folder, images, labels."""
    images = RANDOM.integers(0, 256, (70, 3, 32, 32), dtype=np.uint8)
    labels = np.arange(70) % 10
    batches = tmp_path / "cifar-10-batches-py"
    batches.mkdir()
    for i, (file, _) in enumerate(datasets.CIFAR10.train_list + datasets.CIFAR10.test_list):
        rows = slice(10 * i, 10 * i + 10)
        entry = {"data": images[rows].reshape(10, -1), "labels": labels[rows].tolist()}
        (batches / file).write_bytes(pickle.dumps(entry))
    (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": list(downloads.SOURCES["CIFAR10"].classes)}))
    for what in ("train_list", "test_list"):
        monkeypatch.setattr(datasets.CIFAR10, what, [[file, md5(batches / file)]
                                                    for file, _ in getattr(datasets.CIFAR10, what)])
    monkeypatch.setattr(datasets.CIFAR10, "meta", {**datasets.CIFAR10.meta, "md5": md5(batches / "batches.meta")})
    sums = {}
    for split, rows in (("train", slice(0, 50)), ("test", slice(50, 60))):
        path = tmp_path / f"{split}_32x32.mat"
        savemat(path, {"X": images[rows].transpose(2, 3, 1, 0), "y": np.where(labels == 0, 10, labels)[rows, None]})
        url, file, _ = datasets.SVHN.split_list[split]
        sums[split] = [url, file, md5(path)]
    monkeypatch.setattr(datasets.SVHN, "split_list", sums)
    return tmp_path, torch.from_numpy(images), torch.from_numpy(labels)


@pytest.mark.parametrize("name", ["CIFAR10", "SVHN"])
def test_colour_sets_hold_what_was_written(colour_sets, name):
    folder, images, labels = colour_sets
    train, test = data.load(name, folder)
    assert torch.equal(train.images, images[:50]) and torch.equal(test.images, images[50:60])
    assert torch.equal(train.labels, labels[:50]) and torch.equal(test.labels, labels[50:60])
    assert train.shape == [3, 32, 32] and len(train.classes) == 10


def test_a_colour_set_is_learned_sampled_and_measured(colour_sets, tmp_path, monkeypatch, capsys):
    folder, _, _ = colour_sets
    monkeypatch.chdir(tmp_path)
    there = ("--data-folder", str(folder))
    model = ("--model", "models/run/best.pt")
    import_script("VQ-VAE.py").main(["--dataset", "CIFAR10", *there, "--num-epochs", "1", "--batch-size", "25",
                                     "--k", "16", "--output-folder", "run"])
    import_script("train_prior.py").main([*model, *there, "--num-epochs", "1", "--width", "8", "--heads", "1"])
    assert checkpoint.load_model("models/run/best.pt")[1]["dataset"]["classes"][3] == "cat"
    for number, name in enumerate(("frog", "6", "cat")):
        import_script("generate.py").main([*model, "--input", "prior", "--label", name, "--filename", str(number)])
    import_script("generate.py").main([*model, *there])
    pictures = {path.stem: np.asarray(Image.open(path)) for path in (tmp_path / "generatedImages").iterdir()}
    assert set(pictures) == {"0", "1", "2", "CIFAR10"}
    assert pictures["CIFAR10"].shape == (36, 342, 3) and pictures["0"].shape == (342, 342, 3)
    assert np.array_equal(pictures["0"], pictures["1"]) and not np.array_equal(pictures["0"], pictures["2"])
    capsys.readouterr()
    evaluate = import_script("evaluate.py")
    monkeypatch.setattr(evaluate, "SAMPLES", 100)
    evaluate.main([*model, *there, "--prior", "models/run/prior.pt"])
    said = capsys.readouterr().out
    assert "10 test images of CIFAR10" in said and "nats per code" in said and "recognised" not in said
    for script, arguments, words in (
            ("generate.py", ["--input", "prior", "--label", "kitten"], ("--label kitten", "airplane", "cat")),
            ("generate.py", ["--input", "prior", "--label", "10"], ("--label 10", "0 to 9")),
            ("generate.py", ["--dataset", "MNIST-10k"], ("[3, 32, 32]", "[1, 28, 28]")),
            ("evaluate.py", ["--dataset", "SVHN", *there, "--prior", "models/run/prior.pt"],
             ("--dataset SVHN", "airplane", "32×32")),
            ("evaluate.py", [*there, "--prior", "models/run/prior.pt", "--classifier", str(checkpoint.CLASSIFIER)],
             ("--classifier", "leave it out"))):
        line = refuse(script, [*model, *arguments], capsys)
        assert all(word in line for word in words), line


def test_commands_of_the_readme_learn_clothes(tmp_path):
    write_idx_set(tmp_path / "MNIST", "FashionMNIST")
    for _, script, *words in readme_commands("Other data sets, and your own images"):
        more = ("--num-epochs", 1, "--k", 8) if script == "VQ-VAE.py" else ()
        done = run_script(script, *words, *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "generatedImages" / "FashionMNIST.png").is_file()


def test_complete_files_are_read_where_nobody_may_write(colour_sets, monkeypatch):
    folder, images, _ = colour_sets
    monkeypatch.setattr("os.access", lambda *_: False)
    assert torch.equal(data.load("SVHN", folder)[0].images, images[:50])


def test_letters_are_learned_and_drawn_in_order(tmp_path):
    write_idx_set(tmp_path / "data", "EMNIST-letters")
    there = ("--data-folder", "data", "--num-epochs", "1")
    assert run_script("VQ-VAE.py", "--dataset", "emnist-letters", *there, "--k", "8", cwd=tmp_path).returncode == 0
    done = run_script("train_prior.py", "--model", "models/vqvae/best.pt", *there, "--width", "8", "--heads", "1",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "prior/samples" in events(tmp_path / "logs" / "vqvae").Tags()["images"]
    prior, _ = checkpoint.load_prior(tmp_path / "models/vqvae/prior.pt", tmp_path / "models/vqvae/best.pt")
    assert prior.num_classes == 26
    done = run_script("generate.py", "--model", "models/vqvae/best.pt", "--input", "prior", "--label", "f",
                      cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_no_network_names_the_files_to_put_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: (_ for _ in ()).throw(OSError("no network")))
    for name, words in (("FashionMNIST", ("train-images-idx3-ubyte", "FashionMNIST/raw")),
                        ("SVHN", ("train_32x32.mat",)),
                        ("EMNIST-letters", ("emnist-letters-train-images-idx3-ubyte", "gzip.zip", "EMNIST/raw")),
                        ("QMNIST", ("qmnist-test-labels-idx2-int",)), ("CIFAR10", ("cifar-10-python.tar.gz",))):
        line = refuse("VQ-VAE.py", ["--dataset", name, "--data-folder", "new"], capsys)
        for word in (*words, f"--dataset {name} --data-folder new", "could not be downloaded", "http", "MNIST-10k"):
            assert word in line, line
        assert not list(tmp_path.iterdir())
