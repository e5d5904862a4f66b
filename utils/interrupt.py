"""Ctrl-C while a script is starting: one line and exit status 130 instead of a traceback.

A script that is run calls exit_at_once_from_here() before all other imports, since importing torch takes seconds.
"""

import os
import signal
import sys
from contextlib import contextmanager, suppress


def reports():
    """Whether this process prints errors: of those that torchrun has started on a machine, the first one does."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def exit_at_once(*_):
    """A handler of SIGINT for a process that has no files open to close."""
    if reports():
        with suppress(OSError):
            os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
    os._exit(130)


def exit_at_once_from_here():
    """Install the handler, unless SIGINT is ignored or has another handler."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


@contextmanager
def as_exception():
    """Inside, Ctrl-C raises KeyboardInterrupt again, so that temporary files are removed and locks released."""
    if signal.getsignal(signal.SIGINT) is not exit_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, exit_at_once)
