"""Folders of images as people have them: every mode of Pillow, turned by EXIF, broken, of any name and size."""

import multiprocessing

import numpy as np
import pytest
import torch
from helpers import events, import_script, readme_commands, refuse, run_script
from PIL import Image, ImageOps

import checkpoint
import data
import image_folder

COLOURS = {"red ones": (220, 30, 30), "grüne": (30, 200, 40), "blau": (30, 60, 220)}
MODES = {"L": "png", "LA": "png", "P": "gif", "RGBA": "png", "CMYK": "jpg", "RGB": "webp", "1": "png", "I;16": "png"}


def write_images(root, each=4):
    """A tree of `each` images of every mode in every colour, one broken, one no image, one hidden."""
    random = np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (root / name / "more").mkdir(parents=True)
        for mode, suffix in MODES.items():
            for i in range(each):
                height, width = random.integers(9, 130, 2)
                pixels = np.full((height, width, 3), colour, np.uint8)
                pixels[height // 4:height // 2, width // 4:width // 2] = random.integers(0, 255, 3)
                if mode == "I;16":
                    image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
                else:
                    image = Image.fromarray(pixels).convert(mode)
                inside, exif = root / name / ("more" if i == 1 else "."), Image.Exif()
                exif[0x0112] = 1 + i                    # turned, mirrored
                turned = {"exif": exif} if suffix in ("jpg", "webp") else {}
                image.save(inside / f"Bild Nr. {i} ü {mode.replace(';', '')}.{suffix}", **turned)
    whole = (root / "red ones" / "Bild Nr. 0 ü RGB.webp").read_bytes()
    (root / "blau" / "broken.webp").write_bytes(whole[:len(whole) // 2])
    (root / "blau" / "notes.txt").write_text("no image")
    (root / "blau" / ".hidden.png").write_bytes(b"")
    return root


@pytest.fixture(scope="session")
def images_folder(tmp_path_factory):
    """A folder with images in three sub-folders. Not to be changed."""
    return write_images(tmp_path_factory.mktemp("images") / "my images")


def saved(image, path, **options):
    image.save(path, **options)
    return path


def test_transparent_is_white_and_the_others_keep_their_colour(tmp_path):
    half = np.zeros((8, 8, 4), np.uint8)
    half[:, :4] = (200, 100, 50, 255)
    half[:, 4:] = (1, 2, 3, 0)
    rgba = Image.fromarray(half)
    palette = rgba.convert("RGB").quantize(4)
    palette.info["transparency"] = palette.getpixel((7, 0))
    for image in (rgba, palette):
        read = image_folder.read(saved(image, tmp_path / "image.png"), 8, 8, 3)
        assert (read[:, :, :4].permute(1, 2, 0) == torch.tensor([200, 100, 50])).all()
        assert (read[:, :, 4:] == 255).all()
    grey = image_folder.read(saved(rgba.convert("LA"), tmp_path / "grey.png"), 8, 8, 1)
    assert (grey[0, :, :4] == rgba.convert("L").getpixel((0, 0))).all() and (grey[0, :, 4:] == 255).all()


def test_sixteen_bits_keep_their_shades(tmp_path):
    shades = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    for channels in (1, 3):
        read = image_folder.read(saved(Image.fromarray(shades), tmp_path / "deep.png"), 8, 8, channels)
        assert np.array_equal(read.numpy(), np.broadcast_to(np.round(shades / 257), (channels, 8, 8)))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_turned_as_exif_says(tmp_path, orientation):
    pixels = np.random.default_rng(1).integers(0, 255, (16, 16), np.uint8)
    upright = {1: pixels, 2: pixels[:, ::-1], 3: pixels[::-1, ::-1], 4: pixels[::-1], 5: pixels.T,
               6: pixels.T[:, ::-1], 7: pixels[::-1, ::-1].T, 8: pixels.T[::-1]}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(Image.fromarray(pixels), tmp_path / "turned.png", exif=exif)
    assert np.array_equal(image_folder.read(path, 16, 16, 1)[0].numpy(), upright)


def test_the_middle_is_kept_and_not_stretched(tmp_path):
    wide = np.zeros((20, 60, 3), np.uint8)
    wide[:, 14:46] = 255                            # the middle square and what its filter sees; black on both sides
    read = image_folder.read(saved(Image.fromarray(wide), tmp_path / "wide.png"), 20, 20, 3)
    assert (read == 255).all()
    tall = image_folder.read(saved(Image.fromarray(wide.transpose(1, 0, 2)), tmp_path / "tall.png"), 8, 8, 1)
    assert (tall == 255).all()
    pixels = np.random.default_rng(2).integers(0, 255, (8, 12), np.uint8)
    assert np.array_equal(image_folder.read(saved(Image.fromarray(pixels), tmp_path / "flat.png"), 8, 12, 1)[0], pixels)


def test_classes_are_the_sub_folders_and_what_is_no_image_is_left_out(images_folder):
    train, test = data.load("folder", images_folder, [3, 16, 16])
    assert train.classes == test.classes == sorted(COLOURS)
    assert [path.name for path in train.left_out] == ["broken.webp", "notes.txt"]
    assert len(test) == round(0.1 * 3 * 8 * 4) and len(train) + len(test) == 3 * 8 * 4
    assert (torch.cat([train.labels, test.labels]).bincount() == 8 * 4).all()
    for part in (train, test):
        for name, colour in COLOURS.items():        # what surrounds the square in the middle says which class it is
            corners = part.images[part.labels == train.classes.index(name)][:, :, 0, 0]
            coloured = corners[corners.double().std(dim=1) > 9].double()
            assert len(coloured) > 9 or part is test
            assert (coloured.argmax(dim=1) == torch.tensor(colour).argmax()).all()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_streamed_images_are_those_held_in_memory(images_folder, monkeypatch, num_workers):
    held = data.load("folder", images_folder, [3, 8, 12])
    monkeypatch.setattr(image_folder, "IN_MEMORY", 10)
    for one, other in zip(held, data.load("folder", images_folder, [3, 8, 12], num_workers)):
        assert isinstance(one, data.Images) and isinstance(other, image_folder.ImageFiles)
        assert other.shape == one.shape == [3, 8, 12] and torch.equal(other.labels, one.labels)
        for (images, labels), (same, their) in zip(
                data.batches(one, 50, torch.Generator().manual_seed(1)),
                data.batches(other, 50, torch.Generator().manual_seed(1), num_workers), strict=True):
            assert torch.equal(images, same) and torch.equal(labels, their)
        rows = torch.tensor([3, 0, 3])
        assert torch.equal(one[rows][0], other[rows][0]) and torch.equal(one[:4][1], other[:4][1])


def test_train_and_test_folders_are_the_sets(tmp_path):
    for part, names in (("train", "abc"), ("test", "cd"), ("other", "e")):
        for number, name in enumerate(names):
            (tmp_path / part / name).mkdir(parents=True)
            shade = 10 * number + (part == "test")
            Image.new("L", (5, 5), shade).save(tmp_path / part / name / "image.png")
    train, test = data.load("folder", tmp_path, [1, 4, 4])
    assert train.classes == test.classes == ["a", "b", "c", "d"]
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [2, 3]
    assert train.images[:, 0, 0, 0].tolist() == [0, 10, 20] and test.images[:, 0, 0, 0].tolist() == [1, 11]


def test_images_beside_each_other_have_one_class_and_the_same_split_each_time(tmp_path):
    for shade in range(30):
        Image.new("L", (5, 5), shade).save(tmp_path / f"{shade}.png")
    first, again = (data.load("folder", tmp_path, [1, 4, 4]) for _ in range(2))
    assert first[0].classes == ["."] and len(first[1]) == 3
    assert sorted(torch.cat([part.images[:, 0, 0, 0] for part in first]).tolist()) == list(range(30))
    assert torch.equal(first[1].images, again[1].images)
    assert first[1].images[:, 0, 0, 0].tolist() != [0, 1, 10]          # not the first ones by name
    # One more image moves at most one of the others.
    Image.new("L", (5, 5), 200).save(tmp_path / "more.png")
    tested = [set(part[1].images[:, 0, 0, 0].tolist()) for part in (first, data.load("folder", tmp_path, [1, 4, 4]))]
    assert len(tested[0] - tested[1]) <= 1


def test_linked_folders_are_classes_and_loops_end(tmp_path):
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


def test_numbers_of_other_widths(tmp_path):
    pixels = np.arange(16).reshape(4, 4)
    deep = image_folder.read(saved(Image.fromarray(pixels.astype(np.int32)), tmp_path / "deep.tif"), 4, 4, 1)
    assert np.array_equal(deep[0].numpy(), pixels)          # 32 bits that hold no more than 8
    with pytest.raises(ValueError, match="floating point"):
        image_folder.read(saved(Image.fromarray(pixels.astype(np.float32)), tmp_path / "float.tif"), 4, 4, 1)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_that_vanishes_ends_the_training_in_one_line(num_workers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for shade in range(40):
        Image.new("L", (8, 8), shade).save(tmp_path / "images" / f"{shade}.png")
    load = image_folder.load

    def load_and_lose(*arguments, **more):
        loaded = load(*arguments, **more)
        loaded[0][0].paths[7].unlink()
        return loaded

    monkeypatch.setattr(image_folder, "IN_MEMORY", 10)
    monkeypatch.setattr(image_folder, "load", load_and_lose)
    with pytest.raises(SystemExit) as stopped:
        import_script("VQ-VAE.py").main(["--dataset", "folder", "--data-folder", "images", "--image-size", "8",
                                         "--k", "4", "--batch-size", "8", "--num-workers", str(num_workers)])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "Traceback" not in said
    assert ".png" in said and "No such file" in said and "models/vqvae/last.pt is whole" in said
    for child in multiprocessing.active_children():
        child.join()            # it has been killed


def test_a_run_goes_on_with_its_folder_moved_and_not_with_another(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "images").mkdir()
    for shade in range(20):
        Image.new("L", (8, 8), shade).save(tmp_path / "images" / f"{shade}.png")
    train = import_script("VQ-VAE.py").main
    train(["--dataset", "folder", "--data-folder", "images", "--image-size", "8", "--channels", "1", "--k", "4",
           "--batch-size", "8", "--num-epochs", "1"])
    (tmp_path / "images").rename(tmp_path / "moved")
    capsys.readouterr()
    go_on = ["--resume", "--num-epochs", "2"]
    assert "there is no folder" in refuse("VQ-VAE.py", go_on, capsys)
    train([*go_on, "--data-folder", "moved"])
    Image.new("L", (8, 8), 200).save(tmp_path / "moved" / "more.png")
    capsys.readouterr()
    line = refuse("VQ-VAE.py", ["--resume", "--num-epochs", "3", "--data-folder", "moved"], capsys)
    assert "moved are not those that the run began with" in line


@pytest.fixture(scope="module")
def learned(images_folder, tmp_path_factory):
    """A folder in which the README's commands have learned from the images, in fewer and smaller steps."""
    folder, commands = tmp_path_factory.mktemp("learned"), readme_commands("A folder of images")
    more = {"VQ-VAE.py": ("--num-epochs", 15, "--batch-size", 16, "--lr", "5e-3", "--beta", 0.25, "--k", 64,
                          "--hidden-size", 16),
            "train_prior.py": ("--num-epochs", 5, "--width", 64, "--heads", 2, "--layers", 1, "--batch-size", 8,
                               "--shift", 0)}
    assert len(commands) == 4 and "64" in commands[0]
    for _, script, *words in commands:
        words = [word.replace("holiday pictures/beach.jpg", str(images_folder / "blau" / "Bild Nr. 0 ü CMYK.jpg"))
                 .replace("holiday pictures", str(images_folder)) for word in words]
        done = run_script(script, *words, *more.get(script, ()), cwd=folder)
        assert done.returncode == 0, done.stderr
        if script in more:
            assert f"Left out of {images_folder}, 2 that Pillow cannot read" in done.stderr
    assert {path.name for path in (folder / "generatedImages").iterdir()} == {"prior.png", "Bild Nr. 0 ü CMYK.png"}
    return folder


def test_a_folder_of_everything_trains_a_colour_model(learned, images_folder, monkeypatch):
    monkeypatch.chdir(learned)
    losses = [event.value for event in events(learned / "logs" / "mine").Scalars("loss/test/reconstruction")]
    assert losses[-1] < 0.6 * losses[0]
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--filename", "reconstructed"])
    picture = np.asarray(Image.open("generatedImages/reconstructed.png"))
    assert picture.shape == (66 + 2, 10 * 66 + 2, 3)           # of ten test images
    _, test_set = data.load("folder", images_folder, [3, 64, 64])
    order = torch.randperm(10, generator=torch.Generator().manual_seed(0))
    cells = [picture[2:66, 2 + column * 66:66 + column * 66] for column in range(10)]
    seen = np.stack(cells).astype(float).mean(axis=(1, 2))
    means = test_set.images[order].double().mean(dim=(2, 3)).numpy()
    assert np.abs(seen - means).mean() < 20 < np.abs(seen - means[::-1]).mean()


def test_images_are_drawn_by_class(learned, monkeypatch):
    monkeypatch.chdir(learned)
    means = []
    for name in COLOURS:
        import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", "prior", "--label", name,
                                           "--filename", name])
        picture = np.asarray(Image.open(f"generatedImages/{name}.png"))
        assert picture.shape == (662, 662, 3)
        means.append(picture.reshape(-1, 3).mean(axis=0))
    # Many images of a class are grey: what counts is the colour that it has more of than the others.
    assert (np.array(means) - np.mean(means, axis=0)).argmax(axis=1).tolist() == [
        np.argmax(colour) for colour in COLOURS.values()]


def test_own_images_are_reconstructed(learned, images_folder, monkeypatch, capsys):
    monkeypatch.chdir(learned)
    one = images_folder / "grüne" / "Bild Nr. 0 ü RGB.webp"
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", str(one)])
    picture = Image.open("generatedImages/Bild Nr. 0 ü RGB.png")
    upright = ImageOps.exif_transpose(Image.open(one)).convert("RGB")
    original = np.asarray(ImageOps.fit(upright, (64, 64), Image.Resampling.LANCZOS))
    assert picture.size == (64, 64) and np.abs(np.asarray(picture).astype(float) - original).mean() < 45
    import_script("generate.py").main(["--model", "models/mine/best.pt", "--input", str(images_folder / "blau")])
    assert Image.open("generatedImages/blau.png").size == (662, 4 * 66 + 2)       # 32 of them
    assert "notes.txt is no image" in capsys.readouterr().err
    (learned / "generatedImages" / "mine.png").write_bytes(one.read_bytes())
    before = (learned / "generatedImages" / "mine.png").read_bytes()
    for path in ("generatedImages/mine.png", "generatedImages"):
        line = refuse("generate.py", ["--model", "models/mine/best.pt", "--input", path, "--filename", "mine"], capsys)
        assert "--filename mine: generatedImages/mine.png is there already, in --input" in line
    assert (learned / "generatedImages" / "mine.png").read_bytes() == before
    # A model of digits takes them too, in its own size and in grey.
    import_script("generate.py").main(["--input", str(one), "--filename", "as a digit"])
    assert Image.open("generatedImages/as a digit.png").size == (28, 28)


def test_bad_folders_get_one_line(images_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("no image")
    for arguments, words in (
            (["--data-folder", "nowhere"], ("--dataset folder --data-folder nowhere", "there is no folder")),
            (["--data-folder", "empty"], ("--data-folder empty", "no file")),
            (["--data-folder", "text"], ("--data-folder text", "0 of its files are images")),
            (["--data-folder", images_folder, "--image-size", "30"], ("--image-size", "'30' is not a multiple of 4")),
            (["--data-folder", images_folder, "--channels", "2"], ("--channels", "2"))):
        line = refuse("VQ-VAE.py", ["--dataset", "folder", *arguments], capsys)
        assert all(word in line for word in words), line
    line = refuse("VQ-VAE.py", ["--dataset", "MNIST-10k", "--image-size", "32"], capsys)
    assert "--image-size 32" in line and "--dataset folder" in line
    for path, words in (("nowhere.png", ("--input", "nowhere.png", "random, prior")),
                        ("text/a.txt", ("--input text/a.txt", "no image that Pillow can read")),
                        ("empty", ("--input empty", "no image in it"))):
        line = refuse("generate.py", ["--model", checkpoint.PRETRAINED, "--input", path], capsys)
        assert all(word in line for word in words), line
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.txt", "empty", "text"]
