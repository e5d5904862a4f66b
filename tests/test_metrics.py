"""metrics.evaluate() and perplexity(), against direct computation over the whole set."""

import pytest
import torch

import data
from metrics import evaluate, perplexity
from testers import clone_state, trained_model

pytestmark = pytest.mark.rounding


def assert_same_state(before, after):
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


def test_evaluate_leaves_model_and_rng_unchanged():
    model = trained_model("cpu", restart_after=2)
    x = torch.randint(0, 256, (16, 1, 28, 28), dtype=torch.uint8)
    batches = data.batches(data.Images(x, torch.zeros(16)), 4)
    for mode in (True, False):
        model.train(mode)
        before, rng_state = clone_state(model), torch.get_rng_state()
        evaluate(model, batches, "cpu")
        assert_same_state(before, clone_state(model))
        assert torch.equal(rng_state, torch.get_rng_state())
        assert model.training is mode


def test_losses_average_over_images_and_counts_cover_the_set():
    model = trained_model("cpu")
    x = torch.randint(0, 256, (10, 1, 28, 28), dtype=torch.uint8)
    losses, counts = evaluate(model, [(x[:7], None), (x[7:], None)], "cpu", beta=0.25)
    model.eval()
    with torch.no_grad():
        scaled = (x.double() / 255 - 0.5).float() / 0.5
        output = model(scaled)
    assert abs(losses.reconstruction - (output.reconstruction - scaled).double().square().mean().item()) < 1e-6
    assert abs(losses.commitment - (output.z_e - output.z_q).double().square().mean().item()) < 1e-6
    assert abs(losses.total - (losses.reconstruction + 1.25 * losses.commitment)) < 1e-6
    expected_counts = output.indices.flatten().bincount(minlength=16)
    assert counts.sum() == expected_counts.sum() == 490
    assert (counts - expected_counts).abs().sum() <= 2              # one latent may round to another code


def test_perplexity_is_1_and_K_at_its_extremes():
    assert perplexity(torch.tensor([0, 90, 0, 0])) == 1
    assert abs(perplexity(torch.full((512,), 3)) - 512) < 1e-6
    assert abs(perplexity(torch.tensor([1, 3])) - 2 ** 0.8112781244591328) < 1e-9
