"""export.py: its files against the model, in processes that have neither torch nor this repository."""

import importlib.util
import json
import re
import shutil
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, bundled_digits, expect_usage_error, import_script, run_command, run_script, snapshot

import checkpoint
import vector_quantizer
from modules import VectorQuantizedVAE
from prior import CodePrior

PACKAGES = "onnx", "onnxruntime", "onnxscript"
needs_packages = pytest.mark.skipif(any(importlib.util.find_spec(name) is None for name in PACKAGES),
                                    reason="needs the packages of requirements-export.txt")
PREAMBLE = """
import sys
for name in {blocked}:
    sys.modules[name] = None        # importing it is an error
import numpy as np
given = np.load("given.npz")
"""
REPOSITORY = ("checkpoint", "data", "modules", "prior", "utils", "vector_quantizer")
SIZES = 1, 7, 100


def small_prior(model):
    """A prior with random weights that are far from uniform, and a calibration."""
    torch.manual_seed(0)
    h, w = model.map_size(28, 28)
    config = {"num_codes": model.quantizer.num_codes, "height": h, "width": w, "layers": 1, "embedding": 12, "heads": 2,
              "gated": True}
    prior = CodePrior(**config).eval()
    for parameter in prior.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    prior.tail[1:] = torch.linspace(-1, 1, len(prior.tail) - 1)
    return prior, config


@pytest.fixture(scope="module")
def exported(trained, tmp_path_factory):
    """A folder with a model, a prior, and both exported by the script. Read-only."""
    folder = tmp_path_factory.mktemp("export")
    shutil.copy(trained / "models" / "run" / "best.pt", folder / "model.pt")
    model, contents = checkpoint.load_model(folder / "model.pt")
    prior, config = small_prior(model)
    checkpoint.save(folder / "prior.pt", {"format": 1, "kind": "prior", "config": config, "vqvae": contents["sha256"],
                                          "dataset": "MNIST", "model": prior.state_dict()})
    result = run_script("export.py", "--model", "model.pt", "--output", "exported", cwd=folder)
    assert result.returncode == 0 and not result.stderr, result.stderr
    (folder / "stdout.txt").write_text(result.stdout)
    (folder / "MNIST").symlink_to(ROOT / "MNIST")
    images = torch.from_numpy(bundled_digits()[0][9000:9100]).unsqueeze(1).float() / 127.5 - 1
    indices = torch.randint(512, (100, 7, 7), generator=torch.Generator().manual_seed(1))
    draws = torch.rand(20, 49, generator=torch.Generator().manual_seed(2))
    np.savez(folder / "given.npz", images=images, indices=indices, labels=torch.arange(100) % 11, draws=draws)
    return folder


@pytest.fixture(scope="module")
def expected(exported):
    """What torch makes of given.npz: indices, images and logits, and the model."""
    model, contents = checkpoint.load_model(exported / "model.pt")
    prior, _ = checkpoint.load_prior(exported / "prior.pt", (model, contents))
    given = {name: torch.from_numpy(value) for name, value in np.load(exported / "given.npz").items()}
    with torch.no_grad():
        return given | {"codes": model.encode(given["images"]), "decoded": model.decode(given["indices"]),
                        "logits": prior(given["indices"], given["labels"]),
                        "sampled": prior.sample(torch.arange(20) // 2, generator=torch.Generator().manual_seed(2))}


def run_in_fresh_process(program, blocked, folder):
    (folder / "program.py").write_text(PREAMBLE.format(blocked=blocked) + program)
    result = run_command(sys.executable, "program.py", cwd=folder, PYTHONPATH="")
    assert result.returncode == 0, result.stderr
    return np.load(folder / "found.npz")


def assert_same(found, expected, size):
    assert (found[f"codes{size}"] != expected["codes"][:size].numpy()).mean() < 1e-3        # ties
    assert np.abs(found[f"decoded{size}"] - expected["decoded"][:size].numpy()).max() < 1e-5
    logits = expected["logits"][:size].numpy()
    assert np.abs(found[f"logits{size}"] - logits).max() < 1e-5 * np.abs(logits).max()


def page_snippets():
    """The Python on docs/export.md: of a program, of images, of samples."""
    return re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "export.md").read_text(), re.MULTILINE | re.DOTALL)


