"""`recsys offpolicy`: make a log, evaluate candidates on it, choose among them, learn from it."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from recsys.cli.options import DataRoot, Format, Overrides
from recsys.cli.output import clear_errors, console, show

if TYPE_CHECKING:
    from pandas import DataFrame

app = typer.Typer(
    help="What a recommender would earn if it were shown: estimated, compared and improved from logged feedback.",
    no_args_is_help=True,
)

Config = Annotated[Path, typer.Option("--config", "-c", help="A YAML file.", show_default=False)]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for what comes out.", show_default=False)]
Form = Literal["table", "markdown", "latex", "csv"]

_KS = [1, 3, 5]


@app.command("log")
def log_(
    config: Config,
    output: Annotated[Path, typer.Option("--output", "-o", help="The log, a Parquet file.", show_default=False)],
    overrides: Overrides = None,
    data_root: DataRoot = None,
) -> None:
    """Show a policy to simulated users, and log what they do with the propensities at sampling time.

    The histories are those of real or synthetic data. The file says how it was made: `evaluate` then knows the logging
    policy and the true value of every candidate.
    """
    with clear_errors():
        _require_folder(output)
        from recsys.loading import load_yaml
        from recsys.offpolicy.sources import LogConfig
        from recsys.offpolicy.study import make_log

        settings = load_yaml(config, LogConfig, overrides or [])
        world, truth = make_log(settings, output, data_root)
        screen = console()
        names = world.simulator.catalog.domain_names
        offered = ", ".join(
            f"{len(world.simulator.catalog.items_of(domain)):,} {name}" for domain, name in enumerate(names)
        )
        screen.print(
            f"{settings.requests:,} requests, slates of {settings.slots}, items on offer: {offered}; the policy earns "
            f"{truth.value:.4f} a request",
            highlight=False,
        )
        screen.print(f"log     {output}", highlight=False, soft_wrap=True)


@app.command("evaluate")
def evaluate_(
    config: Config,
    output: Output,
    overrides: Overrides = None,
    domain: Annotated[str, typer.Option("--by", help="Requests for this domain alone.")] = "all",
    data_root: DataRoot = None,
    format_: Format = "table",
) -> None:
    """Estimate what each candidate would earn, with an interval where one is valid, and say whether to believe it.

    Writes report.json, estimates.csv and figures. A log that cannot tell gives no number.
    """
    with clear_errors():
        from rich.console import Console

        from recsys.loading import load_yaml
        from recsys.offpolicy.figures import draw_estimates, draw_weights
        from recsys.offpolicy.study import HISTOGRAM, StudyConfig, run_study, study_frame, study_json
        from recsys.results import atomic, write_json

        settings = load_yaml(config, StudyConfig, overrides or [])
        output.mkdir(parents=True, exist_ok=True)
        screen = console() if format_ == "table" else Console(quiet=True)
        findings, opened, baseline = run_study(
            settings, data_root, lambda line: screen.print(line, highlight=False, style="dim"), domain
        )
        import torch

        from recsys.training.environment import describe_environment

        study = study_json(settings, findings, opened, baseline, describe_environment(torch.device("cpu")))
        write_json(output / "report.json", study)
        frame = study_frame(study, domain)
        with atomic(output / "estimates.csv") as path:
            study_frame(study).to_csv(path, index=False)
        logged = study["log"]["value"]
        title = f"{len(opened.log):,} logged requests"
        for estimator, rows in study_frame(study).groupby("estimator", sort=False):
            draw_estimates(rows, logged, output / f"{_slug(str(estimator))}.png", f"{estimator} from {title}")
        draw_weights(study, HISTOGRAM, output / "weights.png", f"Importance weights of {title}")
        quality = findings[0].report.quality
        shown = frame.drop(columns=["reason"])
        _show(shown if frame["truth"].notna().any() else shown.drop(columns=["truth"]), format_)
        tq = "–" if quality.tq is None else f"{quality.tq:.2f}"
        screen.print(
            f"the log: {len(opened.log):,} requests, mean reward {logged:.4f}, TQ {tq}, SACo {quality.saco:.2f}, "
            f"propensities {opened.log.propensities}",
            highlight=False,
        )
        for estimator, reason in frame[["estimator", "reason"]].dropna().drop_duplicates().to_numpy():
            screen.print(f"{estimator}: {reason}", highlight=False, style="dim")
        screen.print(f"report  {output / 'report.json'}", highlight=False, soft_wrap=True)


@app.command("select")
def select_(
    report: Annotated[Path, typer.Argument(help="A report.json of `evaluate`.", show_default=False)],
    estimator: Annotated[
        str | None, typer.Option("--estimator", "-e", help="Ranks the candidates. Default: the report's first.")
    ] = None,
    k: Annotated[list[int] | None, typer.Option("-k", min=1, help="How many are tried. Repeatable.")] = None,
    alpha: Annotated[float, typer.Option(min=0.01, max=1, help="CVaR is the mean of this worst share.")] = 0.3,
    safety: Annotated[
        float, typer.Option(min=0, help="A violation earns less than this times the logging policy's value.")
    ] = 1.0,
    figure: Annotated[Path | None, typer.Option(help="Also draw risk against return.")] = None,
    format_: Format = "table",
) -> None:
    """Rank the candidates of a report; where the truth is known, say how well each estimator chooses.

    Regret@k, SharpeRatio@k, CVaR and the share of the first k that earn less than the logging policy.
    """
    with clear_errors():
        import json

        from recsys.offpolicy.figures import draw_risk_return
        from recsys.offpolicy.study import ranking_frame, selection_frame
        from recsys.results import RunError

        try:
            study = json.loads(report.read_text(encoding="utf-8"))
            first = study["candidates"][0]["estimates"][0]["estimator"]
        except (ValueError, KeyError, IndexError, TypeError):
            raise RunError(f"{report} is no report of `recsys offpolicy evaluate`") from None
        name = estimator or first
        ranking = ranking_frame(study, name)
        _show(ranking, format_)
        if study["log"]["truth"] is not None:
            _show(selection_frame(study, k or _KS, alpha, safety), format_)
        if figure is not None:
            _require_folder(figure)
            draw_risk_return(ranking, study["log"]["value"], figure, f"Risk and return by {name}")
            console().print(f"figure  {figure}", highlight=False, soft_wrap=True)


@app.command("learn")
def learn_(
    config: Config,
    output: Output,
    overrides: Overrides = None,
    data_root: DataRoot = None,
) -> None:
    """Train a run's model further on logged feedback, or learn a score per item where the log has no histories.

    A part of the users is held out, on whom the policy is evaluated before and after. What comes out is a candidate for
    `evaluate`: a run directory (`scale: raw`), or a table of scores.
    """
    with clear_errors():
        from recsys.loading import load_yaml
        from recsys.offpolicy.learn import LearnConfig, learn

        settings = load_yaml(config, LearnConfig, overrides or [])
        screen = console()
        learnt = learn(settings, output, data_root, lambda line: screen.print(line, highlight=False, style="dim"))
        parts = (("before", learnt.before, learnt.truth_before), ("after", learnt.after, learnt.truth_after))
        for name, report, truth in parts:
            known = "" if truth is None else f"  truth {truth.value:.4f}"
            for estimate in report.estimates:
                if estimate.domain is not None:
                    continue
                value = "refused" if estimate.value is None else f"{estimate.value:.4f}"
                interval = estimate.interval
                width = "" if interval is None else f" [{interval.low:.4f}, {interval.high:.4f}]"
                verdict = estimate.diagnostics.verdict
                screen.print(f"{name:<7} {estimate.estimator} {value}{width}  {verdict}{known}", highlight=False)
        screen.print(f"held-out users, whose log earned {learnt.after.logged_value:.4f}", highlight=False)
        screen.print(f"learnt  {output}", highlight=False, soft_wrap=True)


def _show(frame: "DataFrame", form: Form) -> None:
    from recsys.offpolicy.study import as_text

    if form == "csv":
        print(frame.to_csv(index=False), end="")
    else:
        show(as_text(frame), form)


def _require_folder(path: Path) -> None:
    from recsys.results import RunError

    if not path.parent.is_dir():
        raise RunError(f"there is no folder {path.parent} to write {path.name} into")


def _slug(name: str) -> str:
    return "".join(letter if letter.isalnum() else "_" for letter in name).strip("_")
