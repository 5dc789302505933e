"""Open Bandit Dataset (Saito et al. 2021, arXiv:2008.07146): fashion items shown by two policies in three campaigns."""

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from recsys.data.schema import DataError
from recsys.offpolicy.feedback import FeedbackSource, LoggedFeedback, feedback_schema, one_domain

_COLUMNS = ["timestamp", "item_id", "position", "click", "propensity_score"]


def read_open_bandit(folder: Path) -> FeedbackSource:
    """The log of one policy and campaign, such as `open_bandit/bts/all`.

    A row is a request of its own: the source does not say which three of them stood on one page, nor who the user
    was, so every request counts as another user. Item a becomes item a + 1, positions 1..3 become 0..2.
    """
    campaign = folder.name
    context = _read(folder / "item_context.csv", ["item_id"])
    frame = _read(folder / f"{campaign}.csv", _COLUMNS)
    rows = np.arange(len(frame))
    time = pd.to_datetime(frame["timestamp"], format="ISO8601", utc=True).dt.as_unit("s").astype(np.int64)
    table = pa.table(
        {
            "request": rows,
            "user": rows,
            "domain": np.zeros(len(rows), dtype=np.int16),
            "position": frame["position"].to_numpy(dtype=np.int16) - np.int16(1),
            "item": frame["item_id"].to_numpy(dtype=np.int32) + np.int32(1),
            "time": time.to_numpy(),
            "propensity": pa.array(frame["propensity_score"].to_numpy(dtype=np.float64), from_pandas=True),
            "marginal": pa.nulls(len(rows), pa.float64()),
            "reward_click": frame["click"].to_numpy(dtype=np.float64),
        },
        schema=feedback_schema(["click"]),
    )
    log = LoggedFeedback.from_table(table, len(context), (campaign,))
    raw = tuple(str(item) for item in range(len(context)))
    return FeedbackSource(log, one_domain(campaign, len(context)), raw)


def _read(path: Path, columns: list[str]) -> pd.DataFrame:
    try:
        return pd.read_csv(path, usecols=columns)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file; a folder of Open Bandit is <policy>/<campaign>") from None
    except ValueError as error:
        raise DataError(f"{path} is not a file of Open Bandit: {error}") from None
