from __future__ import annotations

import pytest

from lightning_privacy.data import (
    ByteTokenizer,
    PretrainedTokenizer,
    SecretsCorpus,
    SyntheticSecrets,
)
from lightning_privacy.errors import ConfigurationError


@pytest.mark.parametrize("text", ["", "plain", "ümläut 😀", "a\x00b", "\udcff"])
def test_bytes_come_back(text):
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    assert max(ids) < tokenizer.vocab_size
    assert ids[0] == tokenizer.begin_id
    assert ids[-1] == tokenizer.end_id
    if text != "\udcff":
        assert tokenizer.decode([*ids, tokenizer.pad_id]) == text


@pytest.fixture
def local_tokenizer(tmp_path):
    """A tokeniser of words, made here: nothing is downloaded."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = {"[UNK]": 0, "<s>": 1, "</s>": 2, "<pad>": 3, "one": 4, "two": 5}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
    )
    fast.save_pretrained(tmp_path)
    return str(tmp_path)


def test_a_local_tokenizer_is_used(local_tokenizer):
    tokenizer = PretrainedTokenizer(local_tokenizer)
    assert tokenizer.encode("one two three") == [1, 4, 5, 0, 2]
    assert tokenizer.decode([1, 4, 5, 2]) == "one two"
    assert tokenizer.vocab_size == 6
    assert tokenizer.pad_id == 3
    data = SyntheticSecrets(SecretsCorpus(n_users=20), tokenizer=local_tokenizer)
    assert data.vocab_size == 6
    rows = next(iter(data.train_dataloader()))["input_ids"]
    assert set(rows[:, 0].tolist()) == {1}


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="could not be read"):
        PretrainedTokenizer(str(tmp_path))
