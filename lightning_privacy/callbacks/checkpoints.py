"""Which checkpoint to go on from after a crash."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from lightning_privacy.callbacks._state import STATE_KEY
from lightning_privacy.errors import GuaranteeError

_REST = "meta.pt"


def newest_checkpoint(directory: str | Path) -> Path | None:
    """The newest whole checkpoint of a private run, for ``trainer.fit(..., ckpt_path=...)``.

    A process that is killed while it writes, or a disk that is full, may leave half a file on file
    systems that cannot rename at once; such files are passed over with a warning. So is a folder of
    shards in which a rank has not come to its end. Going back costs weights and never hides budget:
    a resume charges every step since from the journal.

    Args:
        directory: Where `ModelCheckpoint` writes, searched with its subdirectories.

    Returns:
        The path, or None where there is no checkpoint at all.

    Raises:
        GuaranteeError: There are checkpoints, and none of them is whole and has the state of
            `DifferentialPrivacy`.
    """
    paths = list(Path(directory).rglob("*.ckpt"))
    paths.sort(key=lambda path: (path.stat().st_mtime_ns, path.name), reverse=True)
    for path in paths:
        why = _flaw(path)
        if why is None:
            return path
        warnings.warn(f"{path.name} is passed over: {why}.", stacklevel=2)
    if paths:
        raise GuaranteeError(
            must="a run goes on from a whole checkpoint with the state of DifferentialPrivacy",
            found=f"none among {len(paths)} in {directory}",
            cost="a fresh start under the name of a resume, which forgets spent budget",
            remedy="keep more checkpoints (save_top_k); the ε of the lost run has been spent",
        )
    return None


def _flaw(path: Path) -> str | None:
    if path.is_dir():
        # Both are written after all shards, the second by Lightning, with what is not sharded.
        for name in (".metadata", _REST):
            if not (path / name).is_file():
                return f"it has no {name}: its shards may not be whole"
        path /= _REST
    try:
        checkpoint: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # noqa: BLE001 - half a file fails in many ways
        return f"it cannot be read ({type(error).__name__})"
    if not isinstance(checkpoint, dict) or not (checkpoint.get("callbacks") or {}).get(STATE_KEY):
        return "it has no state of DifferentialPrivacy"
    return None
