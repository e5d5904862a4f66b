"""Data sets: the bundled digits, the files of MNIST, and its download."""

import hashlib
import http.server
import io
import re
import threading

import numpy as np
import pytest
import torch
import torchvision
from helpers import ROOT, bundled_digits, snapshot, write_mnist

import data

FILES = [f"{split}-{kind}-ubyte" for split in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]


def test_bundled_digits_match_their_readme():
    page = (ROOT / "MNIST" / "README.md").read_text()
    images, labels = bundled_digits()
    assert images.shape == (10000, 28, 28) and images.dtype == labels.dtype == np.uint8
    assert hashlib.sha256((ROOT / "MNIST" / "MNIST-10k.npz").read_bytes()).hexdigest() in page
    assert hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest() in page
    counts = re.findall(r"\| (\d) \| ([\d,]+) \|", page)
    assert [int(count.replace(",", "")) for _, count in counts] == np.bincount(labels).tolist()


def test_bundled_digits_are_split_in_order():
    images, labels = bundled_digits()
    train, test = data.load("MNIST-10k", "no such folder")
    assert len(train) == 9000 and len(test) == 1000
    assert np.array_equal(torch.cat([train.images, test.images]).squeeze(1).numpy(), images)
    assert np.array_equal(torch.cat([train.labels, test.labels]).numpy(), labels)


@pytest.mark.parametrize("trained_on, name, seen", [
    ("MNIST", "MNIST-10k", True), ("QMNIST", "MNIST-10k", True), ("MNIST-10k", "MNIST", False),
    ("MNIST-10k", "MNIST-10k", False), ("MNIST", "QMNIST", False), ("QMNIST", "MNIST", False),
    ("MNIST", "EMNIST-mnist", None), ("EMNIST-digits", "MNIST-10k", None), ("EMNIST-letters", "EMNIST-byclass", None),
    ("EMNIST-digits", "EMNIST-digits", False), ("MNIST", "KMNIST", False), ("FashionMNIST", "MNIST-10k", False),
    ("folder", "MNIST", False), ("KMNIST", "EMNIST-mnist", False)])
def test_data_sets_that_share_images_are_known(trained_on, name, seen):
    found, sentence = data.seen_in_training(trained_on, name)
    assert found is seen
    assert (sentence == "") == (seen is False) and sentence.count(". ") == 0
    if sentence:
        assert f"trained on {trained_on}, " in sentence and ("has seen" if seen else "may have seen") in sentence


def test_mnist_matches_torchvision(mnist_folder):
    for split, is_train in zip(data.load("MNIST", mnist_folder), (True, False)):
        reference = torchvision.datasets.MNIST(mnist_folder, train=is_train)
        assert torch.equal(split.images.squeeze(1), reference.data)
        assert torch.equal(split.labels, reference.targets)


def test_scaling_matches_torchvision_and_inverts():
    images, _ = bundled_digits()
    reference = torchvision.transforms.Compose([torchvision.transforms.ToTensor(),
                                                torchvision.transforms.Normalize((0.5,), (0.5,))])
    every_byte = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for image in (images[0], every_byte):
        scaled = data.to_model_range(torch.from_numpy(image))
        assert torch.allclose(scaled, reference(image)[0], atol=1e-6)
        assert torch.equal(data.to_uint8(scaled), torch.from_numpy(image))
    assert data.to_uint8(torch.tensor([-3.0, 3.0])).tolist() == [0, 255]


@pytest.mark.parametrize(("count", "channels", "columns"), [(1, 1, 8), (1, 3, 8), (5, 1, 8), (64, 1, 8), (23, 3, 10)])
def test_grid_matches_torchvision_make_grid(count, channels, columns):
    images = torch.randint(256, (count, channels, 6, 9), dtype=torch.uint8)
    expected = torchvision.utils.make_grid(images, nrow=columns)
    assert torch.equal(data.grid(images, columns), expected.expand(3, -1, -1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_contain_every_image_once_with_its_label(num_workers):
    images = torch.arange(250, dtype=torch.uint8).view(250, 1, 1, 1).expand(250, 1, 4, 4)
    dataset = data.Images(images, torch.arange(250))
    orders = []
    for seed in (0, 0, 1):
        generator = torch.Generator().manual_seed(seed)
        batches = list(data.batches(dataset, 64, generator, num_workers))
        assert [len(x) for x, _ in batches] == [64, 64, 64, 58]
        labels = torch.cat([y for _, y in batches])
        assert torch.equal(torch.cat([x for x, _ in batches])[:, 0, 0, 0].long(), labels)
        assert torch.equal(labels.sort().values, torch.arange(250))
        orders.append(labels)
    assert torch.equal(orders[0], orders[1]) and not torch.equal(orders[0], orders[2])
    unshuffled = torch.cat([y for _, y in data.batches(dataset, 64)])
    assert torch.equal(unshuffled, torch.arange(250))


def test_order_is_independent_of_num_workers():
    dataset = data.Images(torch.zeros(100, 1, 4, 4, dtype=torch.uint8), torch.arange(100))
    orders = [torch.cat([y for _, y in data.batches(dataset, 8, torch.Generator().manual_seed(3), workers)])
              for workers in (0, 1)]
    assert torch.equal(*orders)


# ---------------------------------------------------------------- damaged files

@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["empty", "header", "truncated", "longer", "text", "other"])
def test_damaged_mnist_file_error_names_the_file(tmp_path, name, damage):
    raw = tmp_path / "MNIST" / "raw"
    write_mnist(raw, train=20, test=10)
    path = raw / name
    contents = path.read_bytes()
    path.write_bytes({"empty": b"", "header": contents[:6], "truncated": contents[:-1], "longer": contents + b"0",
                      "text": b"<html>not found</html>" * 9,
                      "other": (raw / name.replace("train", "*").replace("t10k", "train").replace("*", "t10k"))
                      .read_bytes()}[damage])
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=name.split("-")[0] + "-") as excinfo:
        data.load("MNIST", tmp_path)
    assert name in str(excinfo.value) or damage == "other"
    assert "delete" in str(excinfo.value)
    assert snapshot(tmp_path) == before


