"""Files that are written atomically, and folders that a run locks."""

import errno
import os
import shlex
import sys
from collections.abc import Callable
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

try:
    import fcntl
except ImportError:         # Windows, where no lock on a folder is released when its process dies
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
TEMPORARY = ".unfinished"
MAX_NAME = 255                  # bytes, of a file's name
NO_LOCKS = errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP         # of some network folders

_locked = set()             # descriptors of the folders that this process has locked
if fcntl:                   # a worker process of a DataLoader must not keep them locked when this one is killed
    os.register_at_fork(after_in_child=lambda: [os.close(descriptor) for descriptor in _locked])


def typed_path(path):
    """A path inside the repository as it can be typed in the present folder."""
    return min(str(ROOT / path), os.path.relpath(ROOT / path), key=len)


def command(script, *words, launcher=("python3",)):
    """The command line that runs a script of the repository from the present folder.

    A value with a leading - , which would be taken for a flag, is a path and gets ./ before it.
    """
    words = [str(word) for word in words]
    after_flag = [False, *(word.startswith("--") for word in words)]
    words = ["./" + word if after and word[:1] == "-" != word[1:2] else word for after, word in zip(after_flag, words)]
    return shlex.join([*launcher, typed_path(script), *words])


def read_file(path):
    """The bytes of a file. Raises OSError if it cannot be read, ValueError if it is a device or a pipe, without end."""
    if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):
        raise ValueError("it is not a regular file")
    return Path(path).read_bytes()


def write_atomically(path, data, check=lambda: None):
    """Write bytes so that path always holds the old file or the new one, never a part of one.

    They go to a temporary file beside it, which is flushed to the disk, then renamed. check(), which is called just
    before, may raise an error to prevent that. Raises OSError if it fails; path is then unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{_short(path.name)}.{os.getpid()}{TEMPORARY}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        check()
        os.replace(temporary, path)
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            error.filename, error.filename2 = str(path), None           # not the temporary name
        raise


def _short(name):
    """A name, cut so that a temporary file's name of it is not longer than file systems allow."""
    return os.fsencode(name)[:MAX_NAME - 40].decode(errors="ignore")


def remove_temporary_files(folder, *names):
    """Remove the temporary files of files with these names, or patterns of names, that killed processes have left."""
    for name in names:
        for path in folder.glob(f".{_short(name)}.[0-9]*{TEMPORARY}"):
            path.unlink(missing_ok=True)


@contextmanager
def created_folder(folder):
    """Create a folder and its parents. Those created are removed again at the end if they are empty."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        for path in missing:
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


@contextmanager
def locked_folder(folder, flag):
    """Lock a folder, created if need be, for this process alone. The system unlocks it however the process ends.

    Raises ValueError, which starts with the flag that named the folder, if another process has locked it.
    """
    with created_folder(folder):
        if not fcntl:
            yield
            return
        held = os.open(folder, os.O_RDONLY)
        _locked.add(held)
        try:
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                free = os.path.samestat(os.fstat(held), os.stat(folder))      # not one that was just removed
            except OSError as error:
                if error.errno not in (*NO_LOCKS, errno.EWOULDBLOCK, errno.EACCES, errno.ENOENT):
                    raise
                free = error.errno in NO_LOCKS
                if free:
                    print(f"{folder} cannot be locked ({error.strerror}): start no other run that writes to it",
                          file=sys.stderr)
            if not free:
                raise ValueError(f"{flag}: another run writes to {folder}: wait until it has ended, or stop it")
            yield
        finally:
            _locked.discard(held)
            os.close(held)


class OutputFile(NamedTuple):
    """A file that a command writes. What is at its path is replaced only with --overwrite, and only by its like.

    A link is replaced as well, and what it points to stays.
    """

    path: Path
    overwrite: bool
    kind: str                           # what the file is, in words
    is_of_kind: Callable                # whether the existing file at a path is one
    advice: str = " or choose another name"

    def check(self):
        """Raise ValueError if the file could not be written, or must not be replaced. Writes nothing."""
        if self.path.is_file() or (self.path.is_symlink() and not self.path.exists()):
            if not self.overwrite:
                raise ValueError(f"{self.path}: exists, replace it with --overwrite{self.advice}")
            if self.path.exists() and not self.is_of_kind(self.path):
                raise ValueError(f"{self.path}: exists and is not {self.kind}, choose another name")
        elif self.path.is_dir():
            raise ValueError(f"{self.path}: is a folder, give the name of a file")
        elif self.path.exists():
            raise ValueError(f"{self.path}: is not a regular file, choose another name")
        check_writable(self.path)

    def write(self, data):
        """Write bytes, atomically, and create the file's folders. What has appeared there since check() is not lost."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, data, self.check)


def check_unused_folders(folders, overwrite):
    """Raise ValueError if the folders hold a run, OSError if they could not be created. Writes nothing."""
    for folder in folders:
        if folder.is_dir() and any(folder.iterdir()) and not overwrite:
            raise ValueError(f"{folder} holds a run already: choose another name, replace it with --overwrite, "
                             "or continue one that was interrupted with --resume")
        existing = next(path for path in (folder, *folder.parents) if path.exists() or path.is_symlink())
        if not existing.is_dir():
            raise NotADirectoryError(f"{existing} is not a folder")
        if not os.access(existing, os.W_OK):
            raise PermissionError(f"no permission to write in {existing}")


def check_writable(path):
    """Raise ValueError if no file could be written to path, whose folders may have to be created. Writes nothing."""
    # A folder such as "." or "/" has no parents.
    folder = next((folder for folder in path.parents if folder.exists() or folder.is_symlink()), path)
    if len(os.fsencode(path.name)) > MAX_NAME:
        raise ValueError(f"{path.name[:50]}…: a file's name has at most {MAX_NAME} bytes")
    if path.is_dir():
        raise ValueError(f"{path} is a folder")
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"no permission to write in {folder}")
