"""Is one model better than another? Paired over users, with seeds as a second source of variance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recsys.errors import UserError
from recsys.evaluation.evaluate import EvalConfig
from recsys.evaluation.inference import (
    Interval,
    UserSums,
    holm,
    percentile_interval,
    permutation_test,
    user_sums,
    wilcoxon_test,
)
from recsys.evaluation.metrics import metric_key
from recsys.evaluation.ranks import RanksInfo


class IncomparableRuns(UserError):
    """Runs that did not rank the same targets among the same candidates; the message says what differs."""


@dataclass(frozen=True)
class Comparison:
    """One metric of a treatment against the baseline's, on the same users."""

    key: str
    baseline: str
    treatment: str
    baseline_value: float
    treatment_value: float
    difference: Interval
    """Treatment minus baseline. The interval resamples users and, where an arm has several seeds, its seeds too;
    with few seeds it is somewhat narrow."""
    relative: float | None
    """The difference as a share of the baseline's value; None where that is 0."""
    effect_size: float | None
    """Cohen's d_z: mean over standard deviation of the users' differences; None where they do not vary."""
    user_error: float
    """Standard error that comes from the choice of users, the seeds held fixed."""
    seed_error: float | None
    """Standard error that comes from the seeds, the users held fixed; None without several seeds in both arms."""
    p_permutation: float
    """Sign flips of the users' differences (means over seeds): a statement about the models that were trained, not
    about those that other seeds would give."""
    p_wilcoxon: float
    """Wilcoxon's signed-rank test of the same differences."""
    p_permutation_holm: float
    """Adjusted for all comparisons of the same call."""
    p_wilcoxon_holm: float


def compare(
    arms: Mapping[str, Sequence[pa.Table]],
    config: EvalConfig,
    metrics: Sequence[str] = ("ndcg@10",),
    domains: Sequence[str] | None = None,
) -> list[Comparison]:
    """Every arm but the first against the first: each metric per domain, macro and micro, under each protocol.

    An arm is one model, given as the rank tables of its runs, one per seed. `domains` leaves out the targets of the
    others, so that a run on one domain can be held against a run on several. A single domain has no macro or micro.
    Raises IncomparableRuns if two tables differ in split, domains, users, targets, protocols, candidates or
    negatives; ValueError if there are fewer than two arms or a run has no targets in one of `domains`.
    """
    if len(arms) < 2 or not all(arms.values()):
        raise ValueError("a comparison needs at least two arms with at least one run each")
    if domains is not None:
        arms = {name: [_within(domains, ranks) for ranks in runs] for name, runs in arms.items()}
    _require_comparable(arms)
    baseline, *treatments = arms
    first = arms[baseline][0]
    found: list[Comparison] = []
    for protocol in pc.unique(first["protocol"]).to_pylist():
        measured = {
            name: _Arm([user_sums(ranks, protocol, metrics, config.ties) for ranks in runs], config)
            for name, runs in arms.items()
        }
        for treatment in treatments:
            groups = measured[baseline].groups
            for row, group in enumerate(groups[:1] if len(groups) == 3 else groups):  # a domain, macro and micro
                for column, metric in enumerate(metrics):
                    key = metric_key(RanksInfo.of(first).split, group, metric, protocol)
                    at = (row, column)
                    if measured[baseline].users[at] > 0:
                        pair = (measured[baseline], measured[treatment])
                        found.append(_compare(key, baseline, treatment, pair, at, config))
    permutation = holm([comparison.p_permutation for comparison in found])
    wilcoxon = holm([comparison.p_wilcoxon for comparison in found])
    return [
        replace(comparison, p_permutation_holm=p_permutation, p_wilcoxon_holm=p_wilcoxon)
        for comparison, p_permutation, p_wilcoxon in zip(found, permutation, wilcoxon, strict=True)
    ]


class _Arm:
    """What is compared of one model; the first axis of arrays is the seed, the last two are group and metric."""

    def __init__(self, runs: Sequence[UserSums], config: EvalConfig) -> None:
        self.groups = runs[0].groups
        self.users = runs[0].users()
        self.means = np.stack([run.means() for run in runs])
        self.contributions = np.stack([run.contributions() for run in runs]).mean(0)
        self.draws = np.stack([run.bootstrap(config.bootstrap_samples, config.seed) for run in runs])

    def hierarchical_draws(self, generator: np.random.Generator) -> np.ndarray:
        """Bootstrap means in which the seeds are drawn with replacement as well."""
        seeds, samples = self.draws.shape[:2]
        drawn = generator.integers(seeds, size=(seeds, samples, 1, 1))
        return np.take_along_axis(self.draws, drawn, axis=0).mean(0)

    def seed_variance(self) -> np.ndarray:
        """Variance of the mean over seeds; NaN for a single seed."""
        seeds = len(self.means)
        return self.means.var(0, ddof=1) / seeds if seeds > 1 else np.full(self.means.shape[1:], np.nan)


