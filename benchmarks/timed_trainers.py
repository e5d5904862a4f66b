"""Trainers that time the training loop of VQ-VAE.py and can pause or stop it."""

import importlib.util
import tempfile
import threading
import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from metrics import evaluate
from utils import inputs, speed
from utils.run_files import RunFiles
from utils.trainer import Trainer

ROOT = Path(__file__).resolve().parents[1]
TARGET_MSE = 0.0278             # the loss that the published run is reported to end at
LOW_MSE = 0.0070                # which the published settings do not reach


class TimedTrainer(Trainer):
    """A Trainer for a thread. It trains one epoch for each release of start_epoch."""

    def __init__(self, *arguments, **state):
        super().__init__(*arguments, **state)
        self.writer, self.signals = SummaryWriter(self.files.logs), NoSignals()
        self.start_epoch, self.epoch_done = threading.Semaphore(0), threading.Semaphore(0)

    def epochs(self):
        while True:
            self.start_epoch.acquire()
            self.epoch_start = time.perf_counter()
            yield self.state.epoch
            self.state.next_epoch(self.generator)
            self.epoch_done.release()

    def after_step(self, *arguments):
        super().after_step(*arguments)
        if self.state.batches == self.steps_per_epoch:          # the time of saving is not counted
            speed.synchronize(self.args.device)
            self.images_per_second = self.state.images / (time.perf_counter() - self.epoch_start)


class NoSignals:
    def agreed(self):
        return None


def load_script():
    spec = importlib.util.spec_from_file_location("vqvae_script", ROOT / "VQ-VAE.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def prepare_training(script, flags, trainer_class):
    """→ a trainer_class for VQ-VAE.py with these flags, and its batches."""
    args, temporary = script.get_parser().parse_args(flags), tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
    args.device, folder = inputs.find_device(args.device), Path(temporary.name)
    run_files = RunFiles(folder / "last.pt", folder / "best.pt", folder / "track.txt", folder / "logs", "", "")
    script.Trainer, batches = trainer_class, script.load_batches(args)
    trainer = script.build_trainer(args, run_files, batches)
    trainer.temporary_folder = temporary        # removed with the trainer, or when the process ends
    return trainer, batches


class TargetMSETrainer(Trainer):
    """Stops at a test MSE of `target`, or after max_seconds of training, evaluation not counted."""

    target, max_seconds = TARGET_MSE, float("inf")

    def __init__(self, *arguments, **state):
        super().__init__(*arguments, **state)
        self.writer, self.signals = SummaryWriter(self.files.logs), NoSignals()
        self.train_seconds, self.mse, self.next_test, self.resumed_at = 0.0, float("inf"), 10, time.perf_counter()
        self.paused_at = self.resumed_at

    def batches(self, batches):
        self.resumed_at += time.perf_counter() - self.paused_at
        yield from super().batches(batches)
        self.paused_at = time.perf_counter()

    def after_step(self, *arguments):
        super().after_step(*arguments)
        if self.state.step < self.next_test:
            return
        speed.synchronize(self.args.device)
        self.train_seconds += time.perf_counter() - self.resumed_at
        self.mse = evaluate(self.model, self.test_batches, self.args.device)[0].reconstruction
        self.model.train()
        if self.mse <= self.target or self.train_seconds >= self.max_seconds:
            raise TrainingStopped
        self.next_test, self.resumed_at = max(self.next_test + 5, round(self.next_test * 1.05)), time.perf_counter()


class TrainingStopped(Exception):
    pass
