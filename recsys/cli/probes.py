"""`recsys probe`, `intervene`, `correlate`: what the exchange of a run adds, and whether that matters."""

from pathlib import Path
from typing import Annotated

import typer

from recsys.cli.options import DataRoot, Format
from recsys.cli.output import clear_errors, console, show

Run = Annotated[Path, typer.Argument(help="A finished run of a model with an exchange.", show_default=False)]


def probe(
    run: Run,
    options: Annotated[
        list[str] | None,
        typer.Option("--set", "-s", metavar="KEY=VALUE", help="How to measure, as in queries=all. Repeatable."),
    ] = None,
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Measure every cross-attention of a run against chance, as it started and as validation picked it.

    Writes probes.parquet and its figures into the run. An alignment ratio of 1 is no more than chance. For a claim
    about new information take the excess over the control: the raw shares are high for an untrained model, too.
    """
    with clear_errors():
        from recsys.loading import apply_overrides, parse_config
        from recsys.probes import ProbeConfig
        from recsys.report.probes import alignment_frame, contribution_frame
        from recsys.training.instruments import probe_run

        config = parse_config(apply_overrides({}, options or []), ProbeConfig, "--set")
        directory, table = probe_run(run, data_root, config)
        show(alignment_frame(table), format_)
        show(contribution_frame(table), format_)
        if format_ == "table":
            screen = console()
            screen.print(
                "alignment ratio 1 is chance; isotropic, covariance and at start are the same ratio by other chances",
                style="dim",
                highlight=False,
            )
            screen.print(f"probes  {directory.probes}", highlight=False, soft_wrap=True)
