"""Tensors of a GPU that is not there: shapes, devices, and operations that would wait for their values.

Under FakeTensorMode an operation on tensors of two devices raises an error, and so does reading a value, as .item(), a
comparison in an if, or a result whose size depends on the values do. Only forward passes: the backward pass needs CUDA.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, build_trainer, import_script, run_script
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

import data
import metrics
from data import code_maps
from metrics import code_counts, copies, samples
from metrics.classifier import ARCHITECTURES
from modules import VectorQuantizedVAE, vqvae_losses
from prior import CodePrior
from utils import trainer as trainers
from utils.train_state import TrainState
from vector_quantizer import QUANTIZERS, kmeans

B, K = 8, 64


@pytest.fixture
def fake():
    """Within it all tensors are fake; those that exist cannot be used."""
    with FakeTensorMode(), torch.no_grad():
        yield


def on_gpu(module):
    """The module with fake parameters and buffers on a GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    if tensors is part._parameters:
                        tensors[name] = nn.Parameter(tensors[name], requires_grad=tensor.requires_grad)
    return module


def gpu(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="cuda")


# Made before the fixture, with real values: a new model is tried out.
def model(quantizer="vq", **settings):
    return VectorQuantizedVAE(1, 16, K, quantizer=quantizer, **settings)


MODELS = {"gradient": model(codebook_init="uniform"), "ema": model(codebook_init="uniform", codebook_update="ema"),
          "no restarts": model(codebook_init="uniform", restart_after=0), "fsq": model("fsq", levels="4,4,4")}
PRIOR = CodePrior(K, 7, 7, num_classes=10, layers=2, embedding=16, heads=2, dropout=0.1, num_shifts=9,
                  gated=True)
CLASSIFIERS = {name: build() for name, build in ARCHITECTURES.items()}


def test_models_of_every_quantizer_are_tried():
    assert {type(one.quantizer) for one in MODELS.values()} == set(QUANTIZERS.values())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("amp", [False, True])
def test_training_step_waits_for_nothing_and_stays_on_the_gpu(name, amp, fake, autocast_on_cuda):
    network, images = on_gpu(MODELS[name]).train(), gpu(B, 1, 28, 28, dtype=torch.uint8)
    x = data.to_model_range(images, "cuda")
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        output = network(x)
        losses = vqvae_losses(x, output, 0.25)
    assert output.reconstruction.dtype == (torch.bfloat16 if amp else torch.float32)
    for tensor in (*losses, *output, code_counts(output.indices, K)):
        assert tensor.device.type == "cuda"
    assert output.indices.shape == (B, 7, 7) and output.indices.dtype == torch.int64


