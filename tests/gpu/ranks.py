"""One rank of a test on several GPUs; started by torchrun."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from tests.distributed import jobs  # noqa: E402
from tests.distributed.sharded_jobs import Blocks, whole  # noqa: E402


def main() -> None:
    folder, strategy, sigma, devices, accelerator = sys.argv[1:]
    options = {"strategy": strategy, "accelerator": accelerator, "devices": int(devices)}
    if float(sigma):
        settings = {"noise_multiplier": float(sigma), "test_seed": None}
        batches = DataLoader(jobs.data(jobs.ROWS), batch_size=3)
        module = jobs.Still()
        _, module, callback = jobs.fit(
            folder, 2, settings, module, batches, precision="32-true", max_steps=1, max_epochs=-1,
            **options,
        )  # fmt: skip
        values = torch.cat([torch.tensor(value).flatten() for value in whole(module).values()])
        unit = float(sigma) * callback.plan.clip_norm / callback.plan.expected_batch_size
        found = (values / unit).tolist()
    else:
        _, module, _ = jobs.fit(folder, 2, {}, Blocks(), **options)
        found = whole(module)
    if torch.distributed.get_rank() == 0:
        Path(folder, "found.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
