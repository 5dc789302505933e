"""Where the runs of a sweep run: in this process, in several, on a Ray cluster, or as Slurm jobs."""

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, runtime_checkable

from pydantic import Field

from recsys.loading import Config
from recsys.results import RunError


@runtime_checkable
class Handle(Protocol):
    """A call that was handed over."""

    def done(self) -> bool: ...

    def result(self) -> Any:
        """What the call returned; raises what it raised."""


Submit = Callable[..., Handle]
"""Takes a function and its arguments, all of which can be pickled."""


class LocalConfig(Config):
    """This machine. Several processes may share one GPU; each takes memory of its own."""

    name: Literal["local"] = "local"
    workers: int = Field(1, ge=1)
    """Processes; with 1, the runs are in this one."""

    @contextmanager
    def open(self, directory: Path) -> Iterator[Submit]:
        if self.workers == 1:
            yield _call
            return
        context = multiprocessing.get_context("spawn")  # a fork would inherit the threads of torch, but not their locks
        pool = ProcessPoolExecutor(self.workers, mp_context=context, initializer=_end_with_parent)
        try:
            yield pool.submit
        finally:
            pool.shutdown(cancel_futures=True)


class RayConfig(Config):
    """A Ray cluster, or a Ray on this machine (needs the extra `ray`)."""

    name: Literal["ray"] = "ray"
    workers: int = Field(2, ge=1)
    """Runs at a time."""
    cpus: float = Field(1.0, gt=0)
    """Per run."""
    gpus: float = Field(0.0, ge=0)
    """Per run; a fraction lets several runs share one."""
    address: str | None = None
    """Of a running cluster, whose machines see the same files; null starts one here and ends it."""

    @contextmanager
    def open(self, directory: Path) -> Iterator[Submit]:
        ray = _import("ray")
        local: dict[str, Any] = {"num_cpus": max(1, round(self.workers * self.cpus)), "include_dashboard": False}
        ray.init(address=self.address, log_to_driver=False, **({} if self.address else local))
        try:
            resources = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_retries": 0}
            yield lambda function, *arguments: ray.remote(**resources)(function).remote(*arguments).future()
        finally:
            ray.shutdown()


class SlurmConfig(Config):
    """Jobs of a Slurm cluster through submitit (needs the extra `slurm`); their logs lie in `slurm/` of the sweep."""

    name: Literal["slurm"] = "slurm"
    workers: int = Field(16, ge=1)
    """Jobs in the queue at a time."""
    partition: str | None = None
    minutes: int = Field(120, ge=1)
    """Of a job. A run that is cut off goes on when the sweep is started again."""
    cpus: int = Field(1, ge=1)
    gpus: int = Field(0, ge=0)
    memory_gb: float = Field(8.0, gt=0)
    cluster: Literal["slurm", "local", "debug"] = "slurm"
    """`local` runs the jobs as processes here and `debug` in this process, to try a sweep without a cluster."""

    @contextmanager
    def open(self, directory: Path) -> Iterator[Submit]:
        submitit = _import("submitit", extra="slurm")
        executor = submitit.AutoExecutor(folder=directory / "slurm", cluster=self.cluster)
        executor.update_parameters(
            timeout_min=self.minutes, cpus_per_task=self.cpus, gpus_per_node=self.gpus, mem_gb=self.memory_gb
        )
        if self.cluster == "slurm" and self.partition is not None:
            executor.update_parameters(slurm_partition=self.partition)
        yield executor.submit


ExecutorConfig = Annotated[LocalConfig | RayConfig | SlurmConfig, Field(discriminator="name")]


def _call(function: Callable[..., Any], *arguments: Any) -> Handle:
    future: Future[Any] = Future()
    try:
        future.set_result(function(*arguments))
    except Exception as error:  # it is raised where the result is asked for, as from any executor
        future.set_exception(error)
    return future


def _end_with_parent() -> None:
    """A worker whose parent was killed would finish its run and then wait for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _import(name: str, extra: str | None = None) -> Any:
    try:
        return __import__(name)
    except ImportError:
        raise RunError(f"this executor needs {name}: pip install 'recsys[{extra or name}]'") from None
