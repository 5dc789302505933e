"""Vectors of titles: what they are made of, that they are kept, and that nothing of the test set is in them."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from recsys.data import text
from recsys.data.batches import make_catalog, training_events
from recsys.data.prepare import NamedItem
from recsys.data.schema import DataError
from recsys.data.sequences import Sequences
from recsys.data.split import TRAIN, LeaveOneOut, make_split
from recsys.data.text import (
    ItemText,
    SentenceTransformerConfig,
    TfidfConfig,
    cooccurrence,
    coordinates,
    encode_items,
    item_titles,
    tfidf,
)
from recsys.types import Catalog, TrainingEvents

TITLES = (None, "Green tea", "Black tea, 20 bags", "Rice", "Steel pan", "Steel cup", "Tea cup of steel")


def events_of(*users: Sequence[int]) -> TrainingEvents:
    items = torch.tensor([item for user in users for item in user])
    offsets = torch.tensor([0, *np.cumsum([len(user) for user in users])])
    return TrainingEvents(items, torch.arange(len(items)), offsets)


@pytest.fixture
def encode(sequences: Sequences):
    """Vectors for the six items of the small world."""
    split = make_split(sequences, LeaveOneOut())
    catalog, events = make_catalog(sequences, split), training_events(sequences, split)

    def make(titles=TITLES, directory=None, config=None, events=events) -> ItemText:
        return encode_items(config or TfidfConfig(d_text=8), titles, catalog, events, directory)

    return make


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many titles each call to the encoder was given."""
    calls: list[int] = []
    encode = TfidfConfig.encode

    def count(self: TfidfConfig, titles: Sequence[str]) -> np.ndarray:
        calls.append(len(titles))
        return encode(self, titles)

    monkeypatch.setattr(TfidfConfig, "encode", count)
    return calls


# What the vectors are


def test_tfidf_by_hand():
    """Words of "a b", "a a c", "b d": a and b are in two titles each; c, d and all pairs in one, and left out."""
    matrix = tfidf(["a b", "a a c", "b d"], str.split).toarray()
    np.testing.assert_allclose(matrix, [[2**-0.5, 2**-0.5], [1, 0], [0, 1]], rtol=1e-6)
    third = tfidf(["a b", "a a b", "a"], str.split).toarray()
    rare = 1 + np.log(4 / 3)
    row = np.array([1 + np.log(2), rare])
    np.testing.assert_allclose(third[1], row / np.linalg.norm(row), rtol=1e-6)


def test_words_pairs_and_characters():
    assert list(text._words("Café &amp; ＴＥＡ-pot")) == ["café", "tea", "pot", "café tea", "tea pot"]
    assert list(text._characters("tea")) == [" te", "tea", "ea ", " tea", "tea ", " tea "]


def test_cooccurrence_by_hand():
    """Pairs of user 1: (1,2), (1,3), (2,3); of user 2: (1,2). Counted in both orders: n = 8, n_1 = n_2 = 3, n_3 = 2."""
    matrix = cooccurrence(events_of([1, 2, 3], [2, 1]), 5).toarray()
    expected = np.zeros((5, 5))
    expected[1, 2] = expected[2, 1] = np.log(2 * 8 / (3 * 3))
    expected[1, 3] = expected[3, 1] = expected[2, 3] = expected[3, 2] = np.log(1 * 8 / (3 * 2))
    np.testing.assert_allclose(matrix, expected, rtol=1e-6)


def test_cooccurrence_ends_with_the_user_and_the_window():
    history = list(range(1, 14))
    matrix = cooccurrence(events_of(history, [14, 14, 15]), 16).toarray()
    assert matrix[1, 11] > 0
    assert matrix[1, 12] == 0
    assert matrix[13, 14] == 0
    assert not matrix.diagonal().any()
    assert not cooccurrence(events_of([1], []), 4).nnz


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)])
def test_coordinates_are_those_of_the_singular_value_decomposition(shape):
    matrix = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
    left, values, _ = np.linalg.svd(matrix, full_matrices=False)
    expected = left[:, :5] * values[:5]
    expected *= np.sign(expected[np.abs(expected).argmax(0), np.arange(5)])
    np.testing.assert_allclose(coordinates(matrix, 5), expected, atol=1e-4)


def test_coordinates_beyond_the_rank_are_zero():
    matrix = np.outer([1, 2, -3], [1, 1]).astype(np.float32)
    found = coordinates(matrix, 4)
    np.testing.assert_allclose(found[:, 0], np.array([-1, -2, 3]) * 2**0.5, rtol=1e-5)
    assert not found[:, 1:].any()
    assert not coordinates(0 * matrix, 4).any()
    assert coordinates(matrix[:0], 4).shape == (0, 4)


