import importlib.util
import io
import json
import math
import random
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import fields
from pathlib import Path

import pandas as pd
import pytest
import torch
from bridge.exchange.command_line import flag_table
from bridge.exchange.command_line import flags as flag_reader
from bridge.exchange.errors import RunError
from bridge.exchange.existing_runs import read_manifest
from bridge.exchange.fingerprint import read_fingerprint
from bridge.exchange.run_folder import open_run
from bridge.exchange.tables import LAYER_SUMMARY, SAMPLED_WEIGHTS, STABILITY, TOP_WEIGHTS, read_table
from critical_weight_analysis import run as phase1_module
from critical_weight_analysis.discovery_options import Options
from critical_weight_analysis.hutchinson import hessian_diagonal
from critical_weight_analysis.metrics import METRICS
from llm_perturb.evaluation import models
from llm_perturb.evaluation.perplexity import sequence_losses
from reference import naive_score, naive_sensitivities, naive_top
from safetensors.torch import load_file, save_file
from tiny_models import build, odd_models
from tiny_models.further_families import shared_key_values
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

RUNNER = Path(__file__).parents[1] / "phase1_runner.py"


def load_runner():
    spec = importlib.util.spec_from_file_location("phase1_runner", RUNNER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


runner = load_runner()


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A tiny GPT-NeoX with a tokenizer of 50 words, saved as any checkpoint is."""
    folder = tmp_path_factory.mktemp("checkpoint")
    save(build("neox", torch.float32), folder)
    return folder


def save(model, folder):
    model.save_pretrained(folder)
    vocabulary = {"<unk>": 0} | {f"w{i}": i for i in range(1, 50)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """Twelve texts of 2 to 12 words."""
    draw = random.Random(3)
    lines = [" ".join(f"w{draw.randint(1, 49)}" for _ in range(draw.randint(2, 12))) for _ in range(12)]
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("\n".join(lines))
    return file


def flags(checkpoint, texts, output, *more):
    words = ["--model", checkpoint, "--data-file", texts, "--max-length", 16, "--output", output, *more]
    return [str(word) for word in words]


def phase1(*words):
    """Run the command in this process; returns its exit code."""
    try:
        flag_reader.run(runner.phase1, "phase1_runner.py", list(map(str, words)))
    except SystemExit as stop:
        return stop.code
    return 0


@pytest.fixture(scope="module")
def finished(checkpoint, texts, tmp_path_factory):
    """One run of the script, from another folder: the run's own folder, and what it printed."""
    output, out = tmp_path_factory.mktemp("results"), io.StringIO()
    more = ["--metric", "grad_x_weight", "grad_squared", "--topk", "100", "20", "100", "--eval-limit", "10"]
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out):
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.chdir(output)
        assert phase1(*flags(checkpoint, texts, output / "new", *more)) == 0
    (folder,) = (output / "new").glob("critical_analysis_*")
    return folder, out.getvalue()


@pytest.fixture(scope="module")
def naive(checkpoint, texts):
    """The same model and texts by brute force, in the float32 of the run."""
    loaded = models.load(str(checkpoint), device="cpu")
    sequences = [torch.tensor(loaded.tokenizer(line).input_ids) for line in texts.read_text().splitlines()[:10]]
    return naive_sensitivities(loaded.model, sequences), sequence_losses(loaded.model, sequences)


def test_every_file_is_there_and_no_other(finished):
    folder, _ = finished
    tables = [
        name
        for metric in ("grad_x_weight", "grad_squared")
        for name in (
            *(f"top_{k}_{kind}_{metric}.csv" for k in (20, 100) for kind in ("weights", "per_layer")),
            *(f"bottom_{k}_weights_{metric}.csv" for k in (20, 100)),
            f"layer_summary_{metric}.csv",
        )
    ]
    found = {path.name for path in folder.iterdir()} - {".lock"}
    tables += ["random_20_weights.csv", "random_100_weights.csv", "sampled_weights.csv"]
    assert found == {*tables, "baseline.json", "fingerprint.json", "manifest.json", "analysis.log", "plots"}
    assert len(list((folder / "plots").glob("*.png"))) == 5


