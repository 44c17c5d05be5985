"""Data modules that know nothing of privacy."""

from __future__ import annotations

from lightning_privacy.data.base import (
    CausalTextDataModule,
    Document,
    DocumentDataModule,
    LabelledDocuments,
    PadOnTheRight,
    Split,
    TokenisedDocuments,
)
from lightning_privacy.data.instructions import ClassificationDataModule, InstructionDataModule
from lightning_privacy.data.synthetic import SecretsCorpus, SyntheticSecrets, SyntheticUser
from lightning_privacy.data.text import TextCorpus, TextDataModule, TextFile
from lightning_privacy.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer

__all__ = [
    "ByteTokenizer",
    "CausalTextDataModule",
    "ClassificationDataModule",
    "Document",
    "DocumentDataModule",
    "InstructionDataModule",
    "LabelledDocuments",
    "PadOnTheRight",
    "PretrainedTokenizer",
    "SecretsCorpus",
    "Split",
    "SyntheticSecrets",
    "SyntheticUser",
    "TextCorpus",
    "TextDataModule",
    "TextFile",
    "TokenisedDocuments",
    "Tokenizer",
]
