from __future__ import annotations

from pathlib import Path

import pytest

from lightning_privacy.cli import main

WORDS = [
    "plan", "--unit", "user", "--dataset_size", "500", "--examples_per_step", "100", "--steps",
    "50", "--epsilon", "4", "--delta", "1e-5", "--group_sizes", "1", "4",
]  # fmt: skip


@pytest.fixture
def counts(tmp_path: Path) -> str:
    path = tmp_path / "counts.txt"
    path.write_text("\n".join(str(1 + number % 9) for number in range(500)))
    return str(path)


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *more: str) -> str:
    monkeypatch.setenv("COLUMNS", "100")
    assert main([*WORDS, *more]) == 0
    return capsys.readouterr().out


def test_public_facts_are_compared_and_the_rules_applied(capsys, monkeypatch) -> None:
    out = printed(capsys, monkeypatch, "--examples_per_user", "4")
    assert "predicted from public facts" in out
    assert "Examples: group_size 4, nearest to the median of 4" in out
    assert "the least predicted noise" in out
    assert "private" not in out.lower()


def test_a_delta_that_promises_nothing_is_warned_of(capsys) -> None:
    assert main([*WORDS, "--delta", "0.01", "--examples_per_user", "4"]) == 0
    assert "not below one over the number of units, 500" in capsys.readouterr().err


def test_private_counts_are_called_private(capsys, monkeypatch, counts) -> None:
    out = printed(capsys, monkeypatch, "--counts", counts)
    assert "Computed from private counts: not covered by ε" in out
    assert "PRIVATE: median and rates above" in out


def test_a_private_median_is_paid_for(capsys, monkeypatch, counts) -> None:
    out = printed(capsys, monkeypatch, "--counts", counts, "--quantile_epsilon", "0.5")
    assert "with a private median of" in out
    assert "the whole costs ε = 4.5" in " ".join(out.split())
    assert "PRIVATE" not in out


@pytest.mark.parametrize("content", ["", "1 2 x", "0 3", None])
def test_files_without_counts_are_refused(capsys, tmp_path, content) -> None:
    path = tmp_path / "counts.txt"
    if content is not None:
        path.write_text(content)
    assert main([*WORDS, "--counts", str(path)]) == 2
    assert "names a file with a whole number >= 1" in capsys.readouterr().err


def test_the_median_comes_from_one_place(capsys, counts) -> None:
    for more in ([], ["--counts", counts, "--examples_per_user", "3"]):
        assert main([*WORDS, *more]) == 2
        assert "comes from one place" in capsys.readouterr().err


def test_a_recipe_for_users_is_planned(tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    recipe = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
    words = ["plan", "--config", str(recipe), "--data.embedded.n_users", "400",
             "--privacy.unit", "user", "--privacy.user_sampling", "examples",
             "--privacy.group_size", "2", "--privacy.expected_batch_size", "20"]  # fmt: skip
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "examples, out of at most 2 of each user" in out
    assert "user" in out
