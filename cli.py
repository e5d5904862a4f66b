"""What the scripts share: flags, and bad input told in one line with exit status 2. It needs no torch, so that --help
and a mistyped flag are answered at once.
"""

import argparse
import signal
import sys
from contextlib import contextmanager

import arguments
from utils import interrupt

LONGEST_LINE = 2000         # characters of a message; what a damaged file says can be of any length
NAMES_THE_RUN = ("help", "output_folder", "model", "resume", "overwrite")
# When a run goes on, these may be given anew: they do not change what it learns in a step.
MAY_CHANGE = ("num_epochs", "device", "data_folder", "num_workers", "save_every", "compile")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every complaint is one line on stderr, with exit status 2."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            hint = arguments.did_you_mean(flag, self._option_string_actions) or "--help lists the flags"
            self.error(f"{flag} is unknown: {hint.strip()}")
        return parsed

    def error(self, message, report=None):
        """End with status 2 and the message in one line.

        report: whether this process says it. Before a group of processes has formed, all have the same command line,
        and the first one of each machine does.
        """
        if report is None:
            report = interrupt.reports()
        line = " ".join(message.split())
        line = line if len(line) <= LONGEST_LINE else line[:LONGEST_LINE] + " …"
        self.exit(2, f"{self.prog}: error: {line}\n" if report else None)

    def check_unused(self, args, names, reason):
        """Complain if one of the named arguments was given a value that nothing would look at."""
        for name in names:
            value = getattr(args, name)
            if value != self.get_default(name):
                self.error(f"{flag_of(name)}{'' if value is True else f' {value}'}: {reason}")

    def continued(self, args, argv, saved):
        """The arguments of a run that goes on: those in its checkpoint, but for the ones given anew that may change.

        Raises ValueError if one given contradicts the run, or what the checkpoint says is no value for it.
        """
        match saved.get("training"):
            case {"settings": dict() as settings}:
                pass
            case _:
                raise ValueError("it holds a model, but not what is needed to go on with its training")
        nothing = object()
        given = vars(self.parse_args(argv, argparse.Namespace(**dict.fromkeys(vars(args), nothing))))
        for action in self._actions:
            name, flag = action.dest, action.option_strings[0]
            if name in NAMES_THE_RUN or (name in MAY_CHANGE and given[name] != nothing):
                continue
            if settings.get(name) is None:
                if given[name] not in (nothing, None):
                    raise ValueError(f"{flag} {given[name]} contradicts the run, which was started without {flag}")
                continue
            if not isinstance(settings[name], bool if action.nargs == 0 else int | float | str):
                raise ValueError(f"the run's {flag} is no number and no name: the file is damaged")
            try:
                value = settings[name] if action.nargs == 0 else (action.type or str)(str(settings[name]))
                self._check_value(action, value)        # argparse's own, of choices
            except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"the run's {flag}: {error}") from error
            if given[name] not in (nothing, value):
                free = ", ".join(flag_of(name) for name in MAY_CHANGE if hasattr(args, name))
                raise ValueError(f"{flag} {given[name]} contradicts the run, which has {flag} {value}: leave it out; "
                                 f"what may change is {free}")
            setattr(args, name, value)
        return args

    @contextmanager
    def bad_input_in_one_line(self):
        """The one place where what the modules raise about bad input becomes a message."""
        import processes  # with torch, which the script has imported by now

        with interrupt.as_exception():
            try:
                yield
                if sys.stdout:          # not closed
                    sys.stdout.flush()
            except (OSError, ValueError) as error:
                self.error(describe(error), processes.speaks())
            except RuntimeError as error:
                if not processes.lost(error):
                    raise
                self.error(processes.why_lost(error), processes.speaks())
            except KeyboardInterrupt:
                former = signal.signal(signal.SIGINT, signal.SIG_IGN)           # a second one is too late
                try:
                    end_workers()
                    self.exit(130, f"\n{self.prog}: interrupted\n" if processes.speaks() else None)
                finally:
                    signal.signal(signal.SIGINT, former)
            finally:
                end_workers()


