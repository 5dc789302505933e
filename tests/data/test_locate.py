import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from recsys.data.cards import DatasetCard
from recsys.data.locate import find_raw, locate_raw, resolve_data_root
from recsys.data.schema import DataError

MakeCard = Callable[..., DatasetCard]


def lay(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("x")
    return folder


def test_the_data_root_comes_from_the_argument_the_environment_or_the_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RECSYS_DATA", raising=False)
    assert resolve_data_root() == Path("data")
    monkeypatch.setenv("RECSYS_DATA", "/somewhere")
    assert resolve_data_root() == Path("/somewhere")
    assert resolve_data_root("here") == Path("here")


def test_raw_files_are_looked_for_in_order(card: MakeCard, tmp_path: Path) -> None:
    made = card(folder="the_shop")
    folders = [tmp_path / "the_shop", tmp_path / "raw/the_shop", tmp_path / "raw/shop", tmp_path / "elsewhere"]
    assert find_raw(made, tmp_path) is None
    for folder in folders[:3]:
        lay(folder, "events.csv")
        assert find_raw(made, tmp_path) == {"events.csv": folder / "events.csv"}
    assert find_raw(made, tmp_path, lay(folders[3], "events.csv")) == {"events.csv": folders[3] / "events.csv"}


def test_a_folder_counts_only_with_all_the_files_it_needs(card: MakeCard, tmp_path: Path) -> None:
    made = card(
        files="{events.csv: {}, more.csv: {}, extra.csv: {optional: true}, old.csv: {alternative_to: more.csv}}"
    )
    folder = lay(tmp_path / "raw/shop", "events.csv", "extra.csv")
    assert find_raw(made, tmp_path) is None
    lay(folder, "old.csv")
    found = {"events.csv": "events.csv", "extra.csv": "extra.csv", "more.csv": "old.csv"}
    assert find_raw(made, tmp_path) == {name: folder / file for name, file in found.items()}
    lay(folder, "more.csv")
    assert find_raw(made, tmp_path)["more.csv"] == folder / "more.csv"  # type: ignore[index]


def test_missing_files_are_one_error_with_all_there_is_to_know(card: MakeCard, tmp_path: Path) -> None:
    made = card(files="{events.csv: {}, extra.csv: {optional: true}}", source="the shop's own page", folder="the_shop")
    lay(tmp_path / "raw/shop", "extra.csv")
    with pytest.raises(DataError) as caught:
        locate_raw(made, tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / 'raw/shop'}: no events.csv" in message
    assert f"{tmp_path / 'raw/the_shop'}: no such folder" in message
    assert f"{tmp_path / 'the_shop'}: no such folder" in message
    assert "files needed: events.csv (used if there: extra.csv)" in message
    assert "source: the shop's own page" in message
    with pytest.raises(DataError) as caught:
        locate_raw(made, tmp_path, tmp_path / "nowhere")
    assert "nowhere: no such folder" in str(caught.value)
    assert "raw/shop" not in str(caught.value)


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path / "web"`."""
    web = lay(tmp_path / "web")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(web))) as http:
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{http.server_port}"
        http.shutdown()
        thread.join()


def test_files_with_an_address_are_fetched_and_checked(card: MakeCard, tmp_path: Path, server: str) -> None:
    (tmp_path / "web/events.csv").write_text("the right content")
    sha256 = hashlib.sha256(b"the right content").hexdigest()
    good = card(files=f"{{events.csv: {{url: '{server}/events.csv', sha256: {sha256}}}}}")
    paths = locate_raw(good, tmp_path)
    assert paths == {"events.csv": tmp_path / "raw/shop/events.csv"}
    assert paths["events.csv"].read_text() == "the right content"
    (tmp_path / "web/events.csv").unlink()
    assert locate_raw(good, tmp_path) == paths  # it is there now, nothing is fetched


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_wrong_or_absent_download_leaves_nothing(
    card: MakeCard, tmp_path: Path, server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the tries
    (tmp_path / "web/events.csv").write_text("an error page")
    sha256 = hashlib.sha256(b"the right content").hexdigest()
    for name in ("events.csv", "absent.csv"):
        made = card(files=f"{{events.csv: {{url: '{server}/{name}', sha256: {sha256}}}}}")
        with pytest.raises(DataError) as caught:
            locate_raw(made, tmp_path)
        assert f"events.csv of shop could not be fetched from {server}/{name}" in str(caught.value)
        assert "by hand" in str(caught.value)
        assert not list((tmp_path / "raw").rglob("*.csv"))
    gc.collect()  # pooch leaves the socket of a failed request to the garbage collector
