"""Which model is meant: a hub id, a local folder, a short name, a TARGET_LAYER, or nothing."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TypedDict

from bridge.exchange.errors import RequestError
from bridge.exchange.file_content import checked
from bridge.exchange.layout import ALL
from bridge.exchange.printable import say
from bridge.exchange.yaml_file import read_yaml

MODEL_TABLE = Path(__file__).parents[1] / "data" / "models.yaml"


class ModelTable(TypedDict):
    """The table of default models and short names.

    Attributes:
        embedded: the name of the embedded model.
        by_target_layer: the default model by the first part of a TARGET_LAYER.
        short_names: the full name of a model by its short one.
    """

    embedded: str
    by_target_layer: dict[str, str]
    short_names: dict[str, str]


@cache
def model_table() -> ModelTable:
    """The table of default models and short names, ``models.yaml``.

    Raises:
        RequestError: it is damaged.
    """
    return checked(read_yaml(MODEL_TABLE), ModelTable, MODEL_TABLE)


def choose_name(name: str | None, target_layers: Sequence[str] = ()) -> str:
    """The full name of the model to load: the one passed, or the one that the first TARGET_LAYER belongs to.

    A folder comes before a short name and a hub id, as an absolute path.

    Raises:
        RequestError: a TARGET_LAYER that could be of any model, such as ``lm_head``, and no name.
    """
    table = model_table()
    if name:
        return _folder(name) or table["short_names"].get(name.lower(), name)
    family = target_layers[0].split(".")[0] if target_layers else ALL
    if family == ALL:
        chosen, why = table["embedded"], "the embedded model"
    elif family in table["by_target_layer"]:
        chosen, why = table["by_target_layer"][family], f"TARGET_LAYER begins with '{family}.'"
    else:
        known = ", ".join(f"'{family}.'" for family in table["by_target_layer"])
        raise RequestError(
            f"TARGET_LAYER '{target_layers[0]}' does not tell which model it is of (it begins with none of {known}); "
            "name it with --model"
        )
    say(f"MODEL: {chosen} (no --model given: {why})")
    return chosen if chosen == table["embedded"] else _folder(chosen) or chosen


def _folder(name: str) -> str | None:
    return str(Path(name).resolve()) if Path(name).is_dir() else None


def say_source(name: str, source: str, revision: str | None) -> None:
    """Print where a model is loaded from, so that a folder of the same name as a hub id is noticed."""
    if source != name:
        where = f"the embedded {name}, in {source}"
    elif Path(source).is_dir():
        where = f"folder {source}"
    else:
        where = f"hub id {name} at revision {getattr(revision, 'resolved', None) or revision or 'main'}"
    say(f"MODEL: {where}")
