"""`Canaries`: made-up members that show, at the end of a fit, how much of the claim can be seen."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_privacy.audit.membership import MembershipFigures, membership_figures
from lightning_privacy.callbacks._canary_coins import Coins
from lightning_privacy.callbacks._canary_gradients import GradientCanaries
from lightning_privacy.callbacks._canary_rows import InsertsRows
from lightning_privacy.callbacks._canary_texts import TextCanaries
from lightning_privacy.callbacks._home import Results
from lightning_privacy.callbacks._scoring import ExampleLosses
from lightning_privacy.callbacks.privacy_report import privacy_of
from lightning_privacy.errors import ConfigurationError, GuaranteeError, UnsupportedOperationError
from lightning_privacy.metrics.functional import epsilon_lower_bound
from lightning_privacy.reports import Finding
from lightning_privacy.strategies.kinds import joined
from lightning_privacy.types import one_of, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from lightning.pytorch import LightningModule, Trainer

    from lightning_privacy.callbacks.differential_privacy import DifferentialPrivacy

CanaryKind = Literal["text", "new_token", "gradient"]
_NOTE = (
    "Canaries: fair coins decided which took part. The bound on ε is that of one run (Steinke et "
    "al. 2023, arXiv 2305.08846); it holds at {confidence:.0%}, whatever the mechanism, and is far "
    "below ε for a correct one."
)
_REFUTED = (
    "The canaries prove ε >= {bound:.2f} at δ = {delta:g}, where {claimed:.2f} is claimed. With "
    "probability {confidence:.0%} the claim is wrong: report this as a bug, with the configuration."
)


class CanaryAudit(NamedTuple):
    """What the canaries of one fit show. Not covered by ε.

    Attributes:
        figures: How well members were told from the others.
        epsilon: Lower bound on ε that one run proves.
        claimed: ε of the steps made.
        delta: δ of both.
        refuted: Whether the bound is above the claim.
    """

    figures: MembershipFigures
    epsilon: float
    claimed: float
    delta: float
    refuted: bool


class Canaries(InsertsRows):
    """Puts made-up members into the data of a private fit, and audits the fit by them at its end.

    Of ``count`` canaries a fair coin includes each, or leaves it out. Those that are in are records
    of the mechanism like all others: sampled at the same rate, clipped to the same norm, covered by
    the same ε; with ``unit="user"`` each is a user. At the end an attack says which were in, and
    what it gets right gives a lower bound on ε. A bound above the claim is a bug of the trainer.

    The coins and the canaries are drawn from the operating system's randomness, kept in memory
    only, and in no checkpoint; so a fit that goes on from a checkpoint cannot be audited. Rates are
    computed as if half of the canaries were in, whatever the coins said. All processes of a fit
    throw the same coins, and find the same; each canary is drawn in one of them.

    Canaries cost usefulness: random texts are learnt from like others. Audit in a run of its own.

    Args:
        count: How many, an even number; some hundred are needed to prove an ε of 1.
        kind: "text" (random tokens), "new_token" (random tokens before a token that the data never
            hold) or "gradient" (random directions that are added to the sum in the place of a
            gradient: for any module and data, and the strongest).
        rows: Canaries of your own, in the place of ``count`` and ``kind``: examples as the data set
            gives them. They must not be in the data.
        tokens: Number of ordinary tokens to draw from, by default the data module's ``vocab_size``.
        new_tokens: Tokens that the data never hold by public knowledge, for "new_token".
        length: Tokens of a canary, >= 2.
        losses: Gets module and batch and returns each example's loss ``[B]``; see
            `LeakageMonitor`.
        significance: Chance in (0, 0.5) that the bound is above the true ε.

    Attributes:
        result: What the last fit showed; None before.

    Raises:
        ConfigurationError: An argument is outside its range, or `DifferentialPrivacy` is missing.
        GuaranteeError: The fit goes on from a checkpoint.

    Example:
        >>> canaries = Canaries(count=200, kind="gradient")
        >>> trainer = Trainer(max_epochs=3, callbacks=[privacy, canaries])  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that can be configured
        self,
        *,
        count: int = 200,
        kind: CanaryKind = "text",
        rows: Sequence[Any] | None = None,
        tokens: int | None = None,
        new_tokens: Sequence[int] = (),
        length: int = 16,
        losses: Callable[[Any, Any], Tensor] | None = None,
        significance: float = 0.05,
    ) -> None:
        cost = "an audit that proves nothing"
        one_of("kind", kind, ("text", "new_token", "gradient"), cost=cost, remedy='use "text"')
        self.count = whole_number(
            "count", count if rows is None else len(rows), at_least=10, cost=cost, remedy="pass 200"
        )
        self.length = whole_number("length", length, at_least=2, cost=cost, remedy="pass 16")
        self.significance = real_number(
            "significance", significance, "(0, 0.5)", cost=cost, remedy="pass 0.05"
        )
        if self.count % 2 or (kind == "new_token" and not len(new_tokens) and rows is None):
            raise ConfigurationError(
                must="there is an even number of canaries, and new tokens for kind='new_token'",
                found=f"count={self.count}, new_tokens={list(new_tokens)}",
                cost=cost,
                remedy="pass for instance count=200, and ids of reserved tokens of the tokenizer",
            )
        self.kind = kind if rows is None else "own"
        self._given, self._tokens, self._new_tokens = rows, tokens, tuple(new_tokens)
        self._losses = losses
        self.result: CanaryAudit | None = None
        self._rows: Sequence[Any] = ()
        self._before: Tensor | None = None
        self._score: ExampleLosses | None = None
        self._member = torch.zeros(0, dtype=torch.bool)
        self._gradients: GradientCanaries | None = None
        self._texts: TextCanaries | None = None
        self._coins: Coins | None = None
        self.home = Results(self, "result")

    def __getstate__(self) -> dict[str, Any]:
        if self._coins is None:
            return self.__dict__
        raise GuaranteeError(
            must="which canaries are in the data stays in the process that decided it",
            found="an attempt to pickle or copy a Canaries callback",
            cost="coins that an attack could look up",
            remedy="make a new Canaries callback where it is needed",
        )

    # ------------------------------------------------------------------ before the first step
    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Throw the coins."""
        if stage != "fit":
            return
        privacy = privacy_of(trainer, self)
        _refuse_tiers(privacy)
        self.result, self._rows, self._gradients = None, (), None
        self._coins = Coins(joined(trainer.strategy))
        self._member = self._coins.thrown(self.count)
        if self.kind == "gradient":
            self._gradients = GradientCanaries(trainer, privacy, self._member, self._coins)
        elif self._given is None:
            self._texts = self._maker(getattr(trainer, "datamodule", None))

    @override
    def included_rows(self, dataset: Any) -> tuple[Sequence[Any], int]:
        """The canaries that the coins included; half of all are expected."""
        if self.kind == "gradient":
            return (), 0
        if not len(self._rows):
            self._rows = self._made(dataset) if self._given is None else self._given
        taken = [row for row, inside in zip(self._rows, self._member, strict=True) if inside]
        return taken, self.count // 2

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the losses before the training."""
        if trainer.ckpt_path is not None:
            raise GuaranteeError(
                must="canaries are thrown for a whole run",
                found=f"a fit that goes on from {trainer.ckpt_path}",
                cost="an audit of other canaries than the run began with; their coins are in no "
                "checkpoint",
                remedy="leave Canaries out of a resumed fit, or audit an unbroken one",
            )
        if self._gradients is not None:
            self._gradients.start()
            return
        loader: Any = trainer.train_dataloader
        size = loader.batch_size or 1
        self._score = ExampleLosses(trainer, loader.collate_fn, size, self._losses)
        self._before = self._score.before(self._rows, range(self.count))

    # ------------------------------------------------------------------ while training
    @override
    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Any
    ) -> None:
        """Look along the canaries' directions at what was released."""
        if self._gradients is not None:
            self._gradients.observe()

    # ------------------------------------------------------------------ the end
    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Attack, and set what was found beside the claim."""
        privacy = privacy_of(trainer, self)
        plan = privacy.plan
        if plan is None or not privacy.steps or not 2 <= int(self._member.sum()) <= self.count - 2:
            return
        assert self._coins is not None
        # Replicas may differ in the last bits of a loss: what rank 0 finds counts.
        scores = torch.tensor(self._coins.world.from_first(self._scores().tolist()))
        bound = float(
            epsilon_lower_bound(
                scores,
                self._member,
                delta=plan.delta,
                method="one_run",
                significance=self.significance,
                seed=self._coins.number(b"ties") % 2**31,
            )
        )
        claimed = privacy.epsilon()
        self.result = CanaryAudit(
            figures=membership_figures(self.kind, scores, self._member),
            epsilon=bound,
            claimed=claimed,
            delta=plan.delta,
            refuted=bound > claimed,
        )
        if self.result.refuted and trainer.is_global_zero:
            warnings.warn(self._refutation(self.result), stacklevel=2)

    def findings(self) -> list[Finding]:
        """What the canaries show, for a `PrivacyReport`.

        Returns:
            One finding; none before the end of a fit.
        """
        if self.result is None:
            return []
        found, note = self.result, _NOTE.format(confidence=1 - self.significance)
        if found.refuted:
            note = f"CLAIM REFUTED. {self._refutation(found)}"
        figures = {**found.figures.as_dict(), "ε at least": found.epsilon}
        name = f"{self.count} canaries ({self.kind.replace('_', ' ')}), one run"
        return [Finding(name=name, figures=figures, note=note)]

    def _scores(self) -> Tensor:
        if self._gradients is not None:
            return self._gradients.scores()
        assert self._score is not None
        after = self._score(self._rows, range(self.count))
        return -after if self._before is None else self._before - after

    def _maker(self, data: Any) -> TextCanaries:
        size = self._tokens or getattr(data, "vocab_size", 0)
        if not size:
            raise ConfigurationError(
                must="text canaries are made of tokens",
                found="no tokens=, and no vocab_size of the data module",
                cost="canaries that the model cannot read",
                remedy='pass Canaries(tokens=...), or rows=[...], or kind="gradient"',
            )
        ordinary = [token for token in range(size) if token not in self._new_tokens]
        new = self._new_tokens if self.kind == "new_token" else ()
        return TextCanaries(tokens=ordinary, new_tokens=new, length=self.length)

    def _made(self, dataset: Any) -> list[Any]:
        assert self._texts is not None and self._coins is not None  # noqa: PT018 - no test
        return self._texts.rows(self.count, dataset[0], self._coins.generator(b"rows"))

    def _refutation(self, found: CanaryAudit) -> str:
        return _REFUTED.format(
            bound=found.epsilon,
            delta=found.delta,
            claimed=found.claimed,
            confidence=1 - self.significance,
        )


def _refuse_tiers(privacy: DifferentialPrivacy) -> None:
    if privacy.settings.tiers is not None:
        raise UnsupportedOperationError(
            must="every canary is a record like any other",
            found="individual budgets, under which a canary would need a tier",
            cost="a claim that is not the canaries' own",
            remedy="leave Canaries out, or audit a run without tiers",
        )
