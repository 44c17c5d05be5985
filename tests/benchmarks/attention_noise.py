"""What noise in attention costs on a GPU: kernels alone, and whole steps of a 4-bit Llama-7B.

    python -m tests.benchmarks.attention_noise --output attention_noise.jsonl

Kernels: forward and backward of one layer's attention, causal, 32 heads of 128, bfloat16. Steps: a
private fit with LoRA of rank 16 on a model of exactly Llama-2-7B's shape with random weights in
NF4, texts of 2,048 tokens, activations recomputed. The ways take turns, the one without noise first
and last; each row is written as it is measured. The last rows are ratios to the mean of those two.
On the CPU everything is tiny, and shows only that it runs.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import statistics
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

from lightning_privacy import AttentionNoise, DifferentialPrivacy
from lightning_privacy.attention.counter import noise_matrix
from lightning_privacy.attention.dense import causal, logits_bias
from lightning_privacy.attention.flex import noisy_flex
from lightning_privacy.attention.realisation import Injection
from lightning_privacy.attention.weights import weights_noise
from tests.benchmarks.gpu import (
    GIB,
    SHAPES,
    WARM,
    Case,
    Clock,
    Module,
    build,
    set_checkpointing,
    synchronize,
)

CASES = {
    "7b, 1 x 2048": Case(shape="7b", rows=1, tokens=2048, checkpointing=True),
    "7b, 4 x 2048": Case(shape="7b", rows=4, tokens=2048, checkpointing=True),
    # For a dry run on any machine.
    "tiny": Case(shape="7b-tiny", rows=2, tokens=16, checkpointing=True),
}
NOISE: dict[str, dict[str, Any] | None] = {
    "no noise": None,
    "logits": {"std": 0.1},
    "logits, dense": {"std": 0.1, "method": "dense"},
    "weights": {"std": 0.01, "where": "weights"},
    "no noise again": None,
}
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


# ---------------------------------------------------------------------- kernels
def ways(rows: int, heads: int, tokens: int, width: int) -> dict[str, Callable[..., Tensor]]:
    """Ways to compute one layer's attention."""
    scale = width**-0.5
    layer = Injection(std=0.1).layer("layer")
    on_weights = Injection(std=0.01, where="weights").layer("layer")
    # Measuring the effect belongs to a step, not to a kernel.
    layer.measured = on_weights.measured = torch.zeros(())
    mask = causal(tokens, tokens, DEVICE)

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, logits_bias(layer, q, k, mask, scale))

    def weights(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return sdpa(q, k, v) + weights_noise(on_weights, v, heads, mask, 0.01)

    found = {"sdpa": sdpa, "dense": dense, "weights": weights}
    if DEVICE.type == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask

        block = create_block_mask(
            lambda _b, _h, q, k: q >= k, None, None, tokens, tokens, device=DEVICE
        )
        for name, noise in (("flex, no noise", None), ("flex", layer)):
            found[name] = lambda q, k, v, noise=noise: noisy_flex(
                noise, q, k, v, scale=scale, block_mask=block
            )
    return found | {"sdpa again": sdpa}


def kernel_rows(shape: tuple[int, int, int, int], repeats: int) -> Any:
    """Milliseconds and memory of forward and backward."""
    for name, function in ways(*shape).items():
        gc.collect()
        dtype = torch.bfloat16 if DEVICE.type == "cuda" else torch.float32
        options: dict[str, Any] = {"device": DEVICE, "dtype": dtype}
        parts = [torch.randn(shape, **options).requires_grad_() for _ in range(3)]
        up = torch.randn(shape, **options)

        def step(function: Any = function, parts: Any = parts, up: Tensor = up) -> None:
            function(*parts).backward(up)
            for part in parts:
                part.grad = None

        row: dict[str, Any] = {"kind": "kernel", "way": name, "shape": list(shape)}
        try:
            for _ in range(3):
                step()
            before = reset_peak()
            seconds = []
            for _ in range(repeats):
                synchronize()
                start = time.perf_counter()
                step()
                synchronize()
                seconds.append(time.perf_counter() - start)
        except (RuntimeError, ValueError) as error:
            yield row | {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
            continue
        yield row | {
            "milliseconds": round(1000 * statistics.median(seconds), 3),
            "extra_mib": round((peak() - before) * 1024, 1),
        }


# ---------------------------------------------------------------------- whole steps
def step_row(name: str, way: str, model: nn.Module, steps: int) -> dict[str, Any]:
    """Mean seconds of a private step, and the peak of memory."""
    case, settings = CASES[name], NOISE[way]
    warm = WARM["private"]
    clock = Clock(warm + steps, warm)
    callbacks: list[L.Callback] = [
        DifferentialPrivacy(
            noise_multiplier=1.0,
            delta=1e-5,
            sample_rate=1.0,
            expected_batch_size=case.rows,
            print_table=False,
            independence_check=False,  # no measured step contains one
        ),
        clock,
    ]
    noise = None if settings is None else AttentionNoise(**settings, seed=1)
    if noise is not None:
        callbacks.append(noise)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        precision="bf16-mixed",
        max_steps=2000,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    ids = torch.randint(0, SHAPES[case.shape]["vocab_size"], (case.rows, case.tokens))
    gc.collect()
    reset_peak()
    trainer.fit(Module(model), DataLoader(TensorDataset(ids), batch_size=case.rows))
    seconds = [after - before for before, after in zip(clock.ends, clock.ends[1:], strict=False)]
    row: dict[str, Any] = {"kind": "step", "case": name, "way": way}
    row["seconds"] = round(statistics.mean(seconds[warm:]), 5)
    row["peak_gib"] = round(peak(), 4)
    row["all_seconds"] = [round(second, 4) for second in seconds]
    if noise is not None:
        row["perturbation"] = float(noise.perturbation)  # type: ignore[arg-type]
    return row


def reset_peak() -> float:
    """GiB that are held now; the peak counts from here."""
    if DEVICE.type != "cuda":
        return 0.0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated() / GIB


def peak() -> float:
    """GiB, at most."""
    return torch.cuda.max_memory_allocated() / GIB if DEVICE.type == "cuda" else 0.0


def ratios(rows: list[dict[str, Any]]) -> Any:
    """Each way of a whole step against the mean of the two without noise."""
    for case in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == case and "seconds" in row]
        base = [row for row in own if row["way"].startswith("no noise")]
        for row in own:
            ratio: dict[str, Any] = {"kind": "ratio", "case": case, "way": row["way"]}
            for key in ("seconds", "peak_gib"):
                mean = statistics.mean(one[key] for one in base)
                ratio[key] = round(row[key] / mean, 4) if mean else None
            yield ratio


def quality() -> dict[str, Any]:
    """The numbers themselves, on this device."""
    from lightning_privacy.attention.counter import Seed

    z = noise_matrix(Seed.of(7, DEVICE), (1, 2, 2048, 2048))[0].double()
    pairs = {"query": (z[:, 1:], z[:, :-1]), "key": (z[..., 1:], z[..., :-1]), "head": (z[0], z[1])}
    return {
        "kind": "quality",
        "mean": float(z.mean()),
        "std": float(z.std()),
        "excess_kurtosis": float((z**4).mean() / z.var() ** 2 - 3),
        **{f"neighbour_{name}": float((a * b).mean()) for name, (a, b) in pairs.items()},
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    on_gpu = DEVICE.type == "cuda"
    whole = [name for name in CASES if (name != "tiny") == on_gpu]
    parser.add_argument("--cases", nargs="*", default=whole, choices=CASES)
    parser.add_argument("--ways", nargs="*", default=["no noise", "logits", "no noise again"])
    parser.add_argument("--shapes", default="1:32:2048:128,4:32:512:128,1:32:4096:128")
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each way")
    parser.add_argument("--output", type=Path, help="a file to which a line of JSON is added a row")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    rows: list[dict[str, Any]] = []

    def show(row: dict[str, Any]) -> None:
        row = {"device": torch.cuda.get_device_name() if on_gpu else "cpu", **row}
        print(json.dumps(row), flush=True)
        rows.append(row)
        if options.output:
            with options.output.open("a") as file:
                file.write(json.dumps(row) + "\n")

    show(quality())
    for text in (options.shapes if on_gpu else "2:4:32:8").split(","):
        rows_, heads, tokens, width = map(int, text.split(":"))
        for row in kernel_rows((rows_, heads, tokens, width), 15):
            show(row)
    model, shape = nn.Module(), ""
    for name in options.cases:
        case = CASES[name]
        if case.shape != shape:
            model, shape = nn.Module(), case.shape
            gc.collect()
            model = build(case, DEVICE)
        set_checkpointing(model, case)
        for way in options.ways:
            try:
                show(step_row(name, way, model, options.steps))
            except (RuntimeError, ValueError) as error:
                failed = f"{type(error).__name__}: {str(error)[:600]}"
                show({"kind": "step", "case": name, "way": way, "failed": failed})
    for row in ratios([row for row in rows if row["kind"] == "step"]):
        show(row)


if __name__ == "__main__":
    main()
