"""The frame of a page of HTML that stands for itself: no script, nothing from elsewhere, by day and by night."""

from __future__ import annotations

import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["Cell", "details", "escape", "figure", "page", "section", "table", "tiles"]

#: Characters that would not be seen, or would turn others around, by their category: control, format, surrogate.
_UNSEEN = {"Cc", "Cf", "Cs"}

_STYLE = """
:root { color-scheme: light dark; --paper: #fcfcfb; --card: #fff; --ink: #1d1f23; --soft: #646a73; --line: #e3e4e6;
  --c0: #2563c9; --c1: #d0661a; --c2: #24875a; --c3: #9a45b8; --c4: #b23a4a; --bad: #b3261e; --warm: #9a6400 }
@media (prefers-color-scheme: dark) { :root { --paper: #131417; --card: #1b1d21; --ink: #e7e8ea; --soft: #9aa0a9;
  --line: #30343a; --c0: #74a7ff; --c1: #f2a05c; --c2: #5cc694; --c3: #cf92e8; --c4: #f08592; --bad: #ff8a80;
  --warm: #f0b95a } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; max-width: 74rem; margin: 0 auto;
  padding: 2rem 1.25rem 4rem; color: var(--ink); background: var(--paper); font-variant-numeric: tabular-nums }
h1 { font-size: 1.7rem; line-height: 1.25; margin: 0 0 .2rem; overflow-wrap: anywhere }
h2 { font-size: 1.15rem; margin: 2.6rem 0 .8rem; padding-top: 1.1rem; border-top: 1px solid var(--line) }
h3 { font-size: 1rem; margin: 1.4rem 0 .5rem } p { margin: .5rem 0; max-width: 48rem }
.soft, figcaption, dt { color: var(--soft) } .bad { color: var(--bad) } .warm { color: var(--warm) }
code, pre, .mono { font: .86em/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace }
code, .mono { overflow-wrap: anywhere }
pre { background: var(--card); border: 1px solid var(--line); border-radius: 6px; padding: .8rem; overflow-x: auto }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(7.9rem, 1fr)); gap: .75rem; margin: 1.4rem 0 0;
  padding: 0 }
.tiles div, figure { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .7rem .9rem }
dt { font-size: .82rem } dd { margin: 0; font-size: 1.35rem; line-height: 1.3; overflow-wrap: anywhere }
dd small { display: block; font-size: .8rem; color: var(--soft); line-height: 1.35 }
.figures { display: grid; align-items: start; gap: 1rem; margin-bottom: 1rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 30rem), 1fr)) }
img { display: block; max-width: 100%; border-radius: 4px }
figure { margin: 0; min-width: 0 } figcaption { font-size: .85rem; margin-bottom: .35rem }
figcaption b { color: var(--ink); display: block; font-size: .95rem }
svg { display: block; width: 100%; height: auto }
svg text { font: 11px system-ui, -apple-system, "Segoe UI", sans-serif; fill: var(--soft) }
svg .label { fill: var(--ink) } svg .grid { stroke: var(--line) } svg .axis { stroke: var(--soft) }
svg .mark { stroke: var(--soft); stroke-dasharray: 3 3 } svg polyline { fill: none; stroke-width: 1.6;
  stroke-linejoin: round }
svg .band { stroke: none; opacity: .18 }
.l0 { stroke: var(--c0) } .l1 { stroke: var(--c1) } .l2 { stroke: var(--c2) } .l3 { stroke: var(--c3) }
.l4 { stroke: var(--c4) } .f0 { fill: var(--c0) } .f1 { fill: var(--c1) } .f2 { fill: var(--c2) }
.f3 { fill: var(--c3) } .f4 { fill: var(--c4) }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .9rem }
th, td { padding: .3rem .9rem .3rem 0; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top;
  white-space: nowrap }
th { color: var(--soft); font-weight: 500 } .left, .mono { text-align: left } td.text { white-space: normal;
  overflow-wrap: anywhere; min-width: 11rem } .text { text-align: left }
details { margin: .8rem 0 } summary { cursor: pointer; color: var(--c0) }
@media print { body { max-width: none; padding: 0 } figure, .tiles div { break-inside: avoid } }
"""

_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer"><title>{title}</title><style>{style}</style></head>
<body>
<header><h1>{title}</h1>
<p class="soft">{subtitle}</p></header>
<main>
{body}
</main></body></html>
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table; ``kind`` is a class of the page's style: ``left``, ``text``, ``mono``, ``bad``, ``warm``."""

    text: str
    kind: str = ""


def escape(text: object) -> str:
    """``text`` as it can stand in HTML, in an attribute too; what would not be seen is shown as U+FFFD."""
    seen = "".join("\ufffd" if unicodedata.category(c) in _UNSEEN and c not in "\n\t" else c for c in str(text))
    return html.escape(seen)


def page(title: str, subtitle: str, body: str) -> str:
    """A whole page. ``title`` and ``subtitle`` are text, ``body`` is HTML."""
    return _PAGE.format(title=escape(title), subtitle=escape(subtitle), style=_STYLE, body=body)


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading; nothing if there is nothing in it. ``parts`` are HTML."""
    inner = "\n".join(part for part in parts if part)
    return f"<section><h2>{escape(title)}</h2>\n{inner}\n</section>" if inner else ""


def details(summary: str, inner: str) -> str:
    """``inner``, which is HTML, folded away behind ``summary``."""
    return f"<details><summary>{escape(summary)}</summary>\n{inner}\n</details>"


def tiles(facts: Iterable[tuple[str, str, str]]) -> str:
    """Figures at a glance: name, value, and a word beside it."""
    shown = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(note)}</small>' if note else ''}</dd></div>"
        for name, value, note in facts
    )
    return f'<dl class="tiles">{"".join(shown)}</dl>'


def figure(title: str, caption: str, inner: str) -> str:
    """A picture, which is HTML, with its title and caption; nothing if there is no picture."""
    if not inner:
        return ""
    return f"<figure><figcaption><b>{escape(title)}</b>{escape(caption)}</figcaption>{inner}</figure>"


def table(head: Sequence[str], rows: Iterable[Sequence[str | Cell]]) -> str:
    """A table whose first column is words, the others numbers unless a :class:`Cell` says other; "" without rows."""
    cells = [[_cell(at, value) for at, value in enumerate(row)] for row in rows]
    if not cells:
        return ""
    # A heading stands where the first value under it does.
    kinds = [set(cell.kind.split()) & {"left", "text", "mono"} for cell in cells[0]]
    names = "".join(
        f'<th scope="col"{_kind(" ".join(sorted(kind)))}>{escape(name)}</th>'
        for name, kind in zip(head, kinds, strict=True)
    )
    lines = ("".join(f"<td{_kind(cell.kind)}>{escape(cell.text)}</td>" for cell in row) for row in cells)
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return (
        f'<div class="wide" tabindex="0"><table><thead><tr>{names}</tr></thead><tbody>\n{body}\n</tbody></table></div>'
    )


def _cell(at: int, value: str | Cell) -> Cell:
    return value if isinstance(value, Cell) else Cell(value, "left" if at == 0 else "")


def _kind(kind: str) -> str:
    return f' class="{escape(kind)}"' if kind else ""
