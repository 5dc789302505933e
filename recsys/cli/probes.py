"""`recsys probe`, `intervene`, `correlate`: what the exchange of a run adds, and whether that matters."""

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from recsys.cli.options import DataRoot, Format
from recsys.cli.output import clear_errors, console, show

Run = Annotated[Path, typer.Argument(help="A finished run of a model with an exchange.", show_default=False)]


def probe(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Finished runs of models with an exchange, or folders of runs.", show_default=False),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="How to measure, as in queries=all. Repeatable."),
    ] = None,
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Measure every cross-attention of a run against chance, as it started and as validation picked it.

    Writes probes.parquet and its figures into the run. An alignment ratio of 1 is no more than chance. For a claim
    about new information take the excess over the control: the raw shares are high for an untrained model, too. Of
    several runs, those without an exchange are passed over.
    """
    with clear_errors():
        from recsys.loading import apply_overrides, parse_config
        from recsys.probes import ProbeConfig
        from recsys.report.probe_figures import draw_cosines, draw_energy, draw_trajectory
        from recsys.report.probes import alignment_frame, contribution_frame
        from recsys.results import finished_runs
        from recsys.training.instruments import NoExchange, probe_run

        config = parse_config(apply_overrides({}, options or []), ProbeConfig, "--set")
        found = [run.path for run in finished_runs(runs)]
        for path in found:
            try:
                directory, table = probe_run(path, data_root, config)
            except NoExchange as error:
                if len(found) == 1:
                    raise
                print(f"passed over: {error}", file=sys.stderr)
                continue
            figures = {"cosines": draw_cosines, "energy": draw_energy, "alignment": draw_trajectory}
            for name, draw in figures.items():
                draw(table, directory.path / f"{name}.png")
            show(alignment_frame(table), format_)
            show(contribution_frame(table), format_)
            if format_ == "table":
                screen = console()
                screen.print(f"numbers  {directory.probes}", highlight=False, soft_wrap=True)
                for name in figures:
                    screen.print(f"figure   {directory.path / name}.png", highlight=False, soft_wrap=True)
        if format_ == "table":
            console().print(
                "alignment ratio 1 is chance; isotropic, covariance and at start are the same ratio by other chances",
                style="dim",
                highlight=False,
            )


def intervene(
    run: Run,
    stage: Annotated[Literal["test", "validation"], typer.Option(help="Which targets.")] = "test",
    protocol: Annotated[str, typer.Option("--protocol", "-p", help="Ranking protocol.")] = "full",
    metric: Annotated[str, typer.Option("--metric", "-m", help="As in ndcg@10.")] = "ndcg@10",
    draws: Annotated[int, typer.Option(min=1, help="Repetitions of what is random.")] = 5,
    by_unit: Annotated[bool, typer.Option("--by-unit", help="Also in each unit alone.")] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of what is random.")] = 0,
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Rank again with another update in place of the cross-attentions' own: a part of it, none, somebody else's.

    Writes interventions.parquet and its figure into the run. Read a change beside the energy that was changed: by
    chance alone 1 - 1/d of the update's energy is orthogonal to its query.
    """
    with clear_errors():
        from rich.console import Console

        from recsys.evaluation.protocols import PROTOCOLS
        from recsys.report.probe_figures import draw_interventions
        from recsys.report.probes import intervention_frame
        from recsys.results import RunError
        from recsys.training.instruments import intervene_run

        if protocol not in PROTOCOLS:
            raise RunError(f"there is no protocol {protocol!r}; one of {', '.join(PROTOCOLS)}")
        screen = console() if format_ == "table" else Console(quiet=True)
        directory, table = intervene_run(
            run,
            data_root,
            screen,
            stage=stage,
            protocol=protocol,
            metric=metric,
            draws=draws,
            by_unit=by_unit,
            seed=seed,
        )
        show(intervention_frame(table), format_)
        figure = directory.path / "interventions.png"
        draw_interventions(table, figure)
        screen.print(f"numbers  {directory.interventions}", highlight=False, soft_wrap=True)
        screen.print(f"figure   {figure}", highlight=False, soft_wrap=True)


def correlate(
    runs: Annotated[
        list[Path], typer.Argument(help="Probed runs, or folders of them; one point each.", show_default=False)
    ],
    metric: Annotated[str, typer.Option("--metric", "-m", help="Key of final.json.")] = "test/macro/ndcg@10",
    figure: Annotated[
        Path | None, typer.Option("--figure", help="Also draw the points, as PNG or PDF.", show_default=False)
    ] = None,
    points_file: Annotated[
        Path | None, typer.Option("--points", help="Also write the points, as CSV.", show_default=False)
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Bootstrap samples and permutations.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of both.")] = 0,
    format_: Format = "table",
) -> None:
    """Do runs that are more aligned than others rank worse? Pooled over runs and within cells, side by side.

    Only what holds within cells, among runs that differ in nothing but their seed, can be a link: sizes move both.
    """
    with clear_errors():
        from recsys.probes.correlate import centre_in_cells, mixed_model
        from recsys.probes.correlate import correlate as correlations
        from recsys.report.probe_figures import draw_correlation
        from recsys.report.probes import correlation_frame, run_points
        from recsys.results import atomic, finished_runs

        found = finished_runs(runs)
        probed = [run for run in found if run.probes.exists() or run.path in runs]
        if len(probed) < len(found):
            print(f"passed over: {len(found) - len(probed)} runs that are not probed", file=sys.stderr)
        points = run_points(probed, metric)
        if points_file is not None:
            with atomic(points_file) as path:
                points.to_csv(path, index=False, lineterminator="\n")
        table = correlations(points, samples, seed)
        shown = correlation_frame(table)
        show(shown, format_)
        screen = console()
        if format_ == "table" and points["dataset"].nunique() > 1:
            model = mixed_model(points)
            screen.print(
                f"mixed model, slope in spreads within cells: {model['slope']:+.3f} ± {model['error']:.3f}, "
                f"p = {model['p']:.3f}",
                highlight=False,
            )
        if figure is not None:
            spearman = shown[shown["statistic"] == "spearman"].iloc[-1]
            draw_correlation(
                centre_in_cells(points),
                figure,
                metric,
                f"pooled: Spearman {spearman['pooled [95 %]']}",
                f"within cells: Spearman {spearman['within cells [95 %]']}",
            )
            print(f"figure  {figure}", file=sys.stderr)
