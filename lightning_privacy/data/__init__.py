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
from lightning_privacy.data.digits import SpokenDigits
from lightning_privacy.data.examples import (
    MultimodalDataset,
    MultimodalExample,
    MultimodalSplit,
    Preprocessing,
    Sound,
)
from lightning_privacy.data.glyphs import GlyphCorpus, GlyphsAndTones
from lightning_privacy.data.instructions import ClassificationDataModule, InstructionDataModule
from lightning_privacy.data.manifests import MultimodalFiles
from lightning_privacy.data.multimodal import MultimodalDataModule
from lightning_privacy.data.synthetic import SecretsCorpus, SyntheticSecrets, SyntheticUser
from lightning_privacy.data.text import TextCorpus, TextDataModule, TextFile
from lightning_privacy.data.tokenizers import ByteTokenizer, PretrainedTokenizer, Tokenizer
from lightning_privacy.data.transforms import AudioTransform, ImageTransform, normalised_text

__all__ = [
    "AudioTransform",
    "ByteTokenizer",
    "CausalTextDataModule",
    "ClassificationDataModule",
    "Document",
    "DocumentDataModule",
    "GlyphCorpus",
    "GlyphsAndTones",
    "ImageTransform",
    "InstructionDataModule",
    "LabelledDocuments",
    "MultimodalDataModule",
    "MultimodalDataset",
    "MultimodalExample",
    "MultimodalFiles",
    "MultimodalSplit",
    "PadOnTheRight",
    "Preprocessing",
    "PretrainedTokenizer",
    "SecretsCorpus",
    "Sound",
    "Split",
    "SpokenDigits",
    "SyntheticSecrets",
    "SyntheticUser",
    "TextCorpus",
    "TextDataModule",
    "TextFile",
    "TokenisedDocuments",
    "Tokenizer",
    "normalised_text",
]
