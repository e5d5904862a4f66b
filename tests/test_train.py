"""VQ-VAE.py from the command line, and the files it writes in models/ and logs/."""

import io
import json
import re
import shutil
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
import torch
import torchvision
from conftest import TRAIN_ARGS
from helpers import bundled_digits, events, import_script, run_script, snapshot
from PIL import Image, ImageColor
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

import checkpoint
import data
from metrics import evaluate, perplexity
from utils import code_use, tensorboard_logs
from vector_quantizer import VectorQuantizer

LOSSES = ("reconstruction", "codebook", "commitment", "total")
FINAL = {"at_end/test_mse", "at_end/test_perplexity", "at_end/test_used", "best/epoch", "best/test_mse"}
STEPS = 2 * 33              # two epochs of 8,250 digits in batches of 256: 750 are held out
LOGGED_IMAGES = [2560, 5120, 7680, 8250, 10810, 13370, 15930, 16500]            # every ten steps, and at an epoch's end


def track(folder, name="run"):
    """{column: values} of the text track of a run."""
    lines = (folder / "models" / name / "track.txt").read_text().splitlines()
    rows = [[float(value) for value in line.split()] for line in lines[1:]]
    return {name: [row[i] for row in rows] for i, name in enumerate(lines[0].split())}


def test_run_writes_its_files_and_prints_their_paths(trained):
    assert {path.name for path in (trained / "models" / "run").iterdir()} == {
        "args.json", "best.pt", "last.pt", "model_1.pt", "model_2.pt", "track.txt"}
    stdout = (trained / "stdout.txt").read_text()
    for path in ("models/run/best.pt", "models/run/track.txt", "logs/run"):
        assert path in stdout
    columns = track(trained)
    printed = [line.split() for line in stdout.splitlines()[1:4]]
    assert printed[0] == ["epoch", "train_recon", "val_recon", "test_recon", "perplexity", "used", "restarts",
                          "seconds"]
    assert [list(map(float, row)) for row in printed[1:]] == [[columns[name][i] for name in printed[0]] for i in (0, 1)]
    assert max(map(len, stdout.splitlines()[1:4])) < 80
    best = int(np.argmin(columns["val_recon"]))
    assert stdout.startswith("Training on MNIST-10k: 8,250 images, 750 to validate, 1,000 to test, on cpu.\n")
    assert (f"Lowest validation reconstruction loss: {columns['val_recon'][best]:.4f}, in epoch {best + 1}; "
            f"on the test set: {columns['test_recon'][best]:.4f}.\n") in stdout
    arguments = json.loads((trained / "models" / "run" / "args.json").read_text())
    assert arguments["validation_images"] == 750
    assert arguments["batch_size"] == 256 and arguments["seed"] == 0 and arguments["lr"] == 4e-3
    environment, = arguments["environments"]
    assert environment["torch"] == torch.__version__ and environment["threads"] == str(torch.get_num_threads())


def test_event_file_has_every_tag(trained):
    run = events(trained / "logs" / "run")
    tags = run.Tags()
    expected = {f"loss/{split}/{name}" for split in ("train", "validation", "test") for name in LOSSES}
    assert set(tags["scalars"]) == expected | FINAL | {"best/validation_mse"} | {
        "lr", "codebook/perplexity", "codebook/used", "codebook/train/perplexity", "codebook/train/used",
        "codebook/restarts"}
    assert set(tags["images"]) == {"images/original", "images/reconstruction", "codebook/use"} and tags["graph"]
    for name in LOSSES:
        assert [event.step for event in run.Scalars(f"loss/train/{name}")] == LOGGED_IMAGES
        for split in ("validation", "test"):
            assert [event.step for event in run.Scalars(f"loss/{split}/{name}")] == [8250, 16500]
    assert [event.step for event in run.Images("images/original")] == [0]
    assert [event.step for event in run.Images("images/reconstruction")] == [0, 1, 2]
    assert [event.step for event in run.Images("codebook/use")] == [1, 2]
    operations = {node.op for node in run.Graph().node}
    assert any("conv" in operation for operation in operations)


