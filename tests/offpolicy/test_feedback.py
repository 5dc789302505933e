"""Logged feedback: what goes into a file comes out of it, and what cannot be evaluated does not get in."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
from offpolicy_world import make_log

from recsys.data.schema import DataError
from recsys.offpolicy.feedback import LoggedFeedback, feedback_schema
from recsys.offpolicy.propensity import ItemFrequency


def log_of_slates(**changes: object) -> LoggedFeedback:
    values = {
        "items": np.array([[1, 2], [3, 1]]),
        "propensity": np.array([[0.5, 0.25], [0.1, 1.0]]),
        "rewards": {"click": np.array([[0.0, 1.0], [0.0, 0.0]]), "like": np.array([[1.0, 1.0], [0.0, 2.0]])},
        "num_items": 3,
        "domain_names": ("a", "b"),
        "domain": np.array([0, 1]),
        "user": np.array([7, 7]),
        "marginal": np.array([[0.5, 0.3], [0.1, 0.4]]),
    }
    return make_log(**(values | changes))  # type: ignore[arg-type]


def rows(**changes: list[object]) -> pa.Table:
    """Two requests with two items each, as a table."""
    columns: dict[str, list[object]] = {
        "request": [5, 5, 2, 2],
        "user": [1, 1, 1, 1],
        "domain": [0, 0, 0, 0],
        "position": [0, 1, 1, 0],
        "item": [1, 2, 3, 1],
        "time": [9, 9, 4, 4],
        "propensity": [0.5, 0.5, 0.5, 0.25],
        "marginal": [None] * 4,
        "reward_click": [0.0, 1.0, 0.5, 0.0],
    }
    schema = pa.schema([field.with_nullable(True) for field in feedback_schema(["click"])])
    return pa.table(columns | changes, schema=schema)


def read(table: pa.Table, model: ItemFrequency | None = None) -> LoggedFeedback:
    return LoggedFeedback.from_table(table, 3, ("a",), model)


@pytest.mark.parametrize("marginal", [True, False])
def test_round_trip(tmp_path: Path, marginal: bool) -> None:
    log = log_of_slates() if marginal else log_of_slates(marginal=None)
    log.to_parquet(tmp_path / "log.parquet")
    again = LoggedFeedback.from_parquet(tmp_path / "log.parquet")
    for name, value in vars(log).items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(again, name), value)
        elif name != "rewards":
            assert getattr(again, name) == value
    assert list(again.rewards) == ["click", "like"]
    for name, values in log.rewards.items():
        np.testing.assert_array_equal(again.rewards[name], values)
    assert [path.name for path in tmp_path.iterdir()] == ["log.parquet"]


def test_rows_come_in_any_order() -> None:
    log = read(rows())
    assert log.request.tolist() == [2, 5]
    assert log.items.tolist() == [[1, 3], [1, 2]]
    assert log.propensity.tolist() == [[0.25, 0.5], [0.5, 0.5]]
    assert (len(log), log.slots, log.marginal) == (2, 2, None)
    assert log.propensities == "logged"


def test_the_marginal_of_one_item_is_its_propensity() -> None:
    one = rows().filter(pa.array([True, False, False, True]))
    np.testing.assert_array_equal(read(one).marginal, [[0.25], [0.5]])


def test_rewards_are_weighed() -> None:
    log = log_of_slates()
    assert log.reward({"click": 1.0, "like": 3.0}).tolist() == [[3, 4], [0, 6]]
    with pytest.raises(DataError, match="no reward 'clik'; did you mean 'click'"):
        log.reward({"clik": 1.0})
    with pytest.raises(DataError, match="it has click, like"):
        log.reward({})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"propensity": np.array([[0.5, 0.0], [0.1, 1.0]])}, r"request 0, position 1: the propensity 0\.0 is no prob"),
        ({"propensity": np.array([[0.5, 1.1], [0.1, 1.0]])}, r"the propensity 1\.1 is no probability"),
        ({"propensity": np.array([[0.5, np.nan], [-0.1, 1.0]])}, r"logged feedback: 2 problems"),
        ({"marginal": np.array([[0.5, 0.3], [0.0, 0.4]])}, r"request 1, position 0: the marginal 0\.0"),
        ({"items": np.array([[1, 4], [3, 1]])}, r"item 4 is outside the catalogue 1\.\.3"),
        ({"items": np.array([[1, 2], [0, 1]])}, r"request 1, position 0: the item 0 is outside"),
        ({"items": np.array([[2, 2], [3, 1]])}, r"item 2 stands twice"),
        (
            {"rewards": {"click": np.array([[0.0, np.nan], [0.0, 0.0]])}},
            r"position 1: the reward 'click' nan is missing",
        ),
        ({"rewards": {}}, "at least one column reward_"),
        ({"domain": np.array([0, 2])}, r"the domain 2 is none of 0\.\.1"),
        ({"propensity": np.ones((2, 2))}, "deterministic policy .* epsilon > 0"),
    ],
)
def test_what_no_estimate_can_rest_on(changes: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        log_of_slates(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"request": [5, 5, 2, 5], "position": [0, 1, 0, 2]}, r"request 5 shows 3 items, most others 1"),
        ({"position": [0, 2, 1, 0]}, r"request 5 has the positions \[0, 2\]"),
        ({"position": [0, 0, 1, 0]}, r"request 5 has the positions \[0, 0\]"),
        ({"user": [1, 2, 1, 1]}, "request 5: more than one user"),
        ({"time": [9, 9, 4, 5]}, "request 2: more than one time"),
        ({"propensity": [0.5, None, 0.5, 0.25]}, r"request 5, position 1: no propensity\n.*Name a propensity model"),
        ({"propensity": [0.5, float("nan"), 0.5, 0.25]}, "propensity nan is no probability"),
        ({"reward_click": [0.0, None, 0.0, 0.0]}, "reward 'click' nan is missing"),
        ({"item": [1, None, 3, 1]}, "1 rows have no item"),
        ({name: [] for name in rows().column_names}, "no rows"),
    ],
)
def test_rows_that_are_refused(changes: dict[str, list[object]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(rows(**changes))


def test_a_named_model_fills_in_what_is_missing(tmp_path: Path) -> None:
    table = rows(propensity=[0.5, None, 0.5, None])
    log = read(table, ItemFrequency(smoothing=0.0))
    # Item 1 is both of the items at the top; item 2 one of two below it.
    assert log.propensity.tolist() == [[1.0, 0.5], [0.5, 0.5]]
    assert log.propensities == "item_frequency"
    log.to_parquet(tmp_path / "log.parquet")
    assert LoggedFeedback.from_parquet(tmp_path / "log.parquet").propensities == "item_frequency"
    assert read(rows(), ItemFrequency()).propensities == "logged"  # nothing was missing


def test_item_frequency_by_hand() -> None:
    item, domain, position = np.array([1, 1, 2, 9, 2]), np.array([0, 0, 0, 1, 0]), np.array([0, 0, 0, 0, 1])
    fitted = ItemFrequency(smoothing=1.0).fit(item, domain, position)
    assert fitted.tolist() == [3 / 5, 3 / 5, 2 / 5, 1.0, 2 / 3]


def with_metadata(table: pa.Table, metadata: dict[bytes, bytes]) -> pa.Table:
    return table.replace_schema_metadata(metadata)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: with_metadata(table, {}), "is not logged feedback"),
        (lambda table: with_metadata(table, {b"recsys.offpolicy": b'{"layout": 0}'}), "has layout 0"),
        (lambda table: table.drop_columns(["propensity"]), "'propensity' must be double, not missing"),
        (
            lambda table: table.set_column(4, "item", table["item"].cast(pa.int64())),
            "'item' must be int32, not int64",
        ),
    ],
)
def test_files_that_are_refused(tmp_path: Path, change: Callable[[pa.Table], pa.Table], message: str) -> None:
    path = tmp_path / "log.parquet"
    pyarrow.parquet.write_table(change(log_of_slates().to_table()), path)
    with pytest.raises(DataError, match=message):
        LoggedFeedback.from_parquet(path)


def test_no_file_and_no_parquet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        LoggedFeedback.from_parquet(tmp_path / "log.parquet")
    (tmp_path / "log.parquet").write_text("request,item\n")
    with pytest.raises(DataError, match="not a Parquet file"):
        LoggedFeedback.from_parquet(tmp_path / "log.parquet")
