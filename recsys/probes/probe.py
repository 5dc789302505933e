"""A model's cross-attentions, measured over the batches of an evaluation, as one table."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence

import pyarrow as pa
import torch
from jaxtyping import Bool
from torch import Tensor, nn

from recsys.evaluation.targets import EvalBatch
from recsys.probes.record import UnitRecord, UnitSite, find_units, raw_module, record
from recsys.probes.table import make_table
from recsys.probes.unit import ProbeConfig, UnitProbe
from recsys.types import Batch


def probe(
    model: nn.Module,
    batches: Iterable[EvalBatch],
    domain_names: Sequence[str],
    config: ProbeConfig,
    *,
    label: str,
    step: int | None = None,
    epoch: int | None = None,
    initial: pa.Table | None = None,
) -> pa.Table:
    """Every unit of exchange of a model in evaluation mode, over all queries of the batches; rows as `PROBES_SCHEMA`.

    `initial` is the table of the same model before training, whose values become `null_init`. A model without an
    exchange gives a table without rows. Raises NonFiniteStates. To measure during an evaluation instead of after it,
    see `watch`.
    """
    with watch(model, domain_names, config) as watching, torch.no_grad():
        for batch in batches:
            raw_module(model)(batch.batch)
    return watching.table(label=label, step=step, epoch=epoch, initial=initial)


@contextlib.contextmanager
def watch(model: nn.Module, domain_names: Sequence[str], config: ProbeConfig) -> Iterator["Probe"]:
    """Measure every forward pass of the model's raw module for as long as the block lasts.

    An evaluation that runs inside the block is the cheapest way to probe a model: it has to run anyway.
    """
    watching = Probe(find_units(model), domain_names, config)
    with record(model) as recorder:

        def measure(*_: object) -> None:
            assert not recorder.model.training, "call model.eval() before probing"
            assert recorder.batch is not None
            watching.update(recorder.batch, recorder.units)

        handle = recorder.model.register_forward_hook(measure)
        try:
            yield watching
        finally:
            handle.remove()


class Probe:
    """The measures of every unit, added up over forward passes."""

    def __init__(self, units: Sequence[UnitSite], domain_names: Sequence[str], config: ProbeConfig) -> None:
        self._units = {unit.name: UnitProbe(unit, domain_names, config) for unit in units}
        self._generator = torch.Generator().manual_seed(config.seed)

    def update(self, batch: Batch, records: Mapping[str, UnitRecord]) -> None:
        """Add one forward pass. A row that repeats the one before it, as a scorer fills up a batch, counts once."""
        if not records:
            return
        fresh = _first_of_its_kind(batch)
        with torch.no_grad(), torch.autocast(batch.items.device.type, enabled=False):
            for name, seen in records.items():
                self._units[name].update(seen, fresh[seen.row], self._generator)

    def table(
        self, *, label: str, step: int | None = None, epoch: int | None = None, initial: pa.Table | None = None
    ) -> pa.Table:
        """Everything so far; see `probe`."""
        rows = (row for unit in self._units.values() for row in unit.rows())
        return make_table(rows, label=label, step=step, epoch=epoch, initial=initial)


def _first_of_its_kind(batch: Batch) -> Bool[Tensor, " batch"]:
    """False for a row that equals the one before it in everything."""
    rows = torch.cat([column.reshape(len(batch.user), -1) for column in batch.columns().values()], dim=1)
    fresh = torch.ones_like(batch.user, dtype=torch.bool)
    fresh[1:] = (rows[1:] != rows[:-1]).any(1)
    return fresh
