"""The report's data: complete, free of secrets, and honest about what is not covered."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from lightning_privacy import ConfigurationError
from lightning_privacy.reports import (
    Finding,
    PrivacySummary,
    RunFacts,
    Statements,
    formal_statement,
    privacy_record,
    read_record,
    rebuild_page,
    without_uncovered,
    write_report,
)
from lightning_privacy.reports.files import file_hash, weights_hash
from tests.reports.test_tables import summary

FACTS = RunFacts(
    dependences=("Early stopping by 'val_loss'.",),
    findings=(Finding(name="ratio, after epoch 3", figures={"AUROC": 0.6137}, note="one attack"),),
    series={"loss": [(1.0, 2.0), (2.0, math.inf), (3.0, 1.0)]},
    checkpoint={"last checkpoint, SHA-256": "ab" * 32},
)


@pytest.fixture(scope="module")
def spent() -> PrivacySummary:
    plain = summary()
    return summary(
        releases=(plain.plan.release(60),),
        epsilon=plain.plan.epsilon(),
        epsilon_at_stop=plain.plan.epsilon(60),
        steps=60,
        clipped_share=0.5,
        validation_loss=1.2519,
    )


@pytest.fixture(scope="module")
def record(spent: PrivacySummary) -> dict[str, Any]:
    return privacy_record(spent, FACTS)


def test_the_record_is_json_and_comes_back(record: dict[str, Any], tmp_path: Path) -> None:
    write_report(record, tmp_path / "run")
    read = read_record(tmp_path / "run" / "privacy_report.json")
    assert read == json.loads(json.dumps(record))


def test_the_headline_is_the_planned_epsilon_and_the_curve_goes_through_it(
    record: dict[str, Any], spent: PrivacySummary
) -> None:
    promise = record["guarantee"]
    assert promise["epsilon"] == spent.epsilon > promise["epsilon_at_stop"]
    (own,) = [point for point in record["curve"] if point["delta"] == spent.plan.delta]
    assert own["epsilon"] == pytest.approx(spent.epsilon)
    values = [point["epsilon"] for point in record["curve"]]
    assert values == sorted(values)
    assert record["spending"][-1] == [100.0, pytest.approx(spent.epsilon)]
    assert 0 < record["advantage_ceiling"] < 1


def test_what_is_not_covered_is_named(record: dict[str, Any]) -> None:
    words = dict(record["not_covered"])
    assert {"Tuning", "Statistics", "Choices", "Fixed before training"} <= words.keys()
    assert "not stated" in words["Tuning"]
    assert words["Choices"] == "Early stopping by 'val_loss'."


def test_a_published_record_holds_no_figure_of_private_data(record: dict[str, Any]) -> None:
    published = json.dumps(without_uncovered(record))
    for figure in ("0.6137", "1.2519", "ratio, after epoch 3", '"loss"'):
        assert figure in json.dumps(record), figure
        assert figure not in published, figure


def test_what_cannot_be_plotted_is_left_out(record: dict[str, Any]) -> None:
    assert record["uncovered"]["series"]["loss"] == [[1.0, 2.0], [3.0, 1.0]]


def test_both_lists_of_questions_are_answered(record: dict[str, Any]) -> None:
    asked = {(one["source"], one["item"]): one["answer"] for one in record["questions"]}
    assert all(asked.values())
    assert (
        "Poisson" in asked["How to DP-fy ML", "What the accounting assumes, and whether it holds"]
    )
    assert asked["NIST SP 800-226", "Bias"] == "Not stated by the people behind this run."
    stated = privacy_record(summary(), RunFacts(statements=Statements(bias="dialects: untested")))
    answers = [one["answer"] for one in stated["questions"]]
    assert "dialects: untested" in answers


def test_a_ledger_answers_what_tuning_cost(spent: PrivacySummary) -> None:
    ledger = {"dataset": "codes", "runs": 3, "epsilon": "5.1", "budget": 8.0, "delta": 1e-6}
    record = privacy_record(spent, RunFacts(ledger=ledger))
    asked = {one["item"]: one["answer"] for one in record["questions"]}
    tuning = asked["Formal statement for the choice of hyperparameters"]
    assert "5.1" in tuning
    assert tuning.endswith("3. Others are not in it.")


def test_a_run_in_test_mode_promises_nothing() -> None:
    record = privacy_record(
        summary(deterministic=True, epsilon=math.inf, epsilon_at_stop=math.inf), RunFacts()
    )
    assert record["guarantee"]["epsilon"] is None
    assert record["curve"] == record["covered"] == []
    assert "no privacy guarantee" in formal_statement(record)


def test_the_page_is_rebuilt_from_the_data(record: dict[str, Any], tmp_path: Path) -> None:
    page = write_report(record, tmp_path / "runs" / "one")
    before = page.read_text()
    page.unlink()
    assert rebuild_page(tmp_path / "runs") == page
    assert page.read_text() == before
    published = rebuild_page(tmp_path, covered_only=True)
    assert published != page
    assert "0.614" in before
    assert "0.614" not in published.read_text()


def test_a_folder_without_one_record_is_refused(record: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="0 below"):
        rebuild_page(tmp_path)
    for name in ("a", "b"):
        write_report(record, tmp_path / name)
    with pytest.raises(ConfigurationError, match="2 below"):
        rebuild_page(tmp_path)
    (tmp_path / "a" / "privacy_report.json").write_text('{"version": 0}')
    with pytest.raises(ConfigurationError, match="without version"):
        rebuild_page(tmp_path / "a")


def test_hashes_follow_the_content(tmp_path: Path) -> None:
    import hashlib

    import torch

    (tmp_path / "file").write_bytes(b"abc")
    assert file_hash(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
    state = {"a": torch.zeros(2), "b": torch.ones(1, dtype=torch.bfloat16)}
    same = {"b": torch.ones(1, dtype=torch.bfloat16), "a": torch.zeros(2)}
    assert weights_hash(state) == weights_hash(same)
    assert weights_hash(state) != weights_hash({**state, "a": torch.zeros(1, 2)})
    assert weights_hash(state) != weights_hash({**state, "a": torch.tensor([0.0, 1.0])})
