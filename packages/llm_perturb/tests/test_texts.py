"""Local files of texts: every text is the string that stands in the file."""

import gzip
import json
import os

import pandas as pd
import pytest
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.corpus import CorpusOptions
from llm_perturb.evaluation.texts import Texts, read_texts

WORDS = ["NA", "None", "null", "1.50", "nan", "a word"]


def dataset(path, **options):
    return read_texts(CorpusOptions(dataset=str(path), **options))


@pytest.mark.parametrize(("name", "between"), [("rows.csv", ","), ("ROWS.CSV", ","), ("rows.tsv", "\t")])
def test_words_that_tables_take_for_nothing_are_texts(tmp_path, name, between):
    path = tmp_path / name
    path.write_text("\n".join(between.join(row) for row in [("id", "text"), *(("7", word) for word in WORDS)]) + "\n")
    assert dataset(path) == Texts(WORDS, str(path))


def test_a_folder_of_tables_keeps_them_too(tmp_path):
    (tmp_path / "test.csv").write_text("\n".join(["text", *WORDS]) + "\n")
    assert dataset(tmp_path).texts == WORDS


def test_a_cell_in_quotes_is_one_text(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufefftext,id\r\n"two lines,\r\nand ""quotes""",1\r\nplain,2\r\n'.encode())
    assert dataset(path).texts == ['two lines,\r\nand "quotes"', "plain"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("text,id\none,1,2\n", "line 2 has 3 cells where the header has 2"),
        ('text,id\n"never closed,1\n', "unexpected end of data"),
        ("text,text\na,b\n", "2 columns 'text'"),
    ],
)
def test_a_damaged_table_is_refused(tmp_path, content, complaint):
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(RequestError, match=f"rows.csv cannot be loaded: .*{complaint}"):
        dataset(tmp_path / "rows.csv")


def test_strings_and_numbers_of_json_are_as_written(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"text": "null"}\n{"text": 1.50}\n{"text": "NA"}\n{"text": 7e2}\n')
    assert dataset(path).texts == ["null", "1.50", "NA", "7e2"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"text": true}', "text 1 of .* is no text but a value of type bool"),
        ('{"text": "a", "text": "b"}', "line 1: it has the key 'text' twice"),
        ('{"text": "a"}\n{"text": ', "line 2: Expecting value"),
        ('"a"', "row 1 is no object"),
        ('{"text": "\\ud800"}', "half of a surrogate pair at character 0"),
        ('{"text": ["a"]}', "a list, but not of messages"),
        ('{"text": []}', "a chat without messages"),
        ('{"text": "a"}\n{"text": [{"role": "user", "content": "b"}]}', "1 chats among 1 texts"),
    ],
)
def test_json_that_holds_no_plain_text_is_refused(tmp_path, content, complaint):
    (tmp_path / "data.jsonl").write_text(content + "\n")
    with pytest.raises(RequestError, match=complaint):
        dataset(tmp_path / "data.jsonl")


@pytest.mark.parametrize("name", ["data.txt", "data.TXT", "data.txt.gz", "data.jsonl.gz", "data.JSON", "data.csv.gz"])
def test_a_byte_order_mark_is_no_part_of_a_text_in_any_reader(tmp_path, name):
    rows = '{"text": "first"}\n{"text": "second"}\n'
    content = {"t": "first\nsecond\n", "c": "text\nfirst\nsecond\n", "j": rows}[name.lower()[5]]
    encoded = ("\ufeff" + content).encode()
    (tmp_path / name).write_bytes(gzip.compress(encoded) if name.endswith("gz") else encoded)
    assert dataset(tmp_path / name).texts == ["first", "second"]


def test_data_file_reads_compressed_lines_and_no_table(tmp_path):
    (tmp_path / "data.txt.gz").write_bytes(gzip.compress("\ufeffone\r\ntwo\n".encode()))
    assert read_texts(CorpusOptions(data_file=str(tmp_path / "data.txt.gz"))).texts == ["one", "two"]
    with pytest.raises(RequestError, match=r"data\.csv is a table.*give it with --dataset"):
        read_texts(CorpusOptions(data_file=str(tmp_path / "data.csv")))


@pytest.mark.parametrize("name", ["data.jsonl", "data.csv", "data.parquet", "folder/test.jsonl"])
def test_a_changed_file_with_the_old_time_stamp_gives_the_new_text(tmp_path, name):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    for text in ("old", "new"):
        if name.endswith("parquet"):
            pd.DataFrame({"text": [text]}).to_parquet(path)
        else:
            path.write_text(f"text\n{text}\n" if name.endswith("csv") else json.dumps({"text": text}) + "\n")
        os.utime(path, (10**9, 10**9))
        assert dataset(path.parent if name.startswith("folder") else path).texts == [text]


@pytest.mark.parametrize("content", ["", "\n\n", " \n"])
@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.txt"])
def test_an_empty_file_is_named(tmp_path, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(RequestError, match=f"{name} holds no text"):
        dataset(tmp_path / name)


@pytest.mark.parametrize("content", ["", "\n\n", "text\n", "text\n\n \n"])
def test_an_empty_table_is_named(tmp_path, content):
    (tmp_path / "data.csv").write_text(content)
    with pytest.raises(RequestError, match=r"data\.csv holds no text"):
        dataset(tmp_path / "data.csv")


def test_a_split_of_a_local_file_is_refused(tmp_path):
    (tmp_path / "data.txt").write_text("a text\n")
    for option in ("dataset", "data_file"):
        options = {option: str(tmp_path / "data.txt")}
        with pytest.raises(RequestError, match=r"--split train does not apply to the file .*data\.txt"):
            read_texts(CorpusOptions(split="train", **options))
        with pytest.raises(RequestError, match="--dataset-config x does not apply"):
            read_texts(CorpusOptions(dataset_config="x", **options))


def test_what_is_empty_and_what_is_missing_are_counted(tmp_path):
    path = tmp_path / "gaps.jsonl"
    path.write_text('{"text": "one"}\n{"text": null}\n{"id": 3}\n{"text": " "}\n{"text": "two"}\n')
    assert dataset(path) == Texts(["one", "two"], str(path), n_empty=1, n_dropped=2)


def test_the_innermost_cause_of_datasets_is_what_the_line_says(tmp_path):
    (tmp_path / "test.jsonl").write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(RequestError, match="JSON") as caught:
        dataset(tmp_path)
    assert "rror occurred while generating" not in str(caught.value)


def test_a_missing_file_is_said_to_be_missing(tmp_path):
    with pytest.raises(RequestError, match=r"gone\.jsonl: no such file"):
        dataset(tmp_path / "gone.jsonl")
