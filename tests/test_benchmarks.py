"""What benchmarks/ sets beside this repository does the same, and its script measures and reports."""

import json
import operator
import sys

import pytest
import torch
from helpers import ROOT, refuse

import checkpoint
import data
from vector_quantizer import VectorQuantizer

sys.path.append(str(ROOT / "benchmarks"))
import speed
import usual


@pytest.mark.parametrize("nearest", [usual.full_matrix, usual.cdist])
def test_usual_quantizers_have_our_values_and_gradients(nearest):
    torch.manual_seed(0)
    ours, theirs = VectorQuantizer(50, 6, codebook_init="uniform", restart_after=0), usual.Quantizer(50, 6, nearest)
    ours.codebook.data.normal_()
    theirs.load_state_dict({"codebook": ours.codebook.detach()})
    z_e, results = torch.randn(3, 6, 4, 5), []
    for quantizer in (ours, theirs):
        leaf = z_e.clone().requires_grad_()
        z_q, indices, codebook_loss, commitment_loss = quantizer(leaf)
        (z_q.sin().sum() + codebook_loss + 0.25 * commitment_loss).backward()
        results.append((z_q.detach(), indices.flatten(), codebook_loss.detach(), commitment_loss.detach(), leaf.grad,
                        quantizer.codebook.grad))
    for mine, other in zip(*results):
        torch.testing.assert_close(mine, other)


def test_uncached_sampling_draws_the_same_digits():
    prior = checkpoint.load_prior(checkpoint.PRETRAINED.with_name("prior.pt"), checkpoint.PRETRAINED)[0]
    labels = torch.arange(10)
    drawn = [draw(labels, generator=torch.Generator().manual_seed(3))
             for draw in (prior.sample, lambda labels, generator: usual.uncached_sample(prior, labels, generator))]
    assert torch.equal(*drawn)


class Here:
    """Measures in this process what a Contender measures in one of its own."""

    def __init__(self, make, *arguments):
        self.measure = make(*arguments)

    def __call__(self, *given):
        return self.measure(*given)

    def close(self):
        pass


def test_speed_measures_and_reports(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    few = [data.Images(part.images[:640], part.labels[:640]) for part in data.load("MNIST-10k", "")]
    monkeypatch.setattr(speed, "Contender", Here)
    monkeypatch.setattr(speed, "PRODUCT", 256)
    monkeypatch.setattr(data, "load", lambda *_: few)
    speed.main(["limit", "--rounds", "1", "--json", "speed.json"])
    said, report = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    product, training = report["limit"]
    assert product["GFLOP_per_second"] > 0 and training["share_of_limit"] > 0
    # Multiply-adds of the convolutions on 28×28 digits, D 40: forward once, backward twice but for the first
    # layer's input; the search has 49 × 512 products of 41 numbers.
    first, second, blocks = 14**2 * 16 * 40, 7**2 * 16 * 40**2, 4 * 7**2 * 10 * 40**2
    expected = 2 * (3 * (2 * first + 2 * second + blocks) - first + 49 * 512 * 41) / 1e6
    assert training["MFLOP_per_image"] == pytest.approx(expected, rel=0.01)
    for name, value in report["about"].items():
        assert f"{name} {value}" in said
    assert list(tmp_path.iterdir()) == [tmp_path / "speed.json"]


def test_contenders_measure_in_processes_of_their_own():
    contender = speed.Contender(operator.attrgetter, "real")
    assert contender(3 + 4j) == 3
    with pytest.raises(AttributeError):
        contender("no number")
    contender.process.kill()
    with pytest.raises(ValueError, match="has ended by itself"):
        contender(1)
    contender.close()


@pytest.mark.parametrize(("arguments", "words"), [
    (["speed"], "'speed' is unknown: choose from training, quantizer"),
    (["--rounds", "0"], "--rounds"),
    (["--data-folder", __file__], f"--data-folder {__file__}: is a file"),          # before anything is measured
    (["limit", "--json", "."], "--json .: . is in the way"),
])
def test_bad_input_is_refused_in_one_line(arguments, words, capsys):
    assert words in refuse("benchmarks/speed.py", arguments, capsys)
