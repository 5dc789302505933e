"""A vector per item made of its title; where an item has none, of the training events it occurs with.

Encoded once and kept beside the prepared dataset, under a name that holds the hash of all that goes into it.
"""

import hashlib
import html
import json
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from pydantic import Field
from scipy.sparse import coo_array, csr_array, hstack
from torch import Tensor

from recsys.data.prepare import NamedItem
from recsys.data.raw import read_titles
from recsys.data.schema import DataError
from recsys.loading import Config
from recsys.types import PAD_ID, Catalog, TrainingEvents

RECIPE = 1
"""Raised when the same titles and events give other vectors, so that older files are not taken for them."""

_FEATURES = 1 << 14
"""Of words and of character n-grams, so many each: those in the most titles."""
_WORD = re.compile(r"\w+")
_WINDOW = 10
"""Events of a user so close together count as occurring together."""
_POWER = 3
"""Power iterations of the randomised SVD."""


class TfidfConfig(Config):
    """Latent semantic analysis: TF-IDF of words, pairs of words and character n-grams, then a truncated SVD."""

    name: Literal["tfidf"] = "tfidf"
    d_text: Annotated[int, Field(ge=1)] = 1024
    """Width of the vectors. What exceeds the rank of the titles is zero."""
    titles: Path | None = None
    """TSV with the columns `asin` (or `raw_item`) and `title`; it comes before the titles of the dataset itself."""

    def fingerprint(self) -> str:
        return str(self.d_text)

    def encode(self, titles: Sequence[str]) -> Float[np.ndarray, "titles d_text"]:
        return coordinates(csr_array(hstack([tfidf(titles, _words), tfidf(titles, _characters)])), self.d_text)


class SentenceTransformerConfig(Config):
    """A sentence encoder from a folder on disk (needs the extra `text`); nothing is ever downloaded."""

    name: Literal["sentence_transformer"] = "sentence_transformer"
    model_dir: Path
    """The folder of a model that sentence-transformers has saved."""
    d_text: Annotated[int, Field(ge=1)] | None = None
    """Width of the vectors, reached by a truncated SVD; null: the encoder's own."""
    titles: Path | None = None
    """TSV with the columns `asin` (or `raw_item`) and `title`; it comes before the titles of the dataset itself."""

    def fingerprint(self) -> str:
        """Over the content of the model's files, wherever they lie. Raises DataError if there are none."""
        files = sorted(path for path in self.model_dir.rglob("*") if path.is_file())
        if not files:
            raise DataError(
                f"data.text.model_dir: there is no model in {self.model_dir}; name a folder that holds one saved by "
                "sentence-transformers (nothing is downloaded), or use data.text.name=tfidf"
            )
        digest = hashlib.sha256(str(self.d_text).encode())
        for path in files:
            digest.update(str(path.relative_to(self.model_dir)).encode())
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def encode(self, titles: Sequence[str]) -> Float[np.ndarray, "titles d_text"]:
        """Raises DataError without the package, for a folder it cannot read, and for a width it does not reach."""
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError:
            raise DataError(
                "data.text.name=sentence_transformer needs the package sentence-transformers: "
                "pip install 'recsys[text]', or use data.text.name=tfidf"
            ) from None
        try:
            model = SentenceTransformer(str(self.model_dir), local_files_only=True)
        except (OSError, ValueError, KeyError) as error:
            raise DataError(
                f"data.text.model_dir: {self.model_dir} does not hold a model that sentence-transformers can read: "
                f"{error}"
            ) from None
        vectors = np.asarray(model.encode(list(titles), show_progress_bar=False), dtype=np.float32)
        if self.d_text is None:
            return vectors
        if self.d_text > vectors.shape[1]:
            raise DataError(
                f"data.text.d_text is {self.d_text} and the encoder in {self.model_dir} gives {vectors.shape[1]} "
                "numbers; lower it, or set it to null"
            )
        return coordinates(vectors, self.d_text)


TextConfig = Annotated[TfidfConfig | SentenceTransformerConfig, Field(discriminator="name")]


@dataclass(frozen=True)
class ItemText:
    """What an experiment knows of the items' texts."""

    vectors: Float[Tensor, "items d_text"]
    """Row per item id, of length one; zeros at padding, and for an item with neither a title that shares anything with
    another one nor another item within a few training events of it."""
    titled: dict[str, float]
    """Share of the items of each domain that have a title."""
    fingerprint: str
    """Changes with any title, with the encoder, and, where a title is missing, with the training events."""


