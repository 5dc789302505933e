"""The probe of a finished run."""

from pathlib import Path

import pyarrow as pa

from recsys.errors import UserError
from recsys.experiment import TrajectoryConfig, build_model
from recsys.probes import ProbeConfig, find_units
from recsys.results import RunDirectory
from recsys.training.run import choose_device, eval_batches, open_run
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
