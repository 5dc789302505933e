"""The probe as a whole: every token once, the table complete and free of NaN, the chance levels beside the values."""

import dataclasses

import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch

from recsys.evaluation import DotScorer
from recsys.loading import ConfigError, parse_config
from recsys.probes import PROBES_SCHEMA, NonFiniteStates, ProbeConfig, probe, record, watch
from recsys.types import NO_DOMAIN

ALL = ProbeConfig(queries="all", folds=4, bins=10, subspace=2, samples=500)
PAIRED = ["alignment_ratio", "novelty_beyond_control", "cross_domain_share_beyond_control"]
"""Against pairs of users who share a batch."""
KEY = ["unit", "direction", "head", "position", "site", "query", "measure", "bin"]


@pytest.fixture(scope="module")
def run(make_model, make_batch, make_targets):
    def measure(model=None, batches=None, names=("a", "b"), config=ALL, **options):
        model = make_model() if model is None else model
        batches = [make_batch(20, seed=1), make_batch(13, seed=2, first_user=20)] if batches is None else batches
        table = probe(model, [make_targets(batch) for batch in batches], names, config, label="test", **options)
        assert table.schema == PROBES_SCHEMA
        for name in ("value", "low", "high", "null_isotropic", "null_shuffled", "null_covariance", "null_init"):
            assert not any(value != value for value in table[name].to_pylist() if value is not None), name
        return table.to_pandas()

    return measure


def one(table, measure, **where):
    where = {"unit": "early.0.0", "head": "all", "position": "all", "site": "output"} | where
    rows = table[table.measure == measure]
    for name, value in where.items():
        rows = rows[rows[name] == value]
    assert len(rows) == 1
    return rows.iloc[0]


def test_values_are_those_of_a_plain_loop(run, make_model, make_batch):
    model, batches = make_model(), [make_batch(20, seed=1), make_batch(13, seed=2, first_user=20)]
    queries, outputs, updates, users, silent = [], [], [], [], 0
    with record(model) as recorder, torch.no_grad():
        for batch in batches:
            model(batch)
            seen = recorder.units["early.0.0"]
            for row in range(len(seen.user)):
                for place in range(seen.real.shape[1]):
                    if seen.real[row, place] and seen.mask[row, place].any():
                        queries.append(seen.query[row, place])
                        outputs.append(seen.output[row, place])
                        updates.append(seen.update[row, place])
                        users.append(int(seen.user[row]))
                    elif seen.real[row, place]:
                        silent += 1
    x, y, g = torch.stack(queries).double(), torch.stack(outputs).double(), torch.stack(updates).double()
    cos = torch.cosine_similarity(x, y)
    table = run(model, batches)
    row = one(table, "cos2_mean", query="stream")
    assert row.value == pytest.approx(float((cos**2).mean()))
    assert row.tokens == len(cos)
    assert row.users == len(set(users))
    assert row.direction == "b->a"
    assert row.null_isotropic == pytest.approx(1 / 8)
    assert row.low < row.value < row.high
    assert one(table, "cos_abs_mean", query="stream").value == pytest.approx(float(cos.abs().mean()))
    silence = one(table, "silent_share", site="query")
    assert silence.value == pytest.approx(silent / (silent + len(cos)))
    assert silence.tokens == silent + len(cos)
    assert one(table, "norm_ratio", site="update").value == pytest.approx(float((g.norm(dim=1) / x.norm(dim=1)).mean()))
    parallel = ((x * g).sum(1) ** 2 / x.square().sum(1)).sum() / g.square().sum()
    assert one(table, "parallel_energy", site="update").value == pytest.approx(float(parallel))
    ratio = one(table, "alignment_ratio", query="stream")
    assert ratio.value == pytest.approx(row.value / row.null_shuffled)
    assert ratio.null_shuffled == 1
    assert ratio.null_isotropic == pytest.approx(1 / 8 / row.null_shuffled)
    assert ratio.null_covariance == pytest.approx(row.null_covariance / row.null_shuffled)
    histogram = table[(table.measure == "cos_histogram") & (table.unit == "early.0.0") & (table["query"] == "stream")]
    histogram = histogram[(histogram["head"] == "all") & (histogram.site == "output")]
    expected = torch.histc(cos, 10, -1, 1) / len(cos)
    assert histogram.value.tolist() == pytest.approx(expected.tolist())
    for column in ("value", "null_isotropic", "null_shuffled", "null_covariance"):
        assert histogram[column].sum() == pytest.approx(1)


