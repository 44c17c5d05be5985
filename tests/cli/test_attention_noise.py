"""Noise in attention from a configuration file, without a line of Python."""

from __future__ import annotations

import pytest

from lightning_privacy import AttentionNoise
from lightning_privacy.cli.training import PrivacyCLI

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

OVERLAY = """
trainer:
  callbacks+:
    - class_path: lightning_privacy.AttentionNoise
      init_args: {std: 0.2, where: WHERE, schedule: cosine, layers: ["*.0.*"]}
"""


@pytest.mark.parametrize("where", ["logits", "weights"])
def test_the_callback_is_named_in_a_file(recipe, folder, where, capsys):
    (folder / "noise.yaml").write_text(OVERLAY.replace("WHERE", where))
    cli = PrivacyCLI(["fit", "--config", recipe, "--config", "noise.yaml"])
    (noise,) = [c for c in cli.trainer.callbacks if isinstance(c, AttentionNoise)]
    assert (noise.base_std, noise.where, noise.layers) == (0.2, where, ("*.0.*",))
    shown = cli.trainer.callback_metrics
    assert 0 < shown["attention_noise/std"] < 0.2
    assert shown["attention_noise/perturbation"] > 0
    assert "epsilon spent" in capsys.readouterr().out