@pytest.mark.parametrize("metric", ["grad_x_weight", "grad_squared"])
def test_tables_hold_the_full_sort(finished, naive, metric):
    folder, _ = finished
    sums, _ = naive
    scores = {name: naive_score(metric, sums, name) for name, weight in sums.weight.items() if weight.ndim >= 2}
    for k in (20, 100):
        top = read_table(folder / f"top_{k}_weights_{metric}.csv", TOP_WEIGHTS)
        assert list(top) == list(TOP_WEIGHTS.columns)
        assert top["rank"].tolist() == list(range(1, k + 1))
        expected = naive_top(scores, k)
        assert top["score"].tolist() == pytest.approx([line[3] for line in expected], rel=1e-4)
        same = [tuple(a) == b[:3] for a, b in zip(top[["parameter", "row", "col"]].to_numpy(), expected, strict=True)]
        assert sum(same) >= k - 4  # float32 sums taken in another order may exchange neighbours
        within = read_table(folder / f"top_{k}_per_layer_{metric}.csv", TOP_WEIGHTS)
        assert list(dict.fromkeys(within["parameter"])) == list(scores)
        assert within["parameter"].value_counts().to_dict() == {n: min(k, s.numel()) for n, s in scores.items()}
    summary = read_table(folder / f"layer_summary_{metric}.csv", LAYER_SUMMARY)
    assert list(summary) == [*LAYER_SUMMARY.columns, "in_top_20", "in_top_100"]
    assert summary["parameter"].tolist() == list(scores)
    assert summary["score_sum"].tolist() == pytest.approx([s.sum().item() for s in scores.values()], rel=1e-4)


@pytest.mark.parametrize("metric", ["grad_x_weight", "grad_squared"])
def test_controls_are_not_in_any_top(finished, naive, metric):
    folder, _ = finished
    sums, _ = naive
    scores = {name: -naive_score(metric, sums, name) for name, weight in sums.weight.items() if weight.ndim >= 2}
    keys = ["parameter", "row", "col"]
    for k in (20, 100):
        bottom = read_table(folder / f"bottom_{k}_weights_{metric}.csv", TOP_WEIGHTS)
        expected = [-line[3] for line in naive_top(scores, k)]
        assert bottom["score"].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-12)
        random = read_table(folder / f"random_{k}_weights.csv", TOP_WEIGHTS)
        assert random["rank"].tolist() == list(range(1, k + 1))
        top = read_table(folder / f"top_100_weights_{metric}.csv", TOP_WEIGHTS)
        assert random.merge(top, on=keys).empty and bottom.merge(top, on=keys).empty


def test_values_come_back_bit_for_bit(finished, naive):
    folder, _ = finished
    top = read_table(folder / "top_100_per_layer_grad_x_weight.csv", TOP_WEIGHTS)
    for name, rows in top.groupby("parameter"):
        stored = naive[0].weight[name][rows["row"].tolist(), rows["col"].tolist()]
        assert torch.equal(torch.tensor(rows["value"].tolist()), stored)
        assert (rows["score"].astype("float32").astype("float64") == rows["score"]).all()


def test_the_layers_can_be_counted_as_in_the_guide(finished):
    folder, _ = finished
    top_weights = pd.read_csv(folder / "top_100_weights_grad_x_weight.csv")
    critical_layers = top_weights["layer"].value_counts().head(5).index.tolist()
    assert len(critical_layers) == 5
    assert all(f"{layer}.weight" in set(top_weights["parameter"]) for layer in critical_layers)


