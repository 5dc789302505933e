"""Controls of a treatment's size."""

import math

import pytest

from recsys.loading import ConfigError
from recsys.models import CrossDomainConfig, GRU4RecConfig, SASRecConfig
from recsys.models.attention import CrossConfig
from recsys.scaling.count import count_model
from recsys.scaling.match import NoMatch, control_named, match

TREATMENT = CrossDomainConfig(d_model=16, d_ff=64, num_layers=1, cross=CrossConfig(num_units=1))


def test_wide_ffn_by_hand(make_catalog):
    # A unit has 4 d^2 + 4 d of attention, 4 d of norms and 12 d^2 + 5 d of gate: 16 d^2 + 13 d, in each of 2 domains.
    # A unit of d_ff costs 2 d + 1 in each block. 64 + (16 * 256 + 13 * 16) / 33 = 194.4.
    found = match(TREATMENT, "wide_ffn", make_catalog(), 10)
    assert [one.config.d_ff for one in found] == [194, 195]
    assert all(one.config.cross is None for one in found)
    extra = 16 * 256 + 13 * 16
    dense = 2 * (4 * 256 + 8 * 16 + 16 + 64 * 33) + 2 * 32 + 2 * extra
    assert found[0].treatment.parameters.dense == dense
    assert found[0].gap("dense") == pytest.approx(2 * (33 * (194 - 64) - extra) / dense)
    assert found[0].gap("dense") < 0 < found[1].gap("dense")


@pytest.mark.parametrize(
    ("control", "basis"),
    [("wide_ffn", "active"), ("wide_ffn", "flops"), ("deeper", "dense"), ("table_wider", "total")],
)
def test_matches_are_within_the_tolerance_and_sorted(control, basis, make_catalog):
    catalog = make_catalog(2, 40)
    found = match(TREATMENT, control, catalog, 10, basis=basis, tolerance=0.02)
    gaps = [abs(one.gap(basis)) for one in found]
    assert gaps == sorted(gaps)
    assert max(gaps) <= 0.02
    for one in found:
        assert one.cost.parameters == count_model(one.config, catalog, 10)
        assert one.cost.on(basis) == pytest.approx(one.treatment.on(basis), rel=0.02)
        assert one.config.cross is None


def test_each_control_changes_what_it_says(make_catalog):
    catalog = make_catalog(2, 40)
    assert {one.config.num_layers for one in match(TREATMENT, "wide_ffn", catalog, 10)} == {1}
    deeper = match(TREATMENT, "deeper", catalog, 10)
    assert all(one.config.num_layers > 1 and one.config.d_ff >= 16 for one in deeper)
    assert all(one.config.d_model == 16 for one in deeper)
    wider = match(TREATMENT, "table_wider", catalog, 10)
    assert all(one.config.d_model > 16 and one.config.num_layers == 1 for one in wider)


def test_a_wider_table_is_not_a_match_of_what_is_dense(make_catalog):
    # The published way: equal in total, far from equal in all that is not a table.
    treatment = CrossDomainConfig(d_model=64, d_ff=256, num_layers=1, cross=CrossConfig())
    found = match(treatment, "table_wider", make_catalog(2, 28_000), 50, basis="total")
    assert all(abs(one.gap("total")) <= 0.005 for one in found)
    assert all(one.gap("dense") < -0.2 for one in found)
    assert all(one.cost.parameters.item_table > one.treatment.parameters.item_table for one in found)


def test_the_treatment_is_shrunk_to_a_baseline(make_catalog):
    catalog = make_catalog()
    small = CrossDomainConfig(d_model=16, d_ff=256, num_layers=1)
    found = match(small, "wide_ffn", catalog, 10, baseline=TREATMENT)
    assert all(one.config.cross == TREATMENT.cross and one.config.d_ff < 256 for one in found)
    assert math.isclose(found[0].cost.parameters.dense, found[0].treatment.parameters.dense, rel_tol=0.005)


def test_another_model_as_the_baseline(make_catalog):
    found = match(TREATMENT, "wide_ffn", make_catalog(), 10, baseline=SASRecConfig(d_model=16, num_layers=2))
    assert all(isinstance(one.config, SASRecConfig) for one in found)


def test_what_does_not_match_is_not_called_matched(make_catalog):
    with pytest.raises(NoMatch, match=r"d_ff = 194 is off by -0\.1\d%; d_ff = 195 is off by \+0\.2\d%; try another"):
        match(TREATMENT, "wide_ffn", make_catalog(), 10, tolerance=1e-6)
    with pytest.raises(NoMatch, match="cannot bring sasrec"):
        match(TREATMENT, "wide_ffn", make_catalog(), 10, baseline=SASRecConfig(d_model=128, num_layers=4))


def test_a_control_that_a_model_has_no_key_for(make_catalog):
    with pytest.raises(ConfigError, match="'gru4rec' has no key 'd_ff'"):
        match(TREATMENT, "wide_ffn", make_catalog(), 10, baseline=GRU4RecConfig())
    with pytest.raises(ConfigError, match="has no exchange to be compared without; give a baseline"):
        match(SASRecConfig(), "wide_ffn", make_catalog(), 10)


def test_wider_states_on_the_same_items(make_catalog):
    catalog = make_catalog(2, 40)
    for one in match(TREATMENT, "wider", catalog, 10):
        assert one.config.d_model > 16
        assert one.config.d_item == 16
        assert one.cost.parameters.item_table == one.treatment.parameters.item_table
        assert abs(one.gap("dense")) <= 0.005


@pytest.mark.parametrize(("control", "context"), [("self_attention", "own"), ("shuffled_context", "shuffled")])
def test_the_treatment_reading_something_else(control, context, make_catalog):
    [one] = match(TREATMENT, control, make_catalog(), 10, tolerance=0.0)
    assert one.config.cross.context == context
    assert one.config.model_copy(update={"cross": TREATMENT.cross}) == TREATMENT
    assert one.cost == one.treatment
    with pytest.raises(ConfigError, match="takes no baseline"):
        match(TREATMENT, control, make_catalog(), 10, baseline=SASRecConfig())
    with pytest.raises(ConfigError, match="no exchange"):
        match(SASRecConfig(), control, make_catalog(), 10)


def test_controls_have_names():
    assert control_named("deeper") == "deeper"
    with pytest.raises(ConfigError, match="did you mean wide_ffn"):
        control_named("wide_fnn")
