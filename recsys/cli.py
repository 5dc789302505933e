"""The `recsys` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NoReturn

import typer

if TYPE_CHECKING:
    from pandas import DataFrame
    from rich.console import Console

    from recsys.data.policies import PrepareOptions

app = typer.Typer(
    help="Cross-domain sequential recommendation: train, evaluate and compare on honest ground.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(
    help="Datasets: which there are, how raw files become prepared data, what is in them.", no_args_is_help=True
)
app.add_typer(data_app, name="data")

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


@contextlib.contextmanager
def clear_errors() -> Iterator[None]:
    """What a user can get wrong ends in its one message and exit code 2; a bug keeps its traceback."""
    from recsys.loading import ConfigError

    try:
        yield
    except ConfigError as error:
        _stop(error)
    except Exception as error:
        from recsys.data.schema import DataError
        from recsys.evaluation import IncomparableRuns, NonFiniteScores
        from recsys.evaluation.metrics import UnknownMetric
        from recsys.results import RunError

        if isinstance(error, DataError | RunError | IncomparableRuns | NonFiniteScores | UnknownMetric | OSError):
            _stop(error)
        raise


def _stop(error: Exception) -> NoReturn:
    print(f"error: {error}", file=sys.stderr)
    raise typer.Exit(2) from None


def _show(frame: "DataFrame", form: Literal["table", "markdown", "latex", "csv"]) -> None:
    from recsys.report.tables import render, rich_table

    if form == "table":
        _console().print(rich_table(frame))
    else:
        print(render(frame, form), end="")


def _console() -> "Console":
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=max(console.width, 120))


@app.command()
def train(
    config: Annotated[Path, typer.Option("--config", "-c", help="The experiment, a YAML file.")] = Path(
        "configs/synthetic.yaml"
    ),
    overrides: Overrides = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Show the resolved experiment and its parameters; train nothing.")
    ] = False,
    runs_dir: RunsDir = Path("runs"),
    data_root: DataRoot = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed earlier.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Forget an earlier run of the same config.")] = False,
) -> None:
    """Train and evaluate one experiment: ends in a table, a run directory and a figure.

    The same config on the same data is the same run. Where it is done its numbers are shown, where it was cut off it
    goes on from its last checkpoint.
    """
    with clear_errors():
        from recsys.experiment import Experiment, load_data, parameter_counts
        from recsys.loading import load_yaml

        experiment = load_yaml(config, Experiment, overrides or [])
        if print_config:
            print(experiment.yaml())
            print("# parameters")
            for group, count in parameter_counts(experiment, load_data(experiment.data, data_root).catalog).items():
                print(f"#   {group:<17}{count:>13,}")
            return

        data = load_data(experiment.data, data_root)
        from recsys.report.tables import caveats, run_tables
        from recsys.training.run import train as train_run

        console = _console()
        try:
            run = train_run(experiment, data, runs_dir, console, retry=retry, overwrite=overwrite)
        except KeyboardInterrupt:
            print("stopped; the same command goes on after the last epoch that was finished", file=sys.stderr)
            raise typer.Exit(130) from None
        final = run.read_final()
        for table in run_tables(final["metrics"], final["data"]["domains"], experiment.eval.protocols):
            console.print(table)
        for note in caveats(final):
            console.print(note, highlight=False, style="dim")
        console.print(f"run     {run.path}", highlight=False, soft_wrap=True)
        if run.curve.exists():
            console.print(f"figure  {run.curve}", highlight=False, soft_wrap=True)


@app.command()
def tune(
    config: Annotated[Path, typer.Option("--config", "-c", help="The experiment, a YAML file.", show_default=False)],
    space: Annotated[
        Path,
        typer.Option("--space", help="What to search: keys with choices or ranges, a YAML file.", show_default=False),
    ],
    trials: Annotated[int, typer.Option("--trials", "-n", min=1, help="Budget, failed trials included.")] = 20,
    sampler: Annotated[
        Literal["random", "tpe"], typer.Option(help="Random search, or Optuna's tree-structured Parzen estimator.")
    ] = "random",
    seed: Annotated[int, typer.Option(min=0, help="Of what is tried; the runs keep the experiment's own.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the search. Default: runs/tune/NAME.", show_default=False),
    ] = None,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Search for good values of an experiment's keys, by validation alone; no test target is ranked.

    Every trial is a run and stands in the record, failed ones too. The same command goes on where it was cut off, and
    with a larger budget where it ended.
    """
    with clear_errors():
        from rich.console import Console

        from recsys.experiment import Experiment
        from recsys.loading import load_yaml
        from recsys.sweeps.tune import best, load_space, trials_frame
        from recsys.sweeps.tune import tune as search

        experiment = load_yaml(config, Experiment, overrides or [])
        directory = output or Path("runs/tune") / experiment.name
        console = _console() if format_ == "table" else Console(quiet=True)
        try:
            found = search(
                experiment,
                load_space(space, experiment),
                directory,
                trials=trials,
                sampler=sampler,
                seed=seed,
                data_root=data_root,
                console=console,
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the trial that was cut off", file=sys.stderr)
            raise typer.Exit(130) from None
        _show(trials_frame(found, experiment.trainer.monitor), format_)
        chosen = best(found)
        console.print(
            f"best    {directory / 'best.yaml'}  (trial {chosen.number + 1})", highlight=False, soft_wrap=True
        )
        rest = f"recsys train --config {directory / 'best.yaml'} --runs-dir {directory / 'runs'}"
        console.print(f"test    {rest}", highlight=False, soft_wrap=True)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A finished run directory.", show_default=False)],
    protocol: Protocols = None,
    stage: Annotated[Literal["test", "validation"], typer.Option(help="Which targets.")] = "test",
    options: Annotated[
        list[str] | None,
        typer.Option(
            "--set", "-s", metavar="KEY=VALUE", help="Override a key of the run's eval section, as in ties=optimistic."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Also write the numbers as JSON, and the ranks beside them.")
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Recompute the numbers of a run from its checkpoint, under any protocol. The run stays as it is."""
    with clear_errors():
        import pyarrow.parquet as pq

        from recsys.evaluation import EvalConfig
        from recsys.loading import apply_overrides, parse_config
        from recsys.report.tables import run_tables
        from recsys.results import RunError, atomic, write_json
        from recsys.training.run import choose_device, evaluate_model, open_run, report

        if output is not None and not output.parent.is_dir():
            raise RunError(f"there is no folder {output.parent} to write {output.name} into")
        _, experiment, data, model = open_run(run, data_root)
        values = experiment.eval.model_dump(mode="json") | ({"protocols": protocol} if protocol else {})
        eval_config = parse_config(apply_overrides(values, options or []), EvalConfig, "eval")
        device = choose_device(experiment.trainer)
        evaluation = evaluate_model(model, experiment, data, eval_config, stage, device)
        numbers = report(evaluation, eval_config)
        console = _console()
        for table in run_tables(numbers["metrics"], data.sequences.domain_names, eval_config.protocols, stage):
            console.print(table)
        if output is not None:
            write_json(output, numbers)
            with atomic(output.with_suffix(".ranks.parquet")) as path:
                pq.write_table(evaluation.ranks, path)
            console.print(f"numbers  {output}", highlight=False, soft_wrap=True)


@app.command()
def recommend(
    run: Annotated[Path, typer.Argument(help="A finished run on a dataset.", show_default=False)],
    history: Annotated[str, typer.Option("--history", help="Raw item ids in time order, oldest first: A,B,C.")],
    domain: Annotated[str, typer.Option("--domain", "-d", help="Domain to recommend from.")],
    k: Annotated[int, typer.Option("-k", min=1, help="How many items.")] = 10,
    data_root: DataRoot = None,
) -> None:
    """The items that follow a history, which need not be of any user in the data. Items of the history are left out."""
    with clear_errors():
        from rich.table import Table

        from recsys.training.recommend import recommend_items

        table = Table("rank", "item", "title", "score")
        for rank, (item, title, score) in enumerate(recommend_items(run, history.split(","), domain, k, data_root), 1):
            table.add_row(str(rank), item, title or "–", f"{score:.3f}")
        _console().print(table)


@app.command()
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
        _show(comparison_frame(comparisons), format_)


@app.command()
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
        _show(frame, format_)
        unfinished = [run for run in found if run.state != "done"]
        for run in unfinished:
            print(f"left out: {run.path} is {run.state}", file=sys.stderr)


def _what_there_is(keys: "Iterable[str]") -> str:
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


@app.command()
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
        _show(replication_frame(records), format_)


@data_app.command("list")
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
        _console().print(table)


@data_app.command("prepare")
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
        console = _console()
        console.print(describe(prepared.meta))
        console.print(f"prepared  {prepared.path}", highlight=False, soft_wrap=True)


@data_app.command("describe")
def data_describe(dataset: Dataset, ties: Ties = None, tie_seed: TieSeed = 0, data_root: DataRoot = None) -> None:
    """Counts, splits, ties and leaks of a prepared dataset."""
    with clear_errors():
        from recsys.data.describe import describe
        from recsys.data.prepare import load_prepared

        _, meta = load_prepared(dataset, data_root, _options(dataset, ties, tie_seed, data_root))
        _console().print(describe(meta))


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


if __name__ == "__main__":
    app()
