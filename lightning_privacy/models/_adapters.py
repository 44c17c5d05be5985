"""What LoRA does with a loaded base: adapters put on, merged into it, and texts continued."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lightning_privacy.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor


def adapted(base: Any, values: Mapping[str, Any]) -> Any:
    """Put adapters on a base, which is frozen, and a trained head where there are classes.

    Args:
        base: A model of transformers.
        values: The arguments of `LlamaQLoRA` by name.

    Returns:
        The model of peft around the same base.

    Raises:
        ConfigurationError: If no layer of the base has one of the names in `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    _require_layers(base, values["target_modules"])
    settings = LoraConfig(
        r=values["rank"],
        lora_alpha=values["alpha"],
        lora_dropout=values["dropout"],
        target_modules=values["target_modules"] or "all-linear",
        use_rslora=values["rslora"],
        use_dora=values["dora"],
        task_type="CAUSAL_LM" if values["task"] == "causal_lm" else "SEQ_CLS",
    )
    with _without_deprecations():
        return get_peft_model(base, settings)


def _require_layers(base: Any, targets: Sequence[str] | None) -> None:
    # As peft reads the names: of a module, or the end of one.
    modules = dict(base.named_modules())
    wrong = [
        target
        for target in targets or ()
        if not any(name == target or name.endswith(f".{target}") for name in modules)
    ]
    if not wrong:
        return
    blocks = {name: part for name, part in modules.items() if "layers." in name}
    linear = sorted(
        {name.rpartition(".")[2] for name, part in blocks.items() if isinstance(part, nn.Linear)}
    )
    raise ConfigurationError(
        must="`target_modules` names layers of the model.",
        found=f"It has none of the name {', '.join(wrong)}.",
        cost="Fewer adapters than asked for would be trained.",
        remedy=f"Choose among {', '.join(linear)}, or null for all linear layers of the blocks.",
    )


def merged(base: Any, folder: str) -> Any:
    """Add adapters to the weights of an unquantised base.

    Args:
        base: A model of transformers.
        folder: Where peft has written the adapters.

    Returns:
        The same base, changed.
    """
    from peft import PeftModel

    with _without_deprecations():
        return PeftModel.from_pretrained(base, folder).merge_and_unload()


def continued(
    network: Any, tokenizer: Any, prompt: str, max_new_tokens: int, temperature: float
) -> str:
    """Continue one text.

    Args:
        network: A causal language model.
        tokenizer: Its tokeniser, of transformers.
        prompt: The beginning.
        max_new_tokens: Tokens to add at most.
        temperature: 0 for the likeliest token.

    Returns:
        What was added.
    """
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    given = torch.tensor([[*begin, *ids]], device=network.device)
    made = network.generate(
        input_ids=given,
        attention_mask=torch.ones_like(given),
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        # What a checkpoint's own settings say about drawing is left aside.
        do_sample=temperature > 0,
        temperature=temperature or None,
        top_p=None,
        top_k=None,
    )
    return str(tokenizer.decode(made[0, given.shape[1] :], skip_special_tokens=True))


def require_same(own: Mapping[str, Tensor], held: Mapping[str, Tensor]) -> None:
    """Refuse adapters of other layers or another rank.

    Args:
        own: What a model trains, by name.
        held: What a checkpoint holds.

    Raises:
        ConfigurationError: If names or shapes differ.
    """
    shapes, others = ({name: t.shape for name, t in each.items()} for each in (own, held))
    if shapes == others:
        return
    names = sorted(shapes.keys() | others.keys())
    wrong = [name for name in names if shapes.get(name) != others.get(name)]
    raise ConfigurationError(
        must="A checkpoint is loaded into adapters of the same layers and rank.",
        found=f"{len(wrong)} of {len(own)} differ, the first is {wrong[0]}.",
        cost="Part of the adapters would keep their initial weights.",
        remedy="Give the model the arguments `rank`, `target_modules`, `dora` and `task` of the "
        "run that wrote the checkpoint.",
    )


@contextmanager
def _without_deprecations() -> Iterator[None]:
    # What peft asks of newer versions of transformers.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing. is deprecated")
        yield
