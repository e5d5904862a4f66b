"""The README and the pages in docs/, checked against the parsers, the files and the code they describe."""

import pkgutil
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
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
TEXT = "\n".join(PAGES.values())
SCRIPTS = ("VQ-VAE.py", "train_prior.py", "train_classifier.py", "generate.py", "evaluate.py", "codes.py",
           "export.py", "demo.py", "docs/figures.py", "benchmarks/speed.py", "benchmarks/sizes.py",
           "benchmarks/completions.py", "benchmarks/demo.py", "benchmarks/reproduce.py", "benchmarks/compare.py",
           "benchmarks/quantizers.py")
MAX_LINES = 280             # of the README
# Documented flags of other programs.
FOREIGN_FLAGS = {"--help", "--nproc-per-node", "--nnodes", "--rdzv-backend", "--rdzv-endpoint", "--logdir",
                 "--requirement", "--samples_per_plugin"}


def parser_flags(parser):
    """{flag: its argparse action}, without --help."""
    return {name: action for action in parser._actions for name in action.option_strings
            if action.dest != "help"}


def code_blocks(language, text=TEXT):
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def commands():
    """Every command in the pages and in model.txt that runs a script, as [script, *arguments]."""
    text = TEXT + (ROOT / "model.txt").read_text()
    pattern = r"(?:^[!\s]*|`|  |OMP_NUM_THREADS=1 )python3 ([\w/-]+\.py.*?)(?:`|$)"
    matches = re.findall(pattern, text, flags=re.MULTILINE)
    matches += re.findall(r"^torchrun .*?([\w/-]+\.py.*)$", text, flags=re.MULTILINE)
    return [shlex.split(command) for command in matches]


def tracked_files():
    result = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if result.returncode:
        pytest.skip("needs git, to list the files of the repository")
    return [name for name in result.stdout.split("\0") if name]


# ---------------------------------------------------------------- flags and commands

def test_readme_is_short():
    assert len(README.splitlines()) <= MAX_LINES


def test_flag_tables_match_parsers_and_commands():
    """The first column has the defaults. Other columns have the values of the documented command of a run."""
    tables = re.findall(r"^\| flag of `([^`]+)` \| default \|(.*)\n\|[- |]+\n((?:\|.*\n)+)", TEXT, flags=re.MULTILINE)
    assert len(tables) == TEXT.count("| flag of ") > 0
    for script, runs, rows in tables:
        parser = import_script(script).get_parser()
        columns = [parser.parse_args([])]
        for run in re.findall(r"`([^`]+)`", runs):
            matches = [parser.parse_args(words) for name, *words in commands()
                       if name == script and words[-2:] == ["--output-folder", run] and "--resume" not in words]
            assert matches and all(args == matches[0] for args in matches), run
            columns.append(matches[0])
        actions = parser_flags(parser)
        for row in rows.splitlines():
            flag, *values = re.findall(r"`([^`]+)`", row)
            assert len(values) == len(columns) == row.count("|") - 2, row
            for value, args in zip(values, columns):
                assert (actions[flag].type or str)(value) == getattr(args, actions[flag].dest), (flag, value)
        documented = {actions[flag].dest for flag in re.findall(r"^\| `(--[\w-]+)`", rows, flags=re.MULTILINE)}
        for args in columns[1:]:
            differing = {name for name, value in vars(args).items() if value != vars(columns[0])[name]}
            assert {"output_folder"} <= differing - documented <= {"output_folder", "validation_images"}


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_gives_the_default_of_every_flag(script):
    for name, action in parser_flags(import_script(script).get_parser()).items():
        assert "(default: " in action.help or (action.required and "(required)" in action.help), name


def test_published_flags_keep_their_published_defaults():
    args = vars(import_script("VQ-VAE.py").get_parser().parse_args([]))
    published = {"output_folder": "vqvae", "data_folder": "MNIST", "device": "cpu", "hidden_size": 40, "k": 512,
                 "batch_size": 128, "num_epochs": 10, "lr": 2e-4, "beta": 1.0}
    assert {name: args[name] for name in published} == published


def test_every_documented_flag_exists():
    known = {flag for script in SCRIPTS for flag in parser_flags(import_script(script).get_parser())}
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", TEXT)) <= known | FOREIGN_FLAGS


@pytest.fixture
def documented_inputs(tmp_path, monkeypatch):
    (tmp_path / "my photos").mkdir()
    (tmp_path / "my photos" / "beach.jpg").touch()
    (tmp_path / "drawing.png").touch()
    monkeypatch.chdir(tmp_path)


def test_every_documented_command_parses(documented_inputs):
    assert len(commands()) > 60
    for script, *words in commands():
        if words == ["--help"]:
            assert (ROOT / script).is_file()
        elif script == "minimal.py":            # it has no flags, and its own test
            assert not words
        else:
            import_script(script).get_parser().parse_args(words)


def test_commands_of_a_page_write_different_pictures(documented_inputs):
    script = import_script("generate.py")
    shipped = {"dataset": {"name": "MNIST"}}
    for path, text in PAGES.items():
        commands = re.findall(r"^python3 generate\.py (.*)$", text, flags=re.MULTILINE)
        names = []
        for args in map(script.get_parser().parse_args, map(shlex.split, commands)):
            names.append(str(args.filename or script.default_name(args, shipped)).removesuffix(".png"))
        assert len(names) == len(set(names)), (path, names)


