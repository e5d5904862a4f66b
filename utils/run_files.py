"""The files of a training: where it writes, what it may replace, and what it removes."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import checkpoint
from utils import event_files, files, tensorboard_logs

RESUME_HINT = ", or continue one that was interrupted with --resume"


class RunFiles(NamedTuple):
    """Where a training writes, and the command that resumes it."""

    last: Path                  # the latest state of the training, to resume from
    best: Path                  # the model with the lowest validation loss; without validation set, the latest
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
            files.OutputFile(path, overwrite, f"a {kind}", partial(checkpoint.is_of_kind, kind), RESUME_HINT).check()
        if not resume:
            files.OutputFile(self.track, overwrite, "a track", tensorboard_logs.is_track, RESUME_HINT).check()
        if not (resume or overwrite) and (logs := event_files.own_files(self.logs, self.log_suffix)):
            raise ValueError(f"{logs[0]}: exists, replace it with --overwrite{RESUME_HINT}")
        files.check_writable(self.best)
        files.check_writable(self.logs / "events")

    def check_regular(self, former=()):
        """Raise ValueError if one of the run's paths, or of the `former` ones, is a folder, a device or a pipe."""
        for path in (self.last, self.best, self.track, *former):
            if path.exists() and not path.is_file():
                raise ValueError(f"{path} is not a regular file: move it away")

    def clear(self, kind, state, resumed, truncate, former=()):
        """Remove what a former run has left. state: the TrainState, already saved.

        At step 0: `best` (for a resumed run only if it is a checkpoint of this kind), the paths in `former`, and the
        logs. At a later step only what truncate(folder, suffix) removes from the logs. At any step temporary files, and
        the lines of the track that are not in the state.
        """
        names = [self.last.name, self.best.name, self.track.name] + ["model_*.pt", "args.json"] * bool(self.every_epoch)
        files.remove_temporary_files(self.last.parent, *names)
        if state.step:
            truncate(self.logs, self.log_suffix)
        else:
            if not resumed or checkpoint.is_of_kind(kind, self.best):
                self.best.unlink(missing_ok=True)
            for path in former:
                path.unlink(missing_ok=True)
            event_files.remove_logs(self.logs, self.log_suffix)
        tensorboard_logs.write_track(self.track, state.track)
