"""The contract of a quantizer, finite scalar quantization, and a quantizer of one's own through all scripts."""

import inspect
import json
import re
import shutil
import signal
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT, expect_usage_error, run_command, run_script, snapshot
from torch import nn

import checkpoint
import data
import vector_quantizer
from modules import VectorQuantizedVAE, check_quantizer, check_training_mode
from utils import arguments
from utils.train_state import TrainState
from vector_quantizer import QUANTIZERS, FiniteScalarQuantizer, VectorQuantizer

D = 5
EXAMPLE, = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "your-own-quantizer.md").read_text(),
                      flags=re.MULTILINE | re.DOTALL)
EACH = pytest.mark.parametrize("name", list(QUANTIZERS | {"sign": None}))
SMALL_FLAGS = ("--dataset", "MNIST-10k", "--hidden-size", "16", "--batch-size", "256", "--lr", "4e-3",
               "--output-folder", "run")


def add_example():
    """Paste the example of the page at the end of vector_quantizer.py, in this process."""
    exec(EXAMPLE, vars(vector_quantizer))


@pytest.fixture(autouse=True)
def example(monkeypatch):
    monkeypatch.setattr(vector_quantizer, "SignQuantizer", None, raising=False)
    add_example()


def make_quantizer(name, num_codes=512, **settings):
    torch.manual_seed(0)
    return QUANTIZERS[name](num_codes, D, **settings)


