"""Files that hold secrets: who may read them, and how they are made."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from broker import secretfiles
from broker.errors import ConfigError
from broker.secretfiles import MOST_BYTES, is_exposed, read_secret, read_secret_bytes, write_secret

SECRET = "pl4nted-s3cret"  # noqa: S105 (of nothing)
WHAT = "worker.signing_key_file"


def file_of(folder: Path, mode: int, content: bytes = f"{SECRET}\n".encode()) -> Path:
    path = folder / "my secret"
    path.write_bytes(content)
    path.chmod(mode)
    return path


def complaint(path: Path | str) -> str:
    with pytest.raises(ConfigError) as caught:
        read_secret(path, WHAT)
    assert WHAT in str(caught.value)
    assert SECRET not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640, 0o440, 0o660, 0o700])
def test_a_file_of_its_owner_and_group_is_read(tmp_path: Path, mode: int) -> None:
    path = file_of(tmp_path, mode)
    assert read_secret(path, WHAT) == read_secret(str(path), WHAT) == SECRET
    assert read_secret_bytes(path, WHAT) == f"{SECRET}\n".encode()


@pytest.mark.parametrize(
    ("mode", "allowed"), [(0o644, "read"), (0o604, "read"), (0o602, "write"), (0o666, "read and write")]
)
def test_a_file_of_everybody_is_refused_with_what_to_do(tmp_path: Path, mode: int, allowed: str) -> None:
    path = file_of(tmp_path, mode)
    told = complaint(path)
    assert f"others may {allowed} this file" in told
    assert f"chmod 600 '{path}'" in told
    path.chmod(0o600)
    assert read_secret(path, WHAT) == SECRET


def test_what_a_container_engine_mounts_is_read_and_a_link_is_no_way_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {str(mount) for mount in secretfiles.MOUNTS} == {"/run/secrets", "/var/run/secrets"}
    assert not is_exposed(Path("/run/secrets/broker_url"), 0o100444)
    assert is_exposed(Path("/run/secrets/../elsewhere"), 0o100444)

    mount, elsewhere = tmp_path / "mount", tmp_path / "elsewhere"
    mount.mkdir()
    elsewhere.mkdir()
    monkeypatch.setattr(secretfiles, "MOUNTS", (mount,))
    assert read_secret(file_of(mount, 0o444), WHAT) == SECRET

    link = mount / "link"
    link.symlink_to(file_of(elsewhere, 0o444))
    assert "chmod 600" in complaint(link)


def test_the_mount_may_itself_be_reached_by_a_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "var-run").symlink_to(tmp_path / "run")
    path = file_of(tmp_path / "run", 0o444)
    monkeypatch.setattr(secretfiles, "MOUNTS", (tmp_path / "var-run",))
    assert read_secret(tmp_path / "var-run" / path.name, WHAT) == SECRET


def test_a_file_that_is_none_is_named_and_told_apart(tmp_path: Path) -> None:
    assert "No such file" in complaint(tmp_path / "absent")
    assert "Is a directory" in complaint(tmp_path)
    assert "holds no text" in complaint(file_of(tmp_path, 0o600, b"\xff\xfe"))
    assert "holds nothing" in complaint(file_of(tmp_path, 0o600, b" \n"))
    assert "no secret does" in complaint(file_of(tmp_path, 0o600, bytes(MOST_BYTES + 1)))
    assert "no name of a file" in complaint("a\0b")


@pytest.mark.parametrize("given", [f"amqp://me:{SECRET}@host/", f"-----BEGIN KEY-----\n{SECRET}", f"{SECRET:x<600}"])
def test_a_secret_in_the_place_of_its_path_is_not_shown(given: str) -> None:
    assert "not shown" in complaint(given)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_file_is_for_its_owner_alone_from_the_first_moment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, umask: int
) -> None:
    modes = []
    opened = os.fdopen

    def look(handle: int, mode: str) -> object:
        modes.append(stat.S_IMODE(os.fstat(handle).st_mode))
        return opened(handle, mode)

    monkeypatch.setattr(os, "fdopen", look)
    before = os.umask(umask)
    try:
        write_secret(tmp_path / "key", SECRET.encode())
    finally:
        os.umask(before)
    assert modes == [0o600]
    assert stat.S_IMODE((tmp_path / "key").stat().st_mode) == 0o600
    assert read_secret(tmp_path / "key", WHAT) == SECRET


def test_what_is_there_is_never_overwritten(tmp_path: Path) -> None:
    write_secret(tmp_path / "key", b"first")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("key", "link"):
        with pytest.raises(ConfigError, match="exists already"):
            write_secret(str(tmp_path / name), b"second")
    assert (tmp_path / "key").read_bytes() == b"first"
    assert not (tmp_path / "nowhere").exists()


def test_a_file_that_cannot_be_made_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be made: No such file"):
        write_secret(tmp_path / "no" / "folder", b"")


def test_a_file_that_could_not_be_written_whole_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(ConfigError, match="cannot be written: No space left"):
        write_secret(tmp_path / "key", SECRET.encode())
    assert not list(tmp_path.iterdir())