def test_heads_and_bias_add_up(run):
    table = run()
    shares = table[(table.measure == "signed_share") & (table.unit == "early.0.0")]
    assert shares["head"].tolist() == ["0", "1", "bias"]
    assert shares.value.sum() == pytest.approx(1)


def test_directions_of_many_domains(run, make_model, make_batch):
    table = run(make_model(3), [make_batch(30, num_domains=3)], names=("a", "b", "c"))
    of_b = table[table.unit == "early.0.1"]
    assert set(of_b.direction) == {"*->b", "a->b", "c->b"}
    shares = of_b[(of_b.measure == "signed_share") & of_b.direction.isin(["a->b", "c->b"])].value.sum()
    bias = of_b[(of_b.measure == "signed_share") & (of_b["head"] == "bias")].value.sum()
    assert shares + bias == pytest.approx(1)


def test_values_do_not_depend_on_batches_or_padding(run, make_batch):
    batch = make_batch(16, seed=3)
    padding = dict(items=0, domains=NO_DOMAIN, times=0, targets=0, target_domains=NO_DOMAIN)
    padded = dataclasses.replace(
        batch,
        **{
            name: torch.nn.functional.pad(getattr(batch, name)[:, 3:], (3, 0), value=fill)
            for name, fill in padding.items()
        },
    )
    batch = padded.map(lambda t: t[:, 3:] if t.ndim > 1 else t)
    halves = [padded.map(lambda t, s=s: t[s]) for s in (slice(5), slice(5, None))]
    whole, parts = run(batches=[batch]), run(batches=halves)
    assert whole[KEY].equals(parts[KEY])
    assert whole.tokens.equals(parts.tokens)
    numbers, paired = ["value", "low", "high"], whole.measure.isin(PAIRED)
    pd.testing.assert_frame_equal(whole.loc[~paired, numbers], parts.loc[~paired, numbers], rtol=1e-4, atol=1e-5)


def test_what_is_not_asked_does_not_count_unless_wanted(run, make_batch):
    batch = make_batch(30)
    last = torch.full_like(batch.target_domains, NO_DOMAIN)
    last[:, -1] = 0
    batch = dataclasses.replace(batch, target_domains=last)
    table = run(batches=[batch], config=ALL.model_copy(update={"queries": "asked"}))
    assert one(table, "silent_share", site="query").tokens == 30
    assert one(table, "cos_mean", query="stream").tokens <= 30
    other = one(table, "cos_mean", query="stream", unit="early.0.1")
    assert other.tokens == 0
    assert other[["value", "low", "high", "null_shuffled"]].isna().all()
    assert one(run(batches=[batch]), "cos_mean", query="stream").tokens > 30


def test_positions_divide_the_tokens(run):
    table = run(config=ALL.model_copy(update={"positions": True}))
    rows = table[(table.unit == "early.0.1") & (table.measure == "cka")].set_index("position")
    assert {"0", "1-2", "3-6"} <= set(rows.index)
    assert rows.drop("all").tokens.sum() == rows.tokens["all"]


