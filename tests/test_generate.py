"""generate.py from the command line, with its pictures read back."""

import shutil

import numpy as np
import pytest
import torch
from helpers import bundled_digits, expect_usage_error, import_script, readme_commands, run_script, snapshot
from PIL import Image

import checkpoint
import data
from data import image_file
from metrics import samples

SIDE = 10 * 28 + 11 * 2         # ten digits, separated by two pixels


@pytest.fixture
def folder(trained, tmp_path):
    """A folder with only the trained model, as model.pt."""
    shutil.copy(trained / "models" / "run" / "best.pt", tmp_path / "model.pt")
    return tmp_path


def generate(folder, *arguments):
    result = run_script("generate.py", "--model", "model.pt", *arguments, cwd=folder)
    assert result.returncode == 0, result.stderr
    path = folder / result.stdout.strip()
    return path, np.array(Image.open(path).convert("L")).astype(int)


def cells(grid):
    """The images of a 10×10 grid, (100, 28, 28), row by row."""
    assert grid.shape == (SIDE, SIDE)
    return np.array([grid[2 + 30 * i:, 2 + 30 * j:][:28, :28] for i in range(10) for j in range(10)])


def test_default_input_writes_100_reconstructions(folder):
    path, grid = generate(folder, "--filename", "grid", "--seed", 3)
    assert path == folder / "generatedImages" / "grid.png"
    digits = bundled_digits()[0][9000:].astype(int)
    errors = np.square(cells(grid)[:, None] - digits[None]).mean(axis=(2, 3))         # (100, 1000)
    nearest = errors.argmin(axis=1)
    assert len(set(nearest)) > 95                            # different test images
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:100].numpy()
    assert (nearest == chosen).mean() > 0.9
    assert errors[range(100), chosen].mean() < 0.2 * np.square(digits[chosen]).mean()
    assert np.median(cells(grid)) < 20 and cells(grid).max() > 230


def test_originals_are_in_rows_above_their_reconstructions(folder):
    _, plain = generate(folder, "--seed", 3)
    _, grid = generate(folder, "--seed", 3, "--originals", "--overwrite")
    rows = cells(grid).reshape(5, 2, 10, 28, 28)
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(3))[:50].numpy()
    assert np.abs(rows[:, 0].reshape(50, 28, 28) - bundled_digits()[0][9000:][chosen]).max() <= 1
    assert np.abs(rows[:, 1].reshape(50, 28, 28) - cells(plain)[:50]).max() <= 1


def test_images_of_a_folder_are_all_shown_and_one_without_permission_is_left_out(folder, monkeypatch, capsys):
    (folder / "Test").mkdir()
    for i, digit in enumerate(bundled_digits()[0][:14]):
        Image.fromarray(digit).save(folder / "Test" / f"{i:02}.png")
    monkeypatch.chdir(folder)

    def read_image(path, *shape, read=image_file.read_image):
        if path.name == "05.png":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path, *shape)

    monkeypatch.setattr(image_file, "read_image", read_image)
    # The folder, not the test set: --input test is a name only where no path is called that.
    import_script("generate.py").main(["--model", "model.pt", "--input", "Test", "--originals"])
    captured = capsys.readouterr()
    assert "left out: Test/05.png: Permission denied\n" in captured.err
    grid = np.array(Image.open(captured.out.strip()).convert("L")).astype(int)
    rows = [grid[2 + 30 * i:, 2 + 30 * j:][:28, :28] for i in range(4) for j in range(10)]
    shown, digits = rows[:10] + rows[20:23], np.delete(bundled_digits()[0][:14], 5, axis=0).astype(int)
    assert grid.shape == (4 * 30 + 2, SIDE) and max(cell.max() for cell in rows[23:30] + rows[33:]) == 0
    assert all(min(np.abs(cell - digit).max() for digit in digits) <= 1 for cell in shown)
    assert all(cell.max() > 100 for cell in rows[30:33])


