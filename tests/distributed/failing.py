"""A user's script whose fit fails on one rank, in the midst of a sharded pass."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from tests.callbacks.training import loader, privacy, trainer  # noqa: E402
from tests.distributed.sharded_jobs import Failing  # noqa: E402


def main() -> None:
    rank, way, folder = sys.argv[1:]
    callback = privacy(test_seed=None, noise_multiplier=1.0, independence_check=False)
    made = trainer(Path(folder), callback, strategy="private_fsdp", devices=2)
    made.fit(Failing(int(rank), way), loader())


if __name__ == "__main__":
    main()
