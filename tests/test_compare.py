"""benchmarks/compare.py: its arithmetic by hand, which runs it puts together, and what it refuses."""

import csv
import json

import pytest
from helpers import expect_usage_error, import_script

compare = import_script("benchmarks/compare.py")
TRACK = "epoch  step  train_recon  val_recon  test_recon  perplexity  used  seconds\n"


def write_run(folder, lines, **settings):
    """A run's folder, with the files that compare.py reads. lines: by epoch val_recon, test_recon, perplexity, used."""
    folder.mkdir(parents=True)
    arguments = {"dataset": "MNIST", "data_folder": str(folder), "lr": 2e-4, "beta": 1.0, "seed": 0, "resume": False,
                 "output_folder": folder.name, "save_every": 0, "environments": []}
    (folder / "args.json").write_text(json.dumps({**arguments, **settings}))
    (folder / "track.txt").write_text(TRACK + "".join(
        f"{epoch:5}  {epoch:4}  0.5  {'  '.join(map(str, values))}  1.5\n" for epoch, values in enumerate(lines, 1)))
    return folder


def table(output):
    """The rows of a Markdown table, each as {column: cell}."""
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.splitlines()]
    return [dict(zip(header, row)) for row in rows]


def test_prior_without_validation_images_is_that_of_the_last_epoch():
    track = [{"epoch": 1, "test_nats": 2.0}, {"epoch": 2, "test_nats": 2.5}]
    figures = compare.figures_of(compare.Run("a", {}, [{"epoch": 1, "test_recon": 0.1}], track))
    assert (figures["prior's best epoch"], figures["prior's test_nats"]) == (2, 2.5)


def test_folder_below_the_root_is_searched():
    with pytest.raises(ValueError, match="there is no run of VQ-VAE"):
        compare.folders_of_runs("/no such folder")


