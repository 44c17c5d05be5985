from __future__ import annotations

import pytest

from lightning_privacy import PrivacyLedger
from lightning_privacy.cli import main

ADD = ["ledger", "add", "spent.sqlite", "--dataset", "letters", "--noise_multiplier", "4"]
SHOW = ["ledger", "show", "spent.sqlite", "--dataset", "letters"]


def test_what_was_added_is_shown(folder, capsys):
    assert main([*ADD, "--run", "a histogram", "--budget", "8", "1e-5", "--note", "by hand"]) == 0
    assert main([*ADD, "--run", "another", "--steps", "3", "--sample_rate", "0.5"]) == 0
    capsys.readouterr()
    assert main(SHOW) == 0
    shown = capsys.readouterr().out
    for words in ("letters: ε = ", "of 8 at δ = 1e-05", "a histogram", "by hand", "settled", "0.5"):
        assert words in shown
    assert len(PrivacyLedger("spent.sqlite", dataset="letters").entries()) == 2


def test_a_name_that_is_taken_is_refused(folder, capsys):
    main([*ADD, "--run", "once", "--budget", "8", "1e-5"])
    assert main([*ADD, "--run", "once"]) == 1
    assert "name of its own" in capsys.readouterr().err


def test_a_name_that_is_misspelt_is_told_the_names_there_are(folder, capsys):
    main([*ADD, "--run", "once", "--budget", "8", "1e-5"])
    capsys.readouterr()
    assert main([*SHOW[:-1], "leters"]) == 2
    assert "the ledger holds 'letters'" in capsys.readouterr().err


def test_what_is_more_than_the_budget_is_named(folder, capsys):
    main([*ADD, "--run", "once", "--budget", "8", "1e-5"])
    assert "more than the budget" not in capsys.readouterr().out
    main([*ADD, "--run", "again", "--steps", "400"])
    assert "more than the budget" in capsys.readouterr().out


@pytest.mark.parametrize("words", [SHOW, [*ADD, "--run", "x"]])
def test_no_ledger_is_made_by_mistake(folder, capsys, words):
    assert main(words) == 2
    assert "a file that exists" in capsys.readouterr().err
    assert not (folder / "spent.sqlite").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_recipe_names_its_ledger(folder, recipe):
    ledger = (
        "{class_path: lightning_privacy.PrivacyLedger, init_args: "
        "{path: spent.sqlite, dataset: letters, budget: [30.0, 1.0e-4]}}"
    )
    words = ["fit", "--config", recipe, "--privacy.ledger", ledger]
    assert main([*words, "--compare_without_privacy", "false"]) == 0
    (entry,) = PrivacyLedger("spent.sqlite", dataset="letters").entries()
    assert entry.settled
    assert sum(release.count for release in entry.releases) > 0
