"""What the ranks do in the tests of sharded parameters."""

from __future__ import annotations

import functools
import gc
import os
import signal
from datetime import timedelta
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy.distributed import watch, world
from lightning_privacy.noise import GaussianNoise, GridNoise
from lightning_privacy.sharded_step import ShardedStep
from tests.callbacks.training import FEATURES, Regression
from tests.distributed import jobs

SHARDED = {"strategy": "private_fsdp"}


def options_for(ranks: int) -> dict[str, Any]:
    return SHARDED if ranks > 1 else {}


def whole(module: nn.Module) -> jobs.Weights:
    found = {}
    for name, parameter in module.named_parameters():
        value = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        found[name] = value.detach().tolist()
    return found


def shared(module: nn.Module) -> list[str]:
    return [name for name, p in module.named_parameters() if isinstance(p, DTensor)]


class Blocks(Regression):
    """Blocks in a list, one computed again in the backward, and a frozen first layer."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(4)
            base, head = nn.Linear(FEATURES, 7), nn.Linear(7, 1)
            blocks = nn.ModuleList(
                nn.Sequential(nn.Linear(7, 7), nn.LayerNorm(7)) for _ in range(3)
            )
        base.requires_grad_(False)
        self.net = Stack(base, blocks, head)


SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}


class Failing(Blocks):
    """Two blocks are gathered; then one rank fails, before the third or in the backward."""

    def __init__(self, rank: int, way: str) -> None:
        super().__init__()
        self.rank, self.way = rank, way
        self.net.blocks[1].register_forward_hook(self.after_two_blocks)

    def after_two_blocks(self, _block: Any, _inputs: Any, output: Tensor) -> None:
        if self.way == "stop" and self.global_rank != self.rank and self.global_step:
            # Not before: where much runs, a rank that begins may be silent for as long.
            watch._SILENCE = timedelta(seconds=3)
        if self.global_rank != self.rank or self.global_step != 2:
            return
        if self.way == "backward":
            output.register_hook(lambda _gradient: self.fail())
        else:
            self.fail()

    def fail(self) -> None:
        if self.way in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.way])
        raise OSError("no such record")


class Stack(nn.Module):
    def __init__(self, base: nn.Module, blocks: nn.ModuleList, head: nn.Module) -> None:
        super().__init__()
        self.base, self.blocks, self.head = base, blocks, head

    def forward(self, x: Tensor) -> Tensor:
        x = self.base(x)
        for number, block in enumerate(self.blocks):
            run = functools.partial(checkpoint, block, use_reentrant=False) if number else block
            x = x + torch.tanh(run(x))
        return self.head(x)


MODULES = {"small": Regression, "blocks": Blocks, "manual": jobs.Manual}


def weights_after(directory: str, ranks: int, name: str, settings: dict) -> jobs.Weights:
    _, module, _ = jobs.fit(directory, ranks, settings, MODULES[name](), **options_for(ranks))
    return whole(module)


def twice(directory: str, ranks: int) -> jobs.Weights:
    """A module that is sharded already is trained on, and validated by itself."""
    module = Blocks()
    for part in ("first", "second"):
        made, _, _ = jobs.fit(f"{directory}/{part}", ranks, {}, module, **options_for(ranks))
        made.validate(module, jobs.loader(), verbose=False)
    return whole(module)


def in_mixed_precision(directory: str, ranks: int) -> jobs.Weights:
    """Casts small parameters, of which those of other blocks are not there."""
    options = {"precision": "bf16-mixed", "batches": DataLoader(jobs.data(jobs.ROWS), batch_size=3)}
    return whole(jobs.fit(directory, ranks, {}, Blocks(), **options, **options_for(ranks))[1])


def of_users(directory: str, ranks: int, settings: dict) -> jobs.Weights:
    settings = {
        "unit": "user", "group_size": 9, "users": jobs.USERS, "expected_batch_size": 6, **settings,
    }  # fmt: skip
    return weights_after(directory, ranks, "blocks", settings)


def raw_sums(directory: str) -> dict[str, Any]:
    """How FSDP itself would have added up gradients; and what is sharded between steps."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param_group

    sums: list[int] = []
    ordinary = _fsdp_param_group.foreach_reduce
    _fsdp_param_group.foreach_reduce = lambda *_, **__: sums.append(1)
    try:
        _, module, _ = jobs.fit(directory, 2, {}, Blocks(), **SHARDED)
    finally:
        _fsdp_param_group.foreach_reduce = ordinary
    grads = {type(p.grad).__name__ for p in module.parameters() if p.requires_grad}
    return {"raw": len(sums), "sharded": shared(module), "types": sorted(grads)}


