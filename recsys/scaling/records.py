"""The table of a scaling study: one row per run, with what the model costs and what it came to."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import pandas as pd

from recsys.errors import UserError
from recsys.evaluation.metrics import metric_key
from recsys.results import RunDirectory, find_runs
from recsys.scaling.compare import Arm, Axis

Response = Literal["cross_entropy", "ndcg@10", "hr@10"]
"""Mean over the domains, whole catalogue, on validation. The first is the one that laws are fitted to."""
RESPONSES: tuple[Response, ...] = get_args(Response)

AXES: dict[Axis, str] = {
    "dense parameters": "dense",
    "total parameters": "total",
    "training FLOPs": "training_flops",
}
"""Each axis and its column."""

PARAMETERS = (
    "item_table",
    "other_embeddings",
    "encoder",
    "cross_attention",
    "gate",
    "output_head",
    "dense",
    "total",
    "active",
    "trainable",
)
COLUMNS = (
    "study",
    "arm",
    "size",
    "seed",
    "state",
    "tuned",
    "learning_rate",
    "matched_on",
    "gap",
    *PARAMETERS,
    "targets",
    "training_flops",
    "logits_flops",
    "epochs",
    "chosen_epoch",
    *RESPONSES,
    *(f"test_{response}" for response in RESPONSES),
    "run",
)
"""`study` is empty where there is one. `state` is done, partial, new, failed, untuned (no learning rate works) or edge
(the best learning rate is the last that was tried); what is not done has no numbers. `tuned` is fixed or interior.
`targets` is what an epoch trains on, each once."""
TRIAL_COLUMNS = ("study", "arm", "size", "learning_rate", "cross_entropy")
"""Of `trials.csv`: what each learning rate came to."""


class StudyError(UserError):
    """A table that cannot be read, or that holds no law; the message says what is missing."""


def read_table(path: Path) -> pd.DataFrame:
    """The table of a sweep, given as its folder or as the file. Raises StudyError."""
    file = path / "table.csv" if path.is_dir() else path
    if not file.is_file():
        raise StudyError(f"{path} holds no table.csv; `recsys sweep` makes one")
    try:
        table = pd.read_csv(file, dtype={"study": str, "size": str, "arm": str}, keep_default_na=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise StudyError(f"{file} cannot be read: {error}") from None
    missing = [column for column in COLUMNS if column not in table.columns]
    if missing:
        raise StudyError(f"{file} is no table of a sweep; it lacks {', '.join(missing)}")
    return table.assign(study=table["study"].fillna(""))


@dataclass(frozen=True)
class Study:
    """The finished runs of one dataset (or one combination of a grid)."""

    name: str
    table: pd.DataFrame

    @property
    def arms(self) -> list[str]:
        return list(dict.fromkeys(self.table["arm"]))

    def arm(self, name: str, axis: Axis, response: Response) -> Arm:
        """Its runs along an axis; a score comes as one minus the score. Raises StudyError for an unknown arm."""
        rows = self.table[self.table["arm"] == name]
        if rows.empty:
            raise StudyError(f"there is no finished run of an arm {name!r}; there are: {', '.join(self.arms)}")
        # Early stopping gives the seeds of one size other numbers of epochs; a size has one place on an axis.
        sizes = rows.groupby("size", sort=False)[AXES[axis]].transform("mean")
        values = rows[response].to_numpy(float)
        return Arm(name, sizes.to_numpy(float), values if response == "cross_entropy" else 1 - values)


def studies(table: pd.DataFrame) -> list[Study]:
    """The finished runs, study by study. Raises StudyError where there is none."""
    done = table[table["state"] == "done"]
    if done.empty:
        raise StudyError("no run of this sweep is finished; `recsys sweep` goes on with it")
    return [Study(str(name), rows.reset_index(drop=True)) for name, rows in done.groupby("study", sort=False)]


def read_studies(paths: Sequence[Path]) -> tuple[pd.DataFrame, list[Study]]:
    """The rows of sweeps and of bare runs together, and the finished ones study by study.

    With several sweeps, a study carries its sweep's name. Raises StudyError where there is nothing to read.
    """
    sweeps = [path for path in paths if (path / "table.csv").is_file() or path.is_file()]
    tables = []
    for path in sweeps:
        table = read_table(path)
        if len(sweeps) > 1:
            name = path.name if path.is_dir() else path.parent.name
            table["study"] = [f"{name} {study}".strip() for study in table["study"]]
        tables.append(table)
    rest = [path for path in paths if path not in sweeps]
    if rest:
        tables.append(table_of_runs(find_runs(rest)))
    table = pd.concat(tables, ignore_index=True)
    return table, studies(table)


def exclusions(table: pd.DataFrame) -> list[str]:
    """What is not in the laws, and why, one line per arm and size."""
    lines = []
    for (study, arm, size), rows in table.groupby(["study", "arm", "size"], sort=False):
        absent = rows[rows["state"] != "done"]
        where = " ".join(part for part in (str(study), str(arm), str(size)) if part)
        for state, found in absent.groupby("state", sort=False):
            seeds = ", ".join(str(seed) for seed in found["seed"])
            lines.append(f"{where}, seed {seeds}: {_REASONS[str(state)]}")
    return lines


_REASONS = {
    "partial": "cut off; the same command goes on with it",
    "new": "not begun; the same command goes on with it",
    "failed": "failed; its run directory holds the traceback",
    "untuned": "not run: every learning rate failed",
    "edge": "not run: the best learning rate is the last that was tried; raise tuning.trials or move tuning.center",
}


def table_of_runs(runs: Sequence[RunDirectory]) -> pd.DataFrame:
    """Runs that no sweep made: an arm is all finished runs of one name, a size is a number of parameters.

    What only a sweep counts (FLOPs, matches) is empty.
    """
    rows: list[dict[str, object]] = []
    for run in runs:
        if run.state != "done" or (final := run.read_final())["selection"] is None:
            continue
        parameters, chosen = final["parameters"], final["selection"]["epoch"]
        [record] = [record for record in run.read_log() if record["epoch"] == chosen]
        dense = parameters["total"] - parameters["item_table"] - parameters["other_embeddings"]
        about: dict[str, object] = {"study": "", "arm": final["name"], "size": str(dense), "seed": final["seed"]}
        about |= {"state": "done", "tuned": "fixed", "dense": dense, "epochs": final["selection"]["epochs"]}
        about |= {"chosen_epoch": chosen, "run": run.path.name}
        about |= {name: parameters[name] for name in ("item_table", "other_embeddings", "total")}
        about |= {response: record[metric_key("validation", "macro", response, "full")] for response in RESPONSES}
        rows.append(about)
    return from_runs(rows)


def from_runs(rows: Sequence[dict[str, object]]) -> pd.DataFrame:
    """A table of these rows, in the order of `COLUMNS`; what a row lacks is empty."""
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    whole = ("seed", *PARAMETERS, "targets", "epochs", "chosen_epoch")
    real = ("learning_rate", "gap", "training_flops", "logits_flops", *RESPONSES, *(f"test_{r}" for r in RESPONSES))
    return table.astype(dict.fromkeys(whole, "Int64") | dict.fromkeys(real, "float64"))
