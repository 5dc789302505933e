"""A large catalogue is evaluated in pieces."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource
import numpy as np
import torch
from recsys.offpolicy.candidates import Candidate
from recsys.offpolicy.estimators import SNIPS, DoublyRobust
from recsys.offpolicy.evaluate import EvaluateConfig, evaluate
from recsys.offpolicy.feedback import LoggedFeedback, one_domain
from recsys.offpolicy.policies import PlackettLuce
from recsys.offpolicy.rewards import ItemMeans

requests, items = {requests}, 50_000
generator = torch.Generator().manual_seed(0)
users = torch.randn((requests, 16), generator=generator)
table = torch.randn((items + 1, 16), generator=generator)


class Dot:
    def __call__(self, rows, columns):
        return users[rows] @ table[columns].T / 16


numbers = np.random.default_rng(0)
rows = np.arange(requests)
log = LoggedFeedback(
    request=rows, user=rows, domain=np.zeros(requests, dtype=np.int64), time=rows,
    items=numbers.integers(1, items + 1, (requests, 1)), positions=np.zeros((requests, 1), dtype=np.int64),
    rewards={{"click": numbers.integers(0, 2, (requests, 1)).astype(float)}},
    propensity=np.full((requests, 1), 1 / items), marginal=None, num_items=items, domain_names=("one",),
)
candidate = Candidate("dot", PlackettLuce(), Dot())
config = EvaluateConfig(estimators=(SNIPS(), DoublyRobust()), reward_model=ItemMeans())
report = evaluate(log, candidate, one_domain("one", items), config)
assert all(estimate.value is not None for estimate in report.estimates), report.estimates[0].reason
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("requests", [3_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_the_peak_stays_below_two_gibibytes(requests: int) -> None:
    program = PROGRAM.format(requests=requests)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 2 * 2**30
