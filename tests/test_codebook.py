"""Codebook training: EMA updates, K-means initialisation, restarts of unused codes, and their saved state."""

import io

import pytest
import torch

from testers import float64_distances
from vector_quantizer import CODEBOOK_UPDATES, EMA_DECAY, LAPLACE, VectorQuantizer, kmeans, vq

pytestmark = pytest.mark.rounding

UPDATES = pytest.mark.parametrize("update", CODEBOOK_UPDATES)


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request):
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)        # so that sums on a GPU can be compared bit for bit
    yield request.param
    torch.use_deterministic_algorithms(False)


def flatten(z_e):
    """z_e (B, D, h, w) → latents (B·h·w, D)."""
    return z_e.permute(0, 2, 3, 1).reshape(-1, z_e.shape[1])


def train_step(quantizer, z_e, optimizer=None):
    """One training step of the codebook."""
    output = quantizer(z_e)
    if optimizer:
        optimizer.zero_grad()
        output.codebook_loss.backward()
        optimizer.step()
    return output


def make_optimizer(quantizer):
    return None if quantizer.ema else torch.optim.SGD([quantizer.codebook], lr=1.0)


# ---------------------------------------------------------------- exponential moving averages

def test_ema_update_matches_float64_reference(device):
    K, D = 6, 3
    quantizer = VectorQuantizer(K, D, "ema", "uniform", restart_after=0).to(device)
    codebook = quantizer.codebook.detach().double().cpu()
    sizes, sums = torch.ones(K, dtype=torch.float64), codebook.clone()
    for _ in range(2):
        z_e = torch.randn(2, D, 3, 4, device=device) / K
        before = quantizer.codebook.detach().clone()
        output = quantizer(z_e)

        latents = flatten(z_e).double().cpu()
        nearest = [min(range(K), key=lambda k: (z - codebook[k]).square().sum().item()) for z in latents]
        assert output.indices.flatten().tolist() == nearest
        # Output and losses use the codebook before the update.
        assert torch.equal(flatten(output.z_q), before[nearest])
        error = (latents - codebook[nearest]).square().mean().item()
        assert output.codebook_loss.item() == output.commitment_loss.item() == pytest.approx(error, rel=1e-5)

        for k in range(K):
            assigned = [z for z, index in zip(latents, nearest) if index == k]
            sizes[k] = EMA_DECAY * sizes[k] + (1 - EMA_DECAY) * len(assigned)
            sums[k] = EMA_DECAY * sums[k] + (1 - EMA_DECAY) * sum(assigned, torch.zeros(D, dtype=torch.float64))
        n = sizes.sum()
        codebook = torch.stack([sums[k] / ((sizes[k] + LAPLACE) / (n + K * LAPLACE) * n) for k in range(K)])
        assert torch.allclose(quantizer.codebook.double().cpu(), codebook, atol=1e-6, rtol=1e-5)
        assert not torch.equal(quantizer.codebook, before)


def test_ema_codebook_gets_no_gradient(device):
    """No gradient reaches the codebook. The encoder gets those of the decoder and the commitment loss."""
    quantizer = VectorQuantizer(8, 3, "ema").to(device)
    z_e = torch.randn(2, 3, 4, 4, device=device, requires_grad=True)
    output = quantizer(z_e)
    (output.z_q.sum() + output.codebook_loss + 0.5 * output.commitment_loss).backward()
    assert quantizer.codebook.grad is None and not quantizer.codebook.requires_grad
    expected = 1 + 0.5 * 2 * (z_e - output.z_q).detach() / z_e.numel()
    assert torch.allclose(z_e.grad, expected, atol=1e-6)


def test_ema_converges_to_cluster_means(device):
    corners = torch.tensor([[0., 0.], [4., 0.], [0., 4.], [4., 4.]], device=device)
    quantizer = VectorQuantizer(4, 2, "ema", "uniform", restart_after=0).to(device)
    quantizer.load_state_dict({**quantizer.state_dict(), "codebook": corners + 1, "cluster_sums": corners + 1})
    z_e = corners.T.reshape(1, 2, 2, 2)
    for _ in range(600):
        quantizer(z_e)
    assert torch.allclose(quantizer.codebook, corners, atol=0.02)


