"""Many candidates on one log: what is estimated, what is true where that is known, and all of it as files."""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float64
from pydantic import Field
from scipy.stats import spearmanr

from recsys.data.schema import DataError
from recsys.loading import Config
from recsys.offpolicy.candidates import Candidate, Kept
from recsys.offpolicy.evaluate import EvaluateConfig, Report, collect, report_of
from recsys.offpolicy.selection import select
from recsys.offpolicy.simulator import Truth, simulate, true_value
from recsys.offpolicy.sources import (
    CandidateConfig,
    LogConfig,
    LogSource,
    Opened,
    World,
    make_candidates,
    open_log,
    write_log,
)

HISTOGRAM = np.arange(-6.0, 4.01, 0.25)
"""Edges of the histogram of weights, in powers of ten; smaller and larger ones count at the ends."""


class StudyConfig(Config):
    """Candidates, and the log that they are evaluated on."""

    log: LogSource
    candidates: tuple[CandidateConfig, ...] = Field(min_length=1)
    evaluate: EvaluateConfig = EvaluateConfig()
    truth_draws: int = Field(4, ge=2)
    """Slates drawn per request for the true value, where a simulator made the log and slates are longer than one."""
    seed: int = Field(0, ge=0)
    """Of the slates that the true value is drawn from."""


@dataclass(frozen=True)
class Finding:
    """All that is known of one candidate."""

    report: Report
    weights: tuple[int, ...]
    """Requests by the weight of their slate, over the bins of `HISTOGRAM`."""
    truth: Truth | None


def make_log(config: LogConfig, path: Path, data_root: Path | None) -> tuple[World, Truth]:
    """Simulate a log and write it; gives the world it was made in, and the true value of the policy that made it."""
    world = World.of(config, data_root)
    simulator = world.simulator
    fingerprint = world.data.sequences.fingerprint
    found = list(make_candidates(config.logging, simulator.requests, simulator.catalog, None, fingerprint, data_root))
    if len(found) != 1:
        names = ", ".join(candidate.name for candidate in found[:3])
        raise DataError(f"one policy makes a log, and logging.scores.path names {len(found)}: {names}, …")
    generator = torch.Generator().manual_seed(config.seed)
    log = simulate(simulator, found[0], config.slots, generator, config.marginal_draws)
    write_log(log, config, fingerprint, path)
    return world, true_value(simulator, found[0], config.slots, 2, generator)


def run_study(
    config: StudyConfig, data_root: Path | None, tell: Callable[[str], None], domain: str = "all"
) -> tuple[list[Finding], Opened, Truth | None]:
    """Every candidate of a config, and the true value of the logging policy where it is known.

    Raises DataError where the log has no requests for `domain`, before anything is computed.
    """
    opened = open_log(config.log, data_root)
    log, catalog = opened.log, opened.catalog
    present = [log.domain_names[index] for index in np.unique(log.domain)]
    groups = ["all", *present] if len(present) > 1 else ["all"]
    if domain not in groups:
        raise DataError(f"the log has no requests for {domain!r}; it can be asked by {', '.join(groups)}")
    world, logging, baseline, fingerprint = None, None, None, None

    def value(candidate: Candidate) -> Truth | None:
        if world is None:
            return None
        # every candidate is given the same luck
        generator = torch.Generator().manual_seed(config.seed)
        return true_value(world.simulator, candidate, log.slots, config.truth_draws, generator)

    if opened.made_by is not None:
        world = World.of(opened.made_by, data_root)
        fingerprint = world.data.sequences.fingerprint
        [logging] = make_candidates(opened.made_by.logging, log, catalog, None, fingerprint, data_root)
        logging = replace(logging, scores=Kept(logging.scores))
        baseline = value(logging)
    findings: list[Finding] = []
    for group in config.candidates:
        for made in make_candidates(group, log, catalog, opened.raw_items, fingerprint, data_root):
            candidate = replace(made, scores=Kept(made.scores))
            if candidate.name in {finding.report.candidate for finding in findings}:
                raise DataError(f"two candidates are named {candidate.name!r}; give each a name of its own")
            clock = time.perf_counter()
            evidence = collect(log, candidate, catalog, config.evaluate, logging=logging)
            report = report_of(candidate.name, evidence, log, catalog, config.evaluate)
            findings.append(Finding(report, _histogram(evidence.weights), value(candidate)))
            tell(f"{candidate.name}  {time.perf_counter() - clock:.0f} s")
    return findings, opened, baseline


def study_json(
    config: StudyConfig,
    findings: list[Finding],
    opened: Opened,
    baseline: Truth | None,
    environment: dict[str, Any],
) -> dict[str, Any]:
    """Everything behind the numbers, as plain values."""
    return {
        "config": config.model_dump(mode="json"),
        "environment": environment | {"date": datetime.now(UTC).date().isoformat()},
        "log": {
            "requests": len(opened.log),
            "slots": opened.log.slots,
            "value": findings[0].report.logged_value,
            "truth": None if baseline is None else asdict(baseline),
            "made_by": None if opened.made_by is None else opened.made_by.model_dump(mode="json"),
        },
        "candidates": [
            finding.report.to_json()
            | {"truth": None if finding.truth is None else asdict(finding.truth), "weights": list(finding.weights)}
            for finding in findings
        ],
    }


