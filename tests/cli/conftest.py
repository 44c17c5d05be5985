from __future__ import annotations

import os
from pathlib import Path

import pytest

RECIPE = """
data:
  class_path: lightning_privacy.data.TextCorpus
  init_args: {batch_size: 8, embedded: {n_users: 60, docs_per_user: 1}}
model:
  class_path: lightning_privacy.models.CausalLanguageModel
  init_args:
    {hidden_size: 16, num_layers: 1, num_heads: 2, num_key_value_heads: 1, learning_rate: 0.01}
privacy: {noise_multiplier: 1.0, delta: 1.0e-4, expected_batch_size: 12}
trainer:
  accelerator: cpu
  devices: 1
  max_epochs: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
seed_everything: 0
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory of the test's own, from which a command leaves no settings behind."""
    before = set(os.environ)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "120")
    yield tmp_path
    for name in set(os.environ) - before:
        if name.startswith("PL_"):
            del os.environ[name]


@pytest.fixture
def recipe(folder) -> str:
    """The path of a recipe that trains for five private steps."""
    path: Path = folder / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)
