"""What the scripts share: flags, and bad input answered in one line with exit status 2.

Imports no torch, so that --help and a mistyped flag are answered at once.
"""

import argparse
import os
import re
import signal
from contextlib import contextmanager

from utils import arguments, startup

MAX_MESSAGE = 2000          # characters; text from a damaged file can be of any length
RUN_NAME_ARGUMENTS = ("help", "output_folder", "output", "model", "resume", "overwrite")
# May be given anew with --resume: they do not change what a step learns.
CHANGEABLE_ARGUMENTS = ("num_epochs", "device", "data_folder", "num_workers", "save_every", "keep_every",
                        "sample_every", "compile")


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose every error is one line on stderr, with exit status 2.

    check(parser, args) is called with the parsed arguments, to hold them against each other.
    """

    def __init__(self, check=None, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        self.check = check

    def parse_args(self, args=None, namespace=None):
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            flag = next((word for word in unknown if word.startswith("-")), unknown[0]).partition("=")[0]
            hint = arguments.did_you_mean(flag, self._option_string_actions) or "--help lists the flags"
            self.error(f"{flag} is unknown: {hint.strip()}")
        if self.check and namespace is None:
            self.check(self, parsed)
        return parsed

    def error(self, message, report=None):
        """End with status 2 and the message in one line.

        report: whether this process prints it. Before the process group is formed, when all processes have the same
        command line, the first one of each machine does.
        """
        if report is None:
            report = startup.reports()
        line = printable(re.sub(r"\s*\n\s*", " ", message.strip()))
        line = line if len(line) <= MAX_MESSAGE else line[:MAX_MESSAGE] + " …"
        self.exit(2, f"{self.prog}: error: {line}\n" if report else None)

    def check_unused(self, args, names, reason):
        """End with an error if one of the named arguments was given, but would have no effect."""
        for name in names:
            value = getattr(args, name)
            if value != self.get_default(name):
                self.error(f"{flag_name(name)}{'' if value is True else f' {value}'}: {reason}")

    def given_arguments(self, argv):
        """{name: value} of the arguments in argv alone, without defaults."""
        defaults = argparse.Namespace(**{action.dest: self for action in self._actions})       # self marks "not given"
        return {name: value for name, value in vars(self.parse_args(argv, defaults)).items() if value is not self}

    def resumed_arguments(self, args, argv, saved):
        """The arguments of a resumed run: those in its checkpoint, except changeable ones that are given anew.

        Raises ValueError if one given contradicts the run, or the checkpoint has an invalid value for one.
        """
        match saved.get("training"):
            case {"settings": dict() as settings}:
                pass
            case _:
                raise ValueError("it holds a model, but not what is needed to resume its training")
        given = self.given_arguments(argv)
        for action in self._actions:
            name, flag = action.dest, action.option_strings[0]
            if name in RUN_NAME_ARGUMENTS or (name in CHANGEABLE_ARGUMENTS and name in given):
                continue
            if settings.get(name) is None:
                if given.get(name) not in (None, self.get_default(name)):
                    raise ValueError(f"{flag} {given[name]} contradicts the run, which was started without {flag}")
                continue
            if not isinstance(settings[name], bool if action.nargs == 0 else int | float | str):
                raise ValueError(f"the run's {flag} is neither a number nor a string: the file is damaged")
            try:
                value = settings[name] if action.nargs == 0 else (action.type or str)(str(settings[name]))
                self._check_value(action, value)        # argparse's own, of choices
            except (argparse.ArgumentError, argparse.ArgumentTypeError) as error:
                raise ValueError(f"the run's {flag}: {error}") from error
            if given.get(name, value) != value:
                free = ", ".join(flag_name(name) for name in CHANGEABLE_ARGUMENTS if hasattr(args, name))
                raise ValueError(f"{flag} {given[name]} contradicts the run, which has {flag} {value}: leave it out; "
                                 f"what may change is {free}")
            setattr(args, name, value)
        return args

    @contextmanager
    def bad_input_in_one_line(self):
        """The one place where an error raised about bad input becomes a message."""
        from utils import distributed  # imports torch, as the script has by now
        from utils.memory import is_out_of_memory

        with startup.as_exception():
            try:
                yield
            except (OSError, ValueError) as error:
                self.error(describe_error(error), distributed.should_report_error())
            except (RuntimeError, MemoryError) as error:
                if is_out_of_memory(error):
                    message = "memory has run out: close other programs, or take a machine with more"
                elif is_dead_worker(error):
                    message = describe_dead_worker(error)
                elif distributed.is_peer_failure(error):
                    message = distributed.describe_peer_failure(error)
                else:
                    raise
                self.error(message, distributed.should_report_error())
            except KeyboardInterrupt as error:
                number = error.args[0] if error.args else signal.SIGINT
                line = f"\n{self.prog}: interrupted\n" if distributed.should_report_error() else None
                former = signal.signal(signal.SIGINT, signal.SIG_IGN)           # a second one is too late
                try:
                    kill_workers()
                    self.exit(128 + number, line)
                finally:
                    signal.signal(signal.SIGINT, former)
            finally:
                kill_workers()


def kill_workers():
    """Kill the worker processes of DataLoaders, if an error has left any: they ignore SIGTERM."""
    import multiprocessing

    children = [child for child in multiprocessing.active_children() if child.daemon]       # as torch starts them
    if children and hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)       # torch's handler would report their death
    for child in children:
        child.kill()


def is_dead_worker(error):
    """Whether torch's error says that a process of a DataLoader has died."""
    return "DataLoader worker (pid" in str(error)


