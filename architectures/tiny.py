"""Tiny random models, and checkpoints of them that any tool loads."""

import string
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from architectures.configurations import configuration

MAX_PARAMETERS = 10_000_000
LENGTHS = (7, 12, 5, 12, 9, 6)  # tokens of the sequences, two alike
LETTERS = (string.ascii_letters + string.digits)[:60]  # the tokens; the first three are special in some model types


class NotBuilt(Exception):  # noqa: N818 - an outcome that the table tells, not an error
    """There is no small model of this type; the message says why."""


def build(model_type: str) -> PreTrainedModel:
    """The random model of a type, float32, in eval mode; every parameter and stored buffer is noisy.

    Raises:
        NotBuilt: transformers makes no model of the small configuration, or a large one.
    """
    torch.manual_seed(0)
    try:
        config = configuration(model_type)
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
        if size > MAX_PARAMETERS:
            raise NotBuilt(f"the smallest configuration that was tried has {size:,} parameters")
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except NotBuilt:
        raise
    except Exception as error:  # whatever transformers makes of a configuration
        lines = str(error).strip().splitlines() or [""]
        raise NotBuilt(f"{type(error).__name__}: {lines[-1].strip()[:160]}") from error
    model.eval().requires_grad_(False)
    stored = model.state_dict().keys()
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if name in stored]
    for _, tensor in [*model.named_parameters(), *buffers]:
        if tensor.is_floating_point():
            noise = 0.2 * torch.randn_like(tensor)
            tensor.copy_(noise if tensor.ndim > 1 else tensor + noise)
    return model


def sequences() -> list[Tensor]:
    """Random ids, (T_i + 1,) each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, len(LETTERS), (length,), generator=generator) for length in LENGTHS]


def save(model: PreTrainedModel, folder: Path) -> None:
    """Write a checkpoint with a tokenizer of single letters, and the sequences as ``texts.txt``."""
    model.save_pretrained(folder)
    letters = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(LETTERS)}, merges=[]))
    letters.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=letters).save_pretrained(folder)
    lines = ["".join(LETTERS[number] for number in ids.tolist()) for ids in sequences()]
    (folder / "texts.txt").write_text("\n".join(lines) + "\n")
