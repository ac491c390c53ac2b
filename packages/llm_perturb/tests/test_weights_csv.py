import csv

import pytest
import torch
from bridge.exchange.errors import RequestError
from llm_perturb.evaluation.parameters import layer_of, match, named_parameters
from llm_perturb.selection import Target
from llm_perturb.weights_csv import csv_label, hash_file, read_weight_list
from tiny_models import build

HEADER = ["rank", "layer", "parameter", "row", "col", "value", "score"]
QKV = "gpt_neox.layers.1.attention.query_key_value.weight"  # (24, 8)
DOWN = "gpt_neox.layers.0.mlp.dense_4h_to_h.weight"  # (8, 20)


@pytest.fixture(scope="module")
def neox():
    return build("neox")


def row_of(model, name, row, col, score, /, **changes):
    """A line of a discovery's CSV for one weight of the model, with some fields falsified."""
    value = model.get_parameter(name)[row] if col == "" else model.get_parameter(name)[row, col]
    fields = {"rank": 1, "layer": layer_of(name), "parameter": name, "row": row, "col": col, "value": value.item()}
    return fields | {"score": score} | changes


def write(folder, rows, name="top_5_weights_grad_x_weight.csv", header=HEADER):
    path = folder / name
    with path.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, header, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return str(path)


def target_of(model, layer):
    named = named_parameters(model)
    return Target(layer, {name: named[name] for name in match(model, layer)})


def test_rows_become_flat_indices_of_the_stored_tensor(neox, tmp_path):
    rows = [row_of(neox, QKV, 3, 5, 0.5), row_of(neox, DOWN, 7, 19, 0.25), row_of(neox, QKV, 0, 0, 0.75)]
    found = read_weight_list(write(tmp_path, rows), named_parameters(neox))
    assert found.names.tolist() == [QKV, DOWN, QKV]
    assert found.indices.tolist() == [3 * 8 + 5, 7 * 20 + 19, 0]
    assert found.scores.tolist() == [0.5, 0.25, 0.75]


def test_conv1d_rows_and_columns_are_those_of_the_stored_tensor(tmp_path):
    """c_fc is stored (in, out) = (8, 20): column 19 exists and row 19 does not."""
    model, name = build("gpt2"), "transformer.h.1.mlp.c_fc.weight"
    found = read_weight_list(write(tmp_path, [row_of(model, name, 2, 19, 1.0)]), named_parameters(model))
    assert model.get_parameter(name).view(-1)[found.indices[0]] == model.get_parameter(name)[2, 19]
    turned = row_of(model, name, 2, 19, 1.0, row=19, col=2)
    with pytest.raises(RequestError, match=r"line 2: outside of transformer\.h\.1\.mlp\.c_fc\.weight.*\(8, 20\)"):
        read_weight_list(write(tmp_path, [turned]), named_parameters(model))


def test_a_vector_has_no_column(tmp_path):
    model, name = build("gpt2"), "transformer.h.1.ln_1.bias"
    path = write(tmp_path, [row_of(model, name, 6, "", 1.0), row_of(model, "transformer.wpe.weight", 2, 1, 0.5)])
    found = read_weight_list(path, named_parameters(model))
    assert found.indices.tolist() == [6, 17]


def test_a_column_of_a_vector_is_out_of_range(tmp_path):
    model, name = build("gpt2"), "transformer.h.1.ln_1.bias"
    with pytest.raises(RequestError, match="line 2: outside of"):
        read_weight_list(write(tmp_path, [row_of(model, name, 6, "", 1.0, col=1)]), named_parameters(model))


def test_a_matrix_without_a_column_is_refused_not_taken_for_column_0(neox, tmp_path):
    path = write(tmp_path, [row_of(neox, QKV, 3, 0, 1.0, col="")])
    with pytest.raises(RequestError, match="line 2"):
        read_weight_list(path, named_parameters(neox))


@pytest.mark.parametrize("missing", ["parameter", "row", "col", "value", "score"])
def test_a_missing_column_is_refused(neox, tmp_path, missing):
    path = write(tmp_path, [row_of(neox, QKV, 0, 0, 1.0)], header=[column for column in HEADER if column != missing])
    with pytest.raises(RequestError, match=f"lacks the column {missing}"):
        read_weight_list(path, named_parameters(neox))