@UPDATES
def test_codebook_updates_in_float64_and_under_autocast(update, device):
    z_e = torch.randn(2, 3, 4, 4, device=device)
    for dtype, autocast in ((torch.float64, False), (torch.float32, True)):
        quantizer = VectorQuantizer(8, 3, update).to(device, dtype)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            train_step(quantizer, z_e.to(dtype), make_optimizer(quantizer))
            before = quantizer.codebook.detach().clone()
            output = train_step(quantizer, z_e.to(dtype) + 0.1, make_optimizer(quantizer))
        assert output.z_q.dtype == quantizer.codebook.dtype == dtype
        assert torch.isfinite(quantizer.codebook).all() and not torch.equal(quantizer.codebook, before)


@UPDATES
def test_eval_leaves_every_buffer_unchanged(update, device):
    for after_training in (False, True):
        quantizer = VectorQuantizer(8, 3, update, restart_after=2).to(device)
        if after_training:
            train_step(quantizer, torch.randn(2, 3, 4, 4, device=device), make_optimizer(quantizer))
        before = {name: value.clone() for name, value in (*quantizer.named_parameters(), *quantizer.named_buffers())}
        rng_state = torch.get_rng_state()
        for _ in range(5):
            quantizer.eval()(torch.randn(2, 3, 4, 4, device=device, generator=torch.Generator(device)) + 100)
        for name, value in (*quantizer.named_parameters(), *quantizer.named_buffers()):
            assert torch.equal(value, before[name]), name
        assert torch.equal(torch.get_rng_state(), rng_state)


# ---------------------------------------------------------------- K-means

def test_kmeans_centroids_are_cluster_means(device):
    corners = torch.tensor([[0., 0.], [10., 0.], [0., 10.], [10., 10.]], device=device)
    latents = corners.repeat(50, 1) + torch.randn(200, 2, device=device) * 0.1
    centroids = kmeans(latents, 40, iterations=50)
    assigned = float64_distances(latents, centroids).argmin(dim=1)
    for k in assigned.unique():
        assert torch.allclose(centroids[k], latents[assigned == k].mean(dim=0), atol=1e-4)
    assert float64_distances(latents, centroids).min(dim=1).values.mean() < 0.01


@UPDATES
def test_kmeans_runs_only_on_the_first_training_batch(update, device):
    quantizer = VectorQuantizer(8, 3, update, restart_after=0).to(device)
    initial = quantizer.codebook.clone()
    z_e = torch.randn(4, 3, 5, 5, device=device) + 7
    quantizer.eval()(z_e)
    assert torch.equal(quantizer.codebook, initial) and not quantizer.initialised
    output = quantizer.train()(z_e)
    quantized = flatten(quantizer.lookup(output.indices))
    assert (quantizer.codebook.mean(dim=0) - 7).abs().max() < 1.5 and quantizer.initialised
    assert (quantized - flatten(z_e)).square().mean() < 0.5 * flatten(z_e).var(dim=0).mean()
    if quantizer.ema:
        assert (quantizer.cluster_sums.mean(dim=0) / quantizer.cluster_sizes.mean() - 7).abs().max() < 1.5

    restored = VectorQuantizer(8, 3, update, restart_after=0).to(device)
    restored.load_state_dict(quantizer.state_dict())
    for q in (quantizer, restored):                 # a second K-means would move the codes to about -13
        q.train()(z_e - 20)
        assert q.codebook.mean() > 0
    assert torch.equal(quantizer.codebook, restored.codebook)


@UPDATES
def test_kmeans_handles_few_latents_and_identical_latents(update, device):
    for z_e in (torch.randn(1, 3, 1, 2, device=device), torch.ones(2, 3, 4, 4, device=device)):
        quantizer = VectorQuantizer(16, 3, update, restart_after=1).to(device)
        for _ in range(3):
            output = train_step(quantizer, z_e, make_optimizer(quantizer))
        assert all(torch.isfinite(value).all() for value in quantizer.state_dict().values())
        assert output.codebook_loss < 1e-10


# ---------------------------------------------------------------- restarts

