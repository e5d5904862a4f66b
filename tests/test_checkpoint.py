"""Checkpoints: atomic writes, models rebuilt from the file alone, no execution of pickled code."""

import pickle

import pytest
import torch
from helpers import snapshot

import checkpoint
from testers import random_images, trained_model
from utils import files
from vector_quantizer import CODEBOOK_UPDATES


def make_contents(model):
    config = {"channels": 1, "hidden_size": 8, "num_codes": 16, "codebook_init": "uniform", "restart_after": 7}
    return {"format": 1, "kind": "vqvae", "config": config, "dataset": {"name": "MNIST", "shape": [1, 28, 28]},
            "model": model.state_dict()}


def test_checkpoint_alone_rebuilds_the_model(tmp_path):
    model = trained_model("cpu").eval()
    checkpoint.save(tmp_path / "model.pt", make_contents(model))
    restored, contents = checkpoint.load_model(tmp_path / "model.pt")
    assert contents["dataset"] == {"name": "MNIST", "shape": [1, 28, 28]}
    assert not restored.training and restored.quantizer.restart_after == 7
    for name, value in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], value), name
    x = random_images(3)
    assert torch.equal(restored(x).reconstruction, model(x).reconstruction)


@pytest.mark.parametrize("dataset", [..., ["MNIST"], 3])         # ... is none at all
def test_prior_and_classifier_without_the_name_of_a_data_set_are_refused(dataset, tmp_path):
    def load_prior(path):
        return checkpoint.load_prior(path, checkpoint.PRETRAINED)

    for shipped, load in ((checkpoint.PRETRAINED_PRIOR, load_prior),
                          (checkpoint.CLASSIFIER, checkpoint.load_classifier)):
        contents = torch.load(shipped, weights_only=True)
        if dataset is ...:
            del contents["dataset"]
        else:
            contents["dataset"] = dataset
        torch.save(contents, tmp_path / "damaged.pt")
        with pytest.raises(ValueError, match="does not name the data set"):
            load(tmp_path / "damaged.pt")


@pytest.mark.parametrize("update", CODEBOOK_UPDATES)
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_bare_state_dict_loads(tmp_path, prefix, update):
    model = trained_model("cpu", codebook_update=update).eval()
    torch.save({prefix + name: value for name, value in model.state_dict().items()}, tmp_path / "state.pt")
    restored, _ = checkpoint.load_model(tmp_path / "state.pt", hidden_size=8, num_codes=16)
    x = random_images(3)
    assert torch.equal(restored(x).reconstruction, model(x).reconstruction)


def test_failed_write_keeps_the_old_file_and_adds_none(tmp_path, monkeypatch):
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
def test_contradicting_sizes_error_names_both_values(tmp_path, sizes, word):
    checkpoint.save(tmp_path / "model.pt", make_contents(trained_model("cpu")))
    with pytest.raises(ValueError, match=word) as excinfo:
        checkpoint.load_model(tmp_path / "model.pt", "cpu", *sizes)
    assert {"--hidden-size 9": "--hidden-size 8", "--k 17": "--k 16"}[word] in str(excinfo.value)


class CodeInPickle:
    """Unpickling it creates the file at path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("save", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value)),
                                  lambda value, path: torch.save(value, path, _use_new_zipfile_serialization=False)])
def test_pickle_that_would_run_code_is_rejected(tmp_path, save):
    save({"kind": "vqvae", "model": CodeInPickle(tmp_path / "exploded")}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="could run code"):
        checkpoint.load(tmp_path / "model.pt")
    assert not (tmp_path / "exploded").exists()


def test_invalid_checkpoints_are_rejected(tmp_path):
    good = make_contents(trained_model("cpu"))
    checkpoint.save(tmp_path / "good.pt", good)
    content = (tmp_path / "good.pt").read_bytes()
    invalid_files = {"empty": (b"", "empty"), "text": (b"These are not the weights.\n" * 20, "not a checkpoint"),
                     "half": (content[:len(content) // 2], "not a checkpoint"),
                     "one byte": (b"\x80", "not a checkpoint"),
                     "pickle": (pickle.dumps([1, 2]), "not a checkpoint")}
    for name, (data, words) in invalid_files.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(tmp_path / name)
    state = good["model"]
    incomplete = {key: value for key, value in state.items() if key != "decoder.6.bias"}
    invalid_dicts = {"other kind": ({**good, "kind": "prior"}, "not a checkpoint of a VQ-VAE"),
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
                     "missing": ({**good, "model": incomplete}, "decoder.6.bias"),
                     "tensors": ({"fc.weight": torch.zeros(2)}, "not those of a VQ-VAE"),
                     "bare": (incomplete, "decoder")}
    for name, (value, words) in invalid_dicts.items():
        torch.save(value, tmp_path / name)
        with pytest.raises(ValueError, match=words):
            checkpoint.load_model(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        checkpoint.load_model(tmp_path / "nowhere.pt")
    with pytest.raises(IsADirectoryError):
        checkpoint.load_model(tmp_path)


def nested_lists(depth, copies):
    value = ["x"]
    for _ in range(depth):
        value = [value] * copies
    return value


@pytest.mark.parametrize("value", [
    nested_lists(30, copies=2), nested_lists(150, copies=1), torch.zeros(1).expand(2**40),
    torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse()],
    ids=["shared lists", "deep lists", "expanded tensor", "complex tensor", "sparse tensor"])
def test_values_larger_than_their_file_are_rejected(value, tmp_path):
    torch.save({**make_contents(trained_model("cpu")), "more": value}, tmp_path / "model.pt")
    with pytest.raises(ValueError, match="not a checkpoint"):
        checkpoint.load_model(tmp_path / "model.pt")