def test_an_unknown_parameter_is_refused_with_its_line(neox, tmp_path):
    rows = [row_of(neox, QKV, 0, 0, 1.0), row_of(neox, QKV, 0, 1, 0.5, parameter="gpt_neox.layers.9.mlp.weight")]
    with pytest.raises(RequestError, match=r"line 3: the model has no parameter 'gpt_neox\.layers\.9\.mlp\.weight'"):
        read_weight_list(write(tmp_path, rows), named_parameters(neox))


@pytest.mark.parametrize(("row", "col"), [(24, 0), (0, 8), (-1, 0), (0, -1), (10**12, 0), (2, 80)])
def test_rows_and_columns_out_of_range_are_refused(neox, tmp_path, row, col):
    rows = [row_of(neox, QKV, 0, 0, 1.0), row_of(neox, QKV, 0, 0, 0.5, row=row, col=col)]
    with pytest.raises(RequestError, match=r"line 3: outside of .*, whose shape is \(24, 8\)"):
        read_weight_list(write(tmp_path, rows), named_parameters(neox))


def test_a_value_of_another_model_is_refused_with_its_line(neox, tmp_path):
    rows = [row_of(neox, QKV, 0, 0, 1.0), row_of(neox, QKV, 0, 1, 0.5)]
    rows[1]["value"] *= -1
    with pytest.raises(
        RequestError, match=r"line 3: the weight is .* there and .* made from another model or revision"
    ):
        read_weight_list(write(tmp_path, rows), named_parameters(neox))


@pytest.mark.parametrize("factor", [1.02, 0.98])
def test_a_value_two_percent_off_is_another_model_too(neox, tmp_path, factor):
    line = row_of(neox, QKV, 0, 0, 1.0)
    line["value"] *= factor
    with pytest.raises(RequestError, match="another model or revision"):
        read_weight_list(write(tmp_path, [line]), named_parameters(neox))


@pytest.mark.parametrize("value", ["", "nan"])
def test_a_missing_value_is_refused(neox, tmp_path, value):
    path = write(tmp_path, [row_of(neox, QKV, 0, 0, 1.0, value=value)])
    with pytest.raises(RequestError, match="another model or revision"):
        read_weight_list(path, named_parameters(neox))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_list_made_in_another_dtype_is_welcome(neox, tmp_path, dtype):
    narrow = build("neox", dtype)
    rows = [row_of(narrow, QKV, r, c, 1.0) for r in range(24) for c in range(8)]
    assert len(read_weight_list(write(tmp_path, rows), named_parameters(neox)).indices) == 192
    rows = [row_of(neox, QKV, r, c, 1.0) for r in range(24) for c in range(8)]
    assert len(read_weight_list(write(tmp_path, rows), named_parameters(narrow)).indices) == 192


@pytest.mark.parametrize("score", ["", "nan", "inf", "-inf"])
def test_a_score_that_is_not_finite_is_refused(neox, tmp_path, score):
    path = write(tmp_path, [row_of(neox, QKV, 0, 0, 1.0), row_of(neox, QKV, 0, 1, score)])
    with pytest.raises(RequestError, match="a score is not finite"):
        read_weight_list(path, named_parameters(neox))


def test_a_row_that_is_no_number_is_refused(neox, tmp_path):
    path = write(tmp_path, [row_of(neox, QKV, 0, 0, 1.0, row="first")])
    with pytest.raises(RequestError, match="column row should be a whole number of 64 bits, not 'first'"):
        read_weight_list(path, named_parameters(neox))


def test_an_empty_list_and_a_missing_file_are_refused(neox, tmp_path):
    with pytest.raises(RequestError, match="holds no rows of weights"):
        read_weight_list(write(tmp_path, []), named_parameters(neox))
    with pytest.raises(RequestError, match="no such file"):
        read_weight_list(str(tmp_path / "gone.csv"), named_parameters(neox))


def test_a_weight_listed_twice_counts_once(neox, tmp_path):
    rows = [row_of(neox, QKV, 0, 1, 0.9), row_of(neox, QKV, 0, 1, 0.9), row_of(neox, QKV, 0, 0, 0.5)]
    found = read_weight_list(write(tmp_path, rows), named_parameters(neox)).within(target_of(neox, "ALL"), 2)
    assert found.scores.tolist() == [0.9, 0.5]
    assert len(set(found.positions.tolist())) == 2


