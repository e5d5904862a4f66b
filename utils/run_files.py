"""The files of a training: where it writes, what it may replace, and what it removes."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import checkpoint
from utils import event_files, files, tensorboard_logs


class RunFiles(NamedTuple):
    """Where a training writes, and the command that resumes it."""

    last: Path                  # the latest state of the training, to resume from
    best: Path                  # the model with the lowest test loss
    track: Path                 # a text file of one line an epoch
    logs: Path                  # TensorBoard's folder
    log_suffix: str             # of its event files
    resume_command: str
    every_epoch: str = ""       # the model after every --keep-every epochs, a path with {} for the epoch

    def check(self, kind, resume, overwrite):
        """Raise ValueError if a training of this kind of model could not be written, or not be resumed. Writes nothing.

        For a training whose folder may hold other files too.
        """
        if resume and not self.last.is_file():
            raise ValueError(f"there is no {self.last} to --resume: start anew, with --overwrite if there is a {kind}")
        for path in () if resume else (self.best, self.last):
            files.OutputFile(path, overwrite, f"a {kind}", partial(checkpoint.is_of_kind, kind),
                             ", or continue one that was interrupted with --resume").check()
        files.check_writable(self.best)
        files.check_writable(self.logs / "events")

    def clear(self, state, former=()):
        """Remove what a former run has left: its files, besides those of RunFiles the `former` ones, and its logs.

        Of a resumed run only the logs of what it does again. Other files stay. state: the TrainState, already saved.
        """
        files.remove_temporary_files(self.last.parent)
        if state.step:
            event_files.truncate_logs(self.logs, state.step, state.epoch - 1, self.log_suffix)
        else:
            for path in (self.best, *former):
                path.unlink(missing_ok=True)
            event_files.remove_logs(self.logs, self.log_suffix)
        tensorboard_logs.write_track(self.track, state.track)