def test_baseline_and_manifest(finished, naive, checkpoint, texts):
    folder, _ = finished
    sums, losses = naive
    baseline = json.loads((folder / "baseline.json").read_text())
    manifest = read_manifest(folder)
    assert baseline["nll"] == pytest.approx(losses.sum().item() / sums.n_tokens, rel=1e-6)
    assert baseline["ppl"] == pytest.approx(math.exp(baseline["nll"]))
    assert (baseline["model"], baseline["n_tokens"], baseline["n_sequences"]) == (str(checkpoint), sums.n_tokens, 10)
    assert manifest["status"] == "complete" and manifest["error"] is None
    assert manifest["identity"]["model"]["id"] == manifest["identity"]["options"]["model"] == str(checkpoint)
    assert manifest["identity"]["corpus"]["corpus_sha256"] == baseline["corpus_sha256"]
    fingerprint = models.load(str(checkpoint), device="cpu").fingerprint
    assert read_fingerprint(folder) == fingerprint
    assert (
        manifest["identity"]["fingerprint"] == fingerprint.totals == {key: baseline[key] for key in fingerprint.totals}
    )
    (warning,) = manifest["warnings"]
    assert warning.startswith("the unperturbed model has a perplexity")  # it is random
    options = manifest["identity"]["options"]
    assert options["topk"] == [20, 100] and options["metric"] == ["grad_x_weight", "grad_squared"]
    assert options["data_file"] == str(texts)
    assert manifest["n_weights_in_scope"] == sum(w.numel() for w in sums.weight.values() if w.ndim >= 2)


def test_says_where_the_files_are_and_shows_the_first_rows(finished):
    folder, out = finished
    assert f"written to {folder}" in out
    first = pd.read_csv(folder / "top_20_weights_grad_squared.csv").iloc[0]
    assert "Top 20 by grad_squared, the first 5:" in out
    assert f"{first['parameter']}" in out
    log = (folder / "analysis.log").read_text()
    assert "10 documents of at most" in log and "baseline:" in log and log.endswith("complete\n")
    assert re.search(
        r"layer by layer: proved on 8 tokens against autograd in \d\.\d s, largest difference \de-\d\d\n", log
    )


@pytest.mark.slow
def test_a_model_that_cannot_be_run_layer_by_layer_is_measured_whole_and_the_log_says_why(tmp_path, texts):
    save(shared_key_values().float(), tmp_path / "model")
    words = flags(tmp_path / "model", texts, tmp_path / "out", "--topk", 5, "--no-save-plots", "--experiment-id", "x")
    assert phase1(*words) == 0
    folder = tmp_path / "out" / "critical_analysis_x"
    assert read_manifest(folder)["engine"] == "whole_model"
    reason = "as a whole, because layer by layer is not possible: model.layers.0 takes more than the hidden state"
    assert reason in (folder / "analysis.log").read_text()


def test_a_model_that_is_not_causal_is_refused(tmp_path, texts, capsys):
    save(odd_models.bert().float(), tmp_path / "model")
    assert phase1(*flags(tmp_path / "model", texts, tmp_path / "out")) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "later tokens change this model's predictions of earlier ones" in line
    assert not list((tmp_path / "out").glob("*"))


@pytest.mark.slow
def test_the_kernel_of_attention_is_recorded(checkpoint, tmp_path, texts, capsys):
    words = flags(checkpoint, texts, tmp_path, "--topk", 5, "--no-save-plots", "--attn-implementation")
    assert phase1(*words, "eager") == 0
    (folder,) = tmp_path.glob("critical_analysis_*")
    assert read_manifest(folder)["options"]["attn_implementation"] == "eager"
    assert phase1(*words, "no_such_kernel") == 2
    assert "no_such_kernel" in capsys.readouterr().err


@pytest.mark.slow
def test_the_same_baseline_is_accepted_and_another_refused(finished, checkpoint, texts, tmp_path, capsys):
    baseline = finished[0] / "baseline.json"
    words = flags(checkpoint, texts, tmp_path, "--topk", 5, "--no-save-plots", "--baseline", baseline)
    assert phase1(*words, "--eval-limit", 10) == 0
    assert phase1(*words, "--eval-limit", 9) == 2
    assert "has corpus_sha256" in capsys.readouterr().err
    assert len(list(tmp_path.glob("critical_analysis_*"))) == 1  # refused before a folder was opened


