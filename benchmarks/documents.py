"""The figures in the documents: filled into tables and sentences from docs/results/*.json, compared, rewritten."""

import json
import re
from pathlib import Path

from result_rows import ROWS
from result_tables import SENTENCES, TABLES

FOLDER = "docs/results"         # of the figures that the documents show, a file a row, in the repository
FIELD = re.compile(r"\{([^{}:]+)(?::([^{}:]+):([^{}]*))?\}")
NUMBER = r"\d+(?:[.,]\d+)*(?: %)?(?: ± (?:< )?\d+(?:\.\d+)?(?: %)?)?"
BY_NAME = {row.name: row for row in ROWS}


# ---------------------------------------------------------------- figures

class Figures:
    """The figures of rows, each from ROW.json in a folder: {"mean", "std", "n"}, the std of a single run is None."""

    def __init__(self, folder):
        self.folder, self.contents = Path(folder), {}

    def of_row(self, row):
        """{figure: value} of a row, or of the one that it repeats; empty if it has no file.

        Raises ValueError if the file is damaged.
        """
        return self.read(BY_NAME.get(row.repeats, row))["figures"]

    def read(self, row):
        """The command and the figures in a row's file."""
        if row.name not in self.contents:
            path = self.folder / f"{row.slug}.json"
            try:
                contents = json.loads(path.read_bytes()) if path.exists() else {"command": row.command, "figures": {}}
                self.contents[row.name] = {"command": contents["command"], "figures": {
                    name: {part: value[part] for part in ("mean", "std", "n")}
                    for name, value in contents["figures"].items()}}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path} is damaged: {type(error).__name__}: {error}") from error
        return self.contents[row.name]

    def fill(self, template):
        """A template with its figures and commands. Raises ValueError if a figure is not there."""
        return FIELD.sub(lambda field: self.text_of(*field.groups()), template)

    def text_of(self, name, figure, form):
        row = BY_NAME[name]
        if figure is None:
            return row.command
        if figure not in (figures := self.of_row(row)):
            raise ValueError(f"{FOLDER}/{row.slug}.json has no figure {figure!r}, which the documents show")
        return shown(figures[figure], form)


def shown(figure, form):
    """A figure as text: of form ".4f" the mean, of "±.4f" the mean ± standard deviation; of 97 percent "97 %"."""
    number = form.removeprefix("±")
    text = format(figure["mean"], number)
    if number != form and figure["std"] is not None:
        deviation = format(figure["std"], number)
        if figure["std"] and not re.search("[1-9]", deviation):         # it rounds to 0
            deviation = "< " + re.sub(r"0(%?)$", r"1\1", deviation)
        text += f" ± {deviation}"
    return text.replace("%", " %")


# ---------------------------------------------------------------- tables

def find_table(table, lines):
    """The first and the last line number, from 0, of a table's rows below its header in the lines of its page.

    Raises ValueError if the page has no such table.
    """
    inside = in_code = False
    for number, line in enumerate(lines):
        in_code ^= line.startswith("```")
        if re.match("#+ ", line) and not in_code:
            inside = line.lstrip("#").strip() == table.heading
        if inside and line == table.header:
            first = last = number + 2                       # after the dashes
            while last < len(lines) and lines[last].startswith("|"):
                last += 1
            return first, last
    raise ValueError(f"{table.page}: there is no table \"{table.header}\" under \"{table.heading}\"; result_tables.py "
                     "says where each one is")


def check_table(table, text, figures):
    """Where a table of a page with this text differs from what the figures give, as sentences."""
    lines = text.splitlines()
    first, last = find_table(table, lines)
    expected = [figures.fill(template) for template in table.lines]
    problems = [f"{table.page}, line {number}, table under \"{table.heading}\": it says\n    {found}\n"
                f"  and {FOLDER} gives\n    {line}"
                for number, (found, line) in enumerate(zip(lines[first:last], expected), first + 1) if found != line]
    if last - first != len(expected):
        problems.append(f"{table.page}, line {first + 1}, table under \"{table.heading}\": it has {last - first} rows, "
                        f"and result_tables.py {len(expected)}")
    return problems


def rewrite_table(table, text, figures):
    """The text of a page with the table as the figures give it."""
    lines = text.splitlines()
    first, last = find_table(table, lines)
    lines[first:last] = [figures.fill(template) for template in table.lines]
    return "\n".join(lines) + "\n"


# ---------------------------------------------------------------- sentences

def find_sentence(sentence, text):
    """The match of a sentence in the text of its page, a group for each figure. Raises ValueError unless it is one."""
    parts = FIELD.sub("\0", sentence.text).split("\0")
    literal = [r"\s+".join(map(re.escape, re.split(r"\s+", part))) for part in parts]
    matches = list(re.finditer(f"({NUMBER})".join(literal), text))
    if len(matches) != 1:
        raise ValueError(f"{sentence.page}: {len(matches)} sentences are \"{sentence.text}\", and result_tables.py has "
                         "one")
    return matches[0]


def expected_numbers(sentence, figures):
    return [figures.text_of(*field.groups()) for field in FIELD.finditer(sentence.text)]


def check_sentence(sentence, text, figures):
    """Where a sentence differs from what the figures give, as sentences."""
    match = find_sentence(sentence, text)
    line = text.count("\n", 0, match.start()) + 1
    return [f"{sentence.page}, line {line}, \"{' '.join(match[0].split())}\": it says {found}, and {FOLDER} gives "
            f"{expected}" for found, expected in zip(match.groups(), expected_numbers(sentence, figures))
            if found != expected]


def rewrite_sentence(sentence, text, figures):
    """The text of a page with the figures in a sentence as they are given; it stays wrapped as it was."""
    match = find_sentence(sentence, text)
    for group, expected in reversed(list(enumerate(expected_numbers(sentence, figures), 1))):
        text = text[:match.start(group)] + expected + text[match.end(group):]
    return text


# ---------------------------------------------------------------- everything

def check_documents(folder):
    """Where the documents in a copy of the repository differ from its docs/results/*.json, as sentences.

    And which of these files hold the figures of a command that their row no longer has.
    """
    figures = Figures(Path(folder, FOLDER))
    problems = [f"{FOLDER}/{row.slug}.json has the figures of another command, {command}: measure {row.name!r} anew"
                for row in ROWS if (command := figures.read(row)["command"]) != row.command]
    for check, parts in ((check_table, TABLES), (check_sentence, SENTENCES)):
        for part in parts:
            try:
                problems += check(part, Path(folder, part.page).read_text("utf-8"), figures)
            except ValueError as error:
                problems.append(str(error))
    return problems


def rewritten_documents(folder):
    """{path: text} of the documents that have to change for the figures of docs/results/*.json.

    Raises ValueError if a figure, a table or a sentence is missing.
    """
    figures, texts = Figures(Path(folder, FOLDER)), {}
    for rewrite, parts in ((rewrite_table, TABLES), (rewrite_sentence, SENTENCES)):
        for part in parts:
            path = Path(folder, part.page)
            texts[path] = rewrite(part, texts.get(path) or path.read_text("utf-8"), figures)
    return {path: text for path, text in texts.items() if text != path.read_text("utf-8")}


def places_of(row, figure):
    """Where the documents show a figure of a row: "FILE, table under HEADING" or "FILE, in the text", each once."""
    shows = f"{{{row.repeats or row.name}:{figure}:"
    places = [f"{table.page}, table under \"{table.heading}\"" for table in TABLES if shows in "".join(table.lines)]
    places += [f"{sentence.page}, in the text" for sentence in SENTENCES if shows in sentence.text]
    return list(dict.fromkeys(places))