def noise(directory: str, steps: int, settings: dict) -> dict[str, Any]:
    handed: list[Tensor] = []
    ordinary = ShardedStep._hand_over

    def spy(self: Any, names: tuple, total: Tensor) -> None:
        handed.append(total.clone())
        ordinary(self, names, total)

    ShardedStep._hand_over = spy
    try:
        return {**_noise(directory, steps, settings), "on_grid": on_grid(handed)}
    finally:
        ShardedStep._hand_over = ordinary


def on_grid(handed: list[Tensor]) -> bool:
    """Whether shards lie on the grid of the whole release, as float32 shows it."""
    width = jobs.Still()
    size = sum(p.numel() for p in width.parameters())
    grid = GridNoise(GaussianNoise(bytes(32)), noise_multiplier=0.7, dimension=size)
    step = grid.step(0.7 / 8)
    return all(torch.equal((part / step).round() * step, part) for part in handed)


def _noise(directory: str, steps: int, settings: dict) -> dict[str, Any]:
    loud = {"noise_multiplier": 0.7, "expected_batch_size": 8, "test_seed": None, **settings}
    module = jobs.Still()
    _, module, callback = jobs.fit(
        directory, 2, loud, module, precision="32-true", max_steps=steps, max_epochs=-1,
        batches=DataLoader(jobs.data(jobs.ROWS), batch_size=3), log_every_n_steps=1, **SHARDED,
    )  # fmt: skip
    unit = 0.7 * callback.plan.clip_norm / 8
    parts = [p.to_local().flatten() for p in module.parameters()]
    everywhere = [p.full_tensor().flatten() for p in module.parameters()]
    return {
        "share": (torch.cat(parts).detach() / unit).tolist(),
        "world": (torch.cat(everywhere).detach() / unit).tolist(),
        "ratio": callback._tally.latest["noise_to_signal"],
    }


class Adam(Blocks):
    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.1)


class Saving(pl.Callback):
    """Chooses between a folder and a file; an instance of the strategy would refuse float64."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        trainer.strategy._save_distributed_checkpoint = self.folder


def resumed(
    directory: str,
    ranks: int,
    path: str | None,
    steps: int,
    settings: dict,
    folder: bool,
    sharded: bool = False,
) -> dict[str, Any]:
    saving = ModelCheckpoint(
        directory, filename="{step}", every_n_train_steps=2, save_top_k=-1, save_last=True
    )
    strategy = {**SHARDED, "devices": 1} if sharded else options_for(ranks)
    _, module, callback = jobs.fit(
        directory, ranks, settings, Adam(), callbacks=(saving, Saving(folder)),
        max_steps=steps, max_epochs=-1, ckpt_path=path, **strategy,
    )  # fmt: skip
    return {"weights": whole(module), "steps": callback.steps, "run": callback._state.run}


class Own(Regression):
    """A parameter of the LightningModule itself."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1))


