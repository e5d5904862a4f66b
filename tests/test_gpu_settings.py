"""Which GPU is used and how it is set up, on a machine without one: torch's own functions are replaced."""

import shutil

import pytest
import torch
from helpers import import_script
from torch import nn

import checkpoint
from prior import CodePrior
from utils import inputs, memory, speed, train_state


@pytest.fixture
def gpus(monkeypatch):
    """Four GPUs, of which the first is the current one. → the calls of torch.cuda's functions, {name: arguments}."""
    calls = {}

    def record(name, result=None):
        monkeypatch.setattr(torch.cuda, name, lambda *arguments: (calls.update({name: arguments}), result)[1])

    for name, result in {"is_available": True, "is_initialized": True, "device_count": 4, "current_device": 0,
                         "get_rng_state": torch.tensor([7]), "set_rng_state": None, "set_device": None,
                         "synchronize": None}.items():
        record(name, result)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    return calls


@pytest.mark.parametrize("name, chosen", [("cuda:2", (2,)), ("cuda", None), ("auto", None)])
def test_named_gpu_becomes_the_current_one_and_convolves_in_float32(name, chosen, gpus):
    """"cuda" stays the current GPU, which use_own_gpu() chooses with several processes."""
    assert inputs.find_device(name) == name.replace("auto", "cuda")
    assert gpus.get("set_device") == chosen and not torch.backends.cudnn.allow_tf32


def test_steps_are_timed_on_the_gpu_that_they_use(gpus):
    speed.synchronize("cuda:2")
    assert gpus["synchronize"] == ("cuda:2",)


def test_random_state_is_that_of_the_gpu_in_use(gpus, monkeypatch):
    states = train_state.random_states()
    assert states["cuda"] == [torch.tensor([7])]
    train_state.restore_random_states(states)
    assert gpus["set_rng_state"] == (torch.tensor([7]),)
    # Older files have the states of all GPUs, in their order.
    states["cuda"] = [torch.tensor([index]) for index in range(3)]
    for current, expected in ((1, 1), (3, 0)):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        train_state.restore_random_states(states)
        assert gpus["set_rng_state"] == (torch.tensor([expected]),)


def test_failing_gpu_is_not_taken_for_a_damaged_file(monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(nn.Module, "to", fail)
    for load in (lambda: checkpoint.load_model(checkpoint.PRETRAINED, "cuda"),
                 lambda: checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, checkpoint.PRETRAINED)):
        with pytest.raises(torch.OutOfMemoryError):
            load()
    assert memory.is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"))


def test_prior_is_trained_with_deterministic_attention(trained, tmp_path, monkeypatch):
    """torch's attention has a deterministic backward pass only where a warning would not be enough."""
    modes, log_prob = {"forward": set(), "backward": set()}, CodePrior.log_prob

    def recording(self, *arguments):
        result = log_prob(self, *arguments)
        if self.training:
            modes["forward"].add(torch.is_deterministic_algorithms_warn_only_enabled())
            result.register_hook(lambda _: modes["backward"].add(
                torch.is_deterministic_algorithms_warn_only_enabled()))
        return result

    monkeypatch.setattr(CodePrior, "log_prob", recording)
    monkeypatch.setattr(speed, "measure_step_seconds", lambda *_, **__: [0.1])      # of steps that train nothing
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained / "models", "models")
    torch.use_deterministic_algorithms(True, warn_only=True)        # as on a GPU
    try:
        import_script("train_prior.py").main([
            "--model", "models/run/best.pt", "--dataset", "MNIST-10k", "--layers", "1", "--width", "16", "--heads", "2",
            "--num-epochs", "1", "--batch-size", "2000", "--shift", "0"])
        assert torch.is_deterministic_algorithms_warn_only_enabled()
    finally:
        torch.use_deterministic_algorithms(False)
    assert modes == {"forward": {False}, "backward": {False}}