def test_tensorboard_serves_every_tag_and_custom_chart(trained):
    def get_json(path):
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(address + path) as response:
            return json.load(response)

    server = subprocess.Popen([sys.executable, "-m", "tensorboard.main", "--logdir", "logs", "--port", "0", "--host",
                               "127.0.0.1", "--load_fast", "false"],
                              cwd=trained, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        address = next(found[0] for line in server.stderr if (found := re.search(r"http://127\.0\.0\.1:\d+/", line)))
        expected = events(trained / "logs" / "run").Tags()
        for plugin in ("scalars", "images"):
            deadline = time.monotonic() + 300                  # the server starts before all logs are read
            while set((served := get_json(f"data/plugin/{plugin}/tags")).get("run", ())) != set(expected[plugin]):
                assert time.monotonic() < deadline, (plugin, served)
                time.sleep(0.1)
        categories = {category["title"]: {chart["title"]: chart["multiline"]["tag"] for chart in category["chart"]}
                      for category in get_json("data/plugin/custom_scalars/layout")["category"]}
        assert categories["losses"] == {
            "the three losses, training": [f"loss/train/{name}" for name in LOSSES[:3]],
            "the three losses, test": [f"loss/test/{name}" for name in LOSSES[:3]],
            "reconstruction loss by set": [f"loss/{split}/reconstruction" for split in ("train", "validation", "test")]}
        assert list(categories) == ["losses"]           # no empty chart for a prior that is not there
        for tag in (tag for tags in categories["losses"].values() for tag in tags):
            curves = get_json(f"data/plugin/custom_scalars/scalars?run=run&tag={tag}")["tag_to_events"]
            steps = [point[1] for point in curves.pop(tag)]
            assert steps == (LOGGED_IMAGES if "train" in tag else [8250, 16500]) and not curves
    finally:
        server.kill()
        server.wait()
        server.stderr.close()


def test_logged_losses_add_up_and_decrease(trained):
    run = events(trained / "logs" / "run")
    for split in ("train", "validation", "test"):
        parts = [np.array([event.value for event in run.Scalars(f"loss/{split}/{name}")]) for name in LOSSES]
        assert np.allclose(parts[0] + parts[1] + parts[2], parts[3], rtol=1e-5)          # β is 1
    train = [event.value for event in run.Scalars("loss/train/reconstruction")]
    assert train[-1] < train[0] / 4


def test_text_track_matches_the_event_file(trained):
    columns, run = track(trained), events(trained / "logs" / "run")
    assert columns["epoch"] == [1, 2] and columns["step"] == [STEPS / 2, STEPS]
    pairs = {"test_recon": "loss/test/reconstruction", "test_codebook": "loss/test/codebook",
             "test_commit": "loss/test/commitment", "val_recon": "loss/validation/reconstruction",
             "val_codebook": "loss/validation/codebook", "val_commit": "loss/validation/commitment",
             "perplexity": "codebook/perplexity", "used": "codebook/used"}
    for column, tag in pairs.items():
        assert np.allclose(columns[column], [event.value for event in run.Scalars(tag)], rtol=1e-2), column
    assert columns["restarts"] == [event.value for event in run.Scalars("codebook/restarts")]
    assert columns["restarts"][0] > 0
    # A point is the mean of ten steps, or of three at the end. The mean of an epoch is over images, so that its
    # last batch of 58 counts less than in a mean over steps.
    for column, name in (("train_recon", "reconstruction"), ("train_commit", "commitment")):
        values = np.array([event.value for event in run.Scalars(f"loss/train/{name}")]).reshape(2, 4)
        assert np.allclose(columns[column], values @ [10, 10, 10, 3] / 33, rtol=0.03)


@pytest.mark.parametrize("name, steps, expected", [
    ("constant", 100, lambda i: 1.0), ("cosine", 100, lambda i: (1 + np.cos(np.pi * i / 100)) / 2),
    ("onecycle", 100, lambda i: 1 / 25 + (1 - 1 / 25) * (1 - np.cos(np.pi * i / 29)) / 2 if i <= 29
        else 1 / 25e4 + (1 - 1 / 25e4) * (1 + np.cos(np.pi * (i - 29) / 70)) / 2),
    ("onecycle", 1, lambda i: 1 / 25e4), ("cosine", 1, lambda i: 1.0)])
def test_schedules_match_their_formulas(name, steps, expected):
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = import_script("VQ-VAE.py").make_schedule(name, optimizer, 2.0, steps)
    for i in range(steps):
        assert schedule.get_last_lr()[0] / 2 == pytest.approx(expected(i), rel=1e-4), i
        optimizer.step()
        schedule.step()


def test_requested_schedule_spans_the_run(tmp_path):
    result = run_script("VQ-VAE.py", "--dataset", "MNIST-10k", "--batch-size", 500, "--num-epochs", 2,
                        "--hidden-size", 8, "--k", 16, "--lr", 1e-3, "--lr-schedule", "cosine",
                        "--codebook-update", "ema", "--validation-images", 0, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    logged = {event.step / 500: event.value for event in events(tmp_path / "logs" / "vqvae").Scalars("lr")}
    assert list(logged) == [10, 18, 28, 36]
    for step, value in logged.items():
        assert value == pytest.approx(1e-3 * (1 + np.cos(np.pi * (step - 1) / 36)) / 2, rel=1e-4)
    last = checkpoint.load(tmp_path / "models" / "vqvae" / "last.pt")
    assert last["training"]["progress"]["step"] == 36 and last["config"]["codebook_update"] == "ema"
    assert (last["model"]["quantizer.cluster_sizes"] > 0).all()
    model, _ = checkpoint.load_model(tmp_path / "models" / "vqvae" / "best.pt")
    assert model.quantizer.ema
    # With nothing held out, the last epoch is the best.
    assert checkpoint.load(tmp_path / "models" / "vqvae" / "best.pt")["epoch"] == 2
    assert not any("val" in name for name in track(tmp_path, "vqvae"))
    tags = events(tmp_path / "logs" / "vqvae").Tags()["scalars"]
    assert not any("validation" in tag for tag in tags) and set(tags) >= FINAL
    assert "to validate" not in result.stdout and "Test reconstruction loss: " in result.stdout


def test_training_code_counts_cover_each_epoch(mnist_folder, tmp_path, monkeypatch):
    """Expected: the counts of all indices in the 12 steps of each epoch."""
    monkeypatch.chdir(tmp_path)
    script, step_indices, epoch_counts = import_script("VQ-VAE.py"), [], []
    count, log_epoch = script.code_counts, script.log_epoch
    script.code_counts = lambda indices, K: step_indices.append(indices) or count(indices, K)
    script.log_epoch = lambda trainer, *args: epoch_counts.append(trainer.state.code_counts.tolist()) or log_epoch(
        trainer, *args)
    script.main(["--data-folder", str(mnist_folder), "--k", "32", "--hidden-size", "8", "--batch-size", "50",
                 "--num-epochs", "2", "--validation-images", "0"])
    assert len(step_indices) == 24 and len(epoch_counts) == 2
    for steps, counts in zip((step_indices[:12], step_indices[12:]), epoch_counts):
        indices = torch.cat([step.flatten() for step in steps])
        assert sum(counts) == 600 * 49 and counts == [(indices == k).sum().item() for k in range(32)]


def test_restarts_are_counted_per_epoch(mnist_folder, tmp_path, monkeypatch):
    """Expected: the number of codes that move in a restart, over the 12 steps of each of two epochs."""
    monkeypatch.chdir(tmp_path)
    restart, moved_per_step = VectorQuantizer._restart_unused, []

    def counting_restart(quantizer, *args):
        before = quantizer.codebook.detach().clone()
        restart(quantizer, *args)
        moved_per_step.append((quantizer.codebook != before).any(dim=1).sum().item())

    monkeypatch.setattr(VectorQuantizer, "_restart_unused", counting_restart)
    import_script("VQ-VAE.py").main(["--data-folder", str(mnist_folder), "--batch-size", "50", "--num-epochs", "2",
                                     "--hidden-size", "8", "--k", "512", "--restart-after", "3", "--lr", "1e-2",
                                     "--output-folder", "run", "--validation-images", "0"])
    tried, *moved_per_step = moved_per_step         # by check_training_mode(), on a copy
    assert tried == 0 and track(tmp_path)["restarts"] == [sum(moved_per_step[:12]), sum(moved_per_step[12:])]
    assert len(moved_per_step) == 24 and min(track(tmp_path)["restarts"]) > 0


def test_code_use_is_logged_separately_for_train_and_test(trained):
    run = events(trained / "logs" / "run")
    for name in ("perplexity", "used"):
        train, test = ([event.value for event in run.Scalars(f"codebook/{split}{name}")] for split in ("train/", ""))
        assert train != test and all(0 < value <= 512 for value in train + test)


def test_projector_has_use_and_picture_of_each_code(trained):
    logs = trained / "logs" / "run"
    config = (logs / "projector_config.pbtxt").read_text()
    for name in ("tensors.tsv", "metadata.tsv", "sprite.png"):
        assert f'"00002/codebook/{name}"' in config
    model, _ = checkpoint.load_model(trained / "models" / "run" / "model_2.pt")
    codebook = np.loadtxt(logs / "00002" / "codebook" / "tensors.tsv")
    assert np.allclose(codebook, model.quantizer.codebook.detach(), rtol=1e-5)

    header, *rows = (logs / "00002" / "codebook" / "metadata.tsv").read_text().splitlines()
    assert header == "code\tused"
    codes, uses = np.array([[int(cell) for cell in row.split("\t")] for row in rows]).T
    assert codes.tolist() == list(range(512)) and uses.sum() == 1000 * 49
    _, counts = evaluate(model, data.batches(data.load("MNIST-10k", "")[1], 500), "cpu")
    assert np.allclose(uses, counts, atol=2)            # a latent between two codes may round to either
    counts = torch.from_numpy(uses)

    # The mean around all places of a code; of one without a place, a map of itself.
    sprite = np.array(Image.open(logs / "00002" / "codebook" / "sprite.png").convert("RGB")).astype(int)
    assert sprite.shape == (23 * 28, 23 * 28, 3)                    # 23² is the smallest square of at least 512
    x = data.to_model_range(data.load("MNIST-10k", "")[1].images)
    with torch.no_grad():
        output = model(x)
    reconstructions = np.pad(output.reconstruction[:, 0], ((0, 0), (4, 4), (4, 4)), constant_values=-1)
    most, *_, least = counts.argsort(descending=True).tolist()
    for k in (most, int(counts.argsort()[256]), least):
        places = torch.nonzero(output.indices == k).tolist()
        with torch.no_grad():
            expected = np.mean([reconstructions[b, 4 * i:4 * i + 12, 4 * j:4 * j + 12] for b, i, j in places], axis=0) \
                if places else model.decode(torch.full((1, 3, 3), k))[0, 0].numpy()
        row, column = divmod(k, 23)
        cell = sprite[28 * row:28 * row + 28, 28 * column:28 * column + 28]
        assert np.abs(cell[2:-2, 2:-2] - ((expected + 1) * 127.5).repeat(2, 0).repeat(2, 1)[..., None]).max() <= 1.01
        frame = {most: [253, 231, 37], least: [209, 36, 47] if not counts[least] else [68, 1, 84]}.get(k)
        assert frame is None or cell[0, 0].tolist() == frame


def test_chart_of_code_use_shows_shares_and_dead_codes():
    counts = torch.tensor([0, 90, 9, 0, 900, 1])
    chart = code_use.draw(counts).numpy()
    assert chart.shape == (3, code_use.CHART[1], code_use.CHART[0])
    left, _, right, _ = code_use.MARGINS
    bars = chart[:, :, left:code_use.CHART[0] - right]
    blue, red = ((bars == np.array(ImageColor.getrgb(color))[:, None, None]).all(axis=0).sum(axis=0)
                 for color in (code_use.BLUE, code_use.RED))
    sixth = bars.shape[2] / 6
    heights = [np.median(blue[int(i * sixth) + 2:int((i + 1) * sixth) - 2]) for i in range(6)]
    # Shares of 0.9, 0.09, 0.009 and 0.001: equal distances on a logarithmic axis.
    steps = -np.diff(heights[:4])
    assert heights[4:] == [0, 0] and steps[0] == pytest.approx(steps[1], abs=4) and steps[0] > 40
    assert red[int(4 * sixth) + 2:].all() and not red[:int(4 * sixth) - 2].any()
    # The line of even use stays in sight where most codes are dead, or there is one.
    grey = torch.tensor(ImageColor.getrgb(code_use.GREY)).view(3, 1, 1)
    for counts in ([1000] * 20 + [0] * 492, [7], [0, 0, 0]):
        assert (code_use.draw(torch.tensor(counts)) == grey).all(dim=0)[:, 120:600].sum() > 500


def test_frames_show_the_rank_among_the_used_codes():
    pictures, counts = torch.zeros(6, 1, 12, 12, dtype=torch.uint8), torch.tensor([0, 9, 1, 1, 0, 5])
    colors = code_use.framed(pictures, counts)[:, :, 0, 0].tolist()
    violet, *_, yellow = code_use.SCALE.tolist()
    assert colors == [[209, 36, 47], yellow, violet, violet, [209, 36, 47], code_use.SCALE[2].tolist()]
    assert code_use.framed(pictures, counts).shape == (6, 3, 28, 28)


def test_hparams_hold_settings_and_final_metrics(trained):
    run, columns = events(trained / "logs" / "run"), track(trained)
    contents = run.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = {name: getattr(value, value.WhichOneof("kind")) for name, value
                in HParamsPluginData.FromString(contents).session_start_info.hparams.items()}
    assert settings["channels"] == 1 and settings["image_size"] == 28
    assert settings["lr"] == 4e-3 and settings["dataset"] == "MNIST-10k" and settings["codebook_update"] == "gradient"
    assert not {"data_folder", "output_folder"} & set(settings)
    final = {tag: run.Scalars(tag)[0].value for tag in FINAL}
    assert final["at_end/test_mse"] == pytest.approx(columns["test_recon"][-1], abs=1e-5)
    assert final["at_end/test_perplexity"] == pytest.approx(columns["perplexity"][-1], abs=0.1)
    assert final["at_end/test_used"] == columns["used"][-1]
    best = int(np.argmin(columns["val_recon"]))
    assert final["best/test_mse"] == pytest.approx(columns["test_recon"][best], abs=1e-5)
    assert final["best/epoch"] == best + 1
    assert run.Scalars("best/validation_mse")[0].value == pytest.approx(columns["val_recon"][best], abs=1e-5)


def test_hparams_of_several_runs_begin_with_those_that_differ(tmp_path):
    """As TensorBoard's own plugin reads them, with settings that a single run has."""
    for name, settings in (("a", {"beta": 1.0, "lr": 0.1}), ("b", {"beta": 1.0, "lr": 0.2}),
                           ("c", {"beta": 1.0, "lr": 0.2, "levels": "8,8"})):
        with tensorboard_logs.open_writer(tmp_path / name) as writer:
            tensorboard_logs.log_hparams(writer, settings, {"at_end/mse": 0.5})
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    context = Context(TBContext(data_provider=MultiplexerDataProvider(multiplexer, str(tmp_path))))
    runs = context.hparams_metadata(RequestContext(), "")
    experiment = context.experiment_from_metadata(RequestContext(), "", True, runs, None)
    assert [(info.name, info.differs) for info in experiment.hparam_infos] == [
        ("lr", True), ("beta", False), ("levels", False)]
    assert [info.name.tag for info in experiment.metric_infos] == ["at_end/mse"]


def test_logged_images_are_the_test_digits(trained):
    run = events(trained / "logs" / "run")
    digits = torch.from_numpy(bundled_digits()[0][9000:9064]).unsqueeze(1)
    expected = torchvision.utils.make_grid(digits)[0].numpy()

    def picture(tag, i):
        encoded = run.Images(tag)[i].encoded_image_string
        return np.array(Image.open(io.BytesIO(encoded)).convert("L")).astype(float)

    assert np.abs(picture("images/original", 0) - expected).max() <= 1
    errors = [np.square(picture("images/reconstruction", i) - expected).mean() for i in range(3)]
    assert errors[0] > errors[1] > errors[2]


def test_checkpoints_reproduce_the_logged_metrics(trained):
    columns, folder = track(trained), trained / "models" / "run"
    train_set, test_set = data.load("MNIST-10k", "MNIST")
    validation_set = data.hold_out(train_set)[1]
    for epoch in (1, 2):
        model, contents = checkpoint.load_model(folder / f"model_{epoch}.pt")
        losses, counts = evaluate(model, data.batches(test_set, 300), "cpu")
        assert contents["epoch"] == epoch and contents["step"] == STEPS / 2 * epoch
        assert losses.reconstruction == pytest.approx(columns["test_recon"][epoch - 1], abs=1e-5)
        assert perplexity(counts) == pytest.approx(columns["perplexity"][epoch - 1], abs=0.2)
        assert contents["test"]["reconstruction"] == pytest.approx(losses.reconstruction, rel=1e-4)
        losses, _ = evaluate(model, data.batches(validation_set, 300), "cpu")
        assert contents["validation"]["codebook"] == pytest.approx(losses.codebook, rel=1e-4)
        assert losses.reconstruction == pytest.approx(columns["val_recon"][epoch - 1], abs=1e-5)
    best = int(np.argmin(columns["val_recon"])) + 1
    assert (folder / "best.pt").read_bytes() == (folder / f"model_{best}.pt").read_bytes()
    last = checkpoint.load(folder / "last.pt")
    assert set(last["training"]) == {"settings", "progress", "optimizer", "schedule", "random", "bfloat16",
                                     "environments", "x_axis"}
    assert all(torch.equal(last["model"][name], value) for name, value in model.state_dict().items())


def test_codebook_does_not_collapse(trained):
    assert track(trained)["used"][-1] > 200


def test_same_seed_gives_identical_weights(mnist_folder, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        result = run_script("VQ-VAE.py", "--data-folder", mnist_folder, "--num-epochs", 2, "--batch-size", 50, "--k",
                            64, "--output-folder", "run", cwd=tmp_path / name)
        assert result.returncode == 0, result.stderr
    for name in ("model_1.pt", "model_2.pt", "best.pt", "last.pt"):
        contents = [checkpoint.load(tmp_path / folder / "models" / "run" / name) for folder in ("one", "two")]
        for key, value in contents[0]["model"].items():
            assert torch.equal(value, contents[1]["model"][key]), key


def test_finished_run_is_replaced_only_with_overwrite(trained, tmp_path):
    for folder in ("models", "logs"):
        shutil.copytree(trained / folder, tmp_path / folder)
    user_files = {"notes.txt", "classifier.pt", "model_mine.pt", "model_1_my_favourite.pt", "model_2024-05-01.pt"}
    for name in user_files:
        (tmp_path / "models" / "run" / name).write_text("mine")
    (tmp_path / "models" / "run" / "prior.pt").write_text("of the model that is replaced")
    (tmp_path / "logs" / "run" / "00002" / "codebook" / "mine.txt").write_text("mine")
    before = snapshot(tmp_path)
    refused = run_script("VQ-VAE.py", *TRAIN_ARGS, cwd=tmp_path)
    assert refused.returncode == 2 and "--overwrite" in refused.stderr and "models/run" in refused.stderr
    assert snapshot(tmp_path) == before

    result = run_script("VQ-VAE.py", *TRAIN_ARGS, "--num-epochs", 1, "--seed", 1, "--overwrite", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {path.name for path in (tmp_path / "models" / "run").iterdir()} == {
        "args.json", "best.pt", "last.pt", "model_1.pt", "track.txt", *user_files}
    assert {path.name for path in (tmp_path / "logs" / "run").iterdir() if path.is_dir()} == {"00001", "00002"}
    assert [path.name for path in (tmp_path / "logs" / "run" / "00002").rglob("*.*")] == ["mine.txt"]
    assert len(list((tmp_path / "logs" / "run").glob("events.out.tfevents.*"))) == 1
    assert track(tmp_path)["epoch"] == [1]
    paths = (folder / "models" / "run" / "model_1.pt" for folder in (trained, tmp_path))
    first, second = (checkpoint.load(path)["model"] for path in paths)
    assert not torch.equal(first["encoder.0.weight"], second["encoder.0.weight"])


def test_mnist_files_train_with_the_published_flags(mnist_folder, tmp_path):
    result = run_script("VQ-VAE.py", "--output-folder", "a/b", "--data-folder", mnist_folder, "--device", "cpu",
                        "--hidden-size", 16, "--k", 32, "--batch-size", 100, "--num_epoch", 1, "--lr", 2e-4,
                        "--beta", 0.5, "--num-workers", 1, "--codebook-init", "uniform", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    contents = checkpoint.load(tmp_path / "models" / "a" / "b" / "best.pt")
    assert contents["dataset"] == {"name": "MNIST", "shape": [1, 28, 28]}
    assert contents["config"] == {"channels": 1, "hidden_size": 16, "num_codes": 32, "downsample": 4, "quantizer": "vq",
                                  "codebook_update": "gradient", "codebook_init": "uniform", "restart_after": 20}
    assert contents["step"] == 6
    run = events(tmp_path / "logs" / "a" / "b")
    parts = {name: run.Scalars(f"loss/train/{name}")[0].value for name in LOSSES}
    assert parts["total"] == pytest.approx(parts["reconstruction"] + parts["codebook"] + 0.5 * parts["commitment"])


def test_nonfinite_loss_ends_the_run_with_a_one_line_error(tmp_path):
    result = run_script("VQ-VAE.py", "--dataset", "MNIST-10k", "--batch-size", 1000, "--hidden-size", 8, "--k", 16,
                        "--lr", 1e30, cwd=tmp_path)
    assert result.returncode == 2 and "--lr 1e+30: the " in result.stderr and result.stderr.count("\n") == 1
    assert re.search(r"loss of step \d, in epoch 1, is (inf|nan): try a lower rate", result.stderr)
    assert [path.name for path in (tmp_path / "models" / "vqvae").glob("*.pt")] == ["last.pt"]
    assert checkpoint.load_model(tmp_path / "models" / "vqvae" / "last.pt")[1]["step"] == 0


def test_importing_a_script_has_no_side_effects(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py", "evaluate.py", "docs/figures.py"):
        assert import_script(name).get_parser().parse_args([])
    assert not list(tmp_path.iterdir())
