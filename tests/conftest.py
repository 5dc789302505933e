"""Shape annotations of the package are checked while it is tested; a scaling study that was never run."""

import signal

import numpy as np
import pytest
from jaxtyping import install_import_hook

install_import_hook("recsys", "beartype.beartype")


def pytest_configure(config):
    """Tests that interrupt a run, or a process they start, must be heard where tests run side by side, too."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def made_up():
    """Gives the table of two arms whose losses are known: one behaves as the other with rho times its parameters."""
    from recsys.scaling.records import from_runs

    def make(rho=1.5, widths=(8, 16, 32, 64, 96), noise=0.003, seed=0):
        rng = np.random.default_rng(seed)
        rows = []
        for width in widths:
            for arm, ratio in (("none", 1.0), ("exchange", rho)):
                dense, table = 24 * width**2, 2000 * width
                for run in (0, 1):
                    loss = 4 + 20 * (ratio * dense) ** -0.25 + rng.normal(0, noise)
                    row = {"study": "", "arm": arm, "size": f"d{width}", "seed": run, "state": "done", "tuned": "fixed"}
                    row |= {"learning_rate": 1e-3, "dense": dense, "total": dense + table, "item_table": table}
                    row |= {"training_flops": 6e5 * dense, "cross_entropy": loss, "ndcg@10": 0.2 - 0.02 * loss}
                    row |= {"hr@10": 0.3 - 0.03 * loss, "run": f"{arm}-{width}-{run}", "epochs": 4, "chosen_epoch": 4}
                    rows.append(row)
        return from_runs(rows)

    return make
