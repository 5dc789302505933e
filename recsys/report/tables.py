"""Tables of runs: for the terminal, for a README, for a paper."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd
from rich import box
from rich.table import Table
from rich.text import Text

from recsys.evaluation import Comparison
from recsys.evaluation.metrics import metric_key
from recsys.evaluation.protocols import PROTOCOLS

COLUMNS = ("hr@10", "ndcg@10", "mrr", "auc")
"""The metrics of a run's own table."""

Format = Literal["markdown", "latex", "csv"]


def interval_text(interval: dict[str, Any] | None) -> str:
    """`value [low–high]`, or a dash where there is none."""
    if interval is None:
        return "–"
    return f"{interval['value']:.4f} [{interval['low']:.4f}–{interval['high']:.4f}]"


def run_tables(
    metrics: dict[str, dict[str, Any]], domains: Sequence[str], protocols: Sequence[str], stage: str = "test"
) -> Iterator[Table]:
    """One run: a table per protocol with a row per domain and one for their mean, with 95 % intervals over users."""
    for protocol in protocols:
        table = _table(f"{stage}, protocol {protocol}, 95 % bootstrap intervals over users")
        table.add_column("domain")
        table.add_column("users", justify="right")
        for metric in COLUMNS:
            table.add_column(metric.upper(), justify="right", overflow="fold")
        present = [d for d in domains if metric_key(stage, d, COLUMNS[0], protocol) in metrics]
        for group in [*present, *(["macro"] if len(present) > 1 else [])]:
            found = [metrics.get(metric_key(stage, group, metric, protocol)) for metric in COLUMNS]
            users = next(interval["n"] for interval in found if interval is not None)
            cells = [group, f"{users:,}", *map(interval_text, found)]
            table.add_row(*map(Text, cells), end_section=group == present[-1])
        yield table


def caveats(final: dict[str, Any]) -> Iterator[str]:
    """What to know before a run's numbers are read: ties and leaks of its split, cold items, repeated targets."""
    split = final["data"]["split"]
    if split["tied_test_share"] is not None:
        yield (
            f"split {split['name']}: {100 * split['tied_test_share']:.1f} % of the test events share their timestamp "
            f"with the event before; {100 * split['later_train_share']:.1f} % of the training events are later than "
            "a test event, on average"
        )
    for domain, counts in final["counts"].items():
        notes = []
        if counts["cold_candidates"]:
            notes.append(
                f"{counts['cold_candidates']:,} of {counts['candidates']:,} items and {counts['cold_targets']:,} of "
                f"{counts['targets']:,} targets were never seen in training"
            )
        if counts["repeated_targets"]:
            notes.append(f"{counts['repeated_targets']:,} targets repeat an item of their history")
        if notes:
            yield f"{domain}: {'; '.join(notes)}"
        for name in final["evaluation"]["protocols"]:
            negatives = PROTOCOLS[name].negatives
            if negatives is not None and counts["candidates"] <= negatives.count:
                yield f"{domain}: {name} takes in all of the {counts['candidates']:,} items, as there are no more"


def comparison_frame(comparisons: Sequence[Comparison]) -> pd.DataFrame:
    """One row per treatment and metric: the difference to the baseline with its interval, effect size and p-values.

    `d_z` is the mean over the standard deviation of the users' differences; beside each p-value, in brackets, what
    Holm's correction over all rows makes of it.
    """
    return pd.DataFrame(
        {
            f"against {c.baseline}": c.treatment,
            "metric": c.key,
            "users": f"{c.difference.n:,}",
            "baseline": f"{c.baseline_value:.4f}",
            "treatment": f"{c.treatment_value:.4f}",
            "difference [95 %]": f"{c.difference.value:+.4f} [{c.difference.low:+.4f}, {c.difference.high:+.4f}]",
            "relative": "–" if c.relative is None else f"{100 * c.relative:+.1f} %",
            "d_z": "–" if c.effect_size is None else f"{c.effect_size:+.3f}",
            "p permutation (Holm)": f"{c.p_permutation:.4f} ({c.p_permutation_holm:.4f})",
            "p Wilcoxon (Holm)": f"{c.p_wilcoxon:.4f} ({c.p_wilcoxon_holm:.4f})",
        }
        for c in comparisons
    )


