"""``fedmq keys``, as somebody would use it who sets up signatures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from broker.signing import Keyring, Signer
from fedmq.keys import app

runner = CliRunner()


def keys(*arguments: str | Path, code: int = 0) -> str:
    result = runner.invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output
    return " ".join(result.output.split())


def test_a_key_is_made_enrolled_listed_and_removed(tmp_path: Path) -> None:
    private, enrolled = tmp_path / "w1.key", tmp_path / "workers.keys"
    line = keys("make", private)
    assert line.startswith("w1 ed25519:")
    assert keys("show", private) == line
    assert keys("show", private, "--name", "w2") == line.replace("w1", "w2", 1)
    assert private.stat().st_mode & 0o777 == 0o600

    keys("enrol", enrolled, *line.split())
    keys("enrol", enrolled, line, "--expires", "2999-12-31")  # the same key once more: it has a last day now
    (fact,) = json.loads(keys("list", enrolled, "--json"))
    assert (fact["name"], fact["expires"], fact["is_expired"]) == ("w1", "2999-12-31", False)
    assert fact["line"] == enrolled.read_text().strip() == f"{line} expires=2999-12-31"
    assert fact["key"] in keys("list", enrolled)
    assert enrolled.stat().st_mode & 0o777 == 0o644
    body = Signer.load(private, "run", "a key")
    assert body is not None
    assert Keyring.load(enrolled, "run", "keys") is not None

    second = keys("make", tmp_path / "second", "--name", "w1")
    keys("enrol", enrolled, *second.split())
    assert "1 of its keys removed" in keys("remove", enrolled, "w1", "--key", fact["key"])
    assert enrolled.read_text().strip() == second
    assert "1 of its keys removed" in keys("remove", enrolled, "w1")
    assert enrolled.read_text() == ""
    keys("remove", enrolled, "w1", code=2)


@pytest.mark.parametrize(
    "arguments",
    [
        ("make", "no/folder/key"),
        ("make", "a b.key"),
        ("show", "absent"),
        ("list", "absent"),
        ("enrol", "some.keys", "w1", "ed25519:short"),
        ("enrol", "some.keys", "w1"),
        ("enrol", "some.keys", "w1", f"ed25519:{'A' * 43}=", "--expires", "tomorrow"),
        ("remove", "absent", "w1"),
    ],
)
def test_what_cannot_be_is_refused_with_code_2(
    arguments: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    keys(*arguments, code=2)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_none_is_left_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "workers.keys"
    file.write_text("nonsense\n")
    keys("enrol", file, "w1", f"ed25519:{'A' * 43}=", code=2)
    assert file.read_text() == "nonsense\n"
