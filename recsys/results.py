"""A run is one directory: what is in it, in which state it is, and many of them as one table."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from recsys.errors import UserError
from recsys.loading import ConfigError, parse_yaml

COLUMNS = ["run", "arm", "name", "seed", "parameters", "seconds", "commit", "key", "value", "low", "high", "n"]
"""Of the table of many runs."""

FIGURES = ("cosines", "energy", "alignment", "interventions")
"""Names of the figures that are drawn of a finished run's exchange, into its directory."""

State = Literal["new", "partial", "done", "failed"]


class RunError(UserError):
    """A run directory that cannot be used as asked; the message says what would do."""


class RunHeld(RunError):
    """Another process is working in the run directory."""


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place when the block ends well, and is removed when it does not."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp keeps files to their owner
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all; a NaN is an error, because a failure is never a number."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def fingerprint(*parts: str) -> str:
    """SHA-256 over texts, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode())
        digest.update(b"\0")
    return digest.hexdigest()


@dataclass(frozen=True)
class RunDirectory:
    """The files of one run. Its name ends with the hash of the resolved config and the data."""

    path: Path

    @classmethod
    def of(cls, runs_dir: Path, name: str, config: str, data: str) -> "RunDirectory":
        """The directory that belongs to a resolved config (as YAML) and a data fingerprint."""
        return cls(runs_dir / f"{name}-{fingerprint(config, data)[:10]}")

    @classmethod
    def open(cls, path: Path) -> "RunDirectory":
        """An existing run. Raises RunError where there is none."""
        if not (path / "config.yaml").is_file():
            raise RunError(f"{path} is not a run directory (it has no config.yaml); runs are made by `recsys train`")
        return cls(path)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Makes the directory and keeps other processes from working in it. Raises RunHeld where one does."""
        self.path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path / ".lock", timeout=0)
        try:
            lock.acquire()
        except Timeout:
            raise RunHeld(f"another process is working on {self.path}; wait for it or stop it") from None
        try:
            yield
        finally:
            Path(lock.lock_file).unlink(missing_ok=True)  # nobody waits for it: who finds it taken gives up
            lock.release()

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def environment(self) -> Path:
        return self.path / "env.json"

    @property
    def log(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def final(self) -> Path:
        return self.path / "final.json"

    @property
    def ranks(self) -> Path:
        return self.path / "ranks.parquet"

    @property
    def best(self) -> Path:
        return self.path / "best.ckpt"

    @property
    def last(self) -> Path:
        return self.path / "last.ckpt"

    @property
    def curve(self) -> Path:
        return self.path / "curve.png"

    @property
    def probes(self) -> Path:
        """What was measured of the exchange, as `recsys.probes.PROBES_SCHEMA`; only where that was asked for."""
        return self.path / "probes.parquet"

    @property
    def interventions(self) -> Path:
        return self.path / "interventions.parquet"

    @property
    def done(self) -> Path:
        return self.path / "DONE"

    @property
    def failed(self) -> Path:
        return self.path / "FAILED"

    @property
    def state(self) -> State:
        if self.done.exists():
            return "done"
        if self.failed.exists():
            return "failed"
        return "partial" if self.last.exists() else "new"

    def clear(self) -> None:
        """Forget the run. Only the files of a run are removed, whatever else lies in the directory stays."""
        outcomes = (self.final, self.ranks, self.log, self.curve, self.probes, self.interventions)
        figures = (self.path / f"{name}.png" for name in FIGURES)
        for path in (self.done, self.failed, *outcomes, *figures, self.best, self.last):
            path.unlink(missing_ok=True)

    def failure(self) -> str:
        """The last line of the traceback of a failed run."""
        lines = self.failed.read_text().strip().splitlines()
        return lines[-1] if lines else "no reason was recorded"

    def arm(self) -> str:
        """A hash of what the run shares with its other seeds: the config but for the seed, and the data."""
        config = self._read(self.config, lambda text: parse_yaml(text, str(self.config)))
        config.pop("seed", None)
        data = self.read_final().get("data", {}).get("fingerprint", "")
        return fingerprint(json.dumps(config, sort_keys=True, default=str), data)

    def read_final(self) -> dict[str, Any]:
        """The numbers of a finished run. Raises RunError where it is not finished, or damaged."""
        if self.state != "done":
            raise RunError(f"{self.path} is not finished (it is {self.state}); train it to its end first")
        return self._read(self.final, json.loads)

    def read_environment(self) -> dict[str, Any]:
        """Commit, command, versions, hardware and times of a finished run. Raises RunError where it is damaged."""
        return self._read(self.environment, json.loads)

    def read_ranks(self) -> pa.Table:
        """A row per test target. Raises RunError where the file is damaged."""
        try:
            return pq.read_table(self.ranks)
        except (OSError, pa.ArrowInvalid) as error:
            raise self._damaged(self.ranks, error) from None

    def read_probes(self) -> pa.Table:
        """Rows as `recsys.probes.PROBES_SCHEMA`. Raises RunError where the run was not probed or it is damaged."""
        if not self.probes.exists():
            raise RunError(f"{self.path} has no probes.parquet; `recsys probe {self.path}` makes it")
        try:
            return pq.read_table(self.probes)
        except (OSError, pa.ArrowInvalid) as error:
            raise RunError(f"{self.probes} cannot be read ({error}); remove it and probe the run again") from None

    def _read(self, path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
        try:
            values = parse(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, ConfigError) as error:
            raise self._damaged(path, error) from None
        if not isinstance(values, dict):
            raise self._damaged(path, "it holds no mapping")
        return values

    @staticmethod
    def _damaged(path: Path, reason: object) -> RunError:
        return RunError(f"{path} cannot be read ({reason}); make the run again with `recsys train … --overwrite`")

    def read_log(self) -> list[dict[str, Any]]:
        """One record per epoch; a line cut short by a crash is left out."""
        records = []
        if self.log.exists():
            for line in self.log.read_text().splitlines():
                with contextlib.suppress(json.JSONDecodeError):
                    records.append(json.loads(line))
        return records


def find_runs(paths: Iterable[Path]) -> list[RunDirectory]:
    """The runs at or directly below each path, sorted by name."""
    found = []
    for path in paths:
        if (path / "config.yaml").is_file():
            found.append(RunDirectory(path))
        elif path.is_dir():
            found.extend(RunDirectory(config.parent) for config in sorted(path.glob("*/config.yaml")))
        else:
            raise RunError(f"there is no run directory {path}")
    return found


def finished_runs(paths: Iterable[Path]) -> list[RunDirectory]:
    """As `find_runs`, but of a folder the finished ones only. Raises RunError where it has none."""
    found = []
    for path in paths:
        below = find_runs([path])
        finished = [run for run in below if run.state == "done" or run.path == path]
        if not finished:
            raise RunError(f"{path} is not a run directory, and holds none that is finished")
        found += finished
    return found


def arms_of(runs: Iterable[RunDirectory]) -> dict[str, list[RunDirectory]]:
    """The runs of each arm by its label: runs on the same data whose configs differ in nothing but the seed.

    The label is the experiment's name, followed by a hash where one name stands for several arms. Raises RunError
    where an arm has a seed twice.
    """
    arms: dict[tuple[str, str], list[RunDirectory]] = {}
    for run in runs:
        arms.setdefault((run.read_final()["name"], run.arm()), []).append(run)
    names = Counter(name for name, _ in arms)
    for (name, _), members in arms.items():
        seeds = Counter(run.read_final()["seed"] for run in members)
        seed, times = seeds.most_common(1)[0]
        if times > 1:
            raise RunError(f"{name} with seed {seed} is given {times} times; give each run once")
    return {name if names[name] == 1 else f"{name} ({arm[:6]})": members for (name, arm), members in arms.items()}


def load(runs: Iterable[RunDirectory]) -> pd.DataFrame:
    """One row per finished run and metric, with the columns `COLUMNS`; `arm` is the label of `arms_of`.

    Runs that are not finished have no row: a failure is never a number.
    """
    finished = [run for run in runs if run.state == "done"]
    labels = {run.path: label for label, members in arms_of(finished).items() for run in members}
    rows: list[dict[str, Any]] = []
    for run in finished:
        final = run.read_final()
        about: dict[str, Any] = {"run": run.path.name, "arm": labels[run.path], "name": final["name"]}
        about["seed"] = final["seed"]
        environment = run.read_environment()
        about["parameters"] = final["parameters"]["total"]
        about |= {"seconds": environment["seconds"], "commit": environment["commit"]}
        rows.extend({**about, "key": key, **interval} for key, interval in final["metrics"].items())
    return pd.DataFrame(rows, columns=COLUMNS)
