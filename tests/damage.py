"""Damaged and hostile copies of a checkpoint, for test_damaged_checkpoints.py."""

import copy
import io
import math
import pickle
import zipfile

import torch

VALUES = [None, True, -1, 0, 7, 2**31, 2**62, 10**30, 1e308, math.nan, "", "text", "\n" * 9, b"\0", [], {}, [[[]]],
          torch.zeros(()), torch.zeros(0), torch.full((3,), math.nan), torch.zeros(1).expand(2**40),
          torch.zeros(2, dtype=torch.complex64), torch.zeros(2, 2).to_sparse(), torch.zeros(3, dtype=torch.int8)]


class CodeInPickle:
    """Unpickling it creates the file EXPLODED."""

    def __reduce__(self):
        return open, ("EXPLODED", "w")


# ---------------------------------------------------------------- tools

def key_paths(value, path=()):
    """The path of every key of every dictionary and list in a checkpoint. Of long lists, the first entries."""
    paths = [path] if path else []
    keys = value if isinstance(value, dict) else range(min(len(value), 4)) if isinstance(value, list | tuple) else ()
    return paths + [other for key in keys for other in key_paths(value[key], (*path, key))]


def edited_copy(contents, path, edit):
    """A copy of a checkpoint after edit(container, key) at path, or None where that is a tuple."""
    contents = copy.deepcopy(contents)
    container = contents
    for key in path[:-1]:
        container = container[key]
    if isinstance(container, tuple):
        return None
    edit(container, path[-1])
    return contents


def serialize(contents, **options):
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def rewrite_archive(data, edit, compression=zipfile.ZIP_STORED):
    """The archive with edit(name, content) for the content of each part, and matching checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", compression) as new:
        for name in old.namelist():
            new.writestr(name, edit(name, old.read(name)))
    return buffer.getvalue()


def flip_bits(rng, data, max_flips=8):
    data = bytearray(data)
    for _ in range(rng.randint(1, max_flips)):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


# ---------------------------------------------------------------- damage to bytes

def zero_block(rng, data):
    i = rng.randrange(len(data))
    return data[:i] + bytes(min(512, len(data) - i)) + data[i + 512:]


def insert_bytes(rng, data):
    i = rng.randrange(len(data))
    return data[:i] + rng.randbytes(rng.randint(1, 99)) + data[i:]


def overlapping_parts(data):
    """An archive whose directory lists the same bytes 2,000 times."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        largest = max(archive.infolist(), key=lambda part: part.file_size)
    buffer = io.BytesIO(data)
    with zipfile.ZipFile(buffer, "a") as archive:
        for i in range(2000):
            duplicate = copy.copy(largest)
            duplicate.filename = duplicate.orig_filename = f"{largest.filename}{i}"
            archive.filelist.append(duplicate)
        archive._didModify = True
    return buffer.getvalue()


def byte_damages(data, rng):
    """{kind: function → bytes} of damage to the file and to the parts of its archive."""
    huge_bytearray = b"\x80\x02cbuiltins\nbytearray\nJ\0\0\0\x40\x85R."
    return {
        "overlapping parts": lambda: overlapping_parts(data),
        "huge bytearray": lambda: rewrite_archive(data, lambda name, part: (
            huge_bytearray if name.endswith("data.pkl") else part)),
        "truncated": lambda: data[:rng.randrange(len(data))],
        "flipped bits": lambda: flip_bits(rng, data),
        "zeroed block": lambda: zero_block(rng, data),
        "inserted bytes": lambda: insert_bytes(rng, data),
        "flipped bits in the pickle": lambda: rewrite_archive(data, lambda name, part: (
            flip_bits(rng, part, 3) if name.endswith("data.pkl") else part)),
        "flipped bits in tensors": lambda: rewrite_archive(data, lambda name, part: (
            flip_bits(rng, part) if "/data/" in name and rng.random() < 0.3 else part)),
        "compressed": lambda: rewrite_archive(data, lambda name, part: (
            part + bytes(2**20) if name.endswith("/data/0") else part), zipfile.ZIP_DEFLATED)}


# ---------------------------------------------------------------- damage to entries

def set_value(rng, container, key):
    container[key] = rng.choice(VALUES)


def set_huge_number(rng, container, key):
    container[key] = rng.choice([10**5, 10**6, 10**9, 2**31, 2**40, 2**62])


