"""Tokens per second and peak memory on a GPU, with and without privacy, and with Opacus.

    python tests/benchmarks/gpu.py --cases lora-checkpointing lora --output gpu.jsonl

Random weights of exactly Llama-2-7B's shape (4-bit NF4 with double quantisation, LoRA of rank 16 on
all linear layers) or of a 1.1-billion-parameter Llama (all parameters), bfloat16 autocast, fused
AdamW. Baseline: an ordinary Trainer on the unmodified module with the same rows. Private: the same
Trainer with the `DifferentialPrivacy` callback, noise on and all guards at their defaults; every
draw holds all rows (sample rate 1), so that both see the same batches. Opacus runs without a
Trainer. The modes take turns, non-private first and last; each row is written as it is measured, so
a run that breaks off keeps its figures. ``--logical 512`` measures Poisson draws of that expected
size instead, cut into micro-batches, and counts the real rows only. ``--unchecked`` leaves out the
check of independence, which no measured step contains.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import logging
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_privacy.models._loading import made_up_base

GIB = 2**30
# Planned steps of a run, of which the first few are measured.
RUN = 2000
# Steps that are not counted. A private run compares contents and rows at steps 1, 2, 4, 8, …; what
# that costs shows in the seconds of each step, which are written out.
WARM = {"non-private": 3, "private": 9, "opacus hooks": 3, "opacus ghost": 3}
# The same for draws of many micro-batches, which take long: steps 5, 6 and 7 may be measured.
WARM_LOGICAL = 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """One kind of work: the model's shape, and rows of one micro-batch."""

    shape: str
    rows: int
    tokens: int
    checkpointing: bool = False
    # GiB that the process may use, while it builds the model, too.
    cap: float | None = None

    @property
    def lora(self) -> bool:
        return self.shape.startswith("7b")


CASES = {
    "lora-checkpointing": Case(shape="7b", rows=16, tokens=512, checkpointing=True),
    "lora": Case(shape="7b", rows=8, tokens=512),
    "lora-small": Case(shape="7b", rows=4, tokens=512, checkpointing=True, cap=8),
    "lora-12gb": Case(shape="7b", rows=12, tokens=512, checkpointing=True, cap=12),
    "lora-24gb": Case(shape="7b", rows=4, tokens=512, cap=24),
    "lora-long": Case(shape="7b", rows=1, tokens=4096, checkpointing=True, cap=8),
    "full": Case(shape="1.1b", rows=8, tokens=1024),
    "full-short": Case(shape="1.1b", rows=16, tokens=512),
    "full-checkpointing": Case(shape="1.1b", rows=8, tokens=1024, checkpointing=True),
    # For a dry run on any machine.
    "tiny-lora": Case(shape="7b-tiny", rows=4, tokens=16, checkpointing=True),
    "tiny-full": Case(shape="1.1b-tiny", rows=4, tokens=16),
}
SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
    "1.1b": {
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
    },
}
for _name in ("7b", "1.1b"):
    SHAPES[f"{_name}-tiny"] = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
    }
MODES = ("non-private", "private", "opacus hooks", "opacus ghost")


