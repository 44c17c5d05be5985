"""All scores of a language model on batches of texts, in one pass over model and reference."""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_privacy.audit.attacks.scores import (
    TokenScores,
    loss_score,
    min_k_plus_plus_score,
    min_k_score,
    ratio_score,
    token_scores,
    zlib_score,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    LogitsFunction = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def model_logits(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Logits of a language model: one called with a batch, or with its tensors by name.

    Args:
        module: A module whose forward takes the batch, or ``input_ids`` and ``attention_mask`` as
            the models of the transformers library and PEFT do.
        batch: With "input_ids" ``[B, T]`` and perhaps "attention_mask".

    Returns:
        ``[B, T, V]`` logits.
    """
    parameters = inspect.signature(module.forward).parameters
    by_name = "input_ids" in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )
    if not by_name:
        return _logits_in(module(batch))
    wanted = {name: batch[name] for name in ("input_ids", "attention_mask") if name in batch}
    return _logits_in(module(**wanted))


def score_texts(
    module: nn.Module,
    batches: Iterable[Mapping[str, Tensor]],
    *,
    reference: nn.Module | Literal["adapters"] | None = "adapters",
    texts: Sequence[str] | None = None,
    logits: LogitsFunction = model_logits,
) -> dict[str, Tensor]:
    """Attack a causal language model with every score that needs no shadow models.

    Everything runs in evaluation mode and without gradients, and leaves the module as it was.
    Members and non-members must be scored in the same way, and come from one random split that was
    made before training: see `blind_baseline`.

    Args:
        module: The model under attack.
        batches: Each with "input_ids" and "labels" ``[B, T]``, −100 where nothing is predicted;
            without labels, every token that the attention mask keeps.
        reference: The model before fine-tuning, for the ratio: "adapters" switches the adapters
            (PEFT) of ``module`` off, and leaves the ratio out if it has none; None leaves it out.
        texts: The texts in the order of the batches, for zlib.
        logits: How to compute logits ``[B, T, V]`` from a module and a batch.

    Returns:
        ``[N]`` scores by name: "loss", "min_k", "min_k_plus_plus", and "zlib" and "ratio" where
        what they need is there.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    found: dict[str, list[Tensor]] = {}
    known = 0
    for batch in batches:
        on_device = {n: v.to(device) for n, v in batch.items() if isinstance(v, Tensor)}
        labels = _labels(on_device)
        tokens = _tokens(module, on_device, labels, logits)
        scores = {
            "loss": loss_score(tokens),
            "min_k": min_k_score(tokens),
            "min_k_plus_plus": min_k_plus_plus_score(tokens),
        }
        if texts is not None:
            scores["zlib"] = zlib_score(tokens, texts[known : known + len(labels)])
        before = _reference_tokens(module, reference, on_device, labels, logits)
        if before is not None:
            scores["ratio"] = ratio_score(scores["loss"], loss_score(before))
        for name, value in scores.items():
            found.setdefault(name, []).append(value.cpu())
        known += len(labels)
    return {name: torch.cat(values) for name, values in found.items()}


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[bool]:
    """Switch the adapters of a PEFT model off, and on again as they were.

    Args:
        module: Any module.

    Yields:
        Whether there are adapters that are on.
    """
    layers: list[Any] = [
        part
        for part in module.modules()
        if hasattr(part, "enable_adapters") and getattr(part, "disable_adapters", None) is False
    ]
    trainable = {parameter: parameter.requires_grad for parameter in module.parameters()}
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield bool(layers)
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        for parameter, wanted in trainable.items():
            parameter.requires_grad_(wanted)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every part's own mode is restored."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _reference_tokens(
    module: nn.Module,
    reference: nn.Module | Literal["adapters"] | None,
    batch: Mapping[str, Tensor],
    labels: Tensor,
    logits: LogitsFunction,
) -> TokenScores | None:
    if isinstance(reference, nn.Module):
        return _tokens(reference, batch, labels, logits)
    if reference is None:
        return None
    with adapters_off(module) as found:
        return _tokens(module, batch, labels, logits) if found else None


def _tokens(
    module: nn.Module, batch: Mapping[str, Tensor], labels: Tensor, logits: LogitsFunction
) -> TokenScores:
    with evaluating(module):
        return token_scores(logits(module, batch), labels)


def _labels(batch: Mapping[str, Tensor]) -> Tensor:
    if "labels" in batch:
        return batch["labels"]
    kept = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    return batch["input_ids"].masked_fill(kept == 0, -100)


def _logits_in(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits
