"""Checkpoints that are written whole or not at all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.plugins.io import CheckpointIO

from recsys.results import RunError, atomic


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint on the CPU, safely. Raises RunError where the file is missing or damaged."""
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise RunError(f"there is no checkpoint {path}; train the run with --overwrite") from None
    except Exception as error:  # torch names a torn file in many ways
        raise RunError(f"{path} is not a checkpoint that can be read: {error}; train with --overwrite") from None
    if not isinstance(content, dict) or not {"state_dict", "config"} <= content.keys():
        raise RunError(f"{path} is not a checkpoint of a run; train with --overwrite")
    return content


def write_checkpoint(content: dict[str, Any], path: Path) -> None:
    """A checkpoint whole or not at all. Raises OSError, which names the file, where the disk does not take it."""
    try:
        # Given a path, torch keeps the file open, and its space taken, as long as somebody holds the error.
        with atomic(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        reason: BaseException = error  # torch's writer fails on top of the system's error, more than once
        while reason.__context__ is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        raise OSError(f"{path} could not be written ({reason}); an earlier one is kept as it was") from error


class AtomicCheckpoints(CheckpointIO):
    """Writes beside the earlier checkpoint and takes its place at the end.

    Lightning's own goes through the system's temporary folder. Where that is another file system the last step is a
    copy, and a full disk or a kill in the middle of it leaves a torn file under the name of the good one.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(checkpoint, path)

    def load_checkpoint(
        self, path: str | Path, map_location: Callable[..., Any] | None = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
