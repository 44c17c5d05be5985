"""The training loss of chosen data set rows, as the checks before the first step ask for it."""

from __future__ import annotations

import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from lightning.pytorch.utilities.signature_utils import is_param_in_hook_signature
from torch import Tensor
from torchmetrics import Metric

from lightning_privacy.clipping.checks import check_independence, learn
from lightning_privacy.clipping.layout import Layouts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from lightning.pytorch import LightningModule
    from torch import nn

    from lightning_privacy.callbacks._settings import PrivacySettings
    from lightning_privacy.sampling import PrivateLoader
    from lightning_privacy.strategies import PrivateRun

_ROWS = 8


def checked_layouts(
    settings: PrivacySettings, trainer: Any, run: PrivateRun, parameters: Mapping[str, nn.Parameter]
) -> Layouts:
    """Learn where the rows of a batch lie, and check that examples are independent.

    Args:
        settings: What the user configured.
        trainer: The trainer of the fit.
        run: The private run, with its loader.
        parameters: The covered parameters by name.

    Returns:
        The layouts, for the private step.

    Raises:
        GuaranteeError: An example's gradient depends on other examples.
    """
    module, loader = trainer.lightning_module, run.loader
    assert loader is not None
    probe = LossProbe(trainer, loader, run)
    rows = probe.rows()
    checks = settings.independence_check and len(rows) > 1
    # Micro-batches of one row need no layouts; more rows than that may not fit into memory.
    if not checks and loader.batch_size == 1 and module.automatic_optimization:
        return Layouts()
    layouts = learn(module, parameters, probe, rows[0])
    if checks:
        check_independence(
            module,
            parameters,
            probe,
            rows,
            layouts=layouts,
            loss_reduction=settings.loss_reduction,
            low_precision=not str(trainer.precision).startswith(("32", "64")),
        )
    return layouts


class LossProbe:
    """Calls the module's ``training_step`` on batches of chosen rows, and leaves no trace.

    The rows go through the loader's own ``collate_fn``, the module's transfer hooks and the
    trainer's precision; what the step logs is dropped, and metrics get their states back.

    Args:
        trainer: The trainer of the fit.
        loader: The training loader.
        run: The private run.
    """

    def __init__(self, trainer: Any, loader: PrivateLoader, run: PrivateRun) -> None:
        self._trainer, self._loader, self._run = trainer, loader, run
        self._samples: dict[int, Any] = {}

    def rows(self) -> list[int]:
        """Some different rows of the data set.

        Returns:
            Up to eight positions, drawn afresh for each check, and no more than two or a physical
            batch, so that they fit into memory; fewer in a data set of fewer rows.
        """
        size = len(self._loader.dataset)  # type: ignore[arg-type]
        count = min(_ROWS, size, max(2, self._loader.batch_size or 1))
        return secrets.SystemRandom().sample(range(size), count)

    def __call__(self, rows: Sequence[int]) -> Tensor | None:
        """Compute the training loss of a batch.

        Args:
            rows: Positions in the data set; may repeat.

        Returns:
            The scalar loss; None if the step returns none.
        """
        module = self._trainer.lightning_module
        batch = self._transferred(self._loader.collate_fn(self._samples_of(rows)))
        takes_index = is_param_in_hook_signature(module.training_step, "batch_idx", min_args=2)
        arguments = (0,) if takes_index else ()
        with _quiet(module):
            return self._run.probe(batch, *arguments)

    def _samples_of(self, rows: Sequence[int]) -> list[Any]:
        # Once per row: a data set with random augmentation would give another example each time.
        for row in rows:
            if row not in self._samples:
                self._samples[row] = self._loader.dataset[row]
        return [self._samples[row] for row in rows]

    def _transferred(self, batch: Any) -> Any:
        strategy = self._trainer.strategy
        batch = strategy.precision_plugin.convert_input(batch)
        batch = strategy.lightning_module._on_before_batch_transfer(batch, dataloader_idx=0)
        return strategy.batch_to_device(batch, dataloader_idx=0)


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
        for name, value in state.items():
            setattr(metric, name, value)


def _dropped(*_arguments: Any, **_named: Any) -> None:
    """Stands in for ``log`` during a probe."""
