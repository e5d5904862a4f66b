"""What is at the path of a file that a command writes: the table of docs/troubleshooting.md."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import events, expect_usage_error, import_script, run_script, snapshot

import checkpoint
import data
from utils import files

# Of each command: its flags, the flag that names the file and its value, the file itself.
DIGITS = ("--dataset", "MNIST-10k")
COMMANDS = {
    "codes.py": (["--model", checkpoint.PRETRAINED, *DIGITS, "--part", "test"], "--output", "new/x.npz", "new/x.npz"),
    "evaluate.py": (DIGITS, "--json", "new/x.json", "new/x.json"),
    "generate.py": (["--model", checkpoint.PRETRAINED, "--input", "random"], "--filename", "new/x",
                    "generatedImages/new/x.png"),
    "train_classifier.py": ([*DIGITS, "--num-epochs", "1", "--batch-size", "64"], "--output", "new/x",
                            "models/new/x.pt"),
}
SCRIPTS = list(COMMANDS)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty working directory. The commands run on 128 digits."""
    monkeypatch.chdir(tmp_path)
    load = data.load
    monkeypatch.setattr(data, "load", lambda *given: [data.Images(*part[:128]) for part in load(*given)])
    return tmp_path


def command(script, *more):
    flags, flag, value, path = COMMANDS[script]
    return [*map(str, flags), flag, value, *more], f"{flag} {value}: ", Path(path)


@pytest.mark.parametrize("script", SCRIPTS)
def test_file_is_replaced_only_with_overwrite_and_by_its_like(script, folder, capsys):
    words, beginning, path = command(script)
    import_script(script).main(words)
    first = path.read_bytes()
    capsys.readouterr()
    assert "exists, replace it with --overwrite" in expect_usage_error(script, words, capsys)
    assert path.read_bytes() == first
    path.write_bytes(first + b" ")
    if script != "train_classifier.py":         # whose file is compared with its length
        import_script(script).main([*words, "--overwrite"])
        assert path.read_bytes() == first
    path.write_bytes(b"a thesis")
    capsys.readouterr()
    before = snapshot(folder)
    line = expect_usage_error(script, [*words, "--overwrite"], capsys)
    assert beginning in line and "exists and is not a" in line and "choose another name" in line
    assert snapshot(folder) == before


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_folders_pipes_and_devices_are_refused(kind, script, folder, capsys):
    words, beginning, path = command(script, "--overwrite")
    path.parent.mkdir(parents=True)
    if kind == "folder":
        path.mkdir()
    elif not hasattr(os, "mkfifo"):
        pytest.skip("no pipes and devices")
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/null")
    line = expect_usage_error(script, words, capsys)
    assert beginning in line and ("is a folder" if kind == "folder" else "is not a regular file") in line
    assert [found for found in folder.rglob("*") if not found.is_dir()] == [folder / path] * (kind != "folder")


