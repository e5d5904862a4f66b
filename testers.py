"""Checks of the modules against independent arithmetic: python3 testers.py [--device cuda]

Each check is a function that takes the device. pytest collects them too, on the CPU.
"""

if __name__ == "__main__":
    from utils import interrupt
    interrupt.exit_at_once_from_here()

import arguments
import cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--device", type=arguments.device, default="cpu",
                        help=f"{arguments.DEVICES} (default: %(default)s)")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and mistakes are answered before torch is imported, which takes seconds

import sys
import traceback
from functools import partial
from unittest import mock

import torch

import inputs
from modules import ResidualBlock, VectorQuantizedVAE, vqvae_losses
from vector_quantizer import VectorQuantizer, vq, vq_st


def float64_distances(inputs, codebook):
    """Squared distances (N, K), element by element in float64, on the CPU: some GPUs know no such numbers."""
    flat = inputs.reshape(-1, inputs.shape[-1]).cpu().double()
    return (flat[:, None, :] - codebook.cpu().double()[None, :, :]).square().sum(dim=-1)


def images(count, channels=1, height=28, width=28, device="cpu"):
    return torch.rand(count, channels, height, width, device=device) * 2 - 1


def trained_model(device, steps=5, **kwargs):
    """A small model after some steps on noise, so that no weight, buffer or code is as it started."""
    torch.manual_seed(1)
    model = VectorQuantizedVAE(hidden_size=8, num_codes=16, **kwargs).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x = images(8, model.channels, device=device)
        optimizer.zero_grad()
        vqvae_losses(x, model(x), beta=0.25).total.backward()
        optimizer.step()
    return model


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_raises(call, *words):
    """call() raises a ValueError whose message holds every word."""
    try:
        call()
    except ValueError as error:
        for word in words:
            assert str(word) in str(error), f"{word!r} is not in {error}"
    else:
        raise AssertionError("no ValueError")


# ---------------------------------------------------------------- vq and vq_st

def test_vq_agrees_with_float64_brute_force(device="cpu"):
    torch.manual_seed(0)
    for shape, K in (((500, 40), 512), ((3, 7, 7, 40), 512), ((2000, 2), 33), ((1, 1), 1), ((64, 3), 7)):
        for scale in (1e-3, 1.0, 1e3):
            inputs = torch.randn(shape, device=device) * scale
            codebook = torch.randn(K, shape[-1], device=device) * scale
            indices = vq(inputs, codebook).cpu()
            assert indices.shape == shape[:-1] and indices.dtype == torch.int64
            distances = float64_distances(inputs, codebook)
            chosen = distances.gather(1, indices.reshape(-1, 1)).squeeze(1)
            excess = chosen.sqrt() - distances.min(dim=1).values.sqrt()
            assert excess.max() <= 1e-5 * scale
            clear = second_gap(distances) > 1e-4 * scale
            assert (clear.float().mean() > 0.9) or K == 1
            assert torch.equal(indices.flatten()[clear], distances.argmin(dim=1)[clear])


def second_gap(distances):
    """How much farther the second nearest code is than the nearest, (N,)."""
    if distances.shape[1] == 1:
        return torch.full((len(distances),), torch.inf, device=distances.device)
    nearest = distances.sqrt().topk(2, dim=1, largest=False).values
    return nearest[:, 1] - nearest[:, 0]


def test_vq_is_right_under_a_large_shared_offset(device="cpu"):
    torch.manual_seed(0)
    offset = 1000 * torch.randn(40, device=device)
    inputs = torch.randn(2000, 40, device=device) + offset
    for far in (0, 1, 256):                         # codes that the latents have left behind
        codebook = torch.randn(512, 40, device=device) + offset
        codebook[:far] = torch.rand(far, 40, device=device) / 512
        distances = float64_distances(inputs, codebook)
        clear = second_gap(distances) > 1e-4
        assert clear.float().mean() > 0.9
        assert torch.equal(vq(inputs, codebook).cpu()[clear], distances.argmin(dim=1)[clear])


