"""The command as a person types it: what it prints, what it refuses and how."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from recsys.cli import app
from recsys.experiment import Experiment
from recsys.loading import dump_yaml, parse_config

CARD = """
name: shop
title: A small shop
source: made for this test
licence: none
format: {name: table, type: csv, columns: {user: who, item: what, domain: where, timestamp: when}, time_unit: s}
files: {events.csv: {}}
domains: [books, films]
"""

TINY: dict[str, Any] = {
    "name": "tiny",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 120, "mean_events": 14, "max_events": 30}
    },
    "model": {"name": "sasrec", "d_model": 8, "d_ff": 16, "num_layers": 1, "num_heads": 1},
    "loss": {"name": "softmax"},
    "trainer": {"epochs": 1, "batch_size": 16, "device": "cpu"},
    "eval": {"protocols": ["full", "uni_100"], "bootstrap_samples": 20, "permutations": 100},
}


def command(*words: object) -> Result:
    return CliRunner(env={"RECSYS_DATA": None, "COLUMNS": "160"}).invoke(app, [str(word) for word in words])


def refused(result: Result) -> str:
    """The one message of a command that was refused: no traceback, nothing on standard output."""
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    return result.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two finished runs of one experiment and one of another, and their configs."""
    place = tmp_path_factory.mktemp("work")
    popular = TINY | {"name": "popular", "model": {"name": "popularity"}, "loss": None}
    for values, seed in ((TINY, 0), (TINY, 1), (popular, 0)):
        path = place / f"{values['name']}.yaml"
        path.write_text(dump_yaml(parse_config(values, Experiment, "test")))
        result = command("train", "-c", path, "--runs-dir", place / "runs", "-s", f"seed={seed}")
        assert result.exit_code == 0, result.output
        assert "domain_1" in result.output
        assert "macro" in result.output
        assert "NDCG@10" in result.output
    return place


def runs(workplace: Path, name: str) -> list[Path]:
    return sorted((workplace / "runs").glob(f"{name}-*"))


def test_train_again_shows_the_numbers_of_the_finished_run(workplace: Path) -> None:
    again = command("train", "-c", workplace / "tiny.yaml", "--runs-dir", workplace / "runs")
    assert "is done" in again.output
    assert "NDCG@10" in again.output


def test_print_config_resolves_and_counts(workplace: Path) -> None:
    result = command("train", "-c", workplace / "tiny.yaml", "-s", "model.d_model=16", "--print-config")
    assert "d_model: 16" in result.output
    counts = {
        words[1]: int(words[2].replace(",", ""))
        for words in (line.split() for line in result.output.splitlines())
        if len(words) == 3 and words[0] == "#"
    }
    assert counts["item_table"] == 241 * 16
    assert counts["total"] == sum(count for group, count in counts.items() if group != "total")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-s", "model.d_modle=3"], "model.d_modle: unknown key; did you mean model.d_model?"),
        (["-s", "model.d_model=x"], "model.d_model: input should be a valid integer"),
        (["-s", "loss=null"], "loss: this key is missing"),
        (["-s", "loss={name: bce}"], "negatives: this key is missing; the loss 'bce' draws negatives"),
        (["-s", "loss={name: gbce}", "-s", "negatives={name: uniform, scope: all}"], "set negatives.scope to 'target_"),
        (["-s", "negatives={name: uniform}"], "nothing here draws negatives"),
        (["-s", "model.num_heads=3"], "num_heads"),
        (["-s", "data.domain=domain_3"], "domain_3"),
        (["-s", "trainer.device=cuda"], "sees no GPU"),
        (
            ["-s", "model={name: cross_domain, cross: {}}", "-s", "data.source.num_domains=1"],
            "an exchange needs at least two domains and the data has one; set `cross: null`",
        ),
        (["-s", "trainer.validate_every=9"], "no epoch would be validated"),
        (["-s", "data.source={name: dataset, dataset: amazon-akf}"], "did you mean amazon-afk?"),
    ],
)
def test_what_train_refuses(workplace: Path, tmp_path: Path, words: list[str], message: str) -> None:
    if "cuda" in words[1] and torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    result = command("train", "-c", workplace / "tiny.yaml", "--runs-dir", tmp_path / "runs", *words)
    assert message in refused(result)
    assert not list(tmp_path.glob("runs/*")), "nothing is left behind"