def build(case: Case, device: torch.device) -> nn.Module:
    """A model with random weights, in training mode."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **SHAPES[case.shape],
        max_position_embeddings=4096,
        attn_implementation="sdpa",
        use_cache=False,
    )
    torch.manual_seed(0)
    if case.lora:
        # One layer at a time, so that the unquantised model is in no memory.
        base = made_up_base(
            config, task="causal_lm", quantization="nf4", dtype=torch.bfloat16, device=device
        )
        return with_adapters(base).train()
    with torch.device(device):
        return LlamaForCausalLM(config).train()


def set_checkpointing(model: nn.Module, case: Case) -> None:
    """Recompute activations in the backward, or do not."""
    base = model.base_model.model if case.lora else model
    if case.checkpointing:
        base.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        base.gradient_checkpointing_disable()


def with_adapters(model: nn.Module) -> nn.Module:
    """Frozen, with LoRA of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model

    model.requires_grad_(False)
    model.enable_input_require_grads()
    adapted = get_peft_model(
        model, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in adapted.named_parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return adapted


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """``[B]``: each example's mean over its tokens."""
    logits = model(input_ids=ids).logits
    targets = F.pad(ids[:, 1:], (0, 1), value=-100)
    found = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
    return found.view(targets.shape).sum(1) / (ids.shape[1] - 1)


class Module(L.LightningModule):
    """An ordinary module that knows nothing of privacy."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean over examples."""
        return losses(self.model, batch[0]).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trainable."""
        return adamw(self.model)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """Fused where there is a GPU."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=1e-5, fused=trainable[0].is_cuda)


class Clock(L.Callback):
    """When each optimizer step ended; ends the fit after ``steps``.

    The GPU's queue is emptied after the first step, after ``warm`` steps and at the end alone: in
    between it works while Lightning prepares the next step, as in any training.
    """

    def __init__(self, steps: int, warm: int = 1) -> None:
        self.ends: list[float] = []
        self.peak = 0.0
        self._steps, self._last = 0, steps
        self._emptied = {1, warm, steps}

    def on_train_start(self, *arguments: Any) -> None:
        """The checks before the first step are not over yet."""
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Note the time, once for each optimizer step."""
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            if self._steps in self._emptied:
                synchronize()
            self.ends.append(time.perf_counter())
            if self._steps == 1 and torch.cuda.is_available():
                self.peak = torch.cuda.max_memory_allocated() / GIB
                torch.cuda.reset_peak_memory_stats()
            trainer.should_stop = self._steps >= self._last


def set_cap(gib: float | None) -> None:
    """Let the process use so much of the GPU's memory."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(gib * GIB / total if gib else 1.0)


def synchronize() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def fit(
    case: Case, model: nn.Module, steps: int, *, private: bool, options: argparse.Namespace
) -> Any:
    """Seconds and rows of each step, and the peak until the end of the first."""
    rows, logical = case.rows, options.logical
    clock = Clock(steps, warm("private" if private else "non-private", logical))
    callbacks: list[L.Callback] = [clock]
    whole = logical or rows
    count = rows if logical is None else 20 * logical
    if private:
        from lightning_privacy import DifferentialPrivacy

        callbacks.append(
            DifferentialPrivacy(
                noise_multiplier=1.0,
                delta=1e-5,
                clip_norm=1.0,
                sample_rate=whole / count,
                expected_batch_size=whole,
                print_table=False,
                independence_check=not options.unchecked,
            )
        )
    drawn = Rows()
    callbacks.append(drawn)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=RUN,
        accumulate_grad_batches=1 if private else whole // rows,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(0, SHAPES[case.shape]["vocab_size"], (count, case.tokens))
    trainer.fit(Module(model), DataLoader(TensorDataset(ids), batch_size=rows))
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    return seconds, drawn.by_step, clock.peak


class Rows(L.Callback):
    """How many real rows each optimizer step has used."""

    def __init__(self) -> None:
        self.by_step: list[int] = []
        self._waiting, self._steps = 0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, index: int
    ) -> None:
        """Count the batch's rows, or those of all micro-batches of the draw."""
        run = getattr(trainer.strategy, "private_run", None)
        own = len(batch[0]) if run is None else sum(m.drawn for m in run.loader.current)
        self._waiting += own
        if trainer.global_step > self._steps:
            self._steps = trainer.global_step
            self.by_step.append(self._waiting)
            self._waiting = 0


