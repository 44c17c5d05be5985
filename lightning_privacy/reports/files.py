"""The two files of a report, the page rebuilt from the data, and the hashes of checkpoints."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any

from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports.page import html_page
from lightning_privacy.reports.record import (
    PAGE_NAME,
    RECORD_NAME,
    read_record,
    without_uncovered,
    write_record,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

_CHUNK = 2**20


def write_report(record: Mapping[str, Any], directory: Path) -> Path:
    """Write the data and the page of a report.

    Args:
        record: What `privacy_record` returned.
        directory: Where to; made if there is none.

    Returns:
        The page.
    """
    directory.mkdir(parents=True, exist_ok=True)
    write_record(record, directory / RECORD_NAME)
    page = directory / PAGE_NAME
    page.write_text(html_page(record), encoding="utf-8")
    return page


def rebuild_page(
    directory: Path, *, covered_only: bool = False, output: Path | None = None
) -> Path:
    """Make the page of a finished run again from its data.

    Args:
        directory: The run's folder, or one above it with a single run.
        covered_only: Leave out what was computed on private data without noise, for a page that
            may be published. It is then written beside the whole page, under another name.
        output: Where to write the page; beside the data by default.

    Returns:
        The page.

    Raises:
        ConfigurationError: There is no record, more than one, or one that cannot be read.
    """
    path = _found(directory)
    record = read_record(path)
    if covered_only:
        record = without_uncovered(record)
    name = PAGE_NAME.replace(".html", "_covered_only.html") if covered_only else PAGE_NAME
    page = output or path.with_name(name)
    page.write_text(html_page(record), encoding="utf-8")
    return page


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal digits.

    Args:
        path: The file.

    Returns:
        64 digits.
    """
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 of named tensors, whatever file they are stored in.

    Args:
        state: Tensors by name.

    Returns:
        64 hexadecimal digits, over names, types, shapes and contents in the order of the names.
    """
    import torch

    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _found(directory: Path) -> Path:
    own = directory / RECORD_NAME
    if own.is_file():
        return own
    below = sorted(directory.rglob(RECORD_NAME)) if directory.is_dir() else []
    if len(below) == 1:
        return below[0]
    raise ConfigurationError(
        must=f"the folder of a run holds one {RECORD_NAME}",
        found=f"{len(below)} below {directory}" + "".join(f"\n  {path}" for path in below[:8]),
        cost="the page of another run, or none",
        remedy="give the folder of one run whose trainer had the callback PrivacyReport",
    )
