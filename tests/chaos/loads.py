"""What the updates and versions are made of that a run of chaos moves; the count is the same for all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["LOADS"]

Settings = Mapping[str, Mapping[str, Any]]

_SHEET: Settings = {
    # The smallest chunks: an update and a version of 512 KiB take nine of them.
    "broker": {"chunk_bytes": 65_536},
    "worker": {"task": "tests.support.tasks:SHEET"},
}
#: By name, the settings that differ, by table.
LOADS: Mapping[str, Settings] = {
    "whole": {},
    "chunks": _SHEET,
    # Rows of zeros and ones become small: few chunks, which differ in size.
    "packed": {**_SHEET, "broker": {**_SHEET["broker"], "pack_chunks": True}},
    # A row of ones is what topk keeps of a sheet of eight, so the count stays exact; what workers are told of a version
    # need not be.
    "codecs": {**_SHEET, "aggregator": {"update_codec": "topk:0.125", "version_codec": "int8"}},
}
