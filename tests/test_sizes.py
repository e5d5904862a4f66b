"""Large images, large codebooks, long code maps: what is held in memory at once, and what --downsample changes."""

import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT, events, expect_usage_error, import_script, run_command, run_script
from PIL import Image

import checkpoint
import prior
import vector_quantizer
from data import Images, code_maps
from metrics import nats_per_code, samples
from modules import DOWNSAMPLES, VectorQuantizedVAE, vqvae_losses
from utils import code_use, memory, tensorboard_logs
from vector_quantizer import vq


def write_pictures(folder, count=20, side=40):
    """Colourful pictures, half of each of two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        small = rng.integers(0, 255, (4, 4, 3), np.uint8)
        Image.fromarray(small).resize((side, side), Image.Resampling.BICUBIC).save(path)
    return folder


# ---------------------------------------------------------------- --downsample

@pytest.mark.parametrize("factor", DOWNSAMPLES)
def test_a_code_covers_factor_by_factor_pixels(factor):
    torch.manual_seed(0)
    model = VectorQuantizedVAE(3, 8, 16, downsample=factor, codebook_init="uniform").eval()
    x = torch.rand(2, 3, 3 * factor, 2 * factor) * 2 - 1
    output = model(x)
    assert output.indices.shape == (2, 3, 2) == (2, *model.map_size(3 * factor, 2 * factor))
    assert output.reconstruction.shape == x.shape and model.image_size(3, 2) == x.shape[2:]
    assert torch.equal(model.decode(model.encode(x)), output.reconstruction)
    with pytest.raises(ValueError, match=f"multiples of {factor}"):
        model.encode(torch.zeros(1, 3, 3 * factor, 2 * factor + 2))
    # A latent sees the pixels around its own square alone: those far away change nothing.
    far = x.clone()
    far[:, :, -1] += 0.5
    latents = [model.encoder(F.pad(images, (0, 0, 6 * factor, 0))) for images in (x, far)]
    assert torch.equal(latents[0][:, :, 0], latents[1][:, :, 0]) and not torch.equal(*latents)


def test_factor_4_has_the_published_layers_and_others_add_stages():
    names = {factor: list(VectorQuantizedVAE(downsample=factor).state_dict()) for factor in DOWNSAMPLES}
    assert names[4] == list(VectorQuantizedVAE().state_dict())
    strides = [[module.stride for module in VectorQuantizedVAE(downsample=factor).modules()
                if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d) and module.kernel_size == (4, 4)]
               for factor in DOWNSAMPLES]
    assert [len(stages) for stages in strides] == [4, 6, 8] and {s for stages in strides for s in stages} == {(2, 2)}
    with pytest.raises(ValueError, match="downsample is 4, 8, 16, not 2"):
        VectorQuantizedVAE(downsample=2)


def test_every_script_follows_the_factor(tmp_path):
    """Train, reconstruct, encode, decode, evaluate, train a prior, sample: 32 pixels at 16 are 2×2 codes."""
    write_pictures(tmp_path / "pictures")
    train = ("VQ-VAE.py", "--dataset", "folder", "--data-folder", "pictures", "--image-size", 32, "--downsample", 16,
             "--k", 8, "--hidden-size", 8, "--batch-size", 9, "--keep-every", 2, "--output-folder", "run")
    model = ("--model", "models/run/best.pt")
    for script, *flags in ((*train, "--num-epochs", 3),
                           ("VQ-VAE.py", "--resume", "--num-epochs", 4, "--output-folder", "run"),
                           ("generate.py", *model), ("codes.py", *model, "--output", "codes.npz"),
                           ("codes.py", *model, "--decode", "codes.npz", "--output", "images.npz"),
                           ("evaluate.py", *model, "--json", "figures.json"),
                           ("train_prior.py", *model, "--num-epochs", 2, "--width", 8, "--heads", 1, "--layers", 1,
                            "--batch-size", 6, "--sample-every", 2),
                           ("generate.py", *model, "--input", "prior"), ("generate.py", *model, "--input", "random")):
        result = run_script(script, *flags, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        if script == "train_prior.py":
            assert re.search(r"An image is 2×2 = 4 codes\. An epoch takes about \d+ seconds, the whole", result.stdout)
    assert checkpoint.load_model(tmp_path / "models" / "run" / "best.pt")[0].downsample == 16
    # model_EPOCH.pt of every second epoch.
    assert {path.name for path in (tmp_path / "models" / "run").glob("model_*")} == {"model_2.pt", "model_4.pt"}
    with np.load(tmp_path / "codes.npz") as codes, np.load(tmp_path / "images.npz") as images:
        assert codes["indices"].shape[1:] == (2, 2) and images["images"].shape[1:] == (3, 32, 32)
    grid = np.asarray(Image.open(tmp_path / "generatedImages" / "prior.png"))
    assert grid.shape == (342, 342, 3)
    sampled = events(tmp_path / "logs" / "run").Images("prior/samples")
    assert [event.step for event in sampled] == [2]


def test_factors_that_do_not_fit_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for flags, words in ((["--dataset", "MNIST-10k", "--downsample", "8"], "--downsample 8: images of 28×28 pixels"),
                         (["--dataset", "folder", "--image-size", "24", "--downsample", "16"], "--image-size 24"),
                         (["--dataset", "folder", "--image-size", "16", "--downsample", "16"], "at least twice"),
                         (["--downsample", "5"], "--downsample")):
        if words == "--downsample":
            with pytest.raises(SystemExit):
                import_script("VQ-VAE.py").main(flags)
            assert "invalid choice: 5" in capsys.readouterr().err
        else:
            assert words in expect_usage_error("VQ-VAE.py", flags, capsys)
    assert not list(tmp_path.iterdir())


def test_run_of_an_earlier_version_resumes_with_factor_4(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    main = import_script("VQ-VAE.py").main
    main(["--dataset", "MNIST-10k", "--num-epochs", "1", "--batch-size", "3000", "--k", "4", "--hidden-size", "4"])
    path = tmp_path / "models" / "vqvae" / "last.pt"
    contents = checkpoint.load(path)
    assert contents["config"].pop("downsample") == 4 and contents["training"]["settings"].pop("downsample") == 4
    del contents["training"]["settings"]["keep_every"], contents["training"]["x_axis"]
    checkpoint.save(path, contents)
    main(["--resume", "--num-epochs", "2"])
    run = events(tmp_path / "logs" / "vqvae")           # the curves go on over steps and epochs, as they began
    assert [run.Scalars(f"loss/{split}/total")[-1].step for split in ("train", "test")] == [6, 2]
    assert checkpoint.load(path)["epoch"] == 2 and checkpoint.load(path)["config"]["downsample"] == 4


# ---------------------------------------------------------------- large codebooks

def test_compiled_search_is_one_operation_whatever_the_size():
    graphs, results = [], []

    def count_nodes(graph, _inputs):
        graphs.append(len(graph.graph.nodes))
        return graph

    for K, N in ((8, 3), (5000, 900)):
        torch.manual_seed(0)
        model, x = VectorQuantizedVAE(hidden_size=4, num_codes=K, codebook_init="uniform"), torch.rand(N, 1, 8, 8)

        def step(x, model=model):
            output = model(x)
            return vqvae_losses(x, output, 1.0).total, output.indices

        torch._dynamo.reset()
        state, random_state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
        results.append(torch.compile(step, fullgraph=True, dynamic=False, backend=count_nodes)(x))
        model.load_state_dict(state)
        torch.set_rng_state(random_state)
        expected = step(x)
        assert torch.equal(results[-1][0], expected[0]) and torch.equal(results[-1][1], expected[1])
    assert graphs[0] == graphs[1]
    assert vector_quantizer.BLOCK_SCORES["cpu"] < N * 4 * K / 4       # several blocks of rows


def test_other_devices_search_in_larger_blocks(monkeypatch):
    torch.manual_seed(0)
    inputs, codebook = torch.randn(700, 5), torch.randn(300, 5)
    products, mm = [], torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **kwargs: products.append(len(args[0])) or mm(*args, **kwargs))
    results = []
    for scores in ({"cpu": 304 * 100}, {}):
        monkeypatch.setattr(vector_quantizer, "BLOCK_SCORES", scores)
        results.append(vq(inputs, codebook))
    assert products == 7 * [100] + [700] and torch.equal(*results)


@pytest.mark.parametrize(("num_codes", "dtype"), [(256, torch.uint8), (257, torch.int16), (2**15, torch.int16),
                                                  (2**15 + 1, torch.int32)])
def test_codes_are_held_in_the_smallest_integers(num_codes, dtype):
    assert code_maps.smallest_dtype(num_codes) == dtype
    codes = torch.tensor([[[0, num_codes - 1]]])
    assert torch.equal(codes.to(dtype).long(), codes)
    model = VectorQuantizedVAE(hidden_size=2, num_codes=num_codes, codebook_init="uniform").eval()
    maps = code_maps.encode(model, [(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), None)], "cpu")
    assert maps.dtype == dtype and torch.equal(model.decode(maps), model.decode(maps.long()))
    network = prior.CodePrior(num_codes, 2, 2, layers=1, embedding=4, heads=1).eval()
    assert samples.sample_maps(network, torch.zeros(2, dtype=torch.int64), {}, None).dtype == dtype
    assert torch.equal(network.log_prob(maps), network.log_prob(maps.long()))


# ---------------------------------------------------------------- the prior

def test_prior_in_blocks_equals_all_logits_at_once(monkeypatch):
    torch.manual_seed(0)
    network = prior.CodePrior(num_codes=30, height=3, width=4, layers=2, embedding=16, heads=2)
    maps, labels = torch.randint(30, (7, 3, 4)), torch.randint(10, (7,))
    torch.nn.init.normal_(network.head.weight)
    monkeypatch.setattr(prior, "BLOCK_LOGITS", 30 * 5)
    network.calibrate(maps, labels, 3)
    tail = network.tail.clone()
    monkeypatch.setattr(prior, "BLOCK_LOGITS", 2**30)
    network.calibrate(maps, labels, 3)
    torch.testing.assert_close(network.tail, tail)
    assert tail.abs().max() > 0
    monkeypatch.setattr(prior, "BLOCK_LOGITS", 30 * 5)
    network.eval()
    log_probabilities = network(maps, labels).double().log_softmax(dim=-1)                # (7, 12, 30)
    expected = log_probabilities.gather(2, maps.flatten(1).unsqueeze(2)).sum(dim=(1, 2))
    rows, logits = [], network._logits
    monkeypatch.setattr(network, "_logits", lambda hidden: rows.append(len(hidden)) or logits(hidden))
    torch.testing.assert_close(network.log_prob(maps, labels).double(), expected, rtol=1e-5, atol=1e-4)
    assert max(rows) == 5 and sum(rows) == 7 * 12
    monkeypatch.setattr(memory, "BUDGET", 1)            # one map at a time
    assert nats_per_code(network, maps, labels) == pytest.approx(-expected.mean().item() / 12, rel=1e-5)
    monkeypatch.undo()
    alone, with_guidance = memory.samples_that_fit(network), memory.samples_that_fit(network, guided=True)
    assert with_guidance == pytest.approx(alone / 2, abs=1)         # each map is sampled twice


def test_samples_stop_when_the_time_is_up(monkeypatch):
    network = prior.CodePrior(num_codes=9, height=2, width=2, layers=1, embedding=8, heads=1).eval()
    clock = iter(range(10**6))
    monkeypatch.setattr(samples.time, "perf_counter", lambda: next(clock))
    draw = partial(samples.sample_columns, network, 100, generator=torch.Generator().manual_seed(0))
    assert draw(seconds=10**6)[1] == 10
    maps, columns = draw(seconds=12)                    # five ticks of the clock for the first column, one for another
    assert maps.shape == (10 * columns, 2, 2) and 1 < columns < 10
    with pytest.raises(RuntimeError, match="10 of them take longer than the 3 s that they may"):
        draw(seconds=3)


def test_price_counts_steps_tests_and_epochs_left(tmp_path, monkeypatch):
    script = import_script("train_prior.py")
    vqvae = VectorQuantizedVAE(hidden_size=4, num_codes=300)
    sets = [Images(torch.zeros(N, 1, 32, 64, dtype=torch.uint8), torch.zeros(N, dtype=torch.int64))
            for N in (6000, 600, 900)]
    source = script.FirstStage(vqvae, "", "", [1, 32, 64], "MNIST", None, *sets)
    measured = []
    monkeypatch.setattr(script.cost.speed, "measure_step_seconds",
                        lambda step, *_, **__: measured.append(step()) or [2.56])

    def describe(*flags):
        args = script.get_parser().parse_args(["--width", "8", "--heads", "1", *flags])
        trainer = script.build_trainer(args, None, source)
        trainer.state.epoch = 3
        return script.describe_cost(trainer, source)

    # 16 maps in 2.56 s; 6,000 to train, 600 to validate and calibrate, 900 to test, and a tenth more for samples.
    line = describe("--num-epochs", "4")
    assert line.startswith("An image is 8×16 = 128 codes. An epoch takes about 20 minutes, the whole training about 39")
    assert "--downsample" not in line and measured[0].requires_grad
    line = describe("--num-epochs", "12")
    assert "about 3.3 hours" in line and "--downsample 8: a quarter of the codes" in line and "GB" not in line
    monkeypatch.setattr(script, "LARGE_MAPS", 10**6)
    assert "take 0.0 GB of memory, less with --shift 0." in describe() and "--shift" not in describe("--shift", "0")
    assert [script.cost.duration(seconds) for seconds in (0.1, 119, 120, 7199, 7200)] == [
        "2 seconds", "119 seconds", "2 minutes", "120 minutes", "2.0 hours"]


# ---------------------------------------------------------------- pictures

def test_logged_pictures_are_bounded(tmp_path):
    """K = 5,000 and images of 512 pixels: few and small pictures."""
    assert [tensorboard_logs.images_in_grid(64, side, side) for side in (28, 64, 128, 256, 512)] == [64, 64, 64, 16, 4]
    torch.manual_seed(0)
    model = VectorQuantizedVAE(3, hidden_size=4, num_codes=5000, codebook_init="uniform")
    decoded, decode = [], model.decode
    model.decode = lambda indices: decoded.append(indices.shape) or decode(indices)
    counts, images = torch.arange(5000).flip(0), torch.zeros(2, 3, 512, 256, dtype=torch.uint8)
    with tensorboard_logs.open_writer(tmp_path) as writer:
        tensorboard_logs.log_codebook(writer, model, counts, images, 1)
        losses = vqvae_losses(torch.zeros(1, 3, 8, 8), model(torch.zeros(1, 3, 8, 8)), 1.0)
        tensorboard_logs.log_epoch(writer, 1, 60_000, {"test": losses}, counts, counts, 0)
        tensorboard_logs.log_code_use(writer, counts, 1)
    assert {shape[1:] for shape in decoded} == {(3, 3)} and 4000 < sum(shape[0] for shape in decoded) < 4096
    metadata = (tmp_path / "00001" / "codebook" / "metadata.tsv").read_text().splitlines()
    assert metadata[0] == "code\tused" and metadata[1] == "0\t4999" and metadata[-1] == "4095\t904"    # those used most
    [chart] = events(tmp_path).Images("codebook/use")
    assert (chart.width, chart.height) == code_use.CHART


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_large_image_trains_and_logs_in_little_memory(tmp_path):
    """512 pixels in 1.5 GiB more than importing torch takes; 0.7 are enough on some processors."""
    write_pictures(tmp_path / "pictures", count=2)
    argv = ["VQ-VAE.py", "--dataset", "folder", "--data-folder", "pictures", "--image-size", "512", "--batch-size", "1",
            "--num-epochs", "1", "--num-workers", "0", "--output-folder", "run"]
    program = f"""
import resource, runpy, sys
import torch, torch.utils.tensorboard
sys.path.insert(0, {str(ROOT)!r})
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + 3 * 2**29, size + 3 * 2**29))
sys.argv = {argv!r}
runpy.run_path({str(ROOT / argv[0])!r}, run_name="__main__")
"""
    result = run_command(sys.executable, "-c", program, cwd=tmp_path, OMP_NUM_THREADS="1")
    assert result.returncode == 0 and "Not logged" not in result.stderr, result.stderr
    assert (tmp_path / "logs" / "run" / "00001" / "codebook" / "sprite.png").is_file()
