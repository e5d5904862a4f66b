"""benchmarks/: the baselines compute the same as this repository, and the script measures and reports."""

import functools
import json
import math
import operator
import os
import re
import shutil
import signal
import sys
import threading
import time
import types

import pytest
import torch
from helpers import ROOT, expect_usage_error, import_script, run_command, run_script

import checkpoint
import data
from metrics import evaluate
from vector_quantizer import VectorQuantizer

sys.path.append(str(ROOT / "benchmarks"))
import baseline
import quantizers
import speed


@pytest.mark.parametrize("nearest", [baseline.full_matrix, baseline.cdist])
def test_baseline_quantizers_match_values_and_gradients(nearest):
    torch.manual_seed(0)
    ours = VectorQuantizer(50, 6, codebook_init="uniform", restart_after=0)
    reference = baseline.Quantizer(50, 6, nearest)
    ours.codebook.data.normal_()
    reference.load_state_dict({"codebook": ours.codebook.detach()})
    z_e, results = torch.randn(3, 6, 4, 5), []
    for quantizer in (ours, reference):
        leaf = z_e.clone().requires_grad_()
        z_q, indices, codebook_loss, commitment_loss = quantizer(leaf)
        (z_q.sin().sum() + codebook_loss + 0.25 * commitment_loss).backward()
        results.append((z_q.detach(), indices.flatten(), codebook_loss.detach(), commitment_loss.detach(), leaf.grad,
                        quantizer.codebook.grad))
    for actual, expected in zip(*results):
        torch.testing.assert_close(actual, expected)


def test_uncached_sampling_matches_cached_sampling():
    prior = checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, checkpoint.PRETRAINED)[0]
    labels = torch.arange(10)
    samples = [draw(labels, generator=torch.Generator().manual_seed(3))
               for draw in (prior.sample, lambda labels, generator: baseline.uncached_sample(prior, labels, generator))]
    assert torch.equal(*samples)


class InProcessWorker:
    """A speed.Worker in the current process."""

    def __init__(self, make, *arguments):
        self.measure = make(*arguments)

    def __call__(self, *args):
        return self.measure(*args)

    def close(self):
        pass


@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_speed_script_measures_and_reports(device, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small_sets = [data.Images(part.images[:640], part.labels[:640]) for part in data.load("MNIST-10k", "")]
    monkeypatch.setattr(speed, "Worker", InProcessWorker)
    monkeypatch.setattr(speed, "MATMUL_SIZE", 256)
    monkeypatch.setattr(data, "load", lambda *_: small_sets)
    monkeypatch.setattr(speed, "SIZES", [(392, 64)])
    monkeypatch.setattr(speed, "LARGEST_ON_GPU", (392, 128))
    speed.main(["limit", "quantizer", "profile", "--rounds", "1", "--device", device, "--json", "speed.json"])
    output, report = capsys.readouterr().out, json.loads((tmp_path / "speed.json").read_text())
    product, training = report["limit"]
    assert product["GFLOP_per_second"] > 0 and training["share_of_limit"] > 0
    # Multiply-adds of the convolutions on 28×28 digits with D = 40: once forward, twice backward, except for the
    # input of the first layer. The nearest-code search takes 49 × 512 dot products of length 41.
    conv1, conv2, blocks = 14**2 * 16 * 40, 7**2 * 16 * 40**2, 4 * 7**2 * 10 * 40**2
    expected = 2 * (3 * (2 * conv1 + 2 * conv2 + blocks) - conv1 + 49 * 512 * 41) / 1e6
    assert training["MFLOP_per_image"] == pytest.approx(expected, rel=0.01)
    assert {row["what"] for row in report["quantizer"]} >= {"this repository", "full matrix", "torch.cdist"}
    assert all(row["ms"] > 0 for row in report["quantizer"])
    names = [row["what"] for row in report["profile"]]
    total = report["profile"][names.index("all operations")]
    operations = report["profile"][:names.index("all operations")]
    assert (speed.ELAPSED in names) == (device == "cuda")
    assert {"aten::convolution_backward", "vector_quantizer::nearest"} & {row["what"] for row in operations}
    assert 0.8 < sum(row["share"] for row in operations) <= 1.001 and total["ms"] > operations[0]["ms"] > 0
    for name, value in report["about"].items():
        assert f"{name} {value}" in output
    assert list(tmp_path.iterdir()) == [tmp_path / "speed.json"]


def test_what_has_been_measured_is_kept_if_a_later_part_fails(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(_):
        raise ValueError("memory has run out")

    monkeypatch.setattr(speed, "MEASURE", {"limit": lambda _: [{"what": "a", "ms": 3}], "profile": fails})
    with pytest.raises(SystemExit):
        speed.main(["limit", "profile", "--json", "speed.json"])
    report = json.loads((tmp_path / "speed.json").read_text())
    assert report.keys() == {"about", "limit"} and report["limit"] == [{"what": "a", "ms": 3}]


def test_training_that_fails_is_reported_and_not_waited_for():
    epoch = speed.make_training("--lr 1e30 --hidden-size 4 --k 8")
    with pytest.raises(ValueError, match="the reconstruction loss of step"):
        epoch()


def test_measurements_replace_only_measurements_and_only_with_overwrite(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "speed.json").write_text(json.dumps({"about": {}, "training": []}))
    (tmp_path / "photo.jpg").write_bytes(b"JFIF")
    for script in ("benchmarks/speed.py", "benchmarks/sizes.py"):
        for flags, words in ((["speed.json"], "--json speed.json: exists, replace it with --overwrite"),
                             (["photo.jpg", "--overwrite"], "exists and is not a file of measurements")):
            assert words in expect_usage_error(script, ["--json", *flags], capsys)
        assert "--overwrite: is used only with --json" in expect_usage_error(script, ["--overwrite"], capsys)


def test_script_that_is_killed_or_interrupted_is_reported_and_ended(tmp_path, monkeypatch):
    sizes = import_script("benchmarks/sizes.py")
    (tmp_path / "silent.py").write_text("import os; os.kill(os.getpid(), 9)")
    with pytest.raises(ValueError, match=r"silent\.py: ended with status -9"):
        sizes.run_script([tmp_path / "silent.py"], tmp_path)
    (tmp_path / "slow.py").write_text("import os, time; print(os.getpid(), flush=True); time.sleep(99)")

    def interrupt(seconds):
        if (tmp_path / "output.txt").read_text().endswith("\n"):
            raise KeyboardInterrupt

    monkeypatch.setattr(sizes.time, "sleep", interrupt)
    with pytest.raises(KeyboardInterrupt):
        sizes.run_script([tmp_path / "slow.py"], tmp_path)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "output.txt").read_text()), 0)


