"""TLS against a real broker: who is let in, who is not, and a whole run of which nothing can be read on the way."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from broker.admin import Admin
from broker.amqp.credentials import account_of
from broker.amqp.look import counts
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.amqp.trial import examine
from broker.certificates import Authority
from broker.errors import AccessRefused, BrokerUnreachable, ConfigError, FedmqError, Untrusted
from broker.topology import Topology
from broker.transport import Outgoing
from tests.support.ends import Ends, confirmed
from tests.support.node import fresh_topology, require_rabbitmq
from tests.support.site import Site
from tests.support.tls import add_account, files_of, tls_config, tls_node
from tests.support.waiting import Inbox

pytestmark = pytest.mark.broker
RUN = Topology("nobody-s")


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    made = Authority.new(tmp_path_factory.mktemp("tls"))
    made.server(["localhost", "127.0.0.1"])
    return made


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    """Another authority."""
    return Authority.new(tmp_path_factory.mktemp("stranger"))


@pytest.fixture(scope="module")
def secure(authority: Authority) -> Iterator[PrivateNode]:
    """One node for all tests here."""
    require_rabbitmq()
    with tls_node(authority) as running:
        for name in ("aggregator", "w1", "w2"):
            add_account(running, name)
        yield running


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def test_a_certificate_is_the_login_and_its_name_the_account(
    secure: PrivateNode, authority: Authority, ends: Ends
) -> None:
    topology = fresh_topology("mutual")
    config = tls_config(secure, authority, "w1")
    assert account_of(config) == "w1"
    _, inbox = ends.aggregator(tls_config(secure, authority, "aggregator"), topology)
    worker, _ = ends.worker(config, topology)

    confirmed(worker.publish, Outgoing(body=b"over TLS", headers={"worker": "w1"}))

    assert (worker.account, inbox.wait_delivery().user) == ("w1", "w1")


def test_a_password_over_tls_and_the_management_api(secure: PrivateNode, authority: Authority) -> None:
    config = tls_config(secure, authority)
    assert counts(config, RUN) == {}
    assert account_of(config) == secure.user
    me: Any = Admin.of(config).get("/whoami")
    assert me["name"] == secure.user


def test_the_management_api_is_not_asked_by_certificate_nor_trusted_blindly(
    secure: PrivateNode, authority: Authority, stranger: Authority
) -> None:
    with pytest.raises(AccessRefused, match=r"broker.url must name user and password"):
        Admin.of(tls_config(secure, authority, "w1")).get("/whoami")
    other = tls_config(secure, authority, ca_file=stranger.folder / "ca.pem")
    with pytest.raises(BrokerUnreachable, match=r"does not answer: its certificate is signed by nobody"):
        Admin.of(other).get("/whoami")
    away = tls_config(secure, authority, management_url="http://mq.example.org:15672")
    with pytest.raises(AccessRefused, match=r"not asked: the password would go there without TLS"):
        Admin.of(away).get("/whoami")


def refused(config: Any) -> FedmqError:
    with pytest.raises(FedmqError) as caught:
        counts(config, RUN)
    return caught.value


def test_a_broker_that_must_not_be_trusted_is_left_alone(
    secure: PrivateNode, authority: Authority, stranger: Authority
) -> None:
    error = refused(tls_config(secure, authority, "w1", ca_file=stranger.folder / "ca.pem"))
    assert isinstance(error, Untrusted)
    assert "signed by nobody whom broker.ca_file" in str(error)

    error = refused(tls_config(secure, authority, "w1", ca_file=None))
    assert isinstance(error, Untrusted)
    assert "name its file as broker.ca_file" in str(error)

    plain = secure.url.rpartition(":")[2].rstrip("/")
    error = refused(tls_config(secure, authority, "w1", url=f"amqps://localhost:{plain}/"))
    assert isinstance(error, Untrusted)
    assert "does not speak TLS at this port" in str(error)


def test_who_must_not_be_let_in_is_not(secure: PrivateNode, authority: Authority, stranger: Authority) -> None:
    """By the broker: it may hang up before it has said why."""
    inside = f"amqps://{secure.user}:{secure.password}@localhost:{secure.port('tls')}/"
    nobody: dict[str, Any] = {"certificate_file": None, "key_file": None}
    authority.client("late", days=-1)
    for wrong in (dict(files_of(stranger, "w1")), {"url": inside, **nobody}, dict(files_of(authority, "late"))):
        error = refused(tls_config(secure, authority, "w1", **wrong))
        assert isinstance(error, BrokerUnreachable | Untrusted)

    error = refused(tls_config(secure, authority, "unknown"))
    assert isinstance(error, AccessRefused)
    assert "login of user 'unknown': that is the name in broker.certificate_file" in str(error)

    url = f"amqp://u:p@localhost:{secure.port('tls')}/"
    assert isinstance(refused(tls_config(secure, authority, url=url, **nobody)), BrokerUnreachable)


def test_a_worker_does_not_wait_for_a_broker_that_it_must_not_trust(
    secure: PrivateNode, authority: Authority, stranger: Authority
) -> None:
    config = tls_config(secure, authority, "w1", ca_file=stranger.folder / "ca.pem")
    inbox, transport = Inbox(), AmqpWorkerTransport(config, RUN, worker="w1")
    transport.open(inbox)
    try:
        inbox.wait(inbox.failures)
        assert isinstance(inbox.failures()[0].error, Untrusted)
    finally:
        transport.close()


def test_a_certificate_that_is_renewed_is_shown_at_the_next_connection(
    secure: PrivateNode, authority: Authority, stranger: Authority, tmp_path: Path, ends: Ends
) -> None:
    mine = {"certificate_file": tmp_path / "mine.pem", "key_file": tmp_path / "mine.key"}
    original = files_of(authority, "w2")

    def put(files: Any) -> None:
        for key, path in mine.items():
            path.touch(mode=0o600)
            path.write_bytes(files[key].read_bytes())

    topology = fresh_topology("renewed")
    ends.aggregator(tls_config(secure, authority, "aggregator"), topology)
    put(original)
    worker, inbox = ends.worker(tls_config(secure, authority, "w2", **mine), topology, "w2")
    put(files_of(stranger, "w2"))
    worker.drop()
    inbox.wait(inbox.losses)
    assert inbox.failures() == []
    put(original)
    inbox.wait(lambda: len(inbox.connections()) >= 2)
    assert inbox.failures() == []


def test_the_doctor_s_examination_knows_the_line(secure: PrivateNode, authority: Authority) -> None:
    (greeting,) = examine(tls_config(secure, authority, "w1"), fresh_topology(), "w1", roles=("worker",)).greetings
    assert greeting.user == "w1"
    assert greeting.tls is not None
    assert greeting.tls.version == "TLSv1.3"
    assert 820 < greeting.tls.days_left < 826


def test_a_plain_address_elsewhere_is_refused_before_anything_is_sent(
    authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    from broker.settings import BrokerConfig  # noqa: PLC0415

    url = f"amqp://u:p@mq-{secrets.token_hex(3)}.invalid/"
    with pytest.raises(ConfigError, match=r"without TLS.*amqps://.*broker.allow_plain = true"):
        AmqpWorkerTransport(BrokerConfig.model_validate({"url": url}), RUN, worker="w1")
    allowed = BrokerConfig.model_validate({"url": url, "allow_plain": True})
    for _ in range(2):
        AmqpWorkerTransport(allowed, RUN, worker="w1")
    assert caplog.text.count("without TLS, as broker.allow_plain allows") == 1
    with pytest.raises(ConfigError, match=r"must begin with amqps://"):
        AmqpWorkerTransport(
            BrokerConfig.model_validate({"url": "amqp://localhost/", **files_of(authority, "w1")}), RUN, worker="w1"
        )


@pytest.mark.slow
def test_a_whole_run_over_mutual_tls(secure: PrivateNode, authority: Authority, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "broker": {"ca_file": str(authority.folder / "ca.pem")},
        "worker": {"max_updates": 6},
        "aggregator": {"stop_after_rounds": 3},
    }
    url = f"amqps://localhost:{secure.port('tls')}/"

    def own(name: str) -> tuple[str, ...]:
        pairs = (("--set", f"broker.{key}={path}") for key, path in files_of(authority, name).items())
        return tuple(word for pair in pairs for word in pair)

    with Site(tmp_path, url, workers=2, settings=settings, prefix="tls") as site:
        site.initialise()
        site.command("aggregator", *own("aggregator"), log="aggregator.log")
        workers = [
            site.command(
                "worker", "--name", f"w{index}", "--shard", f"{index - 1}/2", *own(f"w{index}"), log=f"w{index}.log"
            )
            for index in (1, 2)
        ]
        # A worker with another's certificate is told so, and ends.
        thief = site.command("worker", "--name", "w3", "--shard", "0/2", *own("w2"), log="w3.log")
        assert site.processes[0].wait(100) == 0, site.log("aggregator.log")
        assert [worker.wait(60) for worker in workers] == [0, 0], site.log("w1.log") + site.log("w2.log")
        assert thief.wait(60) == 2, site.log("w3.log")
        assert "w2" in site.log("w3.log")
        checkpoint = site.store.load()
        assert checkpoint.version == 3
        total = float(sum(np.asarray(tensor).sum() for tensor in checkpoint.parameters.values()))
        assert total == 12.0
        assert "connected to localhost" in site.log("w1.log")
