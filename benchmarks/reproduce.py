"""Measure the figures of the README and of docs/ anew, and compare: python3 benchmarks/reproduce.py [NAME ...]

NAME is a table or a row of --list; without any, all of them run, about 26 hours of one core, 24 without CIFAR-10.
Interrupted, the same command goes on where it was. For each row FOLDER/results/ROW.json has everything that was
measured. Exits with status 1 if a figure differs from that of the documents by more than the tolerance of its kind
(KINDS in result_rows.py), or if a document does not show what docs/results/*.json, the source of its tables, gives.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

if __name__ == "__main__":
    from utils import startup
    startup.prepare()

import argparse
import os

from result_rows import ROWS, kind_of

from utils import arguments, cli


def get_parser():
    parser = cli.Parser(check_arguments, description=__doc__)
    shown = "(default: %(default)s)"
    parser.add_argument("names", nargs="*", type=one_of_the_names, metavar="NAME",
                        help=f"tables: {', '.join(groups())}; or rows, which --list names (default: all)")
    parser.add_argument("--folder", type=Path, default=Path("reproduced"), metavar="PATH",
                        help=f"where everything is written {shown}")
    parser.add_argument("--data-folder", type=Path, default=Path("MNIST"), metavar="PATH",
                        help=f"where the complete MNIST is, or is downloaded to once {shown}")
    parser.add_argument("--cifar10-folder", type=Path, metavar="PATH",
                        help="CIFAR-10 as image files, train/CLASS and test/CLASS (default: none, the rows that need "
                             "it are left out)")
    parser.add_argument("--processes", type=arguments.integer(1), default=len(available_cores()), metavar="N",
                        help="runs at the same time, of one thread each (default: as many as there are cores)")
    parser.add_argument("--list", action="store_true",
                        help="print the rows with their commands and minutes, and run nothing (default: run them)")
    parser.add_argument("--check", action="store_true",
                        help="compare what has been measured before, and run nothing (default: run what is missing)")
    parser.add_argument("--write-tables", action="store_true",
                        help="write the figures of docs/results/*.json into the documents, and run nothing "
                             "(default: only compare)")
    parser.add_argument("--adopt", action="store_true",
                        help="with --write-tables: take what has been measured of the rows into docs/results/*.json "
                             "first (default: leave these files unchanged)")
    return parser


def groups():
    return list(dict.fromkeys(row.group for row in ROWS))


def one_of_the_names(text):
    names = {name.lower(): name for name in (*groups(), *(row.name for row in ROWS))}
    if text.lower() not in names:
        raise argparse.ArgumentTypeError(f"{text!r} is unknown: {arguments.did_you_mean(text, names.values())}"
                                         "--list shows all names")
    return names[text.lower()]


def available_cores():
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def check_arguments(parser, args):
    if args.adopt and not args.write_tables:
        parser.error("--adopt: is used only with --write-tables, add it")
    if args.list + args.check + args.write_tables > 1:
        parser.error("--list, --check and --write-tables: give one of them")
    if os.path.lexists(args.folder) and not os.path.isdir(args.folder):
        parser.error(f"--folder {args.folder}: is not a folder")


if __name__ == "__main__":
    get_parser().parse_args()       # --help and usage errors are answered before torch is imported, which takes seconds

import math

import documents
from run_rows import Record, Run, run_all

from utils import files, inputs
from utils.cost import duration

# ---------------------------------------------------------------- which rows

def chosen_rows(names):
    """The rows of some names, or all, in their order."""
    return [row for row in ROWS if not names or {row.name, row.group} & set(names)]


def with_needed(rows):
    """The rows, and those whose models they need, in their order."""
    needed = {row.name for row in rows} | {name for row in rows for name in row.after}
    return [row for row in ROWS if row.name in needed]


def print_list(rows):
    group = None
    for row in rows:
        if row.group != group:
            group = row.group
            print(f"\n{group}" if row is not rows[0] else group)
        times = f"{len(row.seeds)} × " * (len(row.seeds) > 1)
        print(f"  {row.name:<28}{times + f'{row.minutes} min':>11}  {row.command}")
    minutes = sum(row.minutes * len(row.seeds) for row in rows)
    print(f"\nTogether about {duration(60 * minutes)} of one core.")


# ---------------------------------------------------------------- measuring

def measure(args, rows):
    """Run what has not been measured yet. → {row's name: why it failed}"""
    rows = with_needed(rows)
    if not args.cifar10_folder and (left_out := [row.name for row in rows if row.dataset == "CIFAR-10"]):
        rows = [row for row in rows if row.dataset != "CIFAR-10"]
        print(f"Left out, since they need --cifar10-folder: {'; '.join(left_out)}", file=sys.stderr)
    if any(row.dataset == "CIFAR-10" for row in rows) and not os.path.isdir(args.cifar10_folder):
        raise ValueError(f"--cifar10-folder {args.cifar10_folder}: is not a folder")
    with files.locked_folder(args.folder, "--folder"):
        with cli.errors_name_flag("--folder", args.folder):
            records = {row.name: Record(row, args.folder) for row in rows}
        folders = {"CIFAR-10": args.cifar10_folder}
        runs = [Run(row, seed, args.folder, folders.get(row.dataset) or args.data_folder) for row in rows
                for seed in row.seeds if records[row.name].lacks(seed)]
        if not runs:
            return {}
        seconds = sum(60 * run.row.minutes for run in runs)
        print(f"{len(runs)} run{'s' * (len(runs) > 1)}, about {duration(seconds)} of one core, {args.processes} at a "
              "time. Ctrl-C saves them, and the same command goes on.", flush=True)
        if any(run.row.dataset == "MNIST" for run in runs):         # downloaded once, and not by all at the same time
            inputs.load_data("MNIST", args.data_folder, None)
        return run_all(runs, records, args.processes)


# ---------------------------------------------------------------- comparing

def tolerance_of(row, figure, measured, claimed):
    """By how much a figure may differ from that of the documents; see Kind in result_rows.py."""
    kind = kind_of(figure)
    share, least = kind.rounding if row.given else kind.deviation
    allowed = max(share * abs(claimed["mean"]), least)
    if row.given:
        return allowed
    return 3 * max(allowed, claimed["std"] or 0) * math.sqrt(1 / measured["n"] + 1 / claimed["n"])


def compare(args, rows):
    """Print each figure that has been measured beside that of the documents. → where they differ, as sentences"""
    claims, problems, lines = documents.Figures(ROOT / documents.FOLDER), [], []
    with cli.errors_name_flag("--folder", args.folder):
        records = [Record(row, args.folder) for row in rows if (args.folder / "results" / f"{row.slug}.json").exists()]
    for record in records:
        try:
            record.count_figures()
        except ValueError as error:         # a script no longer writes one of them
            problems.append(f"{record.path}: {error}")
            continue
        for figure, measured in record.contents["figures"].items():
            claimed = claims.of_row(record.row).get(figure)
            lines.append((record.row.name, title_of(figure), text_of(figure, measured), text_of(figure, claimed)))
            if claimed and (problem := difference(record.row, figure, measured, claimed)):
                problems.append(problem)
                lines[-1] += ("differs",)
    if lines:
        print_columns([("row", "figure", "measured", "documents"), *lines])
    else:
        print(f"Nothing has been measured in {args.folder}.")
    return problems


def title_of(figure):
    return " ".join([kind_of(figure).title, *figure.split()[1:]])


def text_of(figure, value):
    return documents.shown(value, f"±{kind_of(figure).form}") if value else "–"


def difference(row, figure, measured, claimed):
    """A sentence if a measured figure differs from that of the documents, or None."""
    allowed = tolerance_of(row, figure, measured, claimed)
    if abs(measured["mean"] - claimed["mean"]) <= allowed:
        return None
    source = documents.BY_NAME.get(row.repeats, row)
    places = documents.places_of(row, figure) or [f"{documents.FOLDER}/{source.slug}.json"]
    limit = documents.shown({"mean": allowed, "std": None}, kind_of(figure).form)
    return (f"{'; '.join(places)}: {title_of(figure)} of {row.name!r} is {text_of(figure, claimed)}, measured "
            f"{text_of(figure, measured)}, and may differ by {limit}")


def print_columns(lines):
    widths = [max(map(len, column)) for column in zip(*(line[:4] for line in lines))]
    for line in lines:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, (*widths, 0))).rstrip())


