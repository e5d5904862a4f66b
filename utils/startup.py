"""What a script does before all other imports, since importing torch takes seconds: prepare().

Ctrl-C, or too little memory, while it starts is one line instead of a traceback; and no printing can fail it.
"""

import os
import signal
import sys
from contextlib import contextmanager, suppress

# Of Ctrl-C, of a job scheduler, and where there is one, of a terminal that is closed.
STOP_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
# In the messages of errors other than MemoryError: of the system's loader, torch on a CPU, Python's threads, oneDNN,
# cuBLAS and cuDNN.
OUT_OF_MEMORY_MESSAGES = ("failed to map segment", "allocate memory", "out of memory", "can't start new thread",
                         "could not create a primitive", "ALLOC_FAILED", "Storage size calculation overflowed")


def reports():
    """Whether this process prints errors: of those that torchrun has started on a machine, the first one does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def exit_at_once(number, _frame):
    """A handler of STOP_SIGNALS for a process that has no files open to close."""
    if reports():
        with suppress(OSError):
            os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
    os._exit(128 + number)


def report_out_of_memory(kind, error, traceback):
    """A sys.excepthook: one line and exit status 2 if there is too little memory to load torch."""
    if not issubclass(kind, MemoryError) and not any(words in str(error) for words in OUT_OF_MEMORY_MESSAGES):
        sys.__excepthook__(kind, error, traceback)
        return
    if reports():
        with suppress(OSError):
            os.write(2, f"{os.path.basename(sys.argv[0])}: error: memory has run out while torch was loaded: close "
                        "other programs, or take a machine with more\n".encode(errors="replace"))
    os._exit(2)


def prepare():
    """Install the handlers, unless SIGINT has another one, as in a notebook, and make the console safe to print to.

    A signal that is ignored stays so: SIGHUP under nohup, SIGINT of a shell script's background command.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:      # closed: no other file may get its number
            setattr(sys, name, open(os.devnull, "r" if name == "stdin" else "w"))       # noqa: SIM115
    sys.stdout, sys.stderr = Console(sys.stdout), Console(sys.stderr)
    if signal.getsignal(signal.SIGINT) in (signal.default_int_handler, signal.SIG_IGN):
        for number in STOP_SIGNALS:
            if signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL):
                signal.signal(number, exit_at_once)
    sys.excepthook = report_out_of_memory


class Console:
    """A standard stream whose failures change no exit status: it is closed, full, or cannot show a character."""

    def __init__(self, stream):
        self.stream = stream
        if hasattr(stream, "reconfigure"):          # not a notebook's
            stream.reconfigure(errors="backslashreplace")

    def write(self, text):
        with self._failures_ignored():
            self.stream.write(text)
        return len(text)

    def flush(self):
        with self._failures_ignored():
            self.stream.flush()

    @contextmanager
    def _failures_ignored(self):
        try:
            yield
        except OSError:
            with open(os.devnull, "w") as nowhere:      # takes what is in the buffer, and all that follows
                os.dup2(nowhere.fileno(), self.stream.fileno())

    def __getattr__(self, name):
        return getattr(self.stream, name)


@contextmanager
def as_exception():
    """Inside, those of STOP_SIGNALS that prepare() has taken raise KeyboardInterrupt(number): temporary files are
    removed, and empty folders.
    """
    def interrupt(number, _frame):
        raise KeyboardInterrupt(number)

    former = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS
              if signal.getsignal(number) is exit_at_once}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
