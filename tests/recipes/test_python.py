"""Every script learns privately, and only its trainer knows of privacy."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

import lightning as L
import pytest
import torch

from lightning_privacy import DifferentialPrivacy

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    # PEFT's, with newer versions of transformers.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated"),
]
FOLDER = Path(__file__).parents[2] / "recipes" / "python"
# Passes over the data, and the accuracy that they reach at least; chance is far below.
REACHED = {"digits": (6, 0.5), "lora": (2, 0.7), "own_layers": (3, 0.3)}
NEEDED = {"digits": ["sklearn"], "lora": ["transformers", "peft"], "own_layers": []}


def script(name: str):
    for package in NEEDED[name]:
        pytest.importorskip(package)
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_script_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == set(REACHED)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(REACHED))
def test_a_script_learns_privately(name, folder, capsys):
    epochs, accuracy = REACHED[name]
    module = script(name)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trainer = module.main(max_epochs=epochs)
    (privacy,) = [c for c in trainer.callbacks if isinstance(c, DifferentialPrivacy)]
    assert 0 < privacy.epsilon() <= 8.0
    assert privacy.steps == trainer.global_step
    assert trainer.callback_metrics["val_accuracy"] > accuracy
    assert "accuracy on held-out" in capsys.readouterr().out


@pytest.mark.parametrize("name", sorted(REACHED))
def test_only_the_trainer_knows_of_privacy(name):
    tree = ast.parse((FOLDER / f"{name}.py").read_text())
    knowing = [
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
        and any(isinstance(n, ast.Name) and n.id == "DifferentialPrivacy" for n in ast.walk(node))
    ]
    assert knowing == ["main"]
    classes = [value for value in vars(script(name)).values() if isinstance(value, type)]
    assert any(issubclass(value, L.LightningModule) for value in classes)