@needs_packages
def test_onnx_files_match_torch_without_torch_and_the_repository(exported, expected):
    """And the snippets of the page run there as they stand, on the random numbers of CodePrior.sample()."""
    _, encode, sample = page_snippets()
    program = f"""
import onnxruntime
found, sessions = {{}}, {{name: onnxruntime.InferenceSession(f"exported/{{name}}.onnx")
                         for name in ("encoder", "decoder", "prior")}}
for size in {SIZES}:
    images, codes, classes = (given[name][:size] for name in ("images", "indices", "labels"))
    found[f"codes{{size}}"], = sessions["encoder"].run(None, {{"images": images}})
    found[f"decoded{{size}}"], = sessions["decoder"].run(None, {{"indices": codes}})
    found[f"logits{{size}}"], = sessions["prior"].run(None, {{"indices": codes, "labels": classes}})
class Generator:
    def random(self, shape, dtype):
        assert given["draws"].shape == shape and given["draws"].dtype == dtype
        return given["draws"]
np.random.default_rng = lambda seed: Generator()
{encode}
{sample}
about = sessions["prior"].get_modelmeta().custom_metadata_map["metadata.json"]
np.savez("found.npz", **found, indices=indices, images=decoded, maps=maps, digits=digits, about=about)
"""
    found = run_in_fresh_process(program, ("torch", "torchvision", *REPOSITORY), exported)
    for size in SIZES:
        assert_same(found, expected, size)
    assert (found["indices"] != expected["codes"].numpy()).mean() < 1e-3
    assert found["images"].shape == (100, 1, 28, 28) and found["digits"].shape == (20, 1, 28, 28)
    # A random number that falls on the border of two codes may round to either, and changes all later ones.
    assert (found["maps"] == expected["sampled"].numpy()).all(axis=(1, 2)).sum() >= 19
    about = json.loads(str(found["about"]))
    assert about["model_sha256"] == checkpoint.load(exported / "model.pt")["sha256"]
    assert about["classes"] == list("0123456789") and about["no_class"] == 10 and about["num_codes"] == 512
    assert about["image_shape"] == [1, 28, 28] and about["map_shape"] == [7, 7] and about["value_range"] == [-1, 1]


@needs_packages
def test_programs_match_torch_without_the_repository(exported, expected):
    program = f"""
import json, torch
found, about = {{}}, {{"metadata.json": ""}}
encoder, decoder, prior = (torch.export.load(f"exported/{{name}}.pt2", extra_files=about).module()
                           for name in ("encoder", "decoder", "prior"))
for size in {SIZES}:
    images, codes, classes = (torch.from_numpy(given[name][:size]) for name in ("images", "indices", "labels"))
    found |= {{f"codes{{size}}": encoder(images), f"decoded{{size}}": decoder(codes),
               f"logits{{size}}": prior(codes, classes)}}
assert json.loads(about["metadata.json"])["part"] == "prior"
{page_snippets()[0]}
assert indices.shape == (2, 7, 7) and json.loads(about["metadata.json"])["part"] == "encoder"
np.savez("found.npz", **{{name: value.detach() for name, value in found.items()}})
"""
    found = run_in_fresh_process(program, REPOSITORY, exported)
    for size in SIZES:
        assert_same(found, expected, size)


@needs_packages
def test_output_is_one_line_for_each_file(exported):
    lines = (exported / "stdout.txt").read_text().splitlines()
    names = [f"{part}{suffix}" for part in ("encoder", "decoder", "prior") for suffix in (".pt2", ".onnx")]
    for name, line in zip(names, lines):
        size = (exported / "exported" / name).stat().st_size
        assert line.startswith(f"exported/{name}: {size:,} bytes, "), line
        assert ("equal" if "encoder" in name else "largest difference") in line
        # No name of a folder of this machine.
        assert str(ROOT).encode() not in (exported / "exported" / name).read_bytes()
    assert len(lines) == len(names) == len(list((exported / "exported").iterdir()))


