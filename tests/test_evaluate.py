"""evaluate.py as a user runs it, its figures against plain NumPy."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, give_up_privileges, import_script, run_script, snapshot

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


def refuse(arguments, capsys):
    """Run main() on arguments that it must refuse before it has measured anything. → its one line."""
    with pytest.raises(SystemExit) as stopped:
        import_script("evaluate.py").main(list(map(str, arguments)))
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and said.err.count("\n") == 1
    return said.err


def test_a_json_file_that_cannot_be_written_is_refused_before_the_work(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "old.json").write_text("mine")
    shutil.copy(trained / "models" / "run" / "best.pt", "model.pt")
    before = snapshot(tmp_path)
    for name, words in (("no/x.json", "there is no folder no"), ("folder.json", "is a folder"),
                        ("model.pt", "is a file that is to be read")):
        assert f"--json {name}: {words}" in refuse(["--model", "model.pt", "--json", name], capsys)
    assert "--model missing.pt" in refuse(["--model", "missing.pt", "--json", "old.json"], capsys)
    assert snapshot(tmp_path) == before


def test_a_json_folder_without_permission_is_refused_before_the_work(trained, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = run_script("evaluate.py", "--model", trained / "models" / "run" / "best.pt",
                                  "--json", "locked/x.json", cwd=tmp_path, prepare=give_up_privileges)
    assert done.returncode == 2 and done.stdout == "" and "--json locked/x.json: no permission" in done.stderr


def test_json_goes_through_links_and_pipes(trained, tmp_path):
    (tmp_path / "target.json").write_text("old")
    (tmp_path / "link.json").symlink_to("target.json")
    model = trained / "models" / "run" / "best.pt"
    for name in ("link.json", "/dev/stdout"):
        done = run_script("evaluate.py", "--model", model, "--json", name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "link.json").is_symlink()
    assert json.loads((tmp_path / "target.json").read_text())["images"] == 1000
    assert '"images": 1000' in done.stdout


@pytest.mark.parametrize("name, value", [("decoder.6.bias", np.nan), ("encoder.5.block.5.bias", 1e25)])
def test_weights_that_give_no_numbers_are_named(name, value, trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    contents = checkpoint.load(trained / "models" / "run" / "best.pt")
    contents["model"][name][:] = value
    torch.save(contents, "broken.pt")
    assert "--model broken.pt" in refuse(["--model", "broken.pt", "--json", "x.json"], capsys)
    assert not (tmp_path / "x.json").exists()
