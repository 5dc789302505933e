"""Ranking, metrics, intervals and tests. `RankingMetrics` lives in `running`, away from the cost of torchmetrics."""

from recsys.evaluation.compare import Comparison, IncomparableRuns, compare
from recsys.evaluation.evaluate import DomainCounts, EvalConfig, Evaluation, evaluate, rank_full
from recsys.evaluation.inference import Interval, summarize
from recsys.evaluation.rank import NonFiniteScores, RankInterval
from recsys.evaluation.ranks import RANKS_SCHEMA, RanksInfo
from recsys.evaluation.recommend import recommend
from recsys.evaluation.scorer import DotScorer
from recsys.evaluation.targets import EvalBatch

__all__ = [
    "RANKS_SCHEMA",
    "Comparison",
    "DomainCounts",
    "DotScorer",
    "EvalBatch",
    "EvalConfig",
    "Evaluation",
    "IncomparableRuns",
    "Interval",
    "NonFiniteScores",
    "RankInterval",
    "RanksInfo",
    "compare",
    "evaluate",
    "rank_full",
    "recommend",
    "summarize",
]
