"""evaluate.py from the command line, its metrics against plain NumPy."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, drop_capabilities, import_script, run_script, snapshot
from PIL import Image

import checkpoint
import data


@pytest.fixture(scope="module")
def evaluated(trained, tmp_path_factory):
    """stdout and JSON of evaluate.py for the trained model."""
    folder = tmp_path_factory.mktemp("evaluated")
    model = trained / "models" / "run" / "best.pt"
    result = run_script("evaluate.py", "--model", model, "--json", "out.json", cwd=folder)
    assert result.returncode == 0, result.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"]
    return result.stdout, json.loads((folder / "out.json").read_text())


def test_metrics_match_numpy_over_the_test_set(trained, evaluated):
    _, metrics = evaluated
    model, _ = checkpoint.load_model(trained / "models" / "run" / "best.pt")
    digits = bundled_digits()[0][9000:].astype(np.float64)                          # (1000, 28, 28)
    with torch.no_grad():
        output = model(torch.from_numpy(digits / 127.5 - 1).float().unsqueeze(1))
    reconstruction = (output.reconstruction.squeeze(1).double().numpy() + 1) / 2    # in [0, 1]
    mse = np.square(reconstruction - digits / 255).mean()
    assert metrics["mse"] == pytest.approx(4 * mse, rel=1e-4)                       # the range [-1, 1] is twice as wide
    assert metrics["psnr"] == pytest.approx(10 * np.log10(1 / mse), rel=1e-5)
    squared_error = np.square((output.z_e - output.z_q).double().numpy()).mean()
    assert metrics["codebook_loss"] == pytest.approx(squared_error, rel=1e-4)

    _, counts = np.unique(output.indices, return_counts=True)
    shares = counts / counts.sum()
    assert metrics["codes"] == 512
    assert abs(metrics["codes_used"] - len(counts)) <= 1                            # a latent may round to another code
    assert metrics["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert metrics["bits_per_dimension"] == 9 * 49 / 784
    assert metrics["images"] == 1000 and metrics["dataset"] == "MNIST-10k"


def test_printed_table_matches_the_json(evaluated):
    stdout, metrics = evaluated
    assert metrics["model"] in stdout and "1,000" in stdout and "MNIST-10k" in stdout and "out.json" in stdout
    rows = dict(re.findall(r"^(\w[\w ]+?) {2,}([\d.]+)  ", stdout, flags=re.MULTILINE))
    names = {"test MSE": "mse", "PSNR": "psnr", "codebook loss": "codebook_loss", "perplexity": "perplexity",
             "codes used": "codes_used", "bits per dimension": "bits_per_dimension"}
    assert set(rows) == set(names)
    for row, name in names.items():
        decimals = len(rows[row].partition(".")[2])
        assert float(rows[row]) == round(metrics[name], decimals)


def test_evaluate_accepts_another_data_set(trained, mnist_folder, tmp_path):
    result = run_script("evaluate.py", "--model", trained / "models" / "run" / "best.pt", "--dataset", "MNIST",
                        "--data-folder", mnist_folder, cwd=tmp_path)
    assert result.returncode == 0 and "200 test images of MNIST\ntest MSE" in result.stdout    # it has seen MNIST-10k
    assert not list(tmp_path.iterdir())


def test_images_that_the_model_has_seen_are_not_called_a_test(mnist_folder, monkeypatch, capsys, tmp_path):
    """The shipped model was trained on MNIST, of which MNIST-10k is a part."""
    monkeypatch.chdir(tmp_path)
    script = import_script("evaluate.py")
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given: [data.Images(*part[:100]) for part in load(*given)])
    script.main(["--dataset", "MNIST-10k", "--json", "seen.json"])
    output = capsys.readouterr().out
    assert "100 images of MNIST-10k\nThe model was trained on MNIST, " in output and "has seen these images" in output
    assert re.search(r"^MSE ", output, flags=re.MULTILINE) and "test images" not in output and "test MSE" not in output
    script.main(["--dataset", "MNIST", "--data-folder", str(mnist_folder), "--json", "new.json"])
    output = capsys.readouterr().out
    assert "test images of MNIST" in output and re.search(r"^test MSE ", output, flags=re.MULTILINE)
    assert "trained on" not in output
    assert [json.loads((tmp_path / name).read_text())["seen_in_training"] for name in ("seen.json", "new.json")] == [
        True, False]


def test_what_prior_and_classifiers_have_seen_is_said(mnist_folder, monkeypatch, capsys, tmp_path):
    """The shipped ones were trained on MNIST."""
    monkeypatch.chdir(tmp_path)
    script, load = import_script("evaluate.py"), data.load
    monkeypatch.setattr(data, "load", lambda *given: [data.Images(*part[:64]) for part in load(*given)])
    monkeypatch.setattr(script, "NUM_SAMPLES", 20)
    for words, noted in ((["--dataset", "MNIST-10k"], True), (["--data-folder", str(mnist_folder)], False)):
        script.main([*words, "--prior", str(checkpoint.PRETRAINED_PRIOR)])
        output = capsys.readouterr().out
        for path in (checkpoint.PRETRAINED_PRIOR, *checkpoint.CLASSIFIERS):
            assert (f"{path.name} was trained on MNIST, whose training set has the same digits" in output) == noted
        assert ("looked for among the 64 training images of MNIST-10k, not of MNIST, which" in output) == noted


def test_pairs_are_written_under_the_policy_of_all_outputs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given: [data.Images(*part[:64]) for part in load(*given)])
    script = import_script("evaluate.py")
    monkeypatch.setattr(script, "NUM_SAMPLES", 20)
    prior = str(checkpoint.PRETRAINED_PRIOR)
    words = ["--dataset", "MNIST-10k", "--pairs", "new/pairs.png"]
    line = expect_usage_error(words, capsys)
    assert "--pairs new/pairs.png: is used only with --prior" in line
    words += ["--prior", prior]
    script.main(words)
    output = capsys.readouterr().out
    assert "new/pairs.png" in output and "Copies of training images" in output
    picture = np.array(Image.open("new/pairs.png").convert("L"))
    assert picture.shape == (3 * 122, 3 * 302)                      # four rows of ten, enlarged
    picture = picture[1::3, 1::3]
    digits = bundled_digits()[0][:64]
    nearest = picture[32:60, 2:30]
    assert (digits == nearest).all(axis=(1, 2)).any()               # the second row: training images, unchanged
    tests, nearest = picture[62:90, 2:30], picture[92:120, 2:30]
    assert (bundled_digits()[0][9000:9064] == tests).all(axis=(1, 2)).any()
    assert (digits == nearest).all(axis=(1, 2)).any()
    for ratios in re.findall(r"; ratios (.*)", output):
        closest = [float(ratio) for ratio in ratios.split()]
        assert len(closest) == 10 and closest == sorted(closest) and 0 < closest[0] <= closest[-1] <= 1
    assert output.count("; ratios ") == 2
    assert "--pairs new/pairs.png: exists, replace it with --overwrite" in expect_usage_error(words, capsys)
    (tmp_path / "loop").symlink_to("loop")
    assert "--json loop/x.json: " in expect_usage_error([*words, "--overwrite", "--json", "loop/x.json"], capsys)
    (tmp_path / "new" / "pairs.png").write_text("mine")
    line = expect_usage_error([*words, "--overwrite"], capsys)
    assert "--pairs new/pairs.png: exists and is not a PNG file" in line


def expect_usage_error(arguments, capsys):
    """Run main(), which must exit with status 2 and one line before any evaluation. → that line"""
    with pytest.raises(SystemExit) as excinfo:
        import_script("evaluate.py").main(list(map(str, arguments)))
    captured = capsys.readouterr()
    assert excinfo.value.code == 2 and captured.out == "" and captured.err.count("\n") == 1
    return captured.err


def test_unwritable_json_file_is_rejected_before_evaluation(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "thesis.json").write_text('{"model": "mine"}')
    shutil.copy(trained / "models" / "run" / "best.pt", "model.pt")
    before = snapshot(tmp_path)
    for name, words in (("file/x.json", "file is not a folder"), ("folder.json", "is a folder"),
                        ("model.pt", "exists and is not a file of figures"),
                        ("thesis.json", "exists and is not a file of figures")):
        arguments = ["--model", "model.pt", "--json", name, "--overwrite"]
        assert f"--json {name}: {words}" in expect_usage_error(arguments, capsys)
    assert "--model missing.pt" in expect_usage_error(["--model", "missing.pt", "--json", "new/x.json"], capsys)
    assert "--overwrite: is used only with --json" in expect_usage_error(["--model", "model.pt", "--overwrite"], capsys)
    assert snapshot(tmp_path) == before


def test_json_folder_without_permission_is_rejected_before_evaluation(trained, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    result = run_script("evaluate.py", "--model", trained / "models" / "run" / "best.pt", "--json", "locked/x.json",
                        cwd=tmp_path, prepare=drop_capabilities)
    assert result.returncode == 2 and result.stdout == "" and "--json locked/x.json: no permission" in result.stderr


@pytest.mark.parametrize("name, value", [("decoder.6.bias", np.nan), ("encoder.5.block.5.bias", 1e25)])
def test_nonfinite_outputs_error_names_the_model(name, value, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = checkpoint.load(trained / "models" / "run" / "best.pt")
    contents["model"][name][:] = value
    torch.save(contents, "broken.pt")
    assert "--model broken.pt" in expect_usage_error(["--model", "broken.pt", "--json", "x.json"], capsys)
    assert not (tmp_path / "x.json").exists()