def test_damaged_bundle_error_names_the_file(tmp_path, monkeypatch):
    contents = data.BUNDLED.read_bytes()
    invalid_files, (images, labels) = [], bundled_digits()
    for save in (lambda file: np.save(file, labels),
                 lambda file: np.savez(file, images=images[:50], labels=labels[:50]),
                 lambda file: np.savez(file, images=images.astype(np.float32), labels=labels),
                 lambda file: np.savez(file, pictures=images, labels=labels)):
        save(file := io.BytesIO())
        invalid_files.append(file.getvalue())
    for damaged in (b"", contents[:1000], contents[:-1000], b"text" * 100, contents[:5000] + b"x" + contents[5001:],
                    *invalid_files):
        path = tmp_path / "MNIST-10k.npz"
        path.write_bytes(damaged)
        monkeypatch.setattr(data, "BUNDLED", path)
        with pytest.raises(ValueError, match=r"MNIST-10k\.npz is damaged"):
            data.load("MNIST-10k", tmp_path)


# ---------------------------------------------------------------- the download

class Server(http.server.ThreadingHTTPServer):
    """Serves a folder over local HTTP and records the requested paths."""

    def __init__(self, folder):
        self.requests = requests = []

        class Handler(http.server.SimpleHTTPRequestHandler):
            def __init__(self, *args):
                super().__init__(*args, directory=folder)

            def log_message(self, *args):
                requests.append(self.path)

        super().__init__(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.serve_forever, daemon=True).start()


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    """torchvision's MNIST redirected to a local server with small files in the real format."""
    write_mnist(tmp_path / "mirror", train=60, test=20, compress=True)
    server = Server(tmp_path / "mirror")
    files = [(path.name, hashlib.md5(path.read_bytes()).hexdigest()) for path in (tmp_path / "mirror").iterdir()]
    monkeypatch.setattr(torchvision.datasets.MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
    monkeypatch.setattr(torchvision.datasets.MNIST, "resources", files)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    server.server_close()


def test_mnist_is_downloaded_once_into_a_new_folder(tmp_path, mirror):
    train, test = data.load("MNIST", tmp_path / "new" / "folder")
    assert len(train) == 60 and len(test) == 20 and len(mirror.requests) >= 4
    mirror.requests.clear()
    reloaded, _ = data.load("MNIST", tmp_path / "new" / "folder")
    assert torch.equal(reloaded.images, train.images) and not mirror.requests


def test_local_gz_files_need_no_network(tmp_path, mirror):
    mirror.shutdown()
    write_mnist(tmp_path / "local" / "MNIST" / "raw", train=60, test=20, compress=True)
    # Byte for byte the files of the mirror: gzip stores a time stamp, and torchvision compares checksums.
    for path in (tmp_path / "mirror").iterdir():
        (tmp_path / "local" / "MNIST" / "raw" / path.name).write_bytes(path.read_bytes())
    train, _ = data.load("MNIST", tmp_path / "local")
    assert len(train) == 60 and not mirror.requests


def test_failed_download_explains_and_leaves_no_files(tmp_path, mirror, capsys):
    for path in (tmp_path / "mirror").iterdir():
        path.unlink()
    before = snapshot(tmp_path)
    with pytest.raises(OSError) as excinfo:
        data.load("MNIST", tmp_path / "new" / "folder")
    message = str(excinfo.value)
    assert "404" in message + capsys.readouterr().out           # older versions of torchvision print it
    for part in (f"http://127.0.0.1:{mirror.server_port}/", *FILES,
                 str(tmp_path / "new" / "folder" / "MNIST" / "raw"), "--dataset MNIST-10k"):
        assert part in message
    assert "\n" not in message
    assert snapshot(tmp_path) == before
