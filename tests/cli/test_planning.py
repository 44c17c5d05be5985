from __future__ import annotations

import re

import pytest

from lightning_privacy.accounting import GaussianRelease, epsilon
from lightning_privacy.cli import main
from lightning_privacy.cli.training import PrivacyCLI

NUMBERS = ["--dataset_size", "1000", "--expected_batch_size", "50", "--epochs", "2"]
NUMBERS += ["--delta", "1e-5", "--accountant", "rdp"]
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


@pytest.fixture(autouse=True)
def _wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")


def rows(text: str) -> dict[str, str]:
    found = re.findall(r"│ ([a-z][\w ]+?) +│ (.+?) +│", text)
    return dict(found)


def table(text: str) -> list[list[str]]:
    lines = [line.strip("│").split("│") for line in text.splitlines() if re.match(r"│ +\d", line)]
    return [[cell.strip() for cell in cells] for cells in lines]


def test_noise_costs_an_epsilon(capsys):
    assert main(["plan", *NUMBERS, "--noise_multiplier", "1.0"]) == 0
    shown = capsys.readouterr().out
    plan = rows(shown)
    assert plan["private steps"] == "40"
    assert plan["sample rate"] == "0.05"
    assert plan["expected batch size"] == "50"
    released = GaussianRelease(noise_multiplier=1 / 1.0001, sample_rate=0.05, count=40)
    assert float(plan["epsilon"]) == pytest.approx(epsilon([released], 1e-5, "rdp"), abs=1e-4)
    assert [cells[0] for cells in table(shown)] == ["12", "25", "50", "100", "200"]
    assert {cells[3] for cells in table(shown)} == {"1.0000"}


def test_an_epsilon_needs_noise(capsys):
    assert main(["plan", *NUMBERS, "--epsilon", "2", "--batch_sizes", "10", "50"]) == 0
    shown = capsys.readouterr().out
    assert 1.9 < float(rows(shown)["epsilon"]) <= 2.0
    small, large = table(shown)
    assert (small[0], large[0]) == ("10", "50")
    assert float(small[3]) < float(large[3])
    assert all(1.9 < float(cells[4]) <= 2.0 for cells in (small, large))


def test_both_say_when_the_budget_is_spent(capsys):
    words = [*NUMBERS, "--noise_multiplier", "1.0", "--epsilon", "1", "--batch_sizes", "50"]
    assert main(["plan", *words]) == 0
    shown = rows(capsys.readouterr().out)
    steps = int(shown["steps until epsilon reaches the budget"])
    spent = [
        epsilon(
            [GaussianRelease(noise_multiplier=1 / 1.0001, sample_rate=0.05, count=n)], 1e-5, "rdp"
        )
        for n in (steps, steps + 1)
    ]
    assert spent[0] <= 1 < spent[1]


def test_a_delta_that_promises_nothing_is_warned_of(capsys):
    assert main(["plan", *NUMBERS, "--epsilon", "2", "--batch_sizes", "50"]) == 0
    assert not capsys.readouterr().err
    loose = [*NUMBERS, "--delta", "1e-3", "--epsilon", "2", "--batch_sizes", "50"]
    assert main(["plan", *loose]) == 0
    warned = "delta=0.001 is not below one over the number of units, 1000"
    assert warned in capsys.readouterr().err


def test_epochs_and_steps_exclude_one_another(capsys):
    assert main(["plan", *NUMBERS, "--steps", "3", "--epsilon", "2"]) == 2
    assert "Remedy: give one of them, --epochs or --steps" in capsys.readouterr().err


def test_a_recipe_is_planned_as_it_would_be_trained(recipe, capsys):
    pytest.importorskip("transformers")
    cheap = ["--privacy.accountant", "rdp"]
    assert main(["plan", "--config", recipe, "--batch_sizes", "12", *cheap]) == 0
    shown = capsys.readouterr().out
    cli = PrivacyCLI(["fit", "--config", recipe, *cheap])
    assert rows(shown) == cli.config_init.fit.privacy.plan.describe()
    assert "epsilon spent" not in shown


def test_planning_builds_no_model_and_trains_nothing(recipe, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise AssertionError("a plan needs no model and no trainer")

    monkeypatch.setattr("lightning_privacy.models.CausalLanguageModel.__init__", refuse)
    monkeypatch.setattr("lightning.pytorch.Trainer.fit", refuse)
    words = ["plan", "--config", recipe, "--batch_sizes", "12", "--privacy.accountant", "rdp"]
    assert main([*words, "--privacy.expected_batch_size", "6"]) == 0
    assert rows(capsys.readouterr().out)["expected batch size"] == "6"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--dataset_size"),
        (NUMBERS, "--epsilon or --noise_multiplier"),
        ([*NUMBERS, "--epsilon", "1", "--steps", "3"], "--epochs or --steps"),
        ([*NUMBERS, "--epsilon", "-1"], "epsilon"),
        ([*NUMBERS, "--epsilon", "1", "--delta", "1"], "delta"),
        ([*NUMBERS, "--noise_multiplier", "0"], "noise_multiplier"),
        ([*NUMBERS, "--epsilon", "1", "--precision", "16-mixed"], "16-mixed"),
        ([*NUMBERS, "--epsilon", "1", "--expected_batch_size", "5000"], "expected_batch_size"),
        ([*NUMBERS, "--epsilon", "1", "--privacy.delta", "1"], "--privacy.delta"),
    ],
)
def test_a_mistake_gets_one_message(words, message, capsys):
    assert main(["plan", *words]) == 2
    shown = capsys.readouterr()
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""
