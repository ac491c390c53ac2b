"""The fingerprint of a measured model: one hash of its values, one of its tokenizer, and a digest of each parameter.

``llm_perturb.fingerprint`` computes it. Each run folder holds it as ``fingerprint.json``; its two hashes also stand in
the identity of the run's manifest and in ``baseline.json``. Here it is written, read and compared.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec

from bridge.exchange.atomic_file import write_json
from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import damaged
from bridge.exchange.json_file import read_json
from bridge.exchange.layout import FINGERPRINT_FILE

MISSING = "has no fingerprint (an earlier version made it), so the values of the models could not be compared"
_NAMED = 3  # parameters that a message names before it counts the others
_REMEDY = "restore it, or make the run again"


@dataclass(frozen=True)
class Fingerprint:
    """What a model was, to the bit.

    Attributes:
        parameters_xxh3: hash of all parameters and persistent buffers: name, shape, dtype and values as used.
        tokenizer_xxh3: hash of the tokenizer.
        dtype: what the parameters were converted to, None if unknown. Digests of two dtypes always differ.
        digests: hash of each parameter by name, in model order; empty where only the totals are known.
    """

    parameters_xxh3: str
    tokenizer_xxh3: str
    dtype: str | None
    digests: dict[str, str] = field(default_factory=dict)

    @property
    def totals(self) -> dict[str, str]:
        """The two hashes, by the names that they have in ``baseline.json`` and in a manifest."""
        return {"parameters_xxh3": self.parameters_xxh3, "tokenizer_xxh3": self.tokenizer_xxh3}


def write_fingerprint(folder: Path, fingerprint: Fingerprint) -> None:
    """Write ``fingerprint.json`` into a run folder."""
    write_json(folder / FINGERPRINT_FILE, asdict(fingerprint))


def read_fingerprint(folder: Path) -> Fingerprint | None:
    """The fingerprint of a run folder, None where there is no such file: versions before it wrote none.

    Raises:
        RequestError: the file is damaged.
    """
    path = folder / FINGERPRINT_FILE
    try:
        return msgspec.convert(read_json(path, _REMEDY), Fingerprint)
    except FileNotFoundError:
        return None
    except msgspec.ValidationError as error:
        raise RequestError(damaged(path, error, _REMEDY)) from None


def recorded_fingerprint(content: Mapping[str, object], folder: Path) -> Fingerprint | None:
    """The fingerprint that a ``baseline.json`` or a manifest's identity has, with the digests that lie beside it.

    Args:
        content: with the two totals, or without them where an earlier version wrote it.
        folder: where ``fingerprint.json`` may be; one with other totals is not of this run.

    Returns:
        None without the totals.

    Raises:
        RequestError: ``fingerprint.json`` is damaged.
    """
    parameters, tokenizer, dtype = (content.get(key) for key in ("parameters_xxh3", "tokenizer_xxh3", "dtype"))
    if not parameters or not tokenizer:
        return None
    recorded = Fingerprint(
        parameters_xxh3=str(parameters), tokenizer_xxh3=str(tokenizer), dtype=None if dtype is None else str(dtype)
    )
    with_digests = read_fingerprint(folder)
    return with_digests if with_digests and with_digests.totals == recorded.totals else recorded


def difference(one: Fingerprint, other: Fingerprint) -> str:
    """What two fingerprints differ in: the tokenizer, and the first parameters by name. Empty if in nothing."""
    differing = []
    if one.tokenizer_xxh3 != other.tokenizer_xxh3:
        differing.append("the tokenizer")
    if one.parameters_xxh3 != other.parameters_xxh3:
        differing += _differing_parameters(one.digests, other.digests)
    if len(differing) < 2:
        return "".join(differing)
    return f"{', '.join(differing[:-1])} and {differing[-1]}"


def _differing_parameters(one: Mapping[str, str], other: Mapping[str, str]) -> list[str]:
    names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
    if not one or not other or not names:
        return ["the values of the parameters"]
    n_others = len(names) - _NAMED
    if n_others > 1:
        return [*names[:_NAMED], f"{n_others} more parameters"]
    if n_others == 1:
        return [*names[:_NAMED], "1 more parameter"]
    return names
