"""Distributed training: against one process, with uneven data, and with a changing number of processes."""

import shutil
import signal
import time
from datetime import timedelta

import pytest
import torch
from distributed_helpers import PRIOR, RESUME, VQVAE, assert_losses_are_exact, run_processes, train_processes
from helpers import import_script
from test_resume import differences

import checkpoint
from modules import VectorQuantizedVAE
from prior import CodePrior
from utils import distributed, tensorboard_logs

# ---------------------------------------------------------------- against one process

def assert_same_steps(expected, actual, first=0):
    """From number `first` on, each step of `actual` equals that of `expected`, from the same state, up to rounding.

    In a step where a latent has rounded to another code, only the losses and code counts are compared.
    """
    num_compared, before = 0, None
    for number, steps in enumerate(zip(expected, actual, strict=True)):
        if before and steps[0]["totals"]["images"] < before[0]["images"]:           # a new epoch
            before = None
        expected_step, actual_step = (
            {name: value - (before[i][name] if before else 0) for name, value in step["totals"].items()}
            for i, step in enumerate(steps))
        before = [step["totals"] for step in steps]
        if number < first:
            continue
        torch.testing.assert_close(actual_step["sums"], expected_step["sums"], rtol=1e-3, atol=1e-6)
        assert expected_step["images"] == actual_step["images"]
        if "code_counts" in expected_step:
            num_changed = (expected_step["code_counts"] - actual_step["code_counts"]).abs().sum()
            assert num_changed <= 4           # two latents
            if num_changed:
                continue
        num_compared += 1
        assert_same_update(*steps)
    assert num_compared >= (len(expected) - first) / 2


