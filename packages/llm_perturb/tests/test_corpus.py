import dataclasses
import json

import pandas as pd
import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.corpus import Corpus, CorpusOptions, Texts, hash_sequences, read_texts, tokenize
from llm_perturb.evaluation.fingerprint import tokenizer_digest
from tiny_models import byte_tokenizer
from tokenizers.processors import TemplateProcessing

TEXTS = ["the first", "second one", "no. 3", "and the fourth of them"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(autouse=True)
def no_network(tmp_path_factory, monkeypatch):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def text_file(folder, content="\n".join(TEXTS) + "\n"):
    path = folder / "texts.txt"
    path.write_text(content, encoding="utf-8")
    return str(path)


def corpus_of(texts, tokenizer, **options):
    return tokenize(Texts(texts, "here"), tokenizer, CorpusOptions(**options))


# the texts


def test_a_file_is_one_text_a_line_and_blank_lines_are_none(tmp_path):
    file = text_file(tmp_path, "one\n\n  \t \ntwo \n\nthree")
    assert read_texts(CorpusOptions(data_file=file)) == Texts(["one", "two ", "three"], file, n_empty=3)


def test_only_a_line_break_ends_a_line(tmp_path):
    """``str.splitlines`` would also cut at these, which occur inside real texts."""
    file = text_file(tmp_path, "a\u2028b\x0bc\x85d\nnext\n")
    assert read_texts(CorpusOptions(data_file=file)).texts == ["a\u2028b\x0bc\x85d", "next"]


def test_line_breaks_of_windows_are_no_part_of_the_text(tmp_path):
    (tmp_path / "dos.txt").write_bytes(b"one\r\ntwo\r\n")
    assert read_texts(CorpusOptions(data_file=str(tmp_path / "dos.txt"))).texts == ["one", "two"]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path):
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read_texts(CorpusOptions(data_file=str(tmp_path / "marked.txt"))).texts == ["one", "two"]


def test_the_shipped_passages_are_many_and_different():
    texts = read_texts(CorpusOptions())
    assert texts.source == "shipped passages"
    assert len(set(texts.texts)) == len(texts.texts) > 100
    assert min(map(len, texts.texts)) > 100


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(RequestError, match=r"--data-file .*gone\.txt cannot be read: No such file"):
        read_texts(CorpusOptions(data_file=str(tmp_path / "gone.txt")))


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(RequestError, match="cannot be read: Is a directory"):
        read_texts(CorpusOptions(data_file=str(tmp_path)))


@pytest.mark.parametrize("content", ["", "\n\n", "  \n\t\n"])
def test_a_file_without_text_is_refused(tmp_path, content):
    with pytest.raises(RequestError, match="holds no text"):
        read_texts(CorpusOptions(data_file=text_file(tmp_path, content)))


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    (tmp_path / "latin.txt").write_bytes("première\n".encode("latin-1"))
    with pytest.raises(RequestError, match="is not UTF-8 text: .* at byte 5"):
        read_texts(CorpusOptions(data_file=str(tmp_path / "latin.txt")))


def test_options_that_cannot_be_are_refused(tmp_path):
    with pytest.raises(RequestError, match="exclude each other"):
        read_texts(CorpusOptions(data_file=text_file(tmp_path), dataset="wikitext"))
    with pytest.raises(RequestError, match="--eval-limit must be at least 1, not 0"):
        read_texts(CorpusOptions(data_file=text_file(tmp_path), eval_limit=0))
    with pytest.raises(RequestError, match="--max-length must be at least 2.*not 1"):
        read_texts(CorpusOptions(data_file=text_file(tmp_path), max_length=1))


# data sets of one's own


def dataset_file(folder, kind):
    path, frame = folder / f"data.{kind}", pd.DataFrame({"id": range(4), "body": TEXTS})
    if kind == "csv":
        frame.to_csv(path, index=False)
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "txt":
        path.write_text("\n".join(TEXTS) + "\n", encoding="utf-8")
    else:
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")) + "\n", encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "parquet", "txt"])
def test_local_data_sets_of_every_format(tmp_path, kind):
    options = CorpusOptions(dataset=dataset_file(tmp_path, kind), text_column="text" if kind == "txt" else "body")
    assert read_texts(options).texts == TEXTS


def test_a_missing_column_is_refused_and_the_others_are_named(tmp_path):
    with pytest.raises(RequestError, match="has no column 'text'.* id, body; choose with --text-column"):
        read_texts(CorpusOptions(dataset=dataset_file(tmp_path, "jsonl")))


def test_a_column_of_numbers_holds_no_text(tmp_path):
    with pytest.raises(RequestError, match="holds no text"):
        read_texts(CorpusOptions(dataset=dataset_file(tmp_path, "jsonl"), text_column="id"))


