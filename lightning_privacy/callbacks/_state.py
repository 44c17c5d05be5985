"""What a private run has spent and handed out: ledger, counters, journal, and how they resume.

This state is the only source of truth: Lightning's ``global_step`` and a loader's own state are
lost or restored in situations in which spent budget and used draws must not be.
"""

from __future__ import annotations

import secrets
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting import Journal, Ledger
from lightning_privacy.errors import (
    BudgetExceededError,
    ConfigurationError,
    GuaranteeError,
    UnsupportedOperationError,
)
from lightning_privacy.plan import PrivacyPlan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lightning_privacy.distributed import World

STATE_KEY = "lightning_privacy.DifferentialPrivacy"
"""Fixed: Lightning's default changes with the class's name, and a lost state is lost budget."""

_VERSION = 1
# A crash charges up to one block of steps that never ran, a hundredth of the run; each block costs
# one flush to disk.
_BLOCKS, _LARGEST_BLOCK = 100, 50


class RunState:
    """What one lineage of checkpoints has spent and handed out.

    Attributes:
        run: Names the lineage, and its journal.
        plan: What is released at each step; None until the first training loader is known.
        target_epsilon: The ε for which the noise was calibrated, if it was.
        test_seed: The seed of deterministic test mode, if it is on.
        tiers: What was configured of individual budgets, as plain values.
        bound_seed: Decides which examples of a user take part, where examples of users are drawn.
            Stored in checkpoints and public: the choice is a function of the user's own record and
            of this seed, which no data decided, and no amplification is claimed for it. The seeds
            of draws and noise must not be stored.
        ledger: Everything charged, one entry per draw.
        limit: Number of draws that the budget allows in all; None without a budget.
        cursor: Position of the next draw to be handed out.
        releases: Number of the next release; it keys the noise.
        steps: Private steps in the history of the present weights: a crash's extra charges and the
            steps of a rolled-back branch are in the ledger and not here.
        planned_epsilon: The ε of all planned steps, the headline of the closing table.
    """

    def __init__(self) -> None:
        self.run = secrets.token_hex(8)
        self.plan: PrivacyPlan | None = None
        self.target_epsilon: float | None = None
        self.test_seed: int | None = None
        self.tiers: dict[str, Any] | None = None
        self.bound_seed: bytes | None = None
        self.ledger = Ledger()
        self.limit: int | None = None
        self.cursor = 0
        self.releases = 0
        self.steps = 0
        self.journal: Journal | None = None
        self.planned_epsilon = 0.0
        self._charging = False

    # ------------------------------------------------------------------ while training
    def drawn(self, cursor: int) -> None:
        """Note that every draw before ``cursor`` was handed out.

        Args:
            cursor: Position of the next draw.
        """
        self.cursor = max(self.cursor, cursor)

    def charge(self, earlier: int) -> int:
        """Charge one release, on disk first, before it happens.

        Args:
            earlier: Releases already made on the same draw.

        Returns:
            The number that keys the release's noise.

        Raises:
            BudgetExceededError: The budget does not allow another draw.
            UnsupportedOperationError: The draw has been released as often as was planned.
        """
        assert self.plan is not None
        if earlier >= self.plan.releases_per_draw:
            raise UnsupportedOperationError(
                must=f"a draw is released at most {self.plan.releases_per_draw} times, as planned",
                found=f"release {earlier + 1} on one draw",
                cost="m releases on one draw cost as much as one with noise divided by sqrt(m)",
                remedy=f"pass DifferentialPrivacy(releases_per_draw={earlier + 1})",
            )
        if not earlier:
            self._charge_draw(self.plan)
        number, self.releases = self.releases, self.releases + 1
        return number

    def _charge_draw(self, plan: PrivacyPlan) -> None:
        if self.limit is not None and self.ledger.count >= self.limit:
            raise budget_spent(self.ledger.count, self.limit)
        release = plan.release(1)
        self._charging = True
        try:
            if self.journal is not None:
                self.journal.reserve(self.ledger.count + 1, release)
            self.ledger.record(release)
            self.steps += 1
        finally:
            self._charging = False

    @property
    def finished(self) -> bool:
        """Whether all planned steps are charged, which are reserved, or all that the budget allows.

        A module that releases less often for each draw than it has declared would go on.
        """
        if self.plan is None:
            return False
        return self.ledger.count >= min(self.plan.steps, self.limit or self.plan.steps)

    # ------------------------------------------------------------------ several ranks
    def agree(self, world: World) -> None:
        """Take over what rank 0 has spent and handed out. Rank 0 alone keeps the journal.

        Args:
            world: The ranks; all of them call this.
        """
        if world.alone:
            return
        own = {
            "run": self.run,
            "ledger": self.ledger.state_dict(),
            "cursor": self.cursor,
            "releases": self.releases,
            "steps": self.steps,
            "bound_seed": None if self.bound_seed is None else self.bound_seed.hex(),
        }
        first = world.from_first(own)
        self.run, self.steps = first["run"], first["steps"]
        self.cursor, self.releases = first["cursor"], first["releases"]
        self.ledger = Ledger()
        self.ledger.load_state_dict(first["ledger"])
        seed = first["bound_seed"]
        self.bound_seed = None if seed is None else bytes.fromhex(seed)
        if not world.is_first:
            self.journal = None

    # ------------------------------------------------------------------ the journal
    def open_journal(self, directory: Path) -> None:
        """Start the journal, or go on with the one that a resume has found.

        Args:
            directory: Where to put a new one.
        """
        if self.journal is not None or self.plan is None:
            return
        self.journal = Journal(directory / _journal_name(self.run), _block(self.plan))
        self.settle_journal()

    def settle_journal(self) -> None:
        """Write how many releases have started, so that a resume charges no more than those.

        A signal may ask for a checkpoint while a release is being charged (SLURM's requeue does).
        Then nothing is written into the line that is being written, and the open block stays.
        """
        if self.journal is None or self.plan is None or self._charging:
            return
        count = self.ledger.count
        if self.journal.reserved < max(1, count):
            self.journal.reserve(max(1, count), self.plan.release(1))
        self.journal.record(count)

    # ------------------------------------------------------------------ checkpoints
    def state_dict(self) -> dict[str, Any]:
        """Plain Python scalars, lists and dictionaries; no secret unless a test's.

        Returns:
            The state, or an empty dictionary before anything was planned.
        """
        if self.plan is None:
            return {}
        self.settle_journal()
        return {
            "version": _VERSION,
            "run": self.run,
            "plan": self.plan.to_dict(),
            "target_epsilon": self.target_epsilon,
            "test_seed": self.test_seed,
            "tiers": self.tiers,
            "bound_seed": None if self.bound_seed is None else self.bound_seed.hex(),
            "ledger": self.ledger.state_dict(),
            "cursor": self.cursor,
            "releases": self.releases,
            "steps": self.steps,
            "journal": None if self.journal is None else str(self.journal.path.absolute()),
        }

    def restore(self, state: Mapping[str, Any], directories: Sequence[Path], journal: bool) -> None:
        """Take up a checkpoint, and charge every release since.

        Nothing that this object has charged before is forgotten: going back to a checkpoint
        restores weights, not budget.

        Args:
            state: What `state_dict` returned.
            directories: Where to look for the journal, besides the place it was written to.
            journal: Whether the journal must be found.

        Raises:
            GuaranteeError: The state is of another version, or its journal is missing.
        """
        if state.get("version") != _VERSION:
            raise GuaranteeError(
                must=f"the checkpoint's privacy state has version {_VERSION}",
                found=f"version {state.get('version')!r}",
                cost="spent budget that is read wrongly",
                remedy="resume with the version of lightning_privacy that wrote it",
            )
        before, self.plan = self.ledger, PrivacyPlan.from_dict(state["plan"])
        stored = Ledger()
        stored.load_state_dict(state["ledger"])
        same_run, self.limit = state["run"] == self.run, None
        self.target_epsilon, self.test_seed = state["target_epsilon"], state["test_seed"]
        self.steps = state["steps"]
        seed, self.tiers = state.get("bound_seed"), state.get("tiers")
        self.bound_seed = None if seed is None else bytes.fromhex(seed)
        if self.plan.deterministic:
            # An unbroken run is to be repeated bit for bit: same draws, same noise, ε infinite.
            self.run, self.ledger = state["run"], stored
            self.cursor, self.releases = state["cursor"], state["releases"]
            return
        if same_run and before.count >= stored.count:
            return
        self.run, self.ledger = state["run"], stored
        self.cursor = max(self.cursor, state["cursor"])
        self.releases = max(self.releases, state["releases"])
        if journal and state["journal"] is not None:
            self._charge_journal(Path(state["journal"]), directories)
        if before.count and not same_run:
            # Two lineages go on as one, under a name and a journal of its own.
            for release in before.releases:
                self.ledger.record(release)
            self.branch()

    def branch(self) -> None:
        """Go on as a lineage of its own, with a name and a journal of its own."""
        self.run, self.journal = secrets.token_hex(8), None

    def _charge_journal(self, written: Path, directories: Sequence[Path]) -> None:
        places = {written, *(directory / written.name for directory in directories)}
        assert self.plan is not None
        block = _block(self.plan)
        found = [Journal(place, block) for place in sorted(places) if place.is_file()]
        if not found:
            raise GuaranteeError(
                must="a resume charges every release since its checkpoint",
                found=f"no {written.name} where it was written or beside the checkpoint",
                cost="releases that ran after the checkpoint would not be counted",
                remedy="copy the journal beside the checkpoint; if no step ran after that "
                "checkpoint, pass DifferentialPrivacy(journal=False)",
            )
        self.journal = max(found, key=lambda journal: journal.reserved)
        missing = self.journal.charged(self.ledger.count)
        draws = sum(release.count for release in missing)
        for release in missing:
            self.ledger.record(release)
        self.cursor += draws
        self.releases += draws * self.plan.releases_per_draw
        self.settle_journal()
        if draws:
            warnings.warn(
                f"{draws} private steps since the checkpoint are charged from {written.name}: "
                "they ran, or may have run, before the run was interrupted.",
                stacklevel=2,
            )


