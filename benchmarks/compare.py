"""Compare runs of VQ-VAE.py: python3 benchmarks/compare.py models/NAME models/NAME ... [--csv FILE]

Prints a table: the settings in which the runs differ, the best and the last epoch's figures, and those of a prior that
was trained beside the model. Runs that differ only in --seed are one row, with mean ± standard deviation.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, default=[Path("models")], metavar="FOLDER",
                        help="folders of runs, models/NAME or logs/NAME, or folders that hold such (default: models)")
    parser.add_argument("--csv", type=arguments.file_name, metavar="FILE",
                        help="also write the table to this file, as CSV; its folders are created (default: none)")
    parser.add_argument("--overwrite", action="store_true",
                        help="replace such a file at --csv (default: leave it unchanged and stop)")
    return parser


def check_arguments(parser, args):
    if not args.csv:
        parser.check_unused(args, ("overwrite",), "is used only with --csv, add it")


import csv
import io
import json
import math
import os
import statistics
from contextlib import suppress
from typing import NamedTuple

TRACK, PRIOR_TRACK, ARGUMENTS = "track.txt", "prior-track.txt", "args.json"
# Settings that no figure depends on. Of amp, bfloat16 says what was done.
LEFT_OUT = {"num_workers", "output_folder", "overwrite", "resume", "save_every", "keep_every", "compile", "amp",
            "environments"}
# The columns by which a best epoch is chosen, the first one that a track has, and the figures shown of an epoch.
CHOSEN_BY = "val_recon", "test_recon"
SHOWN = "val_recon", "test_recon", "perplexity", "used"
PRIOR_CHOSEN_BY = "val_nats", "test_nats"
FORMER_COLUMN = "bits_per_pixel"            # of the tracks of priors from before there were validation images
FORMATS = {"val_recon": ".5f", "test_recon": ".5f", "perplexity": ".1f", "test_nats": ".4f"}      # others as integers


# ---------------------------------------------------------------- tracks

def read_track(path):
    """The lines of a text track, each as {column: number}; one that is no number, as "-", is None.

    Raises ValueError if it is not a track.
    """
    try:
        header, *lines = Path(path).read_text("utf-8").splitlines() or [""]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not a track: it is not text") from error
    columns, rows = header.split(), []
    for line in lines:
        values = line.split()
        if len(values) != len(columns):
            raise ValueError(f"{path}: a line has {len(values)} values, for {len(columns)} columns")
        rows.append({column: as_number(value) for column, value in zip(columns, values)})
    if not columns or columns[0] != "epoch":
        raise ValueError(f"{path} is not a track: its first line does not begin with epoch")
    return rows


def as_number(text):
    """An int or a finite float, or None for any other text."""
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text) if math.isfinite(float(text)) else None
    return None


def mean_and_deviation(values):
    """{"mean", "std", "n"} of numbers: std is the standard deviation of a sample, over n − 1; None of a single one."""
    return {"mean": statistics.mean(values), "std": statistics.stdev(values) if len(values) > 1 else None,
            "n": len(values)}


def best_epoch(rows, chosen_by):
    """The row with the lowest figure in the first of these columns that the track has; without figures the last row."""
    column = next((column for column in chosen_by if column in rows[0]), None)
    measured = [row for row in rows if row.get(column) is not None]
    return min(measured, key=lambda row: row[column]) if measured else rows[-1]


# ---------------------------------------------------------------- runs

class Run(NamedTuple):
    """One training."""

    name: str
    settings: dict
    track: list
    prior_track: list           # empty if there is none


def folders_of_runs(folder):
    """The folder itself if it holds a run, else those of its sub-folders that do. logs/… stands for models/….

    Raises ValueError if there is none.
    """
    folder = Path(folder)
    parts = Path(os.path.realpath(folder)).parts
    beside = []
    if "logs" in parts:
        at = len(parts) - 1 - parts[::-1].index("logs")
        beside = [Path(*parts[:at], "models", *parts[at + 1:])]
    for path in (folder, *beside):
        if (path / ARGUMENTS).is_file() and (path / TRACK).is_file():
            return [path.resolve()]
    found = [path.parent.resolve() for part in (folder, *beside) for path in sorted(part.rglob(ARGUMENTS))
             if (path.parent / TRACK).is_file()]
    if not found:
        raise ValueError(f"{folder}: there is no run of VQ-VAE.py in it, with {ARGUMENTS} and {TRACK}")
    return found


def read_run(folder):
    """A run from its folder. Raises ValueError if a file is damaged."""
    try:
        settings = json.loads((folder / ARGUMENTS).read_bytes())
        name = str(settings["output_folder"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{folder / ARGUMENTS} is damaged: {type(error).__name__}: {error}") from error
    settings = {key: value for key, value in settings.items() if key not in LEFT_OUT}
    if settings.get("dataset") != "folder":
        settings.pop("data_folder", None)           # the same data wherever they are
    prior = folder / PRIOR_TRACK
    return Run(name, settings, read_track(folder / TRACK), read_track(prior) if prior.is_file() else [])


def figures_of(run):
    """{title: number} of a run: of the best and of the last epoch, and of its prior."""
    last = run.track[-1]
    best = last if run.settings.get("validation_images") == 0 else best_epoch(run.track, CHOSEN_BY)
    figures = {"best epoch": best["epoch"], **{f"best {name}": best.get(name) for name in SHOWN},
               **{name: last.get(name) for name in SHOWN},
               "seconds": sum(row.get("seconds") or 0 for row in run.track)}
    if run.prior_track:
        # Without validation images the last epoch is kept, except in runs of earlier versions.
        chosen = "val_nats" in run.prior_track[0] or FORMER_COLUMN in run.prior_track[0]
        best = best_epoch(run.prior_track, PRIOR_CHOSEN_BY) if chosen else run.prior_track[-1]
        figures |= {"prior's best epoch": best["epoch"], "prior's test_nats": best.get("test_nats")}
    return {title: value for title, value in figures.items() if value is not None}


def group_runs(runs):
    """[[run, …], …]: in a group the runs differ only in their seeds, and are of the same length."""
    groups = {}
    for run in runs:
        key = json.dumps({**run.settings, "seed": None, "epoch": run.track[-1]["epoch"]}, sort_keys=True)
        again = 0
        while any(run.settings.get("seed") == other.settings.get("seed") for other in groups.get((key, again), ())):
            again += 1              # the same seed once more is no further sample
        groups.setdefault((key, again), []).append(run)
    return list(groups.values())


# ---------------------------------------------------------------- the table

class Line(NamedTuple):
    """A row of the table: one run, or several that differ only in their seeds."""

    names: str
    seeds: str
    settings: dict              # those that differ between the runs
    epoch: int                  # the last one
    figures: dict               # {title: {"mean", "std", "n"}}


def table_lines(runs):
    """The Lines of runs, in their order."""
    names = dict.fromkeys(name for run in runs for name in run.settings if name != "seed")
    differing = [name for name in names if len({json.dumps(run.settings.get(name)) for run in runs}) > 1]
    lines = []
    for group in group_runs(runs):
        each = [figures_of(run) for run in group]
        titles = [title for title in each[0] if all(title in figures for figures in each)]
        lines.append(Line(", ".join(run.name for run in group),
                          ", ".join(str(run.settings.get("seed")) for run in group),
                          {name: group[0].settings.get(name) for name in differing}, group[0].track[-1]["epoch"],
                          {title: mean_and_deviation([figures[title] for figures in each]) for title in titles}))
    return lines


def titles_of(lines):
    return list(dict.fromkeys(title for line in lines for title in line.figures))


def text_of(title, figure):
    """A figure as a cell of the table."""
    if figure is None:
        return "–"
    form = FORMATS.get(title.split()[-1], ".0f")
    deviation = "" if figure["std"] is None else f" ± {figure['std']:{form}}"
    return f"{figure['mean']:{form}}{deviation}"


def as_markdown(lines):
    titles = titles_of(lines)
    header = ["run", "seed", *(cli.flag_name(name) for name in lines[0].settings), "epochs", *titles]
    rows = [[line.names, line.seeds, *map(str, line.settings.values()), str(line.epoch),
             *(text_of(title, line.figures.get(title)) for title in titles)] for line in lines]
    cells = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def as_csv(lines):
    """The table as CSV: of each figure the mean, and where there are several seeds the standard deviation."""
    titles, output = titles_of(lines), io.StringIO()
    writer = csv.writer(output, lineterminator="\n")
    writer.writerow(["run", "seed", *lines[0].settings, "epochs", *(
        column for title in titles for column in (title, f"{title}, standard deviation"))])
    for line in lines:
        figures = [line.figures.get(title, {"mean": None, "std": None}) for title in titles]
        writer.writerow([line.names, line.seeds, *line.settings.values(), line.epoch,
                         *(value for figure in figures for value in (figure["mean"], figure["std"]))])
    return output.getvalue()


def is_comparison(path):
    """Whether the file at path is one that --csv has written."""
    with open(path, "rb") as file:
        return file.read(9) == b"run,seed,"


def run(args):
    from utils import files

    if args.csv:
        output = files.OutputFile(Path(args.csv), args.overwrite, "a table of runs", is_comparison)
        with cli.errors_name_flag("--csv", output.path):
            output.check()
    folders = dict.fromkeys(path for folder in args.folders for path in folders_of_runs(folder))
    runs = [read_run(path) for path in folders]
    if unfinished := [run.name for run in runs if not run.track]:
        print(f"Left out, before the end of their first epoch: {', '.join(unfinished)}", file=sys.stderr)
    runs = [run for run in runs if run.track]
    if not runs:
        raise ValueError("none of the runs has finished an epoch")
    lines = table_lines(runs)
    print(as_markdown(lines))
    if args.csv:
        with cli.errors_name_flag("--csv", output.path):
            output.write(as_csv(lines).encode())


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
