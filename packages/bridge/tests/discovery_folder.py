"""A made-up discovery folder: the files that a real run leaves, with numbers drawn at random."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
from bridge.exchange.fingerprint import Fingerprint, write_fingerprint

MODEL = {"id": "tiny", "revision": "abc", "dtype": "float32", "n_parameters": 480, "tied_groups": []}
CORPUS = {"source": "shipped passages", "n_tokens": 90, "n_sequences": 3, "corpus_sha256": "c" * 64}
N_WEIGHTS = 40
SHAPE = (8, 5)


def parameters(n_layers: int = 12) -> list[str]:
    return [f"model.layers.{i}.mlp.weight" for i in range(n_layers)]


def fingerprint(*changed: str, dtype: str = "float32") -> Fingerprint:
    """Of the made-up model, with other values in some parameters."""
    words = {name: f"{name} {'other' if name in changed else ''} {dtype}" for name in parameters()}
    digests = {name: hashlib.sha256(word.encode()).hexdigest()[:32] for name, word in words.items()}
    total = hashlib.sha256(json.dumps(digests).encode()).hexdigest()[:32]
    return Fingerprint(total, "70" * 16, dtype, digests)


def make_discovery(
    output: Path, name: str = "1", metrics=("grad_x_weight", "magnitude"), ks=(5, 20), ended="1", model=None, **options
) -> Path:
    folder = output / f"critical_analysis_{name}"
    folder.mkdir(parents=True)
    names = parameters()
    sampled = []
    for number, metric in enumerate(metrics):
        rng = np.random.default_rng(number)
        scores = {p: rng.exponential(1 + 5 * rng.random(), N_WEIGHTS) for p in names}
        for k in ks:
            weights(scores, k, by_layer=False).to_csv(folder / f"top_{k}_weights_{metric}.csv", index=False)
            weights(scores, k, by_layer=True).to_csv(folder / f"top_{k}_per_layer_{metric}.csv", index=False)
        summary(scores).to_csv(folder / f"layer_summary_{metric}.csv", index=False)
        every = weights(scores, N_WEIGHTS, by_layer=True).drop(columns="rank")
        places = ["layer", "parameter", "row", "col", "value"]
        every[f"share_{metric}"] = every["score"].rank(ascending=False) / len(every)
        sampled.append(every.rename(columns={"score": f"score_{metric}"}).set_index(places).sort_index())
    rows = pd.concat(sampled, axis=1).iloc[::7]
    rows.assign(inclusion=1 / 7).to_csv(folder / "sampled_weights.csv")
    model = MODEL | (model or {})
    baseline = {"model": model["id"], "revision": model["revision"], "dtype": model["dtype"]}
    baseline |= {key: CORPUS[key] for key in ("corpus_sha256", "n_tokens", "n_sequences")}
    baseline |= {"nll": 3.5, "ppl": math.exp(3.5)} | fingerprint(dtype=model["dtype"]).totals
    write_fingerprint(folder, fingerprint(dtype=model["dtype"]))
    (folder / "baseline.json").write_text(json.dumps(baseline))
    options = {"model": None, "metric": list(metrics), "topk": list(ks), "max_length": 64, **options}
    manifest = {"schema": 1, "kind": "critical_analysis", "status": "complete", "ended": ended}
    manifest["identity"] = {"options": options, "model": model, "corpus": CORPUS}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def weights(scores: dict[str, np.ndarray], k: int, by_layer: bool) -> pd.DataFrame:
    rows = [
        {"layer": p.removesuffix(".weight"), "parameter": p, "row": j // SHAPE[1], "col": j % SHAPE[1]}
        | {"value": 0.1 * j, "score": score}
        for p, values in scores.items()
        for j, score in enumerate(values)
    ]
    frame = pd.DataFrame(rows).sort_values("score", ascending=False, kind="stable")
    if by_layer:
        frame = frame.groupby("parameter", sort=False).head(k)
        frame["rank"] = frame.groupby("parameter").cumcount() + 1
        return frame.sort_values(["parameter", "rank"])
    return frame.head(k).assign(rank=range(1, k + 1))


def summary(scores: dict[str, np.ndarray]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "layer": [p.removesuffix(".weight") for p in scores],
            "parameter": list(scores),
            "n_weights": N_WEIGHTS,
            "score_sum": [v.sum() for v in scores.values()],
            "score_mean": [v.mean() for v in scores.values()],
            "score_max": [v.max() for v in scores.values()],
            "score_p99": [np.quantile(v, 0.99) for v in scores.values()],
        }
    )


def snapshot(folder: Path) -> dict[str, str]:
    """The content of every file below a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
