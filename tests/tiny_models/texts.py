"""Tokenizers and token sequences for tiny models."""

import re
from collections import Counter
from collections.abc import Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

VOCABULARY = 50


def random_sequences(lengths: Sequence[int] = (7, 2, 12, 5, 3, 7, 9, 4)) -> list[torch.Tensor]:
    """Random sequences; those of 2 to 12 tokens predict 1 to 11."""
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(VOCABULARY, (length,), generator=generator) for length in lengths]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose tokens are the 256 bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def word_tokenizer(text: str) -> PreTrainedTokenizerFast:
    """A tokenizer of 256 tokens, the commonest words of a text: fewer and longer tokens than bytes, for speed."""
    counts = Counter(re.findall(r"\w+|[^\w\s]+", text))
    words = ["<unk>", *(word for word, _ in counts.most_common(255))]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
