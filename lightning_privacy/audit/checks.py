"""What must hold of the releases of a private trainer, one check each.

Statistical checks err with chance 1e-6 on a correct trainer (two-sided, Bonferroni within each
check), deterministic ones never.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from lightning_privacy.audit.probe import Recording

CHANCE = 1e-6
# What rounding in float32 and the plan's precision slack may add to a projection.
_ROUNDING = 2e-3
_LAGS = 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Check:
    """One thing that must hold.

    Attributes:
        name: What, in a few words.
        passed: Whether it holds.
        found: What was found.
        expected: What it should be.
    """

    name: str
    passed: bool
    found: str
    expected: str


def clipping_checks(recording: Recording) -> list[Check]:
    """Sensitivity, fidelity and who is in, of a fit with almost no noise."""
    settings = recording.settings
    tolerance = _ROUNDING + 8 * settings.noise_multiplier
    inside = recording.projections[:, : settings.members]
    outside = recording.projections[:, settings.members :]
    largest = float(recording.projections.abs().max())
    distance = float(torch.minimum(inside.abs(), (inside - 1).abs()).max())
    excluded, across = float(outside.abs().max()), float(recording.across.abs().max())
    # Each heavy row adds exactly C along one direction: whole numbers of C, whoever was drawn.
    counts = recording.heavy_norm
    size = sum(c.stop - c.start for n, c in recording.columns.items() if n.startswith("net."))
    rough = 2 * settings.noise_multiplier * math.sqrt(size) + _ROUNDING * (1 + settings.heavy)
    most, broken = float(counts.max()), float((counts - counts.round()).abs().max())
    return [
        Check(
            name="no contribution is longer than the clip norm",
            passed=largest <= 1 + tolerance,
            found=f"{largest:.4f} of what it may be",
            expected="at most 1",
        ),
        Check(
            name="a drawn unit contributes the clip norm, divided by the public constant",
            passed=distance <= tolerance,
            found=f"{distance:.4f} away from 0 and 1",
            expected="0 or 1 clip norms",
        ),
        Check(
            name="units outside of the data contribute nothing",
            passed=max(excluded, across) <= tolerance,
            found=f"{max(excluded, across):.4f} clip norms",
            expected="0",
        ),
        Check(
            name="one norm is clipped over all parameters",
            passed=broken <= rough and most <= settings.heavy + rough,
            found=f"at most {most:.4g} clip norms, {broken:.4f} away from whole ones",
            expected=f"whole clip norms, up to {settings.heavy}",
        ),
    ]


def rate_check(recording: Recording) -> Check:
    """How often units were drawn, of a fit with almost no noise: an exact test, for any few."""
    from scipy import stats

    drawn, heavy = _draws(recording)
    total, trials = drawn.sum() + heavy.sum(), len(drawn) * _rows(recording)
    q = recording.settings.sample_rate
    chance = stats.binomtest(int(min(total, trials)), trials, q).pvalue
    return Check(
        name="units are drawn with the accounted rate",
        passed=chance > CHANCE and total <= trials,
        found=f"{total / trials:.4f}",
        expected=f"{q:g}",
    )


def sampling_checks(recording: Recording) -> list[Check]:
    """Rate, dispersion and serial independence of the draws, of a fit with almost no noise.

    Needs some hundred steps and a dozen units: counts of few things are not near normal.
    """
    drawn, heavy = _draws(recording)
    q, rows = recording.settings.sample_rate, _rows(recording)
    spread = q * (1 - q)
    by_step = ((drawn.sum(1) + heavy - rows * q) ** 2).sum() / (rows * spread)
    by_unit = ((drawn.sum(0) - len(drawn) * q) ** 2).sum() / (len(drawn) * spread)
    z = (drawn - q) / math.sqrt(spread)
    lags = range(1, min(_LAGS, len(z) // 2) + 1)
    serial = max(abs((z[k:] * z[:-k]).sum()) / math.sqrt(z[k:].size) for k in lags)
    limit = _normal_limit(len(lags))
    return [
        rate_check(recording),
        _chi_square("the size of a draw varies as Poisson sampling does", by_step, len(drawn)),
        _chi_square("how often a unit is drawn varies as it should", by_unit, drawn.shape[1]),
        Check(
            name="draws do not depend on earlier draws",
            passed=serial < limit,
            found=f"{serial:.1f} standard errors at some lag up to {len(lags)}",
            expected=f"below {limit:.1f}",
        ),
    ]


def _draws(recording: Recording) -> tuple[np.ndarray, np.ndarray]:
    """Who was drawn: 0 or 1 for each canary ``[T, m]``, and how many heavy rows ``[T]``."""
    members = recording.projections[:, : recording.settings.members]
    return members.round().clamp(0, 1).numpy(), recording.heavy_norm.round().numpy()


def _rows(recording: Recording) -> int:
    return recording.settings.members + recording.settings.heavy


def noise_checks(recording: Recording) -> list[Check]:
    """Size, shape and independence of the noise, of a fit on rows without a gradient."""
    noise = (recording.releases / recording.settings.noise_multiplier).numpy()
    return [
        *_size_checks(noise),
        _every_parameter(recording, noise),
        _every_step(noise),
        _shape(noise),
        *_sharing_checks(recording, noise),
    ]


def _size_checks(noise: np.ndarray) -> list[Check]:
    std = math.sqrt((noise**2).mean())
    return [
        _chi_square("the noise has the accounted size", float((noise**2).sum()), noise.size),
        Check(
            name="the noise is within 3 per cent of the accounted size",
            passed=abs(std - 1) < 0.03,
            found=f"{std:.4f} of it",
            expected="1",
        ),
    ]


def _every_parameter(recording: Recording, noise: np.ndarray) -> Check:
    parts = {name: noise[:, place] for name, place in recording.columns.items()}
    tails = {name: _tail(float((part**2).sum()), part.size) for name, part in parts.items()}
    worst = min(tails, key=lambda name: tails[name])
    silent = any((np.abs(part).max(1) == 0).any() for part in parts.values())
    return Check(
        name="every parameter has the accounted noise",
        passed=not silent and tails[worst] > CHANCE / len(tails),
        found=f"{math.sqrt((parts[worst] ** 2).mean()):.3f} of it on {worst}",
        expected="1, at every step",
    )


def _every_step(noise: np.ndarray) -> Check:
    squares = (noise**2).sum(1)
    tails = [_tail(float(value), noise.shape[1]) for value in squares]
    worst = int(np.argmin(tails))
    return Check(
        name="every step has the accounted noise",
        passed=tails[worst] > CHANCE / len(tails),
        found=f"{math.sqrt(squares[worst] / noise.shape[1]):.3f} of it at step {worst}",
        expected="1",
    )


def _shape(noise: np.ndarray) -> Check:
    from scipy import stats

    shape = stats.kstest(noise.ravel()[:200_000], "norm").pvalue
    mean = abs(noise.mean()) * math.sqrt(noise.size)
    return Check(
        name="the noise is normal with mean 0",
        passed=shape > CHANCE and mean < _normal_limit(1),
        found=f"p = {shape:.2g}, mean at {mean:.1f} standard errors",
        expected="a normal distribution",
    )


def _sharing_checks(recording: Recording, noise: np.ndarray) -> list[Check]:
    gram = noise @ noise.T / math.sqrt(noise.shape[1])
    np.fill_diagonal(gram, 0.0)
    found = {
        "steps": (float(np.abs(gram).max()), len(noise) * (len(noise) - 1) // 2),
        "parameters": _across_tensors(recording, noise),
    }
    return [
        Check(
            name=f"no two {what} share noise",
            passed=correlation < _normal_limit(pairs),
            found=f"a correlation of {correlation:.1f} standard errors",
            expected=f"below {_normal_limit(pairs):.1f}",
        )
        for what, (correlation, pairs) in found.items()
    ]


def seed_checks(first: Recording, second: Recording, canaries: bool) -> list[Check]:
    """That neither noise nor draws follow from a seed, from two fits that are alike."""
    if not canaries:
        # Single float32 numbers of so many meet by chance in one of a thousand audits.
        equal = first.releases == second.releases
        same = any(bool(equal[:, c].all(1).any()) for c in first.columns.values())
        a, b = first.releases.flatten(), second.releases.flatten()
        correlation = abs(float((a * b).mean() / (a.std() * b.std()))) * math.sqrt(len(a))
        passed = not same and correlation < _normal_limit(1)
        found = f"a correlation of {correlation:.1f} standard errors"
    else:
        members = first.settings.members
        draws = [r.projections[:, :members].round() for r in (first, second)]
        passed = not torch.equal(*draws)
        found = "other draws" if passed else "the same draws"
    return [
        Check(
            name=f"seed_everything does not fix the {'draws' if canaries else 'noise'}",
            passed=passed,
            found=found,
            expected="two fits with one seed differ",
        )
    ]


def accounting_checks(recording: Recording, what: str) -> list[Check]:
    """That the callback charged what was released, and reports no less than it costs."""
    settings = recording.settings
    made = len(recording.releases)
    true = _independent_epsilon(settings.noise_multiplier, settings.sample_rate, made)
    return [
        Check(
            name=f"every step is charged, {what}",
            passed=recording.steps == made == settings.steps,
            found=f"{recording.steps} charged, {made} made",
            expected=f"{settings.steps}",
        ),
        Check(
            name=f"the reported ε is not below another accountant's, {what}",
            passed=math.isfinite(recording.epsilon) and recording.epsilon >= true * (1 - 1e-3),
            found=f"{recording.epsilon:.4f}",
            expected=f"at least {true:.4f} (dp-accounting), and finite",
        ),
    ]


def public_constants_checks(recordings: list[Recording]) -> list[Check]:
    """That rate and normaliser do not follow the length of the data."""
    lengths = [r.settings.members + r.settings.heavy + r.settings.silent for r in recordings]
    rates = {r.sample_rate for r in recordings}
    sizes = {r.expected_batch_size for r in recordings}
    settings = recordings[0].settings
    return [
        Check(
            name="rate and normaliser are the declared constants, whatever the data's length",
            passed=rates == {settings.sample_rate} and sizes == {settings.expected_batch_size},
            found=f"rates {sorted(rates)}, normalisers {sorted(sizes)}",
            expected=f"{settings.sample_rate:g} and {settings.expected_batch_size} "
            f"for lengths {min(lengths)} to {max(lengths)}",
        )
    ]


def rank_checks(recording: Recording, ranks: int) -> list[Check]:
    """That all ranks took part, released the same and charged the same; none for one rank."""
    if ranks == 1:
        return []
    others = recording.others
    same = all(torch.equal(other.releases, recording.releases) for other in others)
    charged = [(each.steps, each.epsilon) for each in (recording, *others)]
    return [
        Check(
            name="as many ranks take part as there are devices",
            passed=len(others) + 1 == ranks,
            found=f"{len(others) + 1}",
            expected=f"{ranks}",
        ),
        Check(
            name="every rank steps on the same release",
            passed=same,
            found="equal to the last bit" if same else "other gradients on other ranks",
            expected="equal to the last bit",
        ),
        Check(
            name="every rank charges the same",
            passed=len(set(charged)) == 1,
            found=", ".join(f"{steps} steps, ε = {spent:.4f}" for steps, spent in charged),
            expected="the same steps and ε",
        ),
    ]


def _independent_epsilon(sigma: float, q: float, steps: int) -> float:
    from dp_accounting import dp_event
    from dp_accounting.pld import PLDAccountant

    event = dp_event.PoissonSampledDpEvent(q, dp_event.GaussianDpEvent(sigma))
    accountant = PLDAccountant(value_discretization_interval=1e-3)
    # Its grid is pessimistic by less than the thousandth that the check allows.
    return float(accountant.compose(event, steps).get_epsilon(1e-5))


def _across_tensors(recording: Recording, noise: np.ndarray) -> tuple[float, int]:
    parts = [noise[:, c] for c in recording.columns.values()]
    found, pairs = 0.0, 0
    for place, first in enumerate(parts):
        for second in parts[:place]:
            length = min(first.shape[1], second.shape[1])
            product = (first[:, :length] * second[:, :length]).sum()
            found = max(found, abs(product) / math.sqrt(length * len(noise)))
            pairs += 1
    return found, pairs


def _chi_square(name: str, value: float, freedom: int) -> Check:
    return Check(
        name=name,
        passed=_tail(value, freedom) > CHANCE,
        found=f"{value / freedom:.3f} of the variance",
        expected="1",
    )


def _tail(value: float, freedom: int) -> float:
    from scipy import stats

    return 2 * min(stats.chi2.cdf(value, freedom), stats.chi2.sf(value, freedom))


def _normal_limit(tests: int) -> float:
    from scipy import stats

    return float(stats.norm.isf(CHANCE / 2 / max(1, tests)))
