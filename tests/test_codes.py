"""codes.py from the command line: its files read with plain NumPy, and decoded again."""

import argparse
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import bundled_digits, expect_usage_error, import_script, run_script, snapshot

import checkpoint
import data
from modules import VectorQuantizedVAE


@pytest.fixture(scope="module")
def codes_folder(trained, tmp_path_factory):
    """A folder with a model and the codes of the bundled test digits, written by the script. Read-only."""
    folder = tmp_path_factory.mktemp("codes")
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "model.pt")
    result = run_script("codes.py", "--model", "model.pt", "--part", "test", "--output", "codes.npz", cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


@pytest.fixture
def folder(codes_folder, tmp_path, monkeypatch):
    """A copy of codes_folder as the working directory."""
    shutil.copytree(codes_folder, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


MAX_ROUNDED = 1e-3          # largest share of latents that may round to another code


def load_arrays(path):
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def load_images_and_model(folder):
    """The test digits (1000, 1, 28, 28) in [-1, 1], and the model of the folder."""
    x = torch.from_numpy(bundled_digits()[0][9000:].astype(np.float32)).unsqueeze(1) / 127.5 - 1
    return x, checkpoint.load_model(folder / "model.pt")[0]


@torch.no_grad()
def test_small_files_that_unpack_to_too_much_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = import_script("codes.py")
    script.main(["--dataset", "MNIST-10k", "--part", "test", "--output", "codes.npz"])
    model, contents = checkpoint.load_model(checkpoint.PRETRAINED)
    arrays = script.read_codes("codes.npz", model, contents["sha256"])
    script.MAX_UNPACKED = 10**6
    np.savez_compressed("many.npz", **{**arrays, "indices": np.zeros((2000, 7, 7), np.uint16),
                                       "labels": np.zeros(2000, np.uint8)})
    np.savez_compressed("padded.npz", **arrays, more=np.zeros(10**7, np.uint8))
    for name, words in (("many.npz", "its 2,000 images of 1×28×28"), ("padded.npz", "unpacks to 10,")):
        with pytest.raises(ValueError, match=words):
            script.read_codes(name, model, contents["sha256"])


def test_model_and_its_sha256_come_from_one_read(tmp_path, monkeypatch):
    """So that a model that is replaced while a script starts cannot get another one's."""
    monkeypatch.chdir(tmp_path)
    read, paths = Path.read_bytes, []
    monkeypatch.setattr(Path, "read_bytes", lambda self: paths.append(self.name) or read(self))
    for script, *flags in (("codes.py", "--dataset", "MNIST-10k", "--part", "test", "--output", "codes.npz"),
                           ("codes.py", "--decode", "codes.npz", "--output", "images.npz"),
                           ("generate.py", "--input", "prior")):
        paths.clear()
        import_script(script).main(flags)
        assert paths.count("vqvae.pt") == 1


def test_saved_codes_decode_exactly_to_the_reconstructions(codes_folder):
    x, model = load_images_and_model(codes_folder)
    codes = load_arrays(codes_folder / "codes.npz")
    indices = torch.from_numpy(codes["indices"].astype(np.int64))
    assert (indices != model.encode(x)).float().mean() < MAX_ROUNDED
    batch = data.to_model_range(data.load("MNIST-10k", "")[1].images[:500])             # in the batches of the script
    assert torch.equal(indices[:500], model.encode(batch))
    assert torch.equal(model.decode(indices[:500]), model(batch).reconstruction)
    assert codes["labels"].tolist() == bundled_digits()[1][9000:].tolist()


def test_codes_file_is_complete_and_small(codes_folder):
    codes = load_arrays(codes_folder / "codes.npz")
    assert codes["indices"].dtype == np.uint16 and codes["labels"].dtype == np.uint8
    assert codes["num_codes"] == 512 and codes["image_shape"].tolist() == [1, 28, 28]
    assert codes["dataset"] == "MNIST-10k" and codes["part"] == "test"
    assert codes["model_sha256"] == checkpoint.load(codes_folder / "model.pt")["sha256"]
    assert codes["class_names"].tolist() == list("0123456789")
    size, stdout = (codes_folder / "codes.npz").stat().st_size, (codes_folder / "stdout.txt").read_text()
    assert f"codes.npz: {size:,} bytes, 1,000 maps of 7×7 codes" in stdout and "9.00 bits each 55,125 bytes" in stdout
    assert size < 1000 * 49 * 16 / 8


@torch.no_grad()
def test_decode_writes_reconstructions_as_uint8(codes_folder, tmp_path):
    result = run_script("codes.py", "--decode", codes_folder / "codes.npz", "--model", codes_folder / "model.pt",
                        "--output", "new/images.npz", cwd=tmp_path)
    assert result.returncode == 0 and "1,000 images" in result.stdout, result.stderr
    images = load_arrays(tmp_path / "new" / "images.npz")
    _, model = load_images_and_model(codes_folder)
    assert images["images"].dtype == np.uint8 and images["images"].shape == (1000, 1, 28, 28)
    codes = torch.from_numpy(load_arrays(codes_folder / "codes.npz")["indices"].astype(np.int64))
    expected = torch.cat([model.decode(chunk) for chunk in codes.split(500)]).add(1).mul(127.5)
    assert np.abs(images["images"] - expected.numpy()).max() <= 0.501               # rounded to the nearest integer
    assert np.array_equal(images["labels"], load_arrays(codes_folder / "codes.npz")["labels"])


def test_training_set_is_encoded_by_default(mnist_folder, codes_folder, tmp_path):
    result = run_script("codes.py", "--model", codes_folder / "model.pt", "--dataset", "MNIST", "--data-folder",
                        mnist_folder, "--output", "codes.npz", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert load_arrays(tmp_path / "codes.npz")["labels"].tolist() == bundled_digits()[1][:600].tolist()


@pytest.mark.parametrize("num_codes, dtype", [(1, np.uint8), (256, np.uint8), (257, np.uint16), (2**16, np.uint16),
                                             (2**16 + 1, np.uint32)])
def test_indices_have_the_smallest_sufficient_dtype(num_codes, dtype):
    model = VectorQuantizedVAE(1, 2, num_codes, codebook_init="uniform").eval()
    script = import_script("codes.py")
    images = data.Images(torch.randint(256, (3, 1, 8, 12), dtype=torch.uint8), torch.tensor([0, 1, 300]))
    indices, labels = script.encode(model, images, argparse.Namespace(device="cpu", num_workers=0))
    assert indices.dtype == dtype and indices.shape == (3, 2, 3) and labels.dtype == np.uint16
    largest = np.full((1, 2, 3), num_codes - 1, dtype)
    assert script.decode(model, largest).shape == (1, 1, 8, 12)


def test_overwrite_replaces_only_files_of_the_same_kind(folder, capsys):
    shutil.copy(folder / "model.pt", "weights.npz")
    (folder / "text.npz").write_text("mine")
    np.savez("images.npz", images=np.zeros(3), model_sha256="of an earlier model")
    np.savez("foreign.npz", images=np.zeros(3))             # a file of the user
    future = bytearray(Path("images.npz").read_bytes())
    future[future.index(b"PK\x01\x02") + 6] = 99            # needs a later version of the format
    Path("future.npz").write_bytes(future)
    (folder / "folder").mkdir()
    before = snapshot(folder)
    encode_flags = ["--model", "model.pt", "--dataset", "MNIST-10k", "--part", "test"]
    assert "--output codes.npz: exists, replace it with --overwrite" in expect_usage_error(
        "codes.py", [*encode_flags, "--output", "codes.npz"], capsys)
    for name in ("weights.npz", "text.npz", "images.npz", "model.pt", "future.npz"):
        line = expect_usage_error("codes.py", [*encode_flags, "--output", name, "--overwrite"], capsys)
        assert f"--output {name}: exists and is not a file of indices" in line
    for name in ("folder", "text.npz/codes.npz"):
        line = expect_usage_error("codes.py", [*encode_flags, "--output", name, "--overwrite"], capsys)
        assert f"--output {name}: " in line
    decode_flags = ["--model", "model.pt", "--decode", "codes.npz", "--overwrite"]
    for name in ("codes.npz", "foreign.npz"):
        assert "is not a file of images" in expect_usage_error("codes.py", [*decode_flags, "--output", name], capsys)
    assert snapshot(folder) == before
    import_script("codes.py").main([*decode_flags, "--output", "images.npz"])
    import_script("codes.py").main([*encode_flags, "--output", "codes.npz", "--overwrite"])
    assert load_arrays("images.npz")["images"].shape == (1000, 1, 28, 28)


def test_codes_of_another_model_and_unused_flags_are_rejected(folder, capsys):
    before = snapshot(folder)
    arguments = ["--model", checkpoint.PRETRAINED, "--decode", "codes.npz", "--output", "x.npz"]
    line = expect_usage_error("codes.py", arguments, capsys)
    assert "--decode codes.npz: its codes belong to another model" in line and "--model" in line
    for flag, value in (("--dataset", "MNIST"), ("--part", "test"), ("--data-folder", "elsewhere"),
                        ("--num-workers", "2")):
        line = expect_usage_error("codes.py", ["--decode", "codes.npz", "--output", "x.npz", flag, value], capsys)
        assert f"{flag} {value}" in line
    assert "--output" in expect_usage_error("codes.py", ["--decode", "codes.npz"], capsys)
    assert snapshot(folder) == before


class CodeInPickle:
    """Unpickling it creates the file "exploded"."""

    def __reduce__(self):
        return open, ("exploded", "w")


def test_damaged_codes_file_gets_a_one_line_error(folder, capsys):
    valid, content = load_arrays("codes.npz"), (folder / "codes.npz").read_bytes()

    def resave(**arrays):
        np.savez("changed.npz", **(valid | arrays))
        return (folder / "changed.npz").read_bytes()

    too_large, cropped = valid["indices"].copy(), valid["indices"][:, :6]
    too_large[-1, -1, -1] = 512
    damaged = {"empty": b"", "text": b"codes\n", "half": content[:len(content) // 2], "flipped": bytearray(content),
               "objects": resave(labels=np.array([{}] * 1000)), "large": resave(indices=too_large),
               "short": resave(indices=cropped), "floats": resave(indices=valid["indices"].astype(float)),
               "none": resave(indices=valid["indices"][:0], labels=valid["labels"][:0]),
               "unequal": resave(labels=valid["labels"][1:]), "shape": resave(image_shape=[28, 28]),
               "colour": resave(image_shape=[3, 28, 28]), "names": resave(model_sha256=["a", "b"]),
               "labels": resave(labels=np.full(1000, 2**64 - 1, np.uint64)), "number": resave(num_codes="x"),
               "fewer": resave(num_codes=511)}
    damaged["code"] = resave(model_sha256=np.array([CodeInPickle()]))
    damaged["flipped"][len(content) // 3] ^= 1
    np.save("array.npy", np.zeros(3))
    np.savez("foreign.npz", x=np.zeros(3))
    damaged |= {"array": (folder / "array.npy").read_bytes(), "foreign": (folder / "foreign.npz").read_bytes()}
    for name, contents in damaged.items():
        (folder / name).write_bytes(contents)
        line = expect_usage_error("codes.py", ["--model", "model.pt", "--decode", name, "--output", "x.npz"], capsys)
        assert f"--decode {name}: " in line and ("damaged" in line or "another model" in line), line
    line = expect_usage_error("codes.py", ["--model", "model.pt", "--decode", "missing", "--output", "x.npz"], capsys)
    assert "--decode missing: No such file" in line
    assert not (folder / "x.npz").exists() and not (folder / "exploded").exists()


def test_class_names_are_saved(folder, monkeypatch):
    images = data.Images(torch.zeros(2, 1, 28, 28, dtype=torch.uint8), torch.tensor([0, 1]))
    images.classes = ["zero", "one"]
    monkeypatch.setattr(data, "load", lambda *_: (images, images))
    import_script("codes.py").main(["--model", "model.pt", "--output", "named.npz"])
    assert load_arrays("named.npz")["class_names"].tolist() == ["zero", "one"]
