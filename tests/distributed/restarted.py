"""A user's script that goes on from its newest checkpoint; the second process dies at first."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from lightning_privacy.callbacks import newest_checkpoint  # noqa: E402
from tests.callbacks.test_failures import At, kill  # noqa: E402
from tests.callbacks.test_resume import saving  # noqa: E402
from tests.callbacks.training import Regression, loader, privacy, trainer  # noqa: E402

STEPS = 10


def main() -> None:
    folder = Path(sys.argv[1])
    first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    dies = first and os.environ["RANK"] == "1"
    callbacks = [saving(folder, 4), *([At("on_before_optimizer_step", 6, kill)] if dies else [])]
    callback = privacy(test_seed=None, noise_multiplier=1.0, expected_batch_size=8)
    options = {"max_steps": STEPS, "max_epochs": -1, "strategy": "private_ddp", "devices": 2}
    made = trainer(folder, callback, *callbacks, **options)
    made.fit(Regression(), loader(), ckpt_path=newest_checkpoint(folder))
    if made.is_global_zero:
        path = Path(str(made.ckpt_path)).name
        found = {"first": first, "from": path, "step": made.global_step, "charged": callback.steps}
        Path(folder, "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
