import json
from pathlib import Path

import pytest

from recsys.results import RunDirectory, RunError, arms_of, atomic, find_runs, fingerprint, load, write_json, write_text


def finished(path: Path, name: str, value: float) -> RunDirectory:
    path.mkdir(parents=True)
    run = RunDirectory(path)
    write_text(run.config, f"name: {name}\n")
    metrics = {"test/macro/ndcg@10": {"value": value, "low": 0.0, "high": 1.0, "n": 7}}
    write_json(run.final, {"name": name, "seed": 3, "parameters": {"total": 10}, "metrics": metrics})
    write_json(run.environment, {"seconds": 1.5, "commit": "abc"})
    write_text(run.done, "")
    return run


def test_an_interrupted_write_leaves_the_earlier_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "final.json"
    write_text(path, "earlier")
    with pytest.raises(OSError, match="No space left"), atomic(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failure_is_never_a_number(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "final.json", {"value": float("nan")})
    assert not list(tmp_path.iterdir())


def test_states(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.state == "new"
    run.last.touch()
    assert run.state == "partial"
    run.failed.touch()
    assert run.state == "failed"
    run.done.touch()
    assert run.state == "done"


def test_the_directory_follows_config_and_data(tmp_path: Path) -> None:
    one = RunDirectory.of(tmp_path, "a", "seed: 0", "data")
    assert one == RunDirectory.of(tmp_path, "a", "seed: 0", "data")
    assert one.path.name.startswith("a-")
    assert (
        len(
            {one.path, *(RunDirectory.of(tmp_path, "a", c, d).path for c, d in [("seed: 1", "data"), ("seed: 0", "x")])}
        )
        == 3
    )
    assert fingerprint("ab", "c") != fingerprint("a", "bc")


def test_finding_and_loading(tmp_path: Path) -> None:
    finished(tmp_path / "runs" / "a-1", "a", 0.5)
    finished(tmp_path / "runs" / "b-1", "b", 0.25)
    partial = tmp_path / "runs" / "c-1"
    partial.mkdir()
    (partial / "config.yaml").touch()
    runs = find_runs([tmp_path / "runs"])
    assert [run.path.name for run in runs] == ["a-1", "b-1", "c-1"]
    table = load(runs)
    assert table[["run", "seed", "value", "n"]].to_numpy().tolist() == [["a-1", 3, 0.5, 7], ["b-1", 3, 0.25, 7]]
    assert table["arm"].tolist() == ["a", "b"]
    with pytest.raises(RunError, match="not finished"):
        RunDirectory(partial).read_final()
    with pytest.raises(RunError, match="no run directory"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_a_line_cut_short_is_left_out_of_the_log(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    assert run.read_log() == []
    run.log.write_text(json.dumps({"epoch": 1}) + "\n" + '{"epoch": 2, "lo')
    assert run.read_log() == [{"epoch": 1}]


def test_an_arm_is_one_config_with_several_seeds(tmp_path: Path) -> None:
    def run(folder: str, seed: int, epochs: int) -> RunDirectory:
        made = finished(tmp_path / folder, "a", 0.5)
        write_text(made.config, f"name: a\nseed: {seed}\ntrainer: {{epochs: {epochs}}}\n")
        write_json(made.final, json.loads(made.final.read_text()) | {"seed": seed})
        return made

    one, two, longer = run("1", 0, 3), run("2", 1, 3), run("3", 0, 9)
    assert arms_of([one, two]) == {"a": [one, two]}
    labels = arms_of([one, two, longer])
    assert list(labels.values()) == [[one, two], [longer]]
    assert all(label.startswith("a (") for label in labels)
    assert load([one, two, longer])["arm"].nunique() == 2
    with pytest.raises(RunError, match="a with seed 0 is given 2 times"):
        arms_of([one, run("4", 0, 3)])


@pytest.mark.parametrize("name", ["config", "final", "environment", "ranks"])
def test_a_damaged_file_is_named(name: str, tmp_path: Path) -> None:
    run = finished(tmp_path / "run", "a", 0.5)
    path = getattr(run, name)
    path.write_text("{")
    readers = {"config": run.arm, "final": run.read_final, "environment": run.read_environment, "ranks": run.read_ranks}
    with pytest.raises(RunError, match=rf"{path.name} cannot be read .* --overwrite"):
        readers[name]()
    path.unlink()
    with pytest.raises(RunError, match=rf"{path.name} cannot be read"):
        readers[name]()