def assert_same_update(expected, actual):
    """Compares Adam's averages instead of weights: Adam takes full steps even for gradients of rounding errors."""
    averages = [[state["exp_avg"] for state in step["optimizer"].values()] for step in (expected, actual)]
    atol = 1e-4 * max(average.abs().max().item() for average in averages[0])
    torch.testing.assert_close(averages[1], averages[0], rtol=1e-3, atol=atol)
    updated_by_adam = set() if "quantizer.cluster_sums" in expected["state"] else {"quantizer.codebook"}
    for name in {name for name in expected["state"] if name.startswith("quantizer.")} - updated_by_adam:
        torch.testing.assert_close(actual["state"][name], expected["state"][name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.rounding
def test_distributed_steps_match_single_process_steps(mnist_folder, tmp_path):
    flags = (*VQVAE, "--codebook-init", "uniform", "--data-folder", mnist_folder)
    expected = train_processes(1, tmp_path / "1", *flags, group_norm=True)
    actual = train_processes(3, tmp_path / "3", *flags, group_norm=True, reference=tmp_path / "1" / "record-0.pt")
    assert len(expected["steps"]) == 10
    assert_same_steps(expected["steps"], actual["steps"])
    assert tensorboard_logs.track_row(expected["progress"]["track"], 1)["restarts"] > 10


@pytest.mark.rounding
def test_run_resumes_with_any_number_of_processes(mnist_folder, tmp_path):
    """Two processes, then three until a signal in mid-epoch, then one, which ends bit for bit as one process alone."""
    flags = (*VQVAE, "--codebook-update", "ema", "--data-folder", mnist_folder)
    resume_flags = (*RESUME, "--num-epochs", 3)
    single, multi, reference = tmp_path / "single", tmp_path / "multi", tmp_path / "single" / "record-0.pt"
    expected = train_processes(1, single, *flags, group_norm=True)
    actual = train_processes(2, multi, *flags, group_norm=True, reference=reference)
    kmeans_losses = [record["steps"][0]["totals"]["sums"] for record in (expected, actual)]
    torch.testing.assert_close(*kmeans_losses, rtol=0.02, atol=0)       # in K-means, latents may round to other codes
    assert_same_steps(expected["steps"], actual["steps"], first=1)
    names = checkpoint.load(multi / "models" / "run" / "last.pt")["model"].keys()
    assert names == expected["steps"][0]["state"].keys()

    options = {"status": 128 + signal.SIGTERM, "group_norm": True}
    expected = train_processes(1, single, *resume_flags, **options, send_signal=(0, 14, signal.SIGTERM))
    actual = train_processes(3, multi, *resume_flags, **options, send_signal=(2, 14, signal.SIGTERM),
                             reference=reference)
    assert len(expected["steps"]) == 4
    assert_same_steps(expected["steps"], actual["steps"])

    records = [train_processes(1, folder, *resume_flags, group_norm=True) for folder in (single, multi)]
    assert [len(record["steps"]) for record in records] == [16, 16] and records[1]["progress"]["step"] == 30
    assert not differences(*(record["steps"][-1]["state"] for record in records))
    assert [line.split()[0] for line in records[1]["progress"]["track"]] == ["epoch", "1", "2", "3"]


@pytest.mark.rounding
def test_distributed_prior_training_matches_single_process(mnist_folder, tmp_path):
    """Including code maps and dropped labels."""
    torch.manual_seed(0)
    model = {"format": 1, "kind": "vqvae", "config": {"hidden_size": 4, "num_codes": 16},
             "model": VectorQuantizedVAE(hidden_size=4, num_codes=16).state_dict(),
             "dataset": {"name": "MNIST", "shape": [1, 28, 28]}}
    records = []
    for world_size, reference in ((1, None), (2, tmp_path / "1" / "record-0.pt")):
        folder = tmp_path / str(world_size)
        (folder / "models" / "run").mkdir(parents=True)
        checkpoint.save(folder / "models" / "run" / "best.pt", model)
        records.append(train_processes(world_size, folder, *PRIOR, "--data-folder", mnist_folder, reference=reference))
    expected, actual = records
    assert len(expected["steps"]) == 20
    assert_same_steps(expected["steps"], actual["steps"])
    assert expected["progress"]["best"] == pytest.approx(actual["progress"]["best"], rel=1e-3)


def sample_slowly(*arguments):
    """Train a prior whose samples would take longer than the processes wait for each other."""
    distributed.TIMEOUT, sample = timedelta(seconds=60), CodePrior.sample_in_order

    def slowly(*args, **kwargs):
        for codes in sample(*args, **kwargs):
            time.sleep(2)                       # 49 times
            yield codes

    CodePrior.sample_in_order = slowly
    import_script("train_prior.py").main([str(argument) for argument in arguments])


def test_samples_that_take_too_long_keep_no_process_waiting(trained, mnist_folder, tmp_path):
    (tmp_path / "models" / "run").mkdir(parents=True)
    shutil.copy(trained / "models" / "run" / "best.pt", tmp_path / "models" / "run")
    codes, output = run_processes(2, tmp_path, sample_slowly, *PRIOR[1:], "--data-folder", mnist_folder, "--shift", 0,
                                  "--num-epochs", 1)
    assert codes == [0, 0], output
    assert output.count("Not logged: samples (10 of them take longer than") == 1, output
    folder = tmp_path / "models" / "run"
    assert checkpoint.load_prior(folder / "prior-last.pt", folder / "best.pt")[1]["epoch"] == 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no two GPUs")
def test_two_gpus_match_one_gpu(mnist_folder, tmp_path):
    """After the first step, BatchNorm included: Adam amplifies rounding errors in later steps."""
    flags = (*VQVAE, "--codebook-update", "ema", "--device", "cuda", "--data-folder", mnist_folder)
    expected, actual = [train_processes(world_size, tmp_path / str(world_size), *flags)["steps"][0]["state"]
                        for world_size in (1, 2)]
    for name, rtol, atol in (("encoder.1.running_var", 1e-4, 1e-6), ("quantizer.codebook", 1e-2, 1e-2)):
        torch.testing.assert_close(expected[name], actual[name], rtol=rtol, atol=atol)


# ---------------------------------------------------------------- uneven data, random state, other launchers

def test_uneven_data_completes_and_counts_each_test_image_once(uneven_folder, tmp_path):
    record = train_processes(3, tmp_path, *VQVAE, "--validation-images", 40, "--data-folder", uneven_folder)
    assert record["progress"]["step"] == len(record["steps"]) == 10
    assert [step["totals"]["images"].item() for step in record["steps"]] == [*range(60, 559, 60), 559]
    assert_losses_are_exact(tmp_path, uneven_folder, 40)


def save_draws(folder):
    with distributed.process_group():
        before = torch.get_rng_state()
        with distributed.per_process_rng(7):
            draws = torch.rand(100)
        torch.save([draws, torch.equal(before, torch.get_rng_state())], folder / f"{distributed.rank()}.pt")


def test_per_process_rng_differs_and_keeps_the_global_state(tmp_path):
    assert run_processes(2, tmp_path, save_draws, tmp_path) == ([0, 0], "")
    (draws_0, kept_0), (draws_1, kept_1) = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert kept_0 and kept_1 and not torch.equal(draws_0, draws_1)


def test_sync_batch_norm_keeps_names_and_parameters():
    model = VectorQuantizedVAE(hidden_size=4, num_codes=16)
    names, parameters = list(model.state_dict()), [id(parameter) for parameter in model.parameters()]
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, torch.nn.SyncBatchNorm) for module in model.modules())
    assert list(model.state_dict()) == names and [id(parameter) for parameter in model.parameters()] == parameters


def test_world_size_is_1_under_other_launchers(monkeypatch):
    """Other launchers set WORLD_SIZE too, although the script runs in only one of their processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with distributed.process_group():
        assert distributed.world_size() == 1 and distributed.should_report_error()