def test_missing_texts_of_a_data_set_are_passed_over(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"text": " "}\n{"text": "two"}\n', encoding="utf-8")
    assert read_texts(CorpusOptions(dataset=str(path))).texts == ["one", "two"]


def test_a_local_file_of_another_kind_is_refused(tmp_path):
    (tmp_path / "data.xml").write_text("<a/>")
    with pytest.raises(RequestError, match=r"a local file must end in \.json, "):
        read_texts(CorpusOptions(dataset=str(tmp_path / "data.xml")))


def test_a_damaged_data_set_is_refused(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(RequestError, match="cannot be loaded"):
        read_texts(CorpusOptions(dataset=str(tmp_path / "data.parquet")))


# documents


def test_documents_are_the_texts_one_by_one(tokenizer):
    corpus = corpus_of(TEXTS, tokenizer)
    assert [tokenizer.decode(sequence) for sequence in corpus.sequences] == TEXTS
    assert all(sequence.dtype == torch.int64 for sequence in corpus.sequences)
    assert corpus.n_tokens == sum(len(text) - 1 for text in TEXTS) == corpus.metadata["n_tokens"]
    assert corpus.metadata["n_texts"] == corpus.metadata["n_sequences"] == 4


def test_documents_are_cut_at_max_length(tokenizer):
    corpus = corpus_of(TEXTS, tokenizer, max_length=6)
    assert [tokenizer.decode(sequence) for sequence in corpus.sequences] == [text[:6] for text in TEXTS]
    assert corpus.n_tokens == 5 + 5 + 4 + 5


@pytest.mark.parametrize("limit", [1, 3, 4, 9])
def test_eval_limit_takes_the_first_sequences(tokenizer, limit):
    documents = corpus_of(TEXTS, tokenizer, eval_limit=limit)
    assert [tokenizer.decode(sequence) for sequence in documents.sequences] == TEXTS[:limit]
    windows = corpus_of(TEXTS, tokenizer, packing="windows", max_length=5, eval_limit=limit)
    joined = "\n\n".join(TEXTS)
    assert [tokenizer.decode(s) for s in windows.sequences] == [
        joined[5 * i : 5 * i + 5] for i in range(min(limit, 10))
    ]


def test_a_text_too_short_to_predict_is_refused_by_number(tokenizer):
    with pytest.raises(RequestError, match=r"text 2 of here \('x'\) is too short to predict a token"):
        corpus_of(["long enough", "x", "also long"], tokenizer)


def test_a_short_text_beyond_the_limit_is_no_matter(tokenizer):
    assert len(corpus_of(["long enough", "x"], tokenizer, eval_limit=1).sequences) == 1


# windows


def test_windows_are_disjoint_of_equal_length_and_the_tail_is_dropped(tokenizer):
    joined = "\n\n".join(TEXTS)  # 52 bytes
    corpus = corpus_of(TEXTS, tokenizer, packing="windows", max_length=20)
    assert len(joined) == 52
    assert [tokenizer.decode(sequence) for sequence in corpus.sequences] == [joined[:20], joined[20:40]]
    assert corpus.n_tokens == 2 * 19


def test_a_text_that_fits_exactly_has_no_tail(tokenizer):
    corpus = corpus_of(["abcdef"], tokenizer, packing="windows", max_length=3)
    assert [tokenizer.decode(sequence) for sequence in corpus.sequences] == ["abc", "def"]


def test_too_little_for_one_window_is_refused(tokenizer):
    with pytest.raises(RequestError, match="here has 3 tokens, too few for one window of 4; lower --max-length"):
        corpus_of(["abc"], tokenizer, packing="windows", max_length=4)


def test_a_one_letter_text_is_welcome_in_windows(tokenizer):
    assert len(corpus_of(["x", "y"], tokenizer, packing="windows", max_length=4).sequences) == 1


# the model's limits and the tokenizer's habits


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_more_tokens_than_positions_are_refused(tokenizer, packing):
    options = CorpusOptions(packing=packing, max_length=17)
    with pytest.raises(RequestError, match="--max-length 17 is more than the 16 positions of the model"):
        tokenize(Texts(TEXTS, "here"), tokenizer, options, 16)
    at_the_limit = CorpusOptions(packing=packing, max_length=16)
    assert tokenize(Texts(TEXTS, "here"), tokenizer, at_the_limit, 16).n_tokens > 0


def with_bos():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<s>"})
    post = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])
    tokenizer.backend_tokenizer.post_processor = post
    return tokenizer


