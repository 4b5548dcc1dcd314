from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from aggregator.config import AggregatorConfig
from broker.codecs import CODECS
from broker.console import parse_flags
from broker.errors import ConfigError
from broker.redaction import redacted
from broker.secretfiles import write_secret
from broker.settings import BrokerConfig, Flag, Origin, Settings, load, plain

PASSWORD = "pl4nted-s3cret"  # noqa: S105 (of nothing)
KINDS = {"aggregator": AggregatorConfig}


@pytest.fixture(autouse=True)
def _nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(text: str = "", flags: Sequence[Flag] | None = None, **environment: str) -> Settings:
    if text:
        Path("fedmq.toml").write_text(text)
    return load(KINDS, flags=flags or [], environment=environment)


def complaint(text: str = "", flags: Sequence[Flag] | None = None, **environment: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(text, flags, **environment)
    return str(caught.value)


def test_without_any_source_there_are_defaults() -> None:
    settings = read()
    assert settings.run == "default"
    assert settings.broker == BrokerConfig()
    assert settings.origin("broker.heartbeat") == Origin("default", "default")


def test_flags_outrank_the_environment_and_that_outranks_the_file() -> None:
    text = 'run = "file"\n[aggregator]\nbuffer_size = 1\nseed = 1\ncommit_count = 1\n'
    settings = read(
        text,
        [("aggregator.buffer_size", "3")],
        FEDMQ_RUN="environment",
        FEDMQ_AGGREGATOR_BUFFER_SIZE="2",
        FEDMQ_AGGREGATOR_SEED="2",
        OTHER_RUN="ignored",
    )
    config = settings.table("aggregator", AggregatorConfig)
    assert (settings.run, config.buffer_size, config.seed, config.commit_count) == ("environment", 3, 2, 1)
    origins = [settings.origin(f"aggregator.{key}").kind for key in ("buffer_size", "seed", "commit_count", "momentum")]
    assert origins == ["flag", "environment", "file", "default"]


def test_later_flags_outrank_earlier_ones_and_options_outrank_set() -> None:
    flags = parse_flags(["aggregator.seed=1", "aggregator.seed=2", "run=a"], run="b", broker__url=None)
    given = [("aggregator.seed", "1"), ("aggregator.seed", "2"), ("run", "a")]
    assert flags == [*given, ("run", "b", Origin("flag", "--run"))]
    settings = read("", flags)
    assert (settings.run, settings.table("aggregator", AggregatorConfig).seed) == ("b", 2)


def test_a_value_may_hold_an_equals_sign() -> None:
    assert parse_flags(["broker.url=amqp://h/?heartbeat=5"]) == [("broker.url", "amqp://h/?heartbeat=5")]


@pytest.mark.parametrize("pair", ["aggregator.seed", "=3", f"broker.url amqp://u:{PASSWORD}@h/"])
def test_a_flag_without_key_or_value_is_refused_and_keeps_secrets(pair: str) -> None:
    with pytest.raises(ConfigError, match=r"table\.key=value") as caught:
        parse_flags([pair])
    assert PASSWORD not in str(caught.value)


def test_a_table_of_another_program_is_not_looked_into() -> None:
    settings = read("[worker]\nanything = 1\n[demo]\nworkers = 'x'\n")
    assert set(settings.tables) == {"broker", "aggregator"}


def test_only_a_path_to_code_makes_the_working_directory_importable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(tmp_path))])
    harmless = [("broker.url", "amqp://guest:guest@host:5672/"), ("aggregator.update_codec", "topk:0.1")]
    load({"aggregator": AggregatorConfig}, flags=harmless, environment={})
    assert str(tmp_path) not in sys.path

    (tmp_path / "my_codec_module.py").write_text("from broker.codecs.int8 import Int8\n")
    load({}, flags=[("broker.codecs", "mine=my_codec_module:Int8.of")], environment={})
    assert sys.path[-1] == str(tmp_path)
    assert CODECS.imported.pop("mine")("").name == "int8"
    del sys.modules["my_codec_module"]


def test_all_problems_are_told_at_once() -> None:
    told = complaint("[aggregator]\nbuffer_size = 0\noptimizer = 'lion'\n")
    assert told.splitlines() == [
        "fedmq.toml: aggregator.buffer_size = 0: at least 1 is wanted",
        (
            "fedmq.toml: aggregator.optimizer = 'lion': no optimizer is called 'lion'; there are sgd, adam, adamw, "
            "yogi, adagrad, lamb, or package.module:attribute"
        ),
    ]


