"""The `recsys` command. Each command imports what it needs when it runs, so that `--help` answers at once."""

import importlib
import importlib.util

import typer

from recsys.cli import data, probes, results, scaling, training

app = typer.Typer(
    help="Cross-domain sequential recommendation: train, evaluate and compare on honest ground.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    training.train,
    training.tune,
    training.estimate,
    training.evaluate,
    training.recommend,
    results.compare,
    results.results,
    results.replicate,
    probes.probe,
    probes.intervene,
    probes.correlate,
    scaling.sweep,
    scaling.match,
    scaling.laws,
    scaling.report,
):
    app.command()(command)
app.add_typer(data.app, name="data")
if importlib.util.find_spec("recsys.offpolicy") is not None:  # the one place that looks for it, and does without it
    app.add_typer(importlib.import_module("recsys.offpolicy.cli").app, name="offpolicy")
