from __future__ import annotations

import os
import signal
import threading

import pytest
from rich.table import Table

from broker import console
from broker.console import guard, say, say_table, stop_on_signals
from broker.errors import CheckpointError, ConfigError, ModelMismatch, PublishRefused, TaskError, WireError


class Ended(BaseException):
    """Stands for the end of the process."""


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock: what it shows next."""
    shown: list[float] = [100.0]
    monkeypatch.setattr("broker.console.time.monotonic", lambda: shown[-1])

    def end(code: int) -> None:
        raise Ended(code)

    monkeypatch.setattr("broker.console.os._exit", end)
    return shown


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_that_comes_twice_at_once_means_the_same(moments: list[float], number: signal.Signals) -> None:
    before = signal.getsignal(number)
    stop, calls = threading.Event(), []
    with stop_on_signals(stop, also=lambda: calls.append(1)):
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop.is_set()
    assert calls == [1]
    assert signal.getsignal(number) is before


def test_a_second_signal_after_a_while_ends_the_process(moments: list[float]) -> None:
    with stop_on_signals(threading.Event()):
        os.kill(os.getpid(), signal.SIGINT)
        moments.append(100.0 + console.TWICE_SECONDS + 0.1)
        with pytest.raises(Ended) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.args == (128 + signal.SIGTERM,)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("this"), 2),
        (TaskError("this"), 3),
        (ModelMismatch("this"), 3),
        (PublishRefused("this"), 4),
        (CheckpointError("this"), 5),
        (WireError("this"), 1),
    ],
)
def test_each_kind_of_error_has_its_exit_code(error: Exception, code: int, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught, guard():
        raise error
    assert caught.value.code == code
    assert capsys.readouterr().err == "error: this\n"


def test_what_is_no_error_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError), guard():
        raise ZeroDivisionError


def test_a_text_that_looks_like_an_emoji_stays_as_it_is(capfd: pytest.CaptureFixture[str]) -> None:
    table = Table()
    table.add_column("host:100:host")
    table.add_row("a:bug:b")
    say('{"host": "a:bug:b [/]"}')
    say_table(table)
    out, _ = capfd.readouterr()
    assert out.startswith('{"host": "a:bug:b [/]"}\n')
    assert ("host:100:host" in out, out.count("a:bug:b")) == (True, 2)
