import csv
import math
import struct
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bridge.exchange.atomic_file import atomic_path, write_json, write_text
from bridge.exchange.errors import RequestError
from bridge.exchange.tables import TOP_WEIGHTS, Table, read_table, write_table

HIDDEN = ["\x1b[31m", "\n", "\t", "\x00", "\x7f", "\x9b", "\u202e", "\u2066", "\u2028", "\u200b", "\ufeff"]
TABLE = Table("things", {"name": "str", "n": "int", "seed": "int?", "x": "float"})


def things(**columns) -> pd.DataFrame:
    return pd.DataFrame({"name": ["a", "b"], "n": [1, 2], "seed": [0, None], "x": [0.5, None]} | columns)


def bits(numbers) -> list[bytes]:
    return [struct.pack("<d", number) for number in numbers]


def test_a_folder_of_a_files_name_stays(tmp_path):
    (tmp_path / "a.csv").mkdir()
    with pytest.raises(RequestError, match=r"a.csv cannot be written: it is a folder; move it away"):
        write_text(tmp_path / "a.csv", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


def test_floats_come_back_bit_for_bit(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 2**63, size=3000, dtype=np.uint64) | (rng.integers(0, 2, 3000, dtype=np.uint64) << 63)
    values = raw.view(np.float64)
    values = np.concatenate([values[np.isfinite(values)], [0.1, 1 / 3, 5e-324, -0.0, 1.7976931348623157e308]])
    frame = pd.DataFrame({"name": "a", "n": 1, "seed": 0, "x": values})
    write_table(tmp_path / "t.csv", frame, TABLE)
    assert bits(read_table(tmp_path / "t.csv", TABLE)["x"]) == bits(values)


def test_float32_scores_come_back_bit_for_bit(tmp_path):
    values = np.random.default_rng(0).standard_normal(500).astype(np.float32)
    write_table(tmp_path / "t.csv", pd.DataFrame({"name": "a", "n": 1, "seed": 0, "x": values}), TABLE)
    assert (read_table(tmp_path / "t.csv", TABLE)["x"].astype(np.float32).to_numpy() == values).all()


def test_nan_infinity_and_missing_numbers(tmp_path):
    write_table(tmp_path / "t.csv", things(x=[math.inf, -math.inf]), TABLE)
    assert read_table(tmp_path / "t.csv", TABLE)["x"].tolist() == [math.inf, -math.inf]
    write_table(tmp_path / "t.csv", things(), TABLE)
    back = read_table(tmp_path / "t.csv", TABLE)
    assert math.isnan(back["x"][1])
    assert back["seed"].tolist() == [0, pd.NA]
    assert str(back["seed"].dtype) == "Int64"


def test_text_stays_text(tmp_path):
    names = ["null", "NA", "007", "1e5", "", 'a,"b";$(c)', "ünï", "no\u00a0break", "می\u200cخواهم"]
    write_table(tmp_path / "t.csv", pd.DataFrame({"name": names, "n": 1, "seed": 0, "x": 0.0}), TABLE)
    assert read_table(tmp_path / "t.csv", TABLE)["name"].tolist() == names


@pytest.mark.parametrize("hidden", HIDDEN)
@pytest.mark.parametrize("column", ["name", "of no table"])
def test_names_that_are_not_printable_are_refused(tmp_path, column, hidden):
    frame = things(**{"of no table": ["x", "y"]})
    frame[column] = ["plain", f"layer{hidden}.3"]
    frame.to_csv(tmp_path / "{t}.csv", index=False, quoting=csv.QUOTE_ALL)
    with pytest.raises(RequestError, match=r"line [34]: column (name|of no table) 'layer.*a character that") as refused:
        read_table(tmp_path / "{t}.csv", TABLE)
    assert str(refused.value).isprintable()
    assert f"'layer{hidden.encode('unicode_escape').decode()}.3'" in str(refused.value)


def test_the_name_of_a_column_is_printable_too(tmp_path):
    write_table(tmp_path / "t.csv", things(**{"score_\x1b[2J": 1.0}), TABLE)
    with pytest.raises(RequestError, match=r"column 'score_\\x1b\[2J' has a character that is not printable"):
        read_table(tmp_path / "t.csv", TABLE)


def test_columns_are_in_the_order_of_the_table_and_others_follow(tmp_path):
    frame = things()[["x", "seed", "n", "name"]].assign(in_top_5=[3, 2])
    write_table(tmp_path / "t.csv", frame, TABLE)
    assert (tmp_path / "t.csv").read_text().splitlines()[0] == "name,n,seed,x,in_top_5"
    assert read_table(tmp_path / "t.csv", TABLE)["in_top_5"].tolist() == [3, 2]


def test_a_frame_without_a_column_is_a_defect(tmp_path):
    with pytest.raises(AssertionError, match=r"things lack \['seed'\]"):
        write_table(tmp_path / "t.csv", things().drop(columns="seed"), TABLE)
    assert list(tmp_path.iterdir()) == []


def test_every_cut_of_a_file_is_refused_or_leaves_whole_rows(tmp_path):
    frame = pd.DataFrame(
        {"rank": [1, 2], "layer": "h.0", "parameter": "h.0.weight", "row": [3, 4], "col": [5, 6]}
        | {"value": [0.25, -0.125], "score": [0.12345, 0.0123]}
    )
    path = tmp_path / "t.csv"
    write_table(path, frame, TOP_WEIGHTS)
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    row_ends = {len(lines[0]) + len(lines[1]), len(whole)}
    for size in range(len(whole) + 1):
        path.write_bytes(whole[:size])
        if size in row_ends:
            assert len(read_table(path, TOP_WEIGHTS)) == (2 if size == len(whole) else 1)
        else:
            with pytest.raises(RequestError, match=r"t\.csv"):
                read_table(path, TOP_WEIGHTS)


def test_file_of_a_spreadsheet_reads_the_same(tmp_path):
    (tmp_path / "t.csv").write_bytes("\ufeffname,n,seed,x\r\na,1,,0.5\r\n".encode())
    assert read_table(tmp_path / "t.csv", TABLE).iloc[0].tolist() == ["a", 1, pd.NA, 0.5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read as a CSV of things"),
        ("name,n,seed,x\n", "holds no rows of things"),
        ("name,n,seed,x,n\na,1,0,0.5,1\n", "has the column n twice"),
        ("name,n,x\na,1,0.5\n", "lacks the column seed of things"),
        ("name;n;seed;x\na;1;0;0.5\n", "lacks the columns name, n, seed, x of things"),
        ("name,n,seed,x\na,1,0,0.5\nb,one,0,0.5\n", "line 3: column n should be a whole number of 64 bits, not 'one'"),
        ("name,n,seed,x\na,1.5,0,0.5\n", r"line 2: column n should be a whole number of 64 bits, not '1\.5'"),
        ("name,n,seed,x\na,,0,0.5\n", "line 2: column n should be a whole number of 64 bits"),
        ("name,n,seed,x\na,inf,0,0.5\n", "line 2: column n should be a whole number of 64 bits"),
        (
            "name,n,seed,x\na,1,0.5,0.5\n",
            "column seed should be a whole number of 64 bits, or empty, not '0.5'",
        ),
        ("name,n,seed,x\na,9223372036854775808,0,0.5\n", "column n should be a whole number of 64 bits, not '92233"),
        ("name,n,seed,x\na,1e30,0,0.5\n", "line 2: column n should be a whole number of 64 bits, not '1e30'"),
        ("name,n,seed,x\na,1,-inf,0.5\n", "line 2: column seed should be a whole number of 64 bits, or empty"),
        ("name,n,seed,x\na,1,0,x\n", "line 2: column x should be a number, not 'x'"),
        ("name,n,seed,x\na,1,0\n", "line 2 has 3 fields, the header 4"),
        ("name,n,seed,x\na,1,0,0.5,7\n", "line 2 has 5 fields, the header 4"),
    ],
)
def test_wrong_file(tmp_path, text, message):
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(RequestError, match=message):
        read_table(tmp_path / "t.csv", TABLE)


