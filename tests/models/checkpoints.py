"""Small checkpoints of the Llama family, written by the tests themselves: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path

import torch

ALPHABET = "abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,:;?!'-\n{}\"_"
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def write_tokenizer(folder: Path) -> int:
    """A tokeniser of characters; returns the size of its vocabulary."""
    import tokenizers
    import transformers

    marks = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: i for i, token in enumerate([*marks, *dict.fromkeys(ALPHABET)])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    model.decoder = tokenizers.decoders.Fuse()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    fast.save_pretrained(folder)
    return len(vocabulary)


def write_checkpoint(folder: Path, kind: str = "llama", **changes) -> str:
    """A model with random weights and a tokeniser, as ``save_pretrained`` writes them."""
    import transformers

    size = write_tokenizer(folder)
    settings = {**SIZES, "vocab_size": size, "pad_token_id": None, **changes}
    config = transformers.AutoConfig.for_model(kind, **settings)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # scores that are not all alike
            parameter.data.mul_(3.0) if parameter.dim() > 1 else None
    model.save_pretrained(folder)
    return str(folder)
