"""Decoders of a multimodal model: a small Llama from random weights, or a large one with adapters.

Either becomes a model of transformers with the decoder itself as ``model``, and a head: ``score``
for classes, or its output embeddings for the next token.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

import torch

from lightning_privacy.hub import read_config
from lightning_privacy.models._adapters import adapted
from lightning_privacy.models._loading import (
    Quantization,
    Task,
    load_base,
    made_up_base,
    require_family,
    require_valid,
)
from lightning_privacy.models._memory import Workload, require_gpu, require_memory
from lightning_privacy.models.base import enable_checkpointing
from lightning_privacy.models.language_model import require_fitting_heads

_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclass(frozen=True, kw_only=True, slots=True)
class SmallDecoder:
    """A Llama of any size, trained in full from random weights.

    Args:
        vocab_size: Different tokens, at least the tokeniser's.
        hidden_size: Width; a multiple of twice ``num_heads``.
        num_layers: Blocks.
        num_heads: Attention heads.
        num_key_value_heads: Heads of keys and values; divides ``num_heads``.
        intermediate_size: Inner width of the feed-forward part; null for 8/3 of the width.
        max_length: Longest text in tokens; those of images and sounds come on top.
        gradient_checkpointing: Recompute activations in the backward to save memory.

    Raises:
        ConfigurationError: If the sizes do not fit together.
    """

    vocab_size: int = 259
    hidden_size: int = 64
    num_layers: int = 2
    num_heads: int = 4
    num_key_value_heads: int = 2
    intermediate_size: int | None = None
    max_length: int = 128
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that do not fit together."""
        require_fitting_heads(self.hidden_size, self.num_heads, self.num_key_value_heads)

    def config(self, others: int) -> Any:
        """Write the configuration of transformers.

        Args:
            others: Tokens of other modalities.

        Returns:
            A `LlamaConfig`.
        """
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            num_key_value_heads=self.num_key_value_heads,
            intermediate_size=self.intermediate_size or 8 * math.ceil(self.hidden_size / 3),
            max_position_embeddings=self.max_length + others,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )

    def build(self, config: Any, task: Task) -> Any:
        """Make the model from random weights.

        Args:
            config: What `config` returned, with its number of classes.
            task: Which head it gets.

        Returns:
            The model of transformers.
        """
        from transformers import LlamaForCausalLM, LlamaForSequenceClassification

        kind = LlamaForCausalLM if task == "causal_lm" else LlamaForSequenceClassification
        base = kind(config)
        if self.gradient_checkpointing:
            enable_checkpointing(base)
        return base


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainedDecoder:
    """A Llama, Mistral or Qwen with its base frozen and quantised, and low-rank adapters on it.

    Args:
        checkpoint: A folder that ``save_pretrained`` wrote, or an id at the Hugging Face hub;
            null to make the model up.
        config_values: Only for tests and benchmarks, together with ``checkpoint: null``: arguments
            of transformers' configuration. The weights are random.
        quantization: ``"nf4"`` (0.52 bytes per weight), ``"int8"`` (1.01), or ``"none"``.
        dtype: Of what is not quantised, and of the computation: ``"bfloat16"`` or ``"float32"``.
        rank: Of the adapters; at least 1.
        alpha: Adapters are scaled by alpha / rank.
        dropout: On the input of the adapters, in [0, 1).
        target_modules: Names of the adapted layers; null for all linear layers of the blocks.
        gradient_checkpointing: Recompute activations in the backward to save memory.
        allow_cpu: Whether more than a billion parameters may be trained on the CPU.

    Raises:
        ConfigurationError: If an argument is out of its range.
    """

    checkpoint: str | None = None
    config_values: dict[str, Any] | None = None
    quantization: Quantization = "nf4"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    rank: int = 16
    alpha: float = 16.0
    dropout: float = 0.0
    target_modules: list[str] | None = None
    gradient_checkpointing: bool = True
    allow_cpu: bool = False

    def __post_init__(self) -> None:
        """Refuse arguments that have no meaning."""
        require_valid(
            {
                **dataclasses.asdict(self),
                "config": self.config_values,
                "task": "causal_lm",
                "num_labels": 2,
                "warmup_steps": 0,
            }
        )

    def config(self, others: int) -> Any:
        """Read or make up the configuration of transformers; no weights are read.

        Args:
            others: Tokens of other modalities; not used, a checkpoint has its own limit.

        Returns:
            The configuration.

        Raises:
            UnsupportedOperationError: If the architecture is none of the family.
        """
        if self.config_values is None:
            assert self.checkpoint is not None
            config = read_config(self.checkpoint)
        else:
            from transformers import AutoConfig

            config = AutoConfig.for_model(**{"model_type": "llama", **self.config_values})
        require_family(config, self.checkpoint)
        return config

    def require_room(
        self, config: Any, device: torch.device, *, batch_size: int, length: int
    ) -> None:
        """Refuse a device that is too small, before anything is loaded.

        Args:
            config: What `config` returned.
            device: Where the model goes.
            batch_size: Rows of a physical batch; 0 if it is not known.
            length: Positions of a row.

        Raises:
            ConfigurationError: If there is no GPU, or too little memory.
        """
        require_gpu(config, device, allow_cpu=self.allow_cpu)
        workload = Workload(
            config=config,
            quantization=self.quantization,
            bytes_per_number=_DTYPES[self.dtype].itemsize,
            rank=self.rank,
            targets=None if self.target_modules is None else tuple(self.target_modules),
            batch_size=batch_size,
            length=length,
            checkpointing=self.gradient_checkpointing,
        )
        require_memory(workload, device)

    def build(self, config: Any, task: Task, device: torch.device) -> Any:
        """Load the base onto a device and put adapters on it.

        Args:
            config: What `config` returned, with its number of classes.
            task: Which head it gets; that of classes is trained, the other frozen.
            device: Where the model goes.

        Returns:
            The model of peft.
        """
        settings: dict[str, Any] = {
            "task": task,
            "quantization": self.quantization,
            "dtype": _DTYPES[self.dtype],
            "device": device,
        }
        if self.checkpoint is None:
            base = made_up_base(config, **settings)
        else:
            base = load_base(self.checkpoint, num_labels=config.num_labels, **settings)
        base.config.use_cache = False
        values = {**dataclasses.asdict(self), "task": task, "rslora": False, "dora": False}
        network = adapted(base, values)
        if self.gradient_checkpointing:
            enable_checkpointing(base)
        for parameter in network.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return network