def test_rows_that_fill_up_a_batch_count_once(run, make_model, make_batch, make_targets):
    model, batch = make_model(), make_batch(7)
    batch = dataclasses.replace(batch, target_domains=torch.zeros_like(batch.items).masked_fill(~batch.mask, NO_DOMAIN))
    plain = run(model, [batch])
    with watch(model, ("a", "b"), ALL) as watching, torch.no_grad():
        DotScorer(model, rows=16).scores(batch, torch.arange(1, 5))
    filled = watching.table(label="test").to_pandas()
    assert plain.tokens.equals(filled.tokens)
    pd.testing.assert_series_equal(plain.value, filled.value, rtol=1e-4, atol=1e-5)


def test_watching_changes_nothing(make_model, make_batch):
    model, batch = make_model(), make_batch(6)
    with torch.no_grad():
        before = model(batch)
        with watch(model, ("a", "b"), ALL):
            assert torch.equal(model(batch), before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_same_at_initialisation(run, make_model, make_batch, make_targets):
    batches = [make_targets(make_batch(20))]
    start = probe(make_model(stir=None), batches, ("a", "b"), ALL, label="init", step=0, epoch=0)
    table = run(make_model(), [make_batch(20)], initial=start)
    start = start.to_pandas()
    assert table.null_init.tolist() == pytest.approx(start.value.tolist(), nan_ok=True)
    assert start.label.unique().tolist() == ["init"]
    assert start.step.unique().tolist() == [0]


def test_an_untrained_model_is_at_chance(run, make_model, make_batch):
    """The alignment ratio says what the cosine cannot: nothing here is aligned, whatever the states look like."""
    model = make_model(stir=None)
    table = run(model, [make_batch(400, seed=s, first_user=400 * s) for s in range(3)])
    for unit in ("early.0.0", "early.0.1"):
        assert one(table, "alignment_ratio", query="stream", unit=unit).value == pytest.approx(1, abs=0.15)


def test_an_aligned_output_is_found(run, make_model, make_batch):
    """A unit that reads its own history's average would be; here the output is made the query itself."""
    model = make_model()
    handle = model.early[0][0].attention.register_forward_hook(lambda _, given, output: given[0] * output.ne(0).any())
    table = run(model, [make_batch(40)])
    handle.remove()
    assert one(table, "cos_mean", query="stream").value == pytest.approx(1, abs=1e-6)
    assert one(table, "alignment_ratio", query="stream").low > 1
    assert one(table, "novelty").value < 0.01


def test_an_output_of_the_context_alone_is_new(run, make_model, make_batch):
    """Mean of the normalised context as output: the context explains all, the query no more than the control's."""
    model = make_model()

    def mean(module, given, _):
        mask = given[2].float()
        return mask @ module.context_norm(given[1]) / mask.sum(-1, keepdim=True).clamp(min=1)

    handle = model.early[0][0].attention.register_forward_hook(mean)
    table = run(model, [make_batch(200, seed=s, first_user=200 * s) for s in range(2)])
    handle.remove()
    assert one(table, "r2_context").value == pytest.approx(1, abs=1e-4)
    assert one(table, "cross_domain_share").low > 0.1


def test_the_control_reads_the_context_with_another_users_query(run, make_model, make_batch):
    """Histories are random here, so that a query and what it reads are related through the attention alone."""
    model = make_model()
    with torch.no_grad():
        for unit in model.early[0]:
            unit.attention.heads.query.weight.zero_()  # attention does not depend on who asks
    batches = [make_batch(200, seed=s, first_user=200 * s) for s in range(2)]
    blind = run(model, batches)
    row = one(blind, "novelty", unit="early.0.1")
    assert row.value == pytest.approx(1, abs=0.04)
    assert row.null_shuffled == pytest.approx(1, abs=0.04)
    assert one(blind, "novelty_beyond_control", unit="early.0.1").value == pytest.approx(row.value - row.null_shuffled)
    with torch.no_grad():
        for unit in model.early[0]:
            unit.attention.heads.query.weight.normal_(0, 4, generator=torch.Generator().manual_seed(0))
    seeing = one(run(model, batches), "novelty", unit="early.0.1")
    assert seeing.null_shuffled < 0.9  # now what is read depends on who asks
    assert abs(seeing.value - seeing.null_shuffled) > 0.01  # and it is others who ask


@pytest.mark.parametrize("heads", [1, 8])
@pytest.mark.parametrize("gate", ["sigmoid", "scalar", "none"])
def test_units_of_every_kind(heads, gate, run, make_model, make_batch):
    table = run(make_model(num_heads=heads, gate=gate, stir=None, num_units=2), [make_batch(12)])
    assert set(table["head"]) == {"all", "bias", *map(str, range(heads))}
    assert set(table.unit) == {f"early.{unit}.{domain}" for unit in (0, 1) for domain in (0, 1)}
    if gate == "scalar":  # tanh(0): the update is zero and has no direction
        assert one(table, "zero_share", site="update").value == 1
        assert pd.isna(one(table, "cos_mean", site="update").value)
        assert one(table, "norm_ratio", site="update").value == 0


@pytest.mark.parametrize("rows", [1, 2])
def test_hardly_anything_to_measure(rows, run, make_batch):
    table = run(batches=[make_batch(rows, seed=4)])
    assert len(table)
    if rows == 1:
        assert table.low.isna().all()
        assert table[table.measure == "cos_mean"].null_shuffled.isna().all()


def test_no_batches_give_rows_without_values(run):
    table = run(batches=[])
    assert (table.tokens == 0).all()
    assert (table.users == 0).all()
    assert table.value.isna().all()


def test_a_model_without_exchange_has_no_rows(make_batch, make_targets):
    from recsys.models import CrossDomainConfig
    from recsys.types import Catalog

    items = torch.arange(61) % 2
    items[0] = NO_DOMAIN
    model = CrossDomainConfig(d_model=8, d_ff=8, num_layers=1, num_heads=1).build(
        Catalog(("a", "b"), items, items), 12, torch.Generator()
    )
    table = probe(model.eval(), [make_targets(make_batch(3))], ("a", "b"), ALL, label="test")
    assert len(table) == 0
    assert table.schema == PROBES_SCHEMA


def test_a_diverged_model_is_not_measured(make_model, make_batch, make_targets):
    model = make_model()
    with torch.no_grad():
        model.early[0][1].attention.heads.output.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteStates, match=r"early\.0\.1"):
        probe(model, [make_targets(make_batch(9))], ("a", "b"), ALL, label="test")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_model_in_training_mode_is_refused(make_model, make_batch, make_targets):
    with pytest.raises(AssertionError, match="eval"):
        probe(make_model().train(), [make_targets(make_batch(3))], ("a", "b"), ALL, label="test")


def test_the_table_goes_through_parquet(make_model, make_batch, make_targets, tmp_path):
    table = probe(make_model(), [make_targets(make_batch(9))], ("a", "b"), ALL, label="best", epoch=3)
    pq.write_table(table, tmp_path / "probes.parquet")
    assert pq.read_table(tmp_path / "probes.parquet").equals(table)


def test_memory_does_not_grow_with_users(make_model, make_batch):
    model = make_model()

    def size(users):
        with watch(model, ("a", "b"), ALL) as watching, torch.no_grad():
            for start in range(0, users, 50):
                model(make_batch(50, seed=start, first_user=start))
        unit = watching._units["early.0.0"]
        return sum(value.numel() for metric in unit._all._metrics for value in metric.metric_state.values())

    assert size(50) == size(300)


def test_config_errors_say_what_would_do():
    with pytest.raises(ConfigError, match="queries"):
        parse_config({"positions": True}, ProbeConfig, "test")
    with pytest.raises(ConfigError, match="folds"):
        parse_config({"folds": 1}, ProbeConfig, "test")
    assert parse_config({}, ProbeConfig, "test") == ProbeConfig()
