"""Many of NumPy's generators, each with a seed of its own: the seeds of all are mixed at once."""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from numpy.random.bit_generator import ISeedSequence

_POOL = 4
_STATE = 8
"""32-bit words that a PCG64 asks for."""


def generators(seeds: npt.NDArray[np.uint32]) -> Iterator[np.random.Generator]:
    """`np.random.default_rng(row)` for each row of 32-bit words, in a quarter of the time."""
    for state in seed_states(seeds):
        yield np.random.Generator(np.random.PCG64(_Mixed(state)))  # type: ignore[arg-type]  # its type knows one class only


def seed_states(seeds: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint64]:
    """`np.random.SeedSequence(row).generate_state(4, np.uint64)` for each row.

    The algorithm is that of `seed_seq_fe` (O'Neill, "Developing a seed_seq alternative", 2015) as NumPy has it, whose
    streams are fixed for good.
    """
    words = list(seeds.T)
    blank = np.zeros(len(seeds), dtype=np.uint32)
    scramble = _Scramble(0x43B0D7E5, 0x931E8875)
    pool = [scramble(word) for word in [*words, *[blank] * _POOL][:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = _mix(pool[target], scramble(pool[source]))
    for word in words[_POOL:]:
        pool = [_mix(part, scramble(word)) for part in pool]
    scramble = _Scramble(0x8B51F9DD, 0x58F38DED)
    state = np.stack([scramble(pool[place % _POOL]) for place in range(_STATE)], axis=1)
    return state.astype("<u4").view("<u8").astype(np.uint64)


class _Scramble:
    """A hash of words that is another one at each call."""

    def __init__(self, constant: int, factor: int) -> None:
        self._constant, self._factor = constant, factor

    def __call__(self, words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
        words = words ^ np.uint32(self._constant)
        self._constant = self._constant * self._factor & 0xFFFFFFFF
        return _fold(words * np.uint32(self._constant))


def _mix(a: npt.NDArray[np.uint32], b: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return _fold(a * np.uint32(0xCA01F9DD) - b * np.uint32(0x4973F715))


def _fold(words: npt.NDArray[np.uint32]) -> npt.NDArray[np.uint32]:
    return words ^ words >> np.uint32(16)


class _Mixed(ISeedSequence):
    """What a PCG64 asks of its seed, made beforehand."""

    def __init__(self, state: npt.NDArray[np.uint64]) -> None:
        self._state = state

    def generate_state(self, n_words: int, dtype: npt.DTypeLike = np.uint32) -> npt.NDArray[np.uint64]:
        assert (n_words, dtype) == (len(self._state), np.uint64), "a PCG64 asks for four words of 64 bits"
        return self._state
