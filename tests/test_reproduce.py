"""benchmarks/reproduce.py: the documents show the committed figures, and rows are run, interrupted and compared."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import sys
import time
import types

import pytest
from helpers import ROOT, expect_usage_error, import_script, run_command, start_script, wait_for
from test_readme import TEXT

import checkpoint

sys.path.append(str(ROOT / "benchmarks"))
import documents
import reproduce
import result_rows
import run_rows

SMALL = "python3 VQ-VAE.py --batch-size 100 --hidden-size 4 --k 16 --lr 4e-3 --num-epochs 2"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A copy of the documents and of their figures, which reproduce.py takes for the repository's."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "docs", folder / "docs")
    for name in ("README.md", "model.txt"):
        shutil.copyfile(ROOT / name, folder / name)
    monkeypatch.setattr(reproduce, "ROOT", folder)
    monkeypatch.chdir(tmp_path)
    return folder


def replace_in(path, former, new):
    text = path.read_text()
    assert text.count(former) == 1
    path.write_text(text.replace(former, new))


def exit_status(argv):
    with pytest.raises(SystemExit) as excinfo:
        reproduce.main(argv)
    return excinfo.value.code


# ---------------------------------------------------------------- the documents

def test_documents_show_the_committed_figures():
    assert documents.check_documents(ROOT) == [] and documents.rewritten_documents(ROOT) == {}


def test_committed_figures_are_those_of_their_runs():
    rows = {row.slug: row for row in result_rows.ROWS}
    for path in (ROOT / documents.FOLDER).iterdir():
        contents, row = json.loads(path.read_text()), rows[path.stem]
        assert '"/' not in path.read_text()             # no path of a machine
        assert contents["command"] == row.command and contents["row"] == row.name, path
        assert contents["figures"].keys() <= row.figures.keys(), path
        assert [run["seed"] for run in contents["runs"]] == list(row.seeds), path
        record = run_rows.Record.__new__(run_rows.Record)
        record.row, record.contents = row, dict(contents)
        record.write = lambda path=path: pytest.fail(f"{path}: the figures are not those of the runs")
        record.count_figures()


def test_quantizers_of_the_table_are_those_of_the_benchmark():
    import quantizers
    assert result_rows.QUANTIZERS == quantizers.NAMES


def test_every_figure_has_a_kind_and_every_field_a_row():
    names = {row.name: row for row in result_rows.ROWS}
    for row in result_rows.ROWS:
        assert all(result_rows.kind_of(figure) for figure in row.figures)
        assert all(needed in names for needed in row.after)
        assert all(set(names[needed].after) <= set(row.after) for needed in row.after)
    for template in [line for table in documents.TABLES for line in table.lines] + [
            sentence.text for sentence in documents.SENTENCES]:
        for name, figure, _ in documents.FIELD.findall(template):
            assert not figure or figure in names[name].figures, (name, figure)


def test_commands_are_those_of_the_documents():
    """A row is a documented command, or one with flags that the documents name."""
    def without_name(words):
        return words[:words.index("--output-folder")] if "--output-folder" in words else words

    commands = re.findall(r"(?:^|`)python3 (\S+\.py[^`\n]*)", TEXT, re.MULTILINE)
    documented = [without_name(shlex.split(command)) for command in commands]
    for row in result_rows.ROWS:
        words = shlex.split(row.command)[1:]
        known = max(len(start) for start in documented if without_name(words)[:len(start)] == start)
        rest = without_name(words)[known:]
        for flag, value in zip(rest[::2], rest[1::2]):
            assert f"{flag} {value}" in TEXT, row.command
        import_script(words[0]).get_parser().parse_args(words[1:])


def test_claim_changed_by_hand_is_found_and_written_anew(repository, capsys):
    former = (repository / "docs" / "results.md").read_text(), (repository / "model.txt").read_text()
    reproduce.main(["--check"])
    claim = re.search(r"\| `--beta 2` \| 0\.\d+ \|", former[0])[0]
    replace_in(repository / "docs" / "results.md", claim, "| `--beta 2` | 0.0777 |")
    psnr = re.search(r"PSNR +(\d+\.\d+) dB", former[1])[1]                        # the first one in the file
    replace_in(repository / "model.txt", f"PSNR                 {psnr} dB", "PSNR                 20.00 dB")
    capsys.readouterr()
    assert exit_status(["--check"]) == 1
    output = capsys.readouterr().out
    line = former[0].split("| `--beta 2` |")[0].count("\n") + 1
    place = f'docs/results.md, line {line}, table under "Effect of each setting"'
    assert f"{place}: it says\n    | `--beta 2` | 0.0777 |" in output
    assert 'model.txt, line ' in output and f"it says 20.00, and docs/results gives {psnr}" in output
    reproduce.main(["--write-tables"])
    assert former == ((repository / "docs" / "results.md").read_text(), (repository / "model.txt").read_text())


def test_documents_are_read_where_the_locale_is_not_utf_8(tmp_path):
    result = run_command(sys.executable, ROOT / "benchmarks" / "reproduce.py", "quantizers", "--check", cwd=tmp_path,
                         LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.returncode == 0, result.stderr
    result = run_command(sys.executable, "-c", "import sys; sys.path.insert(0, 'docs'); import figures, pathlib; "
                         "print(len(figures.read_quantizers(pathlib.Path(figures.QUANTIZERS))))",
                         LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert result.stdout == "11\n", result.stderr


def test_links_that_lead_nowhere_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    for words in (["--folder", "loop"], ["CIFAR-10", "--cifar10-folder", "loop"]):
        line = expect_usage_error("benchmarks/reproduce.py", words, capsys)
        assert f"{words[-2]} loop: is not a folder" in line
    run_rows.Run(result_rows.ROWS[0], 0, tmp_path, pathlib.Path("loop"))       # whose script names the flag


def test_table_that_is_no_longer_there_is_found(repository):
    replace_in(repository / "docs" / "sampling.md", "## Temperature and guidance\n", "## Temperature\n")
    assert any("there is no table" in problem for problem in documents.check_documents(repository))


def test_figures_of_another_command_are_found(repository):
    path = repository / "docs" / "results" / "defaults.json"
    replace_in(path, "VQ-VAE.py --validation", "VQ-VAE.py --lr 1e-3 --validation")
    assert documents.check_documents(repository) == [
        "docs/results/defaults.json has the figures of another command, python3 VQ-VAE.py --lr 1e-3 "
        "--validation-images 0 --output-folder defaults: measure 'defaults' anew"]


def test_figures_are_shown_with_the_digits_and_the_deviation_that_fit():
    for mean, std, form, text in ((0.04271, 0.00068, "±.4f", "0.0427 ± 0.0007"), (511.7, 0.58, "±.0f", "512 ± 1"),
                                  (0.01163, 0.00003, "±.4f", "0.0116 ± < 0.0001"), (512, 0, "±.0f", "512 ± 0"),
                                  (0.96921, None, ".2%", "96.92 %"), (0.01163, 0.00003, ".4f", "0.0116")):
        assert documents.shown({"mean": mean, "std": std}, form) == text


# ---------------------------------------------------------------- measured figures

def test_measured_figure_that_differs_names_file_and_table(repository, tmp_path, capsys):
    row = next(row for row in result_rows.ROWS if row.name == "published")
    claimed = documents.Figures(repository / "docs" / "results").of_row(row)
    (mse, deviation, _), perplexity, used = claimed["mse"].values(), *(claimed[name]["mean"] for name in ("perplexity",
                                                                                                    "used"))
    epochs = [{"epoch": epoch, "test_recon": error, "perplexity": perplexity, "used": used}
              for epoch, error in ((9, 0.9), (10, 1.02 * mse))]
    record = run_rows.Record(row, tmp_path / "reproduced")
    for seed in row.seeds:
        record.add({"seed": seed, "output": {"epochs": [dict(epoch) for epoch in epochs]}})
    reproduce.main(["published", "--check"])
    assert f"{1.02 * mse:.5f} ± 0.00000  {mse:.5f} ± {deviation:.5f}\n" in capsys.readouterr().out
    record.contents["runs"][0]["output"]["epochs"][-1]["test_recon"] = 1.62 * mse   # the mean becomes 1.22 × mse
    record.write()
    assert exit_status(["published", "--check"]) == 1
    output = capsys.readouterr().out
    assert ('README.md, table under "VQ-VAE on MNIST, in PyTorch"; README.md, table under "Results"; docs/results.md, '
            f"table under \"Results\"; docs/results.md, in the text: test MSE of 'published' is {mse:.5f} ± "
            f"{deviation:.5f}, measured {1.22 * mse:.5f}") in output
    limit = 3 * (2 / 3)**0.5 * 0.035 * mse
    assert output.count("may differ by") == 1 and f"may differ by {limit:.5f}" in output
    # What has been measured becomes what the documents show.
    reproduce.main(["published", "--write-tables", "--adopt"])
    assert (f"| {1.22 * mse:.4f} ± {0.6 * mse / 3**0.5:.4f} | {perplexity:.0f} ± 0 | {used:.0f} ± 0 |"
            in (repository / "README.md").read_text())
    reproduce.main(["published", "--check"])
    # Its seeds deviate by more than the kind's deviation now, and so may another measurement.
    record.contents["runs"][0]["output"]["epochs"][-1]["test_recon"] = 2.2 * mse
    record.write()
    reproduce.main(["published", "--check"])


def test_weights_made_anew_are_compared_with_the_shipped_ones(repository, tmp_path, capsys):
    row = documents.BY_NAME["pipeline completions"]
    shown = documents.Figures(repository / "docs" / "results").of_row(documents.BY_NAME["completions"])
    output = {"rows": [{key: shown[f"{figure} {kept} rows"]["mean"] for figure, key in (("read", "share"),
                                                                                         ("error", "error"))}
                       for kept in range(8)]}
    record = run_rows.Record(row, tmp_path / "reproduced")
    record.add({"seed": 0, "output": output})
    reproduce.main(["pipeline completions", "--check"])
    output["rows"][3]["share"] -= 0.2
    record.add({"seed": 0, "output": output})
    capsys.readouterr()
    assert exit_status(["pipeline completions", "--check"]) == 1
    assert ("docs/sampling.md, table under \"Complete an image\": read as the true digit 3 rows of "
            "'pipeline completions'") in capsys.readouterr().out
    former = sorted(path.name for path in (repository / "docs" / "results").iterdir())
    reproduce.main(["pipeline completions", "--write-tables", "--adopt"])
    assert sorted(path.name for path in (repository / "docs" / "results").iterdir()) == former


def test_two_classifiers_have_files_of_their_own_and_records_name_no_path_of_the_machine(tmp_path):
    by_name = {row.name: row for row in result_rows.ROWS}
    files = [run_rows.Run(by_name[name], 0, tmp_path, tmp_path).files() for name in ("classifier",
                                                                                      "classifier transformer")]
    assert [[path.name for path in pair] for pair in files] == [
        ["classifier-last.pt", "classifier-track.txt"],
        ["classifier-transformer-last.pt", "classifier-transformer-track.txt"]]
    run, classifier = run_rows.Run(by_name["shipped"], 0, tmp_path, tmp_path), ROOT / "pretrained" / "a.pt"
    run.json.parent.mkdir()
    for path in (classifier, os.path.relpath(classifier, tmp_path)):                # the shorter one is written
        run.json.write_text(json.dumps({"model": "/x", "prior": {"classifier": str(path), "recognised": 0.5}}))
        assert run.result(1.0)["output"] == {"prior": {"classifier": "pretrained/a.pt", "recognised": 0.5}}


def test_interrupted_rows_go_on_and_give_the_same_results(repository, mnist_folder, tmp_path, monkeypatch, capsys):
    rows = [result_rows.Row("small", "small ones", f"{SMALL} --output-folder small", result_rows.TRAINED, 1, (0, 1)),
            result_rows.Row("other", "others", SMALL, result_rows.TRAINED, 1)]
    commands = []

    def start(words, folder, log, interrupt=False):
        commands.append(words)
        process = start_script(*words, cwd=folder)
        if interrupt:
            wait_for((folder / "models" / "small" / "last.pt").exists, process)
            os.kill(os.getpid(), signal.SIGTERM)
        return process

    monkeypatch.setattr(reproduce, "ROWS", rows)
    flags = ["--data-folder", str(mnist_folder), "--processes", "1"]
    monkeypatch.setattr(run_rows, "start", lambda *arguments: start(*arguments, interrupt=True))
    assert exit_status(["small", *flags]) == 128 + signal.SIGTERM
    stopped = checkpoint.load(tmp_path / "reproduced" / "models" / "small" / "last.pt")
    assert stopped["epoch"] < 2 and len(commands) == 1
    monkeypatch.setattr(run_rows, "start", start)
    reproduce.main(["small", *flags])
    assert "--resume" in commands[1] and "--resume" not in commands[2] and len(commands) == 3
    reproduce.main(["small", *flags])
    assert len(commands) == 3                               # nothing is left to do
    interrupted = json.loads((tmp_path / "reproduced" / "results" / "small.json").read_text())
    # Killed after a training's end, before its results were written.
    (tmp_path / "reproduced" / "results" / "small.json").unlink()
    reproduce.main(["small", *flags])
    assert len(commands) == 3
    assert interrupted == json.loads((tmp_path / "reproduced" / "results" / "small.json").read_text())
    # Without an interruption, by the name of the table.
    monkeypatch.setattr(reproduce, "ROWS", [rows[0]._replace(seeds=(0,))])
    reproduce.main(["small ones", *flags, "--folder", "whole"])
    whole = json.loads((tmp_path / "whole" / "results" / "small.json").read_text())
    assert without_seconds(whole["runs"][0]) == without_seconds(interrupted["runs"][0])
    assert whole["command"] == interrupted["command"] == rows[0].command
    # The figures are those of the models, and the mean and deviation those of the two seeds.
    first, second = (checkpoint.load(tmp_path / "reproduced" / "models" / name / "best.pt")["test"]["reconstruction"]
                     for name in ("small", "small-seed1"))
    assert first != second and interrupted["figures"]["mse"] == pytest.approx(
        {"mean": (first + second) / 2, "std": abs(first - second) / 2**0.5, "n": 2}, abs=1e-5)
    assert interrupted["runs"][0]["environments"][0]["threads"] and str(tmp_path) not in json.dumps(interrupted)
    assert not (tmp_path / "reproduced" / "models" / "other").exists()          # another row has not been asked for
    # A folder holds the results of one version of a row.
    monkeypatch.setattr(reproduce, "ROWS", [rows[0]._replace(command=SMALL)])
    capsys.readouterr()
    assert exit_status(["small", *flags]) == 2
    assert "--folder reproduced: reproduced/results/small.json is of another command" in capsys.readouterr().err


def without_seconds(run):
    epochs = [{name: value for name, value in epoch.items() if name != "seconds"} for epoch in run["output"]["epochs"]]
    return {**run, "seconds": None, "output": {"epochs": epochs}}


def test_failed_row_is_reported_and_the_others_go_on(repository, mnist_folder, tmp_path, monkeypatch, capsys):
    rows = [result_rows.Row("first", "rows", f"{SMALL} --lr 1e30", result_rows.TRAINED, 3),
            result_rows.Row("needs it", "rows", "python3 evaluate.py --model models/first/best.pt", {}, 2,
                            after=("first",)),
            result_rows.Row("last", "rows", f"{SMALL} --num-epochs 1", result_rows.TRAINED, 1),
            result_rows.Row("measured", "rows", "python3 evaluate.py --model models/last/best.pt", result_rows.MODEL, 1,
                            after=("last",))]
    monkeypatch.setattr(reproduce, "ROWS", rows)
    monkeypatch.setattr(run_rows, "start", lambda words, folder, log: start_script(*words, cwd=folder))
    assert exit_status(["--data-folder", str(mnist_folder)]) == 2
    captured = capsys.readouterr()
    assert "2 of the rows failed; 'first': it ended with status 2" in captured.err and captured.err.count("\n") == 1
    assert "first: failed: it ended with status 2" in captured.out
    trained, measured = (json.loads((tmp_path / "reproduced" / "results" / f"{name}.json").read_text())["figures"]
                         for name in ("last", "measured"))
    assert trained["mse"]["mean"] == pytest.approx(measured["mse"]["mean"], abs=1e-5)


def test_stopping_a_script_stops_what_it_has_started(tmp_path):
    (tmp_path / "child.py").write_text("""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path("stopped").touch()))
