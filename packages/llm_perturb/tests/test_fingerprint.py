import json
import shutil
import struct

import pytest
import torch
from bridge.exchange.errors import RunError
from bridge.exchange.fingerprint import Fingerprint, difference
from llm_perturb.evaluation import models
from llm_perturb.evaluation.fingerprint import (
    check_agreement,
    parameter_digest,
    parameter_digests,
    persistent_buffers,
    tokenizer_digest,
    total_digest,
)
from llm_perturb.evaluation.parameters import named_parameters
from safetensors.torch import load_file, save_file
from tiny_models import build, byte_tokenizer, save_model, word_tokenizer
from transformers import CTRLTokenizer
from xxhash import xxh3_128_hexdigest

UP = "model.layers.1.mlp.up_proj.weight"


def naive_digest(name, dtype, shape, data):
    return xxh3_128_hexdigest(json.dumps([name, dtype, shape]).encode() + b"\0" + data)


# one parameter


def test_digest_is_of_name_dtype_shape_and_bytes():
    tensor = torch.tensor([[1.0, -2.5], [0.0, 3.0]])
    expected = naive_digest("w", "torch.float32", [2, 2], struct.pack("=4f", 1.0, -2.5, 0.0, 3.0))
    assert parameter_digest("w", tensor) == expected
    assert len(expected) == 32
    scalar = torch.tensor(2.0, dtype=torch.float64)
    assert parameter_digest("s", scalar) == naive_digest("s", "torch.float64", [], struct.pack("=d", 2.0))
    assert parameter_digest("e", torch.empty(0, 3)) == naive_digest("e", "torch.float32", [0, 3], b"")


def test_digest_stays_the_same_between_versions():
    """Runs of different days are compared by it."""
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    assert parameter_digest("layers.0.weight", tensor) == "4747573ca725cb1fc2ed8f99a3bb5094"
    assert total_digest({"b": "2", "a": "1"}) == "28eb459935a54257a7d10dd83098115d"


def test_blocks_change_nothing(monkeypatch):
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    whole = parameter_digest("w", tensor)
    monkeypatch.setattr("llm_perturb.evaluation.fingerprint._BLOCK", 4)
    assert parameter_digest("w", tensor) == whole


def test_layout_in_memory_changes_nothing():
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    assert parameter_digest("w", tensor.T.contiguous().T) == parameter_digest("w", tensor)
    assert parameter_digest("w", torch.nn.Parameter(tensor)) == parameter_digest("w", tensor)


def test_a_large_tensor_is_not_copied():
    tensor = torch.zeros(1 << 20)

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        """Collects where the results of all operations lie."""

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for part in result if isinstance(result, (list, tuple)) else [result]:
                places.add(part.untyped_storage().data_ptr())
            return result

    places = set()
    with Watch():
        parameter_digest("w", tensor)
    assert places == {tensor.untyped_storage().data_ptr()}


NAN, OTHER_NAN = (torch.tensor([bits], dtype=torch.int32).view(torch.float32) for bits in (0x7FC00000, 0x7FC00001))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (NAN, OTHER_NAN),
        (torch.tensor([1.0]), torch.tensor([1.0]).nextafter(torch.tensor([2.0]))),
        (torch.zeros(2, 3), torch.zeros(3, 2)),
        (torch.zeros(6), torch.zeros(2, 3)),
        (torch.zeros(2, dtype=torch.float16), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.zeros(4, dtype=torch.float32), torch.zeros(2, dtype=torch.float64)),
    ],
)
def test_what_is_not_the_same_bits_has_another_digest(one, other):
    assert parameter_digest("w", one) != parameter_digest("w", other)
    assert parameter_digest("w", one) == parameter_digest("w", one.clone())


def test_the_same_values_under_another_name_have_another_digest():
    assert parameter_digest("a", torch.ones(3)) != parameter_digest("b", torch.ones(3))


# all of them