def test_train_without_its_data_says_what_to_do(workplace: Path, tmp_path: Path) -> None:
    source = "data.source={name: dataset, dataset: amazon-afk}"
    result = command("train", "-c", workplace / "tiny.yaml", "-s", source, "--data-root", tmp_path)
    assert "recsys data prepare amazon-afk --raw DIR" in refused(result)


def test_evaluate_gives_back_the_numbers_and_any_protocol(workplace: Path, tmp_path: Path) -> None:
    run = runs(workplace, "tiny")[0]
    output = tmp_path / "numbers.json"
    result = command("evaluate", run, "-p", "full", "-p", "uni_100", "-o", output)
    assert result.exit_code == 0, result.output
    numbers = json.loads(output.read_text())["metrics"]
    final = json.loads((run / "final.json").read_text())["metrics"]
    assert {key: numbers[key] for key in final} == final
    assert "test/macro/ndcg@10[uni_100]" in numbers
    assert (tmp_path / "numbers.ranks.parquet").exists()
    assert "eval.protocols" in refused(command("evaluate", run, "-p", "abxi_99")).replace("eval:\n  ", "eval.")
    assert "not a run directory" in refused(command("evaluate", workplace))


def test_compare_pairs_the_arms_and_pools_their_seeds(workplace: Path) -> None:
    both = (*runs(workplace, "popular"), *runs(workplace, "tiny"))
    result = command("compare", *both, "-f", "csv")
    assert result.exit_code == 0, result.output
    rows = [line.split(",") for line in result.output.splitlines()]
    assert rows[0][0] == "against popular"
    assert {row[0] for row in rows[1:]} == {"tiny"}
    assert {"test/macro/ndcg@10", "test/macro/ndcg@10[uni_100]"} < {row[1] for row in rows}
    assert "[uni_100]" in CliRunner(env={"COLUMNS": "220"}).invoke(app, ["compare", *map(str, both)]).output
    alone = command("compare", *runs(workplace, "popular"), *runs(workplace, "tiny"), "-d", "domain_2").output
    assert "domain_2" in alone
    assert "domain_1" not in alone
    assert "domain_3" in refused(command("compare", *both, "-d", "domain_3"))
    assert "there is no metric 'ndgc@10'" in refused(command("compare", *both, "-m", "ndgc@10"))
    assert "at least two arms" in refused(command("compare", *runs(workplace, "tiny")))


def test_compare_refuses_other_targets(workplace: Path, tmp_path: Path) -> None:
    split = ["-s", "data.split.name=per_domain_last", "-s", "name=other"]
    command("train", "-c", workplace / "tiny.yaml", "--runs-dir", tmp_path, *split)
    message = refused(command("compare", runs(workplace, "popular")[0], next(tmp_path.glob("other-*"))))
    assert "cannot be compared" in message
    assert "split" in message