def test_another_loss_on_the_same_setup_fails_the_run(finished, checkpoint, texts, tmp_path, capsys):
    content = json.loads((finished[0] / "baseline.json").read_text())
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps(content | {"nll": content["nll"] * 1.001}))
    words = flags(checkpoint, texts, tmp_path, "--eval-limit", 10, "--baseline", baseline, "--experiment-id", "x")
    assert phase1(*words) == 2
    assert "this run measured" in capsys.readouterr().err
    manifest = read_manifest(tmp_path / "critical_analysis_x")
    assert manifest["status"] == "failed" and "this run measured" in manifest["error"]
    assert not list((tmp_path / "critical_analysis_x").glob("*.csv"))


@pytest.fixture
def another_weight(monkeypatch):
    """From now on one weight that is read from the same files is another; gives its parameter's name."""
    name, load = "gpt_neox.layers.2.mlp.dense_h_to_4h.weight", models.load

    def load_changed(*arguments, **options):
        loaded = load(*arguments, **options)
        loaded.model.get_parameter(name).view(torch.int32)[3, 2] ^= 1  # the last bit: the loss hides it
        return loaded

    monkeypatch.setattr(models, "load", load_changed)
    return name


def test_baseline_of_another_model_with_the_same_files_and_loss_is_refused(
    finished, checkpoint, texts, tmp_path, capsys, another_weight
):
    words = flags(checkpoint, texts, tmp_path, "--eval-limit", 10, "--baseline", finished[0] / "baseline.json")
    assert phase1(*words) == 2
    message = f"is of another model than this run: they differ in {another_weight}"
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    assert not list(tmp_path.glob("critical_analysis_*"))


def test_baseline_without_a_fingerprint_is_accepted_with_a_warning(finished, checkpoint, texts, tmp_path):
    content = json.loads((finished[0] / "baseline.json").read_text())
    baseline = tmp_path / "baseline.json"
    baseline.write_text(json.dumps({key: value for key, value in content.items() if not key.endswith("_xxh3")}))
    more = ["--topk", 3, "--no-save-plots", "--eval-limit", 10, "--baseline", baseline, "--experiment-id", "one"]
    assert phase1(*flags(checkpoint, texts, tmp_path, *more)) == 0
    warning, _ = read_manifest(tmp_path / "critical_analysis_one")["warnings"]
    assert warning.startswith(f"--baseline {baseline} has no fingerprint")


@pytest.mark.slow
def test_failed_run_is_not_resumed_with_another_weight(checkpoint, texts, tmp_path, capsys, monkeypatch, request):
    def fail(*arguments, **options):
        raise RunError("no more time")

    words = flags(checkpoint, texts, tmp_path, "--topk", 3, "--no-save-plots")
    with monkeypatch.context() as patch:
        patch.setattr(phase1_module, "discover", fail)
        assert phase1(*words, "--experiment-id", "one") == 1
    name = request.getfixturevalue("another_weight")
    assert phase1(*words, "--experiment-id", "one") == 2
    assert f"begun with another fingerprint (the models differ in {name})" in capsys.readouterr().err
    assert phase1(*words) == 0  # which takes a folder of its own
    assert len(list(tmp_path.glob("critical_analysis_*"))) == 2
    assert read_manifest(tmp_path / "critical_analysis_one")["status"] == "failed"


@pytest.mark.slow
def test_only_what_the_mode_names(checkpoint, texts, tmp_path):
    common = ["--topk", 3, "--no-save-plots", "--metric", "magnitude", "--scope", "all", "--include", "*.mlp.*"]
    for mode in ("global", "per_layer"):
        assert phase1(*flags(checkpoint, texts, tmp_path, *common, "--mode", mode, "--experiment-id", mode)) == 0
    tables = lambda mode: {path.name for path in (tmp_path / f"critical_analysis_{mode}").glob("*.csv")}  # noqa: E731
    always = {"layer_summary_magnitude.csv", "sampled_weights.csv"}
    control = {"bottom_3_weights_magnitude.csv", "random_3_weights.csv"}
    assert tables("global") == {"top_3_weights_magnitude.csv", *control, *always}
    assert tables("per_layer") == {"top_3_per_layer_magnitude.csv", *always}
    within = read_table(tmp_path / "critical_analysis_per_layer" / "top_3_per_layer_magnitude.csv", TOP_WEIGHTS)
    assert within.loc[within["parameter"].str.endswith("bias"), "col"].isna().all()
    assert within["parameter"].str.contains(r"\.mlp\.").all()
    assert within["parameter"].nunique() == 12