class TwoDimensions(Blocks):
    """Replicas of shards."""

    def configure_model(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh

        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        fully_shard(self.net, mesh=mesh)


class ByItself(Blocks):
    """A module that shards itself, in its own way."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self.device_mesh["data_parallel"])


class Partly(Blocks):
    """A module that shards its blocks and leaves its head whole."""

    def configure_model(self) -> None:
        for block in self.net.blocks:
            fully_shard(block, mesh=self.device_mesh["data_parallel"])


class Gathering(Blocks):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        mean = self.all_gather(self.net(batch[0]).mean()).mean()
        return super().training_step(batch, batch_idx) + mean


class GatheringAsParametersAre(Blocks):
    """By the operation by which FSDP gathers parameters; alike rows on all ranks change nothing."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        own = self.net(batch[0]).detach().sum(0)
        every = own.new_empty(2 * len(own))
        dist.all_gather_into_tensor(every, own)
        return super().training_step(batch, batch_idx) * (1 + (every - own).abs().sum())


REFUSED = {
    "own": Own,
    "two": TwoDimensions,
    "partly": Partly,
    "gathering": Gathering,
    "like parameters": GatheringAsParametersAre,
    "blocks": Blocks,
}


def refusal(directory: str, name: str, settings: dict) -> str:
    try:
        jobs.fit(directory, 2, settings, REFUSED[name](), **SHARDED)
    except Exception as error:  # noqa: BLE001 - this is what the test looks at
        return str(error)
    return ""


def by_itself(directory: str, strategy: str) -> dict[str, Any]:
    from lightning.pytorch.strategies import ModelParallelStrategy

    chosen: Any = strategy
    if strategy == "model_parallel":
        chosen = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    precision = "64-true" if chosen is strategy else "32-true"
    rows = jobs.data(jobs.ROWS, torch.float64).tensors
    single = DataLoader(TensorDataset(*(part.float() for part in rows)), batch_size=3)
    batches = None if chosen is strategy else single
    made, module, callback = jobs.fit(
        directory, 2, {}, ByItself(), batches, strategy=chosen, precision=precision
    )
    return {"weights": whole(module), "name": type(made.strategy).__name__, "steps": callback.steps}


def failing(directory: str) -> str:
    module = jobs.WrongOnOneRank(1, 2, "error")
    try:
        jobs.fit(directory, 2, {"independence_check": False}, module, **SHARDED)
    except Exception as error:  # noqa: BLE001
        return f"{type(error).__name__}: {error}"
    return ""


def waits_in_vain(directory: str, way: str) -> str:
    """Rank 1 fails between two blocks, its connections open, while rank 0 waits for its shard."""
    world._PATIENCE, world._GRACE = timedelta(seconds=1), timedelta(seconds=1)
    module = Failing(1, way)
    try:
        jobs.fit(directory, 2, {"independence_check": False}, module, **SHARDED)
    except Exception as error:  # noqa: BLE001 - this is what the test looks at
        return f"{type(error).__name__}: {error}"
    return ""


class Llama(pl.LightningModule):
    """A small Llama, whole or with LoRA over its frozen weights."""

    def __init__(self, lora: bool, tied: bool) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=31, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=tied,
        )  # fmt: skip
        with torch.random.fork_rng():
            torch.manual_seed(1)
            self.model = LlamaForCausalLM(config)
            if lora:
                from peft import LoraConfig, get_peft_model

                chosen = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
                self.model = get_peft_model(self.model, chosen)
        if not lora:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.config.use_cache = False

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (tokens,) = batch
        logits = self.model(input_ids=tokens).logits[:, :-1]
        losses = nn.functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
        return losses.mean(1).mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.5)


