"""A prepared dataset in tables that fit a terminal, from its `meta.json` alone."""

from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table


def describe(meta: dict[str, Any]) -> RenderableType:
    """What the dataset is, its domains, what was repaired, its splits, and what ties and time leak into them."""
    parts: list[RenderableType] = [_dataset(meta), _domains(meta), _repairs(meta), _ties(meta), _splits(meta)]
    for difference in meta["published_differences"]:
        parts.append(f"[red]not as published:[/red] {difference}")
    if meta["changed_raw_files"]:
        parts.append("[red]the raw files are not those of the card[/red]")
    return Group(*parts)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for position, column in enumerate(columns):
        table.add_column(column, justify="left" if position == 0 else "right")
    return table


def _dataset(meta: dict[str, Any]) -> Table:
    counts, length = meta["counts"], meta["counts"]["length"]
    table = Table(
        title=f"{escape(meta['title'])} ({meta['dataset']}/{meta['variant']})", title_justify="left", box=box.SIMPLE
    )
    table.show_header = False
    table.add_row("users", f"{counts['users']:,} ({counts['overlapping_users']:,} in two domains or more)")
    table.add_row("items", f"{counts['items']:,}")
    table.add_row("events", f"{counts['events']:,}")
    table.add_row("events per user", f"{length['mean']:.1f} on average, {length['min']:,} to {length['max']:,}")
    table.add_row("time", " to ".join(meta["days"]) if meta["days"] else "order only")
    table.add_row("options", _options(meta["options"]))
    table.add_row("source", escape(meta["source"]))
    table.add_row("licence", escape(meta["licence"]))
    return table


def _options(options: dict[str, Any]) -> str:
    """The options that are on, in one line."""
    return ", ".join(f"{name}: {_plain(value)}" for name, value in options.items() if value is not None)


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(str(part) if name == "name" else f"{name}={part}" for name, part in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)


def _domains(meta: dict[str, Any]) -> Table:
    table = _table("domains", "domain", "users", "items", "events")
    for name, counts in meta["counts"]["domains"].items():
        table.add_row(name, *(f"{counts[key]:,}" for key in ("users", "items", "events")))
    return table


def _repairs(meta: dict[str, Any]) -> Table:
    """What preparation found and took out; what it did not find is left out."""
    table = _table("preparation", "events unless said otherwise", "number")
    for name, number in meta["repairs"].items():
        if number:
            table.add_row(name.replace("_", " "), f"{number:,}")
    return table


def _ties(meta: dict[str, Any]) -> Table:
    table = _table("ties: adjacent events of one user at one time", "", "in the source", "as prepared")
    source, prepared = meta["ties"]["source"], meta["ties"]["prepared"]
    if source is None:
        table.add_row("none: the dataset keeps only an order", "–", "–")
        return table
    table.add_row("share of adjacent pairs", _percent(source["tied_share"]), _percent(prepared["tied_share"]))
    name = "across_domains_share"
    table.add_row("of two domains, share of adjacent pairs", _percent(source[name]), _percent(prepared[name]))
    name = "by_domain_index_share"
    table.add_row("of these, the lower domain first", _percent(source[name]), _percent(prepared[name]))
    return table


def _splits(meta: dict[str, Any]) -> Table:
    """One column per split, at its default options."""
    reports = meta["splits"]
    table = _table("splits", "", *reports)

    def row(label: str, *path: str, share: bool = False) -> None:
        cells = []
        for report in reports.values():
            value: Any = report
            for key in path:
                value = value.get(key) if isinstance(value, dict) else None
            cells.append(_percent(value) if share else "–" if value is None else f"{value:,}")
        table.add_row(label, *cells)

    row("train", "train")
    for part in ("validation", "test"):
        for name in meta["counts"]["domains"]:
            row(f"{part} {name}", part, name)
    row("context only", "context")
    row("users not evaluated", "users_not_evaluated")
    row("test events tied with the one before", "tied_test_share", share=True)
    row("training events later than a test event", "later_train_share", share=True)
    return table


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.1f} %"
