"""Tiny random models, built from configs and never downloaded, for the tests of all packages.

- ``common_families``: GPT-2, GPT-NeoX and Llama, for most tests
- ``further_families``: decoders with what those do not have
- ``odd_models``: what no common family has, and what is to be refused
- ``checkpoints``: models saved as ``from_pretrained`` reads them
- ``texts``: tokenizers and token sequences
"""

from tiny_models.checkpoints import save_checkpoint, save_model
from tiny_models.common_families import BUILDERS, build
from tiny_models.texts import VOCABULARY, byte_tokenizer, random_sequences, word_tokenizer

__all__ = [
    "BUILDERS",
    "VOCABULARY",
    "build",
    "byte_tokenizer",
    "random_sequences",
    "save_checkpoint",
    "save_model",
    "word_tokenizer",
]
