"""One rank of a test on several devices; started by torchrun, or by a test itself."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from tests.callbacks.test_failures import At, kill  # noqa: E402
from tests.distributed import jobs  # noqa: E402
from tests.distributed.sharded_jobs import Blocks, whole  # noqa: E402

SIGMA = 0.7


def of_examples(folder: str, options: dict[str, Any]) -> Any:
    """The weights after a fit without noise."""
    return whole(jobs.fit(folder, 2, {}, Blocks(), **options)[1])


def of_users(folder: str, options: dict[str, Any]) -> Any:
    """The same where users are the unit."""
    settings = {"unit": "user", "group_size": 9, "users": jobs.USERS, "expected_batch_size": 6}
    return whole(jobs.fit(folder, 2, settings, Blocks(), **options)[1])


def noise(folder: str, options: dict[str, Any]) -> Any:
    """What one step adds to weights that have no gradient, in units of sigma C."""
    settings = {"noise_multiplier": SIGMA, "test_seed": None}
    batches = DataLoader(jobs.data(jobs.ROWS), batch_size=3)
    _, module, callback = jobs.fit(
        folder, 2, settings, jobs.Still(), batches, precision="32-true", max_steps=1,
        max_epochs=-1, **options,
    )  # fmt: skip
    values = torch.cat([torch.tensor(value).flatten() for value in whole(module).values()])
    return (values * callback.plan.expected_batch_size / SIGMA / callback.plan.clip_norm).tolist()


def struck(folder: str, options: dict[str, Any]) -> Any:
    """Rank 1 is killed in the third step, before anything is exchanged."""
    strike = At("on_before_optimizer_step", 2, lambda trainer: trainer.global_rank == 1 and kill())
    jobs.fit(folder, 2, {}, Blocks(), callbacks=(strike,), **options)


JOBS: dict[str, Callable[..., Any]] = {
    "examples": of_examples, "users": of_users, "noise": noise, "struck": struck,
}  # fmt: skip


def main() -> None:
    folder, job, strategy, devices, accelerator = sys.argv[1:]
    options = {"strategy": strategy, "accelerator": accelerator, "devices": int(devices)}
    found = JOBS[job](folder, options)
    if torch.distributed.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
