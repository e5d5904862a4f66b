"""Checks of the modules against independent implementations: python3 testers.py [--device cuda]

Each check is a function of the device. pytest also collects them, and runs them on the CPU.
"""

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(description=__doc__)
    parser.add_argument("--device", type=arguments.device, default="cpu",
                        help=f"{arguments.DEVICES} (default: %(default)s)")
    return parser


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import math
import sys
import traceback
from functools import partial
from unittest import mock

import torch

from modules import ResidualBlock, VectorQuantizedVAE, vqvae_losses
from utils import inputs
from vector_quantizer import FiniteScalarQuantizer, VectorQuantizer, vq, vq_st


def float64_distances(inputs, codebook):
    """Squared distances (N, K) in float64 without expanding the square, on the CPU: some GPUs lack float64."""
    flat = inputs.reshape(-1, inputs.shape[-1]).cpu().double()
    return (flat[:, None, :] - codebook.cpu().double()[None, :, :]).square().sum(dim=-1)


def random_images(count, channels=1, height=28, width=28, device="cpu"):
    return torch.rand(count, channels, height, width, device=device) * 2 - 1


def trained_model(device, steps=5, **kwargs):
    """A small model after a few steps on noise: no weight, buffer or code has its initial value."""
    torch.manual_seed(1)
    model = VectorQuantizedVAE(hidden_size=8, num_codes=16, **kwargs).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(steps):
        x = random_images(8, model.channels, device=device)
        optimizer.zero_grad()
        vqvae_losses(x, model(x), beta=0.25).total.backward()
        optimizer.step()
    return model


def clone_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_raises(call, *parts):
    """call() must raise a ValueError whose message contains all parts."""
    try:
        call()
    except ValueError as error:
        for part in parts:
            assert str(part) in str(error), f"{part!r} is not in {error}"
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
            unambiguous = nearest_margin(distances) > 1e-4 * scale
            assert (unambiguous.float().mean() > 0.9) or K == 1
            assert torch.equal(indices.flatten()[unambiguous], distances.argmin(dim=1)[unambiguous])


def nearest_margin(distances):
    """Distance to the second nearest code minus distance to the nearest, (N,)."""
    if distances.shape[1] == 1:
        return torch.full((len(distances),), torch.inf, device=distances.device)
    nearest = distances.sqrt().topk(2, dim=1, largest=False).values
    return nearest[:, 1] - nearest[:, 0]


def test_vq_is_exact_under_a_large_shared_offset(device="cpu"):
    torch.manual_seed(0)
    offset = 1000 * torch.randn(40, device=device)
    inputs = torch.randn(2000, 40, device=device) + offset
    for num_outliers in (0, 1, 256):                         # codes far from all latents
        codebook = torch.randn(512, 40, device=device) + offset
        codebook[:num_outliers] = torch.rand(num_outliers, 40, device=device) / 512
        distances = float64_distances(inputs, codebook)
        unambiguous = nearest_margin(distances) > 1e-4
        assert unambiguous.float().mean() > 0.9
        assert torch.equal(vq(inputs, codebook).cpu()[unambiguous], distances.argmin(dim=1)[unambiguous])


def test_vq_breaks_ties_by_lowest_index(device="cpu"):
    corners = torch.tensor([[1., 0.], [-1., 0.], [0., 1.], [0., -1.], [5., 5.]], device=device)
    assert vq(torch.zeros(3, 2, device=device), corners).tolist() == [0, 0, 0]
    assert vq(torch.tensor([[3., 3.]], device=device), corners.flip(0)[[1, 3, 0, 0]]).tolist() == [2]
    torch.manual_seed(0)
    for K in (5, 64, 511, 512):
        inputs, codebook = torch.randn(300, 40, device=device), torch.randn(K, 40, device=device)
        assert (vq(inputs, torch.cat([codebook, codebook])) < K).all()
        # Integer arithmetic is exact, so there are many exact ties, also in the reference.
        inputs, codebook = inputs[:, :3].round(), codebook[:, :3].round()
        assert torch.equal(vq(inputs, codebook).cpu(), float64_distances(inputs, codebook).argmin(dim=1))


def test_vq_computes_in_float32_under_autocast(device="cpu"):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(1000, 40, device=device), torch.randn(512, 40, device=device)
    with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
        under_autocast = vq(inputs, codebook)
    assert torch.equal(under_autocast, vq(inputs, codebook))


def test_vq_is_independent_of_block_size(device="cpu"):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(9000, 8, device=device), torch.randn(1024, 8, device=device)
    separate = torch.cat([vq(rows, codebook) for rows in inputs.split(1000)])
    with (mock.patch("torch.mm", wraps=torch.mm) as matmul,
          mock.patch("vector_quantizer.BLOCK_SCORES_ELSEWHERE", 2**20)):
        batched = vq(inputs, codebook)
    assert (batched == separate).float().mean() > 0.999                   # rounding may break ties
    block_sizes = [len(call.args[0]) * call.args[1].shape[1] for call in matmul.call_args_list]
    assert len(block_sizes) > 1 and max(block_sizes) <= 2**20


