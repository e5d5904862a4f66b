"""utils/speed.py and the flags --amp and --compile: they change the speed of training, and only that."""

import contextlib
import ctypes
import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import build_trainer, expect_usage_error, import_script, run_command, run_script
from torch.utils.tensorboard import SummaryWriter

import checkpoint
import data
from modules import contiguous_on_mps
from prior import CodePrior
from utils import speed
from utils.trainer import Trainer
from vector_quantizer import VectorQuantizer

SMALL_FLAGS = ["--dataset", "MNIST-10k", "--hidden-size", "8", "--k", "256", "--batch-size", "16",
               "--codebook-update", "ema", "--restart-after", "2"]
needs_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="no C++ compiler, or torch.compile ignores the limit on vector instructions")


class StopTraining(Exception):
    pass


class ShortTrainer(Trainer):
    """Stops after num_steps, and keeps the eager and the accelerated forward function."""

    def epochs(self):
        return super().epochs() if self.num_steps else iter(())

    def accelerate(self, forward, compile_if):
        self.eager, self.forward = forward, super().accelerate(forward, compile_if)
        return self.forward

    def after_step(self, *args):
        super().after_step(*args)
        if self.state.step == self.num_steps:
            raise StopTraining


def train_steps(folder, *flags, num_steps=10, saved=None):
    """Train for num_steps, from the checkpoint `saved` if given. → trainer, batches"""
    script, trainer, batches = build_trainer(folder, *SMALL_FLAGS, *flags, trainer_class=ShortTrainer, saved=saved)
    if saved:
        trainer.load_state(saved)
    trainer.num_steps, trainer.signals = num_steps, SimpleNamespace(agreed=lambda: None)
    with SummaryWriter(folder / "logs") as trainer.writer, contextlib.suppress(StopTraining):
        script.train(trainer, batches)
    return trainer, batches


