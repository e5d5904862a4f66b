"""Folders of user images: every mode of Pillow, EXIF orientations, broken files, any name and size."""

import multiprocessing
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import events, expect_usage_error, import_script, readme_commands, run_script
from PIL import Image, ImageOps

import checkpoint
import data
from data import image_file, image_folder

COLOURS = {"red ones": (220, 30, 30), "grüne": (30, 200, 40), "blau": (30, 60, 220)}
MODES = {"L": "png", "LA": "png", "P": "gif", "RGBA": "png", "CMYK": "jpg", "RGB": "webp", "1": "png", "I;16": "png"}


def write_images(root, per_mode=4):
    """Write per_mode images of every mode and colour below root, and a broken, a text and a hidden file."""
    rng = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name / "more").mkdir(parents=True)
        for mode, suffix in MODES.items():
            for i in range(per_mode):
                height, width = rng.integers(9, 130, 2)
                pixels = np.full((height, width, 3), colour, np.uint8)
                pixels[height // 4:height // 2, width // 4:width // 2] = rng.integers(0, 255, 3)
                if mode == "I;16":
                    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
                else:
                    image = Image.fromarray(pixels).convert(mode)
                subfolder, exif = root / name / ("more" if i == 1 else "."), Image.Exif()
                exif[0x0112] = 1 + i                    # rotated, mirrored
                save_options = {"exif": exif} if suffix in ("jpg", "webp") else {}
                image.save(subfolder / f"Bild Nr. {i} ü {mode.replace(';', '')}.{suffix}", **save_options)
    image_bytes = (root / "red ones" / "Bild Nr. 0 ü RGB.webp").read_bytes()
    (root / "blau" / "broken.webp").write_bytes(image_bytes[:len(image_bytes) // 2])
    (root / "blau" / "notes.txt").write_text("no image")
    (root / "blau" / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory):
    """A folder with images in three subfolders. Read-only."""
    return write_images(tmp_path_factory.mktemp("images") / "my images")


def save_image(image, path, **options):
    image.save(path, **options)
    return path


def test_transparent_pixels_become_white_and_others_keep_their_colour(tmp_path):
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4] = (200, 100, 50, 255)
    half[:, 4:] = (1, 2, 3, 0)
    rgba = Image.fromarray(half)
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((7, 0))
    for image in (rgba, palette):
        loaded = image_file.read_image(save_image(image, tmp_path / "image.png"), 8, 8, 3)
        assert (loaded[:, :, :4].permute(1, 2, 0) == torch.tensor([200, 100, 50])).all()
        assert (loaded[:, :, 4:] == 255).all()
    grey = image_file.read_image(save_image(rgba.convert("LA"), tmp_path / "grey.png"), 8, 8, 1)
    assert (grey[0, :, :4] == rgba.convert("L").getpixel((0, 0))).all() and (grey[0, :, 4:] == 255).all()


def test_16_bit_images_are_scaled_to_8_bits(tmp_path):
    for largest in (255, 256, 65535):               # the depth decides, and not the values
        shades = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
        for suffix in ("png", "tif"):
            path = save_image(Image.fromarray(shades), tmp_path / f"deep.{suffix}")
            for channels in (1, 3):
                loaded = image_file.read_image(path, 8, 8, channels)
                assert np.array_equal(loaded.numpy(), np.broadcast_to(np.round(shades / 257), (channels, 8, 8)))
    path = save_image(Image.fromarray(shades), tmp_path / "transparent.png", transparency=int(shades[2, 3]))
    loaded = image_file.read_image(path, 8, 8, 1)[0]
    assert loaded[2, 3] == 255 and loaded[2, 4] == np.round(shades[2, 4] / 257)


def test_lab_images_load_in_colour_and_grey(tmp_path):
    lab = Image.merge("LAB", [Image.new("L", (8, 8), value) for value in (180, 0, 0)])
    path = save_image(lab, tmp_path / "lab.tif")
    colour, grey = (image_file.read_image(path, 8, 8, channels) for channels in (3, 1))
    assert grey.float().mean() == pytest.approx(colour.float().mean(), abs=40) and 128 < grey.float().mean() < 220


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, orientation):
    pixels = np.random.default_rng(1).integers(0, 255, (16, 16), np.uint8)
    upright = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
               6: pixels.T[:, ::-1], 7: pixels[::-1, ::-1].T, 8: pixels.T[::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save_image(Image.fromarray(pixels), tmp_path / "rotated.png", exif=exif)
    assert np.array_equal(image_file.read_image(path, 16, 16, 1)[0].numpy(), upright)


def test_images_are_center_cropped_and_not_stretched(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 14:46] = 255                            # the centre crop, with a margin for the resize filter
    loaded = image_file.read_image(save_image(Image.fromarray(wide), tmp_path / "wide.png"), 20, 20, 3)
    assert (loaded == 255).all()
    tall = image_file.read_image(save_image(Image.fromarray(wide.transpose(1, 0, 2)), tmp_path / "tall.png"), 8, 8, 1)
    assert (tall == 255).all()
    pixels = np.random.default_rng(2).integers(0, 255, (8, 12), np.uint8)
    flat = image_file.read_image(save_image(Image.fromarray(pixels), tmp_path / "flat.png"), 8, 12, 1)
    assert np.array_equal(flat[0], pixels)


def test_formats_that_pillow_leaves_to_other_programs_are_no_images(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", None)           # Ghostscript
    for shade in range(4):
        Image.new("L", (8, 8), 40 * shade).save(tmp_path / f"{shade}.png")
    Image.new("L", (8, 8)).save(tmp_path / "drawing.eps")
    (tmp_path / "photo.png").write_bytes((tmp_path / "drawing.eps").read_bytes())
    (tmp_path / "drawing").write_bytes((tmp_path / "drawing.eps").read_bytes())
    (tmp_path / "film.mpg").write_bytes(b"\x00\x00\x01\xb3" + bytes(100))
    train, test = data.load("folder", tmp_path, [1, 8, 8])
    assert {path.name for path in train.left_out} == {"drawing.eps", "drawing", "film.mpg"}
    assert len(train) + len(test) == 5          # photo.png by its name, until it is read
    with pytest.raises(ValueError, match="not an image that Pillow can read"):
        image_file.read_image(tmp_path / "photo.png", 8, 8, 1)


def test_subfolders_are_classes_and_other_files_are_skipped(images_folder):
    train, test = data.load("folder", images_folder, [3, 16, 16])
    assert train.classes == test.classes == sorted(COLOURS)
    assert [path.name for path in train.left_out] == ["notes.txt"]
    assert len(test) == round(0.1 * 3 * 8 * 4) and len(train) + len(test) == 3 * 8 * 4 + 1      # a broken one
    assert torch.cat([train.labels, test.labels]).bincount().tolist() == [8 * 4 + 1, 8 * 4, 8 * 4]
    for part in (train, test):
        images, labels = part[:]
        for name, colour in COLOURS.items():        # the colour around the square in the middle is that of the class
            corners = images[labels == train.classes.index(name)][:, :, 0, 0]
            coloured = corners[corners.double().std(dim=1) > 9].double()
            assert len(coloured) > 9 or part is test
            assert (coloured.argmax(dim=1) == torch.tensor(colour).argmax()).all()


def shades(dataset):
    """The top left grey value of each image."""
    return dataset[:][0][:, 0, 0, 0].tolist()


def write_shades(folder, count, size=5):
    """Write grey images 0.png, 1.png, … of one shade each, their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for shade in range(count):
        Image.new("L", (size, size), shade).save(folder / f"{shade}.png")


def test_train_and_test_folders_define_the_split(tmp_path):
    for part, names in (("train", "abc"), ("test", "cd"), ("other", "e")):
        for number, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            shade = 10 * number + (part == "test")
            Image.new("L", (5, 5), shade).save(tmp_path / part / name / "image.png")
    train, test = data.load("folder", tmp_path, [1, 4, 4])
    assert train.classes == test.classes == ["a", "b", "c", "d"]
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [2, 3]
    assert shades(train) == [0, 10, 20] and shades(test) == [1, 11]


@pytest.mark.parametrize(("folders", "sets", "ignored"), [
    (("train/cat", "train/dog", "val/dog"), ("train", "val"), ""),
    (("Training/cat", "Training/dog", "VALIDATION/cat"), ("Training", "VALIDATION"), ""),
    (("train/cat", "train/dog", "test/cat", "val/dog"), ("train", "test"), "; ignored: val"),
    (("archive/data/train/cat", "archive/data/train/dog", "archive/data/Test/cat"), ("train", "Test"), ""),
    (("archive/cat", "archive/dog"), None, ""), (("cat/train", "dog/test"), None, "")])
def test_usual_layouts_are_understood_and_described(folders, sets, ignored, tmp_path):
    for shade, folder in enumerate(folders):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (5, 5), 50 * shade).save(tmp_path / folder / f"{i}.png")
    train, test = data.load("folder", tmp_path, [1, 4, 4])
    assert train.classes == test.classes == ["cat", "dog"]
    described = "2 classes: cat, dog" + (f"; to train: {sets[0]}, to test: {sets[1]}" if sets else "") + ignored
    assert train.description.endswith(f" ({described})")
    if sets:
        assert len(train) == 4 * sum(sets[0] in folder for folder in folders)
        assert len(test) == 4 * sum(sets[1] in folder for folder in folders)
    else:
        assert len(train) == 7 and len(test) == 1


def test_fingerprint_notices_every_change_of_a_file_and_no_other(tmp_path):
    def fingerprint(folder="images"):
        return data.load("folder", tmp_path / folder, [1, 4, 4])[0].fingerprint

    for name in ("a/1.png", "a/2.png", "b/3.png"):
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (5, 5), 9).save(tmp_path / "images" / name)
    first, seen = fingerprint(), set()
    (tmp_path / "images" / "a" / "1.png").touch()
    assert fingerprint() == first
    for source, target in (("a/1.png", "b/1.png"), ("b/1.png", "b/0.png"), ("a/2.png", "b/2.png")):
        (tmp_path / "images" / source).rename(tmp_path / "images" / target)
        seen.add(fingerprint())
    Image.new("L", (50, 50), 9).save(tmp_path / "images" / "b" / "0.png")       # another picture under the same name
    seen.add(fingerprint())
    assert len(seen | {first}) == 5
    (tmp_path / "images").rename(tmp_path / "moved")
    assert fingerprint("moved") in seen


def test_pictures_that_the_scripts_write_are_no_data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog", "generatedImages", "logs/run/00001/codebook", "models"):
        (tmp_path / name).mkdir(parents=True)
        for i in range(2):
            Image.new("L", (5, 5)).save(tmp_path / name / f"{i}.png")
    train, test = data.load("folder", ".", [1, 4, 4])
    assert train.classes == ["cat", "dog"] and len(train) + len(test) == 4
    assert len(image_folder.list_files(tmp_path / "generatedImages")) == 2          # where it is asked for


def test_flat_folder_has_one_class_and_a_stable_split(tmp_path):
    write_shades(tmp_path, 30)
    first, reloaded = (data.load("folder", tmp_path, [1, 4, 4]) for _ in range(2))
    assert first[0].classes == ["."] and len(first[1]) == 3
    assert sorted(shades(first[0]) + shades(first[1])) == list(range(30))
    assert shades(first[1]) == shades(reloaded[1]) != [0, 1, 10]            # not simply the first names
    # Adding an image moves at most one other between the sets.
    Image.new("L", (5, 5), 200).save(tmp_path / "more.png")
    extended = data.load("folder", tmp_path, [1, 4, 4])
    assert len(set(shades(first[1])) - set(shades(extended[1]))) <= 1


def test_symlinked_folders_are_classes_and_loops_terminate(tmp_path):
    for name in ("cat", "dog"):
        (tmp_path / "real" / name).mkdir(parents=True)
        for shade in range(3):
            Image.new("L", (5, 5), shade).save(tmp_path / "real" / name / f"{shade}.png")
    (tmp_path / "linked").mkdir()
    for name in ("cat", "dog"):
        (tmp_path / "linked" / name).symlink_to(tmp_path / "real" / name)
    (tmp_path / "real" / "dog" / "loop").symlink_to(tmp_path / "real")
    for name, count in (("linked", 6), ("real", 6)):
        train, test = data.load("folder", tmp_path / name, [1, 4, 4])
        assert train.classes == ["cat", "dog"] and len(train) + len(test) == count, name


def test_32_bit_integers_load_and_floats_are_rejected(tmp_path):
    pixels = np.arange(16).reshape(4, 4)
    deep = image_file.read_image(save_image(Image.fromarray(pixels.astype(np.int32)), tmp_path / "deep.tif"), 4, 4, 1)
    assert np.array_equal(deep[0].numpy(), pixels)          # 32-bit integers whose values fit into 8 bits
    with pytest.raises(ValueError, match="floating-point"):
        image_file.read_image(save_image(Image.fromarray(pixels.astype(np.float32)), tmp_path / "float.tif"), 4, 4, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_deleted_image_ends_training_with_a_one_line_error(num_workers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shades(tmp_path / "images", 40)
    load = image_folder.load

    def load_then_delete(*args, **kwargs):
        loaded = load(*args, **kwargs)
        assert loaded[0].fingerprint        # taken before the training
        loaded[0].paths[7].unlink()
        return loaded

    monkeypatch.setattr(image_folder, "MAX_IN_MEMORY", 10)
    monkeypatch.setattr(image_folder, "load", load_then_delete)
    with pytest.raises(SystemExit) as excinfo:
        import_script("VQ-VAE.py").main(["--dataset", "folder", "--data-folder", "images", "--image-size", "8",
                                         "--k", "4", "--batch-size", "8", "--num-workers", str(num_workers)])
    stderr = capsys.readouterr().err
    assert excinfo.value.code == 2 and stderr.count("\n") == 1 and "Traceback" not in stderr
    assert ".png" in stderr and "No such file" in stderr and "models/vqvae/last.pt is intact" in stderr
    for child in multiprocessing.active_children():
        child.join()            # killed by the script


def test_resume_accepts_a_moved_but_not_a_changed_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_shades(tmp_path / "images", 20)
    train = import_script("VQ-VAE.py").main
    train(["--dataset", "folder", "--data-folder", "images", "--image-size", "8", "--channels", "1", "--k", "4",
           "--batch-size", "8", "--num-epochs", "1"])
    (tmp_path / "images").rename(tmp_path / "moved")
    capsys.readouterr()
    resume_flags = ["--resume", "--num-epochs", "2"]
    assert "there is no folder" in expect_usage_error("VQ-VAE.py", resume_flags, capsys)
    train([*resume_flags, "--data-folder", "moved", "--num-workers", "1"])
    train_prior = import_script("train_prior.py").main
    prior_flags = ["--model", "models/vqvae/best.pt", "--data-folder", "moved"]
    train_prior([*prior_flags, "--num-epochs", "1", "--layers", "1", "--width", "12", "--shift", "0"])
    assert "not those that the model was trained on" not in capsys.readouterr().err
    Image.new("L", (8, 8), 200).save(tmp_path / "moved" / "more.png")
    with pytest.raises(SystemExit):
        train_prior([*prior_flags, "--resume", "--num-epochs", "2"])
    note, line = capsys.readouterr().err.splitlines()
    assert note.startswith("The images in moved are not those that the model was trained on")
    assert "--resume models/vqvae/prior-last.pt: the images in moved are not those that the run began" in line
    _, last = checkpoint.load_prior("models/vqvae/prior-last.pt", "models/vqvae/best.pt")
    del last["files"]                           # as an earlier version wrote it
    checkpoint.save("models/vqvae/prior-last.pt", last)
    train_prior([*prior_flags, "--resume", "--num-epochs", "2"])
    assert checkpoint.load_prior("models/vqvae/prior-last.pt", "models/vqvae/best.pt")[1]["epoch"] == 2
    capsys.readouterr()
    line = expect_usage_error("VQ-VAE.py", ["--resume", "--num-epochs", "3", "--data-folder", "moved"], capsys)
    assert "moved are not those that the run began with" in line


@pytest.fixture(scope="module")
def trained_folder(images_folder, tmp_path_factory):
    """A folder in which the commands of the docs have trained on the images, with smaller settings."""
    folder, commands = tmp_path_factory.mktemp("trained"), readme_commands("docs/own-images.md", "A folder of images")
    extra = {"VQ-VAE.py": ("--num-epochs", 15, "--batch-size", 16, "--lr", "5e-3", "--beta", 0.25, "--k", 64,
                           "--hidden-size", 16),
             "train_prior.py": ("--num-epochs", 5, "--width", 64, "--heads", 2, "--layers", 1, "--batch-size", 8,
                                "--shift", 0)}
    assert len(commands) == 4 and "64" in commands[0]
    for _, script, *words in commands:
        words = [word.replace("my photos/beach.jpg", str(images_folder / "blau" / "Bild Nr. 0 ü CMYK.jpg"))
                 .replace("my photos", str(images_folder)) for word in words]
        result = run_script(script, *words, *extra.get(script, ()), cwd=folder)
        assert result.returncode == 0, result.stderr
        if script in extra:
            assert f"Left out of {images_folder}, 1 that Pillow cannot read" in result.stderr
            assert result.stderr.count("broken.webp") == 1 and "1 of 80 images cannot be used" in result.stderr
    assert {path.name for path in (folder / "generatedImages").iterdir()} == {"mine.png", "Bild Nr. 0 ü CMYK.png"}
    return folder


def test_mixed_image_folder_trains_a_colour_model(trained_folder, images_folder, monkeypatch):
    monkeypatch.chdir(trained_folder)
    losses = [event.value for event in events(trained_folder / "logs" / "mine").Scalars("loss/test/reconstruction")]
    assert losses[-1] < 0.6 * losses[0]
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--filename", "reconstructed"])
    picture = np.asarray(Image.open("generatedImages/reconstructed.png"))
    assert picture.shape == (66 + 2, 10 * 66 + 2, 3)           # ten test images
    _, test_set = data.load("folder", images_folder, [3, 64, 64])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    cells = [picture[2:66, 2 + column * 66:66 + column * 66] for column in range(10)]
    colours = np.stack(cells).astype(float).mean(axis=(1, 2))
    means = test_set[order][0].double().mean(dim=(2, 3)).numpy()
    assert np.abs(colours - means).mean() < 20 < np.abs(colours - means[::-1]).mean()


def test_prior_samples_by_class(trained_folder, monkeypatch):
    monkeypatch.chdir(trained_folder)
    means = []
    for name in COLOURS:
        import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", "prior", "--label", name,
                                           "--filename", name])
        picture = np.asarray(Image.open(f"generatedImages/{name}.png"))
        assert picture.shape == (662, 662, 3)
        means.append(picture.reshape(-1, 3).mean(axis=0))
    # Many images of a class are grey: compare each colour channel between the classes.
    assert (np.array(means) - np.mean(means, axis=0)).argmax(axis=1).tolist() == [
        np.argmax(colour) for colour in COLOURS.values()]


def test_user_images_are_reconstructed(trained_folder, images_folder, monkeypatch, capsys):
    monkeypatch.chdir(trained_folder)
    path = images_folder / "grüne" / "Bild Nr. 0 ü RGB.webp"
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", str(path)])
    picture = Image.open("generatedImages/Bild Nr. 0 ü RGB.png")
    upright = ImageOps.exif_transpose(Image.open(path)).convert("RGB")
    original = np.asarray(ImageOps.fit(upright, (64, 64), Image.Resampling.LANCZOS))
    assert picture.size == (64, 64) and np.abs(np.asarray(picture).astype(float) - original).mean() < 45
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", str(images_folder / "blau"),
                                       "--overwrite"])
    assert Image.open("generatedImages/blau.png").size == (662, 4 * 66 + 2)       # 32 images
    assert "notes.txt is not an image" in capsys.readouterr().err
    Image.open(path).save(trained_folder / "generatedImages" / "mine.png")
    before = (trained_folder / "generatedImages" / "mine.png").read_bytes()
    for source in ("generatedImages/mine.png", "generatedImages"):
        arguments = ["--model", "models/mine/best.pt", "--input", source, "--filename", "mine", "--overwrite"]
        line = expect_usage_error("generate.py", arguments, capsys)
        assert "--filename mine: generatedImages/mine.png: is in --input" in line
    assert (trained_folder / "generatedImages" / "mine.png").read_bytes() == before
    # A model of digits accepts them too, resized and in grey.
    import_script("generate.py").main(["--input", str(path), "--filename", "as a digit"])
    assert Image.open("generatedImages/as a digit.png").size == (28, 28)


def test_bad_folders_get_one_line_errors(images_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    with zipfile.ZipFile(tmp_path / "packed.zip", "w") as archive:
        archive.write(tmp_path / "text" / "a.txt")
    (tmp_path / "packed").mkdir()
    shutil.copyfile(tmp_path / "packed.zip", tmp_path / "packed" / "photos.zip")
    for arguments, words in (
            (["--data-folder", "nowhere"], ("--dataset folder --data-folder nowhere", "there is no folder")),
            (["--data-folder", "packed.zip"], ("--data-folder packed.zip: is a file; unpack it",)),
            (["--data-folder", "text/a.txt"], ("--data-folder text/a.txt: is a file; give the folder",)),
            (["--data-folder", "empty"], ("--data-folder empty", "no file")),
            (["--data-folder", ""], ("--data-folder: '' is not a path",)),
            (["--data-folder", "text"], ("--data-folder text", "0 of its files are images", "are needed\n")),
            (["--data-folder", "packed"], ("0 of its files are images", f"; unpack {Path('packed/photos.zip')} first")),
            (["--data-folder", images_folder, "--image-size", "30"], ("--image-size", "'30' is not a multiple of 4")),
            (["--data-folder", images_folder, "--channels", "2"], ("--channels", "2"))):
        line = expect_usage_error("VQ-VAE.py", ["--dataset", "folder", *arguments], capsys)
        assert all(word in line for word in words), line
    line = expect_usage_error("VQ-VAE.py", ["--dataset", "MNIST-10k", "--image-size", "32"], capsys)
    assert "--image-size 32" in line and "--dataset folder" in line
    for path, words in (("nowhere.png", ("--input", "nowhere.png", "random, prior")),
                        ("text/a.txt", ("--input text/a.txt", "not an image that Pillow can read")),
                        ("empty", ("--input empty", "no image in it"))):
        line = expect_usage_error("generate.py", ["--model", checkpoint.PRETRAINED, "--input", path], capsys)
        assert all(word in line for word in words), line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "empty", "packed", "packed.zip",
                                                                    "photos.zip", "text"]