def end_workers():
    """End the processes that load batches, if an error has left some: they ignore the signal that asks them to."""
    import multiprocessing

    children = [child for child in multiprocessing.active_children() if child.daemon]       # as torch starts them
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would complain
    for child in children:
        child.kill()


def describe(error):
    """An error's message, without Python's numbers and quotes where the system raised it."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    if " in DataLoader worker process " in text:        # what the worker raised stands at the end of its traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


@contextmanager
def named(flag, value):
    """Put the flag and its value before the message of an error raised inside."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {value}: {describe(error).removeprefix(f'{value}: ')}") from error


def flag_of(name):
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- training

def add_speed_arguments(group):
    """The flags of every script whose training can be made faster."""
    group.add_argument("--amp", action="store_true",
                       help="take products and convolutions in bfloat16 if that is faster on this device, which is "
                            "found out and printed first (default: float32)")
    group.add_argument("--compile", action="store_true",
                       help="compile the step with torch.compile: takes up to half a minute at the start "
                            "(default: run it as it is written)")


def add_run_arguments(group, what):
    """The flags of every script whose training can go on. `what` says what --overwrite replaces."""
    group.add_argument("--save-every", type=arguments.whole_number(0), default=0, metavar="STEPS",
                       help="also save the training after so many steps; 0 means only at the end of each epoch "
                            "(default: %(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true",
                        help="go on with a training that was broken off, exactly where it was last saved "
                             "(default: start anew)")
    either.add_argument("--overwrite", action="store_true",
                        help=f"replace {what} (default: leave it untouched and stop)")


# ---------------------------------------------------------------- a trained model and its test set

def add_model_arguments(parser):
    """The flags of every script that takes a trained model."""
    shown = "(default: %(default)s)"
    parser.add_argument("--model", type=arguments.file_name, metavar="PATH",
                        help="checkpoint of VQ-VAE.py, or a state_dict of the published network "
                             "(default: the shipped model, pretrained/vqvae.pt)")
    parser.add_argument("--device", type=arguments.device, default="cpu", metavar="NAME",
                        help=f"{arguments.DEVICES} {shown}")
    parser.add_argument("--dataset", type=arguments.one_of(*arguments.DATASETS), metavar="NAME",
                        help=f"{', '.join(arguments.DATASETS)} (default: the one that the model was trained on)")
    parser.add_argument("--data-folder", metavar="PATH",
                        help="where the data set is, or is downloaded to once "
                             "(default: that of the model's own image folder, MNIST for the others)")
    parser.add_argument("--num-workers", type=arguments.whole_number(0, 256), default=0, metavar="N",
                        help=f"processes that read an image folder {shown}")
    parser.add_argument("--hidden-size", type=arguments.whole_number(1), metavar="D",
                        help="size of a latent vector (default: read from the model's file)")
    parser.add_argument("--k", type=arguments.whole_number(1), metavar="K",
                        help="number of codes (default: read from the model's file)")


def add_sampling_arguments(parser, without):
    """The flags of every script that draws from a prior. `without` says what happens without --prior."""
    shown = "(default: %(default)s)"
    parser.add_argument("--prior", type=arguments.file_name, metavar="PATH",
                        help=f"checkpoint of train_prior.py (default: {without})")
    parser.add_argument("--temperature", type=arguments.number(minimum=0.01, below=100), default=1.0, metavar="T",
                        help=f"below 1 the probable codes become more probable {shown}")
    parser.add_argument("--top-k", type=arguments.whole_number(1), metavar="N",
                        help="draw only from the N most probable codes (default: from all)")
    parser.add_argument("--guidance", type=arguments.number(minimum=0, below=100), default=1.0, metavar="G",
                        help=f"above 1 the digit weighs more, 0 forgets it, 1 is the plain prior {shown}")


SAMPLING = ("prior", "temperature", "top_k", "guidance")


def sampling(args):
    """The arguments of CodePrior.sample() that add_sampling_arguments() reads."""
    return {name: getattr(args, name) for name in SAMPLING[1:]}
