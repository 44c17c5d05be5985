"""Learn where the rows of a batch lie, by running the forward with two and with three rows."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch.utils.checkpoint import CheckpointFunction

from lightning_privacy.clipping.capture import Capture
from lightning_privacy.clipping.layout import PROBE_ROWS, Layouts, Record, shape_of
from lightning_privacy.errors import UnsupportedOperationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from torch import Tensor, nn

    from lightning_privacy.clipping.layout import RowDim

# Each round learns one further step of expressions of parameters (slice, then transpose, …).
_MOST_ROUNDS = 12


class _Probe(Capture):
    """A capture that runs operations it does not know as they are, and notes all shapes."""

    observing = True

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], *, rows: int, layouts: Layouts
    ) -> None:
        super().__init__(parameters, rows=rows, layouts=layouts)
        self.records: dict[object, list[Record]] = {}

    def rows_of(self, name: str, func: Callable[..., Any], tensor: Tensor) -> RowDim | None:
        """As in a capture, but unknown where it would refuse: the next round knows better."""
        try:
            return super().rows_of(name, func, tensor)
        except UnsupportedOperationError:
            return None

    def observe(self, key: object, leaves: list[Any], outputs: list[Any]) -> None:
        record = tuple(map(shape_of, leaves)), tuple(map(shape_of, outputs))
        self.records.setdefault(key, []).append(record)


@contextmanager
def without_reentrant_checkpointing() -> Iterator[None]:
    """Run checkpointed blocks as they are: their forward without gradients would show nothing."""
    kept = CheckpointFunction.__dict__.get("apply")
    plain = staticmethod(lambda function, _, *arguments: function(*arguments))
    setattr(CheckpointFunction, "apply", plain)  # noqa: B010 - a method, to a type checker
    try:
        yield
    finally:
        if kept is None:
            del CheckpointFunction.apply
        else:
            setattr(CheckpointFunction, "apply", kept)  # noqa: B010


def learn_layouts(
    parameters: Mapping[str, nn.Parameter], forward: Callable[[int], object]
) -> Layouts:
    """Learn the layouts of all operations on ``parameters``.

    Args:
        parameters: the trainable parameters by name.
        forward: runs the forward and the loss for a batch of that many copies of one row, in
            training mode and with the same random decisions each time.

    Returns:
        The layouts, for `Capture`.
    """
    layouts = Layouts()
    for _ in range(_MOST_ROUNDS):
        known, layouts = layouts, Layouts()
        records = []
        for rows in PROBE_ROWS:
            probe = _Probe(parameters, rows=rows, layouts=known)
            with probe.opened(), without_reentrant_checkpointing():
                forward(rows)
            records.append(probe.records)
        small, large = records
        for key in small:
            if key in large:
                layouts.learn(key, small[key], large[key])
        if layouts == known:
            break
    return layouts