def test_a_bos_token_makes_the_first_real_token_predicted():
    tokenizer = with_bos()
    corpus = corpus_of(["abc", "x"], tokenizer)
    assert [sequence[0].item() for sequence in corpus.sequences] == [tokenizer.bos_token_id] * 2
    assert corpus.n_tokens == 3 + 1


def test_a_bos_token_counts_towards_max_length():
    assert [len(s) for s in corpus_of(["abcdef"], with_bos(), max_length=4).sequences] == [4]


def decoded(corpus, tokenizer):
    return [tokenizer.decode(sequence) for sequence in corpus.sequences]


def test_each_window_begins_with_the_bos_token_where_the_tokenizer_puts_one():
    tokenizer, options = with_bos(), {"packing": "windows", "max_length": 4}
    auto = corpus_of(["abc", "de"], tokenizer, **options)
    assert decoded(auto, tokenizer) == ["<s>abc", "<s>\n\nd"]
    assert (auto.metadata["window_bos"], auto.n_tokens) == (True, 6)
    always = corpus_of(["abc", "de"], tokenizer, window_bos="always", **options)
    assert always.metadata == auto.metadata
    never = corpus_of(["abc", "de"], tokenizer, window_bos="never", **options)
    assert decoded(never, tokenizer) == ["<s>abc", "\n\nde"]  # as the tokenizer begins the joined text
    assert never.metadata["window_bos"] is False


def test_windows_without_a_bos_token_are_as_they_are(tokenizer):
    options = {"packing": "windows", "max_length": 4}
    auto = corpus_of(["abc", "de"], tokenizer, **options)
    assert decoded(auto, tokenizer) == ["abc\n"]
    assert auto.metadata == corpus_of(["abc", "de"], tokenizer, window_bos="never", **options).metadata
    with pytest.raises(RequestError, match="--window-bos always: the model's tokenizer has no BOS token"):
        corpus_of(["abc", "de"], tokenizer, window_bos="always", **options)
    with pytest.raises(RequestError, match="--window-bos never is for --packing windows"):
        corpus_of(["abc", "de"], tokenizer, window_bos="never")


def test_windows_carry_the_text_that_they_begin_in(tokenizer):
    texts = ["ab", "c" * 20, "d" * 9]
    corpus = corpus_of(texts, tokenizer, packing="windows", max_length=6)
    assert decoded(corpus, tokenizer)[:2] == ["ab\n\ncc", "cccccc"]
    assert corpus.clusters.tolist() == [0, 1, 1, 1, 1]  # the last begins with the line breaks behind the second text
    assert corpus_of(texts, tokenizer).clusters is None


# what is lost is said


def test_a_long_text_is_cut_with_a_warning_that_names_windows(tokenizer):
    corpus = corpus_of(["a" * 100, "b" * 10], tokenizer, max_length=20)
    assert corpus.metadata["n_tokens_cut"] == 80
    (warning,) = corpus.warnings
    assert "80 of the 110 tokens of here are not measured" in warning
    assert "--packing windows" in warning


def test_one_percent_of_the_tokens_is_cut_without_a_warning(tokenizer):
    corpus = corpus_of(["a" * 100, "b" * 101], tokenizer, max_length=100)
    assert (corpus.metadata["n_tokens_cut"], corpus.warnings) == (1, [])


def test_the_tail_of_windows_is_counted(tokenizer):
    assert corpus_of(["a" * 25], tokenizer, packing="windows", max_length=20).metadata["n_tokens_cut"] == 5
    limited = corpus_of(["a" * 45], tokenizer, packing="windows", max_length=20, eval_limit=1)
    assert (limited.metadata["n_tokens_cut"], limited.warnings) == (0, [])


def test_dropped_rows_are_warned_about(tokenizer):
    corpus = tokenize(Texts(["one text"], "here", n_empty=1, n_dropped=2), tokenizer, CorpusOptions())
    assert corpus.warnings == ["2 of 4 rows of here have no text and are left out"]
    assert "4 read, 1 empty, 2 without text, 1 texts" in corpus.summary


@pytest.mark.parametrize(("positions", "length"), [(16, 16), (4096, 512), (None, 512)])
def test_the_default_length_is_what_the_model_takes_at_most_512(tokenizer, positions, length):
    corpus = tokenize(Texts(["a" * 600], "here"), tokenizer, CorpusOptions(), positions)
    assert (len(corpus.sequences[0]), corpus.metadata["max_length"]) == (length, length)
    assert f"at most {length} tokens" in corpus.summary


# special tokens inside texts, and chats


