"""What a QLoRA fine-tuning needs, counted from the configuration before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from typing import TYPE_CHECKING, Any

import torch

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from lightning_privacy.models._loading import Quantization

# Models above this many parameters are not trained on a CPU by accident.
_LARGE = 1e9
# Bytes per quantised weight, its scales included: for NF4 8 bits per 64 weights and 32 per 16,384.
_QUANTISED = {"nf4": 0.516, "int8": 1.01}
# A trained weight is kept in float32, with its gradient, the clipped sum and AdamW's two moments.
_TRAINED = 20
# Numbers that one block keeps for its backward, per position: so many times the width of the model
# and the inner width of its feed-forward part. Measured on a 7B model, without checkpointing.
_KEPT = (10.0, 5.5)
# Scores are computed in pieces, beside which torch's allocator needs some room.
_SCORES = 0.3 * 2**30
_FRAGMENTATION = 1.05
_SHORTEST = 64
GIB = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class Workload:
    """What decides the memory of a fine-tuning.

    Args:
        config: The configuration of transformers.
        quantization: Of the linear layers of the blocks.
        bytes_per_number: Of everything else, and of activations.
        rank: Of the adapters.
        targets: Names of the adapted linear layers; None for all of the blocks.
        batch_size: Rows of a physical batch.
        length: Positions of a row.
        checkpointing: Whether activations are recomputed.
    """

    config: Any
    quantization: Quantization
    bytes_per_number: int
    rank: int
    targets: tuple[str, ...] | None
    batch_size: int
    length: int
    checkpointing: bool

    @property
    def adapter_parameters(self) -> int:
        """How many parameters the adapters have."""
        layers = block_layers(self.config)
        chosen = [
            sizes for name, sizes in layers.items() if not self.targets or name in self.targets
        ]
        return self.config.num_hidden_layers * self.rank * sum(a + b for a, b in chosen)

    def memory(self) -> float:
        """Estimate the peak memory in bytes, of loading and training."""
        config, width = self.config, self.config.hidden_size
        quantised = config.num_hidden_layers * block_parameters(config)
        weights = quantised * _QUANTISED.get(self.quantization, self.bytes_per_number)
        weights += embedding_parameters(config) * self.bytes_per_number
        trained = self.adapter_parameters * _TRAINED
        trained += self.batch_size * self.adapter_parameters * self.bytes_per_number
        positions = self.batch_size * self.length * self.bytes_per_number
        block = positions * (_KEPT[0] * width + _KEPT[1] * config.intermediate_size)
        between = positions * width * config.num_hidden_layers
        blocks = between + block if self.checkpointing else block * config.num_hidden_layers
        scores = min(_SCORES, 3 * 4 * self.batch_size * self.length * config.vocab_size)
        return _FRAGMENTATION * (weights + trained + blocks + scores)


def require_memory(workload: Workload, device: torch.device) -> None:
    """Refuse a workload that does not fit into the memory that is free.

    Args:
        workload: What is to be trained.
        device: Where.

    Raises:
        ConfigurationError: If it does not fit; names the smallest change with which it would.
    """
    free, needed = available_memory(device), workload.memory()
    if needed <= free:
        return
    fitting = next((w for w in _smaller(workload) if w.memory() <= free), None)
    raise ConfigurationError(
        must=f"The fine-tuning fits into the memory that is free on '{device}'.",
        found=f"It is estimated to need {needed / GIB:.1f} GiB; {free / GIB:.1f} GiB are free.",
        cost="The run would end with an out-of-memory error, after the model was loaded.",
        remedy=_options(workload, fitting)
        if fitting is not None
        else f"Use a device with {needed / GIB:.0f} GiB, or a smaller model.",
    )


def available_memory(device: torch.device) -> float:
    """Look up how much memory this process may still take.

    Args:
        device: A CUDA device or the CPU.

    Returns:
        Bytes; a cap by ``torch.cuda.set_per_process_memory_fraction`` counts.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        fraction = getattr(torch.cuda, "get_per_process_memory_fraction", lambda _device: 1.0)
        return min(free, total * fraction(device) - torch.cuda.memory_allocated(device))
    import psutil

    return float(psutil.virtual_memory().available)


def require_gpu(config: Any, device: torch.device, *, allow_cpu: bool) -> None:
    """Refuse to train a large model on the CPU, unless that is wanted.

    Args:
        config: The configuration of transformers.
        device: Where the model goes.
        allow_cpu: Whether it is wanted.

    Raises:
        ConfigurationError: If the model is large, the device a CPU and ``allow_cpu`` false.
    """
    blocks = config.num_hidden_layers * block_parameters(config)
    size = blocks + embedding_parameters(config)
    if device.type != "cpu" or allow_cpu or size < _LARGE:
        return
    raise ConfigurationError(
        must=f"A model of {size / 1e9:.1f} billion parameters is trained on a GPU.",
        found="The trainer runs on the CPU"
        + (", as torch finds no CUDA device." if not torch.cuda.is_available() else "."),
        cost="Weeks instead of hours.",
        remedy="Run it where `nvidia-smi` shows a GPU, with a CUDA build of torch and "
        "--trainer.accelerator gpu; or pass --model.allow_cpu true to train on the CPU all the "
        "same.",
    )


def block_layers(config: Any) -> dict[str, tuple[int, int]]:
    """List the linear layers of one block.

    Args:
        config: The configuration of transformers.

    Returns:
        Inputs and outputs by name.
    """
    width, inner, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    head = getattr(config, "head_dim", None) or width // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    return {
        "q_proj": (width, heads * head),
        "k_proj": (width, groups * head),
        "v_proj": (width, groups * head),
        "o_proj": (heads * head, width),
        "gate_proj": (width, inner),
        "up_proj": (width, inner),
        "down_proj": (inner, width),
    }


def block_parameters(config: Any) -> int:
    """Count the weights of the linear layers of one block.

    Args:
        config: The configuration of transformers.

    Returns:
        Their number.
    """
    return sum(a * b for a, b in block_layers(config).values())


def embedding_parameters(config: Any) -> int:
    """Count the parameters of the embedding and, where it is another matrix, of the head.

    Args:
        config: The configuration of transformers.

    Returns:
        Their number.
    """
    matrices = 1 if getattr(config, "tie_word_embeddings", False) else 2
    return int(matrices * config.vocab_size * config.hidden_size)


def _smaller(workload: Workload) -> Iterator[Workload]:
    """Cheaper workloads, the least harmful change first."""
    lengths = _halves(workload.length, _SHORTEST)
    kinds: list[Quantization] = [workload.quantization, "nf4"]
    for length, kind, batch, recomputed in product(
        lengths, kinds, _halves(workload.batch_size, 1), (workload.checkpointing, True)
    ):
        yield replace(
            workload, length=length, quantization=kind, batch_size=batch, checkpointing=recomputed
        )


def _halves(number: int, least: int) -> list[int]:
    found = [number]
    while found[-1] // 2 >= least:
        found.append(found[-1] // 2)
    return found


def _options(workload: Workload, fitting: Workload) -> str:
    changes = {
        "--model.gradient_checkpointing true": workload.checkpointing != fitting.checkpointing,
        f"--data.batch_size {fitting.batch_size}": workload.batch_size != fitting.batch_size,
        f"--model.quantization {fitting.quantization}": workload.quantization
        != fitting.quantization,
        f"--data.max_length {fitting.length}": workload.length != fitting.length,
    }
    chosen = " ".join(option for option, changed in changes.items() if changed)
    return f"It would fit with {chosen}, which needs {fitting.memory() / GIB:.1f} GiB."
