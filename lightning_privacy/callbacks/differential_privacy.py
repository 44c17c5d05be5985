"""`DifferentialPrivacy`: the one callback that makes a fit private."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info  # type: ignore[attr-defined]
from typing_extensions import override

from lightning_privacy.callbacks import _planning, _ranks, _validation
from lightning_privacy.callbacks._begin import checked_parameters, make_step
from lightning_privacy.callbacks._bookings import Bookings
from lightning_privacy.callbacks._canary_rows import with_canaries
from lightning_privacy.callbacks._chance import hide_chance
from lightning_privacy.callbacks._epsilon import EpsilonSoFar, epsilon_of, planned_epsilon
from lightning_privacy.callbacks._home import Home
from lightning_privacy.callbacks._logging import log_early_end, log_step
from lightning_privacy.callbacks._population import population_of
from lightning_privacy.callbacks._seal import Seal
from lightning_privacy.callbacks._settings import PrivacySettings
from lightning_privacy.callbacks._state import STATE_KEY, RunState, journal_directory
from lightning_privacy.callbacks._tally import Tally
from lightning_privacy.distributed import World
from lightning_privacy.errors import GuaranteeError
from lightning_privacy.reports import PrivacySummary, print_summary
from lightning_privacy.sampling import PrivateLoader
from lightning_privacy.strategies import joined, note_flaw, privatize, require_return, run_for

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_privacy.accounting import PrivacyLedger
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.sampling.users import UserIds
    from lightning_privacy.step import PrivateStep
    from lightning_privacy.strategies import PrivateRun
    from lightning_privacy.tiers import TierPolicy
    from lightning_privacy.types import (
        AccountantName,
        ClippingKind,
        LossReduction,
        UserSampling,
        UserUpdate,
    )


class DifferentialPrivacy(Callback):
    """Trains any LightningModule with differential privacy, and says truly how much.

    Each optimizer step becomes a private step: every example is drawn independently with
    probability q, its gradient is clipped to norm ``clip_norm``, Gaussian noise of standard
    deviation ``noise_multiplier`` times ``clip_norm`` is added to the sum, and the result divided
    by the expected batch size, a public constant (Abadi et al. 2016, arXiv 1607.00133). Nothing
    is wrapped: module, optimizer and checkpoints keep their classes and names.

    The guarantee is (ε, δ)-differential privacy of everything that the noised gradients determine,
    the trained weights first of all. It needs a loss that is a mean (or sum) over examples of a
    function of each example alone, which is checked on a few rows. Figures computed on
    private data without noise, such as losses, metrics and what is chosen by them, are not
    covered, and marked so.

    Give ``epsilon`` to have the noise calibrated for the planned steps; or ``noise_multiplier``, to
    learn the ε of the planned steps; or both, to train with that noise and stop before ε would be
    exceeded.

    Args:
        epsilon: The budget ε > 0.
        delta: δ in (0, 1); well below one over the number of units.
        clip_norm: The largest norm C >= 1e-9 of one unit's gradient.
        noise_multiplier: Standard deviation of the noise divided by ``clip_norm``, > 0.
        expected_batch_size: The logical batch: how many units one step draws on average. The
            DataLoader's ``batch_size`` is the physical one, which has to fit into memory. By
            default they are the same.
        sample_rate: Probability q in (0, 1] with which each unit is drawn; by default
            ``expected_batch_size`` over ``dataset_size``.
        dataset_size: The number of units where it is public; by default the data set's own length,
            which is then taken as public (neighbouring relation zero-out).
        clipping: "flat", "per_layer" or "automatic".
        accountant: "pld" (tightest), "prv" or "rdp".
        loss_reduction: Whether the loss is a "mean" or a "sum" over the examples of a batch.
        unit: What is protected: one "example", or one "user". The next six are for users.
        user_sampling: What is drawn, counted, clipped: "users" (the default), or "examples".
        group_size: The most examples of a user, by public knowledge: private counts are private.
        users: Whose rows are whose: a column or attribute of the data set, a key of its examples, a
            function of one, or an id for each row; by default an attribute ``users``.
        tiers: Individual budgets; ``clip_norm`` and rate are then means, ``epsilon`` the largest.
        user_update: With drawn users, what is clipped: the "mean" gradient (the default), or that
            along "local_steps" of ``local_learning_rate``, one for each micro-batch of the user.
        local_learning_rate: The rate of these steps, > 0.
        releases_per_draw: Optimizer steps on one batch, in manual optimization; by default the
            number of optimizers.
        augmentation_multiplicity: Views of an example, each read anew; their mean is clipped once.
        independence_check: Whether to check, before the first step and now and then later, that
            each example's gradient depends on that example alone.
        independent_buffers: Names or patterns of persistent buffers, or metric states, declared to
            be independent of the data; any other that training changes is refused.
        test_seed: Deterministic test mode: draws and noise follow from this number, resuming
            repeats the unbroken run bit for bit, and the reported ε is infinite.
        journal: Whether to reserve steps on disk before they run, so that a crash loses no spent
            budget. Needed to resume truthfully.
        journal_dir: Where to put the journal; by default beside the checkpoints.
        trust_checkpoint: Whether to resume from a checkpoint that was sealed on another machine.
        secure_rounding: Whether to release on a public grid, so that the low bits of floating point
            tell nothing about the sum (see `GridNoise`). Slower noise.
        ledger: What all runs on the data set have spent together: the planned steps are reserved
            there before the first one, and refused if the data set's budget does not allow them.
        print_table: Whether to print the closing table at the end of the fit.

    Raises:
        ConfigurationError: An argument is outside its range.

    Example:
        >>> callback = DifferentialPrivacy(epsilon=8.0, delta=1e-6, expected_batch_size=512)
        >>> trainer = Trainer(max_epochs=3, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(  # noqa: PLR0913 - one argument for each thing that can be configured
        self,
        *,
        epsilon: float | None = None,
        delta: float,
        clip_norm: float = 1.0,
        noise_multiplier: float | None = None,
        expected_batch_size: int | None = None,
        sample_rate: float | None = None,
        dataset_size: int | None = None,
        clipping: ClippingKind = "flat",
        accountant: AccountantName = "pld",
        loss_reduction: LossReduction = "mean",
        unit: str = "example",
        user_sampling: UserSampling | None = None,
        group_size: int | None = None,
        users: UserIds | None = None,
        tiers: TierPolicy | None = None,
        user_update: UserUpdate | None = None,
        local_learning_rate: float | None = None,
        releases_per_draw: int | None = None,
        augmentation_multiplicity: int = 1,
        independence_check: bool = True,
        independent_buffers: Sequence[str] = (),
        test_seed: int | None = None,
        journal: bool = True,
        journal_dir: str | None = None,
        trust_checkpoint: bool = False,
        secure_rounding: bool = False,
        ledger: PrivacyLedger | None = None,
        print_table: bool = True,
    ) -> None:
        self.settings = PrivacySettings(
            epsilon=epsilon,
            delta=delta,
            clip_norm=clip_norm,
            noise_multiplier=noise_multiplier,
            expected_batch_size=expected_batch_size,
            sample_rate=sample_rate,
            dataset_size=dataset_size,
            clipping=clipping,
            accountant=accountant,
            loss_reduction=loss_reduction,
            unit=unit,
            user_sampling=user_sampling,
            group_size=group_size,
            users=users,
            tiers=tiers,
            user_update=user_update,
            local_learning_rate=local_learning_rate,
            releases_per_draw=releases_per_draw,
            augmentation_multiplicity=augmentation_multiplicity,
            independence_check=independence_check,
            independent_buffers=independent_buffers,
            test_seed=test_seed,
            journal=journal,
            journal_dir=journal_dir,
            secure_rounding=secure_rounding,
        )
        self.print_table = print_table
        self._bookings = Bookings(ledger, journal)
        self._seal = Seal(trust=trust_checkpoint)
        self._state, self._tally = RunState(), Tally()
        self.home = Home(self._state, self._tally)
        self._secret = self._noise_secret = b""
        self._world = World()
        self._stage: str | None = None
        self._restored = False
        self._trainer: Any = None
        self._run: PrivateRun | None = None
        self._so_far: EpsilonSoFar | None = None

    # ------------------------------------------------------------------ what a user may ask
    @property
    def plan(self) -> PrivacyPlan | None:
        """The plan of the run; None before the training loader is known."""
        return self._state.plan

    @property
    def steps(self) -> int:
        """Private steps charged so far, over all fits and resumes of this run."""
        self.home.require()
        return self._state.ledger.count

    def epsilon(self) -> float:
        """The ε spent so far, exactly as the accountant gives it.

        Returns:
            ε >= 0; infinite in deterministic test mode once a step was made.
        """
        self.home.require()
        plan = self._state.plan
        return 0.0 if plan is None else epsilon_of(self._state.ledger.releases, plan)

    def summary(self) -> PrivacySummary:
        """What the run promised, spent and saw, as the closing table shows it.

        Returns:
            The summary.

        Raises:
            GuaranteeError: Nothing was trained yet.
        """
        self.home.require()
        plan = self._state.plan
        if plan is None:
            raise GuaranteeError(
                must="there is a private run to sum up",
                found="a DifferentialPrivacy callback that has not trained",
                cost="a table of nothing",
                remedy="call trainer.fit first",
            )
        self._tally.catch_up()
        return PrivacySummary(
            plan=plan,
            epsilon=max(self._state.planned_epsilon, self.epsilon()),
            epsilon_at_stop=self.epsilon(),
            planned_steps=plan.steps,
            steps=self.steps,
            clipped_share=self._tally.clipped_share,
            nonfinite_units=self._tally.nonfinite,
            validation_loss=self._tally.validation_loss,
            journal=self.settings.journal,
            releases=self._state.ledger.releases,
        )

    # ------------------------------------------------------------------ before the first step
    @override
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be private, and turn the trainer's strategy into a private one."""
        self._stage = stage
        if stage != "fit":
            return
        self._world = joined(trainer.strategy)
        self.home.arrive()
        self._world.together(lambda: _validation.refuse_trainer(trainer, pl_module, self))
        strategy: Any = trainer.strategy
        require_return(strategy)
        # Single inheritance keeps the layout, so that the class of an instance may be switched.
        ordinary: type[Any] = type(strategy)
        strategy.__class__ = privatize(ordinary)  # type: ignore[arg-type]
        seed = self.settings.test_seed
        self._secret, self._noise_secret = _ranks.secrets_of(self._world, self._state, seed)
        self._trainer, self._restored = trainer, False
        if trainer.global_step == 0:
            self._state.steps = 0
        self._run = strategy.private_run = run_for(strategy)(
            strategy,
            prepare_loader=self._prepare_loader,
            start=self._start,
            charge=self._state.charge,
            record=self._tally.add,
            drawn=self._state.drawn,
            independent_buffers=self.settings.independent_buffers,
            world=self._world,
        )

    def _prepare_loader(self, dataloader: Any) -> PrivateLoader:
        trainer, state = self._trainer, self._state
        dataloader = with_canaries(dataloader, trainer)
        population = population_of(self.settings, state, dataloader.dataset, trainer)
        sampling = _planning.sampling_of(self.settings, dataloader, trainer.world_size, population)
        if self._so_far is None:
            rank_zero_info(f"DifferentialPrivacy: {sampling.note}.")
            hide_chance(self._run, self.settings)
        plan = _planning.make_plan(self.settings, state, trainer, sampling)
        _ranks.require_one_plan(self._world, plan, len(dataloader.dataset))
        state.planned_epsilon = planned_epsilon(state.ledger.releases, plan, self.settings)
        self._so_far = EpsilonSoFar(plan, state.planned_epsilon, state.ledger.releases)
        return PrivateLoader(
            dataloader,
            _ranks.sharded(population.sampler(plan, self._secret), self._world),
            sampling.steps_per_epoch,
            lambda: state.cursor,
            whole_draws=not trainer.lightning_module.automatic_optimization,
        )

    def _start(self) -> PrivateStep:
        trainer, plan, run = self._trainer, self._state.plan, self._run
        if trainer.ckpt_path is not None and trainer.global_step and not self._restored:
            raise _validation.state_missing(trainer.global_step)
        assert plan is not None and run is not None  # noqa: PT018 - no test
        checked = checked_parameters(self.settings, run, self._world)
        if self._world.is_first:
            self._bookings.reserve(self._state)
        if trainer.checkpoint_callbacks:
            self._open_journal()
        return make_step(self.settings, run, self._world, checked, plan, self._noise_secret)

    # ------------------------------------------------------------------ while training
    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log ε and the draw, stop before the budget would be exceeded, and answer signals."""
        state = self._state
        trainer.should_stop |= state.finished
        self._world.signals.answer()
        if self._so_far is not None and not trainer.barebones:
            log_step(pl_module, self._so_far, state.ledger.count, self._tally, begun=not batch_idx)

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember the validation loss for the closing table."""
        if self._stage == "fit" and not trainer.sanity_checking:
            self._tally.note_validation(trainer.callback_metrics)
            if self._run is not None:
                self._run.forget_state()

    # ------------------------------------------------------------------ the end
    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the closing table."""
        if self.print_table and self._state.plan and trainer.is_global_zero:
            print_summary(self.summary())

    @override
    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Give every parameter its own class back, close the books, and tell the other ranks."""
        world = self._world
        note_flaw(trainer.strategy)
        self._close(trainer)
        log_early_end(self._state.ledger.count)
        world.fail(exception)

    @override
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave nothing of the private run on module and strategy."""
        if stage == "fit":
            self._close(trainer)

    def _close(self, trainer: Any) -> None:
        if self._run is None:
            return
        self._run.close()
        self._bookings.close(self._state)
        self._world = self._world.left()
        # Without a run the strategy validates, tests and predicts as ever, and refuses to fit.
        trainer.strategy.private_run = self._run = None
        self._so_far = None

    # ------------------------------------------------------------------ checkpoints
    @property
    @override
    def state_key(self) -> str:
        """The same for every subclass and under every name: a lost state is lost budget."""
        return STATE_KEY

    @override
    def state_dict(self) -> dict[str, Any]:
        """What was spent and handed out. Opens the journal: from now on a resume is possible."""
        if self._run is not None and self._run.step is not None:
            self._open_journal()
        return self._seal.sealed(self._state.state_dict())

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up what a checkpoint knows, and charge every release since."""
        if self._stage not in {"fit", None}:
            return  # validation, test and prediction must not turn the ledger back
        directories = [journal_directory(self.settings.journal_dir, self._trainer)]
        if self._trainer is not None and self._trainer.ckpt_path is not None:
            directories.append(Path(self._trainer.ckpt_path).parent)
        self._world.together(lambda: self._restore(state_dict, directories))
        self._restored = True

    def _restore(self, state_dict: Mapping[str, Any], directories: list[Path]) -> None:
        # Journal and seal lie where rank 0 can read them; what it charges is charged everywhere.
        journal = self.settings.journal and self._world.is_first
        self._seal.verify(state_dict)
        self._state.restore(state_dict, directories, journal)
        self._state.agree(self._world)

    def _open_journal(self) -> None:
        if self.settings.test_seed is None and self._world.is_first:
            self._seal.prepare()
            if self.settings.journal:
                place = journal_directory(self.settings.journal_dir, self._trainer)
                self._state.open_journal(place)