def test_results_in_every_format(workplace: Path) -> None:
    markdown = command("results", workplace / "runs", "-f", "markdown", "-m", "hr@10").output.splitlines()
    assert markdown[0].startswith("| run | seed | parameters | time | HR@10 domain_1 |")
    assert len(markdown) == 2 + 3
    assert r"\toprule" in command("results", workplace / "runs", "-f", "latex").output
    assert command("results", workplace / "runs", "-f", "csv").output.startswith("run,seed,parameters,time,NDCG@10")
    assert "popular-" in command("results", workplace / "runs").output
    seeds = command("results", workplace / "runs", "--seeds", "-f", "csv").output.splitlines()
    assert seeds[0].startswith("experiment,seeds,NDCG@10 domain_1")
    assert {line.split(",")[1]: "±" in line for line in seeds[1:]} == {"1": False, "2": True}
    assert "no run directory" in refused(command("results", workplace / "nowhere"))
    assert "there are the metrics auc, cross_entropy" in refused(command("results", workplace / "runs", "-m", "ndcg@7"))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with the card of a small shop, and its raw files in the folder `here`."""
    root = tmp_path_factory.mktemp("shop")
    (root / "cards").mkdir()
    (root / "cards" / "shop.yaml").write_text(CARD)
    (root / "here").mkdir()
    lines = [
        f"{user},{domain}-{(step + user) % 7},{domain},{1_400_000_000 + 86_400 * step}"
        for user in range(12)
        for step, domain in enumerate((["books", "films"] if user % 2 else ["films", "books"]) * 3)
    ]
    (root / "here" / "events.csv").write_text("\n".join(["who,what,where,when", *lines, ""]))
    return root


def test_data_commands(shop: Path) -> None:
    raw = ("--raw", shop / "here", "--data-root", shop)
    prepared = command("data", "prepare", "shop", *raw)
    assert prepared.exit_code == 0, prepared.output
    for words in (["data", "describe", "shop"], ["data", "list"]):
        assert "books" in command(*words, "--data-root", shop).output
    assert "did you mean shop?" in refused(command("data", "describe", "shopp", "--data-root", shop))
    assert "file_order" in refused(command("data", "prepare", "shop", *raw, "--ties", "file_ordr"))


def test_missing_raw_files_are_named(tmp_path: Path) -> None:
    message = refused(command("data", "prepare", "amazon-afk", "--raw", tmp_path, "--data-root", tmp_path))
    assert "raw files of amazon-afk are missing" in message
    assert "afk_50_preprocessed.txt" in message


def test_recommend_for_a_history_of_nobody(shop: Path) -> None:
    command("data", "prepare", "shop", "--raw", shop / "here", "--data-root", shop)
    values = TINY | {"data": {"source": {"name": "dataset", "dataset": "shop"}}, "name": "shop"}
    (shop / "shop.yaml").write_text(dump_yaml(parse_config(values, Experiment, "test")))
    place = ("--runs-dir", shop / "runs", "--data-root", shop)
    trained = command("train", "-c", shop / "shop.yaml", *place)
    assert trained.exit_code == 0, trained.output
    [run] = (shop / "runs").iterdir()

    def asked(history: str, domain: str) -> Result:
        return command("recommend", run, "--history", history, "-d", domain, "-k", 4, "--data-root", shop)

    shown = asked("books-1,films-2,books-5", "books").output
    found = [name for name in (f"books-{k}" for k in range(7)) if name in shown]
    assert len(found) == 4
    assert not {"books-1", "books-5"} & set(found), "what the history has is not recommended"
    assert "films-" not in shown
    assert "did you mean books-1?" in refused(asked("bookz-1", "books"))
    assert "did you mean 'films'?" in refused(asked("books-1", "film"))
    assert "books-5" not in asked("books:books-1,films:films-2,books:books-5", "books").output

    alone = ("train", "-c", shop / "shop.yaml", *place, "--set")
    films = command(*alone, "data.domain=films")
    assert films.exit_code == 0, films.output
    run = next(path for path in (shop / "runs").iterdir() if path != run)
    assert "films-2" in asked("films-1", "films").output
    assert "knows nothing of books" in refused(asked("films-1", "books"))
    assert "knows nothing of books-2" in refused(asked("films-1,books-2", "films"))


def test_an_id_of_two_domains_must_say_which(tmp_path: Path) -> None:
    events = [f"{u},{i},{d},{10**9 + 9 * u + i}" for u in range(12) for i in range(4) for d in ("books", "films")]
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "events.csv").write_text("\n".join(["who,what,where,when", *events]) + "\n")
    (tmp_path / "cards").mkdir()
    card = CARD.replace("name: shop", "name: both") + "prepare: {items_in_two_domains: split}\n"
    (tmp_path / "cards" / "both.yaml").write_text(card)
    command("data", "prepare", "both", "--raw", tmp_path / "raw", "--data-root", tmp_path)
    values = TINY | {"data": {"source": {"name": "dataset", "dataset": "both"}}, "name": "both"}
    (tmp_path / "both.yaml").write_text(dump_yaml(parse_config(values, Experiment, "test")))
    trained = command("train", "-c", tmp_path / "both.yaml", "--runs-dir", tmp_path / "runs", "--data-root", tmp_path)
    assert trained.exit_code == 0, trained.output
    [run] = (tmp_path / "runs").iterdir()
    nobody = command("train", "-c", tmp_path / "both.yaml", "--data-root", tmp_path, "-s", "data.domain=books")
    assert "has no test target in books" in refused(nobody)

    def asked(history: str) -> Result:
        return command("recommend", run, "--history", history, "-d", "films", "-k", 4, "--data-root", tmp_path)

    assert "write books:1 or films:1" in refused(asked("1"))
    assert asked("films:1,books:2").exit_code == 0


def test_help_names_the_commands() -> None:
    done = subprocess.run([sys.executable, "-m", "recsys.cli", "--help"], capture_output=True, text=True, check=True)
    for name in ("train", "evaluate", "compare", "results", "data"):
        assert name in done.stdout
