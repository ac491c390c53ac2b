"""A table of a report: text in rows and columns."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class TextTable:
    """A table as text.

    Attributes:
        title: its heading.
        columns: the names of the columns.
        rows: one list of cells a row.
        n_text: how many of the first columns are words; the others are numbers.
        folded: whether it is shown only on request.
        notes: sentences below the table.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    n_text: int = 1
    folded: bool = False
    notes: list[str] = field(default_factory=list)
