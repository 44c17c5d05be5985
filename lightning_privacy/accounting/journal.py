"""A write-ahead journal: releases are charged on disk before they run, so that no crash is free.

One JSON object per line, each with a checksum. ``reserve`` lines promise that the releases up to
a number may run; ``record`` lines say how many really started, and close the open block. The
numbers count every release that was ever charged, across all resumes, and never go back.
"""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import Any

from lightning_privacy.accounting.events import GaussianRelease
from lightning_privacy.errors import GuaranteeError
from lightning_privacy.types import whole_number

_VERSION = 1


class Journal:
    """Promises releases in blocks, on disk, before they run.

    Guarantee: when `reserve` has returned, a process that dies at any later moment, by whatever
    cause, leaves a file from which `charged` counts at least every release that was started.

    A file has one writer. Opening it reads what earlier runs left and cuts off a torn last line:
    its ``fsync`` had not returned, so nothing that it promised had run.

    Args:
        path: The file; it and its directory are made when the first block is reserved.
        block: How many releases one promise covers, >= 1. A crash costs at most this many
            releases that never ran; each promise costs one flush to disk.

    Raises:
        ConfigurationError: ``block`` is no whole number >= 1.
        GuaranteeError: A complete line of the file is damaged or contradicts the one before.
    """

    def __init__(self, path: str | os.PathLike[str], block: int) -> None:
        self.path = Path(path)
        self.block = whole_number(
            "block",
            block,
            at_least=1,
            cost="a crash that loses spent budget, or a flush to disk that promises nothing",
            remedy="pass how many releases one flush to disk covers, for instance 50",
        )
        # Closed blocks, equal neighbours as one, and the open one: a long run keeps few of them.
        self._closed: list[GaussianRelease] = []
        self._closed_count = 0
        self._promised: GaussianRelease | None = None
        self._complete_bytes = self._known_bytes = 0
        self._read()

    @property
    def reserved(self) -> int:
        """How many releases the file charges, over all runs that wrote to it."""
        return self._closed_count + self.open_block()

    def reserve(self, up_to: int, release: GaussianRelease) -> None:
        """Promises, on disk, that the releases before number ``up_to`` may run.

        Returns at once if they are promised already; else it promises a whole block and returns
        only after the line was flushed to disk.

        Args:
            up_to: Number of releases that will have started after the next one, >= 1, counted
                as `reserved` counts.
            release: The mechanism of one release (its count must be 1).

        Raises:
            GuaranteeError: The mechanism changed inside an open block, or ``up_to`` is not the
                next release.
        """
        up_to = whole_number(
            "up_to",
            up_to,
            at_least=1,
            cost="releases that run without being charged",
            remedy="pass the number of releases started so far, plus one",
        )
        if release.count != 1:
            raise _broken(
                must="a journal promises single releases of one mechanism",
                found=f"a release with count {release.count}",
                remedy="reserve with `plan.release(1)`",
            )
        if self._promised is not None and not self._promised.same_mechanism(release):
            self.record(up_to - 1)
        if up_to <= self.reserved:
            return
        start = self.reserved
        count = max(self.block, up_to - start)
        promised = release.times(count)
        self._append({"kind": "reserve", "start": start, **promised.to_dict()})
        self._promise(promised)

    def record(self, count: int) -> None:
        """Says on disk that ``count`` releases have started in all, and closes the open block.

        What the block promised beyond ``count`` is not charged any more; the next release needs a
        new promise. Call it when a checkpoint was written and when training ends.

        Args:
            count: Number of releases that have started, counted as `reserved` counts.

        Raises:
            GuaranteeError: ``count`` is outside the open block, so that a release ran without a
                promise or a charge would be taken back.
        """
        count = whole_number(
            "count",
            count,
            at_least=0,
            cost="a charge that does not fit what ran",
            remedy="pass the number of releases started so far",
        )
        if count == self.reserved and self._promised is None:
            return
        if not self._closed_count <= count <= self.reserved:
            raise _broken(
                must=f"a record must lie in the open block, between {self._closed_count} and "
                f"{self.reserved}",
                found=f"a record of {count} releases",
                remedy="reserve every release before it runs, and record only what started",
            )
        self._append({"kind": "record", "count": count})
        self._close(count)

    def open_block(self) -> int:
        """Returns how many of the charged releases may not have run.

        Returns:
            The length of the block that no `record` has closed; 0 if there is none.
        """
        return 0 if self._promised is None else self._promised.count

    def charged(self, after: int = 0) -> tuple[GaussianRelease, ...]:
        """Returns what a resume must charge: every release after the first ``after``.

        Args:
            after: How many releases the checkpoint's own ledger has counted.

        Returns:
            The releases that the file charges beyond those, oldest first; empty when the
            checkpoint knows of them all.

        Raises:
            GuaranteeError: The checkpoint knows of more releases than the file.
        """
        after = whole_number(
            "after",
            after,
            at_least=0,
            cost="a charge that does not fit what ran",
            remedy="pass the number of releases in the checkpoint's ledger",
        )
        if after > self.reserved:
            raise _broken(
                must="the journal must charge every release that a checkpoint knows of",
                found=f"{after} releases in the checkpoint and {self.reserved} in {self.path.name}",
                remedy="resume with the journal that was written beside the checkpoint",
            )
        left: list[GaussianRelease] = []
        for segment in (*self._closed, *([self._promised] if self._promised else [])):
            skipped = min(after, segment.count)
            after -= skipped
            if segment.count > skipped:
                left.append(segment.times(segment.count - skipped))
        return tuple(left)

    def _promise(self, block: GaussianRelease) -> None:
        self._close(self.reserved)
        self._promised = block

    def _close(self, count: int) -> None:
        kept = count - self._closed_count
        if self._promised is not None and kept:
            last = self._promised.times(kept)
            if self._closed and self._closed[-1].same_mechanism(last):
                last = last.times(kept + self._closed.pop().count)
            self._closed.append(last)
        self._closed_count, self._promised = count, None

    def _append(self, entry: dict[str, Any]) -> None:
        """Writes one line and returns when it is on the disk."""
        new = not self.path.exists()
        if new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        elif not self._complete_bytes <= self.path.stat().st_size <= self._known_bytes:
            raise _broken(
                must=f"one run writes the journal {self.path.name}",
                found="another run has written to it since this one opened it",
                remedy="resume a checkpoint in one process at a time; start this run again",
            )
        line = _sealed({"version": _VERSION, **entry})
        self._known_bytes = self._complete_bytes + len(line)
        with self.path.open("r+b" if not new else "xb") as file:
            file.seek(self._complete_bytes)
            file.truncate()  # a torn line that a crash had left
            file.write(line)
            file.flush()
            os.fsync(file.fileno())
        if new:
            flush_directory(self.path.parent)
        self._complete_bytes += len(line)

    def _read(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        self._known_bytes, self._complete_bytes = len(data), data.rfind(b"\n") + 1
        for number, line in enumerate(data[: self._complete_bytes].splitlines(), start=1):
            try:
                self._replay(_opened(line))
            except (ValueError, KeyError, TypeError, GuaranteeError) as damage:
                raise _broken(
                    must=f"every complete line of {self.path.name} must be as it was written",
                    found=f"line {number} is damaged ({damage!r})",
                    remedy="restore the file, or count its releases by hand and start a new one",
                ) from damage

    def _replay(self, entry: dict[str, Any]) -> None:
        if entry.pop("version") != _VERSION:
            raise ValueError("unknown version")
        kind = entry.pop("kind")
        if kind == "reserve":
            if entry.pop("start") != self.reserved:
                raise ValueError("a gap, or two writers")
            self._promise(GaussianRelease.from_dict(entry))
        elif kind == "record":
            if not self._closed_count <= entry["count"] <= self.reserved:
                raise ValueError("a record outside its block")
            self._close(entry["count"])
        else:
            raise ValueError("unknown kind")


def _sealed(entry: dict[str, Any]) -> bytes:
    body = json.dumps(entry, sort_keys=True)
    return (json.dumps({"entry": entry, "crc": zlib.crc32(body.encode())}) + "\n").encode()


def _opened(line: bytes) -> dict[str, Any]:
    outer = json.loads(line)
    entry: dict[str, Any] = outer["entry"]
    if zlib.crc32(json.dumps(entry, sort_keys=True).encode()) != outer["crc"]:
        raise ValueError("the checksum does not fit")
    return entry


def flush_directory(directory: Path) -> None:
    """Flushes a directory: a new file's name is safe only when that was done, too.

    Args:
        directory: Where the file was made.
    """
    if os.name != "posix":
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _broken(*, must: str, found: str, remedy: str) -> GuaranteeError:
    return GuaranteeError(
        must=must, found=found, cost="budget that was spent and is not counted", remedy=remedy
    )