@pytest.mark.rounding
@needs_compiler
def test_compiled_step_matches_eager_step(tmp_path, capsys):
    """One step from the same state. If a latent has rounded to another code, the next step is compared instead."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    eager, batches = train_steps(tmp_path)
    compiled, _ = train_steps(tmp_path, "--compile", num_steps=0)
    compiled.state.step = eager.state.step          # as in a resumed run: the first step is never compiled
    compiled.model.train()
    for images, _ in batches.train:
        x = data.to_model_range(images)
        compiled.model.load_state_dict(eager.model.state_dict())
        compiled.state.restarts.copy_(eager.state.restarts)
        results = []
        for trainer in (eager, compiled):
            torch.manual_seed(1)
            losses, indices = trainer.forward(x)
            trainer.optimizer.zero_grad()
            losses.total.backward()
            gradients = {name: value.grad for name, value in trainer.model.named_parameters() if value.requires_grad}
            results.append((losses, gradients, trainer.model.state_dict(), indices))
        (expected, gradients, expected_state, indices), (losses, actual_gradients, state, compiled_indices) = results
        num_changed = (indices != compiled_indices).sum()
        assert num_changed <= 2
        if not num_changed and (eager.model.quantizer.restarts > 0):
            break
        eager.optimizer.step()
    else:
        raise AssertionError("in every step a latent rounded to another code")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and "--compile" not in capsys.readouterr().err
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    torch.testing.assert_close(actual_gradients, gradients, rtol=1e-3, atol=1e-4 * largest)
    assert list(state) == list(expected_state)               # no _orig_mod. prefix
    torch.testing.assert_close(state, expected_state, rtol=1e-3, atol=1e-4)
    assert compiled.state.restarts == eager.state.restarts > 0


def hide_compiler():
    import torch._inductor.config as config

    config.cpp.cxx = ("none",)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.getcwd()


def test_training_continues_without_a_compiler_and_warns_once(mnist_folder, tmp_path):
    result = run_script("VQ-VAE.py", "--data-folder", mnist_folder, "--hidden-size", 2, "--k", 4, "--batch-size", 200,
                        "--num-epochs", 1, "--compile", cwd=tmp_path, prepare=hide_compiler)
    assert result.returncode == 0, result.stderr
    line, = [line for line in result.stderr.splitlines() if "--compile" in line]
    assert "ompiler" in line and "continuing without torch.compile" in line and "Traceback" not in result.stderr
    assert json.loads((tmp_path / "models" / "vqvae" / "args.json").read_text())["compile"] is True


@pytest.mark.rounding
def test_amp_keeps_the_quantizer_in_float32():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(64, 8, codebook_update="ema", codebook_init="uniform")
    quantizer.codebook.data.normal_()
    codebook, z_e = quantizer.codebook.clone(), torch.randn(4, 8, 5, 5).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        quantized = quantizer(z_e)
    distances = (z_e.double().permute(0, 2, 3, 1).unsqueeze(-2) - codebook.double()).square().sum(dim=-1)
    assert torch.equal(quantized.indices, distances.argmin(dim=-1))
    assert {quantized.z_q.dtype, quantized.codebook_loss.dtype, quantized.commitment_loss.dtype} == {torch.float32}
    assert torch.equal(quantized.z_q, codebook[quantized.indices].permute(0, 3, 1, 2))
    expected = distances.min(dim=-1).values.mean() / 8
    torch.testing.assert_close(quantized.commitment_loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.rounding
def test_amp_step_is_close_to_float32_step(tmp_path):
    results = []
    for flags in ((), ("--amp",)):
        trainer, batches = train_steps(tmp_path, *flags, num_steps=0)
        results.append(trainer.eager(data.to_model_range(batches.shown[:16]))[0])
    expected, losses = torch.stack(results[0]), torch.stack(results[1])
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert {parameter.dtype for parameter in trainer.model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- choice of bfloat16

@pytest.mark.parametrize(("features", "variables", "support"), [
    ({"amx_bf16": True}, {}, True), ({"avx512_bf16": True}, {}, True), ({"avx2": True, "amx_bf16": False}, {}, None),
    ({"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None)])
def test_known_bfloat16_support_needs_no_measurement(features, variables, support, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert speed.bfloat16_support("cpu") is support
    monkeypatch.setattr(speed, "measure_step_seconds", lambda *_: (2.0, 1.0))
    assert ("since a small step took" in speed.choose_bfloat16(None, "cpu")[1]) == (support is None)


@pytest.mark.parametrize(("capability", "support"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_bfloat16_support_follows_gpu_capability(capability, support, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    bfloat16, line = speed.choose_bfloat16(None, "cuda")
    assert bfloat16 is support and line.startswith("--amp: ") and ("float32" in line) != support


def test_step_timing_measures_both_dtypes_and_keeps_rng_state():
    recorded, state = [], torch.get_rng_state()

    def step():
        torch.rand(1)
        recorded.append(torch.is_autocast_enabled("cpu"))
        warm_up = 0.1 if len(recorded) <= 2 else 0
        time.sleep(warm_up + (0.02 if recorded[-1] else 0.001))
        return torch.ones(1, requires_grad=True).sum()

    float32, bfloat16 = speed.measure_step_seconds(step, "cpu", seconds=0.01)
    assert 0.001 <= float32 < 0.1 and bfloat16 >= 0.02
    assert recorded == [False, True] * speed.MIN_ROUNDS
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("script", ["VQ-VAE.py", "train_prior.py"])
def test_amp_is_used_only_if_faster_and_kept_on_resume(script, trained, mnist_folder, tmp_path,
                                                                       monkeypatch, capsys):
    flags = {"VQ-VAE.py": ["--output-folder", "run", "--hidden-size", "4", "--k", "8"],
             "train_prior.py": ["--model", "models/run/best.pt", "--shift", "0", "--layers", "1", "--width", "8",
                                "--heads", "1"]}[script]
    last = Path("models", "run", {"VQ-VAE.py": "last.pt", "train_prior.py": "prior-last.pt"}[script])
    main, checkpoints = import_script(script).main, {}
    monkeypatch.setattr(speed, "bfloat16_support", lambda _: None)
    for name, bfloat16_seconds in (("plain", 0), ("faster", 1.0), ("slower", 2.0)):
        (tmp_path / name / "models" / "run").mkdir(parents=True)
        if script == "train_prior.py":
            shutil.copy(trained / "models" / "run" / "best.pt", tmp_path / name / "models" / "run")
        monkeypatch.chdir(tmp_path / name)
        seconds = {False: 1.5, True: bfloat16_seconds}
        monkeypatch.setattr(speed, "measure_step_seconds", lambda step, _, dtypes=(False, True), times=seconds, **__:
                            step().backward() or [times[dtype] for dtype in dtypes])
        main([*flags, "--dataset", "MNIST", "--data-folder", str(mnist_folder), "--batch-size", "300",
              "--num-epochs", "1", *["--amp"] * (name != "plain")])
        output, line = capsys.readouterr().out, "--amp: training in {}, since a small step took"
        assert output.count(line.format("bfloat16")) == (name == "faster")
        assert output.count(line.format("float32")) == (name == "slower")
        checkpoints[name] = torch.load(last, weights_only=True)
        assert checkpoints[name]["training"]["bfloat16"] is (name == "faster")
        if name != "plain":     # a resumed run does not measure again
            with monkeypatch.context() as patch:
                patch.setattr(speed, "choose_bfloat16", lambda *_: 1 / 0)
                main(["--resume", *flags[:2], "--num-epochs", "2", "--amp"])
            training = torch.load(last, weights_only=True)["training"]
            assert training["bfloat16"] is (name == "faster") and training["settings"]["amp"] is True
            output = capsys.readouterr().out
            assert f"--amp: the run continues in {'bfloat16' if name == 'faster' else 'float32'}, as it began" in output
            checkpoints[f"{name}, resumed"] = torch.load(last, weights_only=True)
    if script == "VQ-VAE.py":           # resuming is bit for bit in bfloat16 too
        monkeypatch.setattr(speed, "measure_step_seconds", lambda *_: (1.5, 1.0))
        main([*flags, "--data-folder", str(mnist_folder), "--batch-size", "300", "--num-epochs", "2", "--amp",
              "--overwrite"])
        uninterrupted, resumed = torch.load(last, weights_only=True)["model"], checkpoints["faster, resumed"]["model"]
        assert all(torch.equal(value, resumed[name]) for name, value in uninterrupted.items())
    plain, faster, slower = (checkpoints[name]["model"] for name in ("plain", "faster", "slower"))
    assert all(torch.equal(value, slower[name]) for name, value in plain.items())
    assert not all(torch.equal(value, faster[name]) for name, value in plain.items())


@pytest.mark.rounding
def test_amp_keeps_prior_attention_and_loss_in_float32(monkeypatch):
    def attention(*args, **flags):
        recorded.extend(tensor.dtype for tensor in args)
        return original(*args, **flags)

    original, recorded = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=2, embedding=32, heads=2).eval()
    maps, labels = torch.randint(16, (8, 4, 4)), torch.arange(8)
    expected = prior.log_prob(maps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = prior.log_prob(maps, labels)
    assert set(recorded) == {log_prob.dtype} == {torch.float32} and not torch.equal(log_prob, expected)
    torch.testing.assert_close(log_prob, expected, rtol=2e-3, atol=0)


def test_resume_rejects_a_changed_amp_flag(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    flags = ["--resume", "--output-folder", "run", "--num-epochs", "9", "--amp"]
    assert "--amp True contradicts the run, which" in expect_usage_error("VQ-VAE.py", flags, capsys)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_keep_freed_memory_avoids_page_faults():
    program = """
