"""The training loss of chosen data set rows, as the checks of independence ask for it."""

from __future__ import annotations

import secrets
from collections import deque
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten
from torchmetrics import Metric

from lightning_privacy.clipping.refusals import (
    needs_company,
    no_single_loss,
    rows_read_together,
)
from lightning_privacy.errors import PrivacyError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lightning.pytorch import LightningModule

    from lightning_privacy.sampling import PrivateLoader
    from lightning_privacy.strategies import PrivateRun

ROWS = 8
# So many times as many rows are looked at, to find some that differ in labels and lengths.
_CANDIDATES = 4


class LossProbe:
    """Calls the module's ``training_step`` on batches of chosen rows, and leaves no trace.

    The rows go through the loader's own ``collate_fn``, the module's transfer hooks and the
    trainer's precision; what the step logs is dropped, and metrics get their states back.

    Args:
        trainer: The trainer of the fit.
        loader: The training loader.
        run: The private run.
        arguments: What the training step gets besides its batch; by default a ``batch_idx`` of 0,
            if it takes one.

    Attributes:
        full_precision: Whether the trainer's autocast is left out.
    """

    def __init__(
        self, trainer: Any, loader: PrivateLoader, run: PrivateRun, arguments: tuple[Any, ...] = ()
    ) -> None:
        self._trainer, self._loader, self._run = trainer, loader, run
        self._arguments = arguments
        self._samples: dict[int, Any] = {}
        self.full_precision = False

    def rows(self, most: int = ROWS) -> list[int]:
        """Some rows of the data set that differ in labels, lengths and paddings, if any do.

        Args:
            most: How many, at most.

        Returns:
            Positions, drawn afresh for each check, and no more than two or a physical batch, so
            that they fit into memory; fewer in a data set of fewer rows.
        """
        size = len(self._loader.dataset)  # type: ignore[arg-type]
        count = min(most, size, max(2, self._loader.batch_size or 1))
        candidates = secrets.SystemRandom().sample(range(size), min(size, _CANDIDATES * count))
        try:
            traits = [_traits(self._collated([row])) for row in candidates]
        except PrivacyError:  # a row that cannot be read, in the words of the data
            raise
        except Exception as error:
            raise needs_company(error) from error
        return self._alike(_most_different(candidates, traits, count))

    def company(self) -> list[int]:
        """As many rows as a training step computes at once.

        Returns:
            Positions, drawn afresh for each check.
        """
        size = len(self._loader.dataset)  # type: ignore[arg-type]
        # In manual optimization a whole draw is one batch.
        largest = max(len(micro.indices) for micro in self._loader.current)
        count = min(size, max(self._loader.batch_size or 1, largest))
        return self._alike(secrets.SystemRandom().sample(range(size), count))

    def _alike(self, rows: list[int]) -> list[int]:
        """The same on all ranks where passes communicate: what is found decides how many follow."""
        world = self._run.world
        return world.from_first(rows) if world.lockstep else rows

    def learn_rows(self, row: int) -> None:
        """Let the loader learn where a batch shows how many rows it has.

        Args:
            row: A position in the data set.
        """
        two, three = (self._collated([row] * count) for count in (2, 3))
        self._loader.rows.learn(two, three)

    def require_rows_apart(self, rows: Sequence[int]) -> None:
        """Refuse a data set that reads several rows at once and mixes them.

        One that augments at random cannot be compared, and passes.

        Args:
            rows: Positions of at least two rows.

        Raises:
            GuaranteeError: A row differs with the rows that are read with it.
        """
        if getattr(self._loader.dataset, "__getitems__", None) is None:
            return
        alone = [self._read(row) for row in rows]
        if all(_same(first, self._read(row)) for first, row in zip(alone, rows, strict=True)):
            together = self._loader.dataset.__getitems__(list(rows))  # type: ignore[attr-defined]
            for row, own, shared in zip(rows, alone, together, strict=True):
                if not _same(own, shared):
                    raise rows_read_together(row)

    def __call__(self, rows: Sequence[int]) -> Tensor | None:
        """Compute the training loss of a batch.

        Args:
            rows: Positions in the data set; may repeat.

        Returns:
            The scalar loss; None if the step returns none.

        Raises:
            ConfigurationError: The step returns several losses.
        """
        module = self._trainer.lightning_module
        batch = self._transferred(self._collated(rows))
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        arguments = self._arguments or ((0,) if takes_index else ())
        plugin = self._trainer.strategy.precision_plugin
        with _quiet(module), _without_autocast(plugin) if self.full_precision else nullcontext():
            loss = self._run.probe(batch, *arguments)
            if loss is not None:
                if loss.numel() != 1 and module.automatic_optimization:
                    raise no_single_loss(loss.shape)
                self._before_backward(module, loss)
        if loss is not None and _has_own_backward(module):
            _go_through(module, loss)
        return loss

    def _before_backward(self, module: LightningModule, loss: Tensor) -> None:
        """Call the hooks that may still change what the backward will bring."""
        for callback in self._trainer.callbacks:
            callback.on_before_backward(self._trainer, module, loss)
        module.on_before_backward(loss)

    def _collated(self, rows: Sequence[int]) -> Any:
        for row in rows:
            # Once per row: one with random augmentation would be another example each time.
            if row not in self._samples:
                self._samples[row] = self._read(row)
        samples = [self._samples[row] for row in rows]
        # Copies: a step may write into its batch, or ask for gradients of it.
        return self._loader.collate_fn(
            apply_to_collection(samples, Tensor, Tensor.clone, allow_frozen=True)
        )

    def _read(self, row: int) -> Any:
        """As torch's loader reads."""
        dataset: Any = self._loader.dataset
        together = getattr(dataset, "__getitems__", None)
        return dataset[row] if together is None else together([row])[0]

    def _transferred(self, batch: Any) -> Any:
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = strategy.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)


