import gzip
import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import scipy.io

from recsys.data.cards import DatasetCard
from recsys.data.locate import locate_raw, sources_of
from recsys.data.raw import RawEvents
from recsys.data.schema import DataError

MakeCard = Callable[..., DatasetCard]
Write = Callable[..., Path]

HEADER = "user\titem\tcategory\trating\thelpfulness\tunix_ts\n"
ROWS = [(6, 92, 2, 5, 4, 959670000), (10, 77, 1, 0, 4, 959756400), (6, 7, 1, 3, 0, 959756400)]
TEXT = HEADER + "".join("\t".join(map(str, row)) + "\n" for row in ROWS)


@pytest.fixture
def reviews(card: MakeCard) -> DatasetCard:
    return card(
        format="{name: ciao, ratings: ratings.tsv.gz}",
        files="{ratings.tsv.gz: {}, original.mat: {alternative_to: ratings.tsv.gz}}",
    )


def read(card: DatasetCard, folder: Path) -> RawEvents:
    return card.format.read(sources_of(card, locate_raw(card, folder, folder)), card.domains)


def matrix(**arrays: object) -> bytes:
    buffer = io.BytesIO()
    scipy.io.savemat(buffer, arrays)
    return buffer.getvalue()


def test_table_and_matrix_give_the_same_events(reviews: DatasetCard, write: Write) -> None:
    folder = write(gzip.compress(TEXT.encode()), "ratings.tsv.gz")
    raw = read(reviews, folder)
    assert raw.users.tolist() == ["6", "10"]
    assert raw.items.tolist() == ["7", "77", "92"]
    frame = raw.frame
    columns = ["user", "item", "domain", "timestamp", "rating"]
    assert frame[columns].to_numpy().tolist() == [
        [0, 2, 1, 959670000, 5],
        [1, 1, 0, 959756400, 0],
        [0, 0, 0, 959756400, 3],
    ]
    (folder / "ratings.tsv.gz").unlink()
    write(matrix(rating=np.array(ROWS)), "original.mat")
    other = read(reviews, folder)
    np.testing.assert_array_equal(other.frame[columns], frame[columns])
    assert other.files == ("original.mat",)
    assert other.frame["line"].tolist() == [1, 2, 3]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("10\t77", "ten\t77", "line 3: the user 'ten' is not a number"),
        ("10\t77", "10\t7.5", "line 3: the item 7.5 is not a whole number"),
        ("10\t77\t1", "10\t77\t3", "line 3: there is no category 3"),
        ("10\t77\t1", "10\t77\t0", "line 3: there is no category 0"),
        ("10\t77\t1\t0\t4\t959756400", "10\t77\t1\t0", "line 3: 4 fields, not 6"),
        (
            "10\t77\t1\t0\t4\t959756400",
            "10\t77\t1\t0\t4\t959756400000",
            "line 3: the timestamp 959756400000 is in milli",
        ),
        ("10\t77", "\t77", "line 3: the user"),
        ("unix_ts", "time", "no column 'unix_ts'"),
    ],
)
def test_bad_rows(reviews: DatasetCard, write: Write, old: str, new: str, said: str) -> None:
    assert old in TEXT
    folder = write(gzip.compress(TEXT.replace(old, new).encode()), "ratings.tsv.gz")
    with pytest.raises(DataError) as caught:
        read(reviews, folder)
    assert said in str(caught.value)


def test_bad_matrices(reviews: DatasetCard, write: Write) -> None:
    with pytest.raises(DataError, match="not a MATLAB file"):
        read(reviews, write(TEXT, "original.mat"))
    with pytest.raises(DataError, match=r"one matrix of the 6 columns .* it holds trust \(3, 2\)"):
        read(reviews, write(matrix(trust=np.ones((3, 2))), "original.mat"))
    cut = np.array(ROWS, dtype=float)
    cut[1, 1] = np.nan
    with pytest.raises(DataError, match="line 2: the item nan is not a whole number"):
        read(reviews, write(matrix(rating=cut), "original.mat"))
