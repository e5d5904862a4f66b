"""A training that can stop after any step and go on as if it had not: what is written down for that, and read back."""

import copy
import math
import platform
import random
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import checkpoint
import fast
import processes
from cli import describe

LOG_EVERY = 10          # steps between two moments when the losses come from the device
ADVICE = "try a lower rate; what was saved is from before"
ROUNDING = "torch", "device", "processor", "threads", "processes"      # what rounding depends on
MOST_STEPS = 10**7      # that a run can go on after: the schedule takes them again
PROBE_IMAGES = 8        # in the steps that are measured before a training
HERE = "data_folder", "num_workers", "device"        # arguments that may be another machine's own


@dataclass(kw_only=True)
class Progress:
    """Where a training stands, in plain values and tensors. L losses are taken at each step."""

    order: torch.Tensor             # state of the data order's generator when the epoch under way began
    sums: torch.Tensor              # (L,), of the losses of its images
    waiting: torch.Tensor           # (LOG_EVERY, L), of the steps that are not logged yet; still on the device
    epoch: int = 1                  # the one under way
    batches: int = 0                # its steps that are done
    images: int = 0                 # the images in them
    step: int = 0                   # steps since the training began
    best: float = math.inf          # the lowest test loss
    best_epoch: int = 0
    seconds: float = 0.0            # spent in the epoch
    track: list = field(default_factory=list)           # the lines of the text track

    def add(self, losses, images):
        """One more step, with its losses (L,) and its number of images."""
        self.waiting[self.batches % LOG_EVERY] = losses
        self.sums += losses.to(self.sums.device).double() * images
        self.batches, self.step, self.images = self.batches + 1, self.step + 1, self.images + images

    def latest_losses(self):
        """(n, L): those of the steps since the latest log."""
        return self.waiting[:(self.batches - 1) % LOG_EVERY + 1 if self.batches else 0]

    def next_epoch(self, generator):
        self.order = generator.get_state()
        self.sums.zero_()
        self.epoch, self.batches, self.images, self.seconds = self.epoch + 1, 0, 0, 0.0


