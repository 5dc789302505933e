"""`recsys train`, `tune`, `evaluate`, `recommend`: from an experiment to a run, and from a run back to its model."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys.cli.options import DataRoot, Format, Overrides, Protocols, RunsDir
from recsys.cli.output import clear_errors, console, show


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

        screen = console()
        try:
            run = train_run(experiment, data, runs_dir, screen, retry=retry, overwrite=overwrite)
        except KeyboardInterrupt:
            print("stopped; the same command goes on after the last epoch that was finished", file=sys.stderr)
            raise typer.Exit(130) from None
        final = run.read_final()
        for table in run_tables(final["metrics"], final["data"]["domains"], experiment.eval.protocols):
            screen.print(table)
        for note in caveats(final):
            screen.print(note, highlight=False, style="dim")
        screen.print(f"run     {run.path}", highlight=False, soft_wrap=True)
        if run.curve.exists():
            screen.print(f"figure  {run.curve}", highlight=False, soft_wrap=True)


def estimate(
    config: Annotated[Path, typer.Option("--config", "-c", help="The experiment, a YAML file.")] = Path(
        "configs/synthetic.yaml"
    ),
    overrides: Overrides = None,
    data_root: DataRoot = None,
) -> None:
    """What a run will cost here, from a few of its steps: time, memory, parameters. Trains and writes nothing."""
    with clear_errors():
        from pandas import DataFrame

        from recsys.experiment import Experiment, load_data, parameter_counts
        from recsys.loading import load_yaml
        from recsys.report.tables import duration_text
        from recsys.sweeps.estimate import estimate as measure

        experiment = load_yaml(config, Experiment, overrides or [])
        data = load_data(experiment.data, data_root)
        found = measure(experiment, data)
        speed = found.speed
        assert speed.peak_bytes is not None
        rows = {
            "parameters": f"{parameter_counts(experiment, data.catalog)['total']:,}",
            "step": f"{1000 * speed.seconds_per_step:,.0f} ms, {speed.examples_per_second:,.0f} users/s",
            "memory of a step's tensors": f"{speed.peak_bytes / 2**20:,.0f} MiB",
            "epoch, with its validation": duration_text(speed.seconds_per_epoch),
            "epochs": f"{found.epochs}" + (", or fewer" if experiment.trainer.patience is not None else ""),
            "test, all protocols": duration_text(found.seconds_to_evaluate),
            "whole run": duration_text(found.seconds),
        }
        screen = console()
        screen.print(f"{experiment.name}, from {found.steps} steps here and now", highlight=False)
        show(DataFrame({"cost": rows.keys(), "estimate": rows.values()}), "table")


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
        screen = console() if format_ == "table" else Console(quiet=True)
        try:
            found = search(
                experiment,
                load_space(space, experiment),
                directory,
                trials=trials,
                sampler=sampler,
                seed=seed,
                data_root=data_root,
                console=screen,
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on with the trial that was cut off", file=sys.stderr)
            raise typer.Exit(130) from None
        show(trials_frame(found, experiment.trainer.monitor), format_)
        chosen = best(found)
        screen.print(f"best    {directory / 'best.yaml'}  (trial {chosen.number + 1})", highlight=False, soft_wrap=True)
        rest = f"recsys train --config {directory / 'best.yaml'} --runs-dir {directory / 'runs'}"
        screen.print(f"test    {rest}", highlight=False, soft_wrap=True)


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
        screen = console()
        for table in run_tables(numbers["metrics"], data.sequences.domain_names, eval_config.protocols, stage):
            screen.print(table)
        if output is not None:
            write_json(output, numbers)
            with atomic(output.with_suffix(".ranks.parquet")) as path:
                pq.write_table(evaluation.ranks, path)
            screen.print(f"numbers  {output}", highlight=False, soft_wrap=True)


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
        console().print(table)