def test_within_takes_the_highest_of_the_target_only(neox, tmp_path):
    rows = [
        row_of(neox, QKV, 3, 5, 0.1),
        row_of(neox, DOWN, 7, 19, 0.9),
        row_of(neox, QKV, 1, 1, 0.3),
        row_of(neox, QKV, 0, 2, 0.2),
    ]
    found = read_weight_list(write(tmp_path, rows), named_parameters(neox)).within(target_of(neox, QKV), 2)
    assert found.positions.tolist() == [9, 2]
    assert found.scores.tolist() == [0.3, 0.2]


@pytest.mark.parametrize("name", ["random_3_weights.csv", "bottom_3_weights_obd.csv"])
def test_a_control_list_goes_by_its_ranks(neox, tmp_path, name):
    columns = {7: (0.5, 3), 1: (0.1, 1), 4: (0.9, 2)}  # score, rank
    rows = [row_of(neox, QKV, 2, column, score, rank=rank) for column, (score, rank) in columns.items()]
    found = read_weight_list(write(tmp_path, rows, name), named_parameters(neox)).within(target_of(neox, QKV), 2)
    assert (found.positions % neox.get_parameter(QKV).shape[1]).tolist() == [1, 4]
    assert found.scores.tolist() == [0.1, 0.9]


def test_equal_scores_go_in_model_order_not_in_file_order(neox, tmp_path):
    rows = [row_of(neox, QKV, 2, 0, 1.0), row_of(neox, QKV, 0, 3, 1.0), row_of(neox, DOWN, 5, 5, 1.0)]
    target = target_of(neox, "ALL")
    found = read_weight_list(write(tmp_path, rows), named_parameters(neox)).within(target, 3)
    assert list(target.parameters).index(QKV) > list(target.parameters).index(DOWN)
    starts = target.offsets()
    assert found.positions.tolist() == [starts[DOWN] + 105, starts[QKV] + 3, starts[QKV] + 16]


def test_the_global_top_comes_exactly_from_a_list_per_layer(neox, tmp_path):
    """With at least k rows of every parameter in the file, the k highest of ALL are the global ones."""
    generator, k, rows, everything = torch.Generator().manual_seed(3), 7, [], []
    target = target_of(neox, "ALL")
    for name, start in target.offsets().items():
        weight = target.parameters[name]
        scores = torch.rand(weight.shape, generator=generator, dtype=torch.float64)
        everything += [(-score, start + j) for j, score in enumerate(scores.view(-1).tolist())]
        for j in scores.view(-1).argsort(descending=True)[:k].tolist():
            rows.append(row_of(neox, name, *divmod(j, weight.shape[1]), scores.view(-1)[j].item()))
    path = write(tmp_path, rows, "top_7_per_layer_obd.csv")
    found = read_weight_list(path, named_parameters(neox)).within(target, k)
    assert found.positions.tolist() == [position for _, position in sorted(everything)[:k]]


def test_a_list_without_a_weight_of_the_target_is_refused(neox, tmp_path):
    found = read_weight_list(write(tmp_path, [row_of(neox, QKV, 0, 0, 1.0)]), named_parameters(neox))
    with pytest.raises(RequestError, match="holds no weight of TARGET_LAYER 'lm_head'"):
        found.within(target_of(neox, "lm_head"), 1)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("x/top_100_weights_grad_x_weight.csv", "grad_x_weight"),
        ("x/bottom_100_weights_obd.csv", "bottom_100_weights_obd"),
        ("top_100_per_layer_magnitude.csv", "magnitude"),
        ("top_100_per_layer_grad_x_weight.csv", "grad_x_weight"),
        ("mine.csv", "mine"),
    ],
)
def test_the_label_is_the_metric_of_the_file_name(name, label):
    assert csv_label(name) == label


def test_a_label_is_printable():
    with pytest.raises(RequestError, match=r"file of weights 'my\\x1b\[2J' has a character that is not printable"):
        csv_label("lists/my\x1b[2J.csv")


def test_the_hash_is_that_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert hash_file(str(tmp_path / "a")) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
