"""The prior over code maps: a distribution that looks at no code too early, and samples what it says."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from prior import CodePrior, draw

pytestmark = pytest.mark.rounding


def a_prior(num_codes=3, height=2, width=2, **kwargs):
    """A small prior with weights far from their start, so that what it says depends on codes and label."""
    torch.manual_seed(0)
    prior = CodePrior(num_codes, height, width, num_classes=4, layers=2, embedding=16, heads=2, **kwargs)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return prior.eval()


def every_map():
    return torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, 2, 2)


@pytest.mark.parametrize("label", [None, 0, 3])
def test_probabilities_of_all_maps_sum_to_one(label):
    prior, maps = a_prior(), every_map()
    labels = None if label is None else torch.full((81,), label)
    probabilities = prior.log_prob(maps, labels).double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert probabilities.max() > 2 / 81                                 # not just the uniform one


@pytest.mark.parametrize("height, width", [(4, 4), (2, 5), (7, 3)])
def test_a_code_changes_no_logit_at_or_before_its_place_and_some_after(height, width):
    prior, labels = a_prior(5, height, width), torch.tensor([1])
    maps = torch.randint(5, (1, height, width))
    before = prior(maps, labels)
    for t in range(height * width):
        changed = maps.clone()
        changed[0, t // width, t % width] = (changed[0, t // width, t % width] + 1) % 5
        difference = (prior(changed, labels) - before).abs().amax(dim=(0, 2))
        assert (difference[:t + 1] == 0).all()
        assert (difference[t + 1:] > 0).all()


def test_label_reaches_every_code_and_its_absence_is_a_class_of_its_own():
    prior, maps = a_prior(5, 3, 3), torch.randint(5, (2, 3, 3))
    one, two = prior(maps, torch.tensor([0, 0])), prior(maps, torch.tensor([3, 3]))
    assert ((one - two).abs().amax(dim=2) > 0).all()
    assert torch.equal(prior(maps), prior(maps, torch.tensor([4, 4])))
    assert not torch.equal(prior(maps), one)


def test_shift_reaches_every_code_and_none_is_shift_0():
    prior, maps, labels = a_prior(5, 3, 3, num_shifts=9), torch.randint(5, (2, 3, 3)), torch.tensor([0, 2])
    one, two = (prior(maps, labels, torch.tensor([shift, shift])) for shift in (0, 7))
    assert ((one - two).abs().amax(dim=2) > 0).all()
    assert torch.equal(prior(maps, labels), one)


def test_log_prob_is_the_summed_cross_entropy():
    prior, maps, labels = a_prior(5, 3, 4), torch.randint(5, (6, 3, 4)), torch.randint(4, (6,))
    logits = prior(maps, labels).double()
    for b in range(6):
        by_hand = sum(torch.log_softmax(logits[b, t], dim=0)[maps[b].flatten()[t]] for t in range(12))
        assert prior.log_prob(maps, labels)[b].item() == pytest.approx(by_hand.item(), rel=1e-5)


@pytest.mark.parametrize("temperature, top_k, guidance", [(1, None, 1), (0.5, None, 1), (2, 2, 1), (1, None, 2.5)])
def test_cached_samples_are_those_of_the_whole_model(temperature, top_k, guidance):
    """Against a slow sampler that runs the whole map through the model for each code."""
    prior, labels = a_prior(6, 3, 4, num_shifts=9), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        prior.head.weight.mul_(6)           # so that there are improbable codes
    prior.tail[1:] = 5                      # and their calibration shows
    cached = prior.sample(labels, temperature, top_k, guidance, torch.Generator().manual_seed(7))
    generator, maps = torch.Generator().manual_seed(7), torch.zeros(5, 3, 4, dtype=torch.int64)
    for t in range(12):
        with torch.no_grad():
            with_label, without = prior(maps, labels)[:, t], prior(maps)[:, t]
        logits = without + guidance * (with_label - without)
        maps.view(5, 12)[:, t] = draw(logits / temperature, top_k, generator)
    assert torch.equal(cached, maps)


def test_sampled_frequencies_are_the_probabilities():
    prior, count = a_prior(), 40_000
    for label, temperature in ((2, 1.0), (4, 1.0), (1, 0.5)):
        samples = prior.sample(torch.full((count,), label), temperature, generator=torch.Generator().manual_seed(0))
        numbers = (samples.view(count, 4) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
        frequencies = torch.bincount(numbers, minlength=81) / count
        with torch.no_grad():
            logs = torch.log_softmax(prior(every_map(), torch.full((81,), label)) / temperature, dim=2)
        expected = logs.gather(2, every_map().view(81, 4, 1)).sum(dim=(1, 2)).exp()
        deviation = (expected * (1 - expected) / count).sqrt()
        assert ((frequencies - expected).abs() < 5 * deviation + 1e-4).all()


def test_top_k_draws_the_most_probable_codes_alone():
    logits = torch.tensor([[0., 3., 2., 1.], [5., 1., 4., 0.]]).repeat(500, 1)
    drawn = draw(logits, top_k=2, generator=torch.Generator().manual_seed(0)).view(500, 2)
    assert set(drawn[:, 0].tolist()) == {1, 2} and set(drawn[:, 1].tolist()) == {0, 2}
    assert set(draw(logits, top_k=9, generator=torch.Generator().manual_seed(0)).tolist()) == {0, 1, 2, 3}


def test_training_learns_a_rule_that_no_single_code_shows():
    """Maps whose codes repeat in the second row: half of the nats, where counting codes finds none."""
    torch.manual_seed(0)
    prior = CodePrior(4, 2, 3, num_classes=2, layers=2, embedding=32, heads=2, dropout=0)
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-3)

    def maps(count):
        return torch.randint(4, (count, 1, 3)).expand(-1, 2, -1)

    for _ in range(300):
        loss = -prior.train().log_prob(maps(64), torch.randint(2, (64,))).mean() / 6
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    nats = -prior.eval().log_prob(maps(500)).mean().item() / 6
    assert nats < 0.6 * torch.tensor(4.0).log().item()
    assert nats > 0.49 * torch.tensor(4.0).log().item()


def test_labels_are_dropped_in_training_alone():
    prior, maps, labels = a_prior(5, 3, 3, dropout=0.0, drop_label=1.0), torch.randint(5, (8, 3, 3)), torch.arange(4)
    labels = labels.repeat(2)
    assert not torch.equal(prior(maps, labels), prior(maps))
    assert torch.equal(prior.train()(maps, labels), prior(maps))


def test_sampling_leaves_the_mode_and_the_random_state():
    prior, state = a_prior(), torch.get_rng_state()
    for mode in (True, False):
        prior.train(mode).sample(torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
        assert prior.training == mode
    assert torch.equal(torch.get_rng_state(), state)


def test_what_does_not_fit_is_refused_with_the_numbers():
    prior = a_prior()
    for call, words in ((lambda: prior.sample(torch.tensor([5])), "from 0 to 4"),
                        (lambda: prior.sample(torch.tensor([-1])), "from 0 to 4"),
                        (lambda: prior.sample(torch.tensor([0]), temperature=0), "temperature 0"),
                        (lambda: prior.sample(torch.tensor([0]), temperature=-1), "temperature -1"),
                        (lambda: prior.sample(torch.tensor([0]), top_k=0), "top_k 0"),
                        (lambda: prior(torch.zeros(1, 2, 3, dtype=torch.int64)), "(1, 2, 3)"),
                        (lambda: prior(torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor([0])), "(2,)"),
                        (lambda: CodePrior(3, 2, 2, embedding=10, heads=4), "width 10"),
                        (lambda: CodePrior(0, 2, 2), "0 codes")):
        with pytest.raises(ValueError) as raised:
            call()
        assert words in str(raised.value)


def test_calibration_makes_improbable_codes_as_rare_as_they_are():
    """With maps that the prior has drawn itself, and with others in which its improbable codes are rarer."""
    prior, labels = a_prior(200, 2, 3), torch.arange(4).repeat(1000)
    with torch.no_grad():
        prior.head.weight.mul_(4)           # some codes in each place are far less probable than others
    generator = torch.Generator().manual_seed(0)
    for top_k, rarer in ((None, 1), (20, 0.75), (5, 0.2)):
        prior.tail.zero_()
        maps = prior.sample(labels, top_k=top_k, generator=generator)
        with torch.no_grad():
            before = prior(maps, labels).double().softmax(dim=2)                      # (4000, 6, 200)
            tail = before < math.exp(-6)
            there = tail.gather(2, maps.flatten(1).unsqueeze(2)).double().mean().item()
            prior.calibrate(maps, labels)
            after = prior(maps, labels).double().softmax(dim=2)
        mass = [(probabilities * tail).sum(dim=2).mean().item() for probabilities in (before, after)]
        assert mass[0] > 0.01 and there < 1.2 * rarer * mass[0]
        assert mass[1] == pytest.approx(there, rel=0.1, abs=0.0003)
        assert prior.tail[0] == 0 and not prior.training


def test_the_training_sees_no_calibration():
    prior, maps, labels = a_prior(5, 3, 3, dropout=0.0, drop_label=0.0), torch.randint(5, (8, 3, 3)), torch.arange(4)
    labels = labels.repeat(2)
    raw = prior(maps, labels)
    prior.tail[1:] = -1
    with torch.no_grad():
        prior.head.bias[0] -= 20
        trained, calibrated = prior.train()(maps, labels), prior.eval()(maps, labels)
    assert torch.allclose(calibrated[..., 0], trained[..., 0] - 1)
    assert torch.equal(calibrated[..., 1:], trained[..., 1:]) and torch.equal(trained[..., 1:], raw[..., 1:])


def test_float32_loss_under_autocast():
    prior, maps = a_prior(5, 3, 3), torch.randint(5, (4, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prior(maps).dtype == torch.float32
        assert F.mse_loss(prior.log_prob(maps), -F.cross_entropy(
            prior(maps).transpose(1, 2), maps.flatten(1), reduction="none").sum(dim=1)) < 1e-6