def test_vq_indices_are_valid_for_nonfinite_input(device="cpu"):
    for value in (torch.inf, -torch.inf, torch.nan):
        inputs = torch.tensor([[value, 1.0], [3.0, 4.0]], device=device)
        codebook = torch.tensor([[9.0, 9.0], [3.0, 4.5], [1.0, 1.0], [0.0, 0.0], [5.0, 5.0]], device=device)
        indices = vq(inputs, codebook)
        assert 0 <= indices[0] < 5 and indices[1] == 1


def test_vq_rejects_wrong_shapes(device="cpu"):
    inputs = torch.zeros(3, 4, device=device)
    assert_raises(lambda: vq(inputs, torch.zeros(7, 5, device=device)), "(3, 4)", "(7, 5)")
    assert_raises(lambda: vq(inputs, torch.zeros(0, 4, device=device)), "K > 0")
    assert_raises(lambda: vq(inputs, torch.zeros(4, device=device)), "(K, D)")


def test_vq_st_returns_codebook_rows_and_copies_the_gradient(device="cpu"):
    inputs = torch.tensor([[[0.1, 0.], [2.2, 0.]], [[0.9, 0.2], [2.1, 0.1]]], device=device, requires_grad=True)
    codebook = torch.tensor([[0., 0.], [1., 0.], [2., 0.], [9., 9.]], device=device, requires_grad=True)
    codes, indices = vq_st(inputs, codebook)
    assert indices.tolist() == [0, 2, 1, 2]
    assert torch.equal(codes, codebook[[0, 2, 1, 2]].view(2, 2, 2))
    gradient = torch.tensor([[[1., 2.], [3., 4.]], [[5., 6.], [7., 8.]]], device=device)
    codes.backward(gradient)
    assert torch.equal(inputs.grad, gradient)
    expected = torch.tensor([[1., 2.], [5., 6.], [10., 12.], [0., 0.]], device=device)
    assert torch.equal(codebook.grad, expected)


# ---------------------------------------------------------------- VectorQuantizer

def test_quantizer_maps_each_latent_to_its_nearest_code(device="cpu"):
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


