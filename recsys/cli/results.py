"""`recsys results`, `compare`, `replicate`: finished runs as numbers."""

import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.options import Format
from recsys.cli.output import clear_errors, show


def compare(
    runs: Annotated[list[Path], typer.Argument(help="Finished runs; the first is the baseline.", show_default=False)],
    metric: Annotated[
        list[str] | None, typer.Option("--metric", "-m", help="Repeatable. Default: ndcg@10 and hr@10.")
    ] = None,
    domain: Annotated[
        list[str] | None,
        typer.Option("--domain", "-d", help="Only this domain's targets, as for a run on one domain. Repeatable."),
    ] = None,
    format_: Format = "table",
) -> None:
    """Paired tests of runs on the same test targets.

    Runs whose configs differ only in the seed are one arm. Refuses runs whose split, users, targets or
    candidates differ.
    """
    with clear_errors():
        from recsys.evaluation import compare as compare_arms
        from recsys.experiment import Experiment
        from recsys.loading import load_yaml
        from recsys.report.tables import comparison_frame
        from recsys.results import RunError, arms_of, find_runs

        found = find_runs(runs)
        arms = {label: [run.read_ranks() for run in members] for label, members in arms_of(found).items()}
        if len(arms) < 2:
            raise RunError("a comparison needs at least two arms; runs that differ only in their seed are one arm")
        config = load_yaml(found[0].config, Experiment).eval
        try:
            comparisons = compare_arms(arms, config, metric or ["ndcg@10", "hr@10"], domain)
        except ValueError as error:  # a domain that a run has no targets in
            raise RunError(str(error)) from None
        show(comparison_frame(comparisons), format_)


def results(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs, or folders of runs. Default: runs.")] = None,
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Ranking protocol of the numbers.")] = "full",
    metric: Annotated[list[str] | None, typer.Option("--metric", "-m", help="Repeatable. Default: ndcg@10.")] = None,
    by_seed: Annotated[
        bool, typer.Option("--seeds", help="One row per experiment: mean and standard deviation over its seeds.")
    ] = False,
    format_: Format = "table",
) -> None:
    """Many runs as one table, each number with its 95 % interval."""
    with clear_errors():
        from recsys.report.tables import results_frame, seeds_frame
        from recsys.results import RunError, find_runs, load

        found = find_runs(runs or [Path("runs")])
        values = load(found)
        frame = (seeds_frame if by_seed else results_frame)(values, metric or ["ndcg@10"], protocol)
        if frame.empty:
            raise RunError(_what_there_is(values["key"]))
        show(frame, format_)
        unfinished = [run for run in found if run.state != "done"]
        for run in unfinished:
            print(f"left out: {run.path} is {run.state}", file=sys.stderr)


def _what_there_is(keys: Iterable[str]) -> str:
    """The error for a number that no finished run has."""
    metrics, protocols = set(), set()
    for key in keys:
        metric, _, protocol = key.split("/")[2].partition("[")
        metrics.add(metric)
        protocols.add(protocol.rstrip("]") or "full")
    if not metrics:
        return "there is no finished run here; `recsys train` makes runs"
    return (
        f"no finished run here has such a number; there are the metrics {', '.join(sorted(metrics))} under the "
        f"protocols {', '.join(sorted(protocols))} (`recsys evaluate` computes others)"
    )


def replicate(
    runs: Annotated[list[Path] | None, typer.Argument(help="Runs, or folders of runs. Default: runs.")] = None,
    published: Annotated[Path, typer.Option("--published", help="The published numbers, a YAML file.")] = Path(
        "results/published.yaml"
    ),
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write every number and where it comes from as JSON.")
    ] = None,
    format_: Format = "table",
) -> None:
    """Runs beside the numbers that others publish for them: relative difference, spread, seeds, time, hardware."""
    with clear_errors():
        from recsys.loading import load_yaml
        from recsys.report.replication import Published, replication_frame
        from recsys.report.replication import replicate as hold_against
        from recsys.results import find_runs, write_json

        records = hold_against(find_runs(runs or [Path("runs")]), load_yaml(published, Published))
        if output is not None:
            write_json(output, records)
        show(replication_frame(records), format_)