def study_frame(study: dict[str, Any], domain: str = "all") -> pd.DataFrame:
    """A row per candidate and estimator: the estimate, its interval, the verdict, and the truth where it is known."""
    rows = []
    for candidate in study["candidates"]:
        for estimate in candidate["estimates"]:
            if (estimate["domain"] or "all") != domain:
                continue
            interval, diagnostics = estimate["interval"], estimate["diagnostics"]
            rows.append(
                {
                    "candidate": candidate["candidate"],
                    "estimator": estimate["estimator"],
                    "value": estimate["value"],
                    "low": None if interval is None else interval["low"],
                    "high": None if interval is None else interval["high"],
                    "truth": None if candidate["truth"] is None else candidate["truth"]["value"],
                    "verdict": diagnostics["verdict"],
                    "ess": diagnostics["ess"] / diagnostics["requests"],
                    "largest": diagnostics["largest"],
                    "support_gap": diagnostics["support_gap"],
                    "reason": estimate["reason"],
                }
            )
    numbers = ["value", "low", "high", "truth"]
    return pd.DataFrame(rows).astype(dict.fromkeys(numbers, float))


def ranking_frame(study: dict[str, Any], estimator: str) -> pd.DataFrame:
    """The candidates by one estimator, the best first, and what can be said of each against the logging policy.

    A candidate whose interval lies above the mean reward of the log is safe to try as far as the log can tell. One that
    was refused stands at the end, without a rank.
    """
    frame = study_frame(study)
    names = list(dict.fromkeys(frame["estimator"]))
    if estimator not in names:
        raise DataError(f"the report has no estimator {estimator!r}; it has {', '.join(names)}")
    frame = frame[frame["estimator"] == estimator].sort_values("value", ascending=False, kind="stable")
    logged = study["log"]["value"]
    against = np.select(
        [frame["value"].isna(), frame["low"].isna(), frame["low"] > logged, frame["high"] < logged],
        ["refused", "no interval", "above", "below"],
        "not told apart",
    )
    place = frame["value"].rank(ascending=False, method="first").astype("Int64")
    frame = frame.assign(rank=place, against_logging=against)
    columns = ["rank", "candidate", "value", "low", "high", "against_logging", "verdict", "truth"]
    known = frame["truth"].notna().any()
    return frame[columns if known else columns[:-1]].reset_index(drop=True)


def selection_frame(study: dict[str, Any], ks: list[int], alpha: float, safety: float) -> pd.DataFrame:
    """How well each estimator chooses, where the truth is known: a row per estimator and k.

    Candidates that an estimator was refused for are left out of its ranking, and counted.
    """
    frame = study_frame(study)
    if frame["truth"].isna().any():
        raise DataError("regret and SharpeRatio@k need the true values, which only a simulated log has")
    baseline = study["log"]["truth"]["value"]
    parts = []
    for estimator, rows in frame.groupby("estimator", sort=False):
        kept = rows[rows["value"].notna()]
        if len(kept) < 2:
            continue
        value, truth = kept["value"].to_numpy(), kept["truth"].to_numpy()
        chosen = select(value, truth, baseline, [k for k in ks if k <= len(kept)], alpha=alpha, safety=safety)
        agreement = float(spearmanr(value, truth).statistic)
        chosen.insert(0, "estimator", estimator)
        parts.append(chosen.assign(spearman=agreement, refused=len(rows) - len(kept)))
    if not parts:
        raise DataError("no estimator was trusted with two candidates or more; there is nothing to choose from")
    return pd.concat(parts, ignore_index=True)


def as_text(frame: pd.DataFrame) -> pd.DataFrame:
    """A frame of this module as it is read: intervals beside their values, shares in per cent, a dash for what is not.

    Exact numbers stay in the report and in the CSV form.
    """
    frame = frame.copy()
    if "low" in frame:
        pairs = zip(frame["low"], frame["high"], strict=True)
        frame.insert(
            list(frame.columns).index("high") + 1,
            "interval",
            ["–" if np.isnan(low) else f"[{low:.4f}, {high:.4f}]" for low, high in pairs],
        )
        frame = frame.drop(columns=["low", "high"])
    shares, plain = ["ess", "support_gap", "violation"], ["largest"]
    for name in frame.columns:
        column = frame[name]
        if pd.api.types.is_float_dtype(column):
            form = "{:.1%}" if name in shares else "{:,.1f}" if name in plain else "{:.4f}"
            frame[name] = ["–" if pd.isna(value) else form.format(value) for value in column]
        else:
            frame[name] = ["–" if pd.isna(value) else str(value) for value in column]
    return frame.rename(columns=lambda name: name.replace("_", " "))


def _histogram(weights: Float64[np.ndarray, " requests"]) -> tuple[int, ...]:
    with np.errstate(divide="ignore"):
        powers = np.log10(weights).clip(HISTOGRAM[0], HISTOGRAM[-1] - 1e-9)
    return tuple(np.histogram(powers, HISTOGRAM)[0].tolist())
