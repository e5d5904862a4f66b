"""Files and folders that are whole or not there: written at once, held by one run alone."""

import errno
import os
from contextlib import contextmanager
from pathlib import Path

try:
    import fcntl
except ImportError:         # Windows: nothing there releases a lock on a folder when a process dies
    fcntl = None

TEMPORARY = ".unfinished"

_held = set()               # descriptors of the folders that this process has locked
if fcntl:                   # a process that loads batches must not hold on to them when this one is killed
    os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in _held])


def write_whole(path, data):
    """Write bytes so that path holds the old file or the new one, never half of one.

    They go to a temporary file beside it, are flushed to the disk, then renamed. Raises OSError if
    they cannot be written; path is then as it was.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None           # the name that the user knows
        raise


def remove_temporary(folder):
    """Remove what write_whole() left in a folder when its process was killed."""
    for path in folder.glob(f".*.[0-9]*{TEMPORARY}"):
        path.unlink()


@contextmanager
def made(folder):
    """Make a folder and those above it. What was made is removed again if nothing is in it at the end."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def locked(folder, flag):
    """Hold a folder, made if it is not there, for this process alone. The system frees it however the process ends.

    Raises ValueError, which starts with the flag that named the folder, if another process holds it.
    """
    with made(folder):
        if not fcntl:
            yield
            return
        held = os.open(folder, os.O_RDONLY)
        _held.add(held)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(held), os.stat(folder))      # not one that was just removed
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
                    raise
                free = False
            if not free:
                raise ValueError(f"{flag}: another run writes to {folder}: wait until it has ended, or stop it")
            yield
        finally:
            _held.discard(held)
            os.close(held)


def check_free(folders, overwrite):
    """Raise ValueError if a run stands in the folders, OSError if they could not be made. Touches nothing."""
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise ValueError(f"{folder} holds a run already: choose another name, replace it with --overwrite, "
                             "or go on with one that was broken off with --resume")
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"no permission to write in {existing}")


def check_writable(path):
    """Raise ValueError if no file could be written to path, whose folders may have to be made. Touches nothing."""
    # Of a folder such as "." or "/" there are no parents to ask.
    folder = path if path.is_dir() else next(folder for folder in path.parents if folder.exists())
    if path.is_dir() or not folder.is_dir():
        raise ValueError(f"{folder} is in the way")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"no permission to write in {folder}")
