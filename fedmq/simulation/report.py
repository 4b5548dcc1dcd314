"""One HTML page for a sweep, with its figures inside, that can be sent to somebody as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from aggregator.report.page import escape, figure, page, section, table
from fedmq.simulation.figures import as_data_url
from fedmq.simulation.sweep import Outcome

__all__ = ["Summary", "summaries", "write_report"]

Summary = dict[str, str]


def summaries(outcomes: Sequence[Outcome]) -> list[Summary]:
    """A row for each variant, of words and numbers as they are shown."""
    names = dict.fromkeys(outcome.variant for outcome in outcomes)
    return [_row(name, [o for o in outcomes if o.variant == name]) for name in names]


def write_report(
    file: Path, *, title: str, outcomes: Sequence[Outcome], figures: Mapping[str, bytes], scenario: str
) -> None:
    """Write the page.

    Args:
        file: where.
        title: of the page.
        outcomes: of all cells.
        figures: title and PNG of each.
        scenario: the file's text.
    """
    rows = summaries(outcomes)
    pictures = "".join(
        figure(name, "", f'<img alt="{escape(name)}" src="{as_data_url(png)}">') for name, png in figures.items()
    )
    body = (
        table(list(rows[0]), (list(row.values()) for row in rows)),
        section("Figures", f'<div class="figures">{pictures}</div>') if pictures else "",
        section("Scenario", f"<pre>{escape(scenario)}</pre>"),
    )
    subtitle = (
        f"{len(outcomes)} simulations by fedmq. Times are virtual seconds; from several seeds the median is shown, and "
        "the lowest and the highest in brackets."
    )
    file.write_text(page(title, subtitle, "\n".join(part for part in body if part)), encoding="utf-8")


def _row(name: str, outcomes: Sequence[Outcome]) -> Summary:
    results = [outcome.result for outcome in outcomes]
    metric, target = results[0]["metric"], results[0]["target"]
    row = {"variant": name, "seeds": str(len(results))}
    if target is not None:
        reached = [r["reached"] for r in results if r["reached"]]
        row["reached"] = f"{len(reached)} of {len(results)}"
        row[f"seconds to {metric} {target:g}"] = _spread([r["seconds"] for r in reached])
        row["updates to it"] = _spread([r["updates"] for r in reached])
        row["MB to it"] = _spread([(r["bytes_up"] + r["bytes_down"]) / 1e6 for r in reached])
    row[f"last {metric}"] = _spread([r["points"][-1]["metrics"][metric] for r in results])
    row["mean staleness"] = _spread([_mean_staleness(r["staleness"]) for r in results])
    row["rejected"] = _spread([sum(r["rejected"].values()) for r in results])
    return row


def _mean_staleness(counts: Mapping[str, int]) -> float:
    return sum(int(key) * count for key, count in counts.items()) / max(1, sum(counts.values()))


def _spread(values: Sequence[float]) -> str:
    if not values:
        return "-"
    middle = f"{median(values):,.4g}"
    return middle if len(values) == 1 else f"{middle} [{min(values):,.4g}, {max(values):,.4g}]"
