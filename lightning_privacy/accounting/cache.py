"""Calibrated noise multipliers, remembered on disk: a search that took a while is done once.

What is read is only a suggestion. Whoever uses it computes its ε again before training with it, so
that a file that is old, damaged or forged can cost time and utility, and never privacy.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "LIGHTNING_PRIVACY_CACHE"
"""Environment variable: another directory, or ``off``."""

# Part of every key: a search that gives other results must not find those of an older one.
_VERSION = 1


def recall(question: Mapping[str, float | str]) -> float | None:
    """Returns the noise multiplier that was remembered for a question.

    Args:
        question: Every argument of the search.

    Returns:
        A finite number > 0, or None if there is none or it cannot be read.
    """
    path = _path(question)
    if path is None:
        return None
    try:
        entry = json.loads(path.read_text())
        value = float(entry["noise_multiplier"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    known = entry.get("question") == {**question, "version": _VERSION}
    return value if known and math.isfinite(value) and value > 0 else None


def remember(question: Mapping[str, float | str], noise_multiplier: float) -> None:
    """Writes a result, where there is a place to write to.

    Args:
        question: Every argument of the search.
        noise_multiplier: Its result.
    """
    path = _path(question)
    if path is None:
        return
    entry = {
        "question": {**question, "version": _VERSION},
        "noise_multiplier": noise_multiplier,
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed into place, so that nobody reads half an entry.
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
        with os.fdopen(handle, "w") as file:
            json.dump(entry, file)
        Path(name).replace(path)
    except OSError:
        return


def _path(question: Mapping[str, float | str]) -> Path | None:
    place = os.environ.get(VARIABLE)
    if place == "off":
        return None
    if place:
        directory = Path(place)
    else:
        home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        directory = Path(home) / "lightning_privacy"
    key = json.dumps({**question, "version": _VERSION}, sort_keys=True)
    digest = hashlib.blake2b(key.encode(), digest_size=16).hexdigest()
    return directory / f"noise-{digest}.json"