def test_seeds_are_put_together_as_mean_and_standard_deviation(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for seed, (error, used) in enumerate([(0.1, 500), (0.2, 506), (0.4, 512)]):
        write_run(tmp_path / "models" / f"a{seed}", [(0.9, 0.9, 1, 1), (0.5, error, 300, used)], seed=seed,
                  save_every=seed)
    write_run(tmp_path / "models" / "b", [(0.3, 0.7, 200, 40), (0.4, 0.6, 100, 39.5)], beta=0.25)
    (tmp_path / "models" / "b" / "prior-track.txt").write_text(
        "epoch  train_nats  test_nats  bits_per_pixel\n1  3.0  2.5  0.2\n2  2.0  2.25  0.2\n3  1.0  2.75  0.2\n")
    compare.main(["--csv", "table.csv"])
    together, alone = table(capsys.readouterr().out)
    assert (together["run"], together["seed"], together["--beta"]) == ("a0, a1, a2", "0, 1, 2", "1.0")
    assert "--save-every" not in together and "--lr" not in together and "--data-folder" not in together
    # Of 0.1, 0.2 and 0.4: the mean is 0.7 / 3, the deviations from it −4/30, −1/30 and 5/30; of the codes −6, 0 and 6.
    assert together["test_recon"] == f"{0.7 / 3:.5f} ± {((16 + 1 + 25) / 900 / 2) ** 0.5:.5f}"
    assert (together["used"], together["perplexity"], together["epochs"]) == ("506 ± 6", "300.0 ± 0.0", "2")
    # The validation loss chooses the epoch, and the figures of that epoch are shown.
    assert [alone[name] for name in ("run", "--beta", "best epoch", "best test_recon", "test_recon", "used")] == [
        "b", "0.25", "1", "0.70000", "0.60000", "40"]
    assert (alone["prior's best epoch"], alone["prior's test_nats"], together["prior's test_nats"]) == (
        "2", "2.2500", "–")
    first, second = csv.DictReader((tmp_path / "table.csv").read_text().splitlines())
    assert float(first["test_recon"]) == pytest.approx(0.7 / 3)
    assert float(first["test_recon, standard deviation"]) == pytest.approx((42 / 1800) ** 0.5)
    assert second["used"] == "39.5" and second["used, standard deviation"] == ""


def test_runs_of_other_lengths_and_repeated_seeds_stay_apart(tmp_path, capsys):
    write_run(tmp_path / "long", [(1, 1, 1, 1), (1, 1, 1, 1)])
    write_run(tmp_path / "short", [(1, 1, 1, 1)], seed=1)
    write_run(tmp_path / "again", [(1, 1, 1, 1)], seed=1)
    write_run(tmp_path / "begun", [])
    compare.main([str(tmp_path), str(tmp_path / "long")])           # the second one is among those of the first
    captured = capsys.readouterr()
    assert sorted(row["run"] for row in table(captured.out)) == ["again", "long", "short"]
    assert captured.err == "Left out, before the end of their first epoch: begun\n"


def test_without_validation_the_test_loss_or_the_last_epoch_is_taken():
    rows = [{"epoch": 1, "val_recon": None, "test_recon": 0.1}, {"epoch": 2, "val_recon": None, "test_recon": 0.2}]
    assert compare.best_epoch(rows, compare.CHOSEN_BY)["epoch"] == 2        # a run without validation images
    assert compare.best_epoch([{**row, "val_recon": 1 / row["epoch"]} for row in rows], compare.CHOSEN_BY)["epoch"] == 2
    older = [{"epoch": row["epoch"], "test_recon": row["test_recon"]} for row in rows]
    assert compare.best_epoch(older, compare.CHOSEN_BY)["epoch"] == 1


def test_a_real_run_is_read_by_the_folder_of_its_logs(trained, capsys):
    compare.main([str(trained / "logs" / "run")])
    [row] = table(capsys.readouterr().out)
    last = (trained / "models" / "run" / "track.txt").read_text().splitlines()[-1].split()
    assert row["run"] == "run" and row["epochs"] == "2" and row["test_recon"] in last and row["perplexity"] in last


def test_folder_of_all_logs_stands_for_all_runs(tmp_path):
    runs = [write_run(tmp_path / "models" / name, [(1, 1, 1, 1)]) for name in ("a", "b/c")]
    (tmp_path / "logs" / "a").mkdir(parents=True)
    assert compare.folders_of_runs(tmp_path / "logs") == compare.folders_of_runs(tmp_path / "models") == runs


def test_bad_input_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "nowhere: there is no run of VQ-VAE.py in it" in expect_usage_error(
        "benchmarks/compare.py", ["nowhere"], capsys)
    (tmp_path / "loop").symlink_to("loop")
    assert "loop: there is no run" in expect_usage_error("benchmarks/compare.py", ["loop"], capsys)
    run = write_run(tmp_path / "run", [(1, 1, 1, 1)])
    (tmp_path / "other.csv").write_text("a,b\n")
    assert "--overwrite: is used only with --csv" in expect_usage_error(
        "benchmarks/compare.py", [run, "--overwrite"], capsys)
    for flags, words in (([], "exists, replace it with --overwrite"), (["--overwrite"], "is not a table of runs")):
        assert f"--csv other.csv: {words}" in expect_usage_error(
            "benchmarks/compare.py", [run, "--csv", "other.csv", *flags], capsys).replace("exists and ", "")
    for name, text, words in (("track.txt", TRACK + "1 2\n", "a line has 2 values, for 8 columns"),
                              ("track.txt", "no track\n", "is not a track"), ("args.json", "[]", "is damaged")):
        former = (run / name).read_text()
        (run / name).write_text(text)
        assert words in expect_usage_error("benchmarks/compare.py", [run], capsys)
        (run / name).write_text(former)
    (run / "track.txt").write_bytes(b"epoch\xff\n")
    assert "track.txt is not a track: it is not text" in expect_usage_error("benchmarks/compare.py", [run], capsys)
