"""train_prior.py, generate.py --input prior and evaluate.py --prior from the command line."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import ROOT, events, import_script, run_script, snapshot
from PIL import Image

import checkpoint
import data
from data.code_maps import CodeMaps, offsets_up_to, shift_images
from metrics.classifier import DigitTransformer
from prior import CodePrior, GatedMLP
from utils.memory import samples_that_fit

SMALL_FLAGS = ("--dataset", "MNIST-10k", "--layers", "1", "--width", "32", "--heads", "4", "--num-epochs", "2",
               "--batch-size", "64", "--shift", "0")


@pytest.fixture(scope="module")
def folder(trained, tmp_path_factory):
    """A folder with a VQ-VAE and a small prior in models/run, and the prior's logs in logs/run. Read-only."""
    folder = tmp_path_factory.mktemp("prior")
    (folder / "models" / "run").mkdir(parents=True)
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "models" / "run")
    result = run_script("train_prior.py", "--model", "models/run/best.pt", *SMALL_FLAGS, cwd=folder)
    assert result.returncode == 0, result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    return folder


def track(folder):
    """{column: values} of the text track of the prior."""
    header, *lines = (folder / "models" / "run" / "prior-track.txt").read_text().splitlines()
    return dict(zip(header.split(), np.array([[float(cell) for cell in line.split()] for line in lines]).T))


def test_prior_is_saved_and_logged_next_to_its_model(folder):
    assert {path.name for path in (folder / "models" / "run").iterdir()} == {
        "best.pt", "prior.pt", "prior-last.pt", "prior-track.txt"}
    run, columns = events(folder / "logs" / "run"), track(folder)
    assert set(run.Tags()["scalars"]) == {"prior/train", "prior/validation", "prior/test", "prior/bits_per_dimension"}
    assert [event.step for event in run.Images("prior/samples")] == [1, 2]
    for column, tag in (("train_nats", "prior/train"), ("val_nats", "prior/validation"), ("test_nats", "prior/test"),
                        ("bits_per_dimension", "prior/bits_per_dimension")):
        assert np.allclose([event.value for event in run.Scalars(tag)], columns[column], atol=1e-4)
    stdout = (folder / "stdout.txt").read_text()
    assert "models/run/prior.pt" in stdout and "--input prior" in stdout
    assert "for MNIST-10k: 8,250 images, 750 to validate, 1,000 to test.\n" in stdout
    page = (ROOT / "docs" / "tensorboard.md").read_text()
    assert all(f"`{tag}`" in page for tag in run.Tags()["scalars"] + run.Tags()["images"])


def test_prior_test_loss_is_correct_and_beats_a_unigram_model(folder):
    run = folder / "models" / "run"
    model, _ = checkpoint.load_model(run / "best.pt")
    prior, contents = checkpoint.load_prior(run / "prior.pt", run / "best.pt")
    train_set, test_set = data.load("MNIST-10k", "MNIST")
    sets = *data.hold_out(train_set), test_set
    with torch.no_grad():
        train, validation, test = (torch.cat([model.encode(data.to_model_range(chunk))
                                              for chunk in part.images.split(500)]) for part in sets)
        validation_nats, nats = (-prior.log_prob(maps, part.labels).double().mean().item() / 49
                                 for maps, part in ((validation, sets[1]), (test, test_set)))
    assert nats == pytest.approx(contents["test"]["nats_per_code"], abs=1e-4)
    assert validation_nats == pytest.approx(contents["validation"]["nats_per_code"], abs=1e-4)
    assert validation_nats == pytest.approx(track(folder)["val_nats"].min(), abs=1e-4)
    assert contents["test"]["bits_per_dimension"] == pytest.approx(nats * 49 / math.log(2) / 784, rel=1e-4)
    assert nats == pytest.approx(track(folder)["test_nats"][contents["epoch"] - 1], abs=1e-4)
    shares = (torch.bincount(train.flatten(), minlength=512) + 1) / (train.numel() + 512)
    unigram = -shares[test].log().mean().item()
    assert nats < unigram - 0.3 and unigram < math.log(512)


def test_shifted_images_match_numpy_pad_and_crop():
    images = torch.randint(256, (3, 1, 6, 5), dtype=torch.uint8)
    for dy, dx in ((0, 0), (1, 0), (-1, 2), (2, -1)):
        padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
        assert np.array_equal(shift_images(images, dy, dx), padded[:, :, 2 - dy:8 - dy, 2 - dx:7 - dx])


