import json
import re
from collections import Counter
from importlib import resources

import pytest
from llm_perturb.evaluation.corpus import CorpusOptions, read_texts

FOLDER = resources.files("llm_perturb") / "data"
RUN = 8  # words in a row that two independent passages never share


def read_lines(name):
    return (FOLDER / name).read_text(encoding="utf-8").split("\n")


def read_transfer():
    return [json.loads(line) for line in read_lines("transfer_texts.jsonl")[:-1]]


def word_runs(text):
    words = re.findall(r"[\w']+", text.lower())
    return {tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)}


@pytest.mark.parametrize("name", ["eval_texts.txt", "judging_texts.txt"])
def test_each_text_file_holds_120_passages(name):
    *passages, after_the_last = read_lines(name)
    assert after_the_last == ""
    assert len(passages) == 120
    assert all(passage.strip() == passage and len(passage) > 300 for passage in passages)


def test_the_judging_passages_are_as_long_as_the_scoring_ones():
    lengths = {
        name: [len(line.split()) for line in read_lines(name)[:-1]] for name in ("eval_texts.txt", "judging_texts.txt")
    }
    scoring, judging = lengths["eval_texts.txt"], lengths["judging_texts.txt"]
    assert min(scoring) <= min(judging) and max(judging) <= max(scoring)
    assert abs(sum(judging) - sum(scoring)) < 0.02 * sum(scoring)


def test_the_transfer_texts_are_40_of_four_kinds():
    texts = read_transfer()
    assert all(text.keys() == {"text", "kind"} and len(text["text"]) > 100 for text in texts)
    assert Counter(text["kind"] for text in texts) == {"code": 12, "dialogue": 10, "language": 10, "table": 8}


def test_no_passage_occurs_twice():
    passages = read_lines("eval_texts.txt")[:-1] + read_lines("judging_texts.txt")[:-1]
    passages += [text["text"] for text in read_transfer()]
    assert len({" ".join(passage.lower().split()) for passage in passages}) == 280


def test_scoring_and_judging_passages_share_no_run_of_words():
    scoring, judging = (
        set().union(*map(word_runs, read_lines(name))) for name in ("eval_texts.txt", "judging_texts.txt")
    )
    assert len(scoring) > 8000 and len(judging) > 8000
    assert scoring & judging == set()


def test_the_files_are_read_by_the_commands(monkeypatch, tmp_path):
    from datasets import config

    monkeypatch.setattr(config, "HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    judging = read_texts(CorpusOptions(data_file=str(FOLDER / "judging_texts.txt"))).texts
    assert judging == read_lines("judging_texts.txt")[:-1]
    transfer = read_texts(CorpusOptions(dataset=str(FOLDER / "transfer_texts.jsonl"))).texts
    assert transfer == [text["text"] for text in read_transfer()]
