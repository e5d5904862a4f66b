"""What makes a training stoppable, resumable, distributed and logged. The training loop itself is in the scripts."""

import copy
import json
import math
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path

import torch
from tqdm import tqdm

import checkpoint
from utils import distributed, event_files, speed, tensorboard_logs
from utils.environment import AFFECTS_ROUNDING, environment
from utils.interruptions import StopSignals, explain_errors
from utils.train_state import (
    LOG_EVERY,
    TrainState,
    check_optimizer,
    random_states,
    restore_random_states,
    schedule_fits,
)

MEASURED_IMAGES = 8     # in the steps that --amp measures before a training
MACHINE_ARGS = "data_folder", "num_workers", "device"       # arguments that may differ from process to process
LOWER_LR_HINT = "try a lower rate; the files saved so far predate it"


class Trainer:
    """A training under way: model, optimizer, schedule, data order and state.

    args: the script's arguments; metadata: what its checkpoints hold beside the weights; generator: draws the data's
    order; num_images: the size of the training set; loss_names: of the losses given to after_step(); size_flags: the
    arguments on which the memory of an item depends; step_tag: what the losses' TensorBoard tags begin with, or None if
    they are logged by epoch alone; patience: after how many epochs without a lower validation loss it stops; state: the
    first values of other fields of TrainState, the track's header and what is counted over an epoch.
    """

    def __init__(self, args, files, metadata, model, optimizer, schedule, generator, num_images, loss_names,
                 size_flags, step_tag=None, patience=math.inf, **state):
        self.args, self.files, self.metadata, self.model, self.size_flags = args, files, metadata, model, size_flags
        self.optimizer, self.schedule, self.generator = optimizer, schedule, generator
        self.num_images, self.loss_names, self.step_tag, self.patience = num_images, loss_names, step_tag, patience
        self.writer, self.bar, self.saved_models = None, None, set()
        self.steps_per_epoch = math.ceil(num_images / args.batch_size)
        self.bfloat16 = args.amp                                      # until choose_precision()
        self.x_axis = "images"                                        # of the curves; "step" of older runs
        self.in_step = True                                           # else an epoch is evaluated
        self.environments = [environment(args.device)]                # at the start, and after each change
        speed.keep_freed_memory()
        L = len(loss_names)
        self.state = TrainState(
            order=generator.get_state(), sums=torch.zeros(L, dtype=torch.float64),
            pending_losses=torch.zeros(LOG_EVERY, L, device=args.device), **state)

    # ---------------------------------------------------------------- the loop

    def begin(self, former=()):
        """Save the first checkpoint, then remove the files of a former run of this name. Call it before epoch 1.

        former: paths to remove besides those of RunFiles. Nothing is removed before the checkpoint is on disk; if the
        process dies in between, --resume finishes the removal. A resumed run removes only what it logged after its last
        save. Raises ValueError if one of the paths is not a regular file.
        """
        self.files.check_regular(former)
        if not self.args.resume:
            self.save_checkpoint()
        self.files.clear(self.metadata["kind"], self.state, self.args.resume, self._truncate_logs, former)

    def _truncate_logs(self, folder, suffix):
        epoch = self.state.epoch - 1
        evaluated = epoch * self.num_images if self.x_axis == "images" else epoch
        event_files.truncate_logs(folder, self.position(), evaluated, epoch, suffix)

    def position(self):
        """Where the training is on the x axis of its curves: the number of images seen; of older runs the step."""
        state = self.state
        return state.step if self.x_axis == "step" else (state.epoch - 1) * self.num_images + state.images

    @contextmanager
    def running(self):
        """Within the block, signals end the training after the current step, and the TensorBoard writer is open.

        A system error becomes a ValueError that says what is saved and how to resume.
        """
        writer = tensorboard_logs.open_writer(self.files.logs, self.files.log_suffix)
        with StopSignals() as self.signals, explain_errors(self.out_of_memory, self.files), \
                distributed.main_process_only(writer) as self.writer:
            try:
                yield
            finally:
                if self.bar is not None:
                    self.bar.close()

    def epochs(self):
        """The numbers of the epochs to do, an interrupted one first."""
        state = self.state
        self.stop_if_asked()
        while not self.done():
            self.epoch_start = time.perf_counter() - state.seconds
            yield state.epoch
            state.next_epoch(self.generator)
            self.save_checkpoint()
            if not self.done():
                self.stop_if_asked()

    def batches(self, batches):
        """The epoch's batches, without those done before a resume, under a progress bar; saves after the last one."""
        state = self.state
        with tqdm(total=self.num_images, initial=state.images, desc=f"epoch {state.epoch}/{self.args.num_epochs}",
                  unit="img", unit_scale=True, leave=False, disable=distributed.hide_progress_bar()) as self.bar:
            self.in_step = True
            for number, batch in enumerate(batches):
                if number >= state.batches:
                    self.lr = self.schedule.get_last_lr()[0]
                    yield batch
        self.in_step = False
        self.save_checkpoint()          # before the epoch is evaluated and logged, which may fail

    def after_step(self, losses, code_counts=None):
        """Count a step, with its losses and (K,) how often it chose each code. Logs every LOG_EVERY steps, saves every
        --save-every, and ends the script, saved, if a signal has asked for it.
        """
        state = self.state
        images = min(self.args.batch_size, self.num_images - state.images)
        losses = torch.stack(tuple(losses)).detach()
        losses, code_counts = distributed.average_step(self.model, losses, code_counts)
        state.add_step(losses, images)
        if code_counts is not None:
            state.code_counts += code_counts
        self.bar.update(images)
        if state.batches % LOG_EVERY == 0 or state.batches == self.steps_per_epoch:
            means = dict(zip(self.loss_names, self.finite_losses().mean(dim=0).tolist()))
            if self.writer:
                tensorboard_logs.check_folder_exists(self.writer.log_dir)
            if self.writer and self.step_tag:
                tensorboard_logs.log_steps(self.writer, self.position(), self.step_tag, means, self.lr)
            self.bar.set_postfix(loss=f"{means[self.loss_names[-1]]:.4f}", refresh=False)         # the one minimised
        state.seconds = time.perf_counter() - self.epoch_start
        if self.args.save_every and state.step % self.args.save_every == 0:
            self.save_checkpoint()
        self.stop_if_asked()

    def save_epoch(self, validation_loss, figures):
        """Write the model of the epoch: as `best` if its validation loss is the lowest so far, or if there is none; and
        into `every_epoch` if set, after every --keep-every epochs.

        figures: {name: value} for the checkpoint, plain values. Nothing is chosen by them.
        """
        state = self.state
        if validation_loss is None or validation_loss < state.best:
            state.best = math.inf if validation_loss is None else validation_loss
            state.best_epoch = state.epoch
            self.save_model(self.files.best, figures)
        if self.files.every_epoch and self.args.keep_every and state.epoch % self.args.keep_every == 0:
            self.save_model(Path(self.files.every_epoch.format(state.epoch)), figures)

    def save_model(self, path, figures):
        """Write the model as it is now, with these figures.

        Raises ValueError if another program has written a file there since the training began.
        """
        if distributed.is_main_process():
            if path not in self.saved_models and path.exists() and not (
                    self.args.resume and checkpoint.is_of_kind(self.metadata["kind"], path)):
                raise ValueError(f"{path} has appeared since the training began: move it away, then resume with: "
                                 f"{self.files.resume_command}")
            self.saved_models.add(path)
            checkpoint.save(path, {**self.metadata, "model": self.model.state_dict(), "epoch": self.state.epoch,
                                   "step": self.state.step, **figures})

    def epoch_seconds(self):
        """Spent in the epoch so far."""
        return time.perf_counter() - self.epoch_start

    def add_track_line(self, formats, values):
        """Add a line to the text track, of the values {name: number} that its header names, and print it."""
        line = tensorboard_logs.track_line(self.state.track[0], formats, values)
        self.state.track.append(line)
        tensorboard_logs.write_track(self.files.track, self.state.track)
        self.print_track(line)

    def print_track(self, *lines):
        """Print lines of the text track, by default all, in the columns that fit into a terminal."""
        names = self.state.track[0].split()
        for line in lines or self.state.track:
            print("  ".join(value.rjust(len(name)) for name, value in zip(names, line.split())
                            if name not in tensorboard_logs.NOT_PRINTED), flush=True)

    @contextmanager
    def optional(self, what):
        """The body is optional: if it fails, mostly for lack of memory, one line says so and the training continues."""
        try:
            yield
        except (MemoryError, RuntimeError, ValueError) as error:
            tqdm.write(f"Not logged: {what} ({speed.first_line(error)}); the training continues", file=sys.stderr)

    def out_of_memory(self):
        """The message for lack of memory: what has asked for it, and what would need less."""
        flag, smaller = f"--batch-size {self.args.batch_size}", f"choose a smaller {self.size_flags}"
        if not self.in_step:
            return f"memory has run out in the evaluation after epoch {self.state.epoch}: {smaller}"
        if self.args.batch_size == distributed.world_size():
            return f"memory has run out in a training step of {flag}: {smaller}"
        return f"{flag}: memory has run out in a training step, choose a smaller one"

    def done(self):
        return self.state.epoch > self.args.num_epochs or self.should_stop_early()

    def should_stop_early(self):
        """Whether the validation loss has not fallen for `patience` epochs."""
        return self.state.epoch - 1 - self.state.best_epoch >= self.patience

    # ---------------------------------------------------------------- faster steps

    def autocast(self):
        """Within the block, matrix products and convolutions run in bfloat16 if --amp was found to help."""
        return torch.autocast(torch.device(self.args.device).type, torch.bfloat16, enabled=self.bfloat16)

    def choose_precision(self, compute_loss, batch):
        """With --amp, find out whether bfloat16 is faster on this device, and print which one the training takes.

        compute_loss(model, *batch) → a loss; batch: tensors, of which a few rows are measured.
        """
        if not self.args.amp:
            return
        # A copy, so that the model does not change; in evaluation mode, so that SyncBatchNorm waits for no process.
        model = copy.deepcopy(self.model).eval()
        rows = min(MEASURED_IMAGES, self.args.batch_size)
        with explain_errors(self.out_of_memory):
            chosen, line = speed.choose_bfloat16(lambda: compute_loss(model, *(tensor[:rows] for tensor in batch)),
                                                 self.args.device)
        self.bfloat16 = distributed.all_reduce_max(int(chosen and distributed.is_main_process())) == 1
        print(line)

    def accelerate(self, compute_losses, compile_if=lambda: True):
        """compute_losses(x, ...), which runs the model on a batch: compiled with --compile, or for several processes.

        The compiled one takes full batches while compile_if() holds. A smaller batch would be compiled again.
        """
        if distributed.world_size() > 1:
            if self.args.compile and distributed.is_main_process():
                self._say_not_compiled("it is for a single process")
            return distributed.data_parallel(self.model, compute_losses)
        if not self.args.compile:
            return compute_losses
        compiled = speed.compile_step(compute_losses, self._say_not_compiled)

        def choose(*tensors):
            is_full = len(tensors[0]) == self.args.batch_size
            return (compiled if is_full and compile_if() else compute_losses)(*tensors)
        return choose

    @staticmethod
    def _say_not_compiled(why):
        tqdm.write(f"--compile: torch could not ({why}); continuing without torch.compile", file=sys.stderr)

    # ---------------------------------------------------------------- saving and resuming

    def save_checkpoint(self):
        """Write all that is needed to resume from here; `epoch` is then the number of completed epochs.

        Raises ValueError if a loss or a weight is not finite.
        """
        if not distributed.is_main_process():
            return
        if self.writer:
            self.writer.flush()         # what the checkpoint counts as done is in the logs too
        self.check_finite()
        # Copied, since checkpoint.load() rejects lists that are shared.
        schedule = json.loads(json.dumps(self.schedule.state_dict()))
        checkpoint.save(self.files.last, {
            **self.metadata, "model": self.model.state_dict(), "epoch": self.state.epoch - 1,
            "step": self.state.step, "training": {
                "settings": vars(self.args), "progress": self.state.as_dict(), "random": random_states(),
                "optimizer": self.optimizer.state_dict()["state"], "schedule": schedule,
                "bfloat16": self.bfloat16, "environments": self.environments, "x_axis": self.x_axis}})

    def load_state(self, saved):
        """Restore a new trainer to the state in a checkpoint's contents.

        Raises ValueError if they are incomplete, do not fit, or the training is done.
        """
        try:
            training = saved["training"]
            self.state.load(training["progress"], self.steps_per_epoch)
            self.model.load_state_dict(dict(saved["model"]))
            if not all(isinstance(state, dict) for state in training["optimizer"].values()):
                raise ValueError("the optimizer's state")       # torch would warn before it fails
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": training["optimizer"], "param_groups": groups})
            check_optimizer(self.optimizer)
            self.generator.set_state(self.state.order)
            restore_random_states(training["random"])
            self.bfloat16 = bool(training.get("bfloat16", self.args.amp))       # absent in the first versions' files
            self.x_axis = "images" if training.get("x_axis") == "images" else "step"
            self.environments = [{name: str(one.get(name, "unknown"))[:100] for name in self.environments[0]}
                                 for one in training.get("environments", [])]
            same_length = training["settings"]["num_epochs"] == self.args.num_epochs
        except Exception as error:      # a damaged file can make torch raise anything
            raise ValueError("its training state is damaged or of another version of the code: "
                             f"{type(error).__name__}: {error}") from error
        if self.state.epoch > self.args.num_epochs:
            raise ValueError(f"--num-epochs {self.args.num_epochs}: the run ended after epoch {self.state.epoch - 1}, "
                             "ask for more")
        if self.should_stop_early():
            raise ValueError(f"the training has ended, its validation loss had not fallen for {self.patience} epochs")
        self._restore_schedule(training.get("schedule") if same_length else None)

    def _restore_schedule(self, saved):
        """Bring the schedule to the present step: from its saved state, or step by step if its length is another."""
        if saved is not None and schedule_fits(
                self.schedule.state_dict(), saved, self.state.step, self.args.lr):
            self.schedule.load_state_dict(saved)
            for group, lr in zip(self.optimizer.param_groups, self.schedule.get_last_lr()):
                group["lr"] = lr
            return
        with warnings.catch_warnings():     # of steps that the optimizer does not take
            warnings.simplefilter("ignore")
            for _ in range(self.state.step):
                self.schedule.step()

    def note_environment(self):
        """For a resumed run, record the environment if it has changed, and print the changes that affect rounding."""
        now = environment(self.args.device, self.state.step)
        before = self.environments[-1] if self.environments else dict.fromkeys(now, "unknown")
        changed = [name for name in AFFECTS_ROUNDING if before[name] not in (now[name], "unknown")]
        if {**before, "from_step": now["from_step"]} != now:
            self.environments.append(now)
        if self.args.amp:
            print(f"--amp: the run continues in {'bfloat16' if self.bfloat16 else 'float32'}, as it began")
        if changed:
            print(f"Resumed with {', '.join(f'{name} {now[name]} (before: {before[name]})' for name in changed)}: "
                  "the result can differ by rounding from that of an unbroken run.")

    def stop_if_asked(self):
        """End the script if a signal has arrived in any of the processes: saved, and with the command that resumes."""
        number = self.signals.agreed()
        if not number:
            return
        self.save_checkpoint()
        if self.bar is not None:
            self.bar.close()
        print(f"Stopped by {signal.Signals(number).name} in epoch {self.state.epoch}, after step {self.state.step:,}; "
              f"{self.files.last} is up to date. To resume:\n  {self.files.resume_command}")
        raise SystemExit(128 + number)

    # ---------------------------------------------------------------- checks

    def check_same_everywhere(self, *values):
        """Raise ValueError unless all processes have the same settings, data and state."""
        settings = {name: value for name, value in vars(self.args).items() if name not in MACHINE_ARGS}
        metadata = dict(self.metadata)
        if isinstance(metadata["dataset"], dict):
            metadata["dataset"] = {**metadata["dataset"], "folder": None}           # its files have a fingerprint
        distributed.check_same_everywhere(settings, metadata, self.num_images, self.state.step, *values)

    def finite_losses(self):
        """(n, L), on the CPU: the losses since the last log. Raises ValueError if one is not finite.

        The only host–device synchronisation of the loop.
        """
        losses, state = self.state.losses_since_log().cpu(), self.state
        state.sum_losses(losses)
        for step, values in enumerate(losses.tolist(), state.step - len(losses) + 1):
            for name, value in zip(self.loss_names, values):
                if not math.isfinite(value):
                    raise ValueError(f"--lr {self.args.lr:g}: the {name} loss of step {step}, in epoch "
                                     f"{state.epoch}, is {value}: {LOWER_LR_HINT}")
        return losses

    def check_finite(self):
        """Raise ValueError if a loss since the last log, or a weight, is not finite."""
        self.finite_losses()
        if not torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all():
            raise ValueError(f"--lr {self.args.lr:g}: a weight is not finite after step {self.state.step}, "
                             f"in epoch {self.state.epoch}: {LOWER_LR_HINT}")
