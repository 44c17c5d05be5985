"""The command ``audit``: what a finished run leaks, beside what its ε allows."""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_privacy.accounting import Ledger, epsilon
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.audit import (
    Leakage,
    MembershipFigures,
    advantage_ceiling,
    generic_advantage_ceiling,
    measure_leakage,
)
from lightning_privacy.audit.attacks import adapters_off
from lightning_privacy.callbacks._state import STATE_KEY
from lightning_privacy.cli.tables import print_table
from lightning_privacy.cli.training import PrivacyCLI
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional import membership_advantage
from lightning_privacy.plan import PrivacyPlan
from lightning_privacy.reports import not_covered

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lightning_privacy.audit.leakage import Reference

_DESCRIPTION = """\
Attack a checkpoint with its own training data, and set what was found beside what its epsilon
allows. Give the configuration of the run behind the checkpoint, as for `fit`.
"""
# All verdicts together are wrong of a correct trainer with this chance.
_SIGNIFICANCE = 0.01
_USER = "user"
_MEMBERSHIP = ("attack", "AUROC", "TPR at 1 % FPR", "advantage", "95 % interval")


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a checkpoint says of its privacy.

    Args:
        epsilon: ε of what was charged; infinite in deterministic test mode.
        delta: δ.
        unit: What is protected.
        steps: Private steps charged.
        ceiling: δ(0): no attack on one unit has a larger advantage.
        generic: The same by (ε, δ) alone, whatever the mechanism.
        examples: Length of the data set that the run drew from; None where it does not say.
    """

    epsilon: float
    delta: float
    unit: str
    steps: int
    ceiling: float
    generic: float
    examples: int | None = None


def run_audit(words: Sequence[str]) -> int:
    """Run the command.

    Args:
        words: The options behind ``audit``.

    Returns:
        The exit code: 1 if an attack went beyond what the claimed ε allows, else 0.

    Raises:
        ConfigurationError: There is no such checkpoint, or it is none of Lightning's.
    """
    options, rest = parsed(words)
    _with_configuration(rest)
    claim = read_claim(options.checkpoint)
    _AuditCLI.rows = options.rows
    cli = _AuditCLI(["validate", *rest, "--ckpt_path", str(options.checkpoint)])
    beyond = print_audit(cli.leakage, claim, cli.validated)
    caution = other_data(claim, cli.members)
    if caution:
        print(caution)
    return 1 if beyond else 0


def parsed(words: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the options of this command.

    Args:
        words: The options behind ``audit``.

    Returns:
        Their values, and the words for the configuration.
    """
    parser = argparse.ArgumentParser(
        prog="lightning-privacy audit",
        description=_DESCRIPTION,
        epilog="All other options are those of `lightning-privacy validate`.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="a .ckpt of the run")
    parser.add_argument(
        "--rows", type=int, default=512, help="most examples of each side (default 512)"
    )
    return parser.parse_known_args(words)


def _with_configuration(words: Sequence[str]) -> None:
    if any(word.startswith(("-c", "--config", "-h", "--help", "--data")) for word in words):
        return
    raise ConfigurationError(
        must="an audit knows the data of the run",
        found="no --config",
        cost="no members to attack",
        remedy="pass --config with the recipe of the run, or with the config.yaml that `fit` left "
        "in the folder of its logger",
    )


def _unreadable(checkpoint: Path, error: Exception) -> str:
    # torch's own words begin with the advice to load the file without care; the reason comes last.
    reason = str(error).rpartition("WeightsUnpickler error: ")[2].strip()
    sentence = reason.partition("\n")[0].partition(". ")[0]
    return f"{checkpoint}: {type(error).__name__}: {sentence[:200]}"


def read_claim(checkpoint: Path) -> Claim | None:
    """Read what a checkpoint says of its privacy.

    Args:
        checkpoint: The file.

    Returns:
        The claim; None if the run was not private.

    Raises:
        ConfigurationError: There is no such file, or it cannot be read.
    """
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
        state: Any = content["callbacks"].get(STATE_KEY)
    except Exception as error:
        raise ConfigurationError(
            must="CHECKPOINT is a file that Lightning's trainer saved",
            found=_unreadable(checkpoint, error),
            cost="an audit of nothing",
            remedy="give the path of a .ckpt file",
        ) from error
    if not state:
        return None
    plan, ledger = PrivacyPlan.from_dict(state["plan"]), Ledger()
    ledger.load_state_dict(state["ledger"])
    # Noise that can be recomputed is none.
    known = plan.deterministic
    spent = math.inf if known else epsilon(ledger.releases, plan.delta, plan.accountant)
    return Claim(
        epsilon=spent,
        delta=plan.delta,
        unit=str(plan.unit),
        steps=ledger.count,
        ceiling=1.0 if known else advantage_ceiling(ledger.releases),
        generic=1.0 if math.isinf(spent) else generic_advantage_ceiling(spent, plan.delta),
        examples=_examples(plan),
    )


def other_data(claim: Claim | None, members: int) -> str:
    """Say it where the configuration has other data than the run had, as far as a length shows.

    Args:
        claim: What the checkpoint says.
        members: Length of the data set that the configuration trains on.

    Returns:
        A caution; empty where nothing is seen.
    """
    if claim is None or claim.examples in (None, members):
        return ""
    return (
        f"Caution: the run drew from {claim.examples} examples, and this configuration trains on "
        f"{members}. If the run had no rows of `Canaries`, these are other data: the members above "
        "are not those of the run, and the verdict says nothing of it."
    )


def _examples(plan: PrivacyPlan) -> int | None:
    # Only a public length fixes the rate; a declared one need not be that of the data.
    if str(plan.unit) != "example" or str(plan.relation) != "zero_out" or plan.tiers:
        return None
    return round(plan.expected_batch_size / plan.sample_rate)


def print_audit(leakage: Leakage, claim: Claim | None, validated: dict[str, float]) -> bool:
    """Print what was found beside what is allowed, and the verdict.

    Args:
        leakage: What the attacks found.
        claim: What the checkpoint says.
        validated: What the validation logged.

    Returns:
        Whether an attack went beyond what the claim allows.
    """
    rows = [
        (f.attack, f"{f.auroc:.3f}", f"{f.tpr:.3f}", f"{f.advantage:.3f}",
         f"{f.lower:.3f} to {f.upper:.3f}")
        for f in _figures(leakage)
    ]  # fmt: skip
    print_table(not_covered("Leakage measured"), _MEMBERSHIP, rows)
    print_table(not_covered("What else was measured"), ("", ""), _others(leakage, validated))
    print_table("What ε allows", ("", ""), _allowed(claim))
    beyond = [] if claim is None else _beyond(leakage, claim)
    print(_verdict(leakage, claim, beyond))
    return bool(beyond)


def _figures(leakage: Leakage) -> list[MembershipFigures]:
    users = leakage.users
    return [*leakage.membership, *([] if users is None else [users.figures])]


def _others(leakage: Leakage, validated: dict[str, float]) -> list[tuple[str, str]]:
    rows = [(name, f"{value:.4f}") for name, value in validated.items()]
    if leakage.blind is not None:
        rows.append(("AUROC without any model", f"{leakage.blind.auroc:.3f}"))
    found = leakage.secrets
    if found is not None:
        rows += [
            ("exposure of members' secrets", f"{found.inside:.2f} of {found.largest:.2f} bits"),
            ("exposure of unseen secrets", f"{found.outside:.2f} bits (1.44 expected)"),
            ("secrets that can be read off", f"{found.extracted:.1%}"),
        ]
    return rows


def _allowed(claim: Claim | None) -> list[tuple[str, str]]:
    if claim is None:
        return [("guarantee", "none: this checkpoint is of a run without privacy")]
    return [
        ("epsilon of the steps charged", shown_epsilon(claim.epsilon)),
        ("delta", f"{claim.delta:g}"),
        ("privacy unit", claim.unit),
        ("private steps charged", str(claim.steps)),
        ("largest advantage, δ(0) of the mechanism", f"{claim.ceiling:.3f}"),
        ("largest advantage by ε and δ alone", f"{claim.generic:.3f}"),
    ]


def _beyond(leakage: Leakage, claim: Claim) -> list[str]:
    """Attacks whose advantage is surely above the ceiling, all of them counted."""
    if leakage.blind is not None and leakage.blind.suspicious:
        return []
    attacks = [(name, scores, leakage.member) for name, scores in leakage.scores.items()]
    if leakage.users is not None and claim.unit == _USER:
        users = leakage.users
        attacks.append((users.figures.attack, users.scores, users.member))
    confidence = 1 - _SIGNIFICANCE / max(1, len(attacks))
    found = []
    for name, scores, member in attacks:
        lower = membership_advantage(scores, member, confidence=confidence).lower
        if float(lower) > claim.ceiling:
            found.append(name)
    return found


def _verdict(leakage: Leakage, claim: Claim | None, beyond: list[str]) -> str:
    if leakage.blind is not None and leakage.blind.suspicious:
        return (
            "Verdict: none. Members and others can be told apart without any model, so that the "
            "attacks show the split and not leakage."
        )
    if claim is None:
        return "Verdict: none. Without a guarantee, any leakage is possible, and may be missed."
    if beyond:
        return (
            f"Verdict: REFUTED by {', '.join(beyond)}. If a random split decided who was trained "
            f"on, one {claim.unit} at a time, this run is not what its ε says."
        )
    # An ε for examples is no ceiling for users.
    counted = _figures(leakage) if claim.unit == _USER else leakage.membership
    room = max(float(f.advantage) for f in counted)
    return (
        f"Verdict: nothing found that ε does not allow. The best attack has an advantage of "
        f"{room:.3f}, and ε allows {claim.ceiling:.3f}. That these attacks found no more does not "
        "show that there is no more."
    )


class _AuditCLI(PrivacyCLI):
    """Validates a checkpoint, and then attacks the model with its data."""

    rows: ClassVar[int]
    leakage: Leakage
    members: int
    validated: dict[str, float]
    _before: Any

    def before_validate(self) -> None:
        """Keep the model as it was before the training: the seed gives it the same weights."""
        if self.datamodule is None:
            raise ConfigurationError(
                must="an audit knows the data of the run",
                found="no group `data` in the configuration",
                cost="no members to attack",
                remedy="pass --config with the recipe of the run",
            )
        self._before = copy.deepcopy(self.model)

    def after_validate(self) -> None:
        """Attack."""
        metrics = self.trainer.callback_metrics
        self.validated = {name: float(value) for name, value in metrics.items() if "val" in name}
        model = self.model.to(self.trainer.strategy.root_device)
        with adapters_off(model) as adapted:
            pass
        reference: Reference = "adapters" if adapted else self._before.to(model.device)
        self.leakage = measure_leakage(model, self.datamodule, reference=reference, rows=self.rows)
        self.members = len(self.datamodule.train_dataloader().dataset)
