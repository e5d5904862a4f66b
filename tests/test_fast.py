"""What makes a training faster changes nothing else: freed memory that is kept, --amp and --compile."""

import ctypes
import json
import os
import shutil
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import import_script, refuse, run_command, run_script
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import data
import fast
from modules import in_usual_layout
from prior import CodePrior
from vector_quantizer import VectorQuantizer

pytestmark = pytest.mark.rounding

SMALL = ["--dataset", "MNIST-10k", "--hidden-size", "8", "--k", "256", "--batch-size", "16",
         "--codebook-update", "ema", "--restart-after", "2"]
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("g++") or shutil.which("clang++")) or os.environ.get("ATEN_CPU_CAPABILITY") == "default",
    reason="no C++ compiler, or torch writes code for instructions that it was told not to use")


def ten_steps(folder, *flags):
    """The losses (10, 4) of the first ten steps of VQ-VAE.py, and its run."""
    script = import_script("VQ-VAE.py")
    run = script.Run(script.get_parser().parse_args([*SMALL, *flags]))
    with SummaryWriter(folder) as writer:
        for _, _ in zip(range(10), run.take_steps(writer, tqdm(disable=True))):
            pass
    return run.progress.waiting.clone(), run


@needs_a_compiler
def test_a_compiled_step_is_the_eager_one_quantizer_and_all(tmp_path, capsys):
    """From the same state; where a latent between two codes has gone to the other one, the next step is looked at."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    _, eager = ten_steps(tmp_path)
    script = import_script("VQ-VAE.py")
    compiled = script.Run(script.get_parser().parse_args([*SMALL, "--compile"]))
    compiled.model.train()
    for images, _ in eager.train_batches:
        x = data.to_model_range(images)
        compiled.model.load_state_dict(eager.model.state_dict())
        compiled.model.quantizer.known_initialised = True
        compiled.progress.restarts.copy_(eager.progress.restarts)
        results = []
        for run, step in ((eager, eager.eager), (compiled, compiled.compiled)):
            torch.manual_seed(1)
            losses, indices = step(x)
            run.optimizer.zero_grad()
            losses.total.backward()
            gradients = {name: value.grad for name, value in run.model.named_parameters() if value.requires_grad}
            results.append((losses, gradients, run.model.state_dict(), indices))
        (expected, gradients, reference, indices), (losses, found, state, chosen) = results
        moved = (indices != chosen).sum()
        assert moved <= 2
        if not moved and (eager.model.quantizer.restarts > 0):
            break
        eager.optimizer.step()
    else:
        raise AssertionError("in every step a latent has changed sides")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and "--compile" not in capsys.readouterr().err
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=0)
    largest = max(gradient.abs().max().item() for gradient in gradients.values())
    torch.testing.assert_close(found, gradients, rtol=1e-3, atol=1e-4 * largest)
    assert list(state) == list(reference)               # torch.compile puts a prefix before names of its own
    torch.testing.assert_close(state, reference, rtol=1e-3, atol=1e-4)
    assert compiled.progress.restarts == eager.progress.restarts > 0


def use_no_compiler():
    import torch._inductor.config as config

    config.cpp.cxx = ("none",)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.getcwd()


def test_without_a_compiler_the_training_goes_on_and_says_so_once(mnist_folder, tmp_path):
    done = run_script("VQ-VAE.py", "--data-folder", mnist_folder, "--hidden-size", 2, "--k", 4, "--batch-size", 200,
                      "--num-epochs", 1, "--compile", cwd=tmp_path, prepare=use_no_compiler)
    assert done.returncode == 0, done.stderr
    said, = [line for line in done.stderr.splitlines() if "--compile" in line]
    assert "ompiler" in said and "goes on without" in said and "Traceback" not in done.stderr
    assert json.loads((tmp_path / "models" / "vqvae" / "args.json").read_text())["compile"] is True


def test_amp_leaves_the_quantizer_in_float32():
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


def test_an_amp_step_is_close_to_the_float32_one():
    script, found = import_script("VQ-VAE.py"), []
    for flags in ((), ("--amp",)):
        run = script.Run(script.get_parser().parse_args([*SMALL, *flags]))
        found.append(run.eager(run.shown[:16])[0])
    expected, losses = torch.stack(found[0]), torch.stack(found[1])
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses, expected, rtol=0.02, atol=0)
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


# ---------------------------------------------------------------- whether bfloat16 helps

@pytest.mark.parametrize(("features", "variables", "support"), [
    ({"amx_bf16": True}, {}, True), ({"avx512_bf16": True}, {}, True), ({"avx2": True, "amx_bf16": False}, {}, None),
    ({"amx_bf16": True}, {"ONEDNN_MAX_CPU_ISA": "AVX2"}, None)])
def test_units_that_torch_knows_of_need_no_measuring(features, variables, support, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: features, raising=False)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert fast.bfloat16_support("cpu") is support
    monkeypatch.setattr(fast, "step_seconds", lambda *_: (2.0, 1.0))
    assert ("since a small step took" in fast.choose_bfloat16(None, "cpu")[1]) == (support is None)


@pytest.mark.parametrize(("capability", "support"), [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_older_gpus_have_no_bfloat16_units(capability, support, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    chosen, line = fast.choose_bfloat16(None, "cuda")
    assert chosen is support and line.startswith("--amp: ") and ("float32" in line) != support


def test_both_kinds_of_steps_are_timed_and_draw_no_random_numbers():
    seen, state = [], torch.get_rng_state()

    def step():
        torch.rand(1)
        seen.append(torch.is_autocast_enabled("cpu"))
        time.sleep(0.02 if seen[-1] else 0.001)
        return torch.ones(1, requires_grad=True).sum()

    float32, bfloat16 = fast.step_seconds(step, "cpu", seconds=0.1)
    assert float32 >= 0.001 and bfloat16 >= 0.02 and seen[:2] == [False, True] and len(seen) % 2 == 0
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("script", ["VQ-VAE.py", "train_prior.py"])
def test_amp_is_used_where_it_helps_alone_and_a_run_keeps_what_it_had(script, trained, mnist_folder, tmp_path,
                                                                       monkeypatch, capsys):
    flags = {"VQ-VAE.py": ["--output-folder", "run", "--hidden-size", "4", "--k", "8"],
             "train_prior.py": ["--model", "models/run/best.pt", "--shift", "0", "--layers", "1", "--width", "8",
                                "--heads", "1"]}[script]
    last = Path("models", "run", {"VQ-VAE.py": "last.pt", "train_prior.py": "prior-last.pt"}[script])
    main, learned = import_script(script).main, {}
    monkeypatch.setattr(fast, "bfloat16_support", lambda _: None)
    for name, bfloat16_seconds in (("plain", 0), ("faster", 1.0), ("slower", 2.0)):
        (tmp_path / name / "models" / "run").mkdir(parents=True)
        if script == "train_prior.py":
            shutil.copy(trained / "models" / "run" / "best.pt", tmp_path / name / "models" / "run")
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setattr(fast, "step_seconds",
                            lambda step, _, slow=bfloat16_seconds: step().backward() or (1.5, slow))
        main([*flags, "--dataset", "MNIST", "--data-folder", str(mnist_folder), "--batch-size", "300",
              "--num-epochs", "1", *["--amp"] * (name != "plain")])
        said, line = capsys.readouterr().out, "--amp: training in {}, since a small step took"
        assert said.count(line.format("bfloat16")) == (name == "faster")
        assert said.count(line.format("float32")) == (name == "slower")
        learned[name] = torch.load(last, weights_only=True)
        assert learned[name]["training"]["bfloat16"] is (name == "faster")
        if name != "plain":     # on a machine where it would be otherwise, the run goes on as it began
            monkeypatch.setattr(fast, "step_seconds", lambda *_: 1 / 0)
            main(["--resume", *flags[:2], "--num-epochs", "2", "--amp"])
            training = torch.load(last, weights_only=True)["training"]
            assert training["bfloat16"] is (name == "faster") and training["settings"]["amp"] is True
            said = capsys.readouterr().out
            assert f"--amp: the run goes on in {'bfloat16' if name == 'faster' else 'float32'}, as it began" in said
            learned[f"{name}, resumed"] = torch.load(last, weights_only=True)
    if script == "VQ-VAE.py":           # bit for bit as without a break, in bfloat16 too
        monkeypatch.setattr(fast, "step_seconds", lambda *_: (1.5, 1.0))
        main([*flags, "--data-folder", str(mnist_folder), "--batch-size", "300", "--num-epochs", "2", "--amp",
              "--overwrite"])
        whole, resumed = torch.load(last, weights_only=True)["model"], learned["faster, resumed"]["model"]
        assert all(torch.equal(value, resumed[name]) for name, value in whole.items())
    plain, faster, slower = (learned[name]["model"] for name in ("plain", "faster", "slower"))
    assert all(torch.equal(value, slower[name]) for name, value in plain.items())
    assert not all(torch.equal(value, faster[name]) for name, value in plain.items())


def test_amp_leaves_the_priors_attention_and_loss_in_float32(monkeypatch):
    def attention(*given, **flags):
        seen.extend(tensor.dtype for tensor in given)
        return usual(*given, **flags)

    usual, seen = F.scaled_dot_product_attention, []
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=2, embedding=32, heads=2).eval()
    maps, labels = torch.randint(16, (8, 4, 4)), torch.arange(8)
    expected = prior.log_prob(maps, labels)
    with torch.autocast("cpu", torch.bfloat16):
        log_prob = prior.log_prob(maps, labels)
    assert set(seen) == {log_prob.dtype} == {torch.float32} and not torch.equal(log_prob, expected)
    torch.testing.assert_close(log_prob, expected, rtol=2e-3, atol=0)


def test_a_run_goes_on_with_the_amp_that_it_had(trained, tmp_path, monkeypatch, capsys):
    shutil.copytree(trained / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    flags = ["--resume", "--output-folder", "run", "--num-epochs", "9", "--amp"]
    assert "--amp True contradicts the run, which" in refuse("VQ-VAE.py", flags, capsys)


@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's own")
def test_kept_memory_is_not_fetched_anew():
    program = """