def test_a_large_matrix_is_approximated():
    """Fifty columns of a matrix whose spectrum falls: products of rows are kept."""
    generator = np.random.default_rng(0)
    matrix = (generator.standard_normal((300, 200)) / np.arange(1, 201)).astype(np.float32)
    found = coordinates(matrix, 50)
    exact = matrix @ matrix.T
    assert np.abs(found @ found.T - exact).max() < 0.05 * np.abs(exact).max()


def test_titles_that_share_words_are_close(encode):
    vectors = encode().vectors
    assert vectors.shape == (7, 8)
    assert vectors[0].eq(0).all()
    torch.testing.assert_close(vectors[[1, 2, 4, 5, 6]].norm(dim=1), torch.ones(5))
    assert vectors[3].eq(0).all(), "rice shares nothing with any title, and has no training event beside it"
    assert vectors[1] @ vectors[2] > 0.3 > abs(vectors[1] @ vectors[4])
    assert torch.equal(encode().vectors, vectors)


# Missing titles


def test_items_without_a_title_take_their_place_from_training_events(encode):
    """Item 6 has no title and goes with item 4; item 3 has none and no event beside it."""
    titles = (*TITLES[:3], None, *TITLES[4:6], None)
    training = events_of([4, 6, 5], [6, 4], [1, 2], [3])
    found = encode(titles, events=training)
    vectors = found.vectors
    assert vectors[3].eq(0).all()
    assert vectors[6].norm() == pytest.approx(1, abs=1e-5)
    assert vectors[6] @ vectors[4] > abs(vectors[6] @ vectors[1])
    torch.testing.assert_close(vectors[[1, 2, 4, 5]].norm(dim=1), torch.ones(4))
    assert found.titled == {"food": pytest.approx(2 / 3), "kitchen": pytest.approx(2 / 3)}


def test_behaviour_is_turned_onto_the_axes_of_the_titles():
    """Item 8 goes with the teas and item 9 with the pans, and that is where they lie: the axes of one space are not
    those of the other, whose first is here the other group."""
    titles = (None, "green tea", "black tea", "red tea", "steel pan", "steel cup", "steel pot", "iron pot", None, None)
    catalog = Catalog(("shop",), torch.tensor([-1] + [0] * 9), torch.zeros(10, dtype=torch.int64))
    events = events_of([1, 2, 8], [2, 3, 8, 1], [4, 9, 5], [6, 9, 4], [5, 6, 9, 7], [8, 3])
    vectors = encode_items(TfidfConfig(d_text=6), titles, catalog, events, None).vectors
    near = vectors @ vectors.T
    assert near[8, 1:4].min() > 0.5 > 0.1 > near[8, 4:8].abs().max()
    assert near[9, 4:8].min() > 0.4 > 0.1 > near[9, 1:4].abs().max()


def test_without_any_title_there_is_behaviour(encode):
    found = encode((None,) * 7, events=events_of([1, 2, 3], [4, 5, 6], [1, 3], [4, 6]))
    assert found.titled == {"food": 0, "kitchen": 0}
    assert found.vectors[1] @ found.vectors[3] > 0.1 > abs(found.vectors[1] @ found.vectors[6])


def test_a_title_like_no_other_counts_as_missing(encode):
    titles = ("", *TITLES[1:3], "Xyz", *TITLES[4:])
    vectors = encode(titles, events=events_of([1, 3, 2])).vectors
    assert vectors[3].norm() == pytest.approx(1, abs=1e-5)
    assert encode(titles, events=events_of([1, 2])).vectors[3].eq(0).all()


def test_no_event_but_of_training_is_read(sequences: Sequences, encode):
    """Other validation and test events leave the vectors as they are."""
    split = make_split(sequences, LeaveOneOut())
    held_out = split.role != TRAIN
    assert held_out.any()
    items = sequences.items.copy()
    items[held_out] = np.where(sequences.domains[held_out] == 0, 1 + items[held_out] % 3, 4 + items[held_out] % 3)
    other = Sequences.pack(
        items, sequences.domains, sequences.times, sequences.offsets, sequences.domain_names, sequences.item_domain
    )
    titles = (*TITLES[:3], None, *TITLES[4:6], None)
    before = encode(titles)
    after = encode(titles, events=training_events(other, make_split(other, LeaveOneOut())))
    assert not np.array_equal(items, sequences.items)
    assert torch.equal(after.vectors, before.vectors)
    assert after.fingerprint == before.fingerprint


# What is kept


def test_vectors_are_kept_and_read_again(encode, counted: list[int], tmp_path: Path):
    first = encode(directory=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"text-{first.fingerprint[:16]}.npy"]
    again = encode(directory=tmp_path)
    assert counted == [6]
    assert torch.equal(again.vectors, first.vectors)
    assert again.titled == first.titled