def test_missing_file_folder_and_binary(tmp_path):
    with pytest.raises(RequestError, match="no such file"):
        read_table(tmp_path / "none.csv", TABLE)
    with pytest.raises(RequestError, match="no such file"):
        read_table(tmp_path, TABLE)
    (tmp_path / "t.csv").write_bytes(bytes(range(256)))
    with pytest.raises(RequestError, match="cannot be read"):
        read_table(tmp_path / "t.csv", TABLE)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def half() -> None:
        with atomic_path(path) as temporary:
            temporary.write_text("ne")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        half()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"a": object()})
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
    assert path.read_text() == "old"


@pytest.mark.parametrize("text", ["0", "-1", "1.01", "nan", "", "x"])
def test_a_probability_is_above_0_and_at_most_1(tmp_path, text):
    table = Table("draws", {"name": "str", "p": "probability"})
    (tmp_path / "t.csv").write_text(f"name,p\na,1\nb,{text}\n")
    with pytest.raises(RequestError, match="t.csv, line 3: column p should be a number above 0 and at most 1, not"):
        read_table(tmp_path / "t.csv", table)


def test_columns_that_may_follow_have_their_type(tmp_path):
    table = Table("rows", {"name": "str"}, further={"col": "int?"})
    (tmp_path / "t.csv").write_text("name,col\na,\nb,2\n")
    assert read_table(tmp_path / "t.csv", table)["col"].dtype == "Int64"
    (tmp_path / "t.csv").write_text('name,col\na,"b,c"\n')
    with pytest.raises(RequestError, match=r"column col should be a whole number of 64 bits, or empty, not 'b,c'"):
        read_table(tmp_path / "t.csv", table)


def test_a_folder_called_like_the_home_folder_is_not_it(tmp_path, monkeypatch):
    (tmp_path / "~").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    write_table(Path("~/t.csv"), pd.DataFrame({"name": ["a"]}), Table("rows", {"name": "str"}))
    assert (tmp_path / "~" / "t.csv").read_text() == "name\na\n"
