"""Stands in for run_topk_perturb.py: the same flags, folder, files and way of resuming, numbers made up.

``FAKE`` says what it should do wrong: refuse, fail, zero (no effect), baseline (another corpus), other (another value
in one parameter), old (no fingerprint), short (rows missing), lost (a single weight missing), broken (no bit changes
in the third target), hold (wait after five rows until the file ``FAKE_RELEASE`` exists); or that it should compare top
sets with random ones (compared).
``FAKE_STARTS`` names a file that gets a line for each start.
"""

import hashlib
import json
import math
import os
import re
import sys
import time
from pathlib import Path

import pandas as pd
from bridge.exchange.atomic_file import write_json
from bridge.exchange.command_line import flags
from bridge.exchange.errors import RequestError, RunError
from bridge.exchange.existing_runs import find_runs, read_manifest
from bridge.exchange.run_folder import open_run
from bridge.exchange.tables import COMPARISONS, MEASUREMENTS, TOP_WEIGHTS, read_table, write_table
from discovery_folder import CORPUS, MODEL, fingerprint, parameters

MODE = os.environ.get("FAKE", "")


def run_topk_perturb(
    *,
    perturbation: list[str],
    seeds: list[int],
    output: str,
    experiment_id: str,
    model: str,
    dtype: str,
    device: str,
    max_length: int,
    target_layer: list[str] = (),
    k: list[int] = (),
    selection: list[str] = (),
    weights_csv: list[str] = (),
    metric: list[str] | None = None,
    per_weight: str | None = None,
    shard: str | None = None,
    revision: str | None = None,
    data_file: str | None = None,
    dataset: str | None = None,
    text_column: str | None = None,
    packing: str | None = None,
    window_bos: str | None = None,
    parse_special_tokens: bool = False,
    eval_limit: int | None = None,
    batch_size: int = 1,
    trust_remote_code: bool = False,
    allow_unused_weights: list[str] = (),
) -> None:
    """Pretend to measure."""
    with Path(os.environ.get("FAKE_STARTS", os.devnull)).open("a") as stream:
        stream.write(
            json.dumps({"pid": os.getpid(), "argv": sys.argv, "target": os.environ.get("TARGET_LAYER")}) + "\n"
        )
    if MODE == "refuse":
        raise RequestError("the target has no such weight")
    corpus = CORPUS
    if data_file and "judging" in data_file:
        corpus = CORPUS | {"source": data_file, "corpus_sha256": "e" * 64, "n_tokens": 77}
    identity = {
        "corpus": corpus,
        "options": {"model": model, "k": list(k), "per_weight": per_weight, "csv": list(weights_csv)},
    }
    number, of = map(int, (shard or "1/1").split("/"))
    kind, name = ("shard", f"{experiment_id}_{number}_of_{of}") if shard else ("perturb", experiment_id)
    own = fingerprint(parameters()[2], dtype=dtype) if MODE == "other" else fingerprint(dtype=dtype)
    own = None if MODE == "old" else own
    run = open_run(Path(output), kind, identity | ({"shard": shard} if shard else {}), name, fingerprint=own)
    baseline = {"model": model, "revision": MODEL["revision"], "dtype": dtype, "nll": 3.5, "ppl": math.exp(3.5)}
    baseline |= {"nll": 3.9, "ppl": math.exp(3.9)} if corpus is not CORPUS else {}
    baseline |= {key: corpus[key] for key in ("corpus_sha256", "n_tokens", "n_sequences")} | (own.totals if own else {})
    if MODE == "baseline":
        baseline |= {"corpus_sha256": "d" * 64, "nll": 3.6}
    write_json(run.folder / "baseline.json", baseline)
    print("BASELINE_PERPLEXITY: 33.1", flush=True)
    metrics = [re.fullmatch(r"top_\d+_per_layer_(\w+)\.csv", Path(file).name)[1] for file in weights_csv]
    assert all(Path(file).is_file() for file in weights_csv)
    wanted = [*cells(target_layer, k, metrics, perturbation, seeds), *single_weights(per_weight, perturbation)]
    run.update(rows=list(range(len(wanted)))[number - 1 :: of], n_rows=len(wanted))
    wanted, broken = wanted[number - 1 :: of], target_layer[min(2, len(target_layer) - 1)] if target_layer else None
    done = run.records(dict)
    for number, cell in enumerate(wanted[len(done) :], start=len(done)):
        print(f"\rmeasuring {number + 1}/{len(wanted)}", end="", file=sys.stderr, flush=True)
        if MODE == "fail" and number == 3:
            raise RunError("the loss of sequence 2 is not finite")
        while MODE == "hold" and number == 5 and not Path(os.environ["FAKE_RELEASE"]).exists():
            time.sleep(0.02)
        run.append(row(*cell, baseline=baseline))
    records = run.records(dict)[: {"short": -5, "lost": -1}.get(MODE)]
    table = pd.DataFrame([record for record in records if MODE != "broken" or record["target_layer"] != broken])
    if MODE == "broken":
        error = f"zero of top_obd in {broken} changes no weight of the model, so its effect is not known"
        run.update(failed_targets={broken: error})
        if not len(table) or os.environ.get("FAKE_ALSO"):
            run.finish("failed", error=os.environ.get("FAKE_ALSO") or error)
            raise RunError(error)
    table = table.astype({"seed": "Int64", "row": "Int64", "col": "Int64"})
    write_table(run.folder / "measurements.csv", table, MEASUREMENTS)
    if MODE == "compared":
        write_table(run.folder / "comparisons.csv", comparisons(table), COMPARISONS)
    if MODE == "broken":
        run.finish("failed", error=f"RunError: {error}")
        raise RunError(error)
    run.finish("complete")