def test_originals_flag_needs_images_as_input(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("random", "prior"):
        line = expect_usage_error("generate.py", ["--model", "model.pt", "--input", name, "--originals"], capsys)
        assert f"--originals: is used with images as --input, not with {name}" in line
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


def test_invert_flag_needs_own_images_as_input(folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for name in ("test", "random", "prior"):
        line = expect_usage_error("generate.py", ["--model", "model.pt", "--input", name, "--invert"], capsys)
        assert f"--invert: is used with the path of images as --input, not with {name}" in line
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


def test_inverted_drawing_is_reconstructed_as_the_digit(folder):
    digits = bundled_digits()[0][9000:9004]
    for path, pixels in (("digit.png", digits[0]), ("drawing.png", 255 - digits[0]), ("mixed/a.png", digits[1]),
                         ("mixed/b.png", 255 - digits[2]), ("mixed/c.png", 255 - digits[3]),
                         ("white.png", digits[0] | 255)):
        (folder / path).parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(folder / path)

    def reconstruct(*arguments, model="model.pt"):
        result = run_script("generate.py", "--model", model, "--originals", "--overwrite", "--input", *arguments,
                            cwd=folder)
        assert result.returncode == 0, result.stderr
        return np.array(Image.open(folder / result.stdout.strip())), result.stderr

    plain, error = reconstruct("digit.png")
    assert not error
    inverted, error = reconstruct("drawing.png", "--invert")
    assert not error and np.array_equal(inverted, plain)
    hint = ("dark on a light background, while the model learned light on dark: try --invert, with --overwrite or "
            "another --filename\n")
    unchanged, error = reconstruct("drawing.png")
    assert error == f"drawing.png: {hint}" and not np.array_equal(unchanged, plain)
    assert reconstruct("mixed")[1] == f"2 of 3 images in mixed: {hint}"
    assert not reconstruct("white.png")[1]
    # Photographs may have any background.
    assert not reconstruct("drawing.png", model=checkpoint.PRETRAINED.with_name("vqvae-cifar10.pt"))[1]


def test_documented_command_inverts_a_drawing(tmp_path):
    (_, script, *words), = readme_commands("docs/own-images.md", "Drawings for a model of digits")
    Image.fromarray(255 - bundled_digits()[0][9000]).save(tmp_path / "drawing.png")
    result = run_script(script, *words, cwd=tmp_path)
    assert result.returncode == 0 and result.stderr.count("\n") == 1 and "--model" in result.stderr
    assert (tmp_path / "generatedImages" / "drawing.png").is_file()


@pytest.mark.parametrize("source", ["random", "prior", "."])
def test_data_flags_need_the_test_set_as_input(source, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    for flag, value in (("--dataset", "MNIST-10k"), ("--data-folder", "here"), ("--num-workers", "2")):
        line = expect_usage_error("generate.py", ["--model", "model.pt", "--input", source, flag, value], capsys)
        assert f"{flag} {value}: is used with --input test, not with {source}" in line
    assert [path.name for path in folder.iterdir()] == ["model.pt"]


def test_random_decodes_the_codes_nearest_to_gaussian_noise(folder):
    _, grid = generate(folder, "--input", "RANDOM", "--seed", 5)
    model, _ = checkpoint.load_model(folder / "model.pt")
    noise = torch.randn(100, 16, 7, 7, generator=torch.Generator().manual_seed(5))
    codebook = model.quantizer.codebook.detach().double()
    nearest = torch.cdist(noise.permute(0, 2, 3, 1).reshape(-1, 16).double(), codebook).argmin(dim=1)
    with torch.no_grad():
        expected = model.decode(nearest.view(100, 7, 7)).squeeze(1).add(1).mul(127.5).numpy()
    # A latent between two codes may round to either, which changes the pixels around it.
    assert (np.abs(cells(grid) - expected).max(axis=(1, 2)) <= 1).sum() >= 97


def test_pictures_depend_on_the_seed_and_are_named_after_the_input(folder):
    grids = {}
    for name in ("MNIST", "random"):
        path, first = generate(folder, "--input", name)
        assert path.name == {"MNIST": "MNIST-10k.png"}.get(name, f"{name}.png")
        grids[name] = [first, generate(folder, "--input", name, "--seed", 0, "--filename", f"again-{name}")[1],
                       generate(folder, "--input", name, "--seed", 1, "--overwrite")[1]]
        assert np.array_equal(*grids[name][:2]) and not np.array_equal(*grids[name][1:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")
@pytest.mark.parametrize("source", ["test", "random"])
def test_gpu_output_matches_cpu_output(source, folder):
    grids = [generate(folder, "--input", source, "--device", device, "--filename", device)[1]
             for device in ("cpu", "cuda")]
    assert np.abs(grids[0] - grids[1]).mean() < 1             # ties may be broken differently


@pytest.mark.parametrize("name, expected", [("a.png", "a.png"), ("a.PNG", "a.PNG"), ("a.b", "a.b.png"), ("b/", "b.png"),
                                           (".png", ".png.png"),
                                           ("new/folder/a", "new/folder/a.png")])
def test_filename_gets_one_png_suffix_and_missing_folders(name, expected, folder):
    assert generate(folder, "--input", "random", "--filename", name)[0] == folder / "generatedImages" / expected


def test_generate_accepts_another_data_set(folder, mnist_folder):
    _, grid = generate(folder, "--dataset", "MNIST", "--data-folder", mnist_folder)
    _, test_set = data.load("MNIST", mnist_folder)
    errors = np.square(cells(grid)[:, None] - test_set.images.squeeze(1).numpy().astype(int)[None]).mean(axis=(2, 3))
    chosen = torch.randperm(200, generator=torch.Generator().manual_seed(0))[:100].numpy()
    assert (errors.argmin(axis=1) == chosen).mean() > 0.9


# ---------------------------------------------------------------- completions

@pytest.fixture
def complete(tmp_path, monkeypatch):
    """A function that runs generate.py --complete with the shipped prior → picture, labels and maps of its samples."""
    monkeypatch.chdir(tmp_path)
    found, sample_maps = {}, samples.sample_maps

    def keep(prior, labels, *given):
        found["labels"], found["maps"] = labels, sample_maps(prior, labels, *given)
        return found["maps"]

    def run(rows, *words):
        import_script("generate.py").main(["--complete", str(rows), "--filename", "x", "--overwrite", *map(str, words)])
        return np.array(Image.open("generatedImages/x.png").convert("L")).astype(int), found["labels"], found["maps"]

    monkeypatch.setattr(samples, "sample_maps", keep)
    return run


DIGITS = ("--dataset", "MNIST-10k")


@torch.no_grad()
def test_completions_keep_the_codes_of_the_upper_rows(complete):
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:10].numpy()
    originals = bundled_digits()[0][9000:][chosen]
    model, _ = checkpoint.load_model(checkpoint.PRETRAINED)
    x = data.to_model_range(torch.from_numpy(originals).unsqueeze(1))
    codes, reconstructions = model.encode(x), data.to_uint8(model(x).reconstruction).squeeze(1).numpy().astype(int)
    for rows in (0, 3, 7):
        grid, labels, maps = complete(rows, *DIGITS)
        assert (labels == 10).all() and maps.shape == (100, 7, 7)     # no class: none is given away
        maps = maps.view(10, 10, 7, 7)                                # of each image, ten
        assert (maps[:, :, :rows] == codes.unsqueeze(1)[:, :, :rows]).all()
        different = (maps[:, :, rows:] != codes.unsqueeze(1)[:, :, rows:]).float()
        assert rows == 7 or different.mean() > 0.3
        assert grid.shape == (SIDE, SIDE + 30)
        pictures = np.array([[grid[2 + 30 * i:, 2 + 30 * j:][:28, :28] for j in range(11)] for i in range(10)])
        assert np.array_equal(pictures[:, 0], originals)
        # With all codes kept, the completions are the reconstruction.
        assert (np.abs(pictures[:, 1:] - reconstructions[:, None]).max() <= 1) == (rows == 7)


def test_completions_depend_on_seed_class_and_temperature(complete):
    first, _, maps = complete(3, *DIGITS)
    assert np.array_equal(complete(3, *DIGITS)[0], first)
    assert not np.array_equal(complete(3, *DIGITS, "--seed", 1)[0], first)
    _, labels, others = complete(3, *DIGITS, "--label", 4, "--guidance", 2, "--temperature", 0.5, "--top-k", 1)
    assert (labels == 4).all() and torch.equal(others[:, :3], maps[:, :3]) and not torch.equal(others, maps)
    others = others.view(10, 10, 7, 7)
    assert torch.equal(others, others[:, :1].expand_as(others))       # the most probable code each time


def test_one_image_gets_a_single_row_of_completions(complete, tmp_path):
    digit = bundled_digits()[0][9000]
    Image.fromarray(255 - digit).save(tmp_path / "drawing.png")
    grid, _, maps = complete(2, "--input", "drawing.png", "--invert")
    assert grid.shape == (32, 11 * 30 + 2) and len(maps) == 10 and np.array_equal(grid[2:30, 2:30], digit)


def test_completions_that_are_impossible_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    _, saved = checkpoint.load_prior(checkpoint.PRETRAINED_PRIOR, checkpoint.PRETRAINED)
    checkpoint.save("labelled.pt", {**saved, "config": saved["config"] | {"drop_label": 0.0}})
    before = snapshot(tmp_path)
    model = ("--model", checkpoint.PRETRAINED, "--complete")
    for words, line in (
            (("8", *DIGITS), "--complete 8: the model's code maps have 7 rows"), (("-1",), "--complete: '-1' is not"),
            (("3", "--input", "prior"), "--complete 3: is used with images as --input, not with prior"),
            (("3", "--input", "random"), "--complete 3: is used with images as --input, not with random"),
            (("3", "--originals"), "--originals: has no effect with --complete"),
            (("3", "--guidance", "2"), "--guidance 2.0: needs a class, add one with --label"),
            (("3", *DIGITS, "--label", "ten"), "--label ten: the prior knows the classes 0 to 9"),
            (("3", *DIGITS, "--prior", "labelled.pt"), "--complete 3: the prior in labelled.pt was trained with")):
        assert line in expect_usage_error("generate.py", [*model, *words], capsys)
    assert snapshot(tmp_path) == before
