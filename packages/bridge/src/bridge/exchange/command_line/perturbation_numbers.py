"""Which number belongs to which perturbation; both commands that take such flags refuse them by this table."""

from collections.abc import Mapping, Sequence

from bridge.exchange.command_line.flag_table import spelled
from bridge.exchange.errors import RequestError

PERTURBATION_OF = {"factor": "scale", "sigma": "gaussian_noise", "bit": "bit_flip", "n_bits": "quantize"}


def numbers_set(values: Mapping[str, float | None], perturbations: Sequence[str], flag: str) -> dict[str, float]:
    """The numbers that a request sets, by name.

    Args:
        values: each number of ``PERTURBATION_OF``, None where the request leaves it at its default.
        perturbations: those that the request asks for.
        flag: the flag that names perturbations, for the message.

    Raises:
        RequestError: a number is set whose perturbation is not asked for.
    """
    numbers: dict[str, float] = {}
    for name, perturbation in PERTURBATION_OF.items():
        value = values[name]
        if value is None:
            continue
        if perturbation not in perturbations:
            raise RequestError(f"{spelled(name)} is for {flag} {perturbation}, which is not asked for")
        numbers[name] = value
    return numbers


def check_seeds(seeds: Sequence[int], flag: str = "--seeds") -> None:
    """Refuse seeds that no generator takes.

    Raises:
        RequestError: a seed is negative.
    """
    if min(seeds) < 0:
        raise RequestError(f"{flag} must be at least 0, not {min(seeds)}")