def _compare(
    key: str, baseline: str, treatment: str, pair: tuple[_Arm, _Arm], at: tuple[int, int], config: EvalConfig
) -> Comparison:
    old, new = pair
    old_value, new_value = float(old.means.mean(0)[at]), float(new.means.mean(0)[at])
    differences = (new.contributions - old.contributions)[:, *at]
    differences = differences[~np.isnan(differences)] * old.users[at]  # their mean is the difference of the metrics
    differences = differences.round(12)  # equal differences must tie, or rounding errors decide Wilcoxon's ranks
    generator = np.random.default_rng(config.seed)
    draws = (new.hierarchical_draws(generator) - old.hierarchical_draws(generator))[:, *at]
    spread = differences.std(ddof=1) if len(differences) > 1 else 0.0
    p_permutation = permutation_test(differences, config.permutations, config.seed)
    p_wilcoxon = wilcoxon_test(differences)
    seed_error = float(np.sqrt(old.seed_variance() + new.seed_variance())[at])
    return Comparison(
        key=key,
        baseline=baseline,
        treatment=treatment,
        baseline_value=old_value,
        treatment_value=new_value,
        difference=percentile_interval(new_value - old_value, draws, int(old.users[at])),
        relative=(new_value - old_value) / old_value if old_value else None,
        effect_size=float(differences.mean() / spread) if spread else None,
        user_error=float(np.nanstd((new.draws.mean(0) - old.draws.mean(0))[:, *at])),
        seed_error=None if np.isnan(seed_error) else seed_error,
        p_permutation=p_permutation,
        p_wilcoxon=p_wilcoxon,
        p_permutation_holm=p_permutation,
        p_wilcoxon_holm=p_wilcoxon,
    )


def _within(domains: Sequence[str], ranks: pa.Table) -> pa.Table:
    present = pc.unique(ranks["domain"]).to_pylist()
    if missing := sorted({*domains}.difference(present)):
        raise ValueError(f"no targets in {', '.join(missing)}; a run has {', '.join(sorted(present))}")
    return ranks.filter(pc.is_in(ranks["domain"], pa.array(domains, pa.string())))


def _require_comparable(arms: Mapping[str, Sequence[pa.Table]]) -> None:
    tables = [(f"{name} (run {number})", run) for name, runs in arms.items() for number, run in enumerate(runs, 1)]
    (first_name, first), *others = tables
    for name, table in others:
        if problems := _differences(first, table):
            raise IncomparableRuns(f"{first_name} and {name} cannot be compared: " + "; ".join(problems))


def _differences(first: pa.Table, second: pa.Table) -> list[str]:
    """What keeps two tables of ranks from being compared, in words."""
    a, b = RanksInfo.of(first), RanksInfo.of(second)
    problems = [
        f"{name} {getattr(a, field)} against {getattr(b, field)}"
        for field, name in (("split", "the split"), ("split_hash", "the split's hash"), ("seen", "seen items"))
        if getattr(a, field) != getattr(b, field)
    ]
    protocols = [sorted(pc.unique(table["protocol"]).to_pylist()) for table in (first, second)]
    if protocols[0] != protocols[1]:
        return [*problems, f"protocols {', '.join(protocols[0])} against {', '.join(protocols[1])}"]
    domains = [sorted(pc.unique(table["domain"]).to_pylist()) for table in (first, second)]
    if domains[0] != domains[1]:
        shared = sorted({*domains[0]}.intersection(domains[1]))
        hint = f"; they can be compared within {', '.join(shared)}" if shared else ""
        return [*problems, f"targets in {', '.join(domains[0])} against {', '.join(domains[1])}{hint}"]
    problems += [
        f"other negatives for {protocol} in {domain}"
        for protocol, hashes in a.negatives.items()
        for domain in domains[0]
        if hashes[domain] != b.negatives[protocol][domain]
    ]
    one, two = ({name: table[name].to_numpy(zero_copy_only=False) for name in _IDENTITY} for table in (first, second))
    users = set(one["user"].tolist()) ^ set(two["user"].tolist())
    if users:
        named = ", ".join(map(str, sorted(users)[:5])) + (", ..." if len(users) > 5 else "")
        return [*problems, f"{len(users):,} users that only one of them ranked ({named})"]
    if len(first) != len(second):
        return [*problems, f"{len(first):,} ranks against {len(second):,}"]
    for column, name in (("target", "targets"), ("domain", "domains"), ("candidates", "numbers of candidates")):
        changed = int((one[column] != two[column]).sum())
        if changed:
            problems.append(f"other {name} in {changed:,} of {len(first):,} ranks")
    return problems


_IDENTITY = ("user", "domain", "target", "candidates")
