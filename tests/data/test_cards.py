from collections.abc import Callable
from pathlib import Path

import pytest

from recsys.data.cards import DatasetCard, card_paths, load_card, shipped_cards
from recsys.data.schema import DataError
from recsys.loading import ConfigError, dump_yaml

MakeCard = Callable[..., DatasetCard]


def put(card: DatasetCard, root: Path) -> Path:
    """Writes a card where the data root keeps its cards."""
    path = root / "cards" / f"{card.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(dump_yaml(card))
    return path


@pytest.mark.parametrize("path", sorted(shipped_cards().glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cards_are_valid(path: Path, tmp_path: Path) -> None:
    card = load_card(path.stem, tmp_path)
    assert card.licence
    assert card.source


def test_the_published_pairs_of_abxi_are_known(tmp_path: Path) -> None:
    counts = {name: load_card(name, tmp_path).published.prepared for name in ("amazon-afk", "amazon-abe", "amazon-amb")}
    assert counts["amazon-afk"].test == {"food": 2419, "kitchen": 4725}  # type: ignore[union-attr]
    assert counts["amazon-abe"].events == {"beauty": 50329, "electronics": 63800}  # type: ignore[union-attr]
    assert counts["amazon-amb"].items == {"movie": 35712, "book": 90958}  # type: ignore[union-attr]


def test_a_card_of_the_data_root_comes_before_a_shipped_one(card: MakeCard, tmp_path: Path) -> None:
    path = put(card(name="amazon-afk", title="mine"), tmp_path)
    assert card_paths(tmp_path)["amazon-afk"] == path
    assert load_card("amazon-afk", tmp_path).title == "mine"
    assert load_card("ciao", tmp_path).title == "Ciao"


def test_an_unknown_dataset_suggests_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no dataset 'amazon_afk'; did you mean amazon-afk\?"):
        load_card("amazon_afk", tmp_path)
    with pytest.raises(DataError, match="known datasets: amazon-abe, amazon-afk"):
        load_card("zzz", tmp_path)


def test_name_and_file_must_agree(card: MakeCard, tmp_path: Path) -> None:
    path = put(card(), tmp_path)
    path.rename(path.with_name("store.yaml"))
    with pytest.raises(DataError, match="the card calls itself 'shop'"):
        load_card("store", tmp_path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"domain": "[food]"}, "domain: unknown key; did you mean domains?"),
        ({"domains": "[food, food]"}, "domains must be distinct"),
        ({"domains": "[food, macro]"}, "not called macro or micro"),
        ({"domains": "[food/drink]"}, "domains"),
        ({"domains": "[]"}, "domains"),
        ({"files": "{}"}, "files is empty"),
        ({"files": "{events.csv: {sha256: abc}}"}, "sha256"),
        ({"files": "{../events.csv: {}}"}, "files"),
        ({"files": "{events.csv: {}, b.csv: {alternative_to: a.csv}}"}, "there is no file a.csv"),
        ({"files": "{events.csv: {domain: toys}}"}, "'toys' is not under domains"),
        ({"prepare": "{domains: [toys]}"}, "'toys' (under prepare or published) is not under domains"),
        ({"published": "{prepared: {items: {toys: 3}}}"}, "'toys' (under prepare or published) is not under domains"),
        ({"prepare": "{tie: drop}"}, "prepare.tie: unknown key; did you mean prepare.ties?"),
        ({"prepare": "{filter: {name: kcore}}"}, "there is no 'kcore'; did you mean k_core?"),
        ({"format": "{name: tabel}"}, "there is no 'tabel'; did you mean table?"),
    ],
)
def test_a_bad_card_names_the_key(card: MakeCard, changes: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        card(**changes)
    assert said in str(caught.value)
