"""A user's script; started by a test with the name of a strategy and a folder."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from tests.callbacks.training import Regression, loader, privacy, trainer  # noqa: E402


def main() -> None:
    strategy, folder = sys.argv[1:]
    callback = privacy(test_seed=None, noise_multiplier=1.0)
    module = Regression()
    made = trainer(Path(folder), callback, strategy=strategy, devices=2)
    made.fit(module, loader())
    if made.is_global_zero:
        found = {
            "steps": callback.steps,
            "epsilon": callback.epsilon(),
            "headline": callback.summary().epsilon,
            "units": callback._tally.units,
            "bias": float(module.net[2].bias),
            "began": float(Regression().net[2].bias),
        }
        Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
