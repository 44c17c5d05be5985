"""The privacy report as plain values: what one run promised, spent, and did not promise.

The record holds no secret: no seed of draws, noise or canaries. What was computed on private data
stands under "uncovered" and "leakage", so that a report without them can be published.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass, field, replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

from lightning_privacy.accounting import delta as delta_of
from lightning_privacy.accounting import epsilon as epsilon_of
from lightning_privacy.accounting.rounding import shown_epsilon
from lightning_privacy.errors import ConfigurationError
from lightning_privacy.reports.questions import answers
from lightning_privacy.reports.tables import PrivacySummary, covered_rows, uncovered_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from lightning_privacy.plan import PrivacyPlan

RECORD_NAME, PAGE_NAME = "privacy_report.json", "privacy_report.html"
_VERSION = 1
_ACCOUNTANT_PACKAGES = {"pld": "lightning_privacy", "prv": "opacus", "rdp": "dp-accounting"}
_PACKAGES = (
    "torch", "lightning", "torchmetrics", "numpy", "scipy", "dp-accounting", "opacus",
    "transformers", "peft", "bitsandbytes",
)  # fmt: skip
_DELTAS = tuple(10.0 ** -(place / 2) for place in range(4, 21))
_POINTS = 9
_POST_PROCESSING = (
    "everything that is computed from these weights alone: predictions, generated text, further "
    "training on other data"
)
_TUNING = (
    "Settings that were tried before on the same data have an ε of their own, which adds up. What "
    "was tried here was not stated."
)
_STATISTICS = (
    "Losses, norms, shares of clipped units and metrics on training data are computed without "
    "noise."
)
_FIXED = "Tokeniser, vocabulary, normalising statistics and initial weights, unless public."


@dataclass(frozen=True, kw_only=True, slots=True)
class Statements:
    """What only the people behind a run can say; the report says where they said nothing.

    Args:
        data: Which data were trained on, and whose they are.
        tuning: How settings were chosen, and whether on the same data.
        released: What is handed out: the last model, all checkpoints, predictions only.
        trust_model: Who sees the raw data, and who is trusted to run the training.
        access_control: How the raw data, the logs and the checkpoints are protected.
        data_collection: How the data came to be where they are, and who else has them.
        utility: What the model is good for, and how that was measured.
        bias: For whom the model works less well, small groups above all.
        code: Where the code of the run can be read.
    """

    data: str = ""
    tuning: str = ""
    released: str = ""
    trust_model: str = ""
    access_control: str = ""
    data_collection: str = ""
    utility: str = ""
    bias: str = ""
    code: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What an attack on the model measured. Not covered by ε.

    Args:
        name: The attack, and when it was made.
        figures: Numbers by name.
        note: What they may be compared with, and what they assume.
    """

    name: str
    figures: Mapping[str, float]
    note: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What a report knows of a run besides the summary of its privacy.

    Args:
        outcome: How the fit ended.
        dependences: What depended on private data or outputs besides the weights, in words.
        ledger: What the ledger of the data set says, by name; None without one.
        findings: What attacks measured.
        series: Figures over the steps by name: pairs of step and value. Not covered by ε.
        checkpoint: File, hashes, by name.
        statements: What the people behind the run say.
    """

    outcome: str = "completed"
    dependences: Sequence[str] = ()
    ledger: Mapping[str, Any] | None = None
    findings: Sequence[Finding] = ()
    series: Mapping[str, Sequence[tuple[float, float]]] = field(default_factory=dict)
    checkpoint: Mapping[str, str] = field(default_factory=dict)
    statements: Statements = field(default_factory=Statements)


def privacy_record(summary: PrivacySummary, facts: RunFacts) -> dict[str, Any]:
    """Put together everything that a report shows.

    Args:
        summary: What the run promised, spent and saw.
        facts: What else is known.

    Returns:
        Plain dictionaries, lists, strings, numbers and None, for `write_record`. An infinite ε is
        None.
    """
    plan = summary.plan
    return {
        "version": _VERSION,
        "covered_only": False,
        "outcome": facts.outcome,
        "guarantee": _guarantee(summary),
        "mechanism": [list(row) for row in covered_rows(summary)],
        "plan": plan.to_dict(),
        "curve": _curve(summary),
        "spending": _spending(plan),
        "advantage_ceiling": _advantage_ceiling(summary),
        "accountant": {"name": plan.accountant, **_accountant_version(plan.accountant)},
        "covered": _covered(summary),
        "not_covered": _not_covered(facts),
        "ledger": {
            "releases": [release.to_dict() for release in summary.releases],
            "data_set": None if facts.ledger is None else dict(facts.ledger),
        },
        "questions": answers(summary, facts),
        "software": _software(),
        "checkpoint": dict(facts.checkpoint),
        "uncovered": {
            "rows": [list(row) for row in uncovered_rows(summary)],
            "series": {
                name: [list(pair) for pair in pairs if all(map(math.isfinite, pair))]
                for name, pairs in facts.series.items()
            },
        },
        "leakage": [
            {"name": found.name, "figures": dict(found.figures), "note": found.note}
            for found in facts.findings
        ],
    }


def without_uncovered(record: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out every figure that was computed on private data without noise.

    Args:
        record: What `privacy_record` returned.

    Returns:
        A record that says of the data no more than the released weights do.
    """
    return {**record, "covered_only": True, "uncovered": {"rows": [], "series": {}}, "leakage": []}


