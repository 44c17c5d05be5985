"""What the ranks do in the tests of shards that have replicas."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import StrategyRegistry
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_privacy.sharded_step import ShardedStep
from lightning_privacy.strategies import PrivateFSDPStrategy
from tests.distributed import jobs
from tests.distributed import sharded_jobs as sharded


def with_replicas(replicas: int) -> dict[str, Any]:
    """By a name: Lightning refuses float64 to an instance of this strategy."""
    name = f"private_fsdp_{replicas}"
    StrategyRegistry.register(name, PrivateFSDPStrategy, override=True, replicas=replicas)
    return {"strategy": name}


def weights_after(
    directory: str, ranks: int, replicas: int, name: str, settings: dict
) -> jobs.Weights:
    module = sharded.MODULES[name]()
    _, module, _ = jobs.fit(directory, ranks, settings, module, **with_replicas(replicas))
    return sharded.whole(module)


def of_users(directory: str, ranks: int, replicas: int) -> jobs.Weights:
    settings = {"unit": "user", "group_size": 9, "users": jobs.USERS, "expected_batch_size": 6}
    return weights_after(directory, ranks, replicas, "blocks", settings)


def from_other_weights(directory: str, ranks: int, replicas: int) -> jobs.Weights:
    """Each rank has begun with weights of its own."""
    module = sharded.Blocks()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.distributed.get_rank())
    settings = {"independence_check": False}
    _, module, _ = jobs.fit(directory, ranks, settings, module, **with_replicas(replicas))
    return sharded.whole(module)


def noise(directory: str, ranks: int, replicas: int, settings: dict) -> dict[str, Any]:
    """Of a release without signal: what this rank adds, and what all have, in σC of the mean."""
    own: list[Tensor] = []
    ordinary = ShardedStep._noised

    def spy(self: Any, names: tuple, **named: Any) -> Tensor:
        own.append(ordinary(self, names, **named).detach().clone().flatten())
        return own[-1].clone()

    loud = {"noise_multiplier": 0.7, "expected_batch_size": 8, "test_seed": None, **settings}
    ShardedStep._noised = spy
    try:
        _, module, callback = jobs.fit(
            directory, ranks, loud, jobs.Still(), precision="32-true", max_steps=1, max_epochs=-1,
            batches=DataLoader(jobs.data(jobs.ROWS), batch_size=3), log_every_n_steps=1,
            **with_replicas(replicas),
        )  # fmt: skip
    finally:
        ShardedStep._noised = ordinary
    unit = 0.7 * callback.plan.clip_norm / 8
    everywhere = [p.full_tensor().flatten() for p in module.parameters()]
    return {
        "own": (torch.cat(own) / unit).tolist(),
        "world": (torch.cat(everywhere).detach() / unit).tolist(),
        "ratio": callback._tally.latest["noise_to_signal"],
    }


def resumed(
    directory: str, ranks: int, replicas: int, path: str | None, steps: int, folder: bool
) -> dict[str, Any]:
    saving = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    _, module, callback = jobs.fit(
        directory, ranks, {}, sharded.Adam(), callbacks=(saving, sharded.Saving(folder)),
        max_steps=steps, max_epochs=-1, ckpt_path=path, **with_replicas(replicas),
    )  # fmt: skip
    return {"weights": sharded.whole(module), "steps": callback.steps}


def refusal(directory: str, ranks: int, replicas: int) -> str:
    try:
        jobs.fit(directory, ranks, {}, sharded.Blocks(), **with_replicas(replicas))
    except Exception as error:  # noqa: BLE001 - this is what the test looks at
        return f"{type(error).__name__}: {error}"
    return ""