@pytest.fixture
def autocast_on_cuda(monkeypatch):
    """torch.autocast("cuda") as on a machine with a GPU that has bfloat16 units."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)


@pytest.fixture
def trainer(tmp_path):
    _, trainer, _ = build_trainer(tmp_path, "--dataset", "MNIST-10k", "--hidden-size", 4, "--k", K)
    trainer.bar, trainer.epoch_start, trainer.signals = Bar(), 0.0, SimpleNamespace(agreed=lambda: None)
    return trainer


def test_counting_a_step_waits_once_in_ten(trainer, fake, monkeypatch):
    trainer.state = TrainState(order=torch.empty(0), sums=torch.empty(4, dtype=torch.float64),
                               pending_losses=gpu(10, 4), code_counts=gpu(K, dtype=torch.int64))
    copied, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(FakeTensor, "cpu", lambda tensor: copied.append(tuple(tensor.shape)) or cpu(tensor))
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: np.zeros(cpu_only(tensor).shape).tolist())
    for step in range(20):
        assert copied == [(10, 4)] * (step // 10)
        trainer.after_step([gpu()] * 4, gpu(K, dtype=torch.int64))


@pytest.mark.parametrize("name", MODELS)
def test_evaluation_encoding_and_decoding_stay_on_the_gpu(name, fake, monkeypatch):
    network = on_gpu(MODELS[name]).eval()
    x, images = gpu(B, 1, 28, 28), torch.empty(B, 1, 28, 28, dtype=torch.uint8)
    assert network.encode(x).device.type == "cuda"
    monkeypatch.setattr("modules.check_indices", lambda indices, _: cpu_only(indices).long())
    [decoded] = code_maps.decode_batches(network, torch.empty(B, 7, 7, dtype=torch.int16))
    assert decoded.device.type == "cuda" and decoded.shape == x.shape
    maps = code_maps.encode(network, [(images, None)], "cuda")
    assert maps.device.type == "cpu" and maps.dtype == code_maps.smallest_dtype(K)
    copied, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(FakeTensor, "cpu", lambda tensor: copied.append(tuple(tensor.shape)) or cpu(tensor))
    monkeypatch.setattr(FakeTensor, "tolist", lambda tensor: cpu_only(tensor) is not None and [0.0] * 4)
    _, counts = metrics.evaluate(network, [(images, None)] * 3, "cuda")
    assert copied == [(4,), (K,)] and counts.device.type == "cpu"   # once, after the last batch


def cpu_only(tensor):
    assert tensor.device.type == "cpu"
    return tensor


def test_kmeans_waits_for_nothing(fake):
    assert kmeans(gpu(400, 16), K).shape == (K, 16)


@pytest.mark.parametrize("amp", [False, True])
def test_step_of_the_prior_waits_for_nothing(amp, fake, autocast_on_cuda):
    prior, maps, labels = on_gpu(PRIOR).train(), gpu(B, 7, 7, dtype=torch.int16), gpu(B, dtype=torch.int64)
    with torch.autocast("cuda", torch.bfloat16, enabled=amp):
        loss = -prior.log_prob(maps, labels, labels).mean()
    assert loss.device.type == "cuda" and prior.log_prob(maps).shape == (B,)


def test_prior_checks_maps_and_labels_on_the_cpu_and_moves_them(fake, monkeypatch):
    prior = on_gpu(PRIOR).eval()
    monkeypatch.setattr(CodePrior, "_in_range", lambda _, values, size: cpu_only(values).shape and size in (11, K))
    maps, labels = torch.empty(B, 7, 7, dtype=torch.int16), torch.empty(B, dtype=torch.int64)
    assert prior.log_prob(maps, labels).device.type == "cuda"
    prior.calibrate(maps, labels, 4)


@pytest.mark.parametrize("settings", [{}, {"guidance": 2.0, "top_k": 5}, {"given": 9}])
def test_sampling_waits_once_a_batch(settings, fake, monkeypatch):
    """For one value, at the end: whether all probabilities were finite."""
    waits = []
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: waits.append(tensor.device.type) or True)
    monkeypatch.setattr(CodePrior, "_in_range", lambda _, values, size: cpu_only(values).shape and size in (11, K))
    if "given" in settings:
        settings = {"given": torch.empty(B, settings["given"], dtype=torch.uint8)}
    maps = on_gpu(PRIOR).eval().sample(torch.empty(B, dtype=torch.int64), generator=None, **settings)
    assert maps.shape == (B, 7, 7) and maps.device.type == "cuda" and waits == ["cuda"]
    given = settings.pop("given", None)
    maps = samples.sample_maps(PRIOR, torch.empty(B, dtype=torch.int64), settings, None, given=given)
    assert maps.device.type == "cpu" and waits == ["cuda"] * 2
    samples.sample_columns(PRIOR, 10, 60.0, None)
    assert waits == ["cuda"] * 3


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_classifier_stays_on_the_gpu(name, fake):
    network = on_gpu(CLASSIFIERS[name]).eval()
    predictions = samples.classify(network, [gpu(B, 1, 28, 28)] * 2, Bar())
    assert predictions.digits.device.type == "cpu" and predictions.features.shape[0] == 2 * B
    x = import_script("train_classifier.py").augment(gpu(B, 1, 28, 28))
    assert nn.functional.cross_entropy(network.train()(x), gpu(B, dtype=torch.int64)).device.type == "cuda"


@pytest.fixture
def maps_unchecked(monkeypatch):
    """Checks of indices find nothing wrong, and are made on the CPU."""
    monkeypatch.setattr("modules.check_indices", lambda indices, _: cpu_only(indices).long())
    monkeypatch.setattr(CodePrior, "_in_range", lambda _, values, size: cpu_only(values).shape and size in (11, K))


def test_noise_completions_and_reconstructions_of_generate_stay_on_the_gpu(fake, maps_unchecked, monkeypatch):
    script, network, prior = import_script("generate.py"), on_gpu(MODELS["ema"]).eval(), on_gpu(PRIOR).eval()
    images = torch.empty(2, 1, 28, 28, dtype=torch.uint8)
    args = script.get_parser().parse_args(["--input", "test", "--complete", "3"])
    args.device, waits = "cuda", []
    monkeypatch.setattr(FakeTensor, "__bool__", lambda tensor: waits.append(tensor.device.type) or True)
    assert samples.noise_maps(network, 3, 7, 7, None, "cuda").device.type == "cpu"
    reconstructions = script.reconstruct(network, images, args)
    assert reconstructions.device.type == "cpu" and reconstructions.shape == images.shape
    completed = script.complete(network, prior, 3, images, None, args)
    assert completed.device.type == "cpu" and len(completed) == 22 and waits == ["cuda"]


def test_nats_and_copies_are_computed_on_the_gpu(fake, maps_unchecked, monkeypatch):
    maps, labels = torch.empty(B, 7, 7, dtype=torch.int16), torch.empty(B, dtype=torch.int64)
    read, item = [], torch.Tensor.item
    monkeypatch.setattr(FakeTensor, "item", lambda tensor: read.append(tensor.device.type) or 0.0)
    metrics.nats_per_code(on_gpu(PRIOR), maps, labels)
    monkeypatch.setattr(FakeTensor, "item", item)
    images = torch.empty(20, 1, 28, 28, dtype=torch.uint8)
    nearest = copies.nearest_images(images[:3], [(images, None)], "cuda")
    assert read == ["cpu"] and nearest.distances.device.type == nearest.rows.device.type == "cpu"


class Bar:
    def update(self, _):
        pass

    def set_postfix(self, **_):
        pass


def test_images_on_the_gpu_are_indexed_there(fake, monkeypatch):
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.device.type) or tensor)
    images = data.Images(gpu(100, 1, 28, 28, dtype=torch.uint8), gpu(100, dtype=torch.int64))
    batch, labels = images.__getitems__([3, 5, 9])
    assert batch.device.type == labels.device.type == "cuda" and len(batch) == 3
    assert pinned == ["cpu"]                    # one copy of the indices, for which nothing waits


class Stop(Exception):
    """Raised by after_step() to end a training."""


class NothingIsReadBy(TorchDispatchMode):
    """An error where this script reads a tensor's value, by .item(), in an if or by nonzero(): a GPU would wait."""

    def __init__(self, script):
        super().__init__()
        self.script = str(ROOT / script)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if operation in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            frame = sys._getframe()
            while frame and (frame.f_code.co_filename == __file__ or not frame.f_code.co_filename.startswith(str(ROOT))
                             or "site-packages" in frame.f_code.co_filename):
                frame = frame.f_back
            assert frame is None or frame.f_code.co_filename != self.script, f"line {frame.f_lineno} reads a value"
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("code", ["x.item()", "float(x)", "assert x > 0", "x.nonzero()"])
def test_values_that_a_script_reads_are_noticed(code):
    read = compile(code, str(ROOT / "VQ-VAE.py"), "exec")
    with NothingIsReadBy("VQ-VAE.py"), pytest.raises(AssertionError, match="line 1 reads a value"):
        exec(read, {"x": torch.ones(())})


