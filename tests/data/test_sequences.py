from pathlib import Path

import numpy as np
import pytest

from recsys.data.schema import DataError
from recsys.data.sequences import ARRAYS, Sequences


def test_sizes_and_types(sequences: Sequences) -> None:
    assert (sequences.num_users, sequences.num_items, sequences.num_domains) == (4, 6, 2)
    assert sequences.event_users().tolist() == [0] * 5 + [1] * 4 + [2] * 2 + [3]
    for name, dtype in ARRAYS.items():
        assert getattr(sequences, name).dtype == dtype


def test_saved_sequences_come_back_as_memory_maps(sequences: Sequences, tmp_path: Path) -> None:
    sequences.save(tmp_path)
    loaded = Sequences.load(tmp_path)
    assert isinstance(loaded.items, np.memmap)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(sequences, name))
    assert (loaded.domain_names, loaded.time_unit, loaded.fingerprint) == (
        sequences.domain_names,
        sequences.time_unit,
        sequences.fingerprint,
    )


def test_the_fingerprint_covers_every_array_and_name(sequences: Sequences) -> None:
    parts = {name: getattr(sequences, name) for name in ARRAYS}
    parts |= {"domain_names": sequences.domain_names, "time_unit": sequences.time_unit}
    assert Sequences.pack(**parts).fingerprint == sequences.fingerprint
    times = sequences.times.copy()
    times[-1] += 1
    items = sequences.items.copy()
    items[0] = 3
    changes = [
        {"times": times},
        {"items": items},
        {"time_unit": "order"},
        {"domain_names": ("food", "home")},
        {"offsets": [0, 5, 9, 12, 12]},
        {"item_domain": [-1, 0, 0, 0, 1, 1, 1, 1]},
    ]
    prints = {Sequences.pack(**(parts | change)).fingerprint for change in changes}
    assert len(prints | {sequences.fingerprint}) == len(changes) + 1


def test_an_inconsistent_pack_is_a_bug(sequences: Sequences) -> None:
    parts = {name: getattr(sequences, name) for name in ARRAYS} | {"domain_names": sequences.domain_names}
    for wrong in (
        {"times": sequences.times[::-1]},
        {"domains": 1 - sequences.domains},
        {"offsets": [0, 12, 5, 12, 12]},
    ):
        with pytest.raises(AssertionError):
            Sequences.pack(**(parts | wrong))


def test_a_directory_without_sequences_or_with_a_cut_array_says_what_to_do(
    sequences: Sequences, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="prepare the dataset again"):
        Sequences.load(tmp_path)
    sequences.save(tmp_path)
    whole = (tmp_path / "items.npy").read_bytes()
    (tmp_path / "items.npy").write_bytes(whole[:-4])
    with pytest.raises(DataError, match="prepare the dataset again"):
        Sequences.load(tmp_path)