class Run:
    """A training with all that changes in it: what train_prior.py and VQ-VAE.py have in common.

    Each makes it from its arguments, takes its steps, and finishes its epochs. about: what the
    checkpoint says of the model, beside its weights; losses: the names of the L losses.
    """

    losses = ()

    def __init__(self, args, about, model, optimizer, schedule, generator, steps, images, progress=Progress, **more):
        self.args, self.about, self.model, self.optimizer, self.schedule = args, about, model, optimizer, schedule
        self.generator = generator                                    # of the data's order
        self.bfloat16 = args.amp                                      # until choose_precision()
        self.environments = [environment(args.device)]                # at the start, and after each change
        self.steps, self.images = steps, images                       # of an epoch
        fast.keep_freed_memory()
        L = len(self.losses)
        place = "cpu" if args.device == "mps" else args.device        # MPS knows no float64
        self.progress = progress(order=generator.get_state(), waiting=torch.zeros(LOG_EVERY, L, device=args.device),
                                 sums=torch.zeros(L, dtype=torch.float64, device=place), **more)

    def compiled_if_asked(self, function):
        """With --compile, function compiled by torch."""
        def say(why):
            tqdm.write(f"--compile: torch could not ({why}); the training goes on without", file=sys.stderr)
        if self.args.compile and processes.count() > 1:
            if processes.leads():
                say("several processes take their steps as they are written")
            return function
        return fast.compiled(function, say) if self.args.compile else function

    def images_of_all(self, own):
        """How many images a step has in all processes, if this one has so many. Those that fill up the last batch do
        not count.
        """
        return own if processes.count() == 1 else min(self.args.batch_size, self.images - self.progress.images)

    def choose_precision(self):
        """With --amp, find out whether bfloat16 is faster on this device, and print what the steps are taken in."""
        if not self.args.amp:
            return
        # A copy, so that nothing is learned; in evaluation mode, so that no other process is waited for.
        model = copy.deepcopy(self.model).eval()
        with kept(Path(), "", self.args.batch_size):
            batch = self.probe_batch(min(PROBE_IMAGES, self.args.batch_size))
            chosen, said = fast.choose_bfloat16(lambda: self.probe_loss(model, *batch), self.args.device)
        self.bfloat16 = processes.highest(int(chosen and processes.leads())) == 1       # as the first process found
        print(said)

    def autocast(self):
        """Where --amp has been found to help, the products and convolutions inside are taken in bfloat16."""
        return torch.autocast(torch.device(self.args.device).type, torch.bfloat16, enabled=self.bfloat16)

    def check_alike(self):
        """Raise ValueError if the processes of a training do not all bring the same settings, data and state."""
        settings = {name: value for name, value in vars(self.args).items() if name not in HERE}
        processes.check_alike(settings, self.about, self.images, self.test_set.labels.tolist(), self.progress.step)

    def finished(self):
        return self.progress.epoch > self.args.num_epochs

    def learn(self, writer, last, signals):
        """Epoch after epoch, until the last one is done or a signal asks to stop; the file `last` holds where."""
        progress, every = self.progress, self.args.save_every
        if processes.count() > 1:
            self.compiled = self.eager = processes.replicated(self.model, self.eager)
        if not progress.step:
            self.keep(last, writer)
        stop = signals.agreed()
        while not self.finished() and not stop:
            start = time.perf_counter() - progress.seconds
            with tqdm(total=self.images, initial=progress.images, desc=f"epoch {progress.epoch}/{self.args.num_epochs}",
                      unit="img", unit_scale=True, leave=False, disable=processes.no_bar()) as bar:
                for _ in self.take_steps(writer, bar):
                    progress.seconds = time.perf_counter() - start
                    stop = signals.agreed()
                    if stop or (every and progress.step % every == 0):
                        self.keep(last, writer)
                    if stop:
                        break
                else:
                    bar.close()
                    self.finish_epoch(writer, last.parent, start)
                    progress.next_epoch(self.generator)
                    self.keep(last, writer)
                    stop = signals.agreed()

    def keep(self, last, writer):
        """Save the training from the first process."""
        if processes.leads():
            writer.flush()                  # what is in the file is in the logs too
            self.save(last)

    def save(self, path):
        """Write all that the training needs to go on from here. An epoch counts when it is over."""
        self.check_finite()
        checkpoint.save(path, {
            **self.about, "model": self.model.state_dict(), "epoch": self.progress.epoch - 1,
            "step": self.progress.step, "training": {
                "settings": vars(self.args), "progress": vars(self.progress), "random": random_states(),
                "optimizer": self.optimizer.state_dict()["state"], "bfloat16": self.bfloat16,
                "environments": self.environments}})

    def note_environment(self):
        """When a run goes on: keep the present environment if it is another one, and print what rounds differently."""
        now = environment(self.args.device, self.progress.step)
        before = self.environments[-1] if self.environments else dict.fromkeys(now, "unknown")
        changed = [name for name in ROUNDING if before[name] not in (now[name], "unknown")]
        if {**before, "from_step": now["from_step"]} != now:
            self.environments.append(now)
        if self.args.amp:
            print(f"--amp: the run goes on in {'bfloat16' if self.bfloat16 else 'float32'}, as it began")
        if changed:
            print(f"Resumed with {', '.join(f'{name} {now[name]} (before: {before[name]})' for name in changed)}: "
                  "the result can differ by rounding from that of an unbroken run.")

    def finite_losses(self):
        """(n, L), on the CPU: the losses since the latest log. Raises ValueError if one is no finite number.

        Here alone the device is waited for.
        """
        losses, progress = self.progress.latest_losses().cpu(), self.progress
        for step, values in enumerate(losses.tolist(), progress.step - len(losses) + 1):
            for name, value in zip(self.losses, values):
                if not math.isfinite(value):
                    raise ValueError(f"--lr {self.args.lr:g}: the {name} loss of step {step}, in epoch "
                                     f"{progress.epoch}, is {value}: {ADVICE}")
        return losses

    def check_finite(self):
        """Raise ValueError if a loss since the latest log, or a weight, is no finite number."""
        self.finite_losses()
        if not torch.stack([value.isfinite().all() for value in self.model.state_dict().values()]).all():
            raise ValueError(f"--lr {self.args.lr:g}: a weight is no finite number after step {self.progress.step}, "
                             f"in epoch {self.progress.epoch}: {ADVICE}")

    def go_on(self, saved):
        """Bring a fresh run to where it stood when the checkpoint was written, whose contents are `saved`.

        Raises ValueError if they are not complete, do not fit, or the run has finished.
        """
        try:
            training, progress = saved["training"], self.progress
            for name, fresh in vars(progress).items():
                setattr(progress, name, _like(fresh, training["progress"][name], name))
            if (len(progress.track) != progress.epoch or progress.best_epoch >= progress.epoch
                    or [line.split()[0] for line in progress.track[1:]] != [str(i) for i in range(1, progress.epoch)]
                    or progress.batches > self.steps or progress.step > MOST_STEPS
                    or progress.step != (progress.epoch - 1) * self.steps + progress.batches):
                raise ValueError(f"step {progress.step} is not step {progress.batches} of epoch {progress.epoch}, "
                                 f"of {self.steps} steps each")
            self.model.load_state_dict(dict(saved["model"]))
            if not all(isinstance(state, dict) for state in training["optimizer"].values()):
                raise ValueError("the optimizer's state")       # torch would warn before it fails
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": training["optimizer"], "param_groups": groups})
            _check_averages(self.optimizer)
            self.generator.set_state(progress.order)
            restore_random_states(training["random"])
            self.bfloat16 = bool(training.get("bfloat16", self.args.amp))       # the first runs did not choose
            self.environments = [{name: str(one.get(name, "unknown"))[:100] for name in self.environments[0]}
                                 for one in training.get("environments", [])]
        except Exception as error:      # a damaged file makes torch raise whatever it trips over
            raise ValueError("what it says of the training is damaged or of another version of the code: "
                             f"{type(error).__name__}: {error}") from error
        if progress.epoch > self.args.num_epochs:
            raise ValueError(f"--num-epochs {self.args.num_epochs}: the run ended after epoch {progress.epoch - 1}, "
                             "ask for more")
        # The schedule takes its steps again: it may be a longer one than at the run's start.
        with warnings.catch_warnings():     # of steps that the optimizer does not take
            warnings.simplefilter("ignore")
            for _ in range(progress.step):
                self.schedule.step()


