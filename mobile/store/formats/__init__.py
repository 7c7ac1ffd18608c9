"""Row formats: how a row holds an expert's matrices in fewer bytes than the model has them, one file each."""

from __future__ import annotations

from collections.abc import Mapping

from mobile.costs.rows import AS_IS, check_rows
from mobile.store.formats.int4 import Int4
from mobile.store.formats.int4_cpu import Int4Cpu
from mobile.store.formats.int8 import Int8
from mobile.store.formats.row_format import Part, RowFormat

FORMATS: Mapping[str, RowFormat | None] = {AS_IS: None, "int8": Int8(), "int4": Int4(), "int4-cpu": Int4Cpu()}

__all__ = ["FORMATS", "Int4Cpu", "Part", "RowFormat", "format_named"]


def format_named(name: str) -> RowFormat | None:
    """Return the row format of that name, None for "as-is". Raise Refused for an unknown one."""
    return FORMATS[check_rows(name)]
