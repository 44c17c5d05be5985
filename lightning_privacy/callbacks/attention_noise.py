"""`AttentionNoise`: noise in attention while a model trains. A regulariser, worth no ε."""

from __future__ import annotations

import math
import secrets
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_privacy.attention import Injection, inject
from lightning_privacy.clipping.randomness import is_still
from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from lightning_privacy.attention.realisation import Method, Where

Schedule = Literal["constant", "linear", "cosine", "warmup"]

_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda _done: 1.0,
    "linear": lambda done: 1.0 - done,
    "cosine": lambda done: (1.0 + math.cos(math.pi * done)) / 2,
    "warmup": lambda done: min(1.0, 10.0 * done),
}


class AttentionNoise(Callback):
    """Adds Gaussian-like noise to the attention of a model while it trains.

    With noise ξ of standard deviation ``std``, independent for every example, head, query, key,
    layer and step, attention becomes ``softmax(Q Kᵀ / √d + ξ) V`` (``where="logits"``) or
    ``(softmax(Q Kᵀ / √d) + ξ) V`` (``where="weights"``).

    **It earns no ε.** Noise in attention is a regulariser: the first token of a causal model
    attends to itself alone, so its output is the same at any noise, and residual connections carry
    every token past it. It costs no ε either: the noise does not depend on the data, so that each
    example's gradient stays a function of that example and is clipped as ever. See the page "Noise
    in attention" of the documentation.

    The noise is a function of a counter, so that a checkpoint's recomputation meets the same. On a
    GPU it is made inside a fused kernel; on the CPU it is a dense matrix. It reaches models of
    transformers (also with LoRA and quantised weights), `torch.nn.MultiheadAttention`, modules that
    call ``F.scaled_dot_product_attention``, and `lightning_privacy.attention.NoisyAttention`; an
    attention layer that it cannot reach is refused. The model is as before after the fit.

    ``attention_noise/std`` and ``attention_noise/perturbation`` are logged; the latter is measured
    in the first step and in those that the Trainer logs (``log_every_n_steps``). It is computed on
    private data and not covered by ε.

    Args:
        std: Standard deviation ≥ 0 of the noise; for logits up to 0.5 is mild. The strength λ_attn
            of the objective.
        where: On the "logits", before the softmax; or on the "weights", after it, where rows then
            no longer sum to one.
        schedule: The factor on ``std`` along the training: "constant", falling to zero "linear" or
            "cosine", rising over the first tenth ("warmup"); or a function of the share of the
            planned steps that is done, in [0, 1].
        layers: Which attention layers: numbers in the order of the model (negative ones from the
            end) or patterns of module names; by default all.
        at_inference: Whether validation, test and prediction are noised, too.
        method: How noise on logits is made: "auto", as a "dense" matrix, or inside the kernel by
            "flex", which needs a GPU.
        seed: For repeatable noise; by default drawn from the operating system at each start. It is
            no secret and is not part of any guarantee.

    Raises:
        ConfigurationError: An argument is outside its range.

    Example:
        >>> callbacks = [AttentionNoise(std=0.1, layers=[0, 1])]
    """

    def __init__(
        self,
        std: float,
        where: Where = "logits",
        schedule: Schedule | Callable[[float], float] = "constant",
        *,
        layers: Sequence[int | str] | None = None,
        at_inference: bool = False,
        method: Method = "auto",
        seed: int | None = None,
    ) -> None:
        _require_choice("where", where, ("logits", "weights"))
        _require_choice("method", method, ("auto", "dense", "flex"))
        if not callable(schedule):
            _require_choice("schedule", schedule, tuple(_SCHEDULES))
        if not 0 <= std < math.inf:
            raise ConfigurationError(
                must="std is a finite number >= 0",
                found=f"std={std}",
                cost="no noise of that size exists",
                remedy="0.1 is a mild choice for logits",
            )
        self.base_std, self.where, self.at_inference = float(std), where, at_inference
        self.layers = None if layers is None else tuple(layers)
        self.schedule = schedule if callable(schedule) else _SCHEDULES[schedule]
        self._seed = seed
        self._shared = Injection(
            where=where, at_inference=at_inference, method=method, quiet=is_still
        )
        self._remove: Callable[[], None] | None = None
        self._confirmed = False
        self._last: Tensor | None = None

    # ------------------------------------------------------------------ what a user may ask
    @property
    def std(self) -> float:
        """The present standard deviation: ``std`` times the schedule."""
        return self._shared.std

    @property
    def perturbation(self) -> Tensor | None:
        """How far the noise moved attention when last measured, a scalar tensor on its device.

        The total variation distance between attention with and without noise, averaged over
        layers, heads and a few rows and queries: 0 is no change, 1 attention to other keys
        altogether. (Noise on weights: half the sum of its absolute values.) None before the first
        noised forward; kept when the fit ends. Computed on private data: not covered by ε.
        """
        now = self._shared.perturbation()
        return self._last if now is None else now

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[nn.Module]:
        """Noise a model outside of any trainer, such as for ``generate`` with ``at_inference``.

        Args:
            model: The model; restored afterwards.

        Yields:
            The model.
        """
        self._install(model, 0)
        self._shared.std = self.base_std
        self._shared.begin(secrets.randbits(63) if self._seed is None else "applied")
        try:
            yield model
        finally:
            self._restore()

    # ------------------------------------------------------------------ installed and removed
    def _install(self, model: nn.Module, rank: int) -> None:
        if self._remove is None:
            seed = secrets.randbits(63) if self._seed is None else self._seed
            # Ranks hold other examples, so they have other noise.
            self._shared.seed, self._confirmed = (seed << 20) + rank, False
            self._remove = inject(model, self._shared, self.layers)

    def _restore(self) -> None:
        if self._remove is not None:
            remove, self._remove, self._last = self._remove, None, self.perturbation
            remove()
            self._shared.std = 0.0

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Noise the attention layers."""
        self._install(pl_module, trainer.global_rank)
        self._shared.std = self.base_std * float(self.schedule(0.0))

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model."""
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the model."""
        self._restore()

    # ------------------------------------------------------------------ training
    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the size of the noise and the key of the step."""
        planned = trainer.estimated_stepping_batches
        done = min(1.0, trainer.global_step / planned) if planned else 0.0
        self._shared.std = self.base_std * float(self.schedule(done))
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged = bool(every) and (trainer.global_step + 1) % every == 0
        self._shared.begin(("train", trainer.current_epoch, batch_idx), measuring=logged)

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A layer may be called again, with fresh noise."""
        self._shared.after_backward()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the size of the noise and of its effect."""
        if self.std and not self._confirmed:
            self._require_reached()
        if trainer.barebones:
            return
        each_step: dict[str, Any] = {"on_step": True, "on_epoch": False, "batch_size": 1}
        pl_module.log("attention_noise/std", self.std, **each_step)
        size = self.perturbation
        if size is not None:
            pl_module.log("attention_noise/perturbation", size, **each_step)

    def _require_reached(self) -> None:
        missed = [layer.name for layer in self._shared.layers if not layer.reached]
        if len(missed) == len(self._shared.layers):
            raise ConfigurationError(
                must="the chosen attention layers compute their attention where noise can reach it",
                found=f"a training step in which none of {', '.join(missed)} asked for noise",
                cost="the model would silently train without noise",
                remedy="let the layers call transformers' attention interface, "
                "F.scaled_dot_product_attention or attention_noise, in training mode",
            )
        if missed:
            rank_zero_warn(
                f"AttentionNoise: no noise reached {', '.join(missed)} in the first step."
            )
        self._confirmed = True

    # ------------------------------------------------------------------ validation, test, predict
    def _before_inference(self, trainer: Trainer, module: LightningModule, *step: object) -> None:
        if not self.at_inference:
            return
        self._install(module, trainer.global_rank)
        if trainer.state.fn != "fit":
            self._shared.std = self.base_std
        self._shared.begin((*step, trainer.current_epoch))

    @override
    def on_validation_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Noise validation, if asked to."""
        self._before_inference(trainer, pl_module, "validation", dataloader_idx, batch_idx)

    @override
    def on_test_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Noise the test, if asked to."""
        self._before_inference(trainer, pl_module, "test", dataloader_idx, batch_idx)

    @override
    def on_predict_batch_start(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Noise predictions, if asked to."""
        self._before_inference(trainer, pl_module, "predict", dataloader_idx, batch_idx)


def _require_choice(name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigurationError(
            must=f"{name} is one of {', '.join(choices)}",
            found=f"{name}={value!r}",
            cost="another noise than meant",
            remedy="choose one of them",
        )
