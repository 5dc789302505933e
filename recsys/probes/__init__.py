"""What a cross-attention adds to its query, and whether that is more than chance: seen from outside the model."""

from recsys.probes.probe import Probe, probe, watch
from recsys.probes.record import Recorder, UnitRecord, find_units, record
from recsys.probes.table import PROBES_SCHEMA
from recsys.probes.unit import NonFiniteStates, ProbeConfig

__all__ = [
    "PROBES_SCHEMA",
    "NonFiniteStates",
    "Probe",
    "ProbeConfig",
    "Recorder",
    "UnitRecord",
    "find_units",
    "probe",
    "record",
    "watch",
]
