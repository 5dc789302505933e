"""The figure of a run's training curve."""

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from recsys.results import atomic


def draw_curve(records: Sequence[dict[str, Any]], path: Path, title: str, best_epoch: int) -> None:
    """Training loss (left) and validation NDCG@10 per domain (right) against the epoch; the chosen epoch is marked.

    The title ends with the speed of an epoch in the middle, where the records say it.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8.4, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    epochs = [record["epoch"] for record in records]
    left.plot(epochs, [record["train/loss"] for record in records], color="0.25")
    left.set(xlabel="epoch", ylabel="training loss")

    start, end = "validation/", "/ndcg@10"
    domains = sorted(
        {key[len(start) : -len(end)] for r in records for key in r if key.startswith(start) and key.endswith(end)}
    )
    for domain in sorted(domains, key=lambda name: (name in ("macro", "micro"), name)):
        if domain == "micro" or (domain == "macro" and len(domains) == 3):
            continue
        points = [(r["epoch"], r[f"{start}{domain}{end}"]) for r in records if f"{start}{domain}{end}" in r]
        style = {"color": "0.2", "linestyle": "--"} if domain == "macro" else {"marker": "o", "markersize": 2.5}
        right.plot(*zip(*points, strict=True), label=domain, **style)
    right.set(xlabel="epoch", ylabel="validation NDCG@10", ylim=(0, None))
    right.legend(frameon=False)
    for axis in (left, right):
        axis.axvline(best_epoch, color="0.75", linewidth=0.8, zorder=0)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.spines[["top", "right"]].set_visible(False)
    speeds = [record["tokens_per_second"] for record in records if "tokens_per_second" in record]
    figure.suptitle(f"{title}   {median(speeds):,.0f} tokens/s" if speeds else title, fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=160, format="png", metadata={"Software": None})
