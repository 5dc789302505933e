import numpy as np
import pytest

from recsys.evaluation.seeds import generators, seed_states


@pytest.mark.parametrize("words", range(1, 10))
def test_seeds_are_mixed_as_numpy_mixes_them(words: int):
    seeds = np.random.default_rng(words).integers(0, 2**32, (50, words), dtype=np.uint32)
    seeds[:3] = [[0], [1], [2**32 - 1]]
    expected = [np.random.SeedSequence(row).generate_state(4, np.uint64) for row in seeds]
    np.testing.assert_array_equal(seed_states(seeds), expected)


def test_each_row_has_the_generator_of_its_own_seed():
    seeds = np.array([[0, 0, 0], [0, 7, 5], [7, 0, 5]], dtype=np.uint32)
    drawn = [generator.random(20).tolist() for generator in generators(seeds)]
    assert drawn == [np.random.default_rng(row).random(20).tolist() for row in seeds]


def test_no_seeds_no_generators():
    assert list(generators(np.zeros((0, 3), dtype=np.uint32))) == []