@pytest.mark.slow
def test_a_finished_id_is_refused(checkpoint, texts, tmp_path, capsys):
    words = flags(checkpoint, texts, tmp_path, "--topk", 3, "--no-save-plots", "--experiment-id", "one")
    assert phase1(*words) == 0
    before = {p.name: p.read_bytes() for p in (tmp_path / "critical_analysis_one").iterdir() if p.is_file()}
    assert phase1(*words) == 2
    assert "is already complete" in capsys.readouterr().err
    after = {p.name: p.read_bytes() for p in (tmp_path / "critical_analysis_one").iterdir() if p.is_file()}
    assert after == before


@pytest.mark.slow
def test_a_failed_run_says_so_and_can_be_begun_again(checkpoint, texts, tmp_path, capsys, monkeypatch):
    words = flags(checkpoint, texts, tmp_path, "--topk", 3, "--no-save-plots", "--experiment-id", "one")
    load = models.load

    def load_broken(*arguments, **options):
        loaded = load(*arguments, **options)
        assert loaded.fingerprint  # taken of the sound model, which breaks only then
        loaded.model.gpt_neox.layers[1].mlp.dense_4h_to_h.weight[0, 0] = torch.nan
        return loaded

    with monkeypatch.context() as patch:
        patch.setattr(models, "load", load_broken)
        assert phase1(*words) == 1
    assert "loss of sequence 0" in capsys.readouterr().err
    folder = tmp_path / "critical_analysis_one"
    assert read_manifest(folder)["status"] == "failed"
    assert "failed: RunError" in (folder / "analysis.log").read_text()
    assert phase1(*words) == 0
    manifest = read_manifest(folder)
    assert manifest["status"] == "complete" and manifest["error"] is None


@pytest.mark.slow
def test_stability_announces_its_cost_and_writes_a_table_and_a_picture(checkpoint, texts, tmp_path):
    more = ["--topk", 5, 20, "--metric", "grad_x_weight", "magnitude", "--stability", 2, "--experiment-id", "one"]
    assert phase1(*flags(checkpoint, texts, tmp_path, *more)) == 0
    folder = tmp_path / "critical_analysis_one"
    table = read_table(folder / "stability.csv", STABILITY)
    assert table["kind"].value_counts().to_dict() == {"halves": 8, "seeds": 4, "metrics": 2}
    assert (folder / "plots" / "stability.png").exists()
    log = (folder / "analysis.log").read_text()
    assert log.index("costs 2 more passes") < log.index("grad_x_weight, top 20: mean Jaccard overlap of two halves")