def test_total_does_not_depend_on_the_order():
    digests = {"a": "1", "b": "2", "c": "3"}
    assert total_digest(dict(reversed(digests.items()))) == total_digest(digests)
    assert total_digest(digests | {"b": "4"}) != total_digest(digests)
    assert total_digest({"a": "1", "b": "2"}) != total_digest(digests)
    assert total_digest({"a": "2", "b": "1", "c": "3"}) != total_digest(digests)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A Llama in bfloat16, in several files."""
    return save_model(build("llama", torch.bfloat16), tmp_path_factory.mktemp("llama"), max_shard_size="5KB")


def test_each_parameter_is_in_it_once(tmp_path):
    loaded = models.load(str(save_model(build("gpt2"), tmp_path)), device="cpu")
    assert loaded.metadata["tied_groups"] == [["transformer.wte.weight", "lm_head.weight"]]
    assert list(loaded.fingerprint.digests) == list(named_parameters(loaded.model))
    assert "lm_head.weight" not in loaded.fingerprint.digests
    assert loaded.fingerprint.digests == parameter_digests(named_parameters(loaded.model))


@pytest.mark.parametrize("name", ["gpt2", "neox", "llama", "llama_tied"])
@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_streamed_weights_have_the_same_fingerprint(tmp_path, name, dtype):
    save_model(build(name, torch.bfloat16), tmp_path, max_shard_size="5KB")
    resident = models.load(str(tmp_path), dtype=dtype, device="cpu")
    streamed = models.load(str(tmp_path), dtype=dtype, device="cpu", weights="streamed")
    assert streamed.fingerprint == resident.fingerprint
    assert list(streamed.fingerprint.digests) == list(resident.fingerprint.digests)
    assert resident.fingerprint.dtype == dtype


def test_streamed_weights_are_hashed_when_they_are_first_read(checkpoint, monkeypatch):
    hashed = []

    def watched(name, tensor):
        hashed.append(name)
        return parameter_digest(name, tensor)

    monkeypatch.setattr("llm_perturb.evaluation.checkpoint.parameter_digest", watched)
    loaded = models.load(str(checkpoint), device="cpu", weights="streamed")
    assert hashed == []
    for _ in range(2):
        with loaded.checkpoint.present([UP, "lm_head.weight"]):
            assert hashed == [UP, "lm_head.weight"]
    digests = loaded.fingerprint.digests
    assert sorted(hashed) == sorted(digests) and len(digests) == len(named_parameters(loaded.model))


def test_one_bit_of_one_parameter_is_found_and_named(checkpoint):
    loaded, other = (models.load(str(checkpoint), device="cpu") for _ in range(2))
    other.model.get_parameter(UP).view(torch.int32)[3, 2] ^= 1
    assert other.fingerprint.parameters_xxh3 != loaded.fingerprint.parameters_xxh3
    assert difference(loaded.fingerprint, other.fingerprint) == UP


def test_other_values_from_the_same_files_no_longer_look_alike(checkpoint):
    """What was read wrongly differs in nothing that the metadata of the model tell."""
    loaded, other = (models.load(str(checkpoint), device="cpu") for _ in range(2))
    for parameter in other.model.parameters():
        parameter.neg_()
    assert other.metadata == loaded.metadata
    assert other.fingerprint != loaded.fingerprint
    assert "more parameters" in difference(loaded.fingerprint, other.fingerprint)


def test_file_that_was_changed_shows_with_streamed_weights_too(checkpoint, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(checkpoint, copy)
    before = models.load(str(copy), device="cpu", weights="streamed").fingerprint
    (file,) = (path for path in copy.glob("*.safetensors") if UP in load_file(path))
    tensors = load_file(file)
    tensors[UP][0, 0] *= -1
    save_file(tensors, file, {"format": "pt"})
    assert difference(before, models.load(str(copy), device="cpu", weights="streamed").fingerprint) == UP


def test_dtypes_have_different_fingerprints(checkpoint):
    wide, narrow = (models.load(str(checkpoint), dtype=dtype, device="cpu") for dtype in ("float32", "bfloat16"))
    assert set(wide.fingerprint.digests) == set(narrow.fingerprint.digests)
    assert not set(wide.fingerprint.digests.values()) & set(narrow.fingerprint.digests.values())
    assert wide.fingerprint.tokenizer_xxh3 == narrow.fingerprint.tokenizer_xxh3


def test_fingerprint_is_taken_once(checkpoint):
    """Later, weights may be perturbed for the moment."""
    loaded = models.load(str(checkpoint), device="cpu")
    before = loaded.fingerprint
    loaded.model.get_parameter(UP)[0, 0] = 0
    assert loaded.fingerprint is before


def test_persistent_buffers_count_and_others_do_not():
    model = build("llama")
    assert persistent_buffers(model) == {}
    model.model.layers[0].register_buffer("bias", torch.ones(3))
    model.model.layers[0].register_buffer("table", torch.ones(3), persistent=False)
    assert list(persistent_buffers(model)) == ["model.layers.0.bias"]


# the tokenizer


def test_tokenizer_that_is_loaded_again_is_the_same(tmp_path):
    one, other = byte_tokenizer(), byte_tokenizer()
    assert tokenizer_digest(one) == tokenizer_digest(other)
    one.save_pretrained(tmp_path)
    assert tokenizer_digest(type(one).from_pretrained(tmp_path)) == tokenizer_digest(one)


def test_calls_and_chat_templates_do_not_count():
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding(length=8)
    tokenizer.chat_template = "{{ messages }}"
    assert tokenizer_digest(tokenizer) == before
    assert tokenizer.backend_tokenizer.truncation["max_length"] == 5  # which was left as it is


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: tokenizer.add_tokens(["number"]),
        lambda tokenizer: setattr(tokenizer, "bos_token", "a"),
        lambda tokenizer: setattr(tokenizer.backend_tokenizer, "pre_tokenizer", None),
    ],
    ids=["token", "bos", "pre-tokenizer"],
)
def test_what_changes_the_tokens_counts(change):
    tokenizer = byte_tokenizer()
    before = tokenizer_digest(tokenizer)
    change(tokenizer)
    assert tokenizer_digest(tokenizer) not in {before, tokenizer_digest(word_tokenizer("a few words"))}


def slow_tokenizer(folder, merges):
    folder.mkdir()
    vocabulary = {word: number for number, word in enumerate(["<unk>", "a", "b", "b</w>", "ab</w>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return CTRLTokenizer(folder / "vocab.json", folder / "merges.txt")


def test_slow_tokenizer_goes_by_its_vocabulary_and_merges(tmp_path):
    one, same, other = (
        slow_tokenizer(tmp_path / n, merges) for n, merges in (("1", "a b"), ("2", "a b"), ("3", "b a"))
    )
    assert not one.is_fast
    assert tokenizer_digest(one) == tokenizer_digest(same) != tokenizer_digest(other)
    same.add_tokens(["new"])
    assert tokenizer_digest(one) != tokenizer_digest(same)


# several processes


class Several:
    """Stands in for ``Processes``: what the others hold is given."""

    def __init__(self, *others):
        self.others = others

    def gather(self, item):
        return [item, *self.others]


def test_processes_must_hold_the_same_model():
    own = Fingerprint("1a", "2b", "float32", {"up.weight": "3c"})
    check_agreement(own, Several(own))
    with pytest.raises(
        RunError, match=r"hold different models, which differ in up\.weight; give each machine the same"
    ):
        check_agreement(own, Several(own, Fingerprint("ff", "2b", "float32", {"up.weight": "4d"})))