def write_record(record: Mapping[str, Any], path: Path) -> None:
    """Write a record as JSON.

    Args:
        record: What `privacy_record` returned.
        path: The file.
    """
    text = json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_record(path: Path) -> dict[str, Any]:
    """Read what `write_record` wrote.

    Args:
        path: The file.

    Returns:
        The record.

    Raises:
        ConfigurationError: There is no such file, or it is no record of this version.
    """
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _unreadable(path, str(error)) from error
    if not isinstance(record, dict) or record.get("version") != _VERSION:
        raise _unreadable(path, f"a file without version {_VERSION}")
    return record


def _guarantee(summary: PrivacySummary) -> dict[str, Any]:
    described = summary.plan.describe()
    return {
        "epsilon": _finite(summary.epsilon),
        "epsilon_at_stop": _finite(summary.epsilon_at_stop),
        "delta": summary.plan.delta,
        "unit": described["privacy unit"],
        "neighbours": described["neighbours"],
        "steps": summary.steps,
        "planned_steps": summary.planned_steps,
        "private": not summary.plan.deterministic,
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _released(summary: PrivacySummary) -> list[Any]:
    """What was and will be released: the headline speaks of the planned steps."""
    to_come = summary.planned_steps - summary.steps
    return [*summary.releases, summary.plan.release(max(0, to_come))]


def _curve(summary: PrivacySummary) -> list[dict[str, float]]:
    """ε at many δ: one pair of them tells less than the curve."""
    plan = summary.plan
    if plan.deterministic:
        return []
    deltas = sorted({*_DELTAS, plan.delta}, reverse=True)
    # Opacus's accountant takes seconds for each point; the default one bounds the same curve.
    accountant = "pld" if plan.accountant == "prv" else plan.accountant
    points = [(d, epsilon_of(_released(summary), d, accountant)) for d in deltas]
    return [{"delta": d, "epsilon": value} for d, value in points if math.isfinite(value)]


def _spending(plan: PrivacyPlan) -> list[list[float]]:
    """ε after shares of the planned steps, from public numbers alone."""
    if plan.deterministic:
        return []
    steps = sorted({max(1, round(plan.steps * k / (_POINTS - 1))) for k in range(1, _POINTS)})
    cheap = replace(plan, accountant="pld" if plan.accountant == "prv" else plan.accountant)
    points = [[0.0, 0.0], *([float(count), cheap.epsilon(count)] for count in steps)]
    return [point for point in points if math.isfinite(point[1])]


def _advantage_ceiling(summary: PrivacySummary) -> float | None:
    if summary.plan.deterministic:
        return None
    return delta_of(_released(summary), 0.0)


def _accountant_version(name: str) -> dict[str, str]:
    package = _ACCOUNTANT_PACKAGES[name]
    return {"package": package, "version": _version(package) or "unknown"}


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _software() -> dict[str, str]:
    found = {name: _version(name) for name in ("lightning_privacy", *_PACKAGES)}
    versions = {name: version for name, version in found.items() if version is not None}
    return {**versions, "python": sys.version.split()[0]}


def _covered(summary: PrivacySummary) -> list[str]:
    if summary.plan.deterministic:
        return []
    weights = f"the weights after each of the {summary.planned_steps} planned private steps, and "
    unit = f"in respect of any one {summary.plan.unit}, whatever else a reader knows"
    return [weights + "so every checkpoint of this run", _POST_PROCESSING, unit]


def _not_covered(facts: RunFacts) -> list[list[str]]:
    words = facts.statements
    return [
        ["Tuning", words.tuning or _TUNING],
        ["Statistics", _STATISTICS],
        *(["Choices", text] for text in facts.dependences),
        ["Fixed before training", _FIXED],
        ["Validation and test data", "ε speaks of the training data only."],
        ["Side channels", "Timing, memory use, logs, and files that other callbacks write."],
    ]


def _unreadable(path: Path, found: str) -> ConfigurationError:
    return ConfigurationError(
        must="the file is a record that PrivacyReport wrote",
        found=f"{path}: {found}",
        cost="a page that describes another run, or none",
        remedy=f"give the folder that holds {RECORD_NAME}, from this version of lightning_privacy",
    )


def formal_statement(record: Mapping[str, Any]) -> str:
    """The guarantee of a record in one sentence.

    Args:
        record: What `privacy_record` returned.

    Returns:
        The sentence; for a run in deterministic test mode, that there is no guarantee.
    """
    promise = record["guarantee"]
    if promise["epsilon"] is None:
        return (
            "This run has no privacy guarantee: its noise can be recomputed, or there was none. "
            "Its ε is infinite."
        )
    return (
        f"The mechanism that outputs the weights after every one of {promise['planned_steps']} "
        f"private steps is (ε, δ)-differentially private with ε = "
        f"{shown_epsilon(promise['epsilon'])} and δ = {promise['delta']:g}, for training data sets "
        f"that differ in one {promise['unit']}: {promise['neighbours']}."
    )