def item_titles(items: Sequence[NamedItem], num_items: int, path: Path | None) -> tuple[str | None, ...]:
    """The title of every item id (None at padding and where there is none).

    `path`: a file of more titles by raw id, which win.
    Raises DataError if none of its ids is an item.
    """
    more = {} if path is None else read_titles(path)
    names = [item.raw for item in items]
    if more and more.keys().isdisjoint(names):
        raise DataError(
            f"data.text.titles: none of the {len(more):,} ids in {path} is an item of this dataset "
            f"(ids there: {', '.join(list(more)[:3])}; here: {', '.join(names[:3]) or 'items have no names'})"
        )
    titles: list[str | None] = [None] * (1 + num_items)
    for item in items:
        titles[item.item] = more.get(item.raw, item.title) or None
    return tuple(titles)


def encode_items(
    config: TextConfig,
    titles: Sequence[str | None],
    catalog: Catalog,
    events: TrainingEvents,
    directory: Path | None,
) -> ItemText:
    """The vectors of all items, read from `directory` where it has them; None keeps nothing.

    Titles are encoded by `config`. An item without one gets its coordinates in the co-occurrence of the training
    events (`cooccurrence`), turned onto the axes of the titles by the rotation that brings the items with both
    closest together (orthogonal Procrustes).
    """
    titled = np.array([bool(title) for title in titles])
    fingerprint = _fingerprint(config, titles, events, bool(titled[1:].all()))
    path = None if directory is None else directory / f"text-{fingerprint[:16]}.npy"
    if path is not None and path.is_file():
        vectors = _read(path)
    else:
        vectors = _encode(config, titles, titled, events)
        if path is not None:
            _write(path, vectors)
    domain = catalog.item_domain.cpu().numpy()
    shares = {name: float(titled[domain == index].mean()) for index, name in enumerate(catalog.domain_names)}
    return ItemText(torch.from_numpy(vectors), shares, fingerprint)