import resource, torch
from utils import speed
def page_faults():
    for _ in range(23):
        if _ == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**n) for n in (21, 20, 22, 21, 18, 21)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(page_faults())
speed.keep_freed_memory()
print(page_faults())
"""
    # An explicit value (the default) keeps glibc from adapting its thresholds during the test.
    result = run_command(sys.executable, "-c", program, MALLOC_TRIM_THRESHOLD_="131072")
    default, retained = map(int, result.stdout.split())
    assert retained < default / 10


def test_resumed_run_compiles_the_same_steps(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(speed, "compile_step", lambda forward, _: lambda x: compiled.append(len(x)) or forward(x))
    trainer, _ = train_steps(tmp_path, "--compile")
    assert compiled == [16] * 9             # the first step, in which a quantizer may initialise itself, is eager
    with SummaryWriter(tmp_path) as trainer.writer:
        trainer.save_checkpoint()
    _, saved = checkpoint.load_model(tmp_path / "last.pt")
    train_steps(tmp_path, "--compile", num_steps=12, saved=saved)
    assert compiled == [16] * 11


class FakeMPSTensor(torch.Tensor):
    """A CPU tensor that claims to be on an Apple GPU."""

    device = torch.device("mps")


def test_batch_norm_gets_contiguous_tensors_on_mps():
    values = torch.randn(2, 3, 4, 5)
    for tensor_class, contiguous in ((torch.Tensor, False), (FakeMPSTensor, True)):
        x = values.to(memory_format=torch.channels_last).as_subclass(tensor_class).requires_grad_()
        recorded = []
        x.register_hook(lambda gradient, recorded=recorded: recorded.append(gradient.as_subclass(torch.Tensor)))
        y = contiguous_on_mps(x)
        assert torch.equal(y.as_subclass(torch.Tensor), values) and y.is_contiguous() == contiguous
        gradient = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        y.backward(gradient)
        assert torch.equal(recorded[0], gradient) and recorded[0].is_contiguous() == contiguous
    assert speed.memory_format("mps") == torch.contiguous_format and speed.memory_format("cpu") == torch.channels_last


@pytest.mark.rounding
def test_prior_works_in_float64():
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=2, embedding=32, heads=2).eval()
    maps = torch.randint(16, (8, 4, 4))
    torch.testing.assert_close(prior.log_prob(maps).double(), prior.double().log_prob(maps).double())


def test_failing_torch_compile_falls_back_to_eager(monkeypatch):
    messages = []
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("not in this version\nof Python")))
    assert speed.compile_step(torch.neg, messages.append) is torch.neg and messages == ["not in this version"]
    assert speed.first_line(IndexError()) == "IndexError"
    assert speed.first_line(ValueError("it raised:\n  Compiler: none\nmore")) == "it raised: Compiler: none"


@pytest.mark.rounding
@needs_compiler
def test_compiled_prior_loss_matches_eager_loss():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=1, embedding=16, heads=2, dropout=0.1, num_shifts=9)
    maps, labels, shifts = torch.randint(16, (8, 4, 4)), torch.arange(8), torch.arange(8)
    results, messages = [], []
    for log_prob in (prior.log_prob, speed.compile_step(prior.log_prob, messages.append)):
        torch.manual_seed(1)
        results.append(log_prob(maps, labels, shifts))
    torch.testing.assert_close(*results)
    assert not messages and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
