"""KuaiRand (Gao et al. 2022, arXiv:2208.08696): short videos, some of them put in at random."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from jaxtyping import Int64

from recsys.data.schema import DataError
from recsys.offpolicy.feedback import FeedbackSource, LoggedFeedback, feedback_schema, one_domain
from recsys.offpolicy.propensity import ItemFrequency

_REWARDS = {
    "is_click": "click",
    "is_like": "like",
    "is_follow": "follow",
    "is_comment": "comment",
    "is_forward": "forward",
    "is_hate": "hate",
    "long_view": "long_view",
}
_COLUMNS = ["user_id", "video_id", "time_ms", "is_rand", *_REWARDS]


def read_kuairand(
    paths: Sequence[Path], random_pool: int | None = None, propensity_model: ItemFrequency | None = None
) -> FeedbackSource:
    """The `log_*.csv` files as one log, one shown video per request.

    A randomly inserted video (`is_rand` 1) has the propensity 1 / `random_pool`: the number of videos that could be
    inserted, by default the number that were. The others were chosen by a policy that nobody logged, and are refused
    unless a propensity model is named; to read the random part alone, give only its file.
    """
    frame = pd.concat([_read(path) for path in paths], ignore_index=True)
    random = frame["is_rand"].to_numpy() == 1
    videos, item = np.unique(frame["video_id"].to_numpy(dtype=np.int64), return_inverse=True)
    inserted = len(np.unique(item[random]))
    pool = inserted if random_pool is None else random_pool
    if pool < inserted:
        raise DataError(f"{inserted:,} videos were inserted at random, which a pool of {pool:,} cannot hold")
    rows = np.arange(len(frame))
    columns = {
        "request": rows,
        "user": frame["user_id"].to_numpy(dtype=np.int64),
        "domain": np.zeros(len(rows), dtype=np.int16),
        "position": np.zeros(len(rows), dtype=np.int16),
        "item": item.astype(np.int32) + np.int32(1),
        "time": _seconds(frame),
        "propensity": pa.array(np.full(len(rows), 1 / max(pool, 1)), mask=~random),
        "marginal": pa.nulls(len(rows), pa.float64()),
    }
    columns |= {f"reward_{name}": frame[column].to_numpy(dtype=np.float64) for column, name in _REWARDS.items()}
    table = pa.table(columns, schema=feedback_schema(list(_REWARDS.values())))
    num_items = max(len(videos), pool)
    log = LoggedFeedback.from_table(table, num_items, ("video",), propensity_model)
    return FeedbackSource(log, one_domain("video", num_items), tuple(videos.astype(str)))


def _seconds(frame: pd.DataFrame) -> Int64[np.ndarray, " rows"]:
    return frame["time_ms"].to_numpy(dtype=np.int64) // 1000


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_csv(path, usecols=_COLUMNS)
    except FileNotFoundError:
        raise DataError(f"{path}: there is no such file") from None
    except ValueError as error:
        raise DataError(f"{path} is not a log of KuaiRand: {error}") from None
