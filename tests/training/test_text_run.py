"""A run with item texts: where they are kept, what it reports of them, and what is refused before it starts."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from recsys.experiment import Experiment, load_data
from recsys.loading import ConfigError, parse_config
from recsys.training.run import evaluate_model, open_run, train

COMPATIBLE = "llm4cdsr_100_compat"
TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 120, "mean_events": 14, "max_events": 30},
        "max_len": 12,
        "text": {"name": "tfidf", "d_text": 12},
    },
    "model": {"name": "llm4cdsr", "d_model": 4, "d_text": 12, "d_ff": 4, "num_layers": 1},
    "loss": {"name": "bce"},
    "negatives": {"name": "uniform", "num_negatives": 1},
    "trainer": {"epochs": 1, "batch_size": 16, "device": "cpu"},
    "eval": {"protocols": ["full", COMPATIBLE], "ks": [10], "bootstrap_samples": 10},
}
CARD = """\
name: shop
title: A shop
source: made up
licence: none
format:
  name: table
  type: csv
  columns: {user: user, item: item, domain: domain, timestamp: time}
files:
  events.csv: {}
domains: [food, kitchen]
"""


def experiment(**changes: Any) -> Experiment:
    return parse_config(TINY | changes, Experiment, "test")


def test_a_run_reports_titles_and_opens_again(tmp_path: Path) -> None:
    config = experiment()
    output = io.StringIO()
    run = train(config, load_data(config.data, None), tmp_path, Console(file=output))
    assert "items with a title: 0.0% of domain_1, 0.0% of domain_2" in output.getvalue()
    assert run.read_final()["data"]["titles"] == {"domain_1": 0.0, "domain_2": 0.0}
    assert {"train/item_alignment", "train/user_alignment"} <= set(run.read_log()[0])
    assert f"test/macro/ndcg@10[{COMPATIBLE}]" in run.read_final()["metrics"]

    _, _, data, model = open_run(run.path, None)
    again = evaluate_model(model, config, data, config.eval, "test", torch.device("cpu"))
    assert again.ranks["greater"].to_pylist() == pq.read_table(run.ranks)["greater"].to_pylist()


def test_vectors_lie_beside_the_prepared_dataset(tmp_path: Path) -> None:
    (tmp_path / "cards").mkdir()
    (tmp_path / "cards/shop.yaml").write_text(CARD)
    (tmp_path / "raw/shop").mkdir(parents=True)
    rows = [
        f"{user},{item},{domain},{time}"
        for user in ("ann", "bob")
        for time, (item, domain) in enumerate(
            [("tea", "food"), ("pan", "kitchen"), ("rice", "food"), ("cup", "kitchen")]
        )
    ]
    (tmp_path / "raw/shop/events.csv").write_text("\n".join(["user,item,domain,time", *rows]) + "\n")
    titles = tmp_path / "titles.tsv"
    titles.write_text("asin\ttitle\ntea\tGreen tea\ncup\tTea cup\npan\tSteel pan\n")
    data = TINY["data"] | {
        "source": {"name": "dataset", "dataset": "shop"},
        "text": {"name": "tfidf", "d_text": 4, "titles": str(titles)},
    }

    def load(**changes: Any) -> Any:
        return load_data(experiment(data=data | changes).data, tmp_path)

    found = load()
    assert found.text.titled == {"food": 0.5, "kitchen": 1.0}
    [path] = (tmp_path / "processed/shop").glob("*/text-*.npy")
    assert load().fingerprint == found.fingerprint
    assert load(text=None).fingerprint != found.fingerprint
    titles.write_text(titles.read_text().replace("Steel", "Copper"))
    assert load().fingerprint != found.fingerprint, "another title is another run"
    assert path in (files := list(path.parent.glob("text-*.npy")))
    assert len(files) == 2
    meta = json.loads((path.parent / "meta.json").read_text())
    assert meta["dataset"] == "shop", "the folder is still that of the prepared dataset"


def test_a_model_of_texts_without_texts_is_refused(tmp_path: Path) -> None:
    config = experiment(data=TINY["data"] | {"text": None})
    with pytest.raises(ConfigError, match="llm4cdsr reads the items' texts"):
        train(config, load_data(config.data, None), tmp_path, Console(file=io.StringIO()))


def test_a_protocol_by_threads_is_refused_before_a_model_without_is_trained() -> None:
    with pytest.raises(ConfigError, match="the model 'sasrec' has a single one; use uni_100"):
        experiment(model={"name": "sasrec"})
    assert experiment(model={"name": "sasrec"}, eval={"protocols": ["uni_100"]}).eval.protocols == ("uni_100",)
