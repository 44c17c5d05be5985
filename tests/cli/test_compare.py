"""`compare` and `ablate`: each row changes what it says, and a finished model is kept."""

from __future__ import annotations

import csv
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from filelock import FileLock

from lightning_privacy.cli import main
from lightning_privacy.cli.compare import planned
from lightning_privacy.cli.experiment import outcome_of
from lightning_privacy.cli.training import read_config
from lightning_privacy.cli.variants import ablated
from lightning_privacy.reports import plots

pytest.importorskip("transformers")
pytest.importorskip("librosa")

ROOT = Path(__file__).parents[2]
QUICK = ["--config", str(ROOT / "recipes" / "multimodal" / "quick.yaml")]
SMALL = [
    *QUICK,
    "--data.corpus.n_users=16",
    "--data.corpus.test_examples=20",
    "--data.batch_size=16",
    "--model.decoder.hidden_size=16",
    "--model.decoder.num_layers=1",
    "--privacy.expected_batch_size=16",
    "--trainer.max_epochs=1",
    "--trainer.check_val_every_n_epoch=1",
    "--trainer.accelerator=cpu",
]


def changed(variant) -> tuple[list[str], object, float, bool]:
    config = read_config(QUICK)
    variant.change(config)
    return (
        list(config.model.init_args.modalities),
        config.study and config.study["without"],
        config.privacy.epsilon,
        bool(config.trainer.callbacks),
    )


def test_the_three_models_and_each_modality_alone():
    words = ["--epsilons", "8", "1", "--baseline_learning_rate", "0.5", *QUICK]
    _, recipe, variants = planned("compare", words)
    assert recipe == QUICK
    everything, nothing = ["text", "image", "audio"], ["clipping", "noise"]
    assert {v.name + f" {v.epsilon}" * v.private: changed(v) for v in variants} == {
        "Llama baseline (text)": (["text"], nothing, 8.0, False),
        "Non-PrivNet": (everything, nothing, 8.0, False),
        "Non-PrivNet, image alone": (["image"], nothing, 8.0, False),
        "Non-PrivNet, audio alone": (["audio"], nothing, 8.0, False),
        "PrivacyPreserveNet 8.0": (everything, None, 8.0, True),
        "PrivacyPreserveNet 1.0": (everything, None, 1.0, True),
        "PrivacyPreserveNet, image alone 8.0": (["image"], None, 8.0, True),
        "PrivacyPreserveNet, audio alone 8.0": (["audio"], None, 8.0, True),
    }
    assert {v.learning_rate for v in variants} == {0.5, None}


def test_the_ablations_leave_out_one_mechanism_each():
    _, _, variants = planned("ablate", ["--epsilons", "3", *QUICK])
    everything = ["text", "image", "audio"]
    assert {v.name: changed(v) for v in variants} == {
        "full": (everything, None, 3.0, True),
        "without DP noise": (everything, ["noise"], 3.0, True),
        "without clipping": (everything, ["clipping"], 3.0, True),
        "without attention noise": (everything, None, 3.0, False),
    }


def test_rows_of_several_budgets_are_not_mixed_up():
    names = [variant.name for variant in ablated([8.0, 3.0])]
    assert names == [
        "full",
        "without DP noise",
        "without clipping, noise of ε = 8",
        "without attention noise",
        "full",
        "without clipping, noise of ε = 3",
        "without attention noise",
    ]


def test_another_model_is_refused(capsys):
    words = ["--config", str(ROOT / "recipes" / "quickstart.yaml")]
    assert main(["compare", *words]) == 2
    assert "CausalLanguageModel" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--seeds", "0", "1", "0"], "each seed once"),
        (["--epsilons", "8", "0"], "`epsilons`"),
        (["--epsilons", "-1"], "`epsilons`"),
        (["--study.without=[noise]", "--study.not_private=true"], "without a group `study`"),
        (["--output", __file__], "`--output`"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "ablate"])
