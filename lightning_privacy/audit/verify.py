"""`verify_trainer`: is what this trainer does the mechanism that its ε speaks of?"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from lightning_privacy.accounting import GaussianRelease, epsilon
from lightning_privacy.audit.bounds import (
    FamilyBound,
    claim_refuted,
    family_epsilon,
    neyman_pearson_scores,
    neyman_pearson_threshold,
)
from lightning_privacy.audit.checks import (
    Check,
    accounting_checks,
    clipping_checks,
    noise_checks,
    public_constants_checks,
    rank_checks,
    rate_check,
    sampling_checks,
    seed_checks,
)
from lightning_privacy.audit.fits import Audited, Devices, Probe
from lightning_privacy.audit.probe import ProbeSettings
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.metrics.functional.scores import Scores

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_ALMOST_NONE = 1e-4
_CLAIM_CHANCE = 1e-3
_DELTA = 1e-5


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainerAudit:
    """What an audit of a trainer found.

    Attributes:
        checks: Everything that was checked, in order.
        error: What the trainer raised, if it did not get through: an audit that failed.
    """

    checks: tuple[Check, ...]
    error: str | None = None

    @property
    def failures(self) -> tuple[Check, ...]:
        """The checks that did not pass."""
        return tuple(check for check in self.checks if not check.passed)

    @property
    def passed(self) -> bool:
        """Whether everything holds."""
        return not self.failures and self.error is None

    def __str__(self) -> str:
        """A line for each check."""
        lines = [
            f"{'ok  ' if c.passed else 'FAIL'} {c.name}: {c.found} (expected {c.expected})"
            for c in self.checks
        ]
        return "\n".join([*lines, *([f"FAIL {self.error}"] if self.error else [])])


def verify_trainer(  # noqa: PLR0913 - one argument for each thing that can be audited
    audited: Audited,
    *,
    clipping: str = "flat",
    physical_batch_size: int = 4,
    adapters: bool = False,
    rows_of_a_user: int = 1,
    accelerator: str = "cpu",
    devices: int = 1,
    strategy: str = "auto",
    seed: int = 0,
    stop_at_failure: bool = False,
    directory: Path | None = None,
) -> TrainerAudit:
    """Check a private trainer by what it releases, through the path that a user's fit takes.

    Fits a probe a few times with ``Trainer(callbacks=[audited(...)])`` and reads the gradient that
    reaches the optimizer. With almost no noise it shows each unit's contribution (sensitivity,
    fidelity, the normaliser) and who was drawn (rate, Poisson dispersion, independence). With real
    noise on rows without a gradient it shows the noise alone (size, shape, every parameter, every
    step, nothing shared). Further fits compare seeds, lengths of the data, charged and made steps,
    before and after a resume, and the reported ε with another accountant's.

    Guarantee: a correct trainer fails with a chance of some 1e-5. What it cannot see: a deviation
    below its resolution (3 per cent of the noise, some 10 per cent of the rate), and what a trainer
    does on other modules only.

    Args:
        audited: Makes the callback under audit; `DifferentialPrivacy` itself, or anything that
            takes its arguments and has ``plan``, ``steps`` and ``epsilon()``.
        clipping: "flat", "per_layer" or "automatic": how it is told to clip.
        physical_batch_size: Rows in one micro-batch; draws have six on average.
        adapters: Train low-rank factors of frozen layers instead of the layers.
        rows_of_a_user: Above 1, units are users with so many rows each. With more rows than
            ``physical_batch_size`` every user is spread over micro-batches.
        accelerator: As in `Trainer`.
        devices: As in `Trainer`. With several, what all ranks together release is checked, and that
            every rank releases and charges the same.
        strategy: As in `Trainer`: "private_ddp" or "private_fsdp" in a script that Lightning or
            torchrun starts once for each device, "private_ddp_fork" in a notebook or a test.
        seed: What ``seed_everything`` gets before the fits. The draws and the noise do not follow
            from it: each audit is a new experiment.
        stop_at_failure: Leave the rest out after the first stage with a failure.
        directory: For checkpoints and journals, readable by every rank; a temporary one by default.

    Returns:
        All checks, the same on every rank. An exception of the trainer is a failed audit, not an
        exception.

    Raises:
        ConfigurationError: ``audited`` does not make callbacks.
    """
    _require_maker(audited)
    base = ProbeSettings(
        steps=240,
        noise_multiplier=_ALMOST_NONE,
        clipping=clipping,
        physical_batch_size=physical_batch_size,
        adapters=adapters,
        copies=rows_of_a_user,
        seed=seed,
    )
    where = Devices(accelerator=accelerator, devices=devices, strategy=strategy)
    checks: list[Check] = []
    with Probe(audited=audited, where=where, directory=directory) as probe:
        try:
            for stage in _stages(probe, base):
                checks += stage
                if stop_at_failure and not all(check.passed for check in stage):
                    break
        # Whatever the trainer raises, the audit is what failed.
        except Exception as error:  # noqa: BLE001
            return TrainerAudit(checks=tuple(checks), error=f"{type(error).__name__}: {error}")
    return TrainerAudit(checks=tuple(checks))


def _require_maker(audited: object) -> None:
    kind = audited if isinstance(audited, type) else type(audited)
    if not callable(audited) or issubclass(kind, nn.Module):
        raise ConfigurationError(
            must="what is audited makes the callback: the class DifferentialPrivacy, or a function "
            "of its arguments",
            found=f"{kind.__name__}, which is a module or was made already",
            cost="the audit fits a probe of its own several times, each with other settings",
            remedy="verify_trainer(DifferentialPrivacy); for settings of your own, "
            "verify_trainer(functools.partial(DifferentialPrivacy, ...))",
        )


def _stages(probe: Probe, base: ProbeSettings) -> Iterator[list[Check]]:
    noisy = replace(base, noise_multiplier=1.0, silent=base.size, steps=100)
    noise = probe.fit(noisy)
    ranks = probe.where.devices
    yield [
        *rank_checks(noise, ranks),
        *noise_checks(noise),
        *accounting_checks(noise, "in one fit"),
    ]

    shown = replace(base, members=16, heavy=8)
    draws = probe.fit(shown)
    yield [*rank_checks(draws, ranks), *clipping_checks(draws), *sampling_checks(draws)]

    yield seed_checks(noise, probe.fit(noisy), canaries=False)
    short = replace(shown, steps=12)
    yield seed_checks(probe.fit(short), probe.fit(short), canaries=True)

    # A normaliser of floor(N q) is right at one length in four.
    lengths = range(round(1 / base.sample_rate) + 1)
    window = [probe.fit(replace(short, heavy=8 + more)) for more in lengths]
    yield [
        *public_constants_checks(window),
        *(check for recording in window for check in clipping_checks(recording)),
    ]

    # Data of two rows, so that more than half of the draws are empty. So many that a trainer which
    # drops what ranks cannot share evenly is missed once in 2,000.
    few = probe.fit(replace(base, members=2, steps=160))
    yield [*clipping_checks(few), rate_check(few)]

    resumed = probe.fit(replace(noisy, silent=2, steps=40), resume_after=20)
    yield [
        *rank_checks(resumed, ranks),
        *accounting_checks(resumed, "after a resume"),
        *noise_checks(resumed),
    ]


def trainer_tightness(
    audited: Audited,
    *,
    canaries: int = 20_000,
    noise_multiplier: float = 4.47,
    sample_rate: float = 1.0,
    steps: int = 20,
    seed: int = 0,
) -> FamilyBound:
    """Attack a trainer with private coordinates, and see how near its ε the attack comes.

    The checks of `verify_trainer` say that nothing was wrong that they look for. This says how much
    room is left between what was proven and what was claimed.

    Args:
        audited: Makes the callback under audit.
        canaries: How many, half of them in the data.
        noise_multiplier: σ of the fit. The default is a claim of ε = 4.38 at δ = 1e-5.
        sample_rate: q of the fit.
        steps: Private steps.
        seed: As in `verify_trainer`.

    Returns:
        The bound at 95 per cent; ``refuted`` speaks of the claim at 99.9 per cent.
    """
    members = canaries // 2
    settings = ProbeSettings(
        steps=steps,
        noise_multiplier=noise_multiplier,
        members=members,
        size=members,
        sample_rate=sample_rate,
        physical_batch_size=members,
        seed=seed,
    )
    with Probe(audited=audited) as probe:
        recording = probe.fit(settings)
    claim = GaussianRelease(
        noise_multiplier=noise_multiplier, sample_rate=sample_rate, count=recording.steps
    )
    scores = neyman_pearson_scores(recording.projections, claim).numpy()
    counts = Scores(scores[:members], scores[members:]).counts(
        neyman_pearson_threshold(claim, members, members)
    )
    found = family_epsilon(counts, claim, delta=_DELTA)
    refuted = claim_refuted(counts, claim, significance=_CLAIM_CHANCE)
    return found._replace(claimed=epsilon([claim], _DELTA), refuted=refuted)
