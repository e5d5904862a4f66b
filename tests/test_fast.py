"""What makes a training faster changes nothing else: freed memory that is kept, --amp and --compile."""

import json
import os
import shutil
import subprocess
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, import_script, refuse
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import checkpoint
import fast
from modules import in_usual_layout
from prior import CodePrior
from vector_quantizer import VectorQuantizer

SMALL = ["--dataset", "MNIST-10k", "--hidden-size", "8", "--k", "256", "--batch-size", "16",
         "--codebook-update", "ema", "--restart-after", "2"]
needs_a_compiler = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("clang++")), reason="no C++ compiler")


def ten_steps(folder, *flags):
    """The losses (10, 4) of the first ten steps of VQ-VAE.py, and its run."""
    script = import_script("VQ-VAE.py")
    run = script.Run(script.get_parser().parse_args([*SMALL, *flags]))
    with SummaryWriter(folder) as writer:
        for _, _ in zip(range(10), run.take_steps(writer, tqdm(disable=True))):
            pass
    return run.progress.waiting.clone(), run


@needs_a_compiler
def test_compiled_steps_are_the_eager_ones_quantizer_and_all(tmp_path, capsys):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    (expected, eager), (losses, compiled) = ten_steps(tmp_path), ten_steps(tmp_path, "--compile")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1 and "--compile" not in capsys.readouterr().err
    torch.testing.assert_close(losses, expected, rtol=1e-3, atol=0)
    assert compiled.progress.restarts == eager.progress.restarts > 0
    state, reference = compiled.model.state_dict(), eager.model.state_dict()
    assert list(state) == list(reference)               # torch.compile puts a prefix before names of its own
    for name in ("quantizer.steps_unused", "quantizer.cluster_sizes", "quantizer.codebook"):
        torch.testing.assert_close(state[name], reference[name], rtol=1e-3, atol=1e-4)


def test_without_a_compiler_the_training_goes_on_and_says_so_once(tmp_path):
    command = [sys.executable, ROOT / "VQ-VAE.py", "--dataset", "MNIST-10k", "--hidden-size", "2", "--k", "4",
               "--batch-size", "2250", "--num-epochs", "1", "--compile"]
    nothing_compiled = os.environ | {"CXX": "none", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, env=nothing_compiled)
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


def test_amp_steps_are_close_to_the_float32_ones(tmp_path):
    (expected, _), (losses, run) = ten_steps(tmp_path), ten_steps(tmp_path, "--amp")
    assert not torch.equal(losses, expected)
    torch.testing.assert_close(losses[0], expected[0], rtol=0.02, atol=0)
    torch.testing.assert_close(losses[:, 0], expected[:, 0], rtol=0.05, atol=0)         # reconstruction
    assert {parameter.dtype for parameter in run.model.parameters()} == {torch.float32}


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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's own")
def test_kept_memory_is_not_fetched_anew():
    def faults(*first):
        program = "\n".join(["import resource, torch", *first, "def step():",
                             "    return [torch.ones(2**n) for n in (21, 20, 22, 21, 18, 21)]",
                             "for _ in range(3): step()",
                             "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt",
                             "for _ in range(20): step()",
                             "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"])
        # glibc's own default, said aloud: else it moves its thresholds by itself, at times to where nothing is left.
        stiff = os.environ | {"MALLOC_TRIM_THRESHOLD_": "131072"}
        return int(subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=stiff, capture_output=True,
                                  check=True).stdout)

    assert faults("import fast", "fast.keep_freed_memory()") < faults() / 10


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