def _fingerprint(config: TextConfig, titles: Sequence[str | None], events: TrainingEvents, complete: bool) -> str:
    digest = hashlib.sha256(json.dumps([RECIPE, config.name, config.fingerprint(), list(titles)]).encode())
    if not complete:
        for tensor in (events.items, events.offsets):
            digest.update(tensor.cpu().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _encode(
    config: TextConfig, titles: Sequence[str | None], titled: Bool[np.ndarray, " items"], events: TrainingEvents
) -> Float[np.ndarray, "items d_text"]:
    known = [title for title in titles if title]
    if known:
        encoded = config.encode(known)
    elif config.d_text is not None:
        encoded = np.zeros((0, config.d_text), dtype=np.float32)
    else:
        raise DataError(
            "data.text: no item has a title, so nothing says how wide the vectors are; give a file of titles "
            "(data.text.titles), or a width (data.text.d_text)"
        )
    vectors = np.zeros((len(titles), encoded.shape[1]), dtype=np.float32)
    vectors[titled] = _unit(encoded)
    missing = ~vectors.any(axis=1) & (np.arange(len(titles)) != PAD_ID)
    if missing.any():
        behaviour = _unit(coordinates(cooccurrence(events, len(titles)), vectors.shape[1]))
        left, _, right = np.linalg.svd(behaviour.T @ vectors)
        vectors[missing] = (behaviour @ (left @ right))[missing]
    return vectors


def cooccurrence(events: TrainingEvents, num_rows: int) -> csr_array:
    """Positive pointwise mutual information of items that a user met within a few events of each other.

    ppmi(i, j) = max(0, log(n_ij n / (n_i n_j))), where n_ij counts pairs of events, in either order, and n_i and n
    are its sums.
    """
    items = events.items.cpu().numpy()
    user = np.repeat(np.arange(len(events.offsets) - 1), np.diff(events.offsets.cpu().numpy()))
    rows, columns = [], []
    for lag in range(1, min(_WINDOW, len(items) - 1) + 1):
        together = (user[lag:] == user[:-lag]) & (items[lag:] != items[:-lag])
        rows.append(items[lag:][together])
        columns.append(items[:-lag][together])
    pairs = (np.concatenate([*rows, *columns, []]).astype(np.int64), np.concatenate([*columns, *rows, []]).astype(int))
    counts = csr_array(coo_array((np.ones(len(pairs[0])), pairs), shape=(num_rows, num_rows)))
    counts.sum_duplicates()
    total = counts.sum(axis=1)
    row = np.repeat(np.arange(num_rows), np.diff(counts.indptr))
    information = np.log(counts.data * total.sum() / (total[row] * total[counts.indices]))
    counts.data = np.maximum(information, 0).astype(np.float32)
    return counts


def tfidf(titles: Sequence[str], grams: Callable[[str], Iterator[str]]) -> csr_array:
    """Titles x grams: (1 + log tf) (1 + log((1 + titles) / (1 + df))), rows of length one.

    A gram of a single title relates it to no other and is left out; so a row may be all zero.
    """
    frequency = Counter(gram for title in titles for gram in set(grams(title)))
    kept = sorted((gram for gram, count in frequency.items() if count > 1), key=lambda gram: (-frequency[gram], gram))
    column = {gram: index for index, gram in enumerate(kept[:_FEATURES])}
    columns: list[int] = []
    counts: list[int] = []
    ends = [0]
    for title in titles:
        found = Counter(column[gram] for gram in grams(title) if gram in column)
        columns += found.keys()
        counts += found.values()
        ends.append(len(columns))
    places = np.array(columns, dtype=np.int64)
    rarity = 1 + np.log((1 + len(titles)) / (1 + np.array([frequency[gram] for gram in column], dtype=np.float64)))
    values = (1 + np.log(np.array(counts, dtype=np.float64))) * rarity[places]
    row = np.repeat(np.arange(len(titles)), np.diff(ends))
    length = np.sqrt(np.bincount(row, weights=values**2, minlength=len(titles)))
    data = (values / length[row]).astype(np.float32)
    return csr_array((data, places, np.array(ends)), shape=(len(titles), len(column)))


def _words(title: str) -> Iterator[str]:
    words = _WORD.findall(_plain(title))
    yield from words
    yield from map(" ".join, pairwise(words))


def _characters(title: str) -> Iterator[str]:
    for word in _WORD.findall(_plain(title)):
        padded = f" {word} "
        for size in (3, 4, 5):
            for start in range(len(padded) - size + 1):
                yield padded[start : start + size]


def _plain(title: str) -> str:
    return unicodedata.normalize("NFKC", html.unescape(title)).casefold()


def coordinates(matrix: csr_array | Float[np.ndarray, "rows columns"], width: int) -> Float[np.ndarray, "rows width"]:
    """U S of the truncated SVD, zeros beyond the rank; the largest entry of each column, by size, is positive.

    Randomised (Halko, Martinsson & Tropp, 2011), from a fixed seed. Singular values below some thousandths of the
    largest count as zero.
    """
    found = np.zeros((matrix.shape[0], width), dtype=np.float32)
    size = min(width + 16, *matrix.shape)
    if size == 0:
        return found
    basis = matrix @ np.random.default_rng(0).standard_normal((matrix.shape[1], size), dtype=np.float32)
    for _ in range(_POWER):
        basis = matrix @ (matrix.T @ _orthonormal(basis))
    basis = _orthonormal(basis)
    values, axes = _gram(matrix.T @ basis)
    columns = (basis @ axes[:, :width].astype(np.float32)) * np.sqrt(values[:width]).astype(np.float32)
    largest = np.take_along_axis(columns, np.abs(columns).argmax(axis=0)[None], axis=0)
    found[:, : columns.shape[1]] = columns * np.where(largest < 0, -1, 1)
    return found


def _orthonormal(columns: Float[np.ndarray, "rows some"]) -> Float[np.ndarray, "rows rank"]:
    """An orthonormal basis of the span. By way of the Gram matrix: several times as fast as a QR decomposition, and
    the power iteration, which needs no more than columns that differ, leaves it well conditioned."""
    values, axes = _gram(columns)
    return columns @ (axes / np.sqrt(values)).astype(np.float32)


def _gram(columns: Float[np.ndarray, "rows some"]) -> tuple[Float[np.ndarray, " rank"], Float[np.ndarray, "some rank"]]:
    """Squared singular values, largest first, and right singular vectors of a matrix; those of rounding left out."""
    exact = columns.astype(np.float64)
    values, axes = np.linalg.eigh(exact.T @ exact)
    kept = np.flatnonzero(values > 1e-10 * values.max(initial=1e-30))[::-1]
    return values[kept], axes[:, kept]


def _unit(rows: Float[np.ndarray, "rows width"]) -> Float[np.ndarray, "rows width"]:
    """Rows of length one; a row of (nearly) nothing becomes zeros."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 1e-6)


def _read(path: Path) -> Float[np.ndarray, "items d_text"]:
    try:
        vectors: np.ndarray = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read ({error}); delete it, and it is made again") from None
    return vectors


def _write(path: Path, vectors: Float[np.ndarray, "items d_text"]) -> None:
    """Whole or not at all; two processes that write the same file write the same content."""
    fresh = path.with_name(f".{path.name}-{os.getpid()}")
    try:
        with fresh.open("wb") as file:
            np.save(file, vectors, allow_pickle=False)
        fresh.replace(path)
    except OSError as error:
        raise DataError(f"{path} could not be written: {error}; make room or grant access there") from None
    finally:
        fresh.unlink(missing_ok=True)
