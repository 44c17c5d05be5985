"""Bases of the Llama family: read, quantised weight by weight, or made up from a configuration."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from lightning_privacy.errors import ConfigurationError, UnsupportedOperationError
from lightning_privacy.types import one_of, real_number, whole_number

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

Task = Literal["causal_lm", "classification"]
Quantization = Literal["nf4", "int8", "none"]

# Decoders whose scores are `lm_head(last hidden state)` and nothing else. Gemma caps its scores,
# Granite scales them, and a mixture of experts couples the examples of a batch in its router.
FAMILY = ("llama", "mistral", "qwen2", "qwen3")


_CHOICES = {
    "task": ("causal_lm", "classification"),
    "quantization": ("nf4", "int8", "none"),
    "dtype": ("bfloat16", "float32"),
}


def require_valid(values: Mapping[str, Any]) -> None:
    """Refuse arguments of a fine-tuning that have no meaning.

    Args:
        values: The arguments by name.

    Raises:
        ConfigurationError: If one is out of its range, or it is not clear what to load.
    """
    remedy = "Give such a value."
    if (values["checkpoint"] is None) == (values["config"] is None):
        raise ConfigurationError(
            must="A model is read from `checkpoint`, or made up from `config`.",
            found="Both are given." if values["config"] else "Neither is given.",
            cost="It is not clear whether the weights are to be random.",
            remedy="Give a folder or a hub id as `checkpoint`; for random weights "
            "`checkpoint: null` and a `config`.",
        )
    for name, choices in _CHOICES.items():
        one_of(name, values[name], choices, cost="It is not clear what to load.", remedy=remedy)
    for name, least in (("rank", 1), ("num_labels", 2), ("warmup_steps", 0)):
        cost = "There would be no such adapter, head or schedule."
        whole_number(name, values[name], at_least=least, cost=cost, remedy=remedy)
    for name, within in (("alpha", "(0, inf)"), ("dropout", "[0, 1)")):
        cost = "The adapters would learn nothing."
        real_number(name, values[name], within, cost=cost, remedy=remedy)


def require_family(config: Any, checkpoint: str | None) -> None:
    """Refuse an architecture that is none of the family, or weights that are quantised otherwise.

    Args:
        config: The configuration of transformers.
        checkpoint: Where it comes from; None for a made-up one.

    Raises:
        UnsupportedOperationError: If it is one of these.
    """
    kind = getattr(config, "model_type", None)
    if kind not in FAMILY:
        raise UnsupportedOperationError(
            must=f"The checkpoint's architecture is one of {', '.join(FAMILY)}.",
            found=f"'{checkpoint}' is of the architecture '{kind}'.",
            cost="Its loss could be computed wrongly: other families scale or cap their scores, or "
            "route examples through shared experts.",
            remedy="Choose a model of the family, or write a LightningModule of your own: the "
            "callback trains any.",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedOperationError(
            must="The checkpoint holds unquantised weights.",
            found=f"'{checkpoint}' is quantised already.",
            cost="What the option `quantization` says would not be what is trained.",
            remedy="Give the checkpoint that it was made from; it is quantised while it is read.",
        )


def load_base(
    checkpoint: str,
    *,
    task: Task,
    num_labels: int,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Read a checkpoint onto one device, each weight quantised as soon as it is read.

    Neither the host nor the device ever holds the unquantised model.

    Args:
        checkpoint: Folder or hub id.
        task: Which head the model gets.
        num_labels: Classes, for a classification.
        quantization: Of the linear layers but for the head.
        dtype: Of everything else, and of the computation.
        device: Where the model goes.

    Returns:
        The model of transformers.

    Raises:
        ConfigurationError: If its weights cannot be found or read.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    settings: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}}
    if quantization != "none":
        settings["quantization_config"] = _bitsandbytes(quantization, dtype)
    kind: Any = AutoModelForCausalLM
    if task == "classification":
        kind, settings["num_labels"] = AutoModelForSequenceClassification, num_labels
    try:
        with _quiet():
            return _as_quantised(kind.from_pretrained(checkpoint, **settings))
    except OSError as error:  # which the libraries raise for files, folders and the hub alike
        raise ConfigurationError(
            must="The weights of the checkpoint can be read.",
            found=f"'{checkpoint}': {error}",
            cost="There is nothing to start from.",
            remedy="Give a folder that `save_pretrained` wrote in full, or fetch what is missing.",
        ) from error


def made_up_base(
    config: Any,
    *,
    task: Task,
    quantization: Quantization,
    dtype: torch.dtype,
    device: torch.device,
) -> Any:
    """Make a model with random weights, quantised one by one, for tests and benchmarks.

    The weights are the same for the same configuration and kind of device, so that a run can be
    resumed although checkpoints hold adapters only.

    Args:
        config: The configuration of transformers.
        task: Which head the model gets.
        quantization: Of the linear layers but for the head.
        dtype: Of everything else, and of the computation.
        device: Where the model goes.

    Returns:
        The model of transformers.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    kind = AutoModelForCausalLM if task == "causal_lm" else AutoModelForSequenceClassification
    with torch.device("meta"):
        model: Any = kind.from_config(config)
    generator = torch.Generator(device).manual_seed(0)
    # By name: a list of the modules would hold the unquantised weights of all of them.
    for name in [name for name, _ in model.named_modules()]:
        module = model.get_submodule(name)
        if next(module.buffers(recurse=False), None) is not None:  # the rotary table
            model.set_submodule(name, type(module)(config).to(device))
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            made = _random_values(parameter, config, generator, dtype)
            module.register_parameter(key, nn.Parameter(made, requires_grad=False))
        if quantization != "none" and isinstance(module, nn.Linear) and "layers." in name:
            model.set_submodule(name, _quantised(module, quantization, dtype))
    model.tie_weights()
    model.is_loaded_in_4bit = quantization == "nf4"
    model.is_loaded_in_8bit = quantization == "int8"
    return _as_quantised(model)


