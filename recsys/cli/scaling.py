"""`recsys sweep`, `match`, `laws`, `report`: scaling studies."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from recsys.cli.options import DataRoot, Format, Overrides
from recsys.cli.output import clear_errors, console, show

if TYPE_CHECKING:
    from recsys.scaling.records import Response
    from recsys.scaling.surface import SurfaceForm


def sweep(
    config: Annotated[Path, typer.Argument(help="The sweep, a YAML file.", show_default=False)],
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show all cells with parameters, gaps and an estimate of time; run none.")
    ] = False,
    shard: Annotated[
        str, typer.Option("--shard", metavar="I/N", help="Only every N-th cell, from the I-th on (1/2 and 2/2).")
    ] = "1/1",
    budget_minutes: Annotated[
        float | None, typer.Option("--budget-minutes", min=0, help="Begin no run after so many minutes.")
    ] = None,
    retry: Annotated[bool, typer.Option("--retry", help="Run again what failed earlier.")] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the sweep. Default: runs/sweeps/NAME.", show_default=False),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Every arm at every size with every seed, the same number of learning rates for each; ends in one table.

    What is done is skipped, what was cut off goes on, what failed keeps its traceback and has no number. Stop it at
    any moment and start it again: the table is the same. `--set executor={name: ray, workers: 8}` runs it on Ray.
    """
    with clear_errors():
        from recsys.sweeps.execute import run_sweep
        from recsys.sweeps.plan import load_sweep, make_plan
        from recsys.sweeps.progress import estimate_frame, watching

        which = _shard(shard)
        loaded, base = load_sweep(config, overrides or [])
        plan = make_plan(loaded, base, data_root)
        screen = console()
        if dry_run:
            frame, seconds = estimate_frame(plan, plan.cells[which[0] - 1 :: which[1]], data_root)
            show(frame, "table")
            screen.print(f"about {seconds / 60:.0f} minutes, one run after another", highlight=False)
            return
        directory = output or Path("runs/sweeps") / loaded.name
        try:
            table = watching(
                screen,
                lambda watch: run_sweep(
                    plan,
                    directory,
                    data_root=data_root,
                    shard=which,
                    budget_minutes=budget_minutes,
                    retry=retry,
                    watch=watch,
                ),
            )
        except KeyboardInterrupt:
            print("stopped; the same command goes on where it was", file=sys.stderr)
            raise typer.Exit(130) from None
        counts = table["state"].value_counts(sort=False)
        print("runs    " + ", ".join(f"{count} {state}" for state, count in counts.items()))
        screen.print(f"table   {directory / 'table.csv'}", highlight=False, soft_wrap=True)
        screen.print(f"next    recsys laws {directory}", highlight=False, soft_wrap=True)