import resource, torch, fast
def faults():
    for _ in range(23):
        if _ == 3:
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        tensors = [torch.ones(2**n) for n in (21, 20, 22, 21, 18, 21)]
        del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults())
fast.keep_freed_memory()
print(faults())
"""
    # glibc's own default, said aloud: else it moves its thresholds by itself, at times to where nothing is left.
    done = run_command(sys.executable, "-c", program, MALLOC_TRIM_THRESHOLD_="131072")
    usual, kept = map(int, done.stdout.split())
    assert kept < usual / 10


def test_a_run_that_goes_on_compiles_the_steps_that_an_unbroken_one_does(tmp_path):
    _, run = ten_steps(tmp_path)
    run.save(tmp_path / "last.pt")
    script, (_, saved) = import_script("VQ-VAE.py"), checkpoint.load_model(tmp_path / "last.pt")
    again, compiled = script.Run(run.args, saved), []
    again.go_on(saved)
    again.compiled = lambda x: compiled.append(len(x)) or again.losses_of(x)
    with SummaryWriter(tmp_path) as writer:
        for _, _ in zip(range(2), again.take_steps(writer, tqdm(disable=True))):
            pass
    assert compiled == [16, 16]


class OnMPS(torch.Tensor):
    """A tensor that says it is on an Apple GPU."""

    device = torch.device("mps")


def test_batch_norm_sees_the_usual_layout_alone_on_mps_forward_and_backward():
    values = torch.randn(2, 3, 4, 5)
    for kind, contiguous in ((torch.Tensor, False), (OnMPS, True)):
        x = values.to(memory_format=torch.channels_last).as_subclass(kind).requires_grad_()
        seen = []
        x.register_hook(lambda gradient, seen=seen: seen.append(gradient.as_subclass(torch.Tensor)))
        y = in_usual_layout(x)
        assert torch.equal(y.as_subclass(torch.Tensor), values) and y.is_contiguous() == contiguous
        gradient = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        y.backward(gradient)
        assert torch.equal(seen[0], gradient) and seen[0].is_contiguous() == contiguous
    assert fast.layout("mps") == torch.contiguous_format and fast.layout("cpu") == torch.channels_last


def test_a_prior_works_in_float64_too():
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=2, embedding=32, heads=2).eval()
    maps = torch.randint(16, (8, 4, 4))
    torch.testing.assert_close(prior.log_prob(maps).double(), prior.double().log_prob(maps).double())


def test_where_torch_compiles_nothing_the_function_runs_as_it_is(monkeypatch):
    said = []
    monkeypatch.setattr(torch, "compile", mock.Mock(side_effect=RuntimeError("not in this version\nof Python")))
    assert fast.compiled(torch.neg, said.append) is torch.neg and said == ["not in this version"]
    assert fast.first_line(IndexError()) == "IndexError"
    assert fast.first_line(ValueError("it raised:\n  Compiler: none\nmore")) == "it raised: Compiler: none"


@needs_a_compiler
def test_the_priors_compiled_loss_is_the_eager_one():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    torch.manual_seed(0)
    prior = CodePrior(16, 4, 4, layers=1, embedding=16, heads=2, dropout=0.1, num_shifts=9)
    maps, labels, shifts = torch.randint(16, (8, 4, 4)), torch.arange(8), torch.arange(8)
    results, said = [], []
    for log_prob in (prior.log_prob, fast.compiled(prior.log_prob, said.append)):
        torch.manual_seed(1)
        results.append(log_prob(maps, labels, shifts))
    torch.testing.assert_close(*results)
    assert not said and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