def budget_spent(count: int, limit: int) -> BudgetExceededError:
    """The refusal of a release beyond the budget.

    Args:
        count: Draws charged so far.
        limit: Draws that the budget allows.

    Returns:
        The error, to be raised.
    """
    return BudgetExceededError(
        must=f"at most {limit} private steps, which is what the budget ε allows",
        found=f"{count} steps charged, and another one to come",
        cost="an ε above the budget",
        remedy="stop here, or start a new run with a budget of its own: the two ε add up"
        if limit
        else "raise noise_multiplier or epsilon, or draw fewer units in a step",
    )


def journal_directory(configured: str | None, trainer: Any) -> Path:
    """Where a new journal goes: a place that can be flushed to disk.

    Args:
        configured: What the user said.
        trainer: Knows where the checkpoints go; None before there is one.

    Returns:
        The directory.

    Raises:
        ConfigurationError: It is the address of an object store.
    """
    if configured is not None or trainer is None:
        return Path(configured or "")
    checkpoints = getattr(trainer.checkpoint_callback, "dirpath", None)
    place = str(checkpoints or trainer.default_root_dir)
    if "://" in place:
        raise ConfigurationError(
            must="the journal lies on a disk that can be flushed",
            found=f"checkpoints at {place}",
            cost="a journal that a crash can lose, and with it spent budget",
            remedy="pass DifferentialPrivacy(journal_dir=...) with a local directory",
        )
    return Path(place)


def _block(plan: PrivacyPlan) -> int:
    return max(1, min(plan.steps // _BLOCKS, _LARGEST_BLOCK))


def _journal_name(run: str) -> str:
    return f"privacy-journal-{run}.jsonl"
