"""Step time and peak memory with and without privacy, and with Opacus, from one run on the CPU.

    python -m tests.benchmarks.cpu --rounds 7 --output docs/benchmarks/cpu.md

Baseline: an ordinary Trainer on the unmodified module with the same rows. Private: the same Trainer
with the `DifferentialPrivacy` callback, noise on and all guards at their defaults; every draw holds
all rows (sample rate 1), so that both see the same batches. Opacus (hooks, ghost), the plain loop
over single examples, and what else of `peers` can be imported run without a Trainer. The modes take
turns; the table shows medians over rounds of each round's median step, and the ratio to the
non-private step of the same round. What a private run does before its first step, and at steps 1,
2, 4 and 8 to compare rows and contents, is not in these steps; the column of checks has it, as the
time that it adds to 1,000 steps. Peak memory is the growth of the resident set over a few steps in
a fresh process.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
import subprocess
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

from tests.benchmarks.peers import CLIP_NORM, PEERS, SIGMA, optimizer_of

ROWS = 16
# Planned steps of a fit, of which the first few run; and how many of them are not counted.
RUN, WARM = 200, {"non-private": 2, "private": 9}
MODES = ("non-private", "private", *PEERS)


def small_llama(*, lora: bool) -> nn.Module:
    """Hidden 256, 4 layers, vocabulary 4096: 6.3 M parameters, or LoRA of rank 8 on them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=256,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            vocab_size=4096,
            max_position_embeddings=512,
            use_cache=False,
        )
    )
    if not lora:
        return model
    from peft import LoraConfig, get_peft_model

    return get_peft_model(
        model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def small_cnn() -> nn.Module:
    """Three convolutions with group normalisation and a linear head, 0.3 M parameters."""
    layers: list[nn.Module] = []
    for channels, width, stride in ((3, 32, 1), (32, 64, 2), (64, 128, 2)):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 100)]
    return nn.Sequential(*layers, *head)


def wide_cnn() -> nn.Module:
    """Five convolutions of 64 and 128 channels, 0.5 M parameters: what work there is, is theirs."""
    layers: list[nn.Module] = []
    for channels, width, stride in (
        (3, 64, 1),
        (64, 64, 1),
        (64, 64, 1),
        (64, 128, 2),
        (128, 128, 1),
    ):
        layers += [nn.Conv2d(channels, width, 3, stride, 1), nn.GroupNorm(8, width), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(2048, 100)]
    return nn.Sequential(*layers, *head)


def language_losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """``[B]``: each example's mean over its tokens."""
    (ids,) = batch
    logits = model(input_ids=ids).logits[:, :-1]
    losses = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return losses.view(len(ids), -1).mean(1)


def image_losses(model: nn.Module, batch: list[Tensor]) -> Tensor:
    """``[B]`` cross-entropies."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def images() -> list[Tensor]:
    """As those of CIFAR-100."""
    return [torch.randn(ROWS, 3, 32, 32), torch.randint(0, 100, (ROWS,))]


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], Callable[[], list[Tensor]]]]
CASES = {
    "Llama, all parameters": (
        lambda: small_llama(lora=False),
        language_losses,
        lambda: [torch.randint(0, 4096, (ROWS, 128))],
    ),
    "Llama, LoRA": (
        lambda: small_llama(lora=True),
        language_losses,
        lambda: [torch.randint(0, 4096, (ROWS, 128))],
    ),
    "CNN": (small_cnn, image_losses, images),
    "CNN, wide": (wide_cnn, image_losses, images),
}


class Module(L.LightningModule):
    """An ordinary module that knows nothing of privacy."""

    def __init__(self, model: nn.Module, losses: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """The mean over examples."""
        return self.losses(self.model, batch).mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW on what is trainable."""
        return optimizer_of(self.model)


class Clock(L.Callback):
    """Seconds between the ends of consecutive steps: fetching the batch is part of a step."""

    def __init__(self, steps: int) -> None:
        self.ends: list[float] = []
        self._steps = steps

    def on_train_start(self, *arguments: Any) -> None:
        """The checks before the first step are part of it."""
        self.ends.append(time.perf_counter())

    def on_train_batch_end(self, trainer: L.Trainer, *arguments: Any) -> None:
        """Note the time, and end the fit after the last step."""
        self.ends.append(time.perf_counter())
        trainer.should_stop = len(self.ends) > self._steps

    @property
    def seconds(self) -> list[float]:
        """One figure for each step."""
        return [after - before for before, after in zip(self.ends, self.ends[1:], strict=False)]