def test_vq_gives_ties_to_the_lowest_index(device="cpu"):
    corners = torch.tensor([[1., 0.], [-1., 0.], [0., 1.], [0., -1.], [5., 5.]], device=device)
    assert vq(torch.zeros(3, 2, device=device), corners).tolist() == [0, 0, 0]
    assert vq(torch.tensor([[3., 3.]], device=device), corners.flip(0)[[1, 3, 0, 0]]).tolist() == [2]
    torch.manual_seed(0)
    for K in (5, 64, 511, 512):
        inputs, codebook = torch.randn(300, 40, device=device), torch.randn(K, 40, device=device)
        assert (vq(inputs, torch.cat([codebook, codebook])) < K).all()
        # Whole numbers leave nothing to rounding: many true ties, found by the reference as well.
        inputs, codebook = inputs[:, :3].round(), codebook[:, :3].round()
        assert torch.equal(vq(inputs, codebook).cpu(), float64_distances(inputs, codebook).argmin(dim=1))


def test_vq_computes_in_float32_under_autocast(device="cpu"):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(1000, 40, device=device), torch.randn(512, 40, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        under_autocast = vq(inputs, codebook)
    assert torch.equal(under_autocast, vq(inputs, codebook))


def test_vq_does_not_depend_on_its_blocks(device="cpu"):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(9000, 8, device=device), torch.randn(1024, 8, device=device)
    one_by_one = torch.cat([vq(rows, codebook) for rows in inputs.split(1000)])
    with mock.patch("torch.mm", wraps=torch.mm) as products:
        together = vq(inputs, codebook)
    assert (together == one_by_one).float().mean() > 0.9999                  # rounding may break a tie
    scores = [len(call.args[0]) * call.args[1].shape[1] for call in products.call_args_list]
    assert len(scores) > 1 and max(scores) <= 2**20


def test_vq_stays_inside_the_codebook_whatever_it_is_given(device="cpu"):
    for value in (torch.inf, -torch.inf, torch.nan):
        inputs = torch.tensor([[value, 1.0], [3.0, 4.0]], device=device)
        codebook = torch.tensor([[9.0, 9.0], [3.0, 4.5], [1.0, 1.0], [0.0, 0.0], [5.0, 5.0]], device=device)
        indices = vq(inputs, codebook)
        assert 0 <= indices[0] < 5 and indices[1] == 1


def test_vq_refuses_sizes_that_do_not_fit(device="cpu"):
    inputs = torch.zeros(3, 4, device=device)
    assert_raises(lambda: vq(inputs, torch.zeros(7, 5, device=device)), "(3, 4)", "(7, 5)")
    assert_raises(lambda: vq(inputs, torch.zeros(0, 4, device=device)), "K > 0")
    assert_raises(lambda: vq(inputs, torch.zeros(4, device=device)), "(K, D)")


def test_vq_st_returns_rows_of_the_codebook_and_copies_the_gradient(device="cpu"):
    inputs = torch.tensor([[[0.1, 0.], [2.2, 0.]], [[0.9, 0.2], [2.1, 0.1]]], device=device, requires_grad=True)
    codebook = torch.tensor([[0., 0.], [1., 0.], [2., 0.], [9., 9.]], device=device, requires_grad=True)
    codes, indices = vq_st(inputs, codebook)
    assert indices.tolist() == [0, 2, 1, 2]
    assert torch.equal(codes, codebook[[0, 2, 1, 2]].view(2, 2, 2))
    gradient = torch.tensor([[[1., 2.], [3., 4.]], [[5., 6.], [7., 8.]]], device=device)
    codes.backward(gradient)
    assert torch.equal(inputs.grad, gradient)
    by_hand = torch.tensor([[1., 2.], [5., 6.], [10., 12.], [0., 0.]], device=device)
    assert torch.equal(codebook.grad, by_hand)


# ---------------------------------------------------------------- VectorQuantizer

def test_quantizer_replaces_each_latent_by_its_nearest_code(device="cpu"):
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 5, codebook_init="uniform").to(device)
    z_e = torch.randn(2, 5, 3, 4, device=device) / 32
    out, codebook = quantizer(z_e), quantizer.codebook.detach().cpu().double()
    for b in range(2):
        for i in range(3):
            for j in range(4):
                latent = z_e[b, :, i, j].cpu().double()
                index = min(range(32), key=lambda k: (latent - codebook[k]).square().sum().item())
                assert out.indices[b, i, j] == index
                assert torch.equal(out.z_q[b, :, i, j], quantizer.codebook[index])
    expected = (out.z_q.cpu().double() - z_e.cpu().double()).square().mean().item()
    assert abs(out.codebook_loss.item() - expected) < 1e-7
    assert abs(out.commitment_loss.item() - expected) < 1e-7
    assert torch.equal(quantizer.lookup(out.indices), out.z_q)