def test_a_complaint_about_several_values_names_where_they_were_set() -> None:
    told = complaint("[aggregator]\nminimum_updates = 3\n", FEDMQ_AGGREGATOR_BUFFER_SIZE="2")
    assert told.startswith("fedmq.toml, environment variable FEDMQ_AGGREGATOR_BUFFER_SIZE: aggregator: minimum_updates")


@pytest.mark.parametrize("value", ["3", "'x'", "true", "[1]"])
def test_a_table_that_is_a_value_is_explained(value: str) -> None:
    assert "'aggregator' is a table" in complaint(f"aggregator = {value}\n")


def test_a_word_far_from_all_known_ones_gets_no_suggestion() -> None:
    told = complaint("[aggregator]\nxyzzy = 1\n")
    assert "did you mean" not in told
    assert "[aggregator] has folder, mode, rounds" in told


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("learning_rate=fast", "--set aggregator.learning_rate: aggregator.learning_rate = 'fast': a number is wanted"),
        ("buffer_size=1.5", "aggregator.buffer_size = '1.5': a whole number is wanted"),
        ("learning_rate=inf", "a number that is not infinite is wanted"),
        ("keep_updates=perhaps", "true or false is wanted"),
    ],
)
def test_what_is_wanted_is_said_in_plain_words(setting: str, words: str) -> None:
    assert words in complaint("", parse_flags([f"aggregator.{setting}"]))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"run": "Bad Name"}, "--run"),
        ({"broker__url": 3}, "--broker: broker.url"),
        ({"aggregator__stop_after_rounds": "x"}, "--rounds: aggregator.stop_after_rounds = 'x'"),
        ({"aggregator__mode": "x"}, "--mode: aggregator.mode = 'x'"),
    ],
)
def test_an_option_is_named_as_it_was_typed(options: dict[str, Any], words: str) -> None:
    told = complaint("", parse_flags([], **options))
    assert words in told
    assert "--set" not in told


def test_a_key_without_its_table_is_found_in_any() -> None:
    assert "unknown key 'buffer_size' (did you mean 'aggregator.buffer_size'?)" in complaint(
        "", parse_flags(["buffer_size=3"])
    )


# -------------------------------------------------------------------------------------------------- secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        (f"amqp://me:{PASSWORD}@host:5672/v", "amqp://me:***@host:5672/v"),
        (f"amqps://me:{PASSWORD}@extra@host/", "amqps://me:***@host/"),
        (f"amqp://:{PASSWORD}@host/", "amqp://:***@host/"),
        ("amqp://host:5672/", "amqp://host:5672/"),
        (f"amqp://a:{PASSWORD}@h1/,amqp://b:{PASSWORD}@h2/", "amqp://a:***@h1/,amqp://b:***@h2/"),
        (f"amqp://a:with,{PASSWORD}@h1/", "***"),
    ],
)
def test_a_password_is_never_shown(url: str, shown: str) -> None:
    settings = read("", [("broker.url", url)])
    values = plain(settings)["broker"]
    assert values["url"] == shown
    assert PASSWORD not in repr(settings.broker.url) + tomli_w.dumps(plain(settings))


@pytest.mark.parametrize("url", [f"http://me:{PASSWORD}@host", PASSWORD, f"amqp://h/,{PASSWORD}", " , "])
def test_an_address_that_is_none_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(ConfigError, match="amqp://") as caught:
        read("", [("broker.url", url)]).broker.urls()
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "words"),
    [
        (f"http://me:{PASSWORD}@host:15672", "those of broker.url are taken"),
        (f"https://{PASSWORD}@host", "those of broker.url are taken"),
        ("host:15672", "is like http://"),
        ("amqp://host", "is like http://"),
        ("http://", "is like http://"),
        ("http://host:port", "is like http://"),
        ("http://[::1", "is like http://"),
    ],
)
def test_an_admin_address_is_one_and_holds_no_password(url: str, words: str) -> None:
    told = complaint("", [("broker.management_url", url)])
    assert words in told
    assert f":{PASSWORD}" not in told


@pytest.mark.parametrize("url", ["http://127.0.0.1:15672", "https://[::1]:15671/prefix/", "http://rabbit"])
def test_an_admin_address_stays_as_it_was_given(url: str) -> None:
    assert read("", [("broker.management_url", url)]).broker.management_url == url


def test_a_wrong_type_of_address_does_not_show_it() -> None:
    told = complaint(f"[broker]\nurl = ['amqp://me:{PASSWORD}@host/']\n")
    assert told == "fedmq.toml: broker.url: text is wanted"


