"""Recommendations of a finished run for a history in raw ids."""

import difflib
from collections.abc import Sequence
from pathlib import Path

import torch

from recsys.data.policies import unknown_domain
from recsys.data.prepare import NamedItem
from recsys.data.schema import DataError
from recsys.evaluation import recommend
from recsys.experiment import DatasetSource
from recsys.results import RunError
from recsys.training.run import make_scorer, open_run
from recsys.types import NO_DOMAIN, PAD_ID, Batch


def recommend_items(
    path: Path, history: Sequence[str], domain: str, k: int, data_root: Path | None
) -> list[tuple[str, str | None, float]]:
    """Raw id, title and score of the k best items of a domain, best first; those of the history are left out.

    A raw id that several domains have is written `domain:id`. Raises DataError for an item or a domain that the data
    do not know, RunError for a run without raw ids, or one trained on another domain alone.
    """
    _, experiment, data, model = open_run(path, data_root)
    source = experiment.data.source
    if not isinstance(source, DatasetSource):
        raise RunError(f"{path} was trained on {source.name} data, whose items have no names to recommend by")
    names = data.sequences.domain_names
    if domain not in names:
        raise unknown_domain(domain, names)
    only = experiment.data.domain
    if only not in (None, domain):
        raise RunError(f"{path} was trained on {only} alone and knows nothing of {domain}; ask for --domain {only}")
    items = source.items(data_root)
    events = [_named(name, items, names, source.dataset) for name in history]
    for event in events:
        if only not in (None, names[event.domain]):
            raise RunError(
                f"{path} was trained on {only} alone and knows nothing of {event.raw}, an item of "
                f"{names[event.domain]}; leave it out of the history"
            )

    seen = torch.tensor([[event.item for event in events]])
    recent = seen[:, -experiment.data.max_len :]
    length = recent.shape[1]
    batch = Batch(
        user=torch.zeros(1, dtype=torch.int64),
        items=recent,
        domains=data.catalog.item_domain[recent],
        times=torch.arange(length)[None],
        targets=torch.full((1, length), PAD_ID),
        target_domains=torch.full((1, length), NO_DOMAIN),
    )
    index = names.index(domain)
    k = min(k, len(data.catalog.items_of(index)))
    best, scores = recommend(make_scorer(model.eval(), experiment), batch, data.catalog, index, k, seen)
    raw = {item.item: (item.raw, item.title) for item in items}
    pairs = zip(best[0].tolist(), scores[0].tolist(), strict=True)
    return [(*raw[item], score) for item, score in pairs if item != PAD_ID]


def _named(name: str, items: Sequence[NamedItem], domains: Sequence[str], dataset: str) -> NamedItem:
    """The one item of a raw id, or of `domain:id`."""
    found = [item for item in items if name in (item.raw, f"{domains[item.domain]}:{item.raw}")]
    if not found:
        near = difflib.get_close_matches(name, [item.raw for item in items], n=1, cutoff=0.6)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise DataError(f"there is no item {name!r} in {dataset}{hint}")
    if len(found) > 1:
        ways = " or ".join(f"{domains[item.domain]}:{item.raw}" for item in found)
        raise DataError(f"{name!r} is an item of several domains; write {ways}")
    return found[0]