@pytest.mark.parametrize("script", SCRIPTS)
def test_link_is_replaced_with_overwrite_and_its_target_stays(script, folder, capsys):
    words, _, path = command(script)
    import_script(script).main(words)
    for target in (folder / "far", folder / "nowhere"):
        if target.name == "far":
            os.replace(path, target)
        else:
            path.unlink()
        path.symlink_to(target)
        before = snapshot(folder)
        capsys.readouterr()
        assert "exists" in expect_usage_error(script, words, capsys)
        assert snapshot(folder) == before and path.is_symlink()
        import_script(script).main([*words, "--overwrite"])
        assert path.is_file() and not path.is_symlink()
    assert (folder / "far").is_file() and not (folder / "nowhere").exists()


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("flags", [[], ["--overwrite"]])
def test_file_that_appears_while_a_command_works_is_not_replaced(flags, script, folder, monkeypatch, capsys):
    words, _, path = command(script, *flags)
    fsync = os.fsync

    def appear(descriptor):                     # of the temporary file
        if f".{path.name}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            path.write_bytes(b"a thesis")
        fsync(descriptor)

    def appear_before_the_test(*given):
        path.write_bytes(b"a thesis")
        return 0.5

    module = import_script(script)
    if script == "train_classifier.py":
        monkeypatch.setattr(module, "test_accuracy", appear_before_the_test)
    elif not os.path.exists("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(files.os, "fsync", appear)
    with pytest.raises(SystemExit) as excinfo:
        module.main(words)
    error = capsys.readouterr().err
    assert excinfo.value.code == 2 and "Traceback" not in error and str(path) in error
    assert ("has appeared" if script == "train_classifier.py" else "exists") in error
    assert path.read_bytes() == b"a thesis" and not list(folder.rglob(f"*{files.TEMPORARY}"))


@pytest.mark.parametrize("script", SCRIPTS[:3])
def test_file_and_folder_that_vanish_are_written_anew(script, folder, monkeypatch):
    words, _, path = command(script, "--overwrite")
    import_script(script).main(words)
    first, write = path.read_bytes(), files.OutputFile.write

    def vanish(output, contents):
        shutil.rmtree(output.path.parent)
        write(output, contents)
    monkeypatch.setattr(files.OutputFile, "write", vanish)
    import_script(script).main(words)
    assert path.read_bytes() == first


# ---------------------------------------------------------------- a training that replaces another

@pytest.mark.parametrize("script", ["VQ-VAE.py", "train_prior.py", "train_classifier.py"])
def test_former_run_is_unchanged_if_the_new_one_cannot_be_saved(script, folder, trained, monkeypatch, capsys):
    small = {"VQ-VAE.py": ["--output-folder", "run", "--hidden-size", "4", "--k", "8", "--batch-size", "64"],
             "train_prior.py": ["--model", "models/run/best.pt", "--width", "12", "--layers", "1"],
             "train_classifier.py": ["--output", "run/judge", "--batch-size", "64"]}[script]
    shutil.copytree(trained / "models", folder / "models")
    shutil.copytree(trained / "logs", folder / "logs")
    words = [*DIGITS, "--num-epochs", "1", *small]
    if script != "VQ-VAE.py":
        import_script(script).main(words)
    before = snapshot(folder)
    full = OSError(28, "No space left on device", "somewhere")
    monkeypatch.setattr(files.os, "fsync", lambda _: (_ for _ in ()).throw(full))
    with pytest.raises(SystemExit) as excinfo:
        import_script(script).main([*words, "--seed", "1", "--overwrite"])
    error = capsys.readouterr().err
    assert excinfo.value.code == 2 and "No space left on device" in error and files.TEMPORARY not in error
    assert snapshot(folder) == before


def test_run_that_was_killed_while_it_replaced_another_is_finished_by_resume(folder, trained, monkeypatch):
    """Killed after its first save, before anything of the former run was removed."""
    for name in ("models", "logs"):
        shutil.copytree(trained / name, folder / name)
    words = [*DIGITS, "--output-folder", "run", "--hidden-size", "4", "--k", "8", "--batch-size", "64", "--num-epochs",
             "1"]
    from utils.run_files import RunFiles

    class Killed(BaseException):
        pass

    def kill(*_):
        raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(RunFiles, "clear", kill)
        import_script("VQ-VAE.py").main([*words, "--overwrite"])
    assert (folder / "models" / "run" / "model_2.pt").is_file()
    import_script("VQ-VAE.py").main(["--resume", "--output-folder", "run"])
    import_script("VQ-VAE.py").main([*words[:-4], "--batch-size", "64", "--num-epochs", "1", "--output-folder", "new"])
    assert {path.name for path in Path("models/run").iterdir()} == {path.name for path in Path("models/new").iterdir()}
    assert checkpoint.load("models/run/best.pt")["config"]["num_codes"] == 8
    assert events("logs/run").Tags() == events("logs/new").Tags()
    state, expected = (checkpoint.load(f"models/{name}/best.pt")["model"] for name in ("run", "new"))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("name", ["best.pt", "track.txt", "model_9.pt", "prior.pt"])
def test_folder_with_a_name_of_the_run_is_noticed_before_anything_is_replaced(name, folder, trained, capsys):
    for part in ("models", "logs"):
        shutil.copytree(trained / part, folder / part)
    (folder / "models" / "run" / name).unlink(missing_ok=True)
    (folder / "models" / "run" / name).mkdir()
    before = snapshot(folder)
    with pytest.raises(SystemExit) as excinfo:
        import_script("VQ-VAE.py").main([*DIGITS, "--output-folder", "run", "--hidden-size", "4", "--overwrite"])
    assert excinfo.value.code == 2
    assert f"--output-folder run: models/run/{name} is not a regular file" in capsys.readouterr().err
    assert snapshot(folder) == before


def test_link_to_nowhere_in_place_of_a_folder_is_named(folder, capsys):
    (folder / "models").symlink_to("nowhere")
    assert "--output-folder run: models is not a folder" in expect_usage_error(
        "VQ-VAE.py", [*DIGITS, "--output-folder", "run"], capsys)


# ---------------------------------------------------------------- the classifier's run

def test_track_and_logs_of_a_former_classifier_are_kept(folder, capsys):
    words, _, path = command("train_classifier.py")
    import_script("train_classifier.py").main(words)
    logs = list(Path("logs/new/x").iterdir())
    path.rename("kept.pt")
    path.with_name("x-last.pt").unlink()
    capsys.readouterr()
    assert "models/new/x-track.txt: exists" in expect_usage_error("train_classifier.py", words, capsys)
    path.with_name("x-track.txt").write_text("my notes")
    line = expect_usage_error("train_classifier.py", [*words, "--overwrite"], capsys)
    assert "models/new/x-track.txt: exists and is not a track" in line
    path.with_name("x-track.txt").unlink()
    assert f"{logs[0]}: exists, replace it" in expect_usage_error("train_classifier.py", words, capsys)
    assert list(Path("logs/new/x").iterdir()) == logs
    import_script("train_classifier.py").main([*words, "--overwrite"])
    assert path.is_file() and len(list(Path("logs/new/x").iterdir())) == 1


def test_resumed_classifier_replaces_no_file_of_another_kind(folder, monkeypatch, capsys):
    """Resumed without having moved away what has appeared, as the message asks for."""
    words, _, path = command("train_classifier.py")
    module = import_script("train_classifier.py")

    def appear(*_):
        path.write_bytes(b"a thesis")
        return 0.5
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(module, "test_accuracy", appear)
        module.main(words)
    resume = ["--resume", "--output", "new/x"]
    for _ in range(2):
        with pytest.raises(SystemExit):
            import_script("train_classifier.py").main(resume)
        assert "x.pt has appeared since the training began: move it away" in capsys.readouterr().err
        assert path.read_bytes() == b"a thesis"
    path.rename("thesis")
    import_script("train_classifier.py").main(resume)
    assert checkpoint.load_classifier(path)[1]["epoch"] == 1


def test_longest_file_name_is_written_and_a_longer_one_refused_before_the_work(tmp_path):
    for name in ("a" * 251 + ".npz", "ä" * 125 + ".npz"):
        files.check_writable(tmp_path / name)
        files.write_atomically(tmp_path / name, b"contents")
        assert (tmp_path / name).read_bytes() == b"contents"
    with pytest.raises(ValueError, match="a file's name has at most 255 bytes"):
        files.check_writable(tmp_path / ("a" * 252 + ".npz"))
    assert len(list(tmp_path.iterdir())) == 2
    left = tmp_path / f".{files._short('b' * 255)}.123{files.TEMPORARY}"
    left.write_bytes(b"half")
    files.remove_temporary_files(tmp_path, "b" * 255)
    assert not left.exists()


def test_temporary_files_of_other_commands_stay(folder):
    words, _, path = command("train_classifier.py")
    path.parent.mkdir(parents=True)
    own, other = (path.with_name(f".{name}.123{files.TEMPORARY}") for name in ("x-last.pt", "y.npz"))
    for temporary in (own, other):
        temporary.write_bytes(b"half")
    import_script("train_classifier.py").main(words)
    assert other.is_file() and not own.exists()



def test_classifier_resumes_bit_for_bit_and_is_locked(folder, mnist_folder, capsys):
    words = ["--data-folder", mnist_folder, "--batch-size", "50", "--num-epochs", "2"]
    whole = run_script("train_classifier.py", *words, "--output", "whole", cwd=folder)
    assert whole.returncode == 0, whole.stderr
    broken = run_script("train_classifier.py", *words, "--output", "broken", cwd=folder, prepare=stop_after_15_steps)
    assert broken.returncode == 143 and "train_classifier.py --resume --output broken" in broken.stdout
    assert torch.load("models/broken-last.pt", weights_only=True)["step"] == 15
    with files.locked_folder(Path("logs/broken"), "--output broken"):
        line = expect_usage_error("train_classifier.py", ["--resume", "--output", "broken"], capsys)
    assert "--output broken: another run writes to logs/broken" in line
    resumed = run_script("train_classifier.py", "--resume", "--output", "broken", cwd=folder)
    assert resumed.returncode == 0, resumed.stderr
    one, other = (torch.load(f"models/{name}.pt", weights_only=True) for name in ("whole", "broken"))
    assert one["test"] == other["test"] and one["step"] == other["step"] == 24
    assert all(torch.equal(value, other["model"][name]) for name, value in one["model"].items())
    curves = [[event.value for event in events(f"logs/{name}").Scalars("classifier/train")]
              for name in ("whole", "broken")]
    assert curves[0] == curves[1] and len(curves[0]) == 2
    line = run_script("train_classifier.py", "--resume", "--output", "broken", cwd=folder).stderr
    assert "the run ended after epoch 2, ask for more" in line
    assert "--output no: there is no models/no-last.pt to --resume" in expect_usage_error(
        "train_classifier.py", ["--resume", "--output", "no"], capsys)


def stop_after_15_steps():
    import signal

    from utils.trainer import Trainer

    after_step = Trainer.after_step

    def stop(trainer, *given):
        if trainer.state.step == 14:
            os.kill(os.getpid(), signal.SIGTERM)
        after_step(trainer, *given)
    Trainer.after_step = stop
