"""The probe of a run in training: it changes nothing, goes on after a cut, and can be made of a finished run."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from rich.console import Console

from recsys.experiment import Experiment, load_data
from recsys.loading import ConfigError, parse_config
from recsys.probes import ProbeConfig
from recsys.results import RunDirectory, RunError
from recsys.training.instruments import NoExchange, probe_run
from recsys.training.run import train

SMALL: dict[str, Any] = {
    "name": "small",
    "data": {
        "source": {"name": "synthetic", "num_users": 60, "items_per_domain": 60, "mean_events": 14, "max_events": 30},
        "max_len": 20,
    },
    "model": {
        "name": "cross_domain",
        "d_model": 8,
        "d_ff": 16,
        "num_layers": 1,
        "num_heads": 1,
        "cross": {"num_heads": 1},
    },
    "loss": {"name": "softmax"},
    "optim": {"lr": 1e-2},
    "trainer": {"epochs": 3, "batch_size": 16, "patience": None, "device": "cpu"},
    "eval": {"bootstrap_samples": 20},
    "probes": {"every": 2, "steps": [1]},
}


def run_it(runs_dir: Path, **changes: Any) -> RunDirectory:
    config = parse_config(SMALL | changes, Experiment, "test")
    return train(config, load_data(config.data, None), runs_dir, Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    return run_it(tmp_path_factory.mktemp("runs"))


def moments(run: RunDirectory) -> list[tuple[str, int, int]]:
    rows = run.read_probes().select(["label", "step", "epoch"]).to_pylist()
    return list(dict.fromkeys((row["label"], row["step"], row["epoch"]) for row in rows))


def test_it_measures_when_it_is_asked_to(probed: RunDirectory) -> None:
    log, chosen = probed.read_log(), probed.read_final()["selection"]["epoch"]
    steps = {record["epoch"]: record["step"] for record in log}
    assert moments(probed) == [
        ("initial", 0, 0),
        ("training", 1, 0),
        ("training", steps[2], 2),
        ("best", steps[chosen], chosen),
    ]
    table = probed.read_probes()
    ratio = table.filter(pc.and_(pc.equal(table["measure"], "alignment_ratio"), pc.equal(table["label"], "best")))
    first = table.filter(pc.and_(pc.equal(table["measure"], "alignment_ratio"), pc.equal(table["label"], "initial")))
    assert ratio["null_init"].to_pylist() == first["value"].to_pylist()
    if chosen == 2:
        trained = table.filter(pc.equal(table["epoch"], 2))
        assert trained.filter(pc.equal(trained["label"], "best"))["value"].null_count < len(trained)


def test_it_changes_no_number(probed: RunDirectory, tmp_path: Path) -> None:
    plain = run_it(tmp_path, probes=None)
    assert not plain.probes.exists()
    with_probes, without = (json.loads(run.final.read_text()) for run in (probed, plain))
    assert with_probes.pop("run") != without.pop("run")
    assert json.dumps(with_probes) == json.dumps(without)
    assert pq.read_table(plain.ranks).equals(pq.read_table(probed.ranks))
    path, table = probe_run(plain.path, None, ProbeConfig())
    assert path.probes.exists()
    whole = probed.read_probes()
    for label in ("initial", "best"):
        mine, theirs = (frame.filter(pc.equal(frame["label"], label)) for frame in (table, whole))
        assert mine.equals(theirs)


class Crash(Exception):
    pass


def test_a_cut_leaves_no_trace(probed: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from recsys.training.module import SequentialModule

    step = SequentialModule.training_step

    def training_step(self: SequentialModule, batch: Any, batch_idx: int) -> Any:
        if self.current_epoch == 2 and batch_idx == 1:
            raise Crash
        return step(self, batch, batch_idx)

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(SequentialModule, "training_step", training_step)
        run_it(tmp_path)
    [cut] = (RunDirectory(path) for path in tmp_path.iterdir())
    cut.failed.unlink()
    assert cut.state == "partial"
    assert moments(cut)[-1][0] == "training"
    again = run_it(tmp_path)
    assert again.final.read_bytes() == probed.final.read_bytes()
    assert again.read_probes().equals(probed.read_probes())


def test_probing_a_finished_run_keeps_its_trajectory(probed: RunDirectory) -> None:
    before = probed.read_probes()
    _, table = probe_run(probed.path, None, ProbeConfig())
    assert table.equals(before)
    assert probed.read_probes().equals(before)


def test_what_cannot_be_probed_is_named(tmp_path: Path) -> None:
    baseline = run_it(tmp_path, model=SMALL["model"] | {"cross": None})
    assert not baseline.probes.exists()  # the key may stay where the exchange goes
    with pytest.raises(NoExchange, match=r"model\.cross is null"):
        probe_run(baseline.path, None, ProbeConfig())
    with pytest.raises(RunError, match="recsys probe"):
        baseline.read_probes()
    with pytest.raises(ConfigError, match="alignment_penalty: this 'cross_domain' has no exchange"):
        parse_config(SMALL | {"model": SMALL["model"] | {"cross": None}, "alignment_penalty": 1.0}, Experiment, "test")


def test_a_penalty_moves_the_alignment_both_ways(tmp_path: Path) -> None:
    """Whatever the model gains or loses by it, what is pressed on gives way."""
    found = []
    for weight in (-3.0, 3.0):
        trainer = SMALL["trainer"] | {"epochs": 1, "batch_size": 8}
        run = run_it(tmp_path, alignment_penalty=weight, probes=None, trainer=trainer)
        found.append(run.read_log()[-1]["train/alignment"])
    aligned, orthogonal = found
    assert orthogonal < aligned


def test_alignment_by_hand() -> None:
    from recsys.models.attention import CrossConfig
    from recsys.probes.penalty import alignment

    unit = CrossConfig(num_heads=1).build(3)
    model = torch.nn.ModuleList([unit])
    with torch.no_grad():
        for part in (unit.attention.heads.key_value, unit.attention.heads.output):
            part.weight.zero_()
            part.bias.zero_()
        unit.attention.heads.output.bias.copy_(torch.tensor([1.0, 2, 0]))  # the output, whatever is read
    query = torch.tensor([[[3.0, 0, 4], [1, 2, 0], [1, 1, 1]]])
    mask = torch.tensor([[[True], [True], [False]]])  # the last has nothing to read and does not count
    with alignment(model) as mean_cos2:
        assert mean_cos2() == 0
        unit(query, torch.ones(1, 1, 3), mask)
        torch.testing.assert_close(mean_cos2(), torch.tensor((0.072 + 1) / 2))
    assert not unit.attention._forward_hooks