def test_documented_selections_of_tests_select_some():
    selections = re.findall(r"pytest ([^`\n]*) -k (\w+|\"[^\"]+\")", TEXT)
    assert len(selections) >= 3
    for paths, words in selections:
        code = "\n".join((ROOT / path).read_text() for path in paths.split())
        for word in words.strip('"').split(" or "):
            assert re.search(rf"^def test_\w*{word}", code, flags=re.MULTILINE), (paths, word)


def test_make_runs_the_commands_of_the_readme():
    if not shutil.which("make"):
        pytest.skip("make is not installed")
    dry_run = subprocess.run(["make", "--dry-run", "--always-make"], cwd=ROOT, capture_output=True, text=True,
                             check=True)
    output = dry_run.stdout
    runs = [line.removesuffix(" --overwrite").replace(".venv/bin/python ", "python3 ")
            for line in output.splitlines() if line.startswith(".venv/bin/python ") and ".py " in line]
    block = next(block for block in code_blocks("shell", README) if "venv" in block)
    assert len(runs) == 4 and runs == [line for line in block.splitlines() if ".py " in line]


# ---------------------------------------------------------------- files, links and names

def test_every_file_is_described():
    tree, = code_blocks("", README.split("## Files\n")[1].split("\n## ")[0])
    listed = [name for line in tree.splitlines() for name in re.split(r" {2,}", line)[0].split(", ")]
    for name in listed:
        assert (ROOT / name).is_dir() if name.endswith("/") else (ROOT / name).is_file(), name
    tracked = tracked_files()
    top_level = {path.split("/")[0] + "/" * ("/" in path) for path in tracked}
    assert {name for name in top_level if not name.startswith(".")} - {"README.md"} <= set(listed)
    page = (ROOT / "docs" / "developing.md").read_text()
    for name in tracked:
        folder, _, file = name.rpartition("/")
        if file.endswith(".py") and folder in ("", "data", "metrics", "utils", "docs", "benchmarks"):
            assert f"`{name}`" in page or (file == "__init__.py" and folder == "utils"), name


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text()
    for path in PAGES:
        assert path.name == "README.md" or (f"]({path.name})" in index and f"](docs/{path.name}" in README), path.name


def anchors(text):
    """The anchors that GitHub generates for the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_every_link_and_picture_exists():
    pictures = set()
    for page, text in PAGES.items():
        for alternative, target in re.findall(r"(!?)\[[^\]]+\]\(([^)]+)\)", without_code(text)):
            if re.match(r"https?://", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            assert path.exists(), f"{page.name}: {target}"
            assert not anchor or anchor in anchors(PAGES[path]), f"{page.name}: {target}"
            pictures |= {path} if alternative else set()
        assert "![](" not in text and "<img" not in text
    assert pictures <= set((ROOT / "readme_images").iterdir()) and len(pictures) >= 8


def test_every_documented_name_exists():
    names = set(re.findall(r"`((?:modules|vector_quantizer|prior|checkpoint|metrics|data|utils)\.[\w.]+)[`(]", TEXT))
    names -= {name for name in names if re.search(r"\.(onnx|png|pt|pt2|py)$", name)}
    assert len(names) >= 35
    for name in names:
        pkgutil.resolve_name(name)


def test_every_documented_test_exists():
    names = set(re.findall(r"`(test_\w+)`", TEXT))
    code = "\n".join(path.read_text() for path in (ROOT / "testers.py", *(ROOT / "tests").glob("test_*.py")))
    assert len(names) >= 5 and all(f"def {name}(" in code for name in names), names


def test_every_tensorboard_tag_is_documented(trained):
    page = (ROOT / "docs" / "tensorboard.md").read_text()
    tags = events(trained / "logs" / "run").Tags()
    for tag in tags["scalars"] + tags["images"] + tags["histograms"]:
        family, _, last = tag.rpartition("/")
        assert f"`{tag}`" in page or (f"`{family}/reconstruction`" in page and f"`…/{last}`" in page), tag


# ---------------------------------------------------------------- the Python snippets

def test_every_python_snippet_has_a_test():
    # Those of export.md in test_export.py, the last one in test_quantizers.py.
    program, encode, sample, first, second, third = code_blocks("python")
    assert "encoder.pt2" in program and "encoder.onnx" in encode and "prior.onnx" in sample
    assert "data.load" in first and "codes.npz" in second and "class SignQuantizer" in third


def test_python_snippet_runs(monkeypatch):
    snippet, _ = code_blocks("python", (ROOT / "docs" / "from-python.md").read_text())
    monkeypatch.chdir(ROOT)
    names = {}
    exec(snippet, names)
    assert names["indices"].shape == (8, 7, 7) and names["images"].shape == (8, 1, 28, 28)


def test_python_snippet_that_reads_codes_runs(tmp_path, monkeypatch):
    _, snippet = code_blocks("python", (ROOT / "docs" / "from-python.md").read_text())
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "codes.md").read_text()
    command = next(block for block in code_blocks("shell", page) if "--output codes.npz" in block)
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
    decode_command = next(block for block in code_blocks("shell", page) if "--decode codes.npz" in block)
    import_script("codes.py").main(shlex.split(decode_command)[2:])
    with np.load("images.npz") as file:
        assert file["images"].shape == (1000, 1, 28, 28)
