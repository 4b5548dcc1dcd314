"""The parts of a report, each HTML made of :class:`Facts`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

from aggregator.report.charts import Curve, Mark, bars, columns, curves, thinned
from aggregator.report.chronicle import Chronicle, Column
from aggregator.report.facts import Facts
from aggregator.report.page import Cell, details, escape, figure, section, table, tiles

__all__ = ["configuration", "figures", "headline", "lineage", "rejections", "software", "workers"]

#: Workers that a figure shows; the table has up to ``MOST_ROWS``.
MOST_BARS = 40
MOST_ROWS = 500
#: Upright lines in a figure: more would hide the curve.
MOST_MARKS = 60
#: Metrics that are tiles.
MOST_TILES = 3
DIGITS = 12
#: Metrics of which less is better.
FALL = ("loss", "error", "perplexity", "mse", "mae")


# ------------------------------------------------------------------------------------------------ at a glance


def headline(facts: Facts) -> str:
    """The run at a glance."""
    told, head = facts.chronicle, facts.head
    outcome = str(facts.summary.get("outcome", ""))
    state = "done" if facts.is_over else "paused" if head.paused else "stopped" if outcome == "stopped" else "open"
    starts = told.happened["start"]
    shown = [
        ("state", state, "as far as its folder tells" if state == "open" else f"epoch {head.epoch}"),
        ("versions", f"{head.version:,}", _times(starts, "start of an aggregator", "starts of an aggregator")),
        ("updates", f"{facts.counting:,}", _taken_back(facts)),
        ("workers", f"{sum(1 for row in facts.rows if row['updates']):,}", _kept_out(facts)),
        ("rejected", f"{sum(head.rejected.values()):,}", ", ".join(sorted(head.rejected)) or "nothing"),
        ("time", _span(told), _between(told)),
    ]
    for name, column in list(told.metrics.items())[:MOST_TILES]:
        best = _best(name, column)
        note = "" if best is None else f"best {_figure(best[1])} at version {best[0]}"
        shown.append((f"{name}, held-out", _figure(column.last), note))
    return tiles(shown)


def _taken_back(facts: Facts) -> str:
    lost = facts.chronicle.updates - facts.counting
    return f"in the model; {lost:,} more taken back" if lost > 0 else "in the model"


def _kept_out(facts: Facts) -> str:
    kept_out = [row["worker"] for row in facts.rows if row["quarantined_until"] is not None]
    return f"in quarantine: {', '.join(kept_out[:3])}" if kept_out else ""


def _best(name: str, column: Column) -> tuple[int, float] | None:
    pairs = [(x, y) for x, y in zip(column.x, column.y, strict=True) if y == y]  # noqa: PLR0124 (NaN)
    if not pairs:
        return None
    choose = min if any(word in name.lower() for word in FALL) else max
    x, y = choose(pairs, key=lambda pair: pair[1])
    return int(x), y


# ---------------------------------------------------------------------------------------------------- figures


def figures(facts: Facts) -> str:
    """Curves over versions."""
    told = facts.chronicle
    marks = list(_marks(told))
    parts = [_losses(told, marks)]
    for name, column in told.metrics.items():
        if name != "loss":
            line = Curve("held-out", thinned(column.x, column.y))
            parts.append(figure(name, "As evaluators have reported.", curves([line], x_name="version", marks=marks)))
    for name, spread in told.federated.items():
        lines = [Curve(f"{key} of workers", thinned(spread[key].x, spread[key].y)) for key in ("mean", "min", "max")]
        title = f"{name}, on the workers' own held-out data"
        parts.append(figure(title, "Weighted by examples.", curves(lines, x_name="version", marks=marks)))
    stale = [
        Curve("median", thinned(told.stale_median.x, told.stale_median.y)),
        Curve("highest", thinned(told.stale_most.x, told.stale_most.y)),
    ]
    parts += [
        figure(
            "Staleness by version",
            "How many versions old the parameters were that an update started from.",
            curves(stale, x_name="version", marks=marks),
        ),
        figure(
            "Staleness of all updates",
            "Share of the updates.",
            columns(told.staleness, x_name="staleness, in versions"),
        ),
        figure(
            "Seconds of a round",
            "From the version before to this one.",
            _single("seconds", told.seconds, marks, may_be_wide=True),
        ),
        figure(
            "Norm of the updates",
            "The median of each version's updates: how far a worker wants to go.",
            _single("median norm", told.norm, marks, may_be_wide=True),
        ),
    ]
    inner = "\n".join(part for part in parts if part)
    note = "Upright lines: a start of an aggregator, or a version that was taken back."
    return section("Figures", f'<p class="soft">{note}</p>' if marks else "", f'<div class="figures">{inner}</div>')


def _losses(told: Chronicle, marks: list[Mark]) -> str:
    lines = [Curve("training", thinned(told.loss.x, told.loss.y))]
    if (held_out := told.metrics.get("loss")) is not None:
        lines.append(Curve("held-out", thinned(held_out.x, held_out.y)))
    return figure(
        "Loss",
        "Training: the mean of what workers say, by examples. Held-out: as evaluators have reported.",
        curves(lines, x_name="version", marks=marks, may_be_wide=True),
    )


def _single(name: str, column: Column, marks: list[Mark], *, may_be_wide: bool) -> str:
    line = Curve(name, thinned(column.x, column.y))
    return curves([line], x_name="version", marks=marks, may_be_wide=may_be_wide)


def _marks(told: Chronicle) -> Iterator[Mark]:
    """What breaks curves; the first start does not."""
    early, _, late = told.events
    lines = [line for line in (*early, *late) if line["kind"] in ("start", "taken back")]
    for line in [line for line in lines if line["kind"] != "start" or line["version"] > 0][-MOST_MARKS:]:
        yield Mark(float(line["version"]), f"version {line['version']}: {_what(line)}")


# ------------------------------------------------------------------------------------------- workers, rejections


def workers(facts: Facts) -> str:
    """Who took part, and what it brought."""
    rows = sorted(facts.rows, key=lambda row: (-row["updates"], row["worker"]))
    some = rows[:MOST_BARS]
    worth = {row["worker"]: row["contribution"] for row in some if row["contribution"] is not None}
    cosines = {row["worker"]: row["cosine"] for row in some if row["cosine"] is not None}
    more = f" The first {MOST_BARS} of {len(rows):,}." if len(rows) > MOST_BARS else ""
    pictures = [
        figure(
            "Updates of each worker",
            f"Those that count in the newest version.{more}",
            bars({row["worker"]: float(row["updates"]) for row in some}),
        ),
        figure(
            "Contribution of each worker",
            f"What 'fedmq contribution' found last: by how much the loss on held-out data fell.{more}",
            bars(worth, colour=2),
        ),
        figure(
            "Agreement with the others",
            f"Mean cosine of a worker's updates with what their rounds came to; below 0 they point against it.{more}",
            bars(cosines, colour=3),
        ),
    ]
    head = ("worker", "updates", "share", "examples", "staleness", "s/step", "norm", "cosine", "rejected", "score", "")
    listing = table(head, (_worker_row(row) for row in rows[:MOST_ROWS]))
    if len(rows) > MOST_ROWS:
        listing += f'<p class="soft">The {MOST_ROWS} with the most updates, of {len(rows):,}.</p>'
    inner = "\n".join(picture for picture in pictures if picture)
    return section("Workers", f'<div class="figures">{inner}</div>' if inner else "", listing)


def _worker_row(row: Mapping[str, Any]) -> list[str | Cell]:
    rejected = sum(row["rejected"].values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(row["rejected"].items()))
    note = Cell(reasons, "text")
    if row["quarantined_until"] is not None:
        note = Cell(f"in quarantine until {_moment(row['quarantined_until'])}; {reasons}", "text bad")
    return [
        row["worker"],
        f"{row['updates']:,}",
        "" if row["share"] is None else f"{row['share']:.1%}",
        f"{row['examples']:,}",
        *(_figure(row[name]) for name in ("staleness", "pace", "norm")),
        Cell(_figure(row["cosine"]), "bad" if (row["cosine"] or 0) < 0 else ""),
        Cell(f"{rejected:,}" if rejected else "", "warm"),
        _figure(row["score"]) if row["score"] else "",
        note,
    ]


def rejections(facts: Facts) -> str:
    """What was not taken, and why."""
    told, rejected = facts.chronicle, facts.head.rejected
    if not rejected and not told.rejected:
        return section("Rejections", "<p>No update was rejected.</p>")
    lines = [
        Curve(reason, thinned(column.x, column.y))
        for reason, column in sorted(told.rejected.items(), key=lambda pair: -(pair[1].last or 0))
    ]
    by_reason = {reason: float(number) for reason, number in sorted(rejected.items(), key=lambda pair: -pair[1])}
    pictures = [
        figure("Rejected updates by reason", "All that were, by the newest checkpoint.", bars(by_reason, colour=4)),
        figure(
            "When they were rejected",
            "How many so far, by the version that was the newest.",
            curves(lines, x_name="version"),
        ),
    ]
    listing = table(
        ("worker", "rejected", "reasons"),
        (
            [name, f"{sum(reasons.values()):,}", Cell(_counted(reasons), "text")]
            for name, reasons in sorted(told.rejected_of.items(), key=lambda pair: -sum(pair[1].values()))[:MOST_ROWS]
        ),
    )
    inner = "\n".join(picture for picture in pictures if picture)
    return section("Rejections", f'<div class="figures">{inner}</div>', listing)


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())


# --------------------------------------------------------------------------------------- lineage, configuration


def lineage(facts: Facts) -> str:
    """How the versions came to be."""
    told, head = facts.chronicle, facts.head
    sizes = [tensor.shape for tensor in head.model.tensors]
    numbers = sum(_product(shape) for shape in sizes)
    chain = "each version begins where the one before has ended"
    if told.breaks:
        chain = f"{told.breaks} versions do not begin where the one before has ended: 'fedmq checkpoint verify'"
    rows: list[list[str | Cell]] = [
        ["model", Cell(f"{numbers:,} numbers in {len(sizes):,} tensors, {head.model.nbytes:,} bytes", "text")],
        ["parameters at first", Cell(told.first_digest or head.digest, "text mono")],
        [f"parameters of version {head.version}", Cell(head.digest, "text mono")],
        ["chain of digests", Cell(chain, "text bad" if told.breaks else "text")],
        ["open round", Cell(_times(len(head.entries), "update", "updates") or "empty", "text")],
        ["updates kept from", Cell("not kept" if head.kept_from is None else f"version {head.kept_from}", "text")],
    ]
    for kind, name in _KINDS.items():
        if number := told.happened[kind]:
            rows.append([name, Cell(f"{number:,}", "text")])
    early, left_out, late = told.events
    happened: list[list[str | Cell]] = [_event_row(line) for line in early]
    if left_out:
        happened.append(["", "", Cell(f"… {left_out:,} left out ('fedmq history' has them) …", "text")])
    happened += [_event_row(line) for line in late]
    events = table(("version", "time (UTC)", "what"), happened)
    newest = table(("version", "time (UTC)", "updates", "staleness", "loss", "digest"), map(_version_row, told.newest))
    return section(
        "Lineage",
        table(("", ""), rows),
        details(f"What happened: starts, commands, quarantines, versions taken back ({len(happened)})", events)
        if happened
        else "",
        details("The newest versions", newest) if newest else "",
    )


_KINDS = {
    "start": "starts of an aggregator",
    "command": "commands of operators",
    "quarantine": "quarantines",
    "taken back": "times taken back to an earlier version",
    "spoiled": "rounds left out, since their step was not finite",
}


def _event_row(line: Mapping[str, Any]) -> list[str | Cell]:
    return [str(line.get("version", "")), _moment(line.get("time")), Cell(_what(line), "text")]


def _version_row(line: Mapping[str, Any]) -> list[str | Cell]:
    entries = [entry for entry in line.get("updates") or () if isinstance(entry, Mapping)]
    stale = [int(s) for entry in entries if isinstance(s := entry.get("staleness"), int)]
    loss, digest = line.get("loss"), str(line.get("after", ""))[:DIGITS]
    span = "" if not stale else f"{min(stale)}" if min(stale) == max(stale) else f"{min(stale)} to {max(stale)}"
    return [
        str(line["version"]),
        _moment(line.get("time")),
        f"{len(entries):,}",
        span,
        _figure(loss if isinstance(loss, int | float) else None),
        Cell(digest, "mono"),
    ]


def _what(line: Mapping[str, Any]) -> str:  # noqa: PLR0911 - one a kind of line
    match line.get("kind"):
        case "start":
            return f"an aggregator took up the run, epoch {line.get('epoch')}"
        case "command":
            return f"{line.get('what')}{' (from the next round on)' if line.get('pending') else ''}"
        case "quarantine":
            return (
                f"{line.get('worker')} is in quarantine until {_moment(line.get('until'))}, score {line.get('score')}"
            )
        case "release":
            return f"{line.get('worker')} is out of quarantine"
        case "taken back":
            without = f" without {', '.join(map(str, line['without']))}" if line.get("without") else ""
            return f"taken back to version {line.get('source')}{without}"
        case "spoiled":
            return f"the step was not finite; {line.get('dropped', 0)} updates left out"
    return str(line.get("kind"))


def configuration(facts: Facts) -> str:
    """The settings in force: those that differ from the defaults, then all."""
    changes = facts.head.changes
    given = facts.settings.get("aggregator", {})
    rows: list[list[str | Cell]] = [
        [name, Cell(str(value), "text mono"), Cell(_default(facts.defaults.get(name)), "text mono")]
        for name, value in given.items()
        if value != facts.defaults.get(name)
    ]
    rows += [[f"{name} (fedmq set)", Cell(str(value), "text mono"), ""] for name, value in sorted(changes.items())]
    own = table(("aggregator.", "value", "default"), rows)
    return section(
        "Configuration",
        own or "<p>All settings of the aggregator are the defaults.</p>" if facts.config else "",
        details("All settings, as in the run's folder", f"<pre>{escape(facts.config)}</pre>") if facts.config else "",
        "" if facts.config else "<p>There is no config.toml: no aggregator has been started by its command yet.</p>",
    )


def software(facts: Facts) -> str:
    """Releases that the run was made with, and this page."""
    columns_ = [(f"from version {version}", found) for version, found in facts.chronicle.software]
    columns_ = [*columns_[-4:], ("this report", facts.by)]
    names = dict.fromkeys(name for _, found in columns_ for name in found)
    rows: list[list[str | Cell]] = [
        [name, *(Cell(found.get(name, ""), "left") for _, found in columns_)] for name in names
    ]
    return section("Versions of the software", table(("", *(title for title, _ in columns_)), rows))


# ----------------------------------------------------------------------------------------------------- in words


def _default(value: object) -> str:
    return "not set" if value is None else str(value)


def _times(count: int, one: str, many: str) -> str:
    return "" if not count else f"{count:,} {one if count == 1 else many}"


def _figure(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _moment(seconds: object) -> str:
    try:
        return f"{datetime.fromtimestamp(float(seconds), UTC):%Y-%m-%d %H:%M:%S}"  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, OSError):
        return ""


def _span(told: Chronicle) -> str:
    if told.first_time is None or told.last_time is None:
        return "-"
    seconds = max(0.0, told.last_time - told.first_time)
    if seconds < 120:
        return f"{seconds:.1f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} days"


def _between(told: Chronicle) -> str:
    return "" if told.first_time is None else f"from {_moment(told.first_time)} UTC"


def _product(shape: tuple[int, ...]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result