# ---------------------------------------------------------------- the documents

def adopt(args, rows):
    """Copy the results of rows with figures into docs/results, but not of those that only repeat another.

    Raises ValueError if a row has not been measured with every seed.
    """
    rows = [row for row in rows if row.figures and not row.repeats]
    records = [Record(row, args.folder) for row in rows if (args.folder / "results" / f"{row.slug}.json").exists()]
    for record in records:
        record.count_figures()
    if partial := [record.row.name for record in records if record.contents["runs"] and not record.is_complete()]:
        raise ValueError(f"not all seeds of {partial[0]!r} have been measured")
    complete = [record for record in records if record.is_complete()]
    for record in complete:
        files.write_atomically(ROOT / documents.FOLDER / record.path.name, record.path.read_bytes())
    print(f"{len(complete)} of {len(rows)} rows: their results are now in {documents.FOLDER}")


def write_tables():
    changed = documents.rewritten_documents(ROOT)
    for path, text in changed.items():
        files.write_atomically(path, text.encode())
        print(f"written: {path.relative_to(ROOT)}")
    if not changed:
        print("The documents show what docs/results gives already.")


def run(args):
    rows = chosen_rows(args.names)
    if args.list:
        print_list(rows)
        return
    if args.write_tables:
        if args.adopt:
            with cli.errors_name_flag("--folder", args.folder):
                adopt(args, rows)
        write_tables()
        return
    failed = {} if args.check else measure(args, rows)
    different, stale = compare(args, rows), documents.check_documents(ROOT)
    print("\n".join(["", *different, *stale] if different or stale else [
        "The documents show what docs/results gives, and no figure that was measured differs from it."]))
    if failed:
        name, why = next(iter(failed.items()))
        raise ValueError(f"{len(failed)} of the rows failed; {name!r}: {why}")
    if different or stale:
        raise SystemExit(1)


def main(argv=None):
    parser = get_parser()
    args = parser.parse_args(argv)
    with parser.bad_input_in_one_line():
        run(args)


if __name__ == "__main__":
    main()