@pytest.mark.slow
def test_hutchinson_announces_its_cost_and_is_one_more_metric(checkpoint, texts, tmp_path):
    more = ["--metric", "grad_x_weight", "hutchinson_diag", "--hutchinson-probes", 3, "--eval-limit", 4, "--topk", 7]
    assert phase1(*flags(checkpoint, texts, tmp_path, *more, "--experiment-id", "one")) == 0
    folder = tmp_path / "critical_analysis_one"
    log = (folder / "analysis.log").read_text()
    assert (
        log.index("baseline:") < log.index("hutchinson_diag: 3 probes of 4 sequences") < log.index("tables of the top")
    )
    assert log.count("baseline:") == 1
    loaded = models.load(str(checkpoint), device="cpu")
    sequences = [torch.tensor(loaded.tokenizer(line).input_ids) for line in texts.read_text().splitlines()[:4]]
    names = [name for name, parameter in loaded.model.named_parameters() if parameter.ndim >= 2]
    diagonal = hessian_diagonal(loaded.model, sequences, names, 3, seed=0)
    expected = naive_top({name: estimate.abs() for name, estimate in diagonal.items()}, 7)
    top = read_table(folder / "top_7_weights_hutchinson_diag.csv", TOP_WEIGHTS)
    assert top["score"].tolist() == pytest.approx([line[3] for line in expected], rel=1e-5)
    assert (folder / "bottom_7_weights_hutchinson_diag.csv").exists()
    assert read_table(folder / "sampled_weights.csv", SAMPLED_WEIGHTS)["score_hutchinson_diag"].max() == top["score"][0]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stability", 1, "--metric", "hutchinson_diag"], "leave one of the two out"),
        (["--hutchinson-probes", 0], "--hutchinson-probes must be at least 1, not 0"),
        (["--stability", -1], "--stability must be at least 0, not -1"),
        (["--stability", 1, "--eval-limit", 3], "--stability needs at least 4 sequences to halve, the corpus has 3"),
        (["--topk", 0], "--topk must be at least 1, not 0"),
        (["--topk", 10, -3], "--topk must be at least 1, not -3"),
        (["--topk", 10**6], "--topk 1000000 is more than the"),
        (["--batch-size", 0], "--batch-size must be at least 1, not 0"),
        (["--metric", "grad_x_wieght"], "--metric 'grad_x_wieght' is unknown (did you mean 'grad_x_weight'?)"),
        (["--mode", "local"], "--mode 'local' is unknown"),
        (["--include", "*.nothing.*"], "leaves no parameter"),
        (["--baseline", "/no/such/baseline.json"], "--baseline /no/such/baseline.json cannot be read"),
        (["--eval-limit", 0], "--eval-limit must be at least 1"),
        (["--experiment-id", "a/b"], "must be a plain name"),
    ],
)
def test_wrong_requests_end_with_one_line_and_open_no_folder(checkpoint, texts, tmp_path, capsys, more, message):
    assert phase1(*flags(checkpoint, texts, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("phase1_runner.py: error: ") and message in error
    assert not list(tmp_path.glob("out/critical_analysis_*"))


@pytest.mark.slow
def test_weights_that_the_model_has_no_place_for_are_left_out_only_when_told(checkpoint, texts, tmp_path, capsys):
    folder = shutil.copytree(checkpoint, tmp_path / "model")
    tensors = load_file(folder / "model.safetensors") | {"score.weight": torch.zeros(2, 8)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    words = flags(folder, texts, tmp_path, "--topk", 3, "--no-save-plots", "--experiment-id", "one")
    assert phase1(*words) == 2
    assert "no place for (1): score.weight" in capsys.readouterr().err
    assert phase1(*words, "--allow-unused-weights", "score.*", "old.*") == 0
    identity = read_manifest(tmp_path / "critical_analysis_one")["identity"]
    assert identity["options"]["allow_unused_weights"] == ["score.*", "old.*"]
    assert identity["model"]["unused_weights"] == ["score.weight"]


def test_a_run_at_work_is_left_alone(checkpoint, texts, tmp_path, capsys):
    held = open_run(tmp_path, "critical_analysis", {}, "one")
    words = flags(checkpoint, texts, tmp_path, "--topk", 3, "--experiment-id", "one")
    assert phase1(*words) == 2
    assert "another process is at work" in capsys.readouterr().err
    held.finish("failed")


def test_the_script_hands_every_flag_on():
    flags_of_the_command = flag_table.flags_of(runner.phase1)
    assert set(flags_of_the_command) == {field.name for field in fields(Options)}
    assert all(flag.help for flag in flags_of_the_command.values())
    assert len(RUNNER.read_text().splitlines()) < 80


def test_the_command_offers_every_metric():
    """The choices are written out for the type checker, the formulas declare themselves."""
    assert flag_table.flags_of(runner.phase1)["metric"].choices == tuple(METRICS)
