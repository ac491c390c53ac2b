"""Exact weights from a CSV, each row checked against the model that is to be perturbed."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from bridge.exchange import layout
from bridge.exchange.errors import RequestError
from bridge.exchange.fingerprint import Fingerprint, difference, read_fingerprint
from bridge.exchange.printable import check_printable
from bridge.exchange.tables import TOP_WEIGHTS, read_table
from torch.nn import Parameter

from llm_perturb.selection import Ranked, Target


def csv_label(path: str) -> str:
    """What the weights of a CSV are called: the metric in the name of a discovery's top-K, else the file's own name.

    Raises:
        RequestError: the file's own name has a character that is not printable.
    """
    parts = layout.parse_weights_file(Path(path).name)
    label = parts.metric if parts and parts.kind == "top" else None
    return check_printable(label or Path(path).stem, "the name of the file of weights")


def hash_file(path: str) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


@dataclass(frozen=True)
class WeightList:
    """The rows of a CSV of weights, as arrays of one length.

    Attributes:
        path: the file.
        names: of the parameters.
        indices: flat indices into them, int64.
        scores: by which the rows are ordered, the highest first.
        ranks: those of the file where they, and not the scores, say which rows come first.
    """

    path: str
    names: np.ndarray
    indices: np.ndarray
    scores: np.ndarray
    ranks: np.ndarray | None = None

    def within(self, target: Target, k: int) -> Ranked:
        """The first k of the rows that lie in the target: of highest score, equal ones in model order; or by rank.

        Raises:
            RequestError: none lies in it.
        """
        offsets = target.offsets()
        inside = np.isin(self.names, list(offsets))
        if not inside.any():
            raise RequestError(f"{self.path} holds no weight of TARGET_LAYER '{target.layer}'")
        starts = np.array([offsets[name] for name in self.names[inside]], dtype=np.int64)
        positions, first = np.unique(starts + self.indices[inside], return_index=True)
        scores = self.scores[inside][first]
        order = np.argsort(-scores if self.ranks is None else self.ranks[inside][first], kind="stable")[:k]
        return Ranked(torch.from_numpy(positions[order]), torch.from_numpy(scores[order]))


def check_model(path: str, here: Fingerprint) -> None:
    """A discovery's CSV must be of this model, bit for bit, as the fingerprint beside the CSV tells.

    In another dtype the same weights have other bits, so that only the tokenizer is compared; of that list, and of one
    without a fingerprint, ``read_weight_list`` compares the values of the rows.

    Raises:
        RequestError: it is of another model or tokenizer; names the parameters.
    """
    there = read_fingerprint(Path(path).parent)
    if there is None:
        return
    if there.dtype != here.dtype:
        there = replace(there, parameters_xxh3=here.parameters_xxh3)
    changed = difference(there, here)
    if changed:
        raise RequestError(f"{path} was made from another model or revision: they differ in {changed}")


def read_weight_list(path: str, model_parameters: Mapping[str, Parameter]) -> WeightList:
    """Read a CSV of exact weights and check each row against the model.

    Raises:
        RequestError: what ``read_table`` refuses; an unknown parameter, a row or column out of range, a
            score that is not finite, a value that is not the model's.
    """
    frame = read_table(Path(path), TOP_WEIGHTS)
    indices = flat_indices(frame, model_parameters, path)
    if not np.isfinite(frame["score"]).all():
        raise RequestError(f"{path}: a score is not finite")
    return WeightList(
        path=path,
        names=frame["parameter"].to_numpy(dtype=object),
        indices=indices,
        scores=frame["score"].to_numpy(),
        ranks=frame["rank"].to_numpy() if _ordered_by_rank(path) else None,
    )


def flat_indices(frame: pd.DataFrame, model_parameters: Mapping[str, Parameter], source: str) -> np.ndarray:
    """The flat index of each row's weight in its parameter, int64 (n,).

    Args:
        frame: the columns ``parameter``, ``row`` and ``col``, numbered from 0; with ``value``, that is compared, too.
        model_parameters: by name.
        source: the file, for messages.

    Raises:
        RequestError: an unknown parameter, a row or column out of range, a value that is not the model's.
    """
    indices = np.empty(len(frame), dtype=np.int64)
    for key, rows in frame.groupby("parameter", sort=False):
        name = str(key)
        if name not in model_parameters:
            raise RequestError(f"{source}, line {rows.index[0] + 2}: the model has no parameter '{name}'")
        parameter = model_parameters[name]
        n_columns = parameter[0].numel() if parameter.ndim > 1 else 1
        if rows["col"].isna().any() and parameter.ndim > 1:
            line = rows.index[int(rows["col"].isna().to_numpy().argmax())] + 2
            raise RequestError(f"{source}, line {line}: {name} is a matrix, and the row has no col")
        row, col = rows["row"].to_numpy(), rows["col"].fillna(0).to_numpy(dtype=np.int64)
        outside = (row < 0) | (row >= parameter.shape[0]) | (col < 0) | (col >= n_columns)
        if outside.any():
            line = rows.index[int(outside.argmax())] + 2
            raise RequestError(f"{source}, line {line}: outside of {name}, whose shape is {tuple(parameter.shape)}")
        indices[rows.index] = row * n_columns + col
        if "value" in rows:
            _check_values(source, rows, parameter, indices[rows.index])
    return indices


def _ordered_by_rank(path: str) -> bool:
    """Whether a file holds a discovery's bottom or random weights: its ranks, not its scores, say which come first."""
    parts = layout.parse_weights_file(Path(path).name)
    return parts is not None and parts.kind != "top" and parts.scope == "weights"


def _check_values(path: str, rows: pd.DataFrame, parameter: Parameter, indices: np.ndarray) -> None:
    """The CSV's values must be the model's, up to what storing in another dtype changes."""
    here = parameter.detach().reshape(-1)[torch.from_numpy(indices).to(parameter.device)].double().cpu().numpy()
    there = rows["value"].to_numpy()
    different = ~(np.abs(here - there) <= 2.0**-7 * np.abs(here))
    if different.any():
        at = different.argmax()
        raise RequestError(
            f"{path}, line {rows.index[at] + 2}: the weight is {there[at]} there and {here[at]} in this model; "
            "the list was made from another model or revision"
        )