def cells(target_layer, k, metrics, perturbation, seeds):
    for target in target_layer:
        for change in perturbation:
            for size in k:
                for metric in metrics:
                    yield target, f"top_{metric}", change, size, None
                for seed in seeds:
                    yield target, "random", change, size, seed


def comparisons(table):
    """Every top set beats two draws of three, by 0.5 nats."""
    tops = table[table["selection"].str.startswith("top_")]
    numbers = dict.fromkeys(COMPARISONS.columns, 0.5) | {
        "n_draws": 3,
        "n_beaten": 2,
        "control": "random",
        "note": "no p",
    }
    return pd.DataFrame({column: tops.get(column, value) for column, value in numbers.items()})


def single_weights(per_weight, perturbation):
    if per_weight:
        for weight in read_table(Path(per_weight), TOP_WEIGHTS).itertuples():
            for change in perturbation:
                place = (weight.parameter, int(weight.row), int(weight.col))
                yield weight.layer, "weight", change, 1, None, place, weight.score


def row(target, selection, perturbation, k, seed, place=(None, None, None), score=None, *, baseline) -> dict:
    name = repr((target, selection, perturbation, k, seed, *place[1:])).encode()
    delta = int.from_bytes(hashlib.sha256(name).digest()[:4], "big") / 2**32 * (1e-3 if selection == "random" else 1)
    delta = 0.0 if MODE == "zero" else delta
    nll = baseline["nll"]
    return {
        "target_layer": target,
        "parameter": place[0] or ("ALL" if target == "ALL" else f"{target}.weight"),
        "selection": selection,
        "perturbation": {"scale": "scale(0.5)"}.get(perturbation, perturbation),
        "k": k,
        "seed": seed,
        "n_weights": k,
        "score_sum": {"random": None, "weight": score}.get(selection, delta**2),
        "baseline_nll": nll,
        "perturbed_nll": nll + delta,
        "delta_nll": delta,
        "ci_low": delta * 0.9,
        "ci_high": delta * 1.1,
        "baseline_ppl": math.exp(nll),
        "perturbed_ppl": math.exp(nll + delta),
        "delta_ppl": math.exp(nll + delta) - math.exp(nll),
        "n_tokens": baseline["n_tokens"],
        "n_sequences": baseline["n_sequences"],
        "corpus_sha256": baseline["corpus_sha256"],
        "model": baseline["model"],
        "row": place[1],
        "col": place[2],
    }


def merge_shards(*, from_: list[str], output: str, experiment_id: str) -> None:
    """Pretend to merge."""
    folders = [folder for place in from_ for folder in find_runs(Path(place), "shard")]
    manifests = [read_manifest(folder) for folder in folders]
    of = int(manifests[0]["identity"]["shard"].split("/")[1])
    for number in range(1, of + 1):
        if f"{number}/{of}" not in [manifest["identity"]["shard"] for manifest in manifests]:
            raise RequestError(f"shard {number}/{of} is missing, or not complete")
    identity = {name: manifests[0]["identity"][name] for name in ("options", "corpus")}
    assert all(manifest["identity"]["options"] == identity["options"] for manifest in manifests)
    run = open_run(Path(output), "perturb", identity, experiment_id)
    lines = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        header, *rows = (folder / "measurements.csv").read_text().splitlines()
        lines |= dict(zip(manifest["rows"], rows, strict=True))
    (run.folder / "measurements.csv").write_text("\n".join([header, *(lines[at] for at in sorted(lines))]) + "\n")
    (run.folder / "baseline.json").write_bytes((folders[0] / "baseline.json").read_bytes())
    run.finish("complete")


if __name__ == "__main__":
    script = Path(sys.argv[1]).name
    command = {"merge_shards.py": merge_shards}.get(script, run_topk_perturb)
    flags.run(command, name=script, argv=sys.argv[2:])