def _has_own_backward(module: LightningModule) -> bool:
    defined_in = str(getattr(module.backward, "__module__", None))
    return not defined_in.startswith(("lightning.", "pytorch_lightning."))


def _go_through(module: LightningModule, loss: Any) -> None:
    """Let the checks' backward go the way of the training's."""
    loss.backward = lambda: module.backward(loss.clone())


def _traits(batch: Any) -> list[object]:
    """What a loss could divide by: shapes, ignored labels, zeros of a mask, single labels."""
    tensors: list[Tensor] = []
    apply_to_collection(batch, Tensor, tensors.append, allow_frozen=True)
    traits: list[object] = []
    for tensor in tensors:
        single = tensor.item() if tensor.numel() == 1 else None
        traits += [tensor.shape, int((tensor == 0).sum()), int((tensor == -100).sum()), single]
    return traits


def _most_different(rows: list[int], traits: list[list[object]], count: int) -> list[int]:
    """The first row, and then always the one with the most traits that no chosen row has."""
    left = dict(zip(rows, traits, strict=True))
    chosen = [rows[0]]
    seen = [{trait} for trait in left.pop(rows[0])]
    while len(chosen) < count:
        new = {
            row: sum(t not in s for t, s in zip(own, seen, strict=False))
            for row, own in left.items()
        }
        best = max(new, key=new.__getitem__)
        chosen.append(best)
        for known, trait in zip(seen, left.pop(best), strict=False):
            known.add(trait)
    return chosen


def _same(first: Any, second: Any) -> bool:
    """Whether two samples hold equal things; of what cannot be compared: no."""
    leaves, others = tree_flatten(first)[0], tree_flatten(second)[0]
    return len(leaves) == len(others) and all(map(_equal, leaves, others))


def _equal(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return torch.equal(first, second)
    return type(first) is type(second) and np.array_equal(first, second)


@contextmanager
def _without_autocast(plugin: Any) -> Iterator[None]:
    """A mixed precision that computes in the parameters' own type."""
    vars(plugin)["forward_context"] = nullcontext
    try:
        yield
    finally:
        del vars(plugin)["forward_context"]


# What torch keeps about a module itself; buffers and gradients are restored elsewhere.
_INTERNAL = frozenset(vars(nn.Module())) - {"training"}


@contextmanager
def attributes_kept(module: nn.Module) -> Iterator[None]:
    """Give every plain attribute of a module back: counters, lists of losses, caches."""
    parts = [part for part in module.modules() if not isinstance(part, Metric)]
    before = [{n: v for n, v in vars(p).items() if n not in _INTERNAL} for p in parts]
    contents = [
        (value, value.copy())
        for held in before
        for value in held.values()
        if type(value) in (list, dict, set, deque)
    ]
    try:
        yield
    finally:
        for part, held in zip(parts, before, strict=True):
            own = vars(part)
            for name in [n for n in own if n not in _INTERNAL and n not in held]:
                del own[name]
            own.update(held)
        for value, copied in contents:
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(copied)


@contextmanager
def _quiet(module: LightningModule) -> Iterator[None]:
    """No logging, and metrics and ``requires_grad`` as before."""
    own: dict[str, Any] = vars(module)
    shadowed: dict[str, Any] = {name: own[name] for name in ("log", "log_dict") if name in own}
    metrics = [part for part in module.modules() if isinstance(part, Metric)]
    states = [(metric, metric.update_count, _copied(metric.metric_state)) for metric in metrics]
    trainable = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
    own["log"] = own["log_dict"] = _dropped
    try:
        yield
    finally:
        for name in ("log", "log_dict"):
            del own[name]
        own.update(shadowed)
        for metric, updates, state in states:
            _give_back(metric, updates, state)
        for parameter, wanted in trainable:
            if parameter.requires_grad != wanted:
                parameter.requires_grad_(wanted)


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    # A metric adds to its states in place.
    return {n: v.clone() if isinstance(v, Tensor) else list(v) for n, v in state.items()}


def _give_back(metric: Metric, updates: int, state: dict[str, Any]) -> None:
    metric.reset()
    if updates:
        # Weighs running means; the public name is read-only.
        metric._update_count = updates
        for name, value in state.items():
            setattr(metric, name, value)


def _dropped(*_arguments: Any, **_named: Any) -> None:
    """Stands in for ``log`` during a probe."""