def test_what_goes_into_the_vectors_names_the_file(encode, tmp_path: Path):
    changed = (*TITLES[:6], "Tea cup")
    missing = (*TITLES[:6], None)
    found = [
        encode(directory=tmp_path),
        encode(changed, directory=tmp_path),
        encode(config=TfidfConfig(d_text=7), directory=tmp_path),
        encode(missing, directory=tmp_path),
        encode(missing, events=events_of([6, 4]), directory=tmp_path),
    ]
    assert len({part.fingerprint for part in found}) == len(list(tmp_path.iterdir())) == 5
    assert encode(events=events_of([6, 4])).fingerprint == found[0].fingerprint, "no title is missing: no event counts"
    assert encode(config=TfidfConfig(d_text=8, titles=Path("t.tsv"))).fingerprint == found[0].fingerprint


def test_a_damaged_file_and_a_folder_that_cannot_be_written(encode, tmp_path: Path):
    found = encode(directory=tmp_path)
    path = tmp_path / f"text-{found.fingerprint[:16]}.npy"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match="delete it, and it is made again"):
        encode(directory=tmp_path)
    with pytest.raises(DataError, match="could not be written"):
        encode(directory=tmp_path / "nowhere")


# Titles of one's own


def test_a_file_of_titles_comes_first(tmp_path: Path):
    rows = [(1, "B01", "Tea"), (2, "B02", None), (3, "B03", None), (4, "B04", "Pan")]
    items = [NamedItem(item, 0, raw, title) for item, raw, title in rows]
    path = tmp_path / "titles.tsv"
    path.write_text("item\tdomain\tasin\ttitle\n0\tA\tB01\tGreen tea\n1\tA\tB02\tRice\n2\tA\tB99\tSalt\n")
    assert item_titles(items, 5, None) == (None, "Tea", None, None, "Pan", None)
    assert item_titles(items, 5, path) == (None, "Green tea", "Rice", None, "Pan", None)
    path.write_text("raw_item\ttitle\nB03\tCup\n")
    assert item_titles(items, 4, path) == (None, "Tea", None, "Cup", "Pan")


def test_a_file_of_other_titles_is_refused(tmp_path: Path):
    path = tmp_path / "titles.tsv"
    path.write_text("asin\ttitle\nX1\tSalt\nX2\tSugar\n")
    with pytest.raises(DataError, match=r"none of the 2 ids .* \(ids there: X1, X2; here: B01\)"):
        item_titles([NamedItem(1, 0, "B01", None)], 1, path)
    with pytest.raises(DataError, match="here: items have no names"):
        item_titles([], 1, path)
    with pytest.raises(DataError, match="there is no such file"):
        item_titles([NamedItem(1, 0, "B01", None)], 1, tmp_path / "no.tsv")


# Sentence encoders


class Encoder:
    """Stands in for the package's class: three numbers of each title, in a folder that holds a `config.json`."""

    def __init__(self, name: str, local_files_only: bool = False) -> None:
        assert local_files_only
        if not (Path(name) / "config.json").exists():
            raise OSError("no config.json")

    def encode(self, titles: list[str], show_progress_bar: bool) -> np.ndarray:
        return np.array([[len(title), title.count("e"), 1.0] for title in titles])


@pytest.fixture
def model_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    package = ModuleType("sentence_transformers")
    package.SentenceTransformer = Encoder  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


def test_a_sentence_encoder_from_a_folder(encode, model_dir: Path):
    found = encode(config=SentenceTransformerConfig(model_dir=model_dir))
    expected = torch.tensor([[len(title), title.count("e"), 1.0] for title in TITLES[1:]])
    torch.testing.assert_close(found.vectors[1:], expected / expected.norm(dim=1, keepdim=True))
    assert encode(config=SentenceTransformerConfig(model_dir=model_dir, d_text=2)).vectors.shape == (7, 2)
    (model_dir / "config.json").write_text("{ }")
    assert encode(config=SentenceTransformerConfig(model_dir=model_dir)).fingerprint != found.fingerprint


def test_what_a_sentence_encoder_needs(encode, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = SentenceTransformerConfig(model_dir=model_dir)
    with pytest.raises(DataError, match=r"d_text is 4 and the encoder in .* gives 3 numbers"):
        encode(config=SentenceTransformerConfig(model_dir=model_dir, d_text=4))
    with pytest.raises(DataError, match="no item has a title"):
        encode((None,) * 7, config=config)
    with pytest.raises(DataError, match=r"there is no model in .*nowhere; .*nothing is downloaded"):
        encode(config=SentenceTransformerConfig(model_dir=tmp_path / "nowhere"))
    (model_dir / "config.json").rename(model_dir / "other.json")
    with pytest.raises(DataError, match=r"does not hold a model .*: no config\.json"):
        encode(config=config)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(DataError, match=r"pip install 'recsys\[text\]'"):
        encode(config=config)
