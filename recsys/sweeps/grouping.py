"""Which runs of a sweep can be trained as one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from recsys.optim import OptimConfig

if TYPE_CHECKING:
    from recsys.sweeps.execute import Job


def bundle(jobs: Sequence["Job"], most: int) -> list[tuple["Job", ...]]:
    """The jobs, those side by side that are the same but for their optimizer, at most `most` of them each.

    Such runs see the same batches, toss the same coins and draw the same negatives. Where batches come in one shape,
    the seed may differ as well. Bundles stand where their first job stood.
    """
    bundles: list[list[Job]] = []
    open_bundles: dict[str, list[Job]] = {}
    for job in jobs:
        own = [job]
        shared = open_bundles.get(_shared(job))
        if shared is not None and len(shared) < most and _stacks(job):
            shared.append(job)
        else:
            bundles.append(own)
            open_bundles[_shared(job)] = own
    return [tuple(own) for own in bundles]


def _shared(job: "Job") -> str:
    """What runs that are trained as one have in common: all that no optimizer reads, and the seed at times."""
    own: dict[str, Any] = {"name": "shared", "optim": OptimConfig()}
    if job.experiment.trainer.widths == 1:
        own["seed"] = 0
    return job.experiment.model_copy(update=own).yaml() + job.cell.data


def _stacks(job: "Job") -> bool:
    """A balance and a penalty look into the step of one model, and a compiled pass is that of one model."""
    experiment = job.experiment
    return experiment.balance is None and experiment.alignment_penalty is None and experiment.trainer.compile is None
