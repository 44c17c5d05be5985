"""How private training scales over several GPUs, beside ordinary training in the same run.

    python tests/benchmarks/distributed.py --output distributed.jsonl
    python tests/benchmarks/distributed.py --dry-run

For each case four trainings: without and with privacy on one device each, side by side, and then in
turn on all devices. A row says tokens per second, over all devices, and peak memory of one, both
after the first steps; the last row of a case the two scalings and their ratio. Random weights; the
same rows for both kinds; every draw holds all rows (sample rate 1), so that both see the same
batches. Private runs have the callback at its defaults, noise and guards included. Ordinary runs
use Lightning's `ddp`, and for sharded parameters the same `fully_shard` calls as the private ones.
``--unchecked`` leaves out the check before the first step, which no measured step contains.

``--dry-run`` takes tiny shapes on the CPU, with gloo: it shows that the script works, and gives no
figure.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy.models._loading import made_up_base

GIB = 2**30
WARM = 16
"""Steps that are not counted: a private run looks more closely at steps 1, 2, 4, 8 and 16."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of work: shape, rows of a device's micro-batch, tokens of a row."""

    shape: str
    rows: int
    tokens: int
    sharded: bool = False
    lora: bool = False


CASES = {
    "lora": Case(shape="7b", rows=16, tokens=512, lora=True),
    "full-1b": Case(shape="1b", rows=8, tokens=1024),
    "lora-sharded": Case(shape="7b", rows=16, tokens=512, lora=True, sharded=True),
    "full-7b-sharded": Case(shape="7b", rows=4, tokens=512, sharded=True),
}
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22,
           "num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 32000},
    "tiny": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
             "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 50},
}  # fmt: skip


class Llama(L.LightningModule):
    """A Llama with random weights, and each row's own mean loss."""

    def __init__(self, case: Case, dry: bool) -> None:
        super().__init__()
        self.case, self.dry = case, dry

    def configure_model(self) -> None:
        if hasattr(self, "model"):
            return
        device = self.trainer.strategy.root_device
        self.model = build(self.case, device, self.dry)
        if self.case.shape == "7b":
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        private = type(self.trainer.strategy).__name__.startswith("Private")
        if self.case.sharded and not private:
            from lightning_privacy.strategies.sharding import shard

            shard(self, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        (ids,) = batch
        logits = self.model(input_ids=ids).logits[:, :-1].float()
        losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        return losses.view(len(ids), -1).mean(1).mean()

    def configure_optimizers(self) -> Any:
        trainable = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trainable, lr=1e-4, fused=self.device.type == "cuda")


class Clock(L.Callback):
    """Seconds and peak memory of the steps after the first ones.

    The device's queue is emptied before them and after them, not in between.
    """

    def __init__(self, steps: int) -> None:
        self.steps, self.seconds, self.peak = steps, 0.0, 0.0
        self._first = min(WARM, steps - 1)
        self._began = 0.0

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        cuda = torch.cuda.is_available()
        if trainer.global_step == self._first:
            if cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
            self._began = time.perf_counter()
        elif trainer.global_step == self.steps:
            if cuda:
                torch.cuda.synchronize()
                self.peak = torch.cuda.max_memory_allocated() / GIB
            self.seconds = (time.perf_counter() - self._began) / (self.steps - self._first)