SETTINGS = {
    "fsq": ({"channels": 3, "hidden_size": 8, "num_codes": 40, "downsample": 8, "quantizer": "fsq", "levels": "8,5"},
            [3, 32, 32]),
    "sign": ({"hidden_size": 8, "num_codes": 16, "quantizer": "sign"}, [1, 12, 20])}


@needs_packages
@pytest.mark.parametrize("name", SETTINGS)
def test_other_quantizers_and_sizes_are_exported(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(vector_quantizer, "SignQuantizer", None, raising=False)
    page = (ROOT / "docs" / "your-own-quantizer.md").read_text()
    exec(re.search(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)[1], vars(vector_quantizer))
    config, shape = SETTINGS[name]
    torch.manual_seed(0)
    model = VectorQuantizedVAE(**config).eval()
    checkpoint.save("model.pt", {"format": 1, "kind": "vqvae", "config": config, "model": model.state_dict(),
                                 "dataset": {"name": "MNIST", "shape": shape}})
    words = ["--model", "model.pt", "--output", "new/folder"]
    script = import_script("export.py")
    if name == "fsq":           # beside a prior of another model, which is left out
        shutil.copy(checkpoint.PRETRAINED_PRIOR, "prior.pt")
        line = expect_usage_error("export.py", [*words, "--prior", "prior.pt"], capsys)
        assert "--prior prior.pt: this prior belongs to another VQ-VAE than model.pt" in line
    script.main(words)
    assert ("left out: prior.pt belongs to another model" in capsys.readouterr().err) == (name == "fsq")
    assert not list((tmp_path / "new" / "folder").glob("prior*"))
    x = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    encode, decode = (script.run_onnx((tmp_path / "new" / "folder" / f"{part}.onnx").read_bytes())
                      for part in ("encoder", "decoder"))
    with torch.no_grad():
        assert torch.equal(encode(x), model.encode(x))
        assert (decode(encode(x)) - model(x).reconstruction).abs().max() < 1e-5
    if name == "sign":
        check_what_is_replaced(script, words, tmp_path, capsys)


@pytest.mark.parametrize("update", vector_quantizer.CODEBOOK_UPDATES)
@torch.no_grad()
def test_traced_codebook_search_matches_its_blocks(update):
    """With latents that share an offset, and with codes that coincide: the first one wins."""
    torch.manual_seed(0)
    script, model = import_script("export.py"), VectorQuantizedVAE(1, 8, 33, codebook_update=update).eval()
    model.quantizer.codebook.data = torch.randn(33, 8) + 1000
    model.quantizer.codebook.data[20] = model.quantizer.codebook[3]
    part = script.parts_of(model, None, [1, 12, 20])[0]
    z_e = torch.randn(50, 8, 3, 5) + 1000
    z_e[:, :, 0, 0] = model.quantizer.codebook[20]
    module = script.Encode(torch.nn.Identity(), model.quantizer).eval()
    found = script.trace(part._replace(module=module, inputs={"images": z_e})).module()(z_e)
    assert torch.equal(found, model.quantizer.encode(z_e)) and (found[:, 0, 0] == 3).all()


def check_what_is_replaced(script, words, folder, capsys):
    """The rest of a test, which has exported a model to new/folder."""
    before, path = snapshot(folder), folder / "new" / "folder" / "decoder.pt2"
    capsys.readouterr()
    assert "encoder.onnx: exists, replace it with --overwrite" in expect_usage_error("export.py", words, capsys)
    assert snapshot(folder) == before
    path.write_bytes(b"a thesis")
    before = snapshot(folder)
    line = expect_usage_error("export.py", [*words, "--overwrite"], capsys)
    assert "--output new/folder: " in line and "decoder.pt2: exists and is not an exported model" in line
    assert snapshot(folder) == before
    path.unlink()
    path.with_name("prior.onnx").write_bytes(b"of a former export")
    assert "there is no prior to export: remove it" in expect_usage_error("export.py", [*words, "--overwrite"], capsys)
    path.with_name("prior.onnx").unlink()
    files = {file.name: (file.read_bytes() + b" ", "") for file in path.parent.iterdir()} | {path.name: (b"new", "")}
    script.make_files = lambda *given: files                # another export would take seconds
    script.main([*words, "--overwrite"])
    assert {file.name: file.read_bytes() for file in path.parent.iterdir()} == {
        name: contents for name, (contents, _) in files.items()}


# ---------------------------------------------------------------- the check, without the packages

def encoder_part(codebook):
    """A Part whose encoder returns the nearest codes of 100 images that are latents themselves, between 0 and 1."""
    script = import_script("export.py")
    model = torch.nn.Module()
    model.encoder, model.downsample, model.map_size = torch.nn.Identity(), 1, lambda h, w: (h, w)
    model.quantizer = VectorQuantizedVAE(1, 1, len(codebook), codebook_init="uniform").quantizer
    model.quantizer.codebook.data[:] = codebook.view(-1, 1)
    model.decoder = torch.nn.Identity()
    return script, script.parts_of(model.eval(), None, [1, 2, 3])[0]


@torch.no_grad()
def test_check_excuses_only_ties():
    script, part = encoder_part(torch.tensor([0.0, 1.0]))
    part.inputs["images"][:] = 1.0
    part.inputs["images"][0, 0, 0, 0] = 0.5
    correct = part.module(part.inputs["images"])
    assert script.check(part, part.module) == "equal"
    other = correct.clone()
    other[0, 0, 0] = 1 - other[0, 0, 0]
    assert "equal, except 3 of 648 indices" in script.check(part, lambda images: other[:len(images)])
    other[0, 0, 1] = 1 - other[0, 0, 1]
    with pytest.raises(ValueError, match="1 of 6 of its indices differ from torch's, by up to 1"):
        script.check(part, lambda images: other[:len(images)])
    with pytest.raises(ValueError, match=r"returns torch.int64 \(2, 3\)"):
        script.check(part, lambda images: other[0])


@torch.no_grad()
def test_check_finds_wrong_images_and_logits(trained):
    script = import_script("export.py")
    model, _ = checkpoint.load_model(trained / "models" / "run" / "best.pt")
    _, decoder, prior = script.parts_of(model, small_prior(model)[0], [1, 28, 28])
    for part in (decoder, prior):
        assert script.check(part, part.module) == "largest difference 0.0e+00"
        for wrong in (1e-3, float("nan")):
            with pytest.raises(ValueError, match="differ from torch's"):
                script.check(part, lambda *given, part=part, wrong=wrong: part.module(*given) + wrong)


def test_missing_packages_are_named(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    line = expect_usage_error("export.py", ["--model", checkpoint.PRETRAINED, "--output", "new"], capsys)
    assert "onnxruntime" in line and ": install what export.py needs with pip install -r " in line
    assert line.endswith("requirements-export.txt\n") and not list(tmp_path.iterdir())


def test_absent_and_damaged_models_are_refused(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = trained / "models" / "run" / "best.pt"
    (tmp_path / "half.pt").write_bytes(path.read_bytes()[:30_000])
    (tmp_path / "file").touch()
    before = snapshot(tmp_path)
    for flags, words in ((["--model", "half.pt"], "--model half.pt: not a checkpoint"),
                         (["--model", "none.pt"], "--model none.pt: No such file"),
                         (["--model", path, "--prior", path], f"--prior {path}: the file is not a checkpoint of a")):
        assert words in expect_usage_error("export.py", [*flags, "--output", "new"], capsys)
    if all(importlib.util.find_spec(name) for name in PACKAGES):
        line = expect_usage_error("export.py", ["--model", path, "--output", "file"], capsys)
        assert "--output file: " in line and "file is not a folder" in line
    assert snapshot(tmp_path) == before