def opacus(case: Case, model: nn.Module, steps: int, *, ghost: bool) -> Any:
    """The same for Opacus, in a plain loop."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping

    # A fit leaves the model in the processor's memory.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    options = {"noise_multiplier": 1.0, "max_grad_norm": 1.0, "expected_batch_size": case.rows}
    if ghost:
        wrapped = GradSampleModuleFastGradientClipping(
            model, max_grad_norm=1.0, use_ghost_clipping=True, strict=False
        )
        optimizer = DPOptimizerFastGradientClipping(adamw(model), **options)
        criterion = DPLossFastGradientClipping(wrapped, optimizer, _Given(), loss_reduction="mean")
    else:
        wrapped = GradSampleModule(model, strict=False)
        optimizer = DPOptimizer(adamw(model), **options)
    seconds = []
    try:
        for _ in range(steps):
            ids = torch.randint(0, SHAPES[case.shape]["vocab_size"], (case.rows, case.tokens))
            synchronize()
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                own = losses(wrapped, ids.to(device))
            (criterion(own, own) if ghost else own.mean()).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize()
            seconds.append(time.perf_counter() - start)
    finally:
        wrapped.to_standard_module()
    return seconds, [case.rows] * steps, 0.0


class _Given(nn.Module):
    """A criterion for losses that the model computed itself."""

    reduction = "mean"

    def forward(self, losses: Tensor, _: Tensor) -> Tensor:
        return losses if self.reduction == "none" else losses.mean()


RUNS: dict[str, Callable[..., Any]] = {
    "non-private": lambda case, model, steps, options: fit(
        case, model, steps, private=False, options=options
    ),
    "private": lambda case, model, steps, options: fit(
        case, model, steps, private=True, options=options
    ),
    "opacus hooks": lambda case, model, steps, _: opacus(case, model, steps, ghost=False),
    "opacus ghost": lambda case, model, steps, _: opacus(case, model, steps, ghost=True),
}


def warm(mode: str, logical: int | None) -> int:
    """How many steps are not counted."""
    return WARM[mode] if logical is None else WARM_LOGICAL


def measure(name: str, mode: str, model: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    """One row of the table; what a rival cannot run is a result, too."""
    case, logical = CASES[name], options.logical
    first = warm(mode, logical)
    row: dict[str, Any] = {"case": name, "mode": mode, "logical": logical or case.rows}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        seconds, rows, first_peak = RUNS[mode](case, model, first + options.steps, options)
    except Exception as error:
        if mode in ("non-private", "private"):
            raise
        return row | {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
    row["seconds"] = [round(second, 4) for second in seconds]
    counted = slice(first, None)
    # The mean, as the GPU is not waited for after each step.
    row["tokens_per_second"] = sum(rows[counted]) / sum(seconds[counted]) * case.tokens
    if torch.cuda.is_available():
        row["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
        row["peak_first_gib"] = max(first_peak, row["peak_gib"])
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with ratios to the mean of the non-private rows of the same case."""
    lines = [
        "| case | logical batch | mode | tokens/s | ratio | peak GiB | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        same = [r for r in rows if (r["case"], r["logical"]) == (row["case"], row["logical"])]
        base = [r for r in same if r["mode"] == "non-private"]
        head = f"| {row['case']} | {row['logical']} | {row['mode']} |"
        if "failed" in row:
            lines.append(f"{head} {row['failed'].split(':')[0]} | – | – | – |")
            continue
        cells = f" {row['tokens_per_second']:,.0f} | {_ratio(row, base, 'tokens_per_second')} |"
        peak = f"{row['peak_gib']:.2f}" if "peak_gib" in row else "–"
        lines.append(f"{head}{cells} {peak} | {_ratio(row, base, 'peak_gib')} |")
    return "\n".join(lines)


def _ratio(row: dict[str, Any], base: list[dict[str, Any]], key: str) -> str:
    if not base or key not in row:
        return "–"
    return f"{row[key] / statistics.mean(other[key] for other in base):.3f}×"


def main() -> None:
    """Parse the command line, measure, print and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["tiny-lora", "tiny-full"], choices=CASES)
    parser.add_argument("--modes", nargs="*", default=list(MODES), choices=MODES)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each mode")
    parser.add_argument("--logical", type=int, help="expected size of Poisson draws")
    parser.add_argument("--unchecked", action="store_true", help="no check of independence")
    parser.add_argument("--output", type=Path, help="a file to which a line of JSON is added a row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[dict[str, Any]] = []
    model, shape = nn.Module(), ""
    for name in options.cases:
        case = CASES[name]
        set_cap(case.cap)
        if case.shape != shape:
            model, shape = nn.Module(), case.shape
            gc.collect()
            model = build(case, device)
        set_checkpointing(model, case)
        again = [mode for mode in options.modes if mode == "non-private"]
        for mode in (*options.modes, *again):
            row = measure(name, mode, model, options)
            if device.type == "cuda":
                row["device"] = torch.cuda.get_device_name()
            rows.append(row)
            print(json.dumps(row), flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
            model.zero_grad(set_to_none=True)
            gc.collect()
    print(table(rows))


if __name__ == "__main__":
    sys.exit(main())