def test_fsq_rounds_each_number_to_one_of_its_levels(device="cpu"):
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer(8 * 5 * 2, 6, "8,5,2").to(device)
    z_e = 5 * torch.randn(2, 6, 3, 4, device=device)
    out = quantizer(z_e)
    linear = {name: value.cpu().double() for name, value in quantizer.state_dict().items()}
    for b in range(2):
        for i in range(3):
            for j in range(4):
                numbers = linear["project_in.weight"] @ z_e[b, :, i, j].cpu().double() + linear["project_in.bias"]
                index, place, code = 0, 1, []
                for number, L in zip(numbers.tolist(), (8, 5, 2)):
                    half, offset = (L - 1) * 0.999 / 2, 0.5 if L % 2 == 0 else 0
                    level = round(math.tanh(number + math.tan(offset / half)) * half - offset)
                    index, place = index + (level + L // 2) * place, place * L
                    code.append(level / (L // 2))
                expected = linear["project_out.weight"] @ torch.tensor(code).double() + linear["project_out.bias"]
                assert out.indices[b, i, j] == index
                assert torch.allclose(out.z_q[b, :, i, j].cpu().double(), expected, atol=1e-6)
    assert torch.equal(quantizer.lookup(out.indices), out.z_q)


def test_each_loss_has_gradients_on_one_side_only(device="cpu"):
    """Expected: 2(e − z)/n summed over the latents of each code, and 2β(z − e)/n at the latents."""
    torch.manual_seed(0)
    quantizer = VectorQuantizer(4, 3, codebook_init="uniform").to(device)
    z_e = torch.randn(2, 3, 2, 2, device=device, requires_grad=True)
    for beta in (0.25, 2.0):
        out = quantizer(z_e)
        expected = torch.zeros(4, 3, device=device)
        for latent, index in zip(z_e.detach().permute(0, 2, 3, 1).reshape(-1, 3), out.indices.flatten()):
            expected[index] += 2 * (quantizer.codebook[index].detach() - latent) / z_e.numel()
        grad_z, grad_codebook = torch.autograd.grad(out.codebook_loss, (z_e, quantizer.codebook),
                                                    retain_graph=True, allow_unused=True)
        assert grad_z is None
        assert torch.allclose(grad_codebook, expected, atol=1e-7)
        unused = torch.ones(4, dtype=torch.bool, device=device)
        unused[out.indices.flatten()] = False
        assert (grad_codebook[unused] == 0).all()

        grad_z, grad_codebook = torch.autograd.grad(beta * out.commitment_loss, (z_e, quantizer.codebook),
                                                    retain_graph=True, allow_unused=True)
        assert grad_codebook is None
        assert torch.allclose(grad_z, 2 * beta * (z_e - out.z_q).detach() / z_e.numel(), atol=1e-7)

        weights = torch.randn_like(z_e)
        grad_z, grad_codebook = torch.autograd.grad((out.z_q * weights).sum(), (z_e, quantizer.codebook),
                                                    allow_unused=True)
        assert grad_codebook is None and torch.equal(grad_z, weights)


def test_beta_weights_only_the_commitment_loss(device="cpu"):
    """The two terms have equal values: only the gradients show which one β weights."""
    model, x = trained_model(device), random_images(4, device=device)
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


def test_quantizer_rejects_wrong_shapes_and_indices(device="cpu"):
    quantizer = VectorQuantizer(8, 3).to(device)
    assert_raises(lambda: quantizer(torch.zeros(2, 4, 5, 5, device=device)), "(2, 4, 5, 5)", "(B, 3, h, w)")
    for invalid in (-1, 8):         # on the CPU: a GPU would be waited for, and is not asked
        indices = torch.full((1, 2, 2), invalid)
        assert_raises(partial(VectorQuantizer(8, 3).lookup, indices), invalid, "[0, 8)")
    assert_raises(lambda: quantizer.lookup(torch.zeros(1, 2, 2, device=device)), "integers")
    assert_raises(lambda: VectorQuantizer(8, 3, codebook_init="magic"), "magic")
    assert_raises(lambda: VectorQuantizer(8, 3, codebook_update="magic"), "magic")


# ---------------------------------------------------------------- modules

def test_training_step_at_every_image_size(device="cpu"):
    for channels in (1, 3):
        for H, W in ((28, 28), (32, 32), (64, 64), (28, 36)):
            torch.manual_seed(0)
            model = VectorQuantizedVAE(channels, hidden_size=8, num_codes=16).to(device)
            optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
            x = random_images(4, channels, H, W, device)
            before = clone_state(model)
            out = model(x)
            assert out.reconstruction.shape == x.shape
            assert out.z_e.shape == out.z_q.shape == (4, 8, H // 4, W // 4)
            assert out.indices.shape == (4, H // 4, W // 4) and out.indices.dtype == torch.int64
            vqvae_losses(x, out, beta=1.0).total.backward()
            optimizer.step()
            for name, value in model.named_parameters():
                assert torch.isfinite(value).all() and not torch.equal(value, before[name]), name


def test_unsupported_image_sizes_are_rejected(device="cpu"):
    model = VectorQuantizedVAE(1, 8, 16).to(device)
    for call in (model, model.encode):
        assert_raises(partial(call, random_images(2, 1, 30, 28, device)), "30×28", "multiples of 4")
        assert_raises(partial(call, random_images(2, 1, 28, 27, device)), "28×27")
        assert_raises(partial(call, random_images(2, 3, 28, 28, device)), "(2, 3, 28, 28)", "(B, 1, H, W)")
    assert_raises(lambda: VectorQuantizedVAE(2, 8, 16), "not 2")


def test_residual_skip_carries_the_rectified_input(device="cpu"):
    block = ResidualBlock(3).to(device).eval()
    for parameter in block.parameters():
        torch.nn.init.zeros_(parameter)             # the residual branch adds zero
    x = torch.randn(2, 3, 4, 4, device=device)
    before = x.clone()
    assert torch.equal(block(x), x.clamp(min=0))
    assert torch.equal(x, before)


def test_convolutions_have_xavier_uniform_init_and_zero_bias(device="cpu"):
    torch.manual_seed(0)
    model = VectorQuantizedVAE(1, 40, 512).to(device)
    weight = model.encoder[3].weight                                  # fan in = fan out = 40 · 16
    bound = (6 / (2 * 40 * 16)) ** 0.5
    assert 0.99 * bound < weight.abs().max() <= bound and (model.encoder[3].bias == 0).all()
    assert model.quantizer.codebook.abs().max() <= 1 / 512


# ---------------------------------------------------------------- evaluation

def test_decoded_indices_equal_the_reconstruction(device="cpu"):
    for channels in (1, 3):
        model, x = trained_model(device, channels=channels).eval(), random_images(6, channels, 28, 36, device)
        with torch.no_grad():
            out = model(x)
            assert torch.equal(model.encode(x), out.indices)
            assert torch.equal(model.decode(model.encode(x)), out.reconstruction)


def test_reconstruction_is_independent_of_the_batch(device="cpu"):
    model, x = trained_model(device).eval(), random_images(9, device=device)
    with torch.no_grad():
        batched = model(x)
        for i in range(9):
            single = model(x[i:i + 1])
            assert torch.equal(single.indices[0], batched.indices[i])
            assert (single.reconstruction[0] - batched.reconstruction[i]).abs().max() < 1e-5


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
