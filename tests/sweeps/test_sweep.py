"""Sweeps: what they expand to, and that their table does not depend on how, where and how often they were started."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from recsys.cli import app
from recsys.errors import UserError
from recsys.loading import ConfigError
from recsys.results import RunDirectory
from recsys.scaling.match import NoMatch
from recsys.scaling.records import COLUMNS, exclusions, read_table, studies
from recsys.sweeps.execute import Desk, run_sweep
from recsys.sweeps.plan import Plan, load_sweep, make_plan

TUNED = {"tuning": {"center": 0.01, "ratio": 30.0, "trials": 3}}


def plan_of(path: Path, *overrides: str) -> Plan:
    config, base = load_sweep(path, list(overrides))
    return make_plan(config, base, None)


def run(plan: Plan, directory: Path, shard=(1, 1), budget_minutes=None, retry=False, watch=lambda desk, running: None):
    return run_sweep(
        plan, directory, data_root=None, shard=shard, budget_minutes=budget_minutes, retry=retry, watch=watch
    )


def tables(directory: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(directory.glob("*.csv"))]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, write_sweep) -> tuple[Path, list[bytes]]:
    """A tuned sweep: its file, and its tables."""
    folder = tmp_path_factory.mktemp("undisturbed")
    path = write_sweep(folder, **TUNED)
    run(plan_of(path), folder / "out")
    return path, tables(folder / "out")


@pytest.fixture(scope="module")
def plain(tmp_path_factory, write_sweep) -> tuple[Path, list[bytes]]:
    """One seed of each arm."""
    folder = tmp_path_factory.mktemp("plain")
    path = write_sweep(folder, seeds=[0])
    run(plan_of(path), folder / "out")
    return path, tables(folder / "out")


# What it expands to


def test_cells_are_arms_times_sizes_size_by_size(tmp_path, write_sweep):
    sizes = {"8": {"model.d_model": 8}, "16": {"model.d_model": 16}}
    plan = plan_of(write_sweep(tmp_path, sizes=sizes, grid={"model.dropout": [0.0, 0.1], "loss.temperature": [1.0]}))
    first = [("dropout-0.0_temperature-1.0", arm, size) for size in ("8", "16") for arm in ("none", "exchange")]
    assert [cell.key for cell in plan.cells[:4]] == first
    assert len(plan.cells) == 8
    assert plan.cells[3].experiment.name == "tiny-dropout-0.0_temperature-1.0-exchange-16"
    assert plan.cells[3].experiment.model.d_model == 16
    assert plan.cells[4].experiment.model.dropout == 0.1


def test_a_control_is_matched_at_every_size(tmp_path, write_sweep):
    arms = {"exchange": {}, "wide": {"match": "wide_ffn", "to": "exchange", "tolerance": 0.02}}
    arms["own"] = {"match": "self_attention", "to": "exchange"}
    sizes = {"8": {"model.d_model": 8}, "16": {"model.d_model": 16}}
    cells = {cell.key[1:]: cell for cell in plan_of(write_sweep(tmp_path, arms=arms, sizes=sizes)).cells}
    for size in sizes:
        treatment, wide, own = (cells[arm, size] for arm in arms)
        assert abs(wide.gap) <= 0.02
        assert wide.gap == pytest.approx(wide.parameters.dense / treatment.parameters.dense - 1)
        assert wide.experiment.model.cross is None
        assert own.parameters == treatment.parameters
        assert own.gap == 0
        assert own.experiment.model.cross.context == "own"
        assert treatment.gap is None


def test_flops_of_an_epoch_grow_with_its_batches(tmp_path, write_sweep):
    few, many = (plan_of(write_sweep(tmp_path), f"set.trainer.batch_size={size}").cells[0].flops for size in (32, 8))
    assert few.logits_step == pytest.approx(many.logits_step, rel=0.2)  # as many targets, in whatever batches
    assert few.step > 2 * few.forward


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"arms": {"a": {"match": "wide_ffn"}}}, "match and to go together"),
        ({"arms": {"a": {"match": "wide_ffn", "to": "b"}}}, "'b' is no arm without a match"),
        ({"arms": {"a": {}, "b": {"match": "deeper", "to": "a", "set": {"model.d_ff": 3}}}}, "set other keys only"),
        ({"seeds": [0, 0]}, "each seed once"),
        ({"tuning": {"center": 0.1, "seed": 1}}, "one of seeds"),
        ({"sizes": {"a/b": {"model.d_model": 8}}}, "part of a file name"),
        ({"sizes": {"8": {"model.d_modle": 8}}}, "did you mean model.d_model"),
        ({"arms": {"a": {}, "b": {}}}, "the same experiment"),
        ({"base": "bsae.yaml"}, "did you mean"),
    ],
)
def test_what_a_user_can_get_wrong(changes, says, tmp_path, write_sweep):
    with pytest.raises(ConfigError, match=says):
        plan_of(write_sweep(tmp_path, **changes))


def test_an_arm_is_not_called_matched_where_it_is_not(tmp_path, write_sweep):
    arms = {"exchange": {}, "wide": {"match": "wide_ffn", "to": "exchange", "tolerance": 1e-9}}
    with pytest.raises(NoMatch, match="d_ff"):
        plan_of(write_sweep(tmp_path, arms=arms))


# What it leaves


def test_the_table_has_a_row_per_run_with_its_numbers(undisturbed):
    path, _ = undisturbed
    table = read_table(path.parent / "out")
    assert list(table.columns) == list(COLUMNS)
    assert table["state"].tolist() == ["done"] * 4
    assert table["tuned"].tolist() == ["interior"] * 4
    none, exchange = table[table["arm"] == "none"], table[table["arm"] == "exchange"]
    assert (none["cross_attention"] == 0).all()
    assert (exchange["dense"] - none["dense"].iloc[0] == exchange["cross_attention"] + exchange["gate"]).all()
    for _, row in table.iterrows():
        final = RunDirectory(path.parent / "out" / "runs" / row["run"]).read_final()
        assert row["test_ndcg@10"] == final["metrics"]["test/macro/ndcg@10"]["value"]
        assert row["total"] == final["parameters"]["total"]
        assert row["ndcg@10"] == final["selection"]["value"]
    arm = studies(table)[0].arm("none", "dense parameters", "cross_entropy")
    assert arm.values.tolist() == none["cross_entropy"].tolist()


def test_every_arm_gets_the_same_learning_rates(undisturbed):
    import pandas as pd

    trials = pd.read_csv(undisturbed[0].parent / "out" / "trials.csv")
    assert trials.groupby("arm")["learning_rate"].apply(list).to_dict() == {
        "none": [0.0003333, 0.01, 0.3],
        "exchange": [0.0003333, 0.01, 0.3],
    }
    runs = list((undisturbed[0].parent / "out" / "runs").iterdir())
    assert len(runs) == 2 * (3 + 2)
    assert sum((run / "final.json").exists() for run in runs) == 4, "a trial ranks no test target"


def test_what_is_done_is_not_run_again(undisturbed):
    path, _ = undisturbed
    begun = []
    run(plan_of(path), path.parent / "out", watch=lambda desk, running: begun.extend(running))
    assert not begun


def test_a_failure_is_kept_and_is_no_number(tmp_path, write_sweep):
    arms = {"good": {}, "bad": {"set": {"optim.lr": 1e30}}}
    plan = plan_of(write_sweep(tmp_path, arms=arms, seeds=[0]))
    for _ in range(2):  # and is not run again
        table = run(plan, tmp_path / "out").set_index("arm")
        assert table["state"].to_dict() == {"good": "done", "bad": "failed"}
        assert table.loc["bad", "cross_entropy"] is not table.loc["good", "cross_entropy"]
        assert table.loc[["bad"], ["cross_entropy", "test_ndcg@10", "epochs"]].isna().all(axis=None)
    assert "failed" in exclusions(read_table(tmp_path / "out"))[0]
    [failed] = (tmp_path / "out" / "runs").glob("*/FAILED")
    assert "Traceback" in failed.read_text()
    before = failed.stat().st_mtime_ns
    run(plan, tmp_path / "out", retry=True)
    assert failed.stat().st_mtime_ns > before


def test_a_best_learning_rate_at_the_end_is_not_run(tmp_path, write_sweep):
    tuning = {"center": 1e-6, "ratio": 3.0, "trials": 3}
    table = run(plan_of(write_sweep(tmp_path, tuning=tuning, arms={"none": {}}, seeds=[0])), tmp_path / "out")
    assert table["state"].tolist() == ["edge"]
    assert table["cross_entropy"].isna().all()
    assert "raise tuning.trials" in exclusions(table)[0]


# However it was run


def test_shards_and_budgets_come_to_the_same_table(undisturbed, tmp_path):
    path, expected = undisturbed
    plan = plan_of(path)
    partly = run(plan, tmp_path, budget_minutes=0.0)
    assert partly["state"].tolist() == ["new"] * 4
    partly = run(plan, tmp_path, shard=(2, 2))
    assert partly["state"].tolist() == ["new"] * 2 + ["done"] * 2
    run(plan, tmp_path, shard=(1, 2))
    assert tables(tmp_path) == expected


def test_a_run_that_another_process_holds_is_waited_for(tmp_path, write_sweep):
    plan = plan_of(write_sweep(tmp_path, arms={"none": {}}, seeds=[0]))
    [job] = Desk(plan, tmp_path / "out").jobs(plan.cells)
    held, released = threading.Event(), threading.Event()

    def hold() -> None:
        with job.directory(tmp_path / "out" / "runs").held():
            held.set()
            released.wait(20)

    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(20)
    looks = []

    def watch(desk, running):
        looks.append(len(running))
        if len(looks) == 4:  # it was begun and came back twice
            released.set()
            holder.join()

    assert run(plan, tmp_path / "out", watch=watch)["state"].tolist() == ["done"]
    assert len(looks) > 4


@pytest.mark.slow
def test_killed_at_any_moment_and_started_again(undisturbed, tmp_path):
    path, expected = undisturbed
    command = [sys.executable, "-m", "recsys.cli", "sweep", str(path), "--output", str(tmp_path)]
    for moment in ("*/last.ckpt", "*/DONE"):  # within a trial; after a run that counts
        process = subprocess.Popen(
            command, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True
        )
        try:
            deadline = time.monotonic() + 120
            while not list((tmp_path / "runs").glob(moment)):
                assert process.poll() is None, "it ended before it could be killed"
                assert time.monotonic() < deadline
                time.sleep(0.01)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        assert not (tmp_path / "table.csv").exists()
    run(plan_of(path), tmp_path)
    assert tables(tmp_path) == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of Ray and submitit themselves
@pytest.mark.parametrize(
    ("package", "executor"),
    [
        ("ray", "{name: ray, workers: 2}"),
        ("submitit", "{name: slurm, cluster: debug}"),
        ("recsys", "{name: local, workers: 2}"),
    ],
)
def test_executors_come_to_the_same_table(package, executor, plain, tmp_path):
    pytest.importorskip(package, reason=f"needs the extra of {package}")
    path, expected = plain
    run(plan_of(path, f"executor={executor}"), tmp_path)
    assert tables(tmp_path) == expected


# The command


def test_dry_run_shows_parameters_gaps_and_time_and_runs_nothing(tmp_path, write_sweep):
    arms = {"exchange": {}, "wide": {"match": "wide_ffn", "to": "exchange", "tolerance": 0.02}}
    path = write_sweep(tmp_path, arms=arms)
    shown = CliRunner().invoke(app, ["sweep", str(path), "--dry-run", "--output", str(tmp_path / "out")])
    assert shown.exit_code == 0
    assert "% dense" in shown.stdout
    assert "minutes" in shown.stdout
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("shard", ["2", "0/2", "3/2", "a/b"])
def test_a_shard_is_i_of_n(shard, tmp_path, write_sweep):
    shown = CliRunner().invoke(app, ["sweep", str(write_sweep(tmp_path)), "--shard", shard])
    assert shown.exit_code == 2
    assert "--shard" in shown.stderr


def test_a_missing_package_is_named(monkeypatch, tmp_path, write_sweep):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"recsys\[ray\]"):
        run(plan_of(write_sweep(tmp_path), "executor={name: ray}"), tmp_path / "out")
