"""Packed sequences: every user's events behind one another in flat arrays that are read through memory maps."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int8, Int16, Int32, Int64
from numpy.typing import ArrayLike

from recsys.data.schema import DataError

TimeUnit = Literal["seconds", "order"]

ARRAYS = {
    "items": np.int32,
    "domains": np.int8,
    "times": np.int64,
    "offsets": np.int64,
    "item_domain": np.int16,
}
"""Name (and file stem) of each array, and its type."""


@dataclass(frozen=True)
class Sequences:
    """The events of all users. User `u` owns positions `offsets[u]:offsets[u + 1]`, in time order."""

    items: Int32[np.ndarray, " events"]
    """Item ids, 1..num_items."""
    domains: Int8[np.ndarray, " events"]
    times: Int64[np.ndarray, " events"]
    """Unix seconds, or the rank within the user where `time_unit` is "order"; never decreasing within a user."""
    offsets: Int64[np.ndarray, " bounds"]
    domain_names: tuple[str, ...]
    item_domain: Int16[np.ndarray, " items"]
    """Domain of every item id, -1 at 0 (padding); length `num_items + 1`."""
    time_unit: TimeUnit
    fingerprint: str
    """sha256 over the arrays, the domain names and the time unit."""

    @classmethod
    def pack(
        cls,
        items: ArrayLike,
        domains: ArrayLike,
        times: ArrayLike,
        offsets: ArrayLike,
        domain_names: tuple[str, ...],
        item_domain: ArrayLike,
        time_unit: TimeUnit = "seconds",
    ) -> "Sequences":
        """Sequences of plain arrays, brought to the right types, checked and fingerprinted."""
        given = {"items": items, "domains": domains, "times": times, "offsets": offsets, "item_domain": item_domain}
        arrays = {name: np.ascontiguousarray(array, dtype=ARRAYS[name]) for name, array in given.items()}
        digest = hashlib.sha256(json.dumps([list(domain_names), time_unit]).encode())
        for name in ARRAYS:
            digest.update(arrays[name].tobytes())
        packed = cls(**arrays, domain_names=domain_names, time_unit=time_unit, fingerprint=digest.hexdigest())
        packed._check()
        return packed

    def _check(self) -> None:
        """What every reader of the arrays relies on."""
        assert len(self.items) == len(self.domains) == len(self.times)
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.items)
        assert (np.diff(self.offsets) >= 0).all()
        assert self.item_domain[0] == -1
        assert (self.item_domain[1:] >= 0).all()
        assert (self.item_domain < len(self.domain_names)).all()
        if len(self.items):
            assert self.items.min() >= 1
            assert self.items.max() <= self.num_items
            assert (self.item_domain[self.items] == self.domains).all()
            same_user = np.diff(self.event_users()) == 0
            assert (np.diff(self.times)[same_user] >= 0).all()

    @property
    def num_users(self) -> int:
        return len(self.offsets) - 1

    @property
    def num_items(self) -> int:
        """Number of real items, padding not counted."""
        return len(self.item_domain) - 1

    @property
    def num_domains(self) -> int:
        return len(self.domain_names)

    def event_users(self) -> Int64[np.ndarray, " events"]:
        """The user of every event."""
        return np.repeat(np.arange(self.num_users), np.diff(self.offsets))

    def save(self, directory: Path) -> None:
        """One `.npy` per array and a `sequences.json` for the rest."""
        for name in ARRAYS:
            np.save(directory / f"{name}.npy", getattr(self, name), allow_pickle=False)
        about = {"domain_names": self.domain_names, "time_unit": self.time_unit, "fingerprint": self.fingerprint}
        (directory / "sequences.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: Path) -> "Sequences":
        """The sequences of a directory, as memory maps (nothing is read until it is used)."""
        try:
            about = json.loads((directory / "sequences.json").read_text(encoding="utf-8"))
            arrays = {name: _open(directory / f"{name}.npy") for name in ARRAYS}
            return cls(
                **arrays,
                domain_names=tuple(about["domain_names"]),
                time_unit=about["time_unit"],
                fingerprint=about["fingerprint"],
            )
        except (OSError, ValueError, EOFError, KeyError, TypeError) as error:
            raise DataError(
                f"{directory} does not hold packed sequences that can be read ({error!r}); "
                "delete the directory and prepare the dataset again"
            ) from None


def _open(path: Path) -> np.ndarray:
    array: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    return array
