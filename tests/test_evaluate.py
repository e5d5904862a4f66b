"""evaluate.py as a user runs it, its figures against plain NumPy."""

import json
import re

import numpy as np
import pytest
import torch
from helpers import bundled_digits, import_script, run_script, snapshot

import checkpoint


@pytest.fixture(scope="module")
def measured(trained, tmp_path_factory):
    """What evaluate.py printed about the trained model, and the JSON that it wrote."""
    folder = tmp_path_factory.mktemp("measured")
    model = trained / "models" / "run" / "best.pt"
    done = run_script("evaluate.py", "--model", model, "--json", "out.json", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in folder.iterdir()] == ["out.json"]
    return done.stdout, json.loads((folder / "out.json").read_text())


def test_figures_agree_with_numpy_over_the_whole_test_set(trained, measured):
    _, figures = measured
    model, _ = checkpoint.load_model(trained / "models" / "run" / "best.pt")
    digits = bundled_digits()[0][9000:].astype(np.float64)                          # (1000, 28, 28)
    with torch.no_grad():
        output = model(torch.from_numpy(digits / 127.5 - 1).float().unsqueeze(1))
    drawn = (output.reconstruction.squeeze(1).double().numpy() + 1) / 2             # in [0, 1]
    mse = np.square(drawn - digits / 255).mean()
    assert figures["mse"] == pytest.approx(4 * mse, rel=1e-4)                       # [-1, 1] is twice as wide
    assert figures["psnr"] == pytest.approx(10 * np.log10(1 / mse), rel=1e-5)
    error = np.square((output.z_e - output.z_q).double().numpy()).mean()
    assert figures["codebook_loss"] == pytest.approx(error, rel=1e-4)

    _, counts = np.unique(output.indices, return_counts=True)
    shares = counts / counts.sum()
    assert abs(figures["codes_used"] - len(counts)) <= 1 and figures["codes"] == 512    # rounding may move a latent
    assert figures["perplexity"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-3)
    assert figures["bits_per_pixel"] == 9 * 49 / 784
    assert figures["images"] == 1000 and figures["dataset"] == "MNIST-10k"


def test_table_holds_the_figures_of_the_json(measured):
    said, figures = measured
    assert figures["model"] in said and "1,000" in said and "MNIST-10k" in said and "out.json" in said
    rows = dict(re.findall(r"^(\w[\w ]+?) {2,}([\d.]+)  ", said, flags=re.MULTILINE))
    names = {"test MSE": "mse", "PSNR": "psnr", "codebook loss": "codebook_loss", "perplexity": "perplexity",
             "codes used": "codes_used", "bits per pixel": "bits_per_pixel"}
    assert set(rows) == set(names)
    for row, name in names.items():
        decimals = len(rows[row].partition(".")[2])
        assert float(rows[row]) == round(figures[name], decimals)


def test_another_data_set_may_be_measured(trained, mnist_folder, tmp_path):
    done = run_script("evaluate.py", "--model", trained / "models" / "run" / "best.pt", "--dataset", "MNIST",
                      "--data-folder", mnist_folder, cwd=tmp_path)
    assert done.returncode == 0 and "200 test images of MNIST" in done.stdout
    assert not list(tmp_path.iterdir())


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text("mine")
    before = snapshot(tmp_path)
    model = str(trained / "models" / "run" / "best.pt")
    for arguments, words in ((["--json", "no/x.json", "--model", model], "--json no/x.json: there is no folder no"),
                             (["--json", "folder.json", "--model", model], "--json folder.json: is a folder"),
                             (["--json", "old.json", "--model", "missing.pt"], "--model missing.pt")):
        with pytest.raises(SystemExit) as stopped:
            import_script("evaluate.py").main(arguments)
        said = capsys.readouterr()
        assert stopped.value.code == 2 and said.out == "" and words in said.err and said.err.count("\n") == 1
    assert snapshot(tmp_path) == before


def test_weights_that_give_no_numbers_are_named(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = checkpoint.load(trained / "models" / "run" / "best.pt")
    contents["model"]["decoder.6.bias"][:] = torch.nan
    torch.save(contents, "nan.pt")
    with pytest.raises(SystemExit) as stopped:
        import_script("evaluate.py").main(["--model", "nan.pt"])
    assert stopped.value.code == 2 and "--model nan.pt" in capsys.readouterr().err
