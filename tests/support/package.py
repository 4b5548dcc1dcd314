"""A package of somebody else's, installed as pip would: a module, and metadata with entry points beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

__all__ = ["install"]


def install(site: Path, name: str, source: str, points: Mapping[str, Mapping[str, str]], version: str = "1.0") -> Path:
    """Put the module ``name`` into ``site``, which then only has to be on the path.

    Args:
        site: a folder, made if it is not there.
        name: of the module and of the distribution.
        source: of the module.
        points: the entry points' values by name, by group.
        version: of the distribution.
    """
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (site / f"{name}.py").write_text(source)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = (
        f"[{group}]\n" + "".join(f"{key} = {value}\n" for key, value in own.items()) for group, own in points.items()
    )
    (info / "entry_points.txt").write_text("\n".join(sections))
    return site