def environment(device, step=0):
    """What the figures of a run come from, and the step from which on it was so, as texts."""
    try:
        torchvision = version("torchvision")
    except PackageNotFoundError:        # which many data sets do without
        torchvision = "none"
    if torch.device(device).type == "cuda":
        device = torch.cuda.get_device_name(device)
    return {"from_step": str(step), "python": platform.python_version(), "torchvision": torchvision,
            "torch": str(torch.__version__), "device": device, "processor": fast.processor(),
            "threads": str(torch.get_num_threads()), "processes": str(processes.count())}


def check_about(about, saved):
    """Raise ValueError if a checkpoint's contents are of another model or data set than its settings say.

    This comes before the model is made: what a damaged file asks for must not be built.
    """
    for name, value in about.items():
        found = saved.get(name)
        if name == "dataset" and isinstance(value, dict) and isinstance(found, dict) and "folder" in value:
            if {**found, "folder": None} != {**value, "folder": None}:      # it may have been moved
                raise ValueError(f"the images in {value['folder']} are not those that the run began with")
        elif found != value:
            raise ValueError(f"its {name} is not the one that its settings say: the file is damaged")


def _like(fresh, saved, name):
    """A saved value, if it is of a fresh one's kind. A tensor is copied into the fresh one, whose shape it has."""
    fits = type(saved) is type(fresh)
    if fits and torch.is_tensor(fresh):
        fits = saved.shape == fresh.shape and saved.dtype == fresh.dtype
    elif fits and isinstance(fresh, list):
        fits = all(isinstance(line, str) for line in saved)
    elif fits:
        fits = saved >= 0
    if not fits:
        raise ValueError(name)
    return fresh.copy_(saved) if torch.is_tensor(fresh) else saved


def _check_averages(optimizer):
    """Raise ValueError if an Adam's averages do not fit its parameters. They get the parameters' memory layout."""
    for parameter, state in optimizer.state.items():
        if len(state) != 3 or state["step"].shape != ():
            raise ValueError("the optimizer's state")
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].shape != parameter.shape or not state[name].isfinite().all():
                raise ValueError("the optimizer's averages")
            state[name] = torch.empty_like(parameter).copy_(state[name])


def seed_everything(seed):
    """Seed every generator that a training may draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)        # it takes no larger one
    torch.manual_seed(seed)


def random_states():
    """The states of every generator that a training may draw from, as plain values."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state()
    states = {"python": [version, list(numbers), gauss],
              "numpy": [kind, keys.tolist(), position, has_gauss, cached], "torch": torch.get_rng_state()}
    if torch.cuda.is_initialized():         # by this training: it is not for a run on the CPU to start CUDA
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def restore_random_states(states):
    """Bring every generator back to what random_states() saw. Raises something if a state is none."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = states["numpy"]
    if not 0 <= position <= len(keys):
        raise ValueError(f"position {position} of {len(keys)}")
    np.random.set_state((kind, keys, position, has_gauss, cached))
    torch.set_rng_state(states["torch"].cpu())
    if torch.cuda.is_initialized() and processes.count() > 1 and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"][0].cpu())           # of the first process's GPU
    elif torch.cuda.is_initialized() and len(states.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


# ---------------------------------------------------------------- being asked to stop

@contextmanager
def kept(last, command, batch_size):
    """Say what is left, and how to go on with it, after an error of the system that ends a training."""
    def stopped(why):
        left = f"{last} is whole, go on with: {command}" if last.is_file() else "nothing had been saved"
        return ValueError(f"{why}; the training has stopped, {left}")

    try:
        yield
    except OSError as error:
        raise stopped(describe(error)) from error
    except RuntimeError as error:       # torch's way to say that memory is short, and much else
        if processes.lost(error):
            raise stopped(processes.why_lost(error)) from error
        if not isinstance(error, torch.cuda.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise ValueError(f"--batch-size {batch_size}: memory has run out, choose a smaller one") from error


def stop(number, progress, last, command):
    """End the script as the signal `number` asks, saying how to go on."""
    print(f"Stopped by {signal.Signals(number).name} in epoch {progress.epoch}, after step {progress.step:,}; "
          f"{last} holds all of it. To go on:\n  {command}")
    raise SystemExit(128 + number)


class Signals:
    """SIGINT and SIGTERM, kept until the step under way is done: `received` is the first one's number, or None.

    Of several processes any may be the one that is asked, and all have to stop after the same step.
    """

    def __enter__(self):
        self.received = None
        self.former = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_):
        for number, handler in self.former.items():
            signal.signal(number, handler)

    def agreed(self):
        """What any of the processes has received: the same number for all of them, or None."""
        if number := processes.highest(self.received or 0):
            self.received = number
        return number or None

    def _receive(self, number, _frame):
        self.received = self.received or number
