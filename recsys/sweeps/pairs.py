"""A treatment and the controls of its size, side by side: configs out, and a table that shows how equal they are."""

from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from recsys.errors import UserError
from recsys.experiment import Data, Experiment
from recsys.loading import ConfigError
from recsys.scaling.match import CONTEXT_CONTROLS, Basis, Control, Cost, Match, NoMatch, match
from recsys.sweeps.speed import Speed, measure_speed
from recsys.sweeps.tune import with_values


@dataclass(frozen=True)
class Pair:
    """A control with the experiment that runs it."""

    match: Match
    experiment: Experiment
    speed: Speed | None


@dataclass(frozen=True)
class Pairs:
    treatment: Experiment
    basis: Basis
    speed: Speed | None
    """Of the treatment; None where speed was not asked for."""
    pairs: tuple[Pair, ...]
    others: dict[Control, list[Match]]
    """What else would do, control by control."""
    failed: dict[Control, UserError]
    """Controls that come within the tolerance of nothing, or change a key that the model lacks."""


def make_pairs(
    treatment: Experiment,
    controls: Sequence[Control],
    data: Data,
    *,
    baseline: Experiment | None,
    basis: Basis,
    tolerance: float,
    speed: bool,
) -> Pairs:
    """The nearest match of each control; `table_wider` is matched on the total, which is all it is good for.

    Raises NoMatch where no control has one.
    """
    if treatment.counts:
        raise ConfigError(f"the model {treatment.model.name!r} has no parameters to be matched")
    chosen: list[Pair] = []
    others: dict[Control, list[Match]] = {}
    failed: dict[Control, UserError] = {}
    for control in controls:
        try:
            found = match(
                treatment.model,
                control,
                data.catalog,
                treatment.data.max_len,
                baseline=None if baseline is None or control in CONTEXT_CONTROLS else baseline.model,
                basis=basis_of(control, basis),
                tolerance=tolerance,
            )
        except (NoMatch, ConfigError) as error:
            failed[control] = error
            continue
        values = {"name": f"{treatment.name}-{control}", "model": found[0].config.model_dump(mode="json")}
        experiment = with_values(treatment, values)
        chosen.append(Pair(found[0], experiment, measure_speed(experiment, data, memory=True) if speed else None))
        others[control] = found[1:]
    if not chosen:
        raise NoMatch("\n".join(map(str, failed.values())))
    own = measure_speed(treatment, data, memory=True) if speed else None
    return Pairs(treatment, basis, own, tuple(chosen), others, failed)


def basis_of(control: Control, basis: Basis) -> Basis:
    return "total" if control == "table_wider" and basis == "dense" else basis


_CLASSES = ("item_table", "other_embeddings", "encoder", "cross_attention", "gate", "output_head")


def pairs_frame(pairs: Pairs) -> pd.DataFrame:
    """One row per model as text; ratios are to the treatment's.

    FLOPs are those of a training step on one history of full length, without the logits and with them.
    """
    cost = pairs.pairs[0].match.treatment
    rows = [_row("treatment", "", cost, cost, pairs.speed, pairs.speed)]
    for pair in pairs.pairs:
        one = pair.match
        basis = basis_of(one.control, pairs.basis)
        rows.append(_row(one.control, f"{one.gap(basis):+.3%} {basis}", one.cost, cost, pair.speed, pairs.speed))
    return pd.DataFrame(rows)


def _row(
    name: str, gap: str, cost: Cost, treatment: Cost, speed: Speed | None, reference: Speed | None
) -> dict[str, str]:
    own, other = cost.parameters, treatment.parameters
    row = {"model": name, "gap": gap or "–"}
    row |= {part.replace("_", " "): f"{getattr(own, part):,}" for part in _CLASSES}
    row |= {
        "dense": f"{own.dense:,} ({own.dense / other.dense - 1:+.2%})",
        "total": f"{own.total:,} ({own.total / other.total - 1:+.2%})",
        "FLOPs": f"{cost.flops.step / treatment.flops.step:.3f}",
        "with logits": f"{_with_logits(cost) / _with_logits(treatment):.3f}",
    }
    if speed is not None and reference is not None:
        row |= {"speed": f"{speed.examples_per_second / reference.examples_per_second:.2f}"}
        row |= {"peak memory": "–" if speed.peak_bytes is None else f"{speed.peak_bytes / 2**20:,.0f} MiB"}
    return row


def _with_logits(cost: Cost) -> int:
    return cost.flops.step + cost.flops.logits_step


def changes(treatment: Experiment, control: Experiment) -> dict[str, object]:
    """The keys of the model in which a control differs."""
    before, after = (experiment.model.model_dump(mode="json") for experiment in (treatment, control))
    return {key: value for key, value in after.items() if value != before.get(key)}
