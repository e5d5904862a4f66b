"""What ends a training early: signals, noticed after the step under way, and errors of the system."""

import signal
from contextlib import contextmanager

from utils import distributed
from utils.cli import describe_dead_worker, describe_error, is_dead_worker
from utils.memory import is_out_of_memory
from utils.startup import STOP_SIGNALS


class StopSignals:
    """Inside, STOP_SIGNALS only set `received`, to the first one's number.

    Any of several processes may receive one, and all have to stop after the same step.
    """

    def __enter__(self):
        self.received = None
        # What nohup has made the script ignore stays ignored.
        self.former = {number: signal.signal(number, self._receive) for number in STOP_SIGNALS
                       if number in (signal.SIGINT, signal.SIGTERM) or signal.getsignal(number) != signal.SIG_IGN}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def agreed(self):
        """The signal that any of the processes has received, the same in all of them; or None."""
        if number := distributed.all_reduce_max(self.received or 0):
            self.received = number
        return number or None

    def _receive(self, number, _frame):
        self.received = self.received or number


@contextmanager
def explain_errors(out_of_memory, files=None):
    """Turn a system error in the body (OSError, out of memory) into a ValueError with what is saved and how to resume.

    out_of_memory() → what has asked for memory, and what would need less. files: the RunFiles, once they are written.
    """
    def stopped(why):
        saved = (f"{files.last} is intact, resume with: {files.resume_command}" if files and files.last.is_file() else
                 "nothing had been saved")
        return ValueError(f"{why}; the training has stopped, {saved}")

    try:
        yield
    except OSError as error:
        raise stopped(describe_error(error)) from error
    except (RuntimeError, MemoryError) as error:        # torch raises RuntimeError for lack of memory, among others
        if distributed.is_peer_failure(error):
            raise stopped(distributed.describe_peer_failure(error)) from error
        if is_dead_worker(error):
            raise stopped(describe_dead_worker(error)) from error
        if not is_out_of_memory(error):
            raise
        message = out_of_memory()
        if files and files.last.is_file():
            message += f"; {files.last} is intact, with more memory resume with: {files.resume_command}"
        raise ValueError(message) from error