@pytest.mark.parametrize("name, flags", [
    ("VQ-VAE.py", ["--dataset", "MNIST-10k", "--hidden-size", "4", "--k", "16", "--output-folder", "other"]),
    ("train_prior.py", ["--model", "run/best.pt", "--layers", "1", "--width", "8", "--heads", "1"]),
    ("train_classifier.py", ["--dataset", "MNIST-10k"])])
def test_training_loops_read_no_value_between_steps(name, flags, tmp_path, monkeypatch):
    """The real loops with their backward passes, on the CPU."""
    monkeypatch.chdir(tmp_path)
    if name == "train_prior.py":
        assert run_script("VQ-VAE.py", "--dataset", "MNIST-10k", "--hidden-size", "4", "--k", "16", "--batch-size",
                          "1000", "--num-epochs", "1", "--output-folder", "run", cwd=tmp_path).returncode == 0
        (tmp_path / "models" / "run").rename(tmp_path / "run")
    after_step = trainers.Trainer.after_step

    def stop(self, *losses):
        after_step(self, *losses)
        if self.state.step == 3:
            raise Stop

    monkeypatch.setattr(trainers.Trainer, "after_step", stop)
    with NothingIsReadBy(name), pytest.raises(Stop):
        import_script(name).main(flags)


@pytest.mark.parametrize("fault, error", [
    (lambda z: z + torch.zeros(1, 16), RuntimeError), (lambda z: z * z.sum().item(), DataDependentOutputException),
    (lambda z: z if z.max() > 0 else -z, DataDependentOutputException),
    (lambda z: z[z[:, 0] > 0], DynamicOutputShapeException)])
@pytest.mark.parametrize("part", ["encoder", "quantizer", "decoder", "prior"])
def test_faults_are_noticed(fault, error, part, fake):
    """A tensor made on the CPU, a value that is read, one that decides, and a size that depends on values."""
    network, prior, maps = on_gpu(MODELS["gradient"]), on_gpu(PRIOR).train(), gpu(B, 7, 7, dtype=torch.int16)
    module = prior.norm if part == "prior" else getattr(network, part)
    call = prior.log_prob if part == "prior" else module
    inputs = {"encoder": gpu(B, 1, 28, 28), "quantizer": gpu(B, 16, 7, 7), "decoder": gpu(B, 16, 7, 7), "prior": maps}
    call(inputs[part])
    handle = module.register_forward_hook(lambda *_: fault(gpu(B, 16)))
    with pytest.raises(error, match="same device" if error is RuntimeError else None):
        call(inputs[part])
    handle.remove()
