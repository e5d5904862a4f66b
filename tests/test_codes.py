"""codes.py as a user runs it: its files read by NumPy alone, and decoded again."""

import argparse
import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, import_script, refuse, run_script, snapshot

import checkpoint
import data
from modules import VectorQuantizedVAE

pytestmark = pytest.mark.rounding


@pytest.fixture(scope="module")
def written(trained, tmp_path_factory):
    """A folder with a model and the codes of the bundled test digits, as the script wrote them. Not to be changed."""
    folder = tmp_path_factory.mktemp("codes")
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "model.pt")
    done = run_script("codes.py", "--model", "model.pt", "--part", "test", "--output", "codes.npz", cwd=folder)
    assert done.returncode == 0, done.stderr
    (folder / "said.txt").write_text(done.stdout)
    return folder


@pytest.fixture
def folder(written, tmp_path, monkeypatch):
    """A copy of it to stand in."""
    shutil.copytree(written, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


ROUNDED = 1e-3          # of the latents, at most, lie between two codes and go to either by rounding


def arrays_of(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def images_of(folder):
    """The test digits (1000, 1, 28, 28) in [-1, 1], and the model of the folder."""
    x = torch.from_numpy(bundled_digits()[0][9000:].astype(np.float32)).unsqueeze(1) / 127.5 - 1
    return x, checkpoint.load_model(folder / "model.pt")[0]


@torch.no_grad()
def test_codes_written_and_read_back_decode_to_the_reconstructions_exactly(written):
    x, model = images_of(written)
    codes = arrays_of(written / "codes.npz")
    indices = torch.from_numpy(codes["indices"].astype(np.int64))
    assert (indices != model.encode(x)).float().mean() < ROUNDED
    batch = data.to_model_range(data.load("MNIST-10k", "")[1].images[:500])             # as the script takes them
    assert torch.equal(indices[:500], model.encode(batch))
    assert torch.equal(model.decode(indices[:500]), model(batch).reconstruction)
    assert codes["labels"].tolist() == bundled_digits()[1][9000:].tolist()


def test_the_file_says_what_is_needed_and_is_small(written):
    codes = arrays_of(written / "codes.npz")
    assert codes["indices"].dtype == np.uint16 and codes["labels"].dtype == np.uint8
    assert codes["num_codes"] == 512 and codes["image_shape"].tolist() == [1, 28, 28]
    assert codes["dataset"] == "MNIST-10k" and codes["part"] == "test"
    assert codes["model_sha256"] == checkpoint.sha256(written / "model.pt")
    assert codes["class_names"].tolist() == list("0123456789")
    size, said = (written / "codes.npz").stat().st_size, (written / "said.txt").read_text()
    assert f"codes.npz: {size:,} bytes, 1,000 maps of 7×7 codes" in said and "9.00 bits each 55,125 bytes" in said
    assert size < 1000 * 49 * 16 / 8


@torch.no_grad()
def test_the_script_decodes_to_the_reconstructions_as_bytes(written, tmp_path):
    done = run_script("codes.py", "--decode", written / "codes.npz", "--model", written / "model.pt",
                      "--output", "new/images.npz", cwd=tmp_path)
    assert done.returncode == 0 and "1,000 images" in done.stdout, done.stderr
    images = arrays_of(tmp_path / "new" / "images.npz")
    _, model = images_of(written)
    assert images["images"].dtype == np.uint8 and images["images"].shape == (1000, 1, 28, 28)
    codes = torch.from_numpy(arrays_of(written / "codes.npz")["indices"].astype(np.int64))
    expected = torch.cat([model.decode(some) for some in codes.split(500)]).add(1).mul(127.5)
    assert np.abs(images["images"] - expected.numpy()).max() <= 0.501               # to the nearest byte
    assert np.array_equal(images["labels"], arrays_of(written / "codes.npz")["labels"])


def test_training_images_are_encoded_unless_the_flag_says_otherwise(mnist_folder, written, tmp_path):
    done = run_script("codes.py", "--model", written / "model.pt", "--dataset", "MNIST", "--data-folder", mnist_folder,
                      "--output", "codes.npz", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert arrays_of(tmp_path / "codes.npz")["labels"].tolist() == bundled_digits()[1][:600].tolist()


@pytest.mark.parametrize("num_codes, kind", [(1, np.uint8), (256, np.uint8), (257, np.uint16), (2**16, np.uint16),
                                             (2**16 + 1, np.uint32)])
def test_codes_take_the_smallest_type_that_holds_them(num_codes, kind):
    model = VectorQuantizedVAE(1, 2, num_codes, codebook_init="uniform").eval()
    script = import_script("codes.py")
    images = data.Images(torch.randint(256, (3, 1, 8, 12), dtype=torch.uint8), torch.tensor([0, 1, 300]))
    indices, labels = script.encode(model, images, argparse.Namespace(device="cpu", num_workers=0))
    assert indices.dtype == kind and indices.shape == (3, 2, 3) and labels.dtype == np.uint16
    largest = np.full((1, 2, 3), num_codes - 1, kind)
    assert script.decode(model, largest, "cpu").shape == (1, 1, 8, 12)


def test_a_file_is_replaced_with_overwrite_alone_and_none_of_another_kind(folder, capsys):
    shutil.copy(folder / "model.pt", "weights.npz")
    (folder / "text.npz").write_text("mine")
    np.savez("images.npz", images=np.zeros(3), model_sha256="of an earlier model")
    np.savez("foreign.npz", images=np.zeros(3))             # somebody's own
    (folder / "folder").mkdir()
    before = snapshot(folder)
    common = ["--model", "model.pt", "--dataset", "MNIST-10k", "--part", "test"]
    assert "--output codes.npz: is there already: replace it with --overwrite" in refuse(
        "codes.py", [*common, "--output", "codes.npz"], capsys)
    for name in ("weights.npz", "text.npz", "images.npz", "model.pt"):
        line = refuse("codes.py", [*common, "--output", name, "--overwrite"], capsys)
        assert f"--output {name}: is there and is no file of indices" in line
    for name in ("folder", "text.npz/codes.npz"):
        assert f"--output {name}: " in refuse("codes.py", [*common, "--output", name, "--overwrite"], capsys)
    decode = ["--model", "model.pt", "--decode", "codes.npz", "--overwrite"]
    for name in ("codes.npz", "foreign.npz"):
        assert "is no file of images" in refuse("codes.py", [*decode, "--output", name], capsys)
    assert snapshot(folder) == before
    import_script("codes.py").main([*decode, "--output", "images.npz"])
    import_script("codes.py").main([*common, "--output", "codes.npz", "--overwrite"])
    assert arrays_of("images.npz")["images"].shape == (1000, 1, 28, 28)


def test_codes_of_another_model_and_flags_that_nothing_looks_at_are_refused(folder, capsys):
    before = snapshot(folder)
    line = refuse("codes.py", ["--model", checkpoint.PRETRAINED, "--decode", "codes.npz", "--output", "x.npz"], capsys)
    assert "--decode codes.npz: its codes belong to another model" in line and "--model" in line
    for flag, value in (("--dataset", "MNIST"), ("--part", "test"), ("--data-folder", "elsewhere"),
                        ("--num-workers", "2")):
        line = refuse("codes.py", ["--decode", "codes.npz", "--output", "x.npz", flag, value], capsys)
        assert f"{flag} {value}" in line
    assert "--output" in refuse("codes.py", ["--decode", "codes.npz"], capsys)
    assert snapshot(folder) == before


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


def test_a_damaged_or_foreign_file_of_codes_gets_one_line(folder, capsys):
    good, whole = arrays_of("codes.npz"), (folder / "codes.npz").read_bytes()

    def changed(**arrays):
        np.savez("changed.npz", **(good | arrays))
        return (folder / "changed.npz").read_bytes()

    too_large, short = good["indices"].copy(), good["indices"][:, :6]
    too_large[-1, -1, -1] = 512
    damaged = {"empty": b"", "text": b"codes\n", "half": whole[:len(whole) // 2], "flipped": bytearray(whole),
               "objects": changed(labels=np.array([{}] * 1000)), "large": changed(indices=too_large),
               "short": changed(indices=short), "floats": changed(indices=good["indices"].astype(float)),
               "none": changed(indices=good["indices"][:0], labels=good["labels"][:0]),
               "unequal": changed(labels=good["labels"][1:]), "shape": changed(image_shape=[28, 28]),
               "colour": changed(image_shape=[3, 28, 28]), "names": changed(model_sha256=["a", "b"])}
    damaged["code"] = changed(model_sha256=np.array([Bomb()]))
    damaged["flipped"][len(whole) // 3] ^= 1
    np.save("array.npy", np.zeros(3))
    np.savez("foreign.npz", x=np.zeros(3))
    damaged |= {"array": (folder / "array.npy").read_bytes(), "foreign": (folder / "foreign.npz").read_bytes()}
    for name, contents in damaged.items():
        (folder / name).write_bytes(contents)
        line = refuse("codes.py", ["--model", "model.pt", "--decode", name, "--output", "x.npz"], capsys)
        assert f"--decode {name}: " in line and ("damaged" in line or "another model" in line), line
    line = refuse("codes.py", ["--model", "model.pt", "--decode", "missing", "--output", "x.npz"], capsys)
    assert "--decode missing: No such file" in line
    assert not (folder / "x.npz").exists() and not (folder / "exploded").exists()


def test_names_of_classes_are_kept_where_a_data_set_has_some(folder, monkeypatch):
    images = data.Images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]))
    images.classes = ["zero", "one"]
    monkeypatch.setattr(data, "load", lambda *_: (images, images))
    import_script("codes.py").main(["--model", "model.pt", "--output", "named.npz"])
    assert arrays_of("named.npz")["class_names"].tolist() == ["zero", "one"]