def test_an_address_may_come_from_a_file() -> None:
    write_secret("url", f"amqp://me:{PASSWORD}@one/, amqp://me:{PASSWORD}@two/\n".encode())
    settings = read("", [("broker.url_file", "url")])
    assert [redacted(url) for url in settings.broker.urls()] == ["amqp://me:***@one/", "amqp://me:***@two/"]
    assert PASSWORD not in str(plain(settings))


def test_an_address_of_a_later_source_goes_before_a_file_of_an_earlier_one() -> None:
    write_secret("url", b"amqp://one/")
    text = "[broker]\nurl_file = 'url'\nheartbeat = 9\n"
    assert read(text).broker.urls() == ("amqp://one/",)
    settings = read(text, FEDMQ_BROKER_URL="amqp://two/")
    assert (settings.broker.urls(), settings.broker.heartbeat) == (("amqp://two/",), 9)
    assert settings.origin("broker.url_file").kind == "default"
    assert read(text, [("broker.url", "amqp://three/")], FEDMQ_BROKER_URL_FILE="url").broker.urls() == (
        "amqp://three/",
    )
    both = {"FEDMQ_BROKER_URL": "amqp://two/", "FEDMQ_BROKER_URL_FILE": "url"}
    assert read(text, [], **both).broker.urls() == ("amqp://one/",)


@pytest.mark.parametrize("content", [b"", b"\n", b"\xff\xfe"])
def test_a_file_that_holds_no_address_is_named(content: bytes) -> None:
    write_secret("url", content)
    with pytest.raises(ConfigError, match=r"broker\.url"):
        read("", [("broker.url_file", "url")]).broker.urls()


def test_a_file_with_an_address_that_others_may_read_is_refused() -> None:
    Path("url").write_text(f"amqp://me:{PASSWORD}@one/")
    Path("url").chmod(0o644)
    with pytest.raises(ConfigError, match=r"broker\.url_file = 'url': others may read .* chmod 600 url") as caught:
        read("", [("broker.url_file", "url")]).broker.urls()
    assert PASSWORD not in str(caught.value)


@pytest.mark.parametrize("given", [f"amqp://me:{PASSWORD}@one/", f"amqp:/me:{PASSWORD}@one/"])
def test_an_address_in_the_place_of_its_file_is_refused_when_it_is_read(given: str) -> None:
    told = complaint("", [("broker.url_file", given)])
    assert "broker.url_file" in told
    assert "a path is wanted; an address is given as broker.url" in told
    assert PASSWORD not in told


@pytest.mark.parametrize("mode", [0o644, 0o602, 0o666])
def test_a_file_of_settings_with_a_password_is_refused_where_others_may_read_it(mode: int) -> None:
    Path("fedmq.toml").write_text(f"[broker]\nurl = 'amqp://me:{PASSWORD}@one/'\n")
    Path("fedmq.toml").chmod(mode)
    told = complaint()
    assert told.startswith("fedmq.toml: broker.url holds a password, and others may read this file: chmod 600 fedmq.t")
    assert "broker.url_file" in told
    assert PASSWORD not in told
    Path("fedmq.toml").chmod(0o600)
    assert read().broker.urls() == (f"amqp://me:{PASSWORD}@one/",)


@pytest.mark.parametrize(
    "line", ["url = 'amqp://guest:guest@h/'", "url = 'amqp://h/'", "url_file = 'x'", "heartbeat = 9"]
)
def test_a_file_of_settings_without_a_password_is_everybodys(line: str) -> None:
    Path("fedmq.toml").write_text(f"[broker]\n{line}\n")
    Path("fedmq.toml").chmod(0o666)
    assert read().run == "default"


@pytest.mark.parametrize(
    ("pairs", "option", "is_warned"),
    [
        ([], f"amqp://me:{PASSWORD}@h/", True),
        ([f"broker.url=amqp://me:{PASSWORD}@h/"], None, True),
        ([], "amqp://guest:guest@h/", False),
        (["broker.url=amqp://h/", "worker.batch_size=3"], None, False),
    ],
)
def test_a_password_on_the_command_line_is_warned_of(
    pairs: list[str], option: str | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    parse_flags(pairs, broker__url=option)
    assert [record.levelname for record in caplog.records] == ["WARNING"] * is_warned
    assert ("FEDMQ_BROKER_URL" in caplog.text) is is_warned
    assert PASSWORD not in caplog.text


def test_what_is_printed_can_be_read_again() -> None:
    settings = read("run = 'mine'\n[aggregator]\ndeadline = 2.5\nfolder = 'here'\n")
    Path("again.toml").write_text(tomli_w.dumps(plain(settings)))
    again = load(KINDS, file=Path("again.toml"), environment={})
    assert (again.run, again.tables["aggregator"]) == (settings.run, settings.tables["aggregator"])
