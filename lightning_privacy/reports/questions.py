"""What published guidance asks of a privacy claim, and what a run can answer.

Two lists. Section 5.3 of "How to DP-fy ML" (Ponomareva et al. 2023, JAIR; arXiv 2303.00654) says
what to report beside an ε; its items stand here in our own words. NIST SP 800-226, "Guidelines for
Evaluating Differential Privacy Guarantees" (Near, Darais, Lefkovitz and Howarth, March 2025),
evaluates a guarantee by the parts of a pyramid, from the top (its section 2) to the bottom (its
section 4); they have the names that it gives them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from lightning_privacy.accounting.rounding import shown_epsilon

if TYPE_CHECKING:
    from lightning_privacy.plan import PrivacyPlan
    from lightning_privacy.reports.record import RunFacts
    from lightning_privacy.reports.tables import PrivacySummary

NOT_STATED = "Not stated by the people behind this run."
DP_FY_ML = "How to DP-fy ML"
NIST = "NIST SP 800-226"
_REPOSITORY = "The package lightning_privacy, whose version and peers stand below."
_SAMPLING = (
    "Amplification by Poisson sampling is assumed, and Poisson sampling is what was done: each "
    "{drawn} is drawn independently with probability q = {rate:.6g}; nothing was shuffled. The sum "
    "is divided by a public constant, never by the size of a draw."
)


def answers(summary: PrivacySummary, facts: RunFacts) -> list[dict[str, str]]:
    """Answer both lists as far as the run itself can.

    Args:
        summary: What the run promised, spent and saw.
        facts: What else is known, statements of people among it.

    Returns:
        For each question "source", "item" and "answer".
    """
    asked = {DP_FY_ML: _dp_fy_ml(summary, facts), NIST: _nist(summary, facts)}
    return [
        {"source": source, "item": item, "answer": answer or NOT_STATED}
        for source, items in asked.items()
        for item, answer in items.items()
    ]


def _dp_fy_ml(summary: PrivacySummary, facts: RunFacts) -> dict[str, str]:
    plan, words = summary.plan, facts.statements
    described = plan.describe()
    return {
        "Who is trusted with the raw data": "Central DP: one party holds the raw data and is "
        "trusted to run the mechanism correctly. " + words.trust_model,
        "Which uses of the data are covered": "This training run alone. " + _tuning(facts),
        "Which outputs are covered, and which are released": "The guarantee holds for all "
        "intermediate weights, and so for any checkpoint. Released: "
        + (words.released or NOT_STATED.lower()),
        "Unit of privacy": _unit(plan),
        "When two data sets are neighbours": described["neighbours"].capitalize() + ".",
        "Kind of accounting": _accounting(plan),
        "What the accounting assumes, and whether it holds": _assumptions(plan),
        "Formal statement for the final model": _statement(summary),
        "Formal statement for the choice of hyperparameters": _tuning(facts),
        "How the claim can be checked": f"{_REPOSITORY} {words.code}".strip(),
    }


def _nist(summary: PrivacySummary, facts: RunFacts) -> dict[str, str]:
    plan, words = summary.plan, facts.statements
    return {
        "Privacy parameters": _statement(summary),
        "Unit of privacy": _unit(plan),
        "Algorithms and correctness": f"DP-SGD with {plan.clipping.replace('_', ' ')} clipping to "
        f"norm {plan.clip_norm:g} and Gaussian noise of {plan.noise_multiplier:.4g} times that. "
        "verify_trainer of lightning_privacy.audit checks the trainer by what it releases. "
        f"Rounding is counted as a longer contribution, by {plan.precision_slack:g} of it.",
        "Utility": words.utility,
        "Bias": words.bias,
        "Access control": words.access_control,
        "Trust models": words.trust_model or "Central: whoever trains sees the raw data.",
        "Side channels": "Noise and draws come from secrets of the operating system that are "
        "stored nowhere. Timing and memory use are not protected.",
        "Data collection exposure": words.data_collection,
    }


def _tuning(facts: RunFacts) -> str:
    parts = [facts.statements.tuning]
    if facts.ledger is not None:
        parts.append(
            f"The ledger of the data set {facts.ledger['dataset']!r} charges ε = "
            f"{facts.ledger['epsilon']} at δ = {facts.ledger['delta']:g} for all runs that were "
            f"booked there, this one included: {facts.ledger['runs']}. Others are not in it."
        )
    return " ".join(part for part in parts if part) or (
        "Hyperparameter tuning is not covered. " + NOT_STATED
    )


def _unit(plan: PrivacyPlan) -> str:
    if plan.group_size is None:
        return "Example-level: one row of the training data."
    return f"User-level: all data of one user, at most {plan.group_size} examples of each."


def _accounting(plan: PrivacyPlan) -> str:
    return {
        "pld": "PLD-based, pessimistic (connect the dots, arXiv 2207.04380).",
        "prv": "PRV-based, by Opacus, with its error added (arXiv 2106.02848).",
        "rdp": "RDP-based, by dp-accounting (arXiv 1908.10530).",
    }[plan.accountant]


def _assumptions(plan: PrivacyPlan) -> str:
    if plan.deterministic:
        return "Secret noise is assumed, and does not hold: this was a test with a known seed."
    drawn = "user" if plan.user_sampling == "users" else "example"
    return _SAMPLING.format(drawn=drawn, rate=plan.sample_rate)


def _statement(summary: PrivacySummary) -> str:
    plan = summary.plan
    if math.isinf(summary.epsilon):
        return "None: ε is infinite."
    text = f"({shown_epsilon(summary.epsilon)}, {plan.delta:g})-DP for {summary.planned_steps} "
    text += "planned private steps"
    if summary.epsilon_at_stop < summary.epsilon:
        text += f"; ex-post, at the stop after {summary.steps} steps, "
        text += f"ε = {shown_epsilon(summary.epsilon_at_stop)}"
    return text + "."
