"""Progress and tables: rich where it is installed and the output is a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from contextlib import contextmanager


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


@contextmanager
def progress(total: int, what: str):
    """Yields `advance(text)`: one more of `total` is done, `text` says which."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        Progress = None
    if Progress is not None and sys.stderr.isatty():
        from rich.console import Console

        columns = (
            TextColumn(what),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[text]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(what, total=total, text="")
            yield lambda text: bar.update(task, advance=1, text=text)
        return
    done = 0

    def advance(text: str) -> None:
        nonlocal done
        done += 1
        say(f"{what} {done}/{total} {text}")

    yield advance


def table(headers: list[str], rows: list[list[str]]) -> str:
    """Columns aligned on the right but the first two, for output that a log keeps."""
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]

    def line(row):
        cells = [str(cell).ljust(w) if i < 2 else str(cell).rjust(w) for i, (cell, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join([line(headers), line(["-" * w for w in widths]), *map(line, rows)])


def number(value, digits: int = 3) -> str:
    """`.047`, `1.46`, `14.5`; `–` for None."""
    if value is None:
        return "–"
    if isinstance(value, str):
        return value
    if value >= 9.995:
        return f"{value:.1f}"
    text = f"{value:.2f}" if value >= 0.9995 else f"{value:.{digits}f}"
    return text.removeprefix("0") if value < 1 else text