def describe_dead_worker(error):
    return f"a process that loads images has died, perhaps for lack of memory ({str(error).splitlines()[0].strip()})"


def printable(text):
    """Text, such as a file's name, with control characters as their escape sequences."""
    return "".join(character if character.isprintable() else ascii(character)[1:-1] for character in text)


def describe_error(error):
    """An error's message, without the error number and quotes of a system error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{os.fsdecode(error.filename)}: {error.strerror}" if error.filename else error.strerror
    text = str(error)
    if " in DataLoader worker process " in text:        # the worker's own error is the last line of its traceback
        text = text.strip().splitlines()[-1].partition(": ")[2]
    return text


@contextmanager
def errors_name_flag(flag, value):
    """Begin the message of an error raised inside with the flag and its value."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise ValueError(f"{flag} {value}: {describe_error(error).removeprefix(f'{value}: ')}") from error


def flag_name(name):
    return f"--{name.replace('_', '-')}"


# ---------------------------------------------------------------- training

def add_speed_arguments(group):
    """The flags of both training scripts that make a step faster."""
    group.add_argument("--amp", action="store_true",
                       help="mixed precision: matrix products and convolutions in bfloat16 if the device has units for "
                            "it or, where torch cannot tell, a small step is faster; prints the choice (default: "
                            "float32)")
    group.add_argument("--compile", action="store_true",
                       help="compile the step with torch.compile: takes up to half a minute at the start "
                            "(default: not compiled)")


def add_run_arguments(group, what):
    """The flags of both training scripts for saving and resuming. what: that --overwrite replaces."""
    group.add_argument("--save-every", type=arguments.integer(0), default=0, metavar="STEPS",
                       help="also save a checkpoint every STEPS steps; 0 means only at the end of each epoch "
                            "(default: %(default)s)")
    either = group.add_mutually_exclusive_group()
    either.add_argument("--resume", action="store_true",
                        help="continue an interrupted training, exactly where it was last saved "
                             "(default: start anew)")
    either.add_argument("--overwrite", action="store_true",
                        help=f"replace {what} (default: leave it unchanged and stop)")


# ---------------------------------------------------------------- data

def add_num_workers(group):
    """The flag of every script that reads a data set. None: data.batches() chooses."""
    group.add_argument("--num-workers", type=arguments.integer(0, 256), metavar="N",
                       help="processes that load batches (default: one for each core, at most 8, for an image folder; "
                            "none for data held in memory)")


def add_validation_images(group):
    """The flag of both training scripts for what a model is chosen on."""
    group.add_argument("--validation-images", type=arguments.integer(0), metavar="N",
                       help="training images that are not trained on, on which the best epoch is chosen; 0 means that "
                            "all are trained on, and the last epoch is the best (default: a twelfth, at most 5,000)")


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
    parser.add_argument("--data-folder", type=arguments.file_name, metavar="PATH",
                        help="where the data set is, or is downloaded to once "
                             "(default: that of the model's own image folder, MNIST for the others)")
    add_num_workers(parser)
    parser.add_argument("--hidden-size", "--hidden-size-vae", type=arguments.integer(1), metavar="D",
                        help="size of a latent vector (default: read from the model's file)")
    parser.add_argument("--k", type=arguments.integer(1), metavar="K",
                        help="number of codes (default: read from the model's file)")


def add_sampling_arguments(parser, without):
    """The flags of every script that samples from a prior. without: what happens without --prior."""
    shown = "(default: %(default)s)"
    parser.add_argument("--prior", type=arguments.file_name, metavar="PATH",
                        help=f"checkpoint of train_prior.py (default: {without})")
    parser.add_argument("--temperature", type=arguments.number(minimum=0.01, below=100), default=1.0, metavar="T",
                        help=f"divides the logits; below 1, samples are cleaner and less diverse {shown}")
    parser.add_argument("--top-k", type=arguments.integer(1), metavar="N",
                        help="sample only from the N most probable codes (default: from all)")
    parser.add_argument("--guidance", type=arguments.number(minimum=0, below=100), default=1.0, metavar="G",
                        help=f"classifier-free guidance scale: above 1 the class weighs more, 1 is the prior itself, 0 "
                             f"ignores the class {shown}")


SAMPLING_ARGUMENTS = ("prior", "temperature", "top_k", "guidance")


def sampling_arguments(args):
    """The arguments of CodePrior.sample() that add_sampling_arguments() reads."""
    return {name: getattr(args, name) for name in SAMPLING_ARGUMENTS[1:]}
