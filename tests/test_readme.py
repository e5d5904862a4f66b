"""The README, held against the parsers, the files and the code that it speaks of."""

import importlib
import re
import shlex
import shutil
import subprocess

import numpy as np
import pytest
import torch
from helpers import ROOT, events, import_script

import data

README = (ROOT / "README.md").read_text()
SCRIPTS = ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py", "evaluate.py", "codes.py",
           "figures.py")
NO_VALUE = {"required": None, "off": "False", "the input's or the data set's name": "None", "the model's own": "None",
            "from the file": "None", "the shipped model": "None", "none": "None", "beside the model": "None",
            "the shipped one": "None", "every class": "None", "all": "None"}


def flags_of(parser):
    """{name of a flag: its action}, without --help."""
    return {name: action for action in parser._actions for name in action.option_strings
            if action.dest != "help"}


def code_blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags_and_defaults_are_the_parsers(script):
    table = README.split(f"| flag of `{script}` | default | meaning |\n| --- | --- | --- |\n")[1].split("\n\n")[0]
    rows = re.findall(r"^\| `(--[\w-]+)` \| (.+?) \| .+ \|$", table, flags=re.MULTILINE)
    assert len(rows) == len(table.splitlines())
    flags = flags_of(import_script(script).get_parser())
    assert {name for name, _ in rows} == set(flags) - {"--num_epoch"}
    for name, default in rows:
        action = flags[name]
        assert action.required == (default == "required"), name
        if default in NO_VALUE:
            assert NO_VALUE[default] in (None, str(action.default)), name
        else:
            assert (action.type or str)(default.strip("`")) == action.default, name


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_the_default_of_every_flag(script):
    for name, action in flags_of(import_script(script).get_parser()).items():
        assert "(default: " in action.help or (action.required and "(required)" in action.help), name


def test_published_flags_keep_their_published_defaults():
    args = vars(import_script("VQ-VAE.py").get_parser().parse_args([]))
    published = {"output_folder": "vqvae", "data_folder": "MNIST", "device": "cpu", "hidden_size": 40, "k": 512,
                 "batch_size": 128, "num_epochs": 10, "lr": 2e-4, "beta": 1.0}
    assert {name: args[name] for name in published} == published


def test_every_command_is_one_that_its_script_understands():
    text = README.replace("$VALUE", "1") + (ROOT / "model.txt").read_text()
    commands = re.findall(r"(?:^[!\s]*|`|do )python3 ([\w/-]+\.py.*?)(?:`|;|$)", text, flags=re.MULTILINE)
    commands = [command for command in commands if not command.startswith(("testers.py", "minimal.py"))]
    assert len(commands) > 10
    for command in commands:
        script, *arguments = shlex.split(command)
        import_script(script).get_parser().parse_args(arguments)


def test_make_runs_the_commands_that_the_readme_gives_without_make():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    dry = subprocess.run(["make", "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True, check=True)
    said = dry.stdout.replace("quickstart", "MNIST-10k")
    runs = [line.removesuffix(" --overwrite").replace(".venv/bin/python ", "python3 ")
            for line in said.splitlines() if line.startswith(".venv/bin/python ") and ".py " in line]
    block = next(block for block in code_blocks("shell") if "venv" in block)
    assert len(runs) == 4 and runs == [line for line in block.splitlines() if ".py " in line]


def test_every_file_is_described_and_every_picture_is_there():
    described = re.findall(r"^\| `([^`]+)` \| ", README.split("## Files\n")[1].split("\n## ")[0], flags=re.MULTILINE)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        top = {path.split("/")[0] + "/" * ("/" in path) for path in listed.stdout.splitlines()}
        assert set(described) == {name for name in top if not name.startswith(".")} - {"README.md"}
    for name in described + re.findall(r"!\[[^\]]+\]\(([^)]+)\)", README):
        assert (ROOT / name).exists(), name


def test_every_step_names_code_that_is_there():
    names = set(re.findall(r"`((?:modules|vector_quantizer|prior|metrics)\.[\w.]+)`", README))
    names -= {name for name in names if re.search(r"\.(py|pt|png)$", name)}
    assert len(names) >= 11
    for name in names:
        module, *attributes = name.split(".")
        value = importlib.import_module(module)
        for attribute in attributes:
            value = getattr(value, attribute)


def test_every_tag_is_in_the_table(trained):
    tags = events(trained / "logs" / "run").Tags()
    for tag in tags["scalars"] + tags["images"] + tags["histograms"]:
        family, _, last = tag.rpartition("/")
        assert f"`{tag}`" in README or (f"`{family}/reconstruction`" in README and f"`…/{last}`" in README), tag


def test_python_snippet_runs(trained):
    snippet = next(block for block in code_blocks("python") if "data.load" in block)
    names = {}
    exec(snippet.replace("models/MNIST-10k/best.pt", str(trained / "models" / "run" / "best.pt")), names)
    assert names["indices"].shape == (8, 7, 7) and names["images"].shape == (8, 1, 28, 28)


def test_python_snippet_that_reads_codes_runs(tmp_path, monkeypatch):
    snippet, = (block for block in code_blocks("python") if "data.load" not in block)
    monkeypatch.chdir(tmp_path)
    command = next(block for block in code_blocks("shell") if "--output codes.npz" in block)
    import_script("codes.py").main([*shlex.split(command)[2:], "--dataset", "MNIST-10k", "--part", "test"])
    (tmp_path / "pretrained").symlink_to(ROOT / "pretrained")
    names = {}
    exec(snippet, names)
    assert names["indices"].shape == (1000, 7, 7) and names["labels"].shape == (1000,)
    _, test_set = data.load("MNIST-10k", "MNIST")
    x = data.to_model_range(test_set.images[:8])
    with torch.no_grad():
        assert torch.equal(names["images"], names["model"].decode(torch.from_numpy(names["indices"][:8].astype(int))))
        assert (names["images"] - names["model"](x).reconstruction).abs().mean() < 1e-3
    back = next(block for block in code_blocks("shell") if "--decode codes.npz" in block)
    import_script("codes.py").main(shlex.split(back)[2:])
    with np.load("images.npz") as file:
        assert file["images"].shape == (1000, 1, 28, 28)
