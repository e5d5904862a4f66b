"""Checkpoints: written whole or not at all, rebuilt from the file alone, never run as code."""

import pickle

import pytest
import torch
from helpers import snapshot

import checkpoint
import files
from testers import images, trained_model
from vector_quantizer import CODEBOOK_UPDATES


def contents_of(model):
    config = {"channels": 1, "hidden_size": 8, "num_codes": 16, "codebook_init": "uniform", "restart_after": 7}
    return {"format": 1, "kind": "vqvae", "config": config, "dataset": {"name": "MNIST", "shape": [1, 28, 28]},
            "model": model.state_dict()}


def test_a_model_comes_back_from_its_file_alone(tmp_path):
    model = trained_model("cpu").eval()
    checkpoint.save(tmp_path / "model.pt", contents_of(model))
    restored, contents = checkpoint.load_model(tmp_path / "model.pt")
    assert contents["dataset"] == {"name": "MNIST", "shape": [1, 28, 28]}
    assert not restored.training and restored.quantizer.restart_after == 7
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    x = images(3)
    assert torch.equal(restored(x).reconstruction, model(x).reconstruction)


@pytest.mark.parametrize("update", CODEBOOK_UPDATES)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_a_bare_state_dict_of_this_model_loads_too(tmp_path, prefix, update):
    model = trained_model("cpu", codebook_update=update).eval()
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "state.pt")
    restored, _ = checkpoint.load_model(tmp_path / "state.pt", hidden_size=8, num_codes=16)
    x = images(3)
    assert torch.equal(restored(x).reconstruction, model(x).reconstruction)


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "model.pt", {"a": 1})
    before = snapshot(tmp_path)

    def fail(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", fail)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path / "model.pt", {"a": 2})
    assert snapshot(tmp_path) == before
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "no such folder" / "model.pt", {"a": 2})
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("sizes, word", [((9, None), "--hidden-size 9"), ((None, 17), "--k 17")])
def test_sizes_that_contradict_the_file_are_refused_with_both(tmp_path, sizes, word):
    checkpoint.save(tmp_path / "model.pt", contents_of(trained_model("cpu")))
    with pytest.raises(ValueError, match=word) as raised:
        checkpoint.load_model(tmp_path / "model.pt", "cpu", *sizes)
    assert {"--hidden-size 9": "--hidden-size 8", "--k 17": "--k 16"}[word] in str(raised.value)


class Bomb:
    """A pickle that, if it were read as pickles are, would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb)),
                                  lambda bomb, path: torch.save(bomb, path, _use_new_zipfile_serialization=False)])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, save):
    save({"kind": "vqvae", "model": Bomb(tmp_path / "exploded")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


def test_what_is_no_checkpoint_is_refused(tmp_path):
    good = contents_of(trained_model("cpu"))
    checkpoint.save(tmp_path / "good.pt", good)
    whole = (tmp_path / "good.pt").read_bytes()
    files = {"empty": (b"", "empty"), "text": (b"These are not the weights.\n" * 20, "not a checkpoint"),
             "half": (whole[:len(whole) // 2], "not a checkpoint"), "one byte": (b"\x80", "not a checkpoint"),
             "pickle": (pickle.dumps([1, 2]), "not a checkpoint")}
    for name, (data, words) in files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(tmp_path / name)
    state = good["model"]
    without = {key: value for key, value in state.items() if key != "decoder.6.bias"}
    dictionaries = {"other kind": ({**good, "kind": "prior"}, "not a checkpoint of a VQ-VAE"),
                    "future": ({**good, "format": 2}, "format 2"), "list": ([1], "not a checkpoint of a VQ-VAE"),
                    "no config": ({**good, "config": None}, "do not fit"),
                    "empty config": ({**good, "config": {}}, "do not fit"),
                    "empty model": ({**good, "config": {**good["config"], "hidden_size": 0}}, "do not fit"),
                    "tensor format": ({**good, "format": torch.ones(2)}, "format"),
                    "huge": ({**good, "dataset": {"name": "MNIST", "shape": [1, 4000000, 4000000]}}, "4000000"),
                    "channels": ({**good, "dataset": {"name": "MNIST", "shape": [3, 28, 28]}}, "3×28×28"),
                    "odd": ({**good, "dataset": {"name": "MNIST", "shape": [1, 2, 28]}}, "1×2×28"),
                    "numbered": ({1: torch.zeros(2)}, "not a checkpoint of a VQ-VAE"),
                    "flat": ({"codeBook.embedding.weight": torch.tensor(1.0)}, "not those of a VQ-VAE"),
                    "no data set": ({**good, "dataset": None}, "which data set"),
                    "no shape": ({**good, "dataset": {"name": "MNIST", "shape": [28]}}, "which data set"),
                    "other size": ({**good, "config": {**good["config"], "hidden_size": 9}}, "do not fit"),
                    "missing": ({**good, "model": without}, "decoder.6.bias"),
                    "tensors": ({"fc.weight": torch.zeros(2)}, "not those of a VQ-VAE"), "bare": (without, "decoder")}
    for name, (value, words) in dictionaries.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_model(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError):
        checkpoint.load_model(tmp_path)
