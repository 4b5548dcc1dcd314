"""Which releases an aggregator runs on, for the history and the report."""

from __future__ import annotations

import platform
from functools import cache
from importlib.metadata import PackageNotFoundError, version

__all__ = ["software"]

#: Distributions whose release may matter for what a run has come to.
PACKAGES = ("fedmq", "numpy", "ml_dtypes", "msgpack", "pika", "pydantic", "safetensors", "xxhash", "zstandard")


@cache
def software() -> dict[str, str]:
    """Names and numbers: Python, the system, and the packages that are installed."""
    found = {"python": platform.python_version(), "system": f"{platform.system()} {platform.machine()}"}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
