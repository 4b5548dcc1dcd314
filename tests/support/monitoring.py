"""The queries of the Grafana dashboard and of the alerts under deploy/, as they are sent to Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.promql import Query, read

__all__ = ["DEPLOY", "Asked", "alerts", "dashboard", "page_queries", "panels", "queries"]

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"


@dataclass(frozen=True)
class Asked:
    """A query, who asks it, and which labels of the result are shown."""

    where: str
    query: Query
    shown: frozenset[str]


def dashboard() -> dict[str, Any]:
    """The dashboard."""
    document = json.loads((DEPLOY / "grafana" / "dashboards" / "fedmq.json").read_text())
    assert isinstance(document, dict)
    return document


def panels() -> list[dict[str, Any]]:
    """Its panels, without the rows' titles."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    """All alerts."""
    document = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())
    return [rule for group in document["groups"] for rule in group["rules"]]


def queries() -> Iterator[Asked]:
    """All of them. Grafana's variables are replaced, as it does."""
    for panel in panels():
        for target in panel["targets"]:
            legend = re.findall(r"\{\{\s*(\w+)\s*\}\}", target["legendFormat"])
            yield Asked(panel["title"], read(_replaced(target["expr"])), frozenset(legend))
    for annotation in dashboard()["annotations"]["list"]:
        yield Asked(annotation["name"], read(_replaced(annotation["expr"])), frozenset())
    for variable in dashboard()["templating"]["list"]:
        if variable["type"] == "query":
            found = re.fullmatch(r"label_values\((.+), (\w+)\)", variable["query"]["query"])
            assert found is not None, variable
            yield Asked(variable["name"], read(found[1]), frozenset({found[2]}))
    for rule in alerts():
        told = re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values()))
        yield Asked(rule["alert"], read(rule["expr"]), frozenset(told))


def page_queries() -> Iterator[Asked]:
    """Those that docs/operating.md gives."""
    page = (DEPLOY.parent / "docs" / "operating.md").read_text()
    for block in re.findall(r"```promql\n(.*?)```", page, re.DOTALL):
        for line in block.splitlines():
            if not line.startswith("#"):
                yield Asked("docs/operating.md", read(line), frozenset())


def _replaced(expression: str) -> str:
    names = {variable["name"] for variable in dashboard()["templating"]["list"]}
    for name in names:
        expression = re.sub(rf"\$({name}\b|\{{{name}\}})", "x", expression)
    expression = expression.replace("$__rate_interval", "1m")
    assert "$" not in expression, f"a variable that the dashboard does not have: {expression}"
    return expression
