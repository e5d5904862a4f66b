"""Ctrl-C while a script is starting: one line and exit status 130 instead of a traceback.

A script that is run, and not imported, turns this on before anything else: importing torch takes seconds.
"""

import os
import signal
import sys
from contextlib import contextmanager, suppress


def reports():
    """Whether this process is the one of those that torchrun has started on this machine that tells what is wrong."""
    return "TORCHELASTIC_RUN_ID" not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0"


def exit_at_once(*_):
    """A handler of SIGINT for a process that holds nothing yet, or nothing any more."""
    if reports():
        with suppress(OSError):
            os.write(2, f"\n{os.path.basename(sys.argv[0])}: interrupted\n".encode(errors="replace"))
    os._exit(130)


def exit_at_once_from_here():
    """Install the handler, unless Ctrl-C is ignored or handled already."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, exit_at_once)


@contextmanager
def as_exception():
    """Inside, Ctrl-C is a KeyboardInterrupt again, so that files and folders can be left as they should be."""
    if signal.getsignal(signal.SIGINT) is not exit_at_once:
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, exit_at_once)
