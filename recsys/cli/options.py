"""Options that several commands take."""

from pathlib import Path
from typing import Annotated, Literal

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="KEY=VALUE", help="Override a key, as in model.d_model=128. Repeatable."),
]
DataRoot = Annotated[
    Path | None,
    typer.Option("--data-root", envvar="RECSYS_DATA", help="Folder of cards/, raw/ and processed/. Default: data."),
]
RunsDir = Annotated[Path, typer.Option("--runs-dir", help="Folder of the run directories.")]
Dataset = Annotated[str, typer.Argument(help="Name of a dataset, as `recsys data list` shows it.", show_default=False)]
Protocols = Annotated[
    list[str] | None,
    typer.Option("--protocol", "-p", help="full, all, abxi_999, c2dsr_999, uni_100, pop_100, … Repeatable."),
]
Ties = Annotated[
    str | None,
    typer.Option(help="Order of a user's events with one timestamp: file_order, seeded_random, domain_random, drop."),
]
Format = Annotated[Literal["table", "markdown", "latex", "csv"], typer.Option("--format", "-f")]
TieSeed = Annotated[int, typer.Option(help="Seed of the random tie policies.")]