pathlib.Path("started").touch()
time.sleep(60)
""")
    (tmp_path / "parent.py").write_text("""
import os, subprocess, sys
print(os.environ["OMP_NUM_THREADS"], flush=True)
subprocess.run([sys.executable, "child.py"])
""")
    process = run_rows.start([tmp_path / "parent.py"], tmp_path, tmp_path / "log.txt")
    wait_for((tmp_path / "started").exists, process)
    run_rows.stop([process])
    assert process.returncode == -signal.SIGTERM and (tmp_path / "log.txt").read_text() == "1\n"
    for _ in range(500):
        if (tmp_path / "stopped").exists():
            return
        time.sleep(0.01)
    pytest.fail("the process that the script had started goes on")


# ---------------------------------------------------------------- bad input

@pytest.mark.parametrize(("arguments", "words"), [
    (["lowest los"], "'lowest los' is unknown: did you mean lowest loss? --list shows"),
    (["--adopt"], "--adopt: is used only with"),
    (["--list", "--check"], "give one of them"), (["--folder", __file__], f"--folder {__file__}: is not a folder"),
    (["--processes", "0"], "--processes"),
    (["photographs", "--cifar10-folder", "nowhere"], "--cifar10-folder nowhere: is not a folder"),
    (["published", "--data-folder", __file__], "--data-folder")])
def test_bad_input_gets_a_one_line_error(arguments, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as excinfo:
        reproduce.main(arguments)
    captured = capsys.readouterr()
    assert excinfo.value.code == 2 and captured.err.count("\n") == 1 and words in captured.err


def test_damaged_results_are_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reproduced" / "results").mkdir(parents=True)
    command = next(row.command for row in result_rows.ROWS if row.name == "published")
    for text in ("{", json.dumps({"row": "published", "command": command, "runs": []})):
        (tmp_path / "reproduced" / "results" / "published.json").write_text(text)
        assert "results/published.json is damaged: move it away" in expect_usage_error(
            "benchmarks/reproduce.py", ["published", "--check"], capsys)


@pytest.mark.parametrize("figure", [0.5, {"mean": 0.5, "n": 3}])
def test_damaged_figure_of_the_documents_is_one_line(repository, capsys, figure):
    path = repository / "docs" / "results" / "uniform.json"
    contents = json.loads(path.read_text())
    contents["figures"]["mse"] = figure
    path.write_text(json.dumps(contents))
    with pytest.raises(SystemExit) as excinfo:
        reproduce.main(["uniform", "--check"])
    captured = capsys.readouterr()
    assert excinfo.value.code == 2 and captured.err.count("\n") == 1 and "uniform.json is damaged" in captured.err


def test_run_without_all_figures_is_kept_and_done_again(tmp_path):
    row = result_rows.Row("some", "rows", "command", {"mse": "table.a.mse", "mse b": "table.b.mse"}, 1)
    output = {"table": {"a": {"mse": 0.5}}}
    with pytest.raises(ValueError, match=r"row 'some': its output has no number at table\.b\.mse"):
        run_rows.Record(row, tmp_path).add({"seed": 0, "output": output})
    record = run_rows.Record(row, tmp_path)
    assert record.lacks(0) and record.contents["runs"][0]["output"] == output
    record.add({"seed": 0, "output": {"table": {"a": {"mse": 0.5}, "b": {"mse": 0.25}}}})
    assert run_rows.Record(row, tmp_path).is_complete() and len(record.contents["runs"]) == 1
    assert record.contents["figures"]["mse b"]["mean"] == 0.25


def test_star_in_a_path_takes_what_is_there_as_values_of_one_figure(tmp_path):
    row = result_rows.Row("some", "rows", "command", {"mse": "seeds.a.*.mse"}, 1)
    record = run_rows.Record(row, tmp_path)
    with pytest.raises(ValueError, match=r"its output has no number at seeds\.a\.\*\.mse"):
        record.add({"seed": 0, "output": {"seeds": {"a": {}}}})
    assert record.lacks(0)
    record.add({"seed": 0, "output": {"seeds": {"a": {"0": {"mse": 1}, "1": {"mse": 2}, "2": {"mse": 6}}}}})
    assert record.contents["figures"]["mse"] == {"mean": 3, "std": pytest.approx(7**0.5), "n": 3}


def test_seed_that_succeeds_after_one_that_failed_is_reported_as_done(tmp_path, capsys):
    class Ended:
        def __init__(self, status):
            self.wait = lambda: status

    row, failed = result_rows.Row("some", "rows", "command", {"mse": "mse"}, 1), {}
    record = run_rows.Record(row, tmp_path)
    for seed, status in ((0, 1), (1, 0)):
        run = types.SimpleNamespace(row=row, folder=tmp_path, slug="some", title=f"seed {seed}",
                                    result=lambda seconds, seed=seed: {"seed": seed, "output": {"mse": 0.5}})
        run_rows.finish(run, Ended(status), 60, record, failed)
    assert list(failed) == ["some"] and "ended with status 1" in failed["some"]
    assert capsys.readouterr().out.splitlines()[1] == "seed 1: done in 1.0 min"


def test_list_names_every_row_and_its_command(capsys):
    reproduce.main(["--list"])
    output = capsys.readouterr().out
    assert all(row.name in output and row.command in output for row in result_rows.ROWS)