def test_offsets_start_at_zero_and_are_unique():
    offsets = offsets_up_to(1)
    assert offsets[0] == (0, 0) and len(offsets) == 9
    assert set(offsets) == {(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)}


def test_epoch_has_each_image_once_with_its_label_and_shift():
    script, generator = import_script("train_prior.py"), torch.Generator().manual_seed(0)
    # All entries of the map of image n with shift s are 20·s + n. The label of image n is n.
    train = torch.arange(60).view(3, 20, 1, 1).expand(-1, -1, 2, 2)
    maps, orders = CodeMaps(train, torch.arange(20), None, None, None, None), []
    for _epoch in range(2):
        batches = list(script.epoch_batches(maps, generator, batch_size=6))
        assert [len(labels) for _, labels, _ in batches] == [6, 6, 6, 2]
        codes, labels, shifts = (torch.cat(parts) for parts in zip(*batches))
        assert (codes == (20 * shifts + labels).view(-1, 1, 1)).all()
        assert sorted(labels.tolist()) == list(range(20)) and set(shifts.tolist()) == {0, 1, 2}
        orders.append(labels.tolist())
    assert orders[0] != orders[1]


def test_learning_rate_warms_up_and_decays_to_zero():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = import_script("train_prior.py").warm_up_then_cosine(optimizer, 100)
    rates = []
    for _ in range(100):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2, 2])
    assert rates[5:] == pytest.approx([1 + math.cos(math.pi * i / 95) for i in range(95)])