def match(
    config: Annotated[Path, typer.Option("--config", "-c", help="The treatment, a YAML file.", show_default=False)],
    controls: Annotated[
        list[str] | None,
        typer.Option(
            "--control",
            help="wide_ffn, deeper, wider, self_attention, shuffled_context, table_wider. Repeatable. Default: all.",
            show_default=False,
        ),
    ] = None,
    baseline: Annotated[
        Path | None,
        typer.Option(help="What is brought to the treatment's size. Default: the treatment without its exchange."),
    ] = None,
    basis: Annotated[
        Literal["dense", "total", "active", "flops"], typer.Option(help="What is to be equal. Dense first.")
    ] = "dense",
    tolerance: Annotated[float, typer.Option(min=0, help="Largest relative gap.")] = 0.005,
    speed: Annotated[
        bool, typer.Option("--speed/--no-speed", help="Time a few steps of each, and measure their memory.")
    ] = True,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the configs of the controls.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Controls of a treatment's size: a config for each, and a table that shows how equal they are.

    Each control rules out another explanation: more parameters elsewhere (wide_ffn, deeper, wider), attention without
    the other domain (self_attention), the exchange without information (shuffled_context), and the published way
    (table_wider), which puts most of them into the item table. What comes within the tolerance of nothing is refused,
    with the two nearest.
    """
    with clear_errors():
        from recsys.experiment import Experiment, load_data
        from recsys.loading import load_yaml
        from recsys.results import write_text
        from recsys.scaling.match import CONTROLS, control_named
        from recsys.sweeps.pairs import changes, make_pairs, pairs_frame

        treatment = load_yaml(config, Experiment, overrides or [])
        pairs = make_pairs(
            treatment,
            [control_named(name) for name in controls or CONTROLS],
            load_data(treatment.data, data_root),
            baseline=None if baseline is None else load_yaml(baseline, Experiment, overrides or []),
            basis=basis,
            tolerance=tolerance,
            speed=speed,
        )
        show(pairs_frame(pairs), format_)
        for pair in pairs.pairs:
            told = ", ".join(f"{key} = {value}" for key, value in changes(treatment, pair.experiment).items())
            more = len(pairs.others[pair.match.control])
            also = f"; {more} more within the tolerance" if more else ""
            print(f"{pair.match.control}: {told}{also}", file=sys.stderr)
            if output is not None:
                output.mkdir(parents=True, exist_ok=True)
                path = output / f"{pair.match.control}.yaml"
                head = f"# Purpose: {pair.match.control}, matched to {treatment.name} on {basis} parameters.\n"
                write_text(path, head + pair.experiment.yaml())
        for error in pairs.failed.values():
            print(f"no match: {error}", file=sys.stderr)


def laws(
    studies: Annotated[
        list[Path], typer.Argument(help="Folders of sweeps (or their tables), or of runs.", show_default=False)
    ],
    axis: Annotated[
        Literal["dense", "total", "flops", "all"], typer.Option(help="What a size is measured in.")
    ] = "all",
    response: Annotated[
        Literal["cross_entropy", "ndcg@10", "hr@10"],
        typer.Option(help="Validation, whole catalogue, mean over domains; a score s is fitted as 1 - s."),
    ] = "cross_entropy",
    engine: Annotated[
        Literal["least_squares", "huber", "lad"],
        typer.Option(help="Variable projection with intervals; or log residuals under Huber's loss or their sum."),
    ] = "least_squares",
    form: Annotated[
        Literal["size", "size_and_data", "one_exponent", "repeated_data"],
        typer.Option(
            help="E + A N^-a for each study; or with + B D^-b (or one exponent for both) through all studies, which "
            "are one data set at several data.train_users; or over several epochs, repetition discounted."
        ),
    ] = "size",
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Baseline and challenger.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for laws.json and the figures.", show_default=False),
    ] = None,
    format_: Format = "table",
) -> None:
    """L(N) = E + A N^-a through the means of each arm's sizes, and whether one arm needs less than another.

    rho is the number of parameters that the baseline needs for one of the challenger's. A conclusion names the axis it
    holds on; there is none under four sizes or one decade, and no ratio is extrapolated. Several sweeps, or several
    studies of one, are pooled.
    """
    if form != "size":
        if compare is not None or engine != "least_squares":
            raise typer.BadParameter("--compare and --engine go with --form size")
        _laws_in_data(studies, axis, response, form, output, format_)
        return
    with clear_errors():
        from recsys.report.laws import figures, ladder_frame, laws_frame, ratio_frame, records
        from recsys.results import atomic, write_json
        from recsys.scaling.findings import find
        from recsys.scaling.records import AXES, exclusions, read_studies

        table, found = read_studies(studies)
        axes = [one for one in AXES if axis == "all" or axis in one.lower()]
        findings = find(found, response, axes, engine=engine, compare=compare)
        for frame in (laws_frame(findings), ladder_frame(findings), ratio_frame(findings)):
            if not frame.empty:
                show(frame, format_)
        for line in findings.sentences():
            print(line)
        for refusal in findings.refusals:
            print(f"not said: {refusal}")
        for line in exclusions(table):
            print(f"left out: {line}")
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "laws.json", records(findings))
            for name, figure in figures(findings):
                with atomic(output / f"{name}.png") as path:
                    figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
            print(f"figures {output}", file=sys.stderr)


def _laws_in_data(
    studies: list[Path],
    axis: str,
    response: "Response",
    form: "SurfaceForm",
    output: Path | None,
    format_: Format,
) -> None:
    with clear_errors():
        from recsys.report.laws import isoflop_figure, surface_figure, surface_records, surfaces_frame
        from recsys.results import atomic, write_json
        from recsys.scaling.records import AXES, exclusions, read_studies
        from recsys.scaling.surface import fit_surfaces, parabolas

        table, found = read_studies(studies)
        axes = [one for one in AXES if axis == "all" or axis in one.lower()]
        surfaces, refusals = fit_surfaces(found, response, axes, form)
        if surfaces:
            show(surfaces_frame(surfaces), format_)
        for refusal in refusals:
            print(f"not said: {refusal}")
        for line in exclusions(table):
            print(f"left out: {line}")
        if output is not None:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / "laws.json", {"response": response, "laws": surface_records(surfaces)})
            for one in surfaces:
                drawn = {"surface": surface_figure(one, response)}
                if lowest := parabolas(found, one.arm, one.axis, response):
                    drawn["isoflop"] = isoflop_figure(lowest, one.axis, one.arm, response)
                for kind, figure in drawn.items():
                    with atomic(output / f"{kind}-{one.arm}-{one.axis.replace(' ', '_')}.png") as path:
                        figure.savefig(path, dpi=160, format="png", metadata={"Software": None})
            print(f"figures {output}", file=sys.stderr)


def report(
    studies: Annotated[list[Path], typer.Argument(help="Folders of sweeps.", show_default=False)],
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option("--compare", metavar="A B", help="Baseline and challenger.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder of the report. Default: FIRST SWEEP/report.", show_default=False),
    ] = None,
) -> None:
    """A study as one page that opens without a network (report.html), as Markdown, and its tables in LaTeX.

    Results with intervals, laws with bands, rho, the matching, learning rates, probes where runs were probed, the data,
    what was left out, and the resolved configs and versions.
    """
    with clear_errors():
        from recsys.report.html import write_report
        from recsys.report.laws import records
        from recsys.report.study import study_report
        from recsys.results import write_json
        from recsys.scaling.findings import find
        from recsys.scaling.records import RESPONSES, read_studies

        table, found = read_studies(studies)
        findings = [find(found, response, compare=compare) for response in RESPONSES]
        title, sections = study_report(studies, table, findings)
        directory = output or studies[0] / "report"
        for page in write_report(title, sections, directory):
            print(f"report  {page}")
        write_json(directory / "laws.json", [records(one) for one in findings])


def _shard(text: str) -> tuple[int, int]:
    from recsys.loading import ConfigError

    try:
        index, count = map(int, text.split("/"))
    except ValueError:
        raise ConfigError(f"--shard {text!r} must look like 1/4: the first of four shards") from None
    if not 1 <= index <= count:
        raise ConfigError(f"--shard {text!r}: the first of {count} shards is 1/{count}, the last {count}/{count}")
    return index, count
