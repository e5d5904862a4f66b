"""The prior over code maps: normalisation, causality, sampling and calibration."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from prior import CodePrior, GatedMLP, sample_codes

pytestmark = pytest.mark.rounding


def make_prior(num_codes=3, height=2, width=2, gated=True, **kwargs):
    """A small prior with large random weights, so that its logits depend on codes and label."""
    torch.manual_seed(0)
    prior = CodePrior(num_codes, height, width, num_classes=4, layers=2, embedding=16, heads=2,
                      gated=gated, **kwargs)
    with torch.no_grad():
        for parameter in prior.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return prior.eval()


def make_calibrated():
    """make_prior() with a code that is often in the tail, and e⁴ times as probable there by its calibration."""
    prior, labels = make_prior(), torch.full((81,), 1)
    with torch.no_grad():
        prior.head.bias[2] -= 7
        raw = prior(all_maps(), labels)
        assert (raw.log_softmax(dim=2) < -6.5).any() and (raw.log_softmax(dim=2) > -5.5).any()
        before = prior.log_prob(all_maps(), labels).exp()
        prior.tail[1:] = 4
        assert (prior.log_prob(all_maps(), labels).exp() - before).abs().max() > 0.01
    return prior


def all_maps():
    return torch.tensor(list(itertools.product(range(3), repeat=4))).view(81, 2, 2)


def test_gated_mlp_matches_its_equation_in_float64():
    torch.manual_seed(0)
    mlp, x = GatedMLP(12), torch.randn(3, 5, 12)
    W, V = mlp.values_gates.weight.double().split(32)           # 8/3 of 12 values
    b, c = mlp.values_gates.bias.double().split(32)
    gates = x.double() @ V.T + c
    expected = (x.double() @ W.T + b) * gates / (1 + (-gates).exp()) @ mlp.project.weight.double().T
    torch.testing.assert_close(mlp(x).double(), expected + mlp.project.bias.double(), rtol=1e-5, atol=1e-6)
    plain, gated = (sum(p.numel() for p in make_prior(gated=value).blocks.parameters()) for value in (False, True))
    assert abs(gated / plain - 1) < 0.1


@pytest.mark.parametrize("label", [None, 0, 3])
def test_probabilities_of_all_maps_sum_to_one(label):
    prior, maps = make_calibrated(), all_maps()
    labels = None if label is None else torch.full((81,), label)
    probabilities = prior.log_prob(maps, labels).double().exp()
    assert probabilities.sum().item() == pytest.approx(1, abs=1e-5)
    assert probabilities.max() > 2 / 81                                 # not uniform


@pytest.mark.parametrize("height, width", [(4, 4), (2, 5), (7, 3)])
def test_logits_are_causal(height, width):
    prior, labels = make_prior(5, height, width), torch.tensor([1])
    maps = torch.randint(5, (1, height, width))
    before = prior(maps, labels)
    for t in range(height * width):
        edited = maps.clone()
        edited[0, t // width, t % width] = (edited[0, t // width, t % width] + 1) % 5
        difference = (prior(edited, labels) - before).abs().amax(dim=(0, 2))
        assert (difference[:t + 1] == 0).all()
        assert (difference[t + 1:] > 0).all()


def test_label_affects_every_position_and_no_label_is_its_own_class():
    prior, maps = make_prior(5, 3, 3), torch.randint(5, (2, 3, 3))
    logits_0, logits_3 = prior(maps, torch.tensor([0, 0])), prior(maps, torch.tensor([3, 3]))
    assert ((logits_0 - logits_3).abs().amax(dim=2) > 0).all()
    assert torch.equal(prior(maps), prior(maps, torch.tensor([4, 4])))
    assert not torch.equal(prior(maps), logits_0)


def test_shift_affects_every_position_and_defaults_to_0():
    prior, maps, labels = make_prior(5, 3, 3, num_shifts=9), torch.randint(5, (2, 3, 3)), torch.tensor([0, 2])
    shift_0, shift_7 = (prior(maps, labels, torch.tensor([shift, shift])) for shift in (0, 7))
    assert ((shift_0 - shift_7).abs().amax(dim=2) > 0).all()
    assert torch.equal(prior(maps, labels), shift_0)


def test_log_prob_is_the_summed_cross_entropy():
    prior, maps, labels = make_prior(5, 3, 4), torch.randint(5, (6, 3, 4)), torch.randint(4, (6,))
    logits = prior(maps, labels).double()
    for b in range(6):
        expected = sum(torch.log_softmax(logits[b, t], dim=0)[maps[b].flatten()[t]] for t in range(12))
        assert prior.log_prob(maps, labels)[b].item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("temperature, top_k, guidance", [(1, None, 1), (0.5, None, 1), (2, 2, 1), (1, None, 2.5)])
def test_cached_sampling_matches_the_full_forward_pass(temperature, top_k, guidance):
    """The reference is a slow sampler with a full forward pass for each code."""
    prior, labels = make_prior(6, 3, 4, num_shifts=9), torch.tensor([0, 1, 2, 3, 4])
    with torch.no_grad():
        prior.head.weight.mul_(6)           # makes some codes improbable
    prior.tail[1:] = 5                      # makes their calibration visible
    cached = prior.sample(labels, temperature, top_k, guidance, torch.Generator().manual_seed(7))
    draws = torch.rand(5, 12, generator=torch.Generator().manual_seed(7))
    maps = torch.zeros(5, 3, 4, dtype=torch.int64)
    for t in range(12):
        with torch.no_grad():
            conditional, unconditional = prior(maps, labels)[:, t], prior(maps)[:, t]
        logits = unconditional + guidance * (conditional - unconditional)
        maps.view(5, 12)[:, t] = sample_codes(logits / temperature, draws[:, t], top_k)
    assert torch.equal(cached, maps)
    # A map and its first codes: the rest is drawn as before.
    for count in (0, 5, 12):
        given = cached.flatten(1)[:, :count]
        again = prior.sample(labels, temperature, top_k, guidance, torch.Generator().manual_seed(7), given)
        assert torch.equal(again, cached)
    # In batches of another size too.
    generator = torch.Generator().manual_seed(7)
    batches = [prior.sample(batch, temperature, top_k, guidance, generator) for batch in labels.split(2)]
    assert torch.equal(torch.cat(batches), cached)


def test_given_codes_are_kept_and_the_others_follow_from_them():
    prior, count = make_calibrated(), 20_000
    given = torch.tensor([[2, 0]]).expand(count, 2)
    samples = prior.sample(torch.full((count,), 1), generator=torch.Generator().manual_seed(0),
                           given=given.to(torch.uint8))
    assert torch.equal(samples.flatten(1)[:, :2], given) and samples.dtype == torch.int64
    with torch.no_grad():                       # Bayes: p(map | its first codes) among all maps that begin so
        beginning = (all_maps().flatten(1)[:, :2] == given[0]).all(dim=1)
        joint = prior.log_prob(all_maps(), torch.full((81,), 1)).exp() * beginning
    expected = joint / joint.sum()
    map_numbers = (samples.view(count, 4) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
    frequencies = torch.bincount(map_numbers, minlength=81) / count
    std = (expected * (1 - expected) / count).sqrt()
    assert ((frequencies - expected).abs() < 5 * std + 1e-4).all()


def test_sampled_frequencies_match_the_probabilities():
    prior, count = make_calibrated(), 40_000
    for label, temperature in ((2, 1.0), (4, 1.0), (1, 0.5)):
        samples = prior.sample(torch.full((count,), label), temperature, generator=torch.Generator().manual_seed(0))
        map_numbers = (samples.view(count, 4) * torch.tensor([27, 9, 3, 1])).sum(dim=1)
        frequencies = torch.bincount(map_numbers, minlength=81) / count
        with torch.no_grad():
            logs = torch.log_softmax(prior(all_maps(), torch.full((81,), label)) / temperature, dim=2)
        expected = logs.gather(2, all_maps().view(81, 4, 1)).sum(dim=(1, 2)).exp()
        std = (expected * (1 - expected) / count).sqrt()
        assert ((frequencies - expected).abs() < 5 * std + 1e-4).all()


def test_top_k_draws_only_the_most_probable_codes():
    logits = torch.tensor([[0., 3., 2., 1.], [5., 1., 4., 0.]]).repeat(500, 1)
    draws = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    samples = sample_codes(logits, draws, top_k=2).view(500, 2)
    assert set(samples[:, 0].tolist()) == {1, 2} and set(samples[:, 1].tolist()) == {0, 2}
    assert set(sample_codes(logits, draws, top_k=9).tolist()) == {0, 1, 2, 3}


def test_codes_are_drawn_by_inverting_their_cumulative_probability():
    """By hand, at both ends too: no code of probability 0 is drawn, first or last."""
    logits = torch.tensor([0, 0.25, 0.5, 0, 0.25, 0]).log()
    largest = 1 - 2**-24
    draws, codes = [0, 0.2499, 0.2501, 0.7499, 0.7501, largest], [1, 1, 2, 2, 4, 4]
    assert sample_codes(logits.expand(6, 6), torch.tensor(draws)).tolist() == codes
    for scale in torch.linspace(0.1, 40, 500):          # sums that round up or down
        skewed = torch.cat([scale * torch.randn(1, 30), torch.full((1, 5), -torch.inf)], dim=1)
        assert sample_codes(skewed, torch.tensor([largest])) < 30


def test_weights_that_give_no_probabilities_are_reported():
    prior = make_prior()
    with torch.no_grad():
        prior.code_embedding.weight[0] = torch.nan      # seen once code 0 has been drawn
    with pytest.raises(ValueError, match="the prior's probabilities are not finite"):
        prior.sample(torch.arange(100) % 4)


def test_training_learns_dependence_between_codes():
    """The second row repeats the first: half the nats of independent codes, which are uniform."""
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


def test_labels_are_dropped_only_in_training():
    prior, maps, labels = make_prior(5, 3, 3, dropout=0.0, drop_label=1.0), torch.randint(5, (8, 3, 3)), torch.arange(4)
    labels = labels.repeat(2)
    assert not torch.equal(prior(maps, labels), prior(maps))
    assert torch.equal(prior.train()(maps, labels), prior(maps))


def test_sampling_keeps_mode_and_rng_state():
    prior, state = make_prior(), torch.get_rng_state()
    for mode in (True, False):
        prior.train(mode).sample(torch.tensor([0, 1]), generator=torch.Generator().manual_seed(0))
        assert prior.training == mode
    assert torch.equal(torch.get_rng_state(), state)


def test_invalid_arguments_error_names_the_values():
    prior = make_prior()
    for call, words in ((lambda: prior.sample(torch.tensor([5])), "from 0 to 4"),
                        (lambda: prior.sample(torch.tensor([-1])), "from 0 to 4"),
                        (lambda: prior.sample(torch.tensor([0]), temperature=0), "temperature 0"),
                        (lambda: prior.sample(torch.tensor([0]), temperature=-1), "temperature -1"),
                        (lambda: prior.sample(torch.tensor([0]), top_k=0), "top_k 0"),
                        (lambda: prior.sample(torch.tensor([0]), given=torch.tensor([[3]])), "codes 3 to 3"),
                        (lambda: prior.sample(torch.tensor([0]), given=torch.zeros(1, 5).long()), "(1, 0 to 4)"),
                        (lambda: prior.sample(torch.tensor([0]), given=torch.zeros(1, 2)), "torch.float32 (1, 2)"),
                        (lambda: prior.sample(torch.tensor([0]), given=torch.zeros(2, 1).long()), "(1, 0 to 4)"),
                        (lambda: prior(torch.zeros(1, 2, 3, dtype=torch.int64)), "(1, 2, 3)"),
                        (lambda: prior(torch.zeros(2, 2, 2, dtype=torch.int64), torch.tensor([0])), "(2,)"),
                        (lambda: CodePrior(3, 2, 2, embedding=10, heads=4), "width 10"),
                        (lambda: CodePrior(0, 2, 2), "0 codes"),
                        (lambda: CodePrior(3, 2, 2, dropout=math.nan), "not nan and 0.1"),
                        (lambda: CodePrior(3, 2, 2, drop_label=1.5), "not 0.1 and 1.5")):
        with pytest.raises(ValueError) as excinfo:
            call()
        assert words in str(excinfo.value)


def test_calibration_matches_the_frequency_of_improbable_codes():
    """With maps sampled from the prior itself, and from versions of it with fewer improbable codes."""
    prior, labels = make_prior(200, 2, 3), torch.arange(4).repeat(1000)
    with torch.no_grad():
        prior.head.weight.mul_(4)           # makes some codes at each position improbable
    generator = torch.Generator().manual_seed(0)
    for top_k, reduction in ((None, 1), (20, 0.75), (5, 0.2)):
        prior.tail.zero_()
        maps = prior.sample(labels, top_k=top_k, generator=generator)
        with torch.no_grad():
            before = prior(maps, labels).double().softmax(dim=2)                      # (4000, 6, 200)
            tail = before < math.exp(-6)
            frequency = tail.gather(2, maps.flatten(1).unsqueeze(2)).double().mean().item()
            prior.calibrate(maps, labels)
            after = prior(maps, labels).double().softmax(dim=2)
        predicted = [(probabilities * tail).sum(dim=2).mean().item() for probabilities in (before, after)]
        assert predicted[0] > 0.01 and frequency < 1.2 * reduction * predicted[0]
        assert predicted[1] == pytest.approx(frequency, rel=0.1, abs=0.001)
        assert prior.tail[0] == 0 and not prior.training


def test_calibration_is_inactive_in_training():
    prior, maps, labels = make_prior(5, 3, 3, dropout=0.0, drop_label=0.0), torch.randint(5, (8, 3, 3)), torch.arange(4)
    labels = labels.repeat(2)
    raw = prior(maps, labels)
    prior.tail[1:] = -1
    with torch.no_grad():
        prior.head.bias[0] -= 20
        trained, calibrated = prior.train()(maps, labels), prior.eval()(maps, labels)
    assert torch.allclose(calibrated[..., 0], trained[..., 0] - 1)
    assert torch.equal(calibrated[..., 1:], trained[..., 1:]) and torch.equal(trained[..., 1:], raw[..., 1:])


def test_loss_is_float32_under_autocast():
    prior, maps = make_prior(5, 3, 3), torch.randint(5, (4, 3, 3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prior(maps).dtype == torch.float32
        assert F.mse_loss(prior.log_prob(maps), -F.cross_entropy(
            prior(maps).transpose(1, 2), maps.flatten(1), reduction="none").sum(dim=1)) < 1e-6


def test_calibration_changes_smoothly_so_that_cached_and_full_logits_agree():
    """A step at a logit's distance would turn rounding into a difference of the step's height."""
    prior, maps, labels = make_prior(200, 3, 4), torch.randint(200, (40, 3, 4)), torch.arange(4).repeat(10)
    with torch.no_grad():
        prior.head.weight.mul_(4)           # makes some codes improbable
        prior.tail[1:] = torch.linspace(2, -3, len(prior.tail) - 1)
        logits = prior(maps, labels)                                  # (40, 12, 200)
        # Expected: the line between the knots at −log p = 5.5, 6.5, …, 17.5, in float64.
        raw = prior.head(prior._hidden(maps, labels, None)).double()
        depth = -raw.log_softmax(dim=2)
        assert (depth > 8).any() and (depth < 5).any()
        expected = raw + torch.from_numpy(np.interp(depth, 5.5 + np.arange(13), prior.tail.numpy()))
        assert 10 < logits.abs().max() < 40
        assert (logits - expected).abs().max() < 4e-5                 # the rounding of such logits
        assert (logits.softmax(dim=2) - expected.softmax(dim=2)).abs().max() < 1e-5
        # Position by position with a cache, as the sampler computes them.
        cached, compute = [], prior._logits
        prior._logits = lambda hidden: cached.append(compute(hidden)) or cached[-1]
        sampled = prior.sample(labels, generator=torch.Generator().manual_seed(0))
        prior._logits = compute
        cached, full = torch.stack(cached, dim=1), prior(sampled, labels)
        assert (cached - full).abs().max() < 4e-5
        assert (cached.softmax(dim=2) - full.softmax(dim=2)).abs().max() < 1e-5
