"""The fingerprint of a loaded model: hashes of its parameters as they are used, and of its tokenizer.

XXH3 with 128 bits (Collet, https://xxhash.com) shows every accidental difference and runs at the speed of memory. It
is no defence against somebody who makes two models look alike.
"""

import json
from collections.abc import Mapping
from copy import deepcopy

import torch
from bridge.exchange.errors import RunError
from bridge.exchange.fingerprint import Fingerprint, difference
from bridge.exchange.scratch import scratch_folder
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from xxhash import xxh3_128, xxh3_128_hexdigest

from llm_perturb.evaluation.parameters import all_names
from llm_perturb.evaluation.processes import Processes

_BLOCK = 1 << 22  # elements; of a tensor on another device no more are on the CPU at a time


def parameter_digest(name: str, tensor: Tensor) -> str:
    """XXH3-128 over name, dtype, shape and bytes of a tensor, as 32 hexadecimal digits.

    The bytes are those of the elements in row-major order, as this machine stores them: 0.0 and -0.0 differ, as do two
    NaN of different bits. A contiguous tensor on the CPU is hashed where it lies, without a copy.
    """
    digest = xxh3_128(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + b"\0")
    for block in tensor.detach().contiguous().view(-1).split(_BLOCK):
        digest.update(block.cpu().view(torch.uint8).numpy())
    return digest.hexdigest()


def parameter_digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The digest of each tensor by name, in the given order."""
    return {name: parameter_digest(name, tensor) for name, tensor in tensors.items()}


def total_digest(digests: Mapping[str, str]) -> str:
    """XXH3-128 over the names and digests, sorted by name: the order of the modules changes no number, nor this."""
    return xxh3_128_hexdigest(json.dumps(sorted(digests.items())).encode())


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a checkpoint holds besides parameters, such as the corrections by which some routers choose experts."""
    parameters = all_names(model)
    state = model.state_dict()
    return {name: value for name, value in state.items() if name not in parameters and isinstance(value, Tensor)}


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """XXH3-128 over all that decides which tokens a text becomes.

    Of a fast tokenizer that is its serialized form without truncation and padding, which each call sets anew; of any
    other its class, vocabulary, switches, and the files that it is saved in; of both the special tokens. The chat
    template is left out: what it makes of chats is in the hash of the token sequences.
    """
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    backend = getattr(tokenizer, "backend_tokenizer", None)
    form: object
    if isinstance(backend, Tokenizer):
        form = _without_padding(backend).to_str()
    else:
        switches = {key: value for key, value in tokenizer.init_kwargs.items() if isinstance(value, bool)}
        vocabulary = sorted(tokenizer.get_vocab().items())
        form = [type(tokenizer).__name__, vocabulary, sorted(switches.items()), _saved_files(tokenizer)]
    return xxh3_128_hexdigest(json.dumps([form, sorted(special.items())]).encode())


def _without_padding(backend: Tokenizer) -> Tokenizer:
    """The tokenizer without the truncation and padding of the last call: a copy where there are such."""
    if backend.truncation or backend.padding:
        backend = deepcopy(backend)
        backend.no_truncation()
        backend.no_padding()
    return backend


def _saved_files(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """The hash of each file that a tokenizer is saved in, but for its config, which names paths, and chat templates."""
    with scratch_folder() as folder:
        tokenizer.save_pretrained(folder)
        files = sorted(path for path in folder.iterdir() if path.is_file())
        return {
            path.name: xxh3_128_hexdigest(path.read_bytes())
            for path in files
            if path.name != "tokenizer_config.json" and not path.name.startswith("chat_template")
        }


def check_agreement(own: Fingerprint, processes: Processes) -> None:
    """Each process must hold the same model; waits for all of them.

    Raises:
        RunError: in every process, if two of them differ; names the parameters.
    """
    for other in processes.gather(own):
        if what := difference(own, other):
            raise RunError(
                f"the processes hold different models, which differ in {what}; give each machine the same checkpoint"
            )
