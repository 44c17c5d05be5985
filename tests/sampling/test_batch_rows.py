"""A batch with more or fewer rows than were drawn is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_privacy.errors import GuaranteeError
from lightning_privacy.sampling.batch_rows import BatchRows


def batch(rows: int, frames: int = 4) -> dict[str, Any]:
    """Sequences of frames laid end to end, labels, and names."""
    return {
        "frames": torch.zeros(rows * frames, 3),
        "labels": torch.zeros(rows),
        "names": ["a"] * rows,
    }


def learnt() -> BatchRows:
    found = BatchRows()
    found.learn(batch(2), batch(3))
    return found


@pytest.mark.parametrize(("rows", "frames"), [(1, 4), (5, 4), (5, 7)])
def test_as_many_rows_as_were_drawn_pass(rows: int, frames: int) -> None:
    learnt().require(batch(rows, frames), rows)


@pytest.mark.parametrize("rows", [3, 5, 8])
def test_others_are_refused(rows: int) -> None:
    with pytest.raises(GuaranteeError, match=f"{rows} rows made of 4"):
        learnt().require(batch(rows), 4)


def test_what_came_before_it_was_learnt_is_looked_at_then() -> None:
    found = BatchRows()
    found.require(batch(3), 4)
    with pytest.raises(GuaranteeError, match="3 rows made of 4"):
        found.learn(batch(2), batch(3))


def test_one_place_with_the_number_of_rows_is_enough() -> None:
    """Boxes of all images side by side: the row that was learnt from has one."""

    def boxes(rows: int, count: int) -> tuple[Tensor, Tensor]:
        return torch.zeros(rows, 3, 8, 8), torch.zeros(count, 4)

    found = BatchRows()
    found.learn(boxes(2, 2), boxes(3, 3))
    found.require(boxes(4, 9), 4)
    with pytest.raises(GuaranteeError):
        found.require(boxes(3, 9), 4)


@pytest.mark.parametrize("other", ["text", (torch.zeros(3),), {"labels": torch.zeros(())}])
def test_nothing_is_known_of_another_structure(other: Any) -> None:
    learnt().require(other, 4)
    BatchRows().require(other, 4)


def listed(rows: int, named: int) -> Any:
    """Pictures of any size, boxes in each, and names; no tensor counts rows."""
    boxes = [{"boxes": [torch.zeros(1, 4)] * (row % 3)} for row in range(rows)]
    return [torch.zeros(3, 8, 8 + row) for row in range(rows)], boxes, ["a"] * named


def test_a_list_of_rows_shows_how_many_there_are() -> None:
    found = BatchRows()
    found.learn(listed(2, 2), listed(3, 3))
    for rows in (1, 4, 9):
        found.require(listed(rows, rows), rows)
    with pytest.raises(GuaranteeError, match="3 rows made of 4"):
        found.require(listed(3, 4), 4)