def build(case: Case, device: torch.device, dry: bool) -> nn.Module:
    """A Llama, made where it is used; or LoRA of rank 16 on the linear layers of one in NF4."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(use_cache=False, **SHAPES["tiny" if dry else case.shape])
    torch.manual_seed(0)
    if not case.lora:
        with device:
            return LlamaForCausalLM(config)
    from peft import LoraConfig, get_peft_model

    base = made_up_base(
        config, task="causal_lm", quantization="nf4",
        dtype=torch.float32 if dry else torch.bfloat16, device=device,
    )  # fmt: skip
    base.requires_grad_(False)
    model = get_peft_model(base, LoraConfig(r=2 if dry else 16, target_modules="all-linear"))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def train(name: str, private: bool, devices: int, arguments: argparse.Namespace) -> None:
    """One training, in a process of its own for each device; rank 0 prints its row."""
    warnings.simplefilter("ignore")
    case, dry, steps = CASES[name], arguments.dry_run, arguments.steps
    rows, tokens = (2, 8) if dry else (case.rows, case.tokens)
    vocabulary = SHAPES["tiny" if dry else case.shape]["vocab_size"]
    # An ordinary sampler gives each device its own part of these; a draw holds all of them.
    data = TensorDataset(torch.randint(0, vocabulary, (rows * devices, tokens)))
    module = Llama(case, dry)
    clock = Clock(steps)
    callbacks: list[L.Callback] = [clock]
    if private:
        from lightning_privacy import DifferentialPrivacy

        callbacks += [
            DifferentialPrivacy(
                noise_multiplier=1.0, delta=1e-6, sample_rate=1.0, dataset_size=rows * devices,
                print_table=False, journal=False,
                independence_check=not (dry or arguments.unchecked),
            )
        ]  # fmt: skip
    trainer = L.Trainer(
        strategy=strategy_of(case, private, devices), devices=devices,
        accelerator="cpu" if dry else "gpu", max_steps=steps, max_epochs=-1,
        precision="32-true" if dry else "bf16-mixed", callbacks=callbacks, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, DataLoader(data, batch_size=rows))
    if trainer.is_global_zero:
        row = {
            "case": name,
            "private": private,
            "devices": devices,
            "tokens_per_second": rows * devices * tokens / clock.seconds,
            "peak_gib": clock.peak,
        }
        print(json.dumps(row), flush=True)


def strategy_of(case: Case, private: bool, devices: int) -> Any:
    if devices == 1 and not case.sharded:
        return "private" if private else "auto"
    if case.sharded:
        from lightning.pytorch.strategies import ModelParallelStrategy

        ordinary = ModelParallelStrategy(data_parallel_size=devices, tensor_parallel_size=1)
        return "private_fsdp" if private else ordinary
    return "private_ddp" if private else "ddp"


def started(
    name: str, private: bool, devices: int, arguments: argparse.Namespace, device: int | None = None
) -> dict:
    """The row of one training, which torchrun starts; perhaps on one certain device."""
    words = ["--one", name, str(int(private)), str(devices), "--steps", str(arguments.steps)]
    if arguments.dry_run:
        words.append("--dry-run")
    if arguments.unchecked:
        words.append("--unchecked")
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    if device is not None:
        environment["CUDA_VISIBLE_DEVICES"] = str(device)
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={devices}",
         "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", __file__, *words],
        stdout=subprocess.PIPE, text=True, check=True, env=environment,
    )  # fmt: skip
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


def compare(name: str, arguments: argparse.Namespace) -> Iterator[dict]:
    """All trainings of a case, each row as soon as it is there, and what they say together."""
    every = arguments.devices
    # Sharded parameters of this size do not fit into one device.
    single = arguments.dry_run or not CASES[name].sharded
    rows = []
    if single:
        with ThreadPoolExecutor(2) as pool:
            waiting = [pool.submit(started, name, bool(n), 1, arguments, n) for n in (0, 1)]
            rows = [future.result() for future in waiting]
            yield from rows
    for private in (False, True):
        rows.append(started(name, private, every, arguments))
        yield rows[-1]
    speed = {(row["private"], row["devices"]): row["tokens_per_second"] for row in rows}
    summary: dict[str, Any] = {"case": name, "devices": every}
    summary["private_over_ordinary"] = speed[True, every] / speed[False, every]
    if single:
        ordinary, private = (speed[kind, every] / speed[kind, 1] for kind in (False, True))
        summary |= {"ordinary_scaling": ordinary, "private_scaling": private}
        summary["ratio_of_scalings"] = private / ordinary
    yield summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--steps", type=int, default=28)
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("--unchecked", action="store_true")
    parser.add_argument("--one", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, private, devices = arguments.one
        train(name, bool(int(private)), int(devices), arguments)
        return
    for name in arguments.cases:
        for row in compare(name, arguments):
            print(json.dumps(row), flush=True)
            if arguments.output is not None:
                with arguments.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