def test_unused_codes_restart_after_the_given_steps(device):
    quantizer = VectorQuantizer(6, 2, codebook_init="uniform", restart_after=3).to(device)
    with torch.no_grad():
        quantizer.codebook[:] = torch.tensor([[0., 0.]] + 5 * [[100., 100.]], device=device)
    z_e = torch.randn(2, 2, 4, 4, device=device)
    latents = z_e.permute(0, 2, 3, 1).reshape(-1, 2)
    for step in range(3):
        before = quantizer.codebook.detach().clone()
        quantizer.eval()(z_e)
        quantizer.train()
        output = quantizer(z_e)
        assert torch.equal(output.indices, torch.zeros_like(output.indices))
        assert torch.equal(quantizer.codebook, before) == (step < 2)
    assert torch.equal(quantizer.codebook[0], before[0])
    assert (float64_distances(quantizer.codebook[1:], latents).min(dim=1).values == 0).all()
    assert (quantizer.steps_unused == 0).all()

    without_restarts = VectorQuantizer(6, 2, codebook_init="uniform", restart_after=0).to(device)
    before = without_restarts.codebook.detach().clone()
    for _ in range(10):
        without_restarts(z_e)
    assert torch.equal(without_restarts.codebook, before)


@UPDATES
def test_restart_resets_counter_and_ema_state(update, device):
    """Distant codes with large EMA sums restart with fresh ones, which the next step uses."""
    quantizer = VectorQuantizer(6, 2, update, "uniform", restart_after=3).to(device)
    state = quantizer.state_dict()
    state["codebook"][1:] = 100
    state["steps_unused"][:] = torch.tensor([0, 2, 2, 0, 0, 0], device=device)
    if quantizer.ema:
        state["cluster_sizes"][:], state["cluster_sums"][1:] = 1000, 1000 * 100.
    quantizer.load_state_dict(state)
    z_e = torch.randn(2, 2, 4, 4, device=device)
    quantizer(z_e)
    assert quantizer.steps_unused.tolist() == [0, 0, 0, 1, 1, 1] and quantizer.restarts == 2
    restarted = quantizer.codebook[1:3].detach().clone()
    assert (float64_distances(restarted, flatten(z_e)).min(dim=1).values == 0).all()
    assert (quantizer.codebook[3:] > 90).all()
    if quantizer.ema:
        assert quantizer.cluster_sizes[1:3].tolist() == [1, 1]
        assert torch.equal(quantizer.cluster_sums[1:3], restarted)
        quantizer(z_e)                              # stale sums would move the codes back to 100
        assert (quantizer.codebook[1:3].abs() < 10).all()


@UPDATES
def test_collapsed_codebook_recovers(update, device):
    used_codes = {}
    for restart_after in (0, 5):
        quantizer = VectorQuantizer(64, 4, update, "uniform", restart_after).to(device)
        with torch.no_grad():
            quantizer.codebook.copy_(torch.full_like(quantizer.codebook, 50.))
            quantizer.codebook[0] = 0
        if quantizer.ema:
            quantizer.cluster_sums.copy_(quantizer.codebook)
        optimizer = make_optimizer(quantizer)
        for _ in range(40):
            output = train_step(quantizer, torch.randn(8, 4, 7, 7, device=device), optimizer)
        used_codes[restart_after] = len(output.indices.unique())
    assert used_codes[0] == 1 and used_codes[5] >= 60


# ---------------------------------------------------------------- saved state

@UPDATES
def test_restored_quantizer_continues_bit_for_bit(update, device):
    """K-means state, counters and averages are restored: later steps equal those without a break."""
    quantizer = VectorQuantizer(32, 3, update, restart_after=6).to(device)
    batches = [torch.randn(2, 3, 3, 3, device=device) for _ in range(12)]          # 18 latents: codes stay unused
    for z_e in batches[:4]:
        train_step(quantizer, z_e, make_optimizer(quantizer))
    assert quantizer.steps_unused.max() == 4 and quantizer.restarts == 0
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)

    restored = VectorQuantizer(32, 3, update, restart_after=6).to(device)
    restored.load_state_dict(torch.load(file, weights_only=True, map_location=device))
    for q in (quantizer, restored):
        torch.manual_seed(1)                        # restarts draw from the global generator
        for z_e in batches[4:]:
            train_step(q, z_e, make_optimizer(q))
        assert q.restarts > 0
    assert quantizer.restarts == restored.restarts
    for name, value in quantizer.state_dict().items():
        assert torch.equal(value, restored.state_dict()[name]), name


def test_offset_is_averaged_over_all_positions():
    torch.manual_seed(0)
    z = torch.randn(256, 7, 7, 8)
    z[:, 0, 0] += 1000                  # one position of every image is far away
    codebook = torch.cat([torch.randn(60, 8), torch.randn(4, 8) + 1000])
    nearest = (z.double().unsqueeze(-2) - codebook.double()).square().sum(dim=-1).argmin(dim=-1)
    assert (vq(z, codebook)[:, 1:] == nearest[:, 1:]).double().mean() > 0.9999