def test_generate_samples_from_the_prior_next_to_the_model(folder, tmp_path):
    pictures = {}
    for name, arguments in (("a", []), ("b", ["--seed", 0, "--prior", folder / "models" / "run" / "prior.pt"]),
                            ("c", ["--seed", 1]), ("d", ["--label", 3, "--temperature", 0.5, "--top-k", 5,
                                                         "--guidance", 2])):
        result = run_script("generate.py", "--model", folder / "models" / "run" / "best.pt", "--input", "prior",
                            "--filename", name, *arguments, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        pictures[name] = np.array(Image.open(tmp_path / "generatedImages" / f"{name}.png").convert("L")).astype(int)
    assert np.array_equal(pictures["a"], pictures["b"]) and not np.array_equal(pictures["a"], pictures["c"])

    model, _ = checkpoint.load_model(folder / "models" / "run" / "best.pt")
    prior, _ = checkpoint.load_prior(folder / "models" / "run" / "prior.pt", folder / "models" / "run" / "best.pt")
    for name, labels, flags in (("a", torch.arange(10).repeat_interleave(10), ()),
                                ("d", torch.full((100,), 3), (0.5, 5, 2))):
        with torch.no_grad():
            images = model.decode(prior.sample(labels, *flags, generator=torch.Generator().manual_seed(0)))
        expected = images.add(1).mul(127.5).squeeze(1).numpy()
        cells = np.array([pictures[name][2 + 30 * i:, 2 + 30 * j:][:28, :28] for i in range(10) for j in range(10)])
        assert np.abs(cells - expected).max() <= 1


def test_evaluate_measures_the_prior_and_its_samples(folder, tmp_path, monkeypatch, capsys):
    run, script = folder / "models" / "run", import_script("evaluate.py")
    monkeypatch.setattr(script, "NUM_SAMPLES", 600)
    monkeypatch.setattr(script, "MAX_COMPARED", 150)
    torch.manual_seed(0)
    transformer = DigitTransformer().eval()         # it has learned nothing, but measures
    checkpoint.save(tmp_path / "second.pt", {"format": 1, "kind": "classifier", "dataset": "MNIST", "config": {
        "architecture": "transformer"}, "model": transformer.state_dict()})
    monkeypatch.setattr(checkpoint, "CLASSIFIERS", (checkpoint.CLASSIFIER, tmp_path / "second.pt"))
    script.main(["--model", str(run / "best.pt"), "--prior", str(run / "prior.pt"), "--seed", "1",
                 "--temperature", "0.8", "--json", str(tmp_path / "out.json")])
    output = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out.json").read_text())["prior"]
    model, _ = checkpoint.load_model(run / "best.pt")
    prior, contents = checkpoint.load_prior(run / "prior.pt", run / "best.pt")
    classifier, _ = checkpoint.load_classifier(checkpoint.CLASSIFIER)
    _, test_set = data.load("MNIST-10k", "MNIST")
    assert metrics["nats_per_code"] == pytest.approx(contents["test"]["nats_per_code"], abs=1e-4)
    assert metrics["bits_per_dimension"] == pytest.approx(contents["test"]["bits_per_dimension"], abs=1e-4)

    def accuracy(images, labels, judge=classifier):
        return (judge(images).argmax(dim=1) == labels).double().mean().item()

    generator, labels = torch.Generator().manual_seed(1), torch.arange(10).repeat_interleave(60)
    with torch.no_grad():
        maps = torch.cat([prior.sample(chunk, 0.8, generator=generator)
                          for chunk in labels.split(samples_that_fit(prior))])
        samples = model.decode(maps)
        sample_accuracy = accuracy(samples, labels)
        x = data.to_model_range(test_set.images)
        reconstruction_accuracy = accuracy(model(x).reconstruction, test_set.labels)
        test_accuracy = accuracy(x, test_set.labels)
        second_accuracies = accuracy(samples, labels, transformer), accuracy(x, test_set.labels, transformer)
        sample_mean, test_mean = (classifier.features(images).mean(dim=0) for images in (samples, x))
        mean_distance = (sample_mean - test_mean).square().sum().item()
    assert metrics["samples"]["recognised"] == pytest.approx(sample_accuracy, abs=0.002)
    assert metrics["reconstructions"]["recognised"] == pytest.approx(reconstruction_accuracy, abs=0.002)
    assert metrics["test_set"]["recognised"] == pytest.approx(test_accuracy, abs=0.002)
    second = metrics["second_classifier"]
    assert [second[name]["recognised"] for name in ("samples", "test_set")] == pytest.approx(
        second_accuracies, abs=0.002)
    assert metrics["samples"]["recognised_error"] == pytest.approx(
        math.sqrt(sample_accuracy * (1 - sample_accuracy) / 600), rel=0.05)
    assert metrics["samples"]["frechet"] > mean_distance > 0                    # the term of the means
    assert abs(metrics["test_set"]["frechet"]) < 1e-3 < metrics["reconstructions"]["frechet"]
    assert metrics["samples"]["frechet"] < metrics["random"]["frechet"]
    assert metrics["random"]["recognised"] < 0.2

    assert metrics["random"]["precision"] < metrics["samples"]["precision"] < metrics["reconstructions"]["precision"]
    assert metrics["random"]["recall"] < min(metrics[name]["recall"] for name in ("samples", "reconstructions"))
    for figures in (metrics, second):
        assert figures["test_set"]["precision"] == figures["test_set"]["recall"] == 1
        section = output.split(f"\n{figures['classifier']}\n")[1].split("\n\n")[0]
        rows = re.findall(r"^(\S.+?) {2,}([\d.]+)% ± ([\d.]+)% +-?([\d.]+) +([\d.]+)% ± \S+ +([\d.]+)% ± ", section,
                          flags=re.MULTILINE)
        table = {name: list(map(float, values)) for name, *values in rows}
        for title, name in (("600 samples", "samples"), ("reconstructed test set", "reconstructions"),
                            ("decoded noise", "random"), ("test set", "test_set")):
            row = figures[name]
            assert table[title] == pytest.approx([
                100 * row["recognised"], 100 * row["recognised_error"], abs(row["frechet"]), 100 * row["precision"],
                100 * row["recall"]], abs=0.0051)
    # Of training images moved by a pixel nearly all are found, and of new images a hundredth, more or less.
    found = metrics["copies"]
    assert found["noisy_copies"]["flagged"] > 0.95 and found["noisy_copies"]["images"] == 150
    assert found["test_set"]["flagged"] <= 0.02 and found["samples"]["flagged"] < 0.1
    assert f"{100 * found['samples']['flagged']:.2f}% ± {100 * found['samples']['flagged_error']:.2f}%" in output


def test_bad_input_gets_one_line_errors(folder, tmp_path, monkeypatch, capsys):
    shutil.copytree(folder / "models", tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    contents = checkpoint.load("models/run/best.pt")
    checkpoint.save("other.pt", {**contents, "epoch": 99})
    (tmp_path / "sub").mkdir()
    checkpoint.save("sub/prior.pt", contents)
    checkpoint.save("wide.pt", {**contents, "dataset": {"name": "MNIST", "shape": [1, 32, 32]}})
    nan_prior = torch.load("models/run/prior.pt", weights_only=True)
    nan_prior["model"]["head.bias"][3] = torch.nan
    torch.save(nan_prior, "broken.pt")
    before = snapshot(tmp_path)
    model, prior = ["--model", "models/run/best.pt"], ["--input", "prior"]
    for script, arguments, words in (
            ("generate.py", [*model, *prior, "--label", "10"], "--label 10: the prior knows the classes 0 to 9: 0, 1"),
            ("generate.py", [*model, *prior, "--temperature", "0"], "--temperature: '0'"),
            ("generate.py", [*model, *prior, "--temperature", "-1"], "--temperature: '-1'"),
            ("generate.py", [*model, *prior, "--top-k", "0"], "--top-k: '0'"),
            ("generate.py", [*model, *prior, "--guidance", "much"], "--guidance: 'much'"),
            ("generate.py", [*model, *prior, "--prior", "no.pt"], "--prior no.pt: No such file"),
            ("generate.py", [*model, *prior, "--prior", "other.pt"], "not a checkpoint of a prior"),
            ("generate.py", ["--model", "other.pt", *prior], "--prior prior.pt: the model has no prior yet"),
            ("generate.py", ["--model", "other.pt", *prior, "--prior", "models/run/prior.pt"],
             "belongs to another VQ-VAE than other.pt"),
            ("generate.py", ["--model", "models/run/prior.pt", *prior], "not a checkpoint of a VQ-VAE"),
            ("generate.py", [*model, "--label", "3"], "--label 3: is used only with --input prior"),
            ("generate.py", [*model, "--input", "random", "--temperature", "0.5"], "--temperature 0.5: is used only"),
            ("evaluate.py", [*model, "--guidance", "2"], "--guidance 2.0: is used only with --prior"),
            ("evaluate.py", [*model, "--prior", "no.pt"], "--prior no.pt: No such file"),
            ("evaluate.py", ["--model", "other.pt", "--prior", "models/run/prior.pt"], "another VQ-VAE than other.pt"),
            ("evaluate.py", [*model, "--prior", "models/run/prior.pt", "--classifier", "other.pt"],
             "--classifier other.pt: the file is not a checkpoint of a classifier"),
            ("train_prior.py", model, "--model models/run/best.pt: models/run/prior.pt: exists"),
            ("train_prior.py", ["--model", "other.pt", "--width", "10"], "--heads 6 --width 10"),
            ("train_prior.py", ["--model", "other.pt", "--dropout", "1"], "--dropout: '1' is not a number of at"),
            ("train_prior.py", ["--model", "other.pt", "--shift", "5"], "'5' is not an integer from 0 to 4"),
            ("train_prior.py", ["--model", "other.pt", "--width", "1200000000000"], "no memory for a model"),
            ("train_prior.py", ["--model", "sub/prior.pt", "--overwrite"], "exists and is not a prior"),
            ("train_prior.py", ["--model", "wide.pt"], "--model wide.pt: its images are [1, 32, 32]"),
            ("evaluate.py", [*model, "--prior", "models/run/prior.pt", "--json", "models/run/prior.pt",
                             "--overwrite"], "--json models/run/prior.pt: exists and is not a file of figures"),
            ("generate.py", [*model, *prior, "--guidance", "1e39"], "--guidance: '1e39'"),
            ("generate.py", [*model, *prior, "--prior", "broken.pt"], "--prior broken.pt: the checkpoint's"),
            ("train_prior.py", ["--model", "no.pt"], "--model no.pt")):
        with pytest.raises(SystemExit) as excinfo:
            import_script(script).main([*arguments, *["--dataset", "MNIST-10k"] * (script != "generate.py")])
        captured = capsys.readouterr()
        assert excinfo.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1, captured.err
        assert words in captured.err, captured.err
    assert snapshot(tmp_path) == before


def test_best_epoch_is_kept_and_a_rising_loss_stops_training(folder, mnist_folder, tmp_path, monkeypatch,
                                                                      capsys):
    # Two losses per epoch: on the validation set and on the test set, which would choose another one.
    script, losses = import_script("train_prior.py"), iter([3.0, 3.1, 2.0, 2.4, 2.5, 2.6, 2.6, 1.5, 2.1, 1.2, 1.0, 1.0])
    (tmp_path / "models" / "run").mkdir(parents=True)
    shutil.copy(folder / "models" / "run" / "best.pt", tmp_path / "models" / "run")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "nats_per_code", lambda *_: next(losses))
    monkeypatch.setattr(script.Trainer, "batches", lambda trainer, _: setattr(trainer.state, "images", 1) or ())
    script.main(["--model", "models/run/best.pt", "--dataset", "MNIST", "--data-folder", str(mnist_folder), "--shift",
                 "0", "--width", "12", "--drop-label", "0.3", "--dropout", "0.2"])
    _, contents = checkpoint.load_prior("models/run/prior.pt", "models/run/best.pt")
    assert contents["epoch"] == 2 and contents["test"]["nats_per_code"] == 2.4
    assert contents["validation"] == {"nats_per_code": 2.0} and contents["model"]["tail"].any()
    assert contents["config"]["drop_label"] == 0.3 and contents["config"]["dropout"] == 0.2
    assert track(tmp_path)["epoch"].tolist() == [1, 2, 3, 4, 5]
    assert "has not fallen for 3 epochs" in capsys.readouterr().out


def test_resumed_run_of_an_earlier_version_keeps_the_header_of_its_track(folder, tmp_path, monkeypatch):
    """Its last column but one was called bits_per_pixel, for the same figure."""
    for name in ("models", "logs"):
        shutil.copytree(folder / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    contents = torch.load("models/run/prior-last.pt", weights_only=True)
    lines = contents["training"]["progress"]["track"]
    lines[0] = lines[0].replace("bits_per_dimension", "bits_per_pixel")
    checkpoint.save("models/run/prior-last.pt", contents)
    script = import_script("train_prior.py")
    monkeypatch.setattr(script, "nats_per_code", lambda *_: 1.5)
    monkeypatch.setattr(script.Trainer, "batches", lambda trainer, _: setattr(trainer.state, "images", 1) or ())
    script.main(["--model", "models/run/best.pt", "--resume", "--num-epochs", "3", "--sample-every", "0"])
    columns = track(tmp_path)
    assert list(columns) == ["epoch", "train_nats", "val_nats", "test_nats", "bits_per_pixel", "seconds"]
    assert columns["epoch"].tolist() == [1, 2, 3]
    assert columns["bits_per_pixel"][2] == pytest.approx(1.5 * 49 / math.log(2) / 784, abs=1e-4)
    assert columns["bits_per_pixel"][:2].tolist() == track(folder)["bits_per_dimension"].tolist()


def test_resumed_run_of_an_earlier_version_keeps_its_plain_mlps(folder, tmp_path, monkeypatch):
    """Its configuration does not say whether they are gated. New ones are."""
    (tmp_path / "models" / "run").mkdir(parents=True)
    shutil.copy(folder / "models" / "run" / "best.pt", tmp_path / "models" / "run")
    monkeypatch.chdir(tmp_path)
    script = import_script("train_prior.py")
    flags = "--model", "models/run/best.pt", "--sample-every", "0", "--num-epochs"
    monkeypatch.setattr(script, "nats_per_code", lambda *_: 1.5)
    with monkeypatch.context() as patch:
        patch.setattr(script, "CodePrior", lambda gated, **config: CodePrior(**config))
        script.main([*SMALL_FLAGS, *flags, "1"])
    contents = torch.load("models/run/prior-last.pt", weights_only=True)
    del contents["config"]["gated"]
    checkpoint.save("models/run/prior-last.pt", contents)
    script.main(["--resume", *flags, "2"])
    prior, contents = checkpoint.load_prior("models/run/prior-last.pt", "models/run/best.pt")
    assert contents["epoch"] == 2 and isinstance(prior.blocks[0].perceptron, torch.nn.Sequential)
    prior, contents = checkpoint.load_prior(folder / "models" / "run" / "prior.pt", "models/run/best.pt")
    assert contents["config"]["gated"] and isinstance(prior.blocks[0].perceptron, GatedMLP)


def test_overwrite_replaces_only_the_prior_and_its_logs(folder, mnist_folder, tmp_path):
    for name in ("models", "logs"):
        shutil.copytree(folder / name, tmp_path / name)
    (tmp_path / "logs" / "run" / "events.out.tfevents.1.vqvae.0").write_bytes(b"")
    result = run_script("train_prior.py", "--model", "models/run/best.pt", *SMALL_FLAGS, "--num-epochs", 1, "--seed", 1,
                        "--dataset", "MNIST", "--data-folder", mnist_folder, "--overwrite", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert track(tmp_path)["epoch"].tolist() == [1]
    names = [path.name for path in (tmp_path / "logs" / "run").iterdir()]
    assert len(names) == 2 and "events.out.tfevents.1.vqvae.0" in names
    models = [(root / "models" / "run" / "best.pt").read_bytes() for root in (folder, tmp_path)]
    assert models[0] == models[1]