def test_sizes_checks_its_folder_before_it_imports_torch():
    result = run_command(sys.executable, "benchmarks/sizes.py", "folder", "--data-folder", "README.md")
    assert result.returncode == 2 and "--data-folder README.md: give the folder of images" in result.stderr


def test_worker_measures_in_a_separate_process():
    worker = speed.Worker(operator.attrgetter, "real")
    assert worker(3 + 4j) == 3
    with pytest.raises(AttributeError):
        worker("no number")
    worker.process.kill()
    with pytest.raises(ValueError, match="has ended by itself"):
        worker(1)
    worker.close()


@pytest.mark.parametrize(("arguments", "words"), [
    (["speed"], "'speed' is unknown: choose from training, quantizer"),
    (["--rounds", "0"], "--rounds"),
    (["--data-folder", __file__], f"--data-folder {__file__}: is a file"),          # before any measurement
    (["limit", "--json", "."], "--json .: is a folder"),
])
def test_bad_input_gets_a_one_line_error(arguments, words, capsys):
    assert words in expect_usage_error("benchmarks/speed.py", arguments, capsys)


def test_quantizers_benchmark_goes_on_where_it_was_interrupted(mnist_folder, tmp_path, monkeypatch, capsys):
    commands = []

    def run(folder, words, stop_at=None):
        commands.append(" ".join(map(str, words)))
        if len(commands) == stop_at:
            raise KeyboardInterrupt
        if words[0] == "train_prior.py":        # one was killed before it had saved anything
            log, = folder.glob("logs/fsq-0.008-1-0/events*")
            shutil.copy(log, f"{log}.prior")
        result = run_script(*words, cwd=folder)
        assert result.returncode == 0, result.stderr

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(quantizers, "TRAINING", "--batch-size 60 --hidden-size 4 --k 512 --lr-schedule cosine")
    monkeypatch.setattr(quantizers, "PRIOR", "--layers 1 --width 12 --shift 0 --batch-size 60")
    monkeypatch.setattr(quantizers, "TIMED_ROUNDS", 1)
    flags = ["FSQ", "--data-folder", str(mnist_folder), "--rates", "1e-3", "8e-3", "--rate-epochs", "1",
             "--num-epochs", "1", "--seeds", "2", "--prior-epochs", "1"]
    monkeypatch.setattr(quantizers, "run_script", functools.partial(run, stop_at=2))
    with pytest.raises(SystemExit):
        quantizers.main(flags)
    assert list(json.loads((tmp_path / "quantizers" / "results.json").read_text())["rates"]["FSQ"]) == ["0.001"]
    monkeypatch.setattr(quantizers, "run_script", run)
    for _ in range(2):                          # the second time nothing is left to do
        quantizers.main(flags)
        # Two rates, of which one is trained again after the interruption; the model of seed 0 is that of the best rate.
        assert len(commands) == 5 and [words.split()[0] for words in commands[3:]] == ["train_prior.py", "VQ-VAE.py"]
    results = json.loads((tmp_path / "quantizers" / "results.json").read_text())
    assert results["rates"]["FSQ"]["0.008"] < results["rates"]["FSQ"]["0.001"]
    model, _ = checkpoint.load_model(tmp_path / "quantizers" / "models" / "fsq-0.008-1-0" / "model_1.pt")
    assert (model.quantizer.num_codes, len(model.quantizer.levels)) == (512, 3)
    losses, counts = evaluate(model, data.batches(data.load("MNIST", mnist_folder)[1], 500), "cpu")
    first, second = results["seeds"]["FSQ"]["0"], results["seeds"]["FSQ"]["1"]
    assert first["mse"] == pytest.approx(losses.reconstruction, rel=1e-4)
    assert abs(first["codes_used"] - (counts > 0).sum()) <= 2
    printed = capsys.readouterr().out
    error, deviation = (first["mse"] + second["mse"]) / 2, abs(first["mse"] - second["mse"]) / math.sqrt(2)
    assert f"| FSQ | 0.008 | {error:.5f} ± {deviation:.5f} |" in printed
    nats, bits = first["nats_per_map"], first["bits_per_dimension"]
    assert f"| {nats:.1f} | {bits:.4f} |" in printed and "nats_per_map" not in second
    assert printed.endswith("so that one beyond may be better: FSQ (0.008)\n")
    assert first["rate"] == second["rate"] == 0.008
    assert bits == pytest.approx(nats / math.log(2) / 784) and 0 < nats < 49 * math.log(512) * 1.1
    capsys.readouterr()
    with pytest.raises(SystemExit):
        quantizers.main([*flags, "--num-epochs", "2"])
    assert "--folder quantizers: quantizers/results.json holds results of other settings" in capsys.readouterr().err


