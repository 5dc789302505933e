"""KuaiRand: a few rows of its format."""

from pathlib import Path

import pytest

from recsys.data.schema import DataError
from recsys.offpolicy.kuairand import read_kuairand
from recsys.offpolicy.propensity import ItemFrequency

HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)


def write(path: Path, rows: list[tuple[int, int, int, int]]) -> Path:
    """Rows of user, video, click and is_rand."""
    lines = [
        f"{user},{video},20220422,700,{1650585133001 + 1000 * n},{click},0,0,0,0,0,{click},9,9,0,0,0,{random},1"
        for n, (user, video, click, random) in enumerate(rows)
    ]
    path.write_text(HEADER + "\n".join(lines) + "\n")
    return path


def test_random_videos_have_the_propensity_of_the_pool(tmp_path: Path) -> None:
    path = write(tmp_path / "log_random.csv", [(4, 70, 1, 1), (4, 20, 0, 1), (9, 70, 0, 1), (9, 31, 0, 1)])
    source = read_kuairand([path])
    assert source.raw_items == ("20", "31", "70")
    log = source.log
    assert log.items.tolist() == [[3], [1], [3], [2]]
    assert log.user.tolist() == [4, 4, 9, 9]
    assert log.time.tolist() == [1650585133, 1650585134, 1650585135, 1650585136]
    assert log.propensity.tolist() == [[1 / 3]] * 4
    assert list(log.rewards) == ["click", "like", "follow", "comment", "forward", "hate", "long_view"]
    assert log.rewards["click"].tolist() == [[1], [0], [0], [0]]
    larger = read_kuairand([path], random_pool=7583)
    assert larger.log.propensity.tolist() == [[1 / 7583]] * 4
    assert larger.catalog.num_items == larger.log.num_items == 7583


def test_a_pool_that_is_too_small(tmp_path: Path) -> None:
    path = write(tmp_path / "log_random.csv", [(4, 70, 1, 1), (4, 20, 0, 1)])
    with pytest.raises(DataError, match="2 videos were inserted at random, which a pool of 1 cannot hold"):
        read_kuairand([path], random_pool=1)


def test_chosen_videos_are_refused_without_a_model(tmp_path: Path) -> None:
    chosen = write(tmp_path / "log_standard.csv", [(4, 70, 1, 0), (4, 50, 0, 0), (5, 50, 0, 0)])
    random = write(tmp_path / "log_random.csv", [(4, 70, 1, 1), (4, 20, 0, 1)])
    with pytest.raises(DataError, match=r"3 problems\n  request 0, position 0: no propensity"):
        read_kuairand([chosen, random])
    log = read_kuairand([chosen, random], propensity_model=ItemFrequency(smoothing=0.0)).log
    assert log.propensity.tolist() == [[0.4], [0.4], [0.4], [0.5], [0.5]]
    assert log.propensities == "item_frequency"


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        read_kuairand([tmp_path / "log_random.csv"])
    (tmp_path / "log.csv").write_text("user_id,video_id\n1,2\n")
    with pytest.raises(DataError, match="not a log of KuaiRand"):
        read_kuairand([tmp_path / "log.csv"])