class Runner:
    """One mode on one case; ``round(steps)`` gives the seconds of each step."""

    def __init__(self, case: str, mode: str) -> None:
        build, self.losses, make = CASES[case]
        torch.manual_seed(0)
        self.model, self.mode, self.batch = build().train(), mode, make()
        self.module = Module(self.model, self.losses)
        self.first: list[float] = []
        self.peer = PEERS[mode](self.model, self.losses, self.batch) if mode in PEERS else None

    def round(self, steps: int) -> list[float]:
        """Run that many steps."""
        if self.peer is None:
            return self._fit(steps)
        seconds = []
        for _ in range(steps):
            start = time.perf_counter()
            self.peer.step()
            seconds.append(time.perf_counter() - start)
        return seconds

    def _fit(self, steps: int) -> list[float]:
        clock = Clock(WARM[self.mode] + steps)
        callbacks: list[L.Callback] = [clock]
        if self.mode == "private":
            from lightning_privacy import DifferentialPrivacy

            callbacks.append(
                DifferentialPrivacy(
                    noise_multiplier=SIGMA,
                    delta=1e-5,
                    clip_norm=CLIP_NORM,
                    sample_rate=1.0,
                    expected_batch_size=ROWS,
                    print_table=False,
                )
            )
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=RUN,
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(self.module, DataLoader(TensorDataset(*self.batch), batch_size=ROWS))
        self.first = clock.seconds[: WARM[self.mode]]
        return clock.seconds[WARM[self.mode] :]


def peak_growth(case: str, mode: str, steps: int) -> float:
    """MiB by which the resident set grew over its size with model and batch in place."""
    runner = Runner(case, mode)
    gc.collect()
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forget the peak so far
    runner.round(steps)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    """MiB, from Linux's account of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def measure(case: str, rounds: int, steps: int, threads: int) -> list[dict[str, Any]]:
    """One row of the table for each mode."""
    runners, failed = {}, {}
    for mode in MODES:
        try:
            runner = Runner(case, mode)
            runner.round(1)
            runners[mode] = runner
        except Exception as error:  # a rival that cannot run this case is a result, too
            if mode in ("non-private", "private"):
                raise
            failed[mode] = f"{type(error).__name__}"
    seconds: dict[str, list[float]] = {mode: [] for mode in runners}
    for _ in range(rounds):
        for mode, runner in runners.items():
            seconds[mode].append(statistics.median(runner.round(steps)))
    rows = []
    private = statistics.median(seconds["private"])
    first = runners["private"].first
    # Steps 1, 2, 4 and 8 of the nine; six more powers of two lie below 1,000.
    extra = first[0] + sum(first[n] for n in (1, 3, 7)) - 4 * private
    extra += 6 * (first[7] - private)
    for mode in MODES:
        if mode in failed:
            rows.append({"case": case, "mode": mode, "failed": failed[mode]})
            continue
        ratios = [
            base / own for base, own in zip(seconds["non-private"], seconds[mode], strict=True)
        ]
        rows.append(
            {
                "case": case,
                "mode": mode,
                "seconds": statistics.median(seconds[mode]),
                "speed": statistics.median(ratios),
                "memory": _memory_in_fresh_process(case, mode, threads),
                "extra": extra if mode == "private" else 0.0,
            }
        )
    return rows


def _memory_in_fresh_process(case: str, mode: str, threads: int) -> float:
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.cpu",
        "--memory",
        case,
        mode,
        "--threads",
        str(threads),
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(run.stdout.strip().splitlines()[-1]))


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| case | mode | step | speed against non-private | checks | peak memory growth | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    base = {row["case"]: row for row in rows if row["mode"] == "non-private"}
    for row in rows:
        if "failed" in row:
            lines.append(f"| {row['case']} | {row['mode']} | {row['failed']} | – | – | – | – |")
            continue
        ratio = row["memory"] / base[row["case"]]["memory"]
        lines.append(
            f"| {row['case']} | {row['mode']} | {1000 * row['seconds']:.0f} ms "
            f"| {row['speed']:.2f}× | {_share(row)} | {row['memory']:.0f} MiB | {ratio:.2f}× |"
        )
    return "\n".join(lines)


def _share(row: dict[str, Any]) -> str:
    return f"{row['extra'] / (10 * row['seconds']):.1f} %" if row["extra"] else "–"


def main() -> None:
    """Parse the command line, measure, print and perhaps write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=4, help="steps in a round")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--memory", nargs=2, metavar=("CASE", "MODE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if options.memory:
        print(json.dumps(peak_growth(*options.memory, steps=2)))
        return
    rows = []
    for case in options.cases:
        rows += measure(case, options.rounds, options.steps, options.threads)
        print(table(rows[-len(MODES) :]), flush=True)
    if options.output:
        options.output.write_text(_page(table(rows), options), encoding="utf-8")


def _page(rows: str, options: argparse.Namespace) -> str:
    command = (
        f"python -m tests.benchmarks.cpu --rounds {options.rounds} --steps {options.steps} "
        f"--threads {options.threads}"
    )
    import platform

    import opacus

    return (
        "# Speed and memory on the CPU\n\n"
        f"One run of `{command}`: {options.threads} threads, torch {torch.__version__}, "
        f"Python {platform.python_version()}, Opacus {opacus.__version__}. A speed of 0.80× means "
        "that a private step takes 1.25 times as long. What is measured, and how: the head of the "
        "script.\n\n"
        f"{rows}\n"
    )


if __name__ == "__main__":
    main()
