"""What commands say: tables, and one clear error."""

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

import typer

from recsys.errors import UserError

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can get wrong ends in its one message and exit code 2; a bug keeps its traceback."""
    try:
        yield
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


def show(frame: "DataFrame", form: Literal["table", "markdown", "latex", "csv"]) -> None:
    from recsys.report.tables import render, rich_table

    if form == "table":
        console().print(rich_table(frame))
    else:
        print(render(frame, form), end="")


def console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))