def llama(directory: str, ranks: int, lora: bool, tied: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = TensorDataset(torch.randint(0, 31, (24, 9), generator=generator))
    _, module, _ = jobs.fit(
        directory, ranks, {"expected_batch_size": 6, "clip_norm": 0.5}, Llama(lora, tied),
        DataLoader(rows, batch_size=2), precision="32-true", max_steps=3, max_epochs=-1,
        **options_for(ranks),
    )  # fmt: skip
    return {"weights": whole(module), "sharded": len(shared(module))}


class Quantised(pl.LightningModule):
    """LoRA over a base in four bits; with scales that are in eight bits themselves, or not."""

    def __init__(self, twice: bool) -> None:
        super().__init__()
        import bitsandbytes as bnb

        with torch.random.fork_rng():
            torch.manual_seed(2)
            plain = nn.Linear(64, 65)  # an odd number of rows
            base = bnb.nn.Linear4bit(
                64, 65, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=twice
            )
            base.load_state_dict(plain.state_dict())
            base.requires_grad_(False)
            self.net = nn.Sequential(base, nn.Linear(65, 4, bias=False), nn.Linear(4, 1))
        self.seen: list = []
        base.register_forward_hook(lambda layer, *_: self.seen.append(values_of(layer)))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.mse_loss(self.net(batch[0].repeat(1, 22)[:, :64]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)


def values_of(layer: Any) -> list:
    import bitsandbytes as bnb

    return bnb.functional.dequantize_4bit(layer.weight, layer.weight.quant_state).tolist()


def bytes_alive() -> int:
    """Of all tensors of type uint8 in this process: packed values and their scales."""
    found = {}
    gc.collect()
    for thing in gc.get_objects():
        if issubclass(type(thing), Tensor) and type(thing) is not DTensor:
            storage = thing.untyped_storage()
            if thing.dtype == torch.uint8 and storage.size():
                found[storage.data_ptr()] = storage.size()
    return sum(found.values())


def quantised(directory: str, ranks: int, twice: bool) -> dict[str, Any]:
    options = {"precision": "32-true", "batches": DataLoader(jobs.data(jobs.ROWS), batch_size=3)}
    module = Quantised(twice)
    if ranks == 1:
        module.to("cpu")  # this is where the weights are quantised
    jobs.fit(directory, ranks, {}, module, **options, **options_for(ranks))
    return {
        "sharded": shared(module), "values": module.seen[-1],
        "weights": {n: w for n, w in whole(module).items() if not n.startswith("net.0")},
    }  # fmt: skip


def qlora(
    directory: str, ranks: int, path: str | None, task: str, folder: bool = False
) -> dict[str, Any]:
    """The package's own Llama, with checkpointing, over a base in NF4."""
    from lightning_privacy.models import LlamaQLoRA

    before = bytes_alive()
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = LlamaQLoRA(
            checkpoint=None, dtype="float32", rank=2, learning_rate=1e-2, task=task,
            config={
                "vocab_size": 31, "hidden_size": 64, "intermediate_size": 128,
                "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            },
        )  # fmt: skip
        module.configure_model()
    shapes = {n: list(p.shape) for n, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 31, (24, 9), generator=generator)
    labels = ids if task == "causal_lm" else ids[:, 0] % 2
    mask = torch.ones_like(ids)
    rows = [
        {"input_ids": i, "labels": label, "attention_mask": m}
        for i, label, m in zip(ids, labels, mask, strict=True)
    ]
    saving = ModelCheckpoint(directory, filename="{step}", every_n_train_steps=2, save_top_k=-1)
    batches = DataLoader(rows, batch_size=2)
    made, _, callback = jobs.fit(
        directory, ranks, {"expected_batch_size": 4, "clip_norm": 0.5}, module, batches,
        (saving, Saving(folder)), precision="32-true", max_steps=4, max_epochs=-1,
        val=DataLoader(rows[:4], batch_size=2),
        ckpt_path=path, **options_for(ranks),
    )  # fmt: skip
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    return {
        "weights": {n: w for n, w in whole(module).items() if n in trained},
        "bytes": bytes_alive() - before, "whole": [n for n in shapes if n not in shared(module)],
        "loss": float(made.callback_metrics["val_loss"]), "steps": callback.steps,
    }  # fmt: skip


def with_validation(directory: str, ranks: int) -> jobs.Weights:
    options = {"val": jobs.loader(), "max_epochs": 2, "val_check_interval": 2}
    settings = {"noise_multiplier": 0.0}
    return whole(jobs.fit(directory, ranks, settings, Blocks(), **options, **options_for(ranks))[1])