def change_tensor(rng, container, key):
    value = container[key]
    if not torch.is_tensor(value):
        return
    container[key] = rng.choice([
        lambda: value.flatten(), lambda: value[:-1] if value.dim() else value, lambda: value.double(),
        lambda: value.unsqueeze(0), lambda: value.T if value.dim() == 2 else value, lambda: value * math.nan,
        lambda: value * math.inf, lambda: value * 1e30, lambda: value.half(),
        lambda: value.new_zeros(1).expand(10**6, 10**6)])()


def delete_key(_rng, container, key):
    del container[key]


def add_key(rng, container, _key):
    if isinstance(container, dict):
        container[rng.choice(["extra", "", 5, None])] = rng.choice(VALUES)


def set_code(_rng, container, key):
    container[key] = CodeInPickle()


def inconsistent_contents(contents, rng):
    """A copy with values that ask for huge resources, or that are small in the file and large in memory."""
    bad = copy.deepcopy(contents)
    training = bad.get("training", {"settings": {}, "progress": {}, "optimizer": {0: {}}})
    config, settings, progress = bad.get("config", {}), training["settings"], training["progress"]
    shared_nesting, long_text = ["x"], "text" * 10**5
    for _ in range(40):
        shared_nesting = [shared_nesting, shared_nesting]
    deep_nesting = []
    for _ in range(150):
        deep_nesting = [deep_nesting]
    optimizer_state = next(iter(training["optimizer"].values()))
    rng.choice([
        lambda: settings.update(num_workers=10**5), lambda: config.update(layers=10**6),
        lambda: settings.update(layers=10**6), lambda: settings.update(k=3 * 10**8, hidden_size=6000, width=60000),
        lambda: progress.update(track=["1 2"] * 10**5, epoch=10**5), lambda: progress.update(epoch=2**40),
        lambda: training.get("schedule", {}).update(last_epoch=2**62, total_iters=0, base_lrs=[math.nan]),
        lambda: bad.update(format=shared_nesting), lambda: bad.update(format=deep_nesting),
        lambda: config.update(channels=shared_nesting), lambda: settings.update(lr=shared_nesting),
        lambda: bad.update(training=rng.choice([7, "text", [1], deep_nesting])),
        lambda: optimizer_state.update(exp_avg=torch.zeros(1).expand(300, 300), padding=long_text),
        lambda: settings.update(device="cuda:999", seed=long_text), lambda: settings.update(lr=[long_text] * 10**5),
        lambda: bad.update(dataset={"name": "MNIST", "shape": [1, 4096, 4096]})])()
    return bad


def entry_damages(contents, rng):
    """{kind: function → contents or bytes, or None} of damage to entries of the checkpoint."""
    paths = key_paths(contents)
    # A huge number of epochs is no damage: the run would take them.
    number_paths = [path for path in paths if path[-1] != "num_epochs" and (path[0] in ("config", "dataset") or path[
        :2] in (("training", "settings"), ("training", "progress")))] or paths
    first_paths = [path for path in paths if len(path) == 1]        # few among hundreds, and each read by somebody
    tensor_paths = [path for path in paths if path[0] == "model" and len(path) > 1] or paths

    def edited(paths, *edits):
        path = rng.choice(paths)
        edit = rng.choice(edits) if len(edits) > 1 else edits[0]
        return edited_copy(contents, path, lambda container, key: edit(rng, container, key))

    return {
        "other value": lambda: edited(rng.choice([paths, first_paths]), set_value),
        "other number": lambda: edited(number_paths, set_value),
        "huge number": lambda: edited(number_paths, set_huge_number),
        "other tensor": lambda: edited(tensor_paths, change_tensor),
        "missing key": lambda: edited(rng.choice([paths, first_paths]), delete_key),
        "additional key": lambda: edited(paths, add_key),
        "code": lambda: edited(paths, set_code),
        "only code": lambda: pickle.dumps(rng.choice([CodeInPickle(), {"model": CodeInPickle()},
                                                      [CodeInPickle()] * 3])),
        "old format": lambda: serialize(edited(paths, set_code, delete_key), _use_new_zipfile_serialization=False)}


def damaged_copies(data, rng):
    """Endless pairs of a kind of damage and the bytes of a checkpoint with that damage."""
    contents = torch.load(io.BytesIO(data), weights_only=True)
    kinds = {"inconsistent": lambda: inconsistent_contents(contents, rng),
             **byte_damages(data, rng), **entry_damages(contents, rng)}
    while True:
        for kind, damage in kinds.items():
            result = damage()
            if result is not None:
                yield kind, result if isinstance(result, bytes) else serialize(result)
