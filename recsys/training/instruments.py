"""Finished runs under the probe: what their exchange does, and what becomes of them without it."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console

from recsys.errors import UserError
from recsys.evaluation import compare
from recsys.evaluation.ranks import Split
from recsys.experiment import TrajectoryConfig, build_model
from recsys.probes import ProbeConfig, find_units
from recsys.probes.intervene import INTERVENTIONS, RANDOM, Intervention, intervene
from recsys.results import RunDirectory, atomic
from recsys.training.run import choose_device, eval_batches, evaluate_model, open_run
from recsys.training.trajectory import BEST, Trajectory


class NoExchange(UserError):
    """A run whose model has nothing to probe."""


def probe_run(path: Path, data_root: Path | None, config: ProbeConfig) -> tuple[RunDirectory, pa.Table]:
    """Measure a finished run's exchange as it started and as validation picked it, on the validation targets.

    The weights of the start are made again from the run's seed. Writes `probes.parquet` into the run; rows that were
    measured while it was trained stay.
    """
    run, experiment, data, model = open_run(path, data_root)
    if not find_units(model):
        raise NoExchange(f"{path} has no exchange between domains to probe (model.cross is null)")
    selection = run.read_final()["selection"]
    step = next(record["step"] for record in run.read_log() if record["epoch"] == selection["epoch"])
    device = choose_device(experiment.trainer)
    with run.held():
        trajectory = Trajectory(
            TrajectoryConfig(),
            run.probes,
            eval_batches(experiment, data, experiment.eval, "validation", device),
            data.catalog.domain_names,
            config,
        )
        trajectory.begin(build_model(experiment, data).to(device), again=True)
        trajectory.measure(model.to(device), BEST, step, selection["epoch"])
    return run, trajectory.table


INTERVENTIONS_SCHEMA = pa.schema(
    [
        pa.field("intervention", pa.string(), nullable=False),  # what is added in place of the update
        pa.field("unit", pa.string(), nullable=False),  # path in the model, or "all" together
        pa.field("stage", pa.string(), nullable=False),
        pa.field("key", pa.string(), nullable=False),  # of the metric
        pa.field("trained", pa.float64(), nullable=False),  # its value in the model as it was trained
        pa.field("value", pa.float64(), nullable=False),  # the mean over draws, where the intervention draws
        pa.field("difference", pa.float64(), nullable=False),
        pa.field("low", pa.float64(), nullable=False),  # 95 % interval over users, and over draws
        pa.field("high", pa.float64(), nullable=False),
        pa.field("p_holm", pa.float64(), nullable=False),  # sign flips of users, adjusted for all rows
        pa.field("energy", pa.float64(), nullable=False),  # sum |G' - G|^2 / sum |G|^2 over tokens
        pa.field("difference_per_energy", pa.float64()),  # null where nothing is changed
        pa.field("draws", pa.int64(), nullable=False),
        pa.field("users", pa.int64(), nullable=False),
    ]
)


def intervene_run(
    path: Path,
    data_root: Path | None,
    console: Console,
    *,
    stage: Split = "test",
    protocol: str = "full",
    metric: str = "ndcg@10",
    draws: int = 5,
    by_unit: bool = False,
    seed: int = 0,
    interventions: Mapping[str, Intervention] = INTERVENTIONS,
) -> tuple[RunDirectory, pa.Table]:
    """What a finished run's ranking loses under every intervention, in all units at once and, `by_unit`, in each.

    Every difference is paired over users. Writes `interventions.parquet` into the run.
    """
    run, experiment, data, model = open_run(path, data_root)
    names = [unit.name for unit in find_units(model)]
    if not names:
        raise NoExchange(f"{path} has no exchange between domains to intervene on (model.cross is null)")
    config = experiment.eval.model_copy(update={"protocols": (protocol,)})
    device = choose_device(experiment.trainer)

    def ranks() -> pa.Table:
        return evaluate_model(model, experiment, data, config, stage, device).ranks

    with intervene(model, None) as books:
        trained = ranks()
    means = books.means()
    places: list[tuple[str, Sequence[str] | None]] = [("all", None)]
    if by_unit and len(names) > 1:
        places += [(name, [name]) for name in names]
    arms: dict[str, list[pa.Table]] = {"as trained": [trained]}
    about: dict[str, tuple[str, str, float]] = {}
    for place, units in places:
        for name, change in interventions.items():
            console.print(f"{place}: {name}", style="dim", highlight=False)
            found, energies = [], []
            for draw in range(draws if name in RANDOM else 1):
                with intervene(model, change, means=means, units=units, seed=seed + draw) as ledger:
                    found.append(ranks())
                energies.append(ledger.energy)
            label = f"{name} in {place}"
            arms[label] = found
            about[label] = (name, place, sum(energies) / len(energies))
    rows = []
    for comparison in compare(arms, config, [metric]):
        name, place, energy = about[comparison.treatment]
        difference = comparison.difference
        rows.append(
            {
                "intervention": name,
                "unit": place,
                "stage": stage,
                "key": comparison.key,
                "trained": comparison.baseline_value,
                "value": comparison.treatment_value,
                "difference": difference.value,
                "low": difference.low,
                "high": difference.high,
                "p_holm": comparison.p_permutation_holm,
                "energy": energy,
                "difference_per_energy": difference.value / energy if energy > 0 else None,
                "draws": len(arms[comparison.treatment]),
                "users": difference.n,
            }
        )
    table = pa.Table.from_pylist(rows, schema=INTERVENTIONS_SCHEMA)
    with run.held(), atomic(run.interventions) as temporary:
        pq.write_table(table, temporary)
    return run, table
