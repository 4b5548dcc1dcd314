"""What is under deploy/ for Prometheus and Grafana is whole, and fits together and to docker-compose.yml."""

from __future__ import annotations

import itertools
import re
import shutil
import subprocess
from typing import Any

import pytest
import yaml

from broker.settings import MetricsConfig, load
from tests.deploy import compose
from tests.support.monitoring import DEPLOY, alerts, dashboard, page_queries, panels, queries
from tests.support.promql import Query, read

OPERATING = (compose.ROOT / "docs" / "operating.md").read_text()


def yaml_of(name: str) -> Any:
    return yaml.safe_load((DEPLOY / name).read_text())


# -------------------------------------------------------------------------------------------------- the queries' reader


def test_an_expression_is_taken_apart() -> None:
    query = read(
        'sum by (run, le) (rate(a_bucket{run="x", b=~"y{}[1]|z"}[5m])) / on (run) group_left () max(c) > 0.5e3'
    )

    assert query == Query({"a_bucket": frozenset({"run", "b"}), "c": frozenset()}, frozenset({"run", "le"}))


@pytest.mark.parametrize("wrong", ["sum(a", "rete(a[5m])", "a{b}", "time()", "1"])
def test_what_is_none_is_refused(wrong: str) -> None:
    with pytest.raises(ValueError, match="in "):
        read(wrong)


# ----------------------------------------------------------------------------------------------------- Prometheus


def test_prometheus_finds_the_services_where_they_serve() -> None:
    config = yaml_of("prometheus/prometheus.yml")
    served = load({"metrics": MetricsConfig}, file=DEPLOY / "fedmq.toml", environment={}).table(
        "metrics", MetricsConfig
    )
    targets: dict[str, list[tuple[str, int]]] = {}
    for job in config["scrape_configs"]:
        places = [(name, found["port"]) for found in job.get("dns_sd_configs", []) for name in found["names"]]
        places += [
            (host, int(port))
            for found in job.get("static_configs", [])
            for host, port in (target.split(":") for target in found["targets"])
        ]
        targets[job["job_name"]] = places

    assert served.address == "0.0.0.0"  # noqa: S104 - in a container, whose ports are not published
    assert targets == {
        "fedmq-aggregator": [("aggregator", served.port)],
        "fedmq-worker": [("worker", served.port), ("evaluator", served.port)],
        "rabbitmq": [("rabbitmq", 15692)],
        "rabbitmq-queues": [("rabbitmq", 15692)],
    }
    assert {name for places in targets.values() for name, _ in places} <= set(compose.services())
    assert "rabbitmq_prometheus" in (DEPLOY / "rabbitmq" / "enabled_plugins").read_text()


def test_the_files_lie_in_the_containers_where_they_are_looked_for() -> None:
    services, configs = compose.services(), compose.load()["configs"]
    mounted = {
        mount["target"]: configs[mount["source"]]["file"]
        for name in ("prometheus", "grafana", "rabbitmq")
        for mount in services[name]["configs"]
    }

    assert mounted["/etc/prometheus/prometheus.yml"] == "./deploy/prometheus/prometheus.yml"
    assert "--config.file=/etc/prometheus/prometheus.yml" in services["prometheus"]["command"]
    for file in yaml_of("prometheus/prometheus.yml")["rule_files"]:
        assert mounted[file] == "./deploy/prometheus/alerts.yml"
    (provider,) = yaml_of("grafana/provisioning/dashboards/fedmq.yml")["providers"]
    home = services["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert mounted[home] == "./deploy/grafana/dashboards/fedmq.json"
    assert home.startswith(provider["options"]["path"])
    (source,) = yaml_of("grafana/provisioning/datasources/prometheus.yml")["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert "/etc/grafana/provisioning/datasources/prometheus.yml" in mounted


def test_nobody_can_log_in_to_grafana_or_change_it() -> None:
    environment = compose.services()["grafana"]["environment"]

    assert environment["GF_AUTH_ANONYMOUS_ORG_ROLE"] == "Viewer"
    assert environment["GF_AUTH_BASIC_ENABLED"] == "false"
    assert environment["GF_SECURITY_DISABLE_INITIAL_ADMIN_CREATION"] == "true"


@pytest.mark.parametrize("rule", alerts(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_is_so_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"Fedmq[A-Z][A-Za-z]+", rule["alert"])
    assert rule["labels"] in ({"severity": "critical"}, {"severity": "warning"}, {"severity": "info"})
    assert set(rule["annotations"]) == {"summary", "description"}
    assert re.fullmatch(r"\d+m", rule.get("for", "0m"))


def test_each_alert_has_a_name_of_its_own_and_is_tested() -> None:
    names = [rule["alert"] for rule in alerts()]
    assert len(set(names)) == len(names)
    assert set(names) == set(re.findall(r"Fedmq\w+", (DEPLOY / "prometheus" / "alerts.test.yml").read_text()))


def test_alerts_fire_for_whom_they_should() -> None:
    """What the page says of a slow, a crashed and a poisoned worker, and of everything else, by Prometheus itself."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed; Debian and Ubuntu have it in the package prometheus")

    done = subprocess.run(
        [promtool, "test", "rules", "alerts.test.yml"],
        cwd=DEPLOY / "prometheus",
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr


# -------------------------------------------------------------------------------------------------------- Grafana


def test_panels_do_not_overlap_and_are_told_apart() -> None:
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for panel in every
        for place in [panel["gridPos"]]
        for x, y in itertools.product(
            range(place["x"], place["x"] + place["w"]), range(place["y"], place["y"] + place["h"])
        )
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


@pytest.mark.parametrize("panel", panels(), ids=lambda panel: panel["title"])
def test_a_panel_asks_the_chosen_prometheus(panel: dict[str, Any]) -> None:
    assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
    assert panel["type"] in {"stat", "timeseries", "table"}
    assert panel["description"].endswith(".")
    references = [target["refId"] for target in panel["targets"]]
    assert len(set(references)) == len(references)
    assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_the_operators_page_names_panels_and_alerts_as_they_are_called() -> None:
    (section,) = re.findall(r"## From Grafana\n(.*?)\n## ", OPERATING, re.DOTALL)
    titles = {panel["title"] for panel in panels()}
    rows = [row.split(" | ") for row in section.splitlines() if row.startswith("| ")][2:]

    for row in rows:
        for title in re.findall(r"\*([^*]+)\*", row[1]):
            assert any(known == title or known.startswith(f"{title}:") for known in titles), title
    assert {rule["alert"] for rule in alerts()} >= set(re.findall(r"`(Fedmq\w+)`", section))
    assert list(page_queries())


def test_every_query_can_be_read() -> None:
    asked = list(queries())
    assert len(asked) > 60
    for one in asked:
        # What a legend or a text shows is there only if the result is grouped by it, or not grouped at all.
        assert not one.query.grouped or one.shown <= one.query.grouped | {"instance", "job", "alertname"}, one