def test_what_makes_no_table_is_refused_before_anything_is_trained(
    command, words, said, tmp_path, monkeypatch, capsys
):
    def train(*_, **__):
        raise AssertionError("trained")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lightning_privacy.cli.compare.outcome_of", train)
    assert main([command, *QUICK, *words]) == 2
    assert said in capsys.readouterr().err


def test_a_table_needs_a_recipe(capsys):
    assert main(["compare", "--seeds", "0"]) == 2
    assert "--config recipes/multimodal/quick.yaml" in capsys.readouterr().err


def test_an_interrupted_table_says_how_it_goes_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise SystemExit(1)  # what Lightning makes of Ctrl-C

    monkeypatch.setattr("lightning_privacy.cli.compare.outcome_of", interrupted)
    with pytest.raises(SystemExit):
        main(["compare", *QUICK, "--output", str(tmp_path / "out")])
    assert "the same command again" in capsys.readouterr().err


def test_a_model_that_another_process_trains_is_left_to_it(tmp_path):
    full = ablated([8.0])[0]
    with FileLock(tmp_path / "full-eps8-seed0.lock"):
        arguments = SMALL, full, 0, tmp_path, lambda done, planned: None
        assert outcome_of(*arguments, wait=False) is None
    assert not (tmp_path / "full-eps8-seed0").exists()


@pytest.mark.slow
def test_processes_share_the_models_of_a_table(tmp_path):
    words = ["ablate", *SMALL, "--seeds", "0", "--output", "out"]
    command = [sys.executable, "-m", "lightning_privacy", *words]
    environment = os.environ | {"COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    shown = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert sum(text.count("STUDY MODE") for text in shown) == 2
    tables = [text[text.index("Mean ±") :] for text in shown]
    assert tables[0] == tables[1]
    assert len(list((tmp_path / "out").glob("*/outcome.json"))) == 4
    with (tmp_path / "out" / "ablate.csv").open() as file:
        assert [row["seed"] for row in csv.DictReader(file)] == ["0"] * 4


@pytest.mark.slow
def test_ablate_makes_a_table_and_keeps_what_is_finished(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # the command sets them
        monkeypatch.setenv(name, "0")
    words = ["ablate", *SMALL, "--seeds", "0", "--output", "out"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert shown.count("STUDY MODE") == 2
    out = tmp_path / "out"
    with (out / "ablate.csv").open() as file:
        rows = {row["model"]: row for row in csv.DictReader(file)}
    private = {"full", "without attention noise"}
    assert len(rows) == 4
    for name, row in rows.items():
        assert math.isfinite(float(row["epsilon"])) == (name in private)
        assert 0 <= float(row["accuracy"]) <= 1
        assert float(row["lower"]) <= float(row["advantage"]) <= float(row["upper"])
    assert "| full | 8 |" in (out / "ablate.md").read_text()
    for name in ("ablate", "components", "indicators"):
        assert (out / f"{name}.svg").is_file()
    assert "attention_noise/perturbation" in next(out.glob("full*/log/metrics.csv")).read_text()
    before = {path: path.read_text() for path in out.glob("*/outcome.json")}
    # What a table of other settings has left there is not drawn.
    log = next(out.glob("full*/log/metrics.csv"))
    other = out / "full-eps99-seed7" / "log" / "metrics.csv"
    other.parent.mkdir(parents=True)
    other.write_text(log.read_text())
    drawn: list[Path] = []
    with monkeypatch.context() as patched:
        patched.setattr(plots, "plot_components", lambda logs, *_: drawn.extend(logs))
        assert main(words) == 0
    assert {path.resolve() for path in drawn} == {log.resolve()}
    assert "STUDY MODE" not in capsys.readouterr().out
    # Another recipe is another model: only what was trained under the same one is kept.
    stale = next(out.glob("without-clipping*/outcome.json"))
    stale.write_text(json.dumps({**json.loads(stale.read_text()), "recipe": "another"}))
    assert main(words) == 0
    assert capsys.readouterr().out.count("STUDY MODE") == 1
    kept = {path: text for path, text in before.items() if path != stale}
    assert {path: path.read_text() for path in kept} == kept