def latents(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


# ---------------------------------------------------------------- the contract

@EACH
def test_quantizer_keeps_the_contract_after_training_steps(name):
    """And so does one that is restored from its state_dict, whose codes are the same."""
    quantizer = make_quantizer(name)
    optimizer = torch.optim.Adam(quantizer.parameters(), lr=1e-2)
    for _ in range(3):
        output = quantizer(latents(4, D, 6, 7))
        optimizer.zero_grad()
        (output.z_q.square().mean() + output.codebook_loss + output.commitment_loss).backward()
        optimizer.step()
    check_quantizer(quantizer, 512, D)
    assert all(module.training for module in quantizer.modules())
    restored = make_quantizer(name)
    restored.load_state_dict(quantizer.state_dict())
    z_e = latents(3, D, 6, 7)
    expected, output = quantizer.eval()(z_e), restored.eval()(z_e)
    assert torch.equal(output.z_q, expected.z_q) and torch.equal(output.indices, restored.encode(z_e))
    assert torch.allclose(restored.lookup(output.indices), expected.z_q, rtol=1e-4, atol=1e-6)
    assert len(output.indices.unique()) > 10


@EACH
def test_check_changes_no_state_and_draws_nothing(name):
    quantizer = make_quantizer(name)
    before, random_state = {key: value.clone() for key, value in quantizer.state_dict().items()}, torch.get_rng_state()
    check_quantizer(quantizer, 512, D)
    check_training_mode(quantizer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(value, before[key]) for key, value in quantizer.state_dict().items())
    assert all(parameter.grad is None for parameter in quantizer.parameters())


def test_model_is_built_while_another_thread_draws_random_numbers():
    """torch's generator is that of all threads."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: [torch.rand(1) for _ in iter(done.is_set, True)])
    thread.start()
    try:
        for _ in range(20):
            VectorQuantizedVAE(1, 8, 16)
    finally:
        done.set()
        thread.join()


@EACH
def test_model_is_built_without_memory_values_or_gradients(name):
    with torch.device("meta"), checkpoint._Uninitialised():
        meta = VectorQuantizedVAE(1, 16, 512, quantizer=name)
    with torch.inference_mode():
        model = VectorQuantizedVAE(1, 16, 512, quantizer=name)
    assert meta.state_dict().keys() == model.state_dict().keys()


def output_with(change):
    """A forward() whose Quantized is changed by change(output) → {field: value}."""
    def forward(self, z_e):
        output = VectorQuantizer.forward(self, z_e)
        return output._replace(**change(output))
    return {"forward": forward}


def initialised_with(change):
    def __init__(self, num_codes, dim):
        VectorQuantizer.__init__(self, num_codes, dim)
        change(self)
    return {"__init__": __init__}


def forward_after(change):
    def forward(self, z_e):
        change(self)
        return VectorQuantizer.forward(self, z_e)
    return {"forward": forward}


BROKEN = {
    "it has no num_codes": initialised_with(lambda self: delattr(self, "num_codes")),
    "its dim is 9, not 8": initialised_with(lambda self: setattr(self, "dim", 9)),
    "it has no forward()": {"forward": nn.Module.forward},
    "it has no encode()": {"encode": None},
    "it has no lookup()": {"lookup": None},
    "restarts is not a buffer of one int64": initialised_with(
        lambda self: self.register_buffer("restarts", torch.zeros(()))),
    "its restarts is a persistent buffer": initialised_with(
        lambda self: self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))),
    # The latents that are tried need not be nearest to the last code.
    "encode()'s indices leave [0, 16)": {
        **initialised_with(lambda self: self.codebook.data[-1].fill_(100)),
        "forward": lambda self, z_e: VectorQuantizer.forward(self, z_e)._replace(indices=self.encode(z_e)),
        "encode": lambda self, z_e: VectorQuantizer.encode(self, z_e) + 1,
        "lookup": lambda self, indices: self.codebook[indices - 1].permute(0, 3, 1, 2)},
    "lookup() does not take all indices in [0, 16)": {
        **initialised_with(lambda self: self.codebook.data[-1].fill_(100)),
        "lookup": lambda self, indices: self.codebook[:-1][indices].permute(0, 3, 1, 2)},
    "forward() returns tuple, not Quantized": {"forward": lambda self, z_e: tuple(VectorQuantizer.forward(self, z_e))},
    "z_q is torch.float32 (2, 8, 4, 3), not floating point (2, 8, 3, 4)": output_with(
        lambda output: {"z_q": output.z_q.transpose(2, 3)}),
    "indices is torch.int32": output_with(lambda output: {"indices": output.indices.int()}),
    "indices is torch.int64 (2, 12), not torch.int64 (2, 3, 4)": output_with(
        lambda output: {"indices": output.indices.flatten(1)}),
    "indices leave [0, 16)": output_with(lambda output: {"indices": output.indices + 16}),
    "codebook_loss is float, not a tensor": output_with(lambda output: {"codebook_loss": 0.0}),
    "commitment_loss is torch.float32 (1,), not floating point ()": output_with(
        lambda output: {"commitment_loss": output.commitment_loss.view(1)}),
    "no gradient of forward()'s z_q reaches z_e": output_with(lambda output: {"z_q": output.z_q.detach()}),
    "encode() gives other indices": {"encode": lambda self, z_e: 15 - VectorQuantizer.encode(self, z_e)},
    "encode()'s result is torch.int64 (24,)": {"encode": lambda self, z_e: VectorQuantizer.encode(self, z_e).flatten()},
    "lookup() gives other codes": {"lookup": lambda self, indices: 1.01 * VectorQuantizer.lookup(self, indices)},
    "its codebook changes in evaluation mode": forward_after(lambda self: self.codebook.data.mul_(-1)),
    "its steps_unused changes in evaluation mode": forward_after(lambda self: self.steps_unused.add_(1)),
}


@pytest.mark.parametrize("words", BROKEN)
def test_model_refuses_a_quantizer_that_breaks_the_contract(words, monkeypatch):
    monkeypatch.setitem(QUANTIZERS, "broken", type("Broken", (VectorQuantizer,), BROKEN[words]))
    with pytest.raises(ValueError, match=re.escape(words)) as excinfo:
        VectorQuantizedVAE(1, 8, 16, quantizer="broken")
    assert "the quantizer Broken does not keep the contract" in str(excinfo.value)


def test_gradient_that_cancels_is_refused(monkeypatch):
    """z_e + e − z_e without detach() has the value of the straight-through estimator, but its gradient is zero."""
    class Cancelling(VectorQuantizer):
        def forward(self, z_e):
            output = super().forward(z_e)
            return output._replace(z_q=z_e + output.z_q.detach() - z_e)

    monkeypatch.setitem(QUANTIZERS, "cancelling", Cancelling)
    with pytest.raises(ValueError, match="no gradient"):
        VectorQuantizedVAE(1, 8, 16, quantizer="cancelling")


def detached_in_training(self, z_e):
    output = VectorQuantizer.forward(self, z_e)
    return output._replace(z_q=output.z_q.detach()) if self.training else output


def rebound_restarts(self, z_e):
    self.restarts = self.restarts + 0
    return VectorQuantizer.forward(self, z_e)


def drawn_in_no_parameter(self, num_codes, dim, **settings):
    VectorQuantizer.__init__(self, num_codes, dim)
    del self.codebook
    self.codebook = torch.randn(num_codes, dim)
    self.scale = nn.Parameter(torch.ones(()))


def without_default(self, num_codes, dim, scale):
    VectorQuantizer.__init__(self, num_codes, dim)


@pytest.mark.parametrize("methods, words", [
    ({"__init__": without_default}, "vector_quantizer.py: its setting scale has no default"),
    ({"__init__": drawn_in_no_parameter}, "another one with its state_dict has other codes"),
    ({"forward": rebound_restarts}, "in training mode: its restarts is another tensor, not changed in place"),
    ({"lookup": None}, "vector_quantizer.py: it has no lookup()"),
    ({"forward": detached_in_training}, "vector_quantizer.py in training mode: no gradient of forward()'s z_q")])
def test_training_refuses_a_broken_quantizer_in_one_line_and_writes_nothing(methods, words, monkeypatch, tmp_path,
                                                                            capsys):
    monkeypatch.setitem(QUANTIZERS, "broken", type("Broken", (VectorQuantizer,), methods))
    monkeypatch.chdir(tmp_path)
    line = expect_usage_error("VQ-VAE.py", [*SMALL_FLAGS, "--quantizer", "broken"], capsys)
    assert "the quantizer" in line and words in line and not (tmp_path / "models").exists()


# ---------------------------------------------------------------- shapes

@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_latents_of_another_rank_are_rows(name):
    z_e = latents(2, D, 3, 4)
    quantizer = make_quantizer(name, **{"codebook_init": "uniform"} if name == "vq" else {})
    expected = quantizer.eval()(z_e)
    rows, indices = z_e.permute(0, 2, 3, 1), expected.indices         # (2, 3, 4, D) and (2, 3, 4)
    for shape in ((24,), (2, 12), (2, 1, 3, 4)):
        output = quantizer(rows.reshape(*shape, D))
        assert torch.equal(output.indices, indices.view(shape)) and output.z_q.shape == (*shape, D)
        assert torch.equal(output.z_q.view(2, 3, 4, D).permute(0, 3, 1, 2), expected.z_q)
        assert torch.equal(quantizer.encode(rows.reshape(*shape, D)), output.indices)
        assert torch.equal(quantizer.lookup(output.indices), output.z_q)
    single = quantizer(rows[0, 0, 0])
    assert single.indices.shape == () and torch.equal(quantizer.lookup(single.indices), single.z_q)
    for wrong in (latents(2, D + 1, 3, 4), latents(7, D + 1), latents()):
        for call in (quantizer, quantizer.encode):
            with pytest.raises(ValueError, match=re.escape(f"{tuple(wrong.shape)} is not (B, {D}, h, w)")):
                call(wrong)
    for wrong in (torch.tensor([512]), torch.tensor([[-1]])):
        with pytest.raises(ValueError, match=r"leave \[0, 512\)"):
            quantizer.lookup(wrong)


def test_codebook_trains_on_rows_as_on_maps():
    states = []
    for shape in ((6, 2, 2), ()):
        quantizer = make_quantizer("vq", 8, codebook_update="ema", restart_after=1)
        for seed in range(3):
            z_e = torch.randn(24, D, generator=torch.Generator().manual_seed(seed))
            quantizer(z_e.view(*shape, D).permute(0, 3, 1, 2) if shape else z_e)
        states.append(quantizer.state_dict())
    assert all(torch.equal(value, states[1][key]) for key, value in states[0].items())


def test_file_of_the_quantizers_works_alone(tmp_path):
    """Copied into an empty folder, with a quantizer in a file of its own, which the last line imports."""
    source = (ROOT / "vector_quantizer.py").read_text()
    (tmp_path / "vector_quantizer.py").write_text(source + "import sign\n")
    header = "import torch\nfrom torch import nn\n" \
             "from vector_quantizer import QUANTIZERS, Quantized, straight_through\n"
    (tmp_path / "sign.py").write_text(header + EXAMPLE)
    (tmp_path / "use.py").write_text("""
import sign, torch, vector_quantizer
for name in ("vq", "fsq"):
    quantizer = vector_quantizer.QUANTIZERS[name](512, 6)
    z_e = torch.randn(1000, 6, requires_grad=True)
    output = quantizer(z_e)
    output.z_q.sum().backward()
    assert output.z_q.shape == z_e.grad.shape == (1000, 6) and output.indices.shape == (1000,)
    assert torch.equal(quantizer.eval().lookup(quantizer.encode(z_e)), quantizer(z_e).z_q)
print(*vector_quantizer.QUANTIZERS)
""")
    result = run_command(sys.executable, "use.py", cwd=tmp_path, PYTHONPATH="")
    assert result.stdout.split()[-1:] == ["sign"], result.stderr


# ---------------------------------------------------------------- finite scalar quantization

def fsq_reference(quantizer, sizes, rows):
    """Latents (N, D) → indices (N,), codes (N, D), their derivatives (N, D, D) and distances to a tie, in float64."""
    weights = {key: value.numpy().astype(np.float64) for key, value in quantizer.state_dict().items()}
    z = rows @ weights["project_in.weight"].T + weights["project_in.bias"]
    L, even = np.array(sizes), np.array(sizes) % 2 == 0
    half, offset = (L - 1) * (1 - 1e-3) / 2, np.where(even, 0.5, 0)
    t = np.tanh(z + np.tan(offset / half))
    bounded = t * half - offset
    rounded, margin = np.rint(bounded), 0.5 - np.abs(bounded - np.rint(bounded)).max(axis=1)
    indices = np.ravel_multi_index(tuple((rounded + L // 2).astype(int).T)[::-1], sizes[::-1])
    codes = rounded / (L // 2) @ weights["project_out.weight"].T + weights["project_out.bias"]
    slopes = (1 - t**2) * half / (L // 2)                             # (N, d), of the scaled numbers
    derivatives = np.einsum("od,nd,di->noi", weights["project_out.weight"], slopes, weights["project_in.weight"])
    return indices, codes, derivatives, margin


@pytest.mark.rounding
@pytest.mark.parametrize("levels", ["8,8,8", "8,5,3,2", "2", "7,4", "2,2,2,2,2,2"])
def test_fsq_matches_float64_numpy(levels):
    sizes = [int(size) for size in levels.split(",")]
    torch.manual_seed(0)
    quantizer = FiniteScalarQuantizer(int(np.prod(sizes)), D, levels)
    z_e = (20 * latents(5000, D)).requires_grad_()                    # wide enough to reach the outermost levels
    indices, codes, derivatives, margin = fsq_reference(quantizer, sizes, z_e.detach().double().numpy())
    clear = margin > 1e-4
    assert clear.mean() > 0.95 and indices.min() >= 0 and indices.max() < quantizer.num_codes
    output = quantizer(z_e)
    assert np.array_equal(output.indices.numpy()[clear], indices[clear])
    assert np.allclose(output.z_q.detach().numpy()[clear], codes[clear], atol=1e-5)
    assert output.codebook_loss == output.commitment_loss == 0
    gradient = latents(D)
    output.z_q.backward(gradient.expand(5000, D))
    expected = np.einsum("o,noi->ni", gradient.double().numpy(), derivatives)
    assert np.allclose(z_e.grad.numpy(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.rounding
@pytest.mark.parametrize("levels", ["8,8,8", "8,5,3,2", "2", "7,4"])
def test_fsq_reaches_every_level_and_looks_every_code_up(levels):
    sizes = [int(size) for size in levels.split(",")]
    quantizer = FiniteScalarQuantizer(int(np.prod(sizes)), len(sizes), levels).double()
    with torch.no_grad():
        for layer in (quantizer.project_in, quantizer.project_out):             # the latents are the numbers themselves
            layer.weight.copy_(torch.eye(len(sizes)))
            layer.bias.zero_()
    K = quantizer.num_codes
    codes = quantizer.lookup(torch.arange(K)).detach()
    assert len(codes.unique(dim=0)) == K == np.prod(sizes)
    for values, L in zip(codes.T, sizes):
        assert np.allclose(values.unique(), (np.arange(L) - L // 2) / (L // 2))
    # atanh of each level: the latents that are bounded to it.
    half, offset = (torch.tensor(sizes) - 1) * 0.999 / 2, (1 - torch.tensor(sizes) % 2) / 2
    bounded = (codes * (torch.tensor(sizes) // 2) + offset) / half
    z_e = torch.atanh(bounded.clamp(-1 + 1e-9, 1 - 1e-9)) - torch.tan(offset / half)
    assert torch.equal(quantizer.encode(z_e), torch.arange(K))


def test_fsq_computes_in_float32_under_autocast():
    quantizer, z_e = make_quantizer("fsq"), latents(4, D, 6, 6)
    expected = quantizer(z_e)
    with torch.autocast("cpu", torch.bfloat16):
        output = quantizer(z_e)
        assert torch.equal(quantizer.lookup(output.indices), output.z_q)
    assert output.z_q.dtype == torch.float32 and torch.equal(output.z_q, expected.z_q)
    assert quantizer(z_e.bfloat16()).z_q.dtype == torch.float32


def test_fsq_indices_are_valid_for_nonfinite_latents():
    for value in (torch.inf, -torch.inf, torch.nan):
        indices = make_quantizer("fsq")(torch.full((3, D), value)).indices
        assert indices.min() >= 0 and indices.max() < 512


BAD_LEVELS = ["1,8", "8,0", "8,-8", "8;8", "8.5", "", "8,", "8,8 8", "many", "1024,1025", ",".join(21 * "2"),
              "9" * 5000]


@pytest.mark.parametrize("levels", BAD_LEVELS)
def test_bad_levels_are_refused(levels, tmp_path, monkeypatch, capsys):
    with pytest.raises(ValueError, match="are not integers from 2 to 1000, such as 8,8,8"):
        FiniteScalarQuantizer(512, D, levels)
    monkeypatch.chdir(tmp_path)
    line = expect_usage_error("VQ-VAE.py", ["--quantizer", "fsq", f"--levels={levels}"], capsys)
    assert "--levels" in line and len(line) < 2100
    if len(levels) < 100:
        assert repr(levels) in line
        assert "such as 8,8,8, of integers from 2 to 1000 with a product of up to 1,048,576" in line


def test_limits_and_defaults_of_levels_are_the_same_for_flag_and_class():
    assert arguments.MAX_LEVELS_PRODUCT == vector_quantizer.MAX_FSQ_CODES
    assert arguments.MAX_LEVELS == vector_quantizer.MAX_FSQ_LEVELS
    # All of the most levels are reached.
    largest = FiniteScalarQuantizer(1000, 1, "1000")
    reached = largest._bound(torch.linspace(-20, 20, 10_001).unsqueeze(1)).round()
    assert (reached.min(), reached.max()) == (-500, 499)
    assert inspect.signature(FiniteScalarQuantizer).parameters["levels"].default == arguments.LEVELS
    assert arguments.levels(" 8, 05,5") == "8,5,5" and arguments.levels("1000,1000") == "1000,1000"
    assert FiniteScalarQuantizer(2**20, D, ",".join(20 * "2")).num_codes == 2**20
    with pytest.raises(ValueError, match="num_codes 512 is not 200, the product of the levels 8,5,5"):
        VectorQuantizedVAE(1, 16, 512, quantizer="fsq", levels="8,5,5")


# ---------------------------------------------------------------- flags and checkpoints

@pytest.mark.parametrize(("flags", "words"), [
    (["--quantizer", "fqs"], "'fqs' is unknown: did you mean fsq? choose from vq, fsq"),
    (["--quantizer", "FSQ", "--k", "512", "--levels", "8,8"], "--k 512 contradicts --levels 8,8, which make 64 codes"),
    (["--quantizer", "fsq", "--restart-after", "20"], "--restart-after 20: --quantizer fsq has no such setting"),
    (["--quantizer", "sign", "--codebook-update", "ema"], "--codebook-update ema: --quantizer sign has no such"),
    (["--levels", "8,8,8"], "--levels 8,8,8: --quantizer vq has no such setting"),
    (["--quantizer", "sign", "--k", "500"], "--k 500 is not a power of two")])
def test_flag_that_does_not_fit_the_quantizer_is_refused(flags, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert words in expect_usage_error("VQ-VAE.py", [*SMALL_FLAGS, *flags], capsys)
    assert snapshot(tmp_path) in ({}, {"logs": "folder"}, {"models": "folder"}), snapshot(tmp_path)


def test_own_settings_are_kept_and_missing_ones_mean_their_default(monkeypatch, tmp_path):
    class Scaled(VectorQuantizer):
        def __init__(self, num_codes, dim, restart_after=7, scale=2.0):
            super().__init__(num_codes, dim, restart_after=restart_after)
            self.scale = scale

    monkeypatch.setitem(QUANTIZERS, "scaled", Scaled)
    config = {"channels": 1, "hidden_size": 8, "num_codes": 16, "quantizer": "scaled", "scale": 3.0}
    contents = {"format": 1, "kind": "vqvae", "config": config, "model": VectorQuantizedVAE(**config).state_dict(),
                "dataset": {"name": "MNIST", "shape": [1, 28, 28]}}
    checkpoint.save(tmp_path / "model.pt", contents)
    quantizer = checkpoint.load_model(tmp_path / "model.pt")[0].quantizer
    assert type(quantizer) is Scaled and (quantizer.restart_after, quantizer.scale) == (7, 3.0)
    monkeypatch.delitem(QUANTIZERS, "scaled")
    with pytest.raises(ValueError, match="quantizer 'scaled' is not in vector_quantizer"):
        checkpoint.load_model(tmp_path / "model.pt")


def test_run_from_before_quantizers_had_names_resumes_unchanged(trained, tmp_path):
    results = {}
    for age in ("new", "old"):
        shutil.copytree(trained / "models", tmp_path / age / "models")
        shutil.copytree(trained / "logs", tmp_path / age / "logs")
        last = tmp_path / age / "models" / "run" / "last.pt"
        contents = torch.load(last, weights_only=True)
        if age == "old":
            for name, values in (("quantizer", contents["config"]), ("quantizer", contents["training"]["settings"]),
                                 ("levels", contents["training"]["settings"])):
                del values[name]
            torch.save(contents, last)
        result = run_script("VQ-VAE.py", "--resume", "--output-folder", "run", "--num-epochs", 3, cwd=tmp_path / age)
        assert result.returncode == 0, result.stderr
        results[age] = torch.load(last, weights_only=True)["model"]
    assert all(torch.equal(value, results["old"][key]) for key, value in results["new"].items())


# ---------------------------------------------------------------- all scripts

def stop_in_second_epoch():
    add_example()
    add_step = TrainState.add_step

    def add_step_and_stop(self, *args):
        add_step(self, *args)
        if self.step == 20:                 # of 12 an epoch
            signal.raise_signal(signal.SIGTERM)
    TrainState.add_step = add_step_and_stop


@pytest.mark.parametrize(("name", "flags", "K"), [("sign", ("--k", "256"), 256), ("fsq", ("--levels", "7,6,5"), 210)])
def test_quantizer_passes_through_all_scripts(name, flags, K, mnist_folder, tmp_path):
    def run(script, *words, prepare=add_example, status=0):
        result = run_script(script, *words, cwd=tmp_path, prepare=prepare)
        assert result.returncode == status, result.stderr
        return result

    train = ("VQ-VAE.py", "--quantizer", name, *flags, "--hidden-size", 16, "--batch-size", 50, "--lr", 4e-3,
             "--num-epochs", 2, "--output-folder", "run", "--data-folder", mnist_folder)
    assert "Not logged" not in run(*train).stderr
    folder = tmp_path / "models" / "run"
    uninterrupted = torch.load(folder / "last.pt", weights_only=True)
    assert uninterrupted["config"] == {
        "channels": 1, "hidden_size": 16, "num_codes": K, "downsample": 4, "quantizer": name,
        **({"levels": "7,6,5"} if name == "fsq" else {})}
    assert (tmp_path / "logs" / "run" / "00002" / "codebook" / "tensors.tsv").is_file()
    assert [line.split()[-2] for line in (folder / "track.txt").read_text().splitlines()] == ["restarts", "0", "0"]

    run(*train, "--overwrite", prepare=stop_in_second_epoch, status=128 + signal.SIGTERM)
    assert torch.load(folder / "last.pt", weights_only=True)["step"] == 20
    run("VQ-VAE.py", "--resume", "--output-folder", "run")
    resumed = torch.load(folder / "last.pt", weights_only=True)
    assert resumed["step"] == uninterrupted["step"] == 22 and all(
        torch.equal(value, resumed["model"][key]) for key, value in uninterrupted["model"].items())

    model, digits = ("--model", "models/run/best.pt"), ("--data-folder", mnist_folder)
    run("train_prior.py", *model, "--layers", 1, "--width", 8, "--heads", 1, "--num-epochs", 1, "--batch-size", 50,
        "--shift", 0, *digits)
    for what, more in (("prior", ()), ("random", ()), ("test", digits)):
        run("generate.py", *model, "--input", what, "--filename", what, *more)
        assert (tmp_path / "generatedImages" / f"{what}.png").is_file()
    run("evaluate.py", *model, "--json", "out.json", *digits)
    run("codes.py", *model, "--part", "test", "--output", "codes.npz", *digits)
    run("codes.py", *model, "--decode", "codes.npz", "--output", "images.npz")
    loaded, _ = checkpoint.load_model(folder / "best.pt")
    with torch.no_grad():
        output = loaded(data.to_model_range(data.load("MNIST", mnist_folder)[1].images))
    measured = json.loads((tmp_path / "out.json").read_text())
    assert (measured["codes"], measured["codes_used"]) == (K, len(output.indices.unique()))
    with np.load(tmp_path / "codes.npz") as codes, np.load(tmp_path / "images.npz") as images:
        assert np.array_equal(codes["indices"], output.indices.numpy())
        assert np.abs(images["images"] - (output.reconstruction.numpy() + 1) * 127.5).max() <= 1


def test_model_of_a_quantizer_that_is_not_there_names_it(tmp_path):
    contents = checkpoint.load(checkpoint.PRETRAINED)
    contents["config"]["quantizer"] = "of a colleague"
    path = tmp_path / "model.pt"
    checkpoint.save(path, {name: value for name, value in contents.items() if name not in ("path", "sha256")})
    with pytest.raises(ValueError, match=r"its quantizer 'of a colleague' is not in .*, which has vq, fsq.*: add"):
        checkpoint.load_model(path)