def test_signal_ends_the_scripts_of_the_quantizers_benchmark(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("saved").touch()))
pathlib.Path(sys.argv[2]).touch()
time.sleep(60)
""")
    done = []

    def task():
        quantizers.run_script(tmp_path, [script, "--model", "first"])
        done.append(quantizers.run_script(tmp_path, [script, "--model", "second"]))

    def interrupt():
        while not (tmp_path / "first").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        quantizers.run_all([task], types.SimpleNamespace(processes=1), "tasks")
    assert time.monotonic() - start < 40 and (tmp_path / "saved").exists()
    assert not done and not quantizers.RUNNING and not (tmp_path / "second").exists()


def test_completions_benchmark_reports_every_number_of_rows(tmp_path, capsys):
    path = tmp_path / "new" / "completions.json"
    flags = ["--dataset", "MNIST-10k", "--images", "30", "--json", path]
    import_script("benchmarks/completions.py").main(list(map(str, flags)))
    lines = re.findall(r"^\| (\d) of 7 \| ([\d.]+) % ± ([\d.]+) % \|$", capsys.readouterr().out, re.MULTILINE)
    shares = [float(share) / 100 for _, share, _ in lines]
    assert [int(rows) for rows, _, _ in lines] == list(range(8))
    assert shares[0] < 0.4 and shares[3] > 0.5 and shares[7] > 0.9
    for share, (_, _, error) in zip(shares, lines):
        read, other = 30 * share + 1, 30 * (1 - share) + 1          # of a Beta distribution
        assert 100 * math.sqrt(read * other / 32**2 / 33) == pytest.approx(float(error), abs=0.06)
    figures = json.loads(path.read_text())
    assert figures["images"] == 30 and [row["kept"] for row in figures["rows"]] == list(range(8))
    assert [row["share"] for row in figures["rows"]] == pytest.approx(shares, abs=0.0006)
    assert "exists, replace it with --overwrite" in expect_usage_error("benchmarks/completions.py", flags, capsys)
    line = expect_usage_error("benchmarks/completions.py", ["--guidance", "2"], capsys)
    assert "--guidance 2.0: needs a class, and none is given here" in line


def test_adapted_quantizers_keep_the_contract():
    pytest.importorskip("vector_quantize_pytorch", reason="pip install -r benchmarks/requirements.txt")
    import quantizer_adapters

    from modules import VectorQuantizedVAE

    quantizer_adapters.add_to_quantizers()
    for name in ("cosine", "rotation", "simvq", "bsq", "residual"):
        torch.manual_seed(0)
        model = VectorQuantizedVAE(1, 16, 512, quantizer=name)          # which checks it
        assert isinstance(model.quantizer, quantizer_adapters.Adapter)
        model(torch.rand(8, 1, 28, 28)).reconstruction.square().mean().backward()
        assert model.encoder[0].weight.grad.abs().sum() > 0, name
        x = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
        model.eval()
        with torch.no_grad():
            torch.testing.assert_close(model.decode(model.encode(x)), model(x).reconstruction)