def test_each_loss_moves_its_own_side(device="cpu"):
    """Gradients by hand: 2(e − z)/n added up in the rows of the codebook, 2β(z − e)/n at the latents."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 3, codebook_init="uniform").to(device)
    z_e = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    for beta in (0.25, 2.0):
        out = quantizer(z_e)
        by_hand = torch.zeros(4, 3, device=device)
        for latent, index in zip(z_e.detach().permute(0, 2, 3, 1).reshape(-1, 3), out.indices.flatten()):
            by_hand[index] += 2 * (quantizer.codebook[index].detach() - latent) / z_e.numel()
        on_z, on_codebook = torch.autograd.grad(out.codebook_loss, (z_e, quantizer.codebook),
                                                retain_graph=True, allow_unused=True)
        assert on_z is None
        assert torch.allclose(on_codebook, by_hand, atol=1e-7)
        unused = torch.ones(4, dtype=torch.bool, device=device)
        unused[out.indices.flatten()] = False
        assert (on_codebook[unused] == 0).all()

        on_z, on_codebook = torch.autograd.grad(beta * out.commitment_loss, (z_e, quantizer.codebook),
                                                retain_graph=True, allow_unused=True)
        assert on_codebook is None
        assert torch.allclose(on_z, 2 * beta * (z_e - out.z_q).detach() / z_e.numel(), atol=1e-7)

        weights = torch.randn_like(z_e)
        on_z, on_codebook = torch.autograd.grad((out.z_q * weights).sum(), (z_e, quantizer.codebook),
                                                allow_unused=True)
        assert on_codebook is None and torch.equal(on_z, weights)


def test_beta_weighs_the_commitment_loss_alone(device="cpu"):
    """The two terms are equal in value, so that only gradients show which one β weighs."""
    model, x = trained_model(device), images(4, device=device)
    model.eval()
    gradients = {}
    for beta in (0.5, 2.0):
        model.zero_grad()
        losses = vqvae_losses(x, model(x), beta)
        losses.total.backward()
        gradients[beta] = (model.quantizer.codebook.grad.clone(), model.encoder[0].weight.grad.clone())
        expected = losses.reconstruction + losses.codebook + beta * losses.commitment
        assert torch.allclose(losses.total, expected)
    assert torch.equal(gradients[0.5][0], gradients[2.0][0])
    model.zero_grad()
    (1.5 * model(x).commitment_loss).backward()
    difference = gradients[2.0][1] - gradients[0.5][1]
    assert difference.abs().max() > 1e-5
    assert torch.allclose(difference, model.encoder[0].weight.grad, atol=1e-5)


def test_quantizer_refuses_what_does_not_fit(device="cpu"):
    quantizer = VectorQuantizer(8, 3).to(device)
    assert_raises(lambda: quantizer(torch.zeros(2, 4, 5, 5, device=device)), "(2, 4, 5, 5)", "(B, 3, h, w)")
    for bad in (-1, 8):
        indices = torch.full((1, 2, 2), bad, device=device)
        assert_raises(partial(quantizer.lookup, indices), bad, "[0, 8)")
    assert_raises(lambda: quantizer.lookup(torch.zeros(1, 2, 2, device=device)), "int64")
    assert_raises(lambda: VectorQuantizer(8, 3, codebook_init="magic"), "magic")
    assert_raises(lambda: VectorQuantizer(8, 3, codebook_update="magic"), "magic")


# ---------------------------------------------------------------- modules

def test_shapes_and_a_training_step_at_every_size(device="cpu"):
    for channels in (1, 3):
        for H, W in ((28, 28), (32, 32), (64, 64), (28, 36)):
            torch.manual_seed(0)
            model = VectorQuantizedVAE(channels, hidden_size=8, num_codes=16).to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            x = images(4, channels, H, W, device)
            before = state_of(model)
            out = model(x)
            assert out.reconstruction.shape == x.shape
            assert out.z_e.shape == out.z_q.shape == (4, 8, H // 4, W // 4)
            assert out.indices.shape == (4, H // 4, W // 4) and out.indices.dtype == torch.int64
            vqvae_losses(x, out, beta=1.0).total.backward()
            optimizer.step()
            for name, value in model.named_parameters():
                assert torch.isfinite(value).all() and not torch.equal(value, before[name]), name


def test_sizes_that_do_not_fit_are_refused_with_the_numbers(device="cpu"):
    model = VectorQuantizedVAE(1, 8, 16).to(device)
    for call in (model, model.encode):
        assert_raises(partial(call, images(2, 1, 30, 28, device)), "30×28", "multiples of 4")
        assert_raises(partial(call, images(2, 1, 28, 27, device)), "28×27")
        assert_raises(partial(call, images(2, 3, 28, 28, device)), "(2, 3, 28, 28)", "(B, 1, H, W)")
    assert_raises(lambda: VectorQuantizedVAE(2, 8, 16), "not 2")


def test_residual_skip_carries_the_rectified_input(device="cpu"):
    block = ResidualBlock(3).to(device).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)             # the block itself adds nothing then
    x = torch.randn(2, 3, 4, 4, device=device)
    before = x.clone()
    assert torch.equal(block(x), x.clamp(min=0))
    assert torch.equal(x, before)


def test_convolutions_start_xavier_uniform_with_zero_bias(device="cpu"):
    torch.manual_seed(0)
    model = VectorQuantizedVAE(1, 40, 512).to(device)
    weight = model.encoder[3].weight                                  # fan in = fan out = 40 · 16
    bound = (6 / (2 * 40 * 16)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound and (model.encoder[3].bias == 0).all()
    assert model.quantizer.codebook.abs().max() <= 1 / 512


# ---------------------------------------------------------------- evaluation

def test_decoded_codes_equal_the_reconstruction(device="cpu"):
    for channels in (1, 3):
        model, x = trained_model(device, channels=channels).eval(), images(6, channels, 28, 36, device)
        with torch.no_grad():
            out = model(x)
            assert torch.equal(model.encode(x), out.indices)
            assert torch.equal(model.decode(model.encode(x)), out.reconstruction)


def test_reconstruction_does_not_depend_on_the_batch(device="cpu"):
    model, x = trained_model(device).eval(), images(9, device=device)
    with torch.no_grad():
        together = model(x)
        for i in range(9):
            alone = model(x[i:i + 1])
            assert torch.equal(alone.indices[0], together.indices[i])
            assert (alone.reconstruction[0] - together.reconstruction[i]).abs().max() < 1e-5


def main(argv=None):
    parser = get_parser()
    args, failed = parser.parse_args(argv), 0
    with parser.bad_input_in_one_line():
        device = inputs.find_device(args.device)
    checks = [check for name, check in globals().items() if name.startswith("test_")]
    for check in checks:
        try:
            check(device)
        except Exception:
            failed += 1
            print(f"FAILED  {check.__name__}\n{traceback.format_exc()}")
        else:
            print(f"ok      {check.__name__}")
    print(f"{len(checks) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
