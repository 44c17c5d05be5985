"""`PrivateHiddenStates`: a local guarantee for what passes one place of a model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from typing_extensions import override

from lightning_privacy.accounting.gaussian import gaussian_epsilon, gaussian_noise_multiplier
from lightning_privacy.attention.cut import BypassCheck, Cut
from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    UnsupportedOperationError,
)
from lightning_privacy.noise import GaussianNoise, fresh_secret

if TYPE_CHECKING:
    from torch import Tensor, nn


class PrivateHiddenStates(Callback):
    """Clips and noises each example's hidden state at one place, and says what that is worth.

    **What is guaranteed.** For one example, and any two contents of it of equal shape, everything
    that depends on the content through the noised hidden states alone is (ε, δ)-indistinguishable:
    the states as an observer sees them, all activations and outputs above the cut, and the weights
    trained above it. This is local differential privacy under replacement of one example's content;
    it needs no trusted party above the cut. Sensitivity 2C, Gaussian noise, k passes of the example
    compose to one Gaussian mechanism of multiplier ``std / (2 C √k)``.

    **What is not.** Labels, shapes, lengths and padding, the presence of an example; and whatever
    reads the batch above the cut. A language model whose labels are its input is not protected.

    Gradients end at the cut: nothing below learns from an example. Checked: the module at the cut
    is frozen; in the first training batch nothing computed below reaches the loss but through the
    cut, and no batch norm below mixes examples; data are passed through once an epoch. Validation,
    test and prediction are noised as well, and each run of them counts as a pass.

    Args:
        cut: Name of the module whose output is cut, as in ``named_modules`` of the LightningModule.
        clip_norm: C > 0, the largest norm of the whole hidden state of one example.
        epsilon: The budget of all passes together, > 0.
        delta: δ in (0, 1).
        passes: How often one example may pass: epochs, and runs of validation and the like.

    Raises:
        ConfigurationError: An argument is outside its range.
    """

    def __init__(
        self, cut: str, *, clip_norm: float, epsilon: float, delta: float, passes: int
    ) -> None:
        legal = 0 < clip_norm < math.inf and 0 < epsilon < math.inf and 0 < delta < 1
        if not legal or passes < 1:
            raise ConfigurationError(
                must="clip_norm and epsilon are finite and > 0, delta is in (0, 1), passes is >= 1",
                found=f"clip_norm={clip_norm}, epsilon={epsilon}, delta={delta}, passes={passes}",
                cost="no such guarantee exists",
                remedy="choose values in range",
            )
        self.cut, self.clip_norm, self.delta, self.passes = cut, clip_norm, delta, passes
        self._multiplier = gaussian_noise_multiplier(epsilon, delta, passes)
        self._finished = self._in_run = self._release = 0
        self._noise = GaussianNoise(fresh_secret())
        self._cut: Cut | None = None
        self._check: BypassCheck | None = None
        self._checked = False
        self._handle: Any = None

    # ------------------------------------------------------------------ what a user may ask
    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in every coordinate."""
        return 2 * self.clip_norm * self._multiplier

    @property
    def passes_made(self) -> int:
        """How often one example can have passed so far."""
        return self._finished + self._in_run

    def epsilon(self) -> float:
        """ε of the passes made so far, at the configured δ."""
        return gaussian_epsilon(self._multiplier, self.delta, self.passes_made)

    # ------------------------------------------------------------------ installed and removed
    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be accounted."""
        self._checked = False
        if any(isinstance(other, DifferentialPrivacy) for other in trainer.callbacks):  # type: ignore[attr-defined]
            raise _refusal(
                "PrivateHiddenStates trains without DifferentialPrivacy",
                "both callbacks in one trainer",
                "two guarantees of different things, and checks of the one that pass the other by",
                "train with one of them",
            )
        if trainer.world_size > 1:
            raise _refusal(
                "each example passes the cut once an epoch",
                f"{trainer.world_size} processes, whose samplers repeat examples",
                "passes that are not counted",
                "devices=1",
            )

    def _install(self, module: LightningModule) -> None:
        if self._handle is not None:
            return
        parts = dict(module.named_modules())
        if self.cut not in parts or not self.cut:
            raise ConfigurationError(
                must="cut names a module of the model",
                found=f"cut={self.cut!r}; there are {', '.join([*parts][1:20])}, …",
                cost="nothing would be noised",
                remedy="take a name of named_modules()",
            )
        self._cut = Cut(self.cut, self.clip_norm, self._draw)

        def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
            assert self._cut is not None
            released = self._cut(output)
            if self._check is not None:
                self._check.passed()
            self._count()
            return released

        self._handle = parts[self.cut].register_forward_hook(hook)

    def _draw(self, like: Tensor) -> Tensor:
        self._release += 1
        return self._noise.sample(self.cut, like, self._release, self.noise_std)

    def _count(self) -> None:
        assert self._cut is not None
        if self._cut.calls > self._in_run:
            self._in_run = self._cut.calls
            if self.passes_made > self.passes:
                raise BudgetExceededError(
                    must=f"an example passes the cut at most {self.passes} times",
                    found=f"pass {self.passes_made}",
                    cost=f"more than the ε of {self.passes} passes",
                    remedy="plan more passes: epochs, and each run of validation, test, prediction",
                )

    def _restore(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = self._cut = None
        self._close_check()

    def _close_check(self) -> None:
        if self._check is not None:
            self._check.close()
            self._check = None

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the model."""
        self._end_run()
        self._restore()

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Restore the model."""
        self._end_run()
        self._restore()

    # ------------------------------------------------------------------ passes
    def _begin_run(self, trainer: Trainer, module: LightningModule, loaders: Any) -> None:
        self._install(module)
        self._end_run()
        loaders = loaders if isinstance(loaders, list | tuple) else [loaders]
        for loader in loaders:
            sampler = getattr(loader, "sampler", None)
            once = isinstance(sampler, SequentialSampler) or (
                isinstance(sampler, RandomSampler) and not sampler.replacement
            )
            if not isinstance(loader, DataLoader) or not once:
                raise _refusal(
                    "each example is drawn once in a pass",
                    f"{type(loader).__name__} with {type(sampler).__name__}",
                    "passes that are not counted",
                    "a DataLoader with or without shuffle=True, over a data set with a length",
                )

    def _end_run(self) -> None:
        self._finished, self._in_run = self._finished + self._in_run, 0

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Another pass of all examples begins."""
        self._begin_run(trainer, pl_module, trainer.train_dataloader)

    @override
    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Before the first batch: watch for ways past the cut."""
        assert self._cut is not None
        self._cut.begin()
        if not self._checked:
            self._close_check()
            cut = dict(pl_module.named_modules())[self.cut]
            self._require_frozen(pl_module, cut)
            self._check = BypassCheck(pl_module, cut, self.cut)

    def _require_frozen(self, module: LightningModule, cut: nn.Module) -> None:
        trained = [name for name, p in cut.named_parameters() if p.requires_grad]
        if trained:
            raise GuaranteeError(
                must="everything below the cut is frozen",
                found=f"trainable: {self.cut}.{trained[0]}",
                cost="weights that learn from the examples without noise",
                remedy="requires_grad_(False) for the part below the cut",
            )

    @override
    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: Tensor
    ) -> None:
        """Refuse a loss that was reached by another way than through the cut."""
        if self._check is not None:
            self._check.require_none(loss)
            self._close_check()
            self._checked = True

    @override
    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The pass is over."""
        if self._cut is not None:
            self._cut.after_backward()

    def _begin_batch(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._cut is not None:
            self._cut.begin()

    on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin_batch

    @override
    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each run of validation is a pass of its examples."""
        self._begin_run(trainer, pl_module, trainer.val_dataloaders)

    @override
    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each test is a pass of its examples."""
        self._begin_run(trainer, pl_module, trainer.test_dataloaders)

    @override
    def on_predict_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Each prediction is a pass of its examples."""
        self._begin_run(trainer, pl_module, trainer.predict_dataloaders)

    # ------------------------------------------------------------------ checkpoints
    @override
    def state_dict(self) -> dict[str, Any]:
        """The passes made, so that a resumed run goes on counting."""
        return {"passes_made": self.passes_made}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self._finished = max(self._finished, int(state_dict["passes_made"]))


def _refusal(must: str, found: str, cost: str, remedy: str) -> UnsupportedOperationError:
    return UnsupportedOperationError(must=must, found=found, cost=cost, remedy=remedy)
