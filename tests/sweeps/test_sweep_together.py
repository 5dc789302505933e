"""A sweep whose runs are trained as one where they can be."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from recsys.scaling.records import read_table
from recsys.sweeps.execute import Desk, run_sweep
from recsys.sweeps.grouping import bundle
from recsys.sweeps.plan import Plan, load_sweep, make_plan
from recsys.training import together

TUNED = {"tuning": {"center": 0.01, "ratio": 30.0, "trials": 4}, "seeds": [0]}
NOISE = 1e-3
"""Relative, of what a table holds: a learning rate has four digits and may differ in the last."""


def plan_of(path: Path, *overrides: str) -> Plan:
    config, base = load_sweep(path, list(overrides))
    return make_plan(config, base, None)


def run(plan: Plan, directory: Path) -> pd.DataFrame:
    return run_sweep(
        plan,
        directory,
        data_root=None,
        shard=(1, 1),
        budget_minutes=None,
        retry=False,
        watch=lambda desk, running: None,
    )


def test_the_table_is_that_of_runs_one_after_another(tmp_path, write_sweep, monkeypatch):
    path = write_sweep(tmp_path, **TUNED, arms={"exchange": {}})
    run(plan_of(path), tmp_path / "apart")
    stacked = []
    step = together._stacked_step
    monkeypatch.setattr(together, "_stacked_step", lambda members, batch: stacked.append(step(members, batch)))
    run(plan_of(path, "together=8"), tmp_path / "together")
    assert stacked
    apart, one = (read_table(tmp_path / name).drop(columns="run") for name in ("apart", "together"))
    assert apart["state"].tolist() == ["done"]
    pd.testing.assert_frame_equal(one, apart, rtol=NOISE)
    trials = [pd.read_csv(tmp_path / name / "trials.csv") for name in ("apart", "together")]
    assert len(trials[0]) == 4
    pd.testing.assert_frame_equal(trials[1], trials[0], rtol=NOISE)


def test_what_differs_in_the_optimizer_alone_goes_together(tmp_path, write_sweep):
    grid = {"optim.weight_decay": [0.0, 0.1]}
    plan = plan_of(write_sweep(tmp_path, **TUNED, grid=grid))
    jobs = Desk(plan, tmp_path / "out").jobs(plan.cells)
    labels = [[job.label for job in own] for own in bundle(jobs, 8)]
    rates = ("0.01", "0.000333", "0.3")
    assert labels == [
        [f"weight_decay-{decay} {arm} 8, trial at {rate}" for decay in (0.0, 0.1) for rate in rates]
        for arm in ("none", "exchange")
    ]
    assert [len(own) for own in bundle(jobs, 4)] == [4, 4, 2, 2]
    assert bundle(jobs, 1) == [(job,) for job in jobs]


def test_what_a_pass_depends_on_keeps_runs_apart(tmp_path, write_sweep):
    arms = {name: {"set": {"optim.lr": rate}} for name, rate in (("one", 0.1), ("other", 0.2))}
    arms["batch"] = {"set": {"trainer.batch_size": 16}}
    path = write_sweep(tmp_path, arms=arms, seeds=[0])
    for change, sizes in (("set.trainer.epochs=3", [2, 1]), ("set.alignment_penalty=0.1", [1, 1, 1])):
        plan = plan_of(path, change)
        assert [len(own) for own in bundle(Desk(plan, tmp_path / "out").jobs(plan.cells), 8)] == sizes


def test_seeds_go_together_where_batches_have_one_shape(tmp_path, write_sweep):
    path = write_sweep(tmp_path, arms={"exchange": {}}, seeds=[0, 1, 2])
    for change, sizes in (("set.trainer.widths=1", [3]), ("set.trainer.widths=2", [1, 1, 1])):
        plan = plan_of(path, change)
        assert [len(own) for own in bundle(Desk(plan, tmp_path / "out").jobs(plan.cells), 8)] == sizes


def test_the_table_of_seeds_is_that_of_runs_one_after_another(tmp_path, write_sweep, monkeypatch):
    path = write_sweep(tmp_path, arms={"none": {"set": {"model.cross": None}}, "exchange": {}}, seeds=[0, 1, 2])
    run(plan_of(path, "set.trainer.widths=1"), tmp_path / "apart")
    stacked = []
    step = together._stacked_step
    monkeypatch.setattr(together, "_stacked_step", lambda *given: stacked.append(step(*given)))
    run(plan_of(path, "set.trainer.widths=1", "together=3"), tmp_path / "together")
    assert stacked
    apart, one = (read_table(tmp_path / name).drop(columns="run") for name in ("apart", "together"))
    assert apart["state"].tolist() == ["done"] * 6
    pd.testing.assert_frame_equal(one, apart, rtol=NOISE)


@pytest.mark.slow
def test_killed_within_a_group_and_started_again(tmp_path, write_sweep):
    path = write_sweep(tmp_path, **TUNED, arms={"exchange": {}})
    run(plan_of(path), tmp_path / "apart")
    command = [sys.executable, "-m", "recsys.cli", "sweep", str(path), "--output", str(tmp_path / "out")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*command, "--set", "together=8"], stdout=subprocess.DEVNULL, env=environment, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "out" / "runs").glob("*/last.ckpt")):
            assert process.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not list((tmp_path / "out" / "runs").glob("*/FAILED"))
    assert not (tmp_path / "out" / "table.csv").exists()
    run(plan_of(path, "together=8"), tmp_path / "out")
    apart, one = (read_table(tmp_path / name).drop(columns="run") for name in ("apart", "out"))
    pd.testing.assert_frame_equal(one, apart, rtol=NOISE)