def _as_quantised(model: Any) -> Any:
    """Keep 4-bit weights as they are: on some CPUs bitsandbytes would repack and round them anew.

    It does so in the first forward in evaluation mode, which is a validation in the middle of a
    training.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def _random_values(
    parameter: nn.Parameter, config: Any, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    shape, device = parameter.shape, generator.device
    if parameter.dim() < 2:  # the scales of RMSNorm
        return torch.ones(shape, dtype=dtype, device=device)
    values = torch.empty(shape, dtype=dtype, device=device)
    return values.normal_(0.0, config.initializer_range, generator=generator)


def _quantised(linear: nn.Linear, quantization: Quantization, dtype: torch.dtype) -> nn.Linear:
    import bitsandbytes as bnb

    sizes, bias, device = (
        (linear.in_features, linear.out_features),
        linear.bias,
        linear.weight.device,
    )
    layer: Any
    if quantization == "nf4":
        layer = bnb.nn.Linear4bit(
            *sizes, bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta"
        )
        layer.weight = bnb.nn.Params4bit(
            linear.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True
        ).to(device)
    else:
        layer = bnb.nn.Linear8bitLt(*sizes, bias is not None, has_fp16_weights=False, device="meta")
        layer.weight = bnb.nn.Int8Params(
            linear.weight.data, requires_grad=False, has_fp16_weights=False
        ).to(device)
    layer.bias = bias
    return layer


def _bitsandbytes(quantization: Quantization, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bar, and no report of a head that is new by intention."""
    from transformers.utils import logging as reports

    shown, level = reports.is_progress_bar_enabled(), reports.get_verbosity()
    reports.disable_progress_bar()
    reports.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        reports.set_verbosity(level)
        if shown:
            reports.enable_progress_bar()