def with_special_tokens():
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<|endoftext|>"})
    return tokenizer


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_a_special_token_inside_a_text_is_text_unless_asked_for(packing):
    tokenizer, options = with_special_tokens(), {"packing": packing, "max_length": 6}
    as_text = corpus_of(["one<|endoftext|>two"], tokenizer, **options)
    assert tokenizer.eos_token_id not in as_text.sequences[0]
    parsed = corpus_of(["one<|endoftext|>two"], tokenizer, parse_special_tokens=True, **options)
    assert parsed.sequences[0][3] == tokenizer.eos_token_id
    said = [corpus.metadata["special_tokens_in_texts"] for corpus in (as_text, parsed)]
    assert said == ["text", "parsed"]
    plain = [corpus_of(TEXTS, tokenizer, parse_special_tokens=parse, **options) for parse in (False, True)]
    assert plain[0].metadata["corpus_sha256"] == plain[1].metadata["corpus_sha256"]


def test_reading_special_tokens_as_text_changes_no_fingerprint():
    tokenizer = with_special_tokens()
    before = tokenizer_digest(tokenizer)
    corpus_of(["<|endoftext|>"], tokenizer)
    assert tokenizer_digest(tokenizer) == before


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}<|endoftext|>{% endfor %}"


def chats_file(folder, chats):
    path = folder / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats), encoding="utf-8")
    return CorpusOptions(dataset=str(path), text_column="messages")


@pytest.mark.parametrize("packing", ["documents", "windows"])
def test_chats_are_rendered_by_the_chat_template(tmp_path, packing):
    tokenizer, options = with_special_tokens(), chats_file(tmp_path, [CHAT])
    tokenizer.chat_template = TEMPLATE
    options = dataclasses.replace(options, packing=packing, max_length=20)
    corpus = tokenize(read_texts(options), tokenizer, options)
    rendered = "user: Hi<|endoftext|>assistant: Hello<|endoftext|>"
    (ids,) = corpus.sequences
    assert ids.tolist() == tokenizer(rendered, split_special_tokens=False).input_ids[:20]
    assert (ids == tokenizer.eos_token_id).sum() == 1
    assert corpus.metadata["rendered_by"] == "the tokenizer's chat template"
    assert "chat template" in corpus.summary


def test_chats_that_cannot_be_rendered_are_refused(tmp_path):
    tokenizer = with_special_tokens()
    options = chats_file(tmp_path, [CHAT])
    with pytest.raises(RequestError, match="holds chats, and the model's tokenizer has no chat template"):
        tokenize(read_texts(options), tokenizer, options)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(RequestError, match=r"template refuses text 1 of .*: roles must alternate"):
        tokenize(read_texts(options), tokenizer, options)
    tokenizer.chat_template = TEMPLATE
    options = chats_file(tmp_path, [[{"role": "user", "content": "<|endoftext|>"}]])
    with pytest.raises(RequestError, match=r"has the special token <\|endoftext\|> inside a message"):
        tokenize(read_texts(options), tokenizer, options)
    parse = dataclasses.replace(options, parse_special_tokens=True)
    (ids,) = tokenize(read_texts(parse), tokenizer, parse).sequences
    assert (ids == tokenizer.eos_token_id).sum() == 2


# what the manifest says


def test_the_hash_sees_where_sequences_end():
    a = [torch.tensor([1, 2, 3]), torch.tensor([4, 5])]
    b = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    assert hash_sequences(a) != hash_sequences(b)
    assert hash_sequences(a) != hash_sequences(a[::-1])
    assert hash_sequences(a) == hash_sequences([sequence.clone() for sequence in a])


def test_the_hash_of_a_window_is_that_of_its_own_tokens_only():
    whole = torch.arange(8)
    assert hash_sequences(list(whole.view(2, 4))) == hash_sequences([whole[:4].clone(), whole[4:].clone()])


def test_the_facts_tell_text_and_tokens_apart(tokenizer):
    documents, windows = corpus_of(TEXTS, tokenizer), corpus_of(TEXTS, tokenizer, packing="windows", max_length=9)
    assert documents.metadata["text_sha256"] == windows.metadata["text_sha256"]
    assert documents.metadata["corpus_sha256"] != windows.metadata["corpus_sha256"]
    assert documents.metadata["corpus_sha256"] == corpus_of(TEXTS, tokenizer).metadata["corpus_sha256"]
    changed = corpus_of([*TEXTS[:-1], "and the fourth of thex"], tokenizer)
    assert changed.metadata["text_sha256"] != documents.metadata["text_sha256"]
    assert changed.metadata["corpus_sha256"] != documents.metadata["corpus_sha256"]


def test_n_tokens_is_what_is_predicted():
    assert Corpus([torch.zeros(2), torch.zeros(5)], {}).n_tokens == 1 + 4
