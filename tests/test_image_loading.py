"""Which pictures of an image folder are read, how often, and what replaces those that cannot be."""

import multiprocessing
import os
import pickle
from collections import Counter

import numpy as np
import pytest
import torch
from helpers import expect_usage_error, import_script
from PIL import Image
from torch.utils.data import Subset

import checkpoint
import data
from data import code_maps, image_file, image_folder
from modules import VectorQuantizedVAE
from utils import distributed


def write_pictures(folder, count, size=8, start=0):
    """Write count pictures of noise, each its own."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(start, start + count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size), np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png", compress_level=0)


def make_files(folder, count, broken=()):
    """An ImageFiles of so many pictures, each with a class of its own; those in `broken` are no pictures."""
    write_pictures(folder, count)
    paths = sorted(folder.iterdir())
    for row in broken:
        paths[row].write_bytes(b"no picture")
    return image_folder.ImageFiles(paths, torch.arange(count), [1, 8, 8], [str(i) for i in range(count)])


def load_all(batches):
    """All images and labels of some batches."""
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)


@pytest.fixture
def reads(tmp_path_factory, monkeypatch):
    """A function: how often each picture has been read since its last call, here or in a worker process."""
    record, read_image = tmp_path_factory.mktemp("reads") / "paths", image_file.read_image

    def recorded(path, *args):
        with open(record, "a") as file:
            file.write(f"{path}\n")
        return read_image(path, *args)

    def take():
        counts = Counter(record.read_text().splitlines()) if record.exists() else Counter()
        record.unlink(missing_ok=True)
        return counts

    monkeypatch.setattr(image_file, "read_image", recorded)
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("fork", force=True)        # so that workers see the patch
    yield take
    multiprocessing.set_start_method(method, force=True)


def once(*folders):
    return Counter(str(path) for folder in folders for path in folder.rglob("*.png"))


# ---------------------------------------------------------------- what is read

def test_load_reads_no_picture_and_finds_those_of_any_name(tmp_path, reads):
    write_pictures(tmp_path, 20)
    (tmp_path / "000.png").rename(tmp_path / "picture")
    (tmp_path / "001.png").rename(tmp_path / "picture.txt")
    (tmp_path / "notes.txt").write_text("no image")
    (tmp_path / "notes").write_bytes(b"")
    (tmp_path / "paper.pdf").write_bytes(b"%PDF-1.4")           # which Pillow writes, but does not read
    (tmp_path / "broken.JPEG").write_bytes(b"no image")
    train, test = data.load("folder", tmp_path, [1, 8, 8])
    assert [path.name for path in train.left_out] == ["notes", "notes.txt", "paper.pdf"]
    assert {"picture", "picture.txt", "broken.JPEG"} < {path.name for path in (*train.paths, *test.paths)}
    assert len(train) + len(test) == 21 and not reads()


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_generate_reads_a_hundred_pictures(num_workers, tmp_path, monkeypatch, reads):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images" / "train", 30)
    write_pictures(tmp_path / "images" / "test", 150)
    arguments = ["--dataset", "folder", "--data-folder", "images", "--num-workers", num_workers]
    import_script("generate.py").main(arguments)
    counts = reads()
    assert set(counts.values()) == {1} and len(counts) == 100 and all("/test/" in path for path in counts)


def test_generate_reads_a_hundred_pictures_of_an_input_folder(tmp_path, monkeypatch, capsys, reads):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images", 150)
    for i in range(50):
        (tmp_path / "images" / f"{i}.txt").write_text("no image")
    import_script("generate.py").main(["--input", "images"])
    counts, left_out = reads(), capsys.readouterr().err.count("left out: ")
    assert set(counts.values()) == {1} and 0 < left_out < 50
    assert sum(path.endswith(".png") for path in counts) == 100 and len(counts) == 100 + left_out
    assert Image.open("generatedImages/images.png").size == (302, 302)


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_evaluate_reads_the_test_pictures_once_and_with_a_prior_all_once(num_workers, tmp_path, monkeypatch, reads):
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        write_pictures(tmp_path / "images" / "train" / str(i), 2)
        write_pictures(tmp_path / "images" / "test" / str(i), 3, start=5)
    script = import_script("evaluate.py")
    script.NUM_SAMPLES = 20
    arguments = ["--dataset", "folder", "--data-folder", str(tmp_path / "images"), "--num-workers", num_workers]
    script.main(arguments)
    assert reads() == once(tmp_path / "images" / "test")
    script.main([*arguments, "--prior", str(checkpoint.PRETRAINED_PRIOR)])
    assert reads() == once(tmp_path / "images")


def test_training_reads_each_picture_once_and_streams_to_the_same_losses(tmp_path, monkeypatch, reads):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images" / "train", 40)
    write_pictures(tmp_path / "images" / "test", 70)
    flags = ["--dataset", "folder", "--data-folder", str(tmp_path / "images"), "--image-size", "8", "--channels", "1",
             "--k", "4", "--batch-size", "8", "--num-epochs", "3", "--overwrite"]
    tracks = []
    for more, limit in ((["--num-workers", "0"], 2**31), (["--num-workers", "2"], 2**31), ([], 2**31),
                        (["--num-workers", "2"], 70 * 64), (["--num-workers", "0"], 10)):
        monkeypatch.setattr(image_folder, "MAX_IN_MEMORY", limit)
        import_script("VQ-VAE.py").main([*flags, *more])
        track = (tmp_path / "models" / "vqvae" / "track.txt").read_text()
        tracks.append([line.split()[:-1] for line in track.splitlines()])
        counts = reads()
        train, test = (Counter({path: n for path, n in counts.items() if f"/{part}/" in path})
                       for part in ("train", "test"))
        in_train, in_test = once(tmp_path / "images" / "train"), once(tmp_path / "images" / "test")
        if limit == 2**31:
            assert counts == in_train + in_test, more
        elif limit == 70 * 64:          # room for the test set alone
            assert test == in_test and train == in_train + in_train + in_train
        else:                           # 64 test images are shown, and all of them looked at for the projector
            assert train == in_train + in_train + in_train and test.total() == 3 * 70 + 64 + 70
    assert all(track == tracks[0] for track in tracks)


# ---------------------------------------------------------------- batches

@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("subset", [False, True])
def test_batches_equal_those_of_images_in_memory(num_workers, keep, subset, tmp_path):
    files = make_files(tmp_path, 50)
    images = data.Images(*(tensor.clone() for tensor in files[:]), files.classes)
    if keep:
        image_folder.keep_in_memory(files)
    parts = [Subset(part, range(1, 50, 2)) if subset else part for part in (images, files)]
    generators = [torch.Generator().manual_seed(1) for _ in parts]
    batches = [data.batches(part, 8, generator, num_workers) for part, generator in zip(parts, generators)]
    assert len(batches[0]) == len(batches[1])
    for _ in range(3):
        for (x, labels), (file_x, file_labels) in zip(*batches, strict=True):
            assert torch.equal(x, file_x) and torch.equal(labels, file_labels) and file_x.dtype == torch.uint8
        assert torch.equal(*(generator.get_state() for generator in generators))
    ordered = [load_all(data.batches(part, 8, num_workers=num_workers)) for part in parts]
    assert all(torch.equal(*tensors) for tensors in zip(*ordered))
    rows = torch.tensor([3, 0, 3])
    assert torch.equal(images[rows][0], files[rows][0]) and torch.equal(images[:4][1], files[:4][1])


def test_shards_of_several_epochs_are_kept_and_equal_the_files(tmp_path, monkeypatch, reads):
    files = make_files(tmp_path, 30)
    expected = files[:][0].clone()
    image_folder.keep_in_memory(files)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    batches = data.batches(files, 4, torch.Generator().manual_seed(0), num_workers=0)
    reads()
    for _ in range(8):
        images, labels = load_all(batches)
        assert len(labels) == 15 and torch.equal(images, expected[labels])
    assert set(reads().values()) == {1} and files.is_cached.sum() > 25


def test_no_worker_process_is_started_once_all_images_are_kept(tmp_path, monkeypatch):
    files = make_files(tmp_path, 20)
    image_folder.keep_in_memory(files)
    batches, workers = data.batches(files, 4, torch.Generator().manual_seed(0), num_workers=1), []
    for _ in range(3):
        iterator = iter(batches)
        next(iterator)
        workers.append(len([child for child in multiprocessing.active_children() if child.daemon]))
        list(iterator)
    assert workers == [1, 0, 0]


def test_workers_receive_no_kept_image_and_return_no_tensor(tmp_path):
    files = make_files(tmp_path, 20)
    size = len(pickle.dumps(files))
    files.enable_cache()
    list(data.batches(files, 4, num_workers=0))
    assert files.is_cached.all() and len(pickle.dumps(files)) == size
    copy = pickle.loads(pickle.dumps(files))
    assert copy.missing([0, 1]) == [0, 1]
    rows, sources, images = copy.__getitems__([2, 3])
    assert rows == sources == [2, 3] and type(images) is np.ndarray and images.shape == (2, 1, 8, 8)


def test_memory_goes_to_the_first_sets_that_fit(tmp_path, monkeypatch):
    test, train = make_files(tmp_path / "test", 5), make_files(tmp_path / "train", 10)
    for limit, processes, kept in ((15 * 64, 1, [True, True]), (15 * 64 - 1, 1, [True, False]),
                                   (15 * 64, 2, [True, False]), (4 * 64, 1, [False, False])):
        monkeypatch.setattr(image_folder, "MAX_IN_MEMORY", limit)
        monkeypatch.setattr(distributed, "world_size", lambda processes=processes: processes)
        test.cache = train.cache = None
        image_folder.keep_in_memory(test, train)
        assert [part.cache is not None for part in (test, train)] == kept


def test_default_is_a_worker_for_each_core_of_a_process(monkeypatch):
    for cores, local, expected in ((1, 1, 1), (3, 1, 3), (64, 1, 8), (64, 16, 4), (2, 4, 1)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: range(cores), raising=False)
        monkeypatch.setattr(distributed, "world_size", lambda local=local: local)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
        assert image_folder.default_num_workers() == expected
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    monkeypatch.setattr(distributed, "world_size", lambda: 1)           # another launcher's LOCAL_WORLD_SIZE
    assert image_folder.default_num_workers() == 5


# ---------------------------------------------------------------- pictures that cannot be read

@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("keep", [False, True])
def test_next_image_replaces_a_broken_one_and_is_reported_once(num_workers, keep, tmp_path, capsys):
    files = make_files(tmp_path, 20, broken=[3, 4, 9, 19])
    if keep:
        files.enable_cache()
    files[:10]                  # reading a part reports nothing
    assert not capsys.readouterr().err
    sources = torch.tensor([0, 1, 2, 5, 5, 5, 6, 7, 8, 10, 10, 11, 12, 13, 14, 15, 16, 17, 18, 0])
    batches = data.batches(files, 8, num_workers=num_workers)
    for epoch in range(2):
        images, labels = load_all(batches)
        assert torch.equal(labels, sources) and torch.equal(files.labels, sources)
        assert all(torch.equal(image, image_file.read_image(files.paths[source], 8, 8, 1))
                   for image, source in zip(images, sources))
        error = capsys.readouterr().err
        assert error.count("\n") == (1 if epoch == 0 else 0)
        if epoch == 0:
            assert "4 of 20 images cannot be used" in error and error.endswith("009.png, …\n") and "019" not in error


def test_prior_is_trained_with_the_labels_of_the_replacements(tmp_path):
    train, test = make_files(tmp_path / "train", 6, broken=[2]), make_files(tmp_path / "test", 4, broken=[3])
    model = VectorQuantizedVAE(1, 2, 4, codebook_init="uniform").eval()
    maps = code_maps.encode_sets(model, train, None, test, [(0, 0), (0, 1)], "cpu", num_workers=0)
    assert maps.train_labels.tolist() == [0, 1, 3, 3, 4, 5] and maps.test_labels.tolist() == [0, 1, 2, 0]
    assert torch.equal(maps.train[:, 2], maps.train[:, 3]) and torch.equal(maps.test[3], maps.test[0])


def test_each_of_many_broken_files_is_tried_once(tmp_path, reads):
    files = make_files(tmp_path, 40, broken=range(3, 38))
    for _ in range(2):
        assert load_all(data.batches(files, 8, num_workers=0))[1].tolist() == [0, 1, 2, *[38] * 36, 39]
    counts = reads()
    assert all(counts[str(files.paths[row])] == 1 for row in range(3, 38))


def test_each_process_reports_the_broken_files_of_its_shard(tmp_path, capsys):
    files = make_files(tmp_path, 12, broken=[2, 7])
    files[:]
    list(data.batches(Subset(files, range(1, 12, 2)), 4, num_workers=0))
    error = capsys.readouterr().err
    assert "1 of 12 images cannot be used" in error and "007.png" in error


def test_file_without_permission_is_replaced(tmp_path, monkeypatch):
    files, read_image = make_files(tmp_path, 5), image_file.read_image

    def forbidden(path, *args):
        if path == files.paths[1]:
            raise PermissionError(13, "Permission denied", str(path))
        return read_image(path, *args)

    monkeypatch.setattr(image_file, "read_image", forbidden)
    assert files[:][1].tolist() == [0, 2, 2, 3, 4]


@pytest.mark.parametrize("num_workers", ["0", "2"])
def test_set_without_a_readable_image_is_an_error(num_workers, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_pictures(tmp_path / "images" / "train", 6)
    (tmp_path / "images" / "test").mkdir()
    for i in range(3):
        (tmp_path / "images" / "test" / f"{i}.png").write_bytes(b"no image")
    flags = ["--dataset", "folder", "--data-folder", "images", "--num-workers", num_workers]
    for script, more in (("VQ-VAE.py", []), ("evaluate.py", ["--model", checkpoint.PRETRAINED])):
        line = expect_usage_error(script, [*flags, *more], capsys)
        assert "not one of the 3 images in this set can be used" in line and "images/test/" in line
