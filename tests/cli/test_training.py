from __future__ import annotations

import json

import pytest
from lightning.pytorch.cli import LightningCLI

from lightning_privacy.callbacks import DifferentialPrivacy
from lightning_privacy.cli import main
from lightning_privacy.cli.training import PrivacyCLI
from lightning_privacy.errors import ConfigurationError

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def test_fit_ends_with_the_table(recipe, capsys):
    assert main(["fit", "--config", recipe]) == 0
    table = capsys.readouterr().out
    for title in (
        "privacy unit",
        "epsilon spent",
        "delta",
        "noise multiplier",
        "sample rate",
        "private steps",
        "clip norm",
        "share of units clipped [not covered by ε]",
        "validation loss [not covered by ε]",
    ):
        assert title in table
    assert "without privacy" not in table


def test_the_comparison_adds_a_row(recipe, capsys):
    assert main(["fit", "--config", recipe, "--compare_without_privacy", "true"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("Differential privacy of this run") == 1
    (private,) = [line for line in shown.splitlines() if "validation loss [" in line]
    (plain,) = [line for line in shown.splitlines() if "loss without privacy [" in line]
    private_loss, plain_loss = (float(line.split("│")[2]) for line in (private, plain))
    assert 0 < plain_loss < private_loss < 6
    for label in ("membership AUROC", "secret exposure"):
        assert f"{label} [not covered by ε]" in shown
        assert f"{label} without privacy [not covered by ε]" in shown
    assert "exposure of unseen secrets [not covered by ε]" in shown


def test_the_comparison_starts_from_the_same_weights_and_makes_as_many_steps(recipe, monkeypatch):
    seen = {}

    def note(model, datamodule, settings, *, steps, batch_size):
        seen.update(model=model, steps=steps, batch_size=batch_size)

    monkeypatch.setattr("lightning_privacy.cli.training.train_without_privacy", note)
    words = ["fit", "--config", recipe, "--compare_without_privacy", "true"]
    words += ["--model.learning_rate", "0.0"]
    cli = PrivacyCLI(words)
    assert seen["steps"] == cli.trainer.global_step > 0
    assert seen["batch_size"] == 12
    assert seen["model"] is not cli.model
    for name, value in seen["model"].state_dict().items():
        assert value.equal(cli.model.state_dict()[name])


def test_every_command_reads_the_same_recipe(recipe, folder, capsys):
    words = ["--config", recipe, "--trainer.enable_checkpointing", "true"]
    assert main(["fit", *words, "--trainer.default_root_dir", str(folder)]) == 0
    (checkpoint,) = folder.rglob("*.ckpt")
    for command in ("validate", "test", "predict"):
        assert main([command, *words, "--ckpt_path", str(checkpoint)]) == 0
    assert "val_loss" in capsys.readouterr().out


def test_the_recipe_runs_on_own_text(recipe, folder, capsys):
    pytest.importorskip("datasets")
    rows = [{"body": f"line {i} of a poem", "author": f"a{i % 30}"} for i in range(60)]
    (folder / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["fit", "--config", recipe, "--data.path", "own.jsonl", "--data.val_fraction", "0.3"]
    words += ["--data.text_column", "body", "--data.user_column", "author"]
    cli = PrivacyCLI(words)
    assert set(cli.datamodule.users) < {row["author"] for row in rows}
    assert "epsilon spent" in capsys.readouterr().out


def is_private(cli: LightningCLI) -> bool:
    return any(isinstance(callback, DifferentialPrivacy) for callback in cli.trainer.callbacks)


MONITOR = "lightning.pytorch.callbacks.ModelSummary"


@pytest.mark.parametrize(
    "words",
    [
        ["--config", "recipe.yaml", "--trainer.callbacks+=" + MONITOR],
        ["--config", "recipe.yaml", "--config", "callbacks.yaml"],
        ["--config", "recipe.yaml", "--trainer.callbacks", "null"],
        ["--config", "recipe.yaml", "--trainer.strategy", "auto"],
        ["--config", "recipe.yaml", "--trainer.strategy", "auto", "--trainer.callbacks", "[]"],
    ],
)
def test_no_order_of_options_drops_privacy(recipe, folder, words, capsys):
    (folder / "callbacks.yaml").write_text(f"trainer: {{callbacks: [{{class_path: {MONITOR}}}]}}")
    cli = PrivacyCLI(["fit", *words])
    assert is_private(cli)
    assert type(cli.trainer.strategy).__name__.startswith("Private")
    assert "epsilon spent" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words",
    [
        ["--privacy.epsilon", "1", "--config", "recipe.yaml"],
        ["--trainer.callbacks+=" + MONITOR, "--config=recipe.yaml"],
        ["--config", "recipe.yaml", "--data.batch_size=3", "-c", "recipe.yaml"],
    ],
)
def test_an_option_that_a_recipe_would_override_is_refused(recipe, words, capsys):
    assert main(["fit", *words]) == 2
    assert "options stand behind the last --config" in capsys.readouterr().err


OTHER = """
model:
  class_path: lightning_privacy.models.CausalLanguageModel
  init_args: {hidden_size: 16, num_layers: 1, num_heads: 2, num_key_value_heads: 1}
data: {class_path: lightning_privacy.data.SyntheticSecrets}
trainer:
  strategy: private
  accelerator: cpu
  logger: false
  enable_checkpointing: false
  max_steps: 1
  callbacks:
    - class_path: %s
"""
PRIVACY = "lightning_privacy.callbacks.DifferentialPrivacy"


@pytest.mark.filterwarnings("ignore:(?s).*(instantiate_classes|Jsonargparse)")
@pytest.mark.parametrize(
    "words",
    [
        # Both orders drop the callback, and say nothing.
        [
            f"--trainer.callbacks+={PRIVACY}",
            "--trainer.callbacks.noise_multiplier=1",
            "--trainer.callbacks.delta=0.0001",
            "--config=other.yaml",
        ],
        ["--config=private.yaml", "--config=other.yaml"],
    ],
)
def test_elsewhere_a_dropped_callback_is_refused(folder, monkeypatch, words):
    """With any other LightningCLI the named strategy catches what Lightning silently drops."""
    (folder / "other.yaml").write_text(OTHER % MONITOR)
    settings = "      init_args: {noise_multiplier: 1.0, delta: 1.0e-4}\n"
    (folder / "private.yaml").write_text(OTHER % PRIVACY + settings)
    monkeypatch.setattr("sys.argv", ["any", "fit", *words])
    with pytest.raises(ConfigurationError, match="DifferentialPrivacy callback"):
        LightningCLI(save_config_callback=None, seed_everything_default=False)


def test_two_privacy_callbacks_are_refused(recipe, capsys):
    second = "--trainer.callbacks+=lightning_privacy.callbacks.DifferentialPrivacy"
    words = ["fit", "--config", recipe, second]
    words += ["--trainer.callbacks.noise_multiplier", "9.0", "--trainer.callbacks.delta", "0.001"]
    assert main(words) == 2
    assert "a DifferentialPrivacy callback in `trainer.callbacks`" in capsys.readouterr().err


REFUSED = [
    (["--data.path", "none.jsonl"], "There is no file 'none.jsonl'"),
    (["--data.batch_size", "0"], "`batch_size` must be a whole number >= 1"),
    (["--data.embedded.n_users", "1"], "`n_users` must be a whole number >= 2"),
    (["--data.embedded.p_member", "2"], "`p_member`"),
    (["--model.vocab_size", "100"], "Set `model.vocab_size` to 259"),
    (["--model.num_heads", "5"], "`hidden_size` is a multiple"),
    (["--privacy.delta", "2"], "`delta`"),
    (["--privacy.noise_multiplier", "null"], "neither epsilon nor noise_multiplier"),
    (["--privacy.noise_multiplier", "-1"], "`noise_multiplier`"),
    (["--privacy.clip_norm", "0"], "`clip_norm`"),
    (["--privacy.expected_batch_size", "100000"], "expected_batch_size"),
    (["--trainer.accumulate_grad_batches", "2"], "accumulate_grad_batches"),
    (["--trainer.overfit_batches", "2"], "overfit_batches"),
    (["--trainer.precision", "16-true"], "16-true"),
]


@pytest.mark.parametrize(("words", "message"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_mistake_gets_one_message_and_no_traceback(recipe, words, message, capsys):
    assert main(["fit", "--config", recipe, *words]) == 2
    shown = capsys.readouterr()
    for part in ("Must hold:", "Found:", "It would cost:", "Remedy:"):
        assert shown.err.count(part) == 1
    assert message in shown.err
    assert "Traceback" not in shown.err
    assert "epsilon spent" not in shown.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--privacy.epsilonn", "1"], "epsilonn"),
        (["--privacy.clipping", "soft"], "soft"),
        (["--privacy.delta", "small"], "delta"),
        (["--data.pathh", "x"], "pathh"),
    ],
)
def test_a_mistyped_option_is_named(recipe, words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--config", recipe, *words])
    assert stopped.value.code == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said.splitlines()) < 12  # no list of all options before it


def test_a_spent_budget_ends_with_code_one(recipe, capsys):
    words = ["fit", "--config", recipe, "--privacy.epsilon", "0.0001"]
    assert main(words) == 1
    assert "BudgetExceededError" in capsys.readouterr().err


def test_an_option_shows_its_help(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "--privacy.noise_multiplier" in shown
    assert "--compare_without_privacy" in shown