def results_frame(values: pd.DataFrame, metrics: Sequence[str], protocol: str, stage: str = "test") -> pd.DataFrame:
    """One row per run and one column per metric and domain, as text with intervals; `values` as `results.load` gives.

    Empty where no run has such a number.
    """
    rows = []
    for run, group in values.groupby("run", sort=False):
        about = group.iloc[0]
        cells = {
            f"{metric.upper()} {name}": interval_text(record)
            for name, metric, record in _chosen(group, metrics, protocol, stage)
        }
        if cells:
            what = {"run": run, "seed": str(about["seed"]), "parameters": f"{about['parameters']:,}"}
            rows.append(what | {"time": duration_text(about["seconds"])} | cells)
    return pd.DataFrame(rows).fillna("–")


def seeds_frame(values: pd.DataFrame, metrics: Sequence[str], protocol: str, stage: str = "test") -> pd.DataFrame:
    """One row per experiment: means over its seeds, with the standard deviation between them if there are several."""
    rows = []
    for name, group in values.groupby("arm", sort=False):
        found: dict[str, list[float]] = {}
        for _, run in group.groupby("run", sort=False):
            for domain, metric, record in _chosen(run, metrics, protocol, stage):
                found.setdefault(f"{metric.upper()} {domain}", []).append(record["value"])
        cells = {
            column: f"{np.mean(numbers):.4f}" + (f" ± {np.std(numbers, ddof=1):.4f}" if len(numbers) > 1 else "")
            for column, numbers in found.items()
        }
        if cells:
            seeds = group["seed"].nunique()
            rows.append({"experiment": str(name), "seeds": str(seeds)} | cells)
    return pd.DataFrame(rows).fillna("–")


def duration_text(seconds: float) -> str:
    """`45 s`, `12 min`."""
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _chosen(
    run: pd.DataFrame, metrics: Sequence[str], protocol: str, stage: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Domain (or macro), metric and record of the numbers of one run that a table shows, metric by metric.

    A run on one domain has no macro here: beside runs on several it would be another number under the same name.
    """
    records = {str(record["key"]): record for record in run.to_dict("records")}
    for metric in metrics:
        domains = [
            domain
            for domain in dict.fromkeys(key.split("/")[1] for key in records)
            if domain not in ("macro", "micro") and metric_key(stage, domain, metric, protocol) in records
        ]
        for domain in [*domains, "macro"] if len(domains) > 1 else domains:
            record = records[metric_key(stage, domain, metric, protocol)]
            yield domain, metric, {str(name): value for name, value in record.items()}


def rich_table(frame: pd.DataFrame) -> Table:
    table = _table(None)
    for place, column in enumerate(frame.columns):
        # On a narrow terminal a cell is folded: a name or an interval cut short says nothing.
        table.add_column(Text(str(column)), justify="left" if place == 0 else "right", overflow="fold")
    for row in frame.itertuples(index=False):
        table.add_row(*map(Text, row))  # a plain string would lose its [brackets] to rich's markup
    return table


def render(frame: pd.DataFrame, form: Format) -> str:
    """The table as text of another format."""
    return _WRITERS[form](frame)


def _table(title: str | None) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)


def _markdown(frame: pd.DataFrame) -> str:
    lines = [list(frame.columns), ["---"] * len(frame.columns), *frame.to_numpy().tolist()]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _latex(frame: pd.DataFrame) -> str:
    signs = str.maketrans({"_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "–": "--"})
    head, *body = (
        " & ".join(text.translate(signs) for text in line) + r" \\" for line in [list(frame.columns), *frame.to_numpy()]
    )
    lines = [rf"\begin{{tabular}}{{l{'r' * (frame.shape[1] - 1)}}}", r"\toprule", head, r"\midrule", *body]
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _csv(frame: pd.DataFrame) -> str:
    return str(frame.to_csv(index=False))


_WRITERS: dict[Format, Callable[[pd.DataFrame], str]] = {"markdown": _markdown, "latex": _latex, "csv": _csv}
