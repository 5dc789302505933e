"""`recsys data`: which datasets there are, how raw files become prepared data, what is in them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recsys.cli.options import DataRoot, Dataset, Ties, TieSeed
from recsys.cli.output import clear_errors, console

if TYPE_CHECKING:
    from recsys.data.policies import PrepareOptions

app = typer.Typer(
    help="Datasets: which there are, how raw files become prepared data, what is in them.", no_args_is_help=True
)


@app.command("list")
def data_list(data_root: DataRoot = None) -> None:
    """The datasets that have a card, and what of them is here."""
    with clear_errors():
        from rich.table import Table

        from recsys.data.prepare import list_datasets

        table = Table("dataset", "title", "domains", "raw files", "prepared")
        for status in list_datasets(data_root):
            names = status.card.prepare.domains or status.card.domains
            domains = ", ".join(names[:5]) + (f", … ({len(names)})" if len(names) > 5 else "")
            prepared = ", ".join(path.name for path in status.prepared) or "–"
            table.add_row(status.card.name, status.card.title, domains, str(status.raw or "–"), prepared)
        console().print(table)


@app.command("prepare")
def data_prepare(
    dataset: Dataset,
    raw: Annotated[
        Path | None, typer.Option(help="Folder of the raw files. Default: looked for in the data root.")
    ] = None,
    ties: Ties = None,
    tie_seed: TieSeed = 0,
    force: Annotated[bool, typer.Option("--force", help="Prepare again what is there already.")] = False,
    allow_changed_raw: Annotated[
        bool, typer.Option("--allow-changed-raw", help="Take raw files that are not those of the card.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """From raw files to events, items, users, packed sequences and a report of what is in them."""
    with clear_errors():
        from recsys.data.describe import describe
        from recsys.data.prepare import prepare

        options = _options(dataset, ties, tie_seed, data_root)
        prepared = prepare(dataset, data_root, raw, options, force=force, allow_changed_raw=allow_changed_raw)
        screen = console()
        screen.print(describe(prepared.meta))
        screen.print(f"prepared  {prepared.path}", highlight=False, soft_wrap=True)


@app.command("describe")
def data_describe(dataset: Dataset, ties: Ties = None, tie_seed: TieSeed = 0, data_root: DataRoot = None) -> None:
    """Counts, splits, ties and leaks of a prepared dataset."""
    with clear_errors():
        from recsys.data.describe import describe
        from recsys.data.prepare import load_prepared

        _, meta = load_prepared(dataset, data_root, _options(dataset, ties, tie_seed, data_root))
        console().print(describe(meta))


def _options(dataset: str, ties: str | None, tie_seed: int, data_root: Path | None) -> "PrepareOptions | None":
    """The card's own preparation with another tie policy, or None to keep it."""
    if ties is None:
        return None
    from recsys.data.cards import load_card
    from recsys.data.locate import resolve_data_root
    from recsys.data.policies import PrepareOptions
    from recsys.loading import parse_config

    values = load_card(dataset, resolve_data_root(data_root)).prepare.model_dump(mode="json")
    return parse_config(values | {"ties": ties, "tie_seed": tie_seed}, PrepareOptions, "--ties")
