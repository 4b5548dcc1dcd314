"""Files that hold a password, a key or a token: read only if others may not, written so that others cannot.

Whoever reads such a file reads it here, so that all of them are held to the same rule. It is ssh's, with room for
containers: what the bits for "others" allow is refused. The group may read, since Kubernetes' ``fsGroup`` goes by it.
"""

from __future__ import annotations

import os
import shlex
import stat
from pathlib import Path

from broker.errors import ConfigError

__all__ = ["MOUNTS", "is_exposed", "read_secret", "read_secret_bytes", "write_secret"]

#: Where container engines mount secrets, readable for all who are in the container: the program and nobody else.
MOUNTS = (Path("/run/secrets"), Path("/var/run/secrets"))
#: No secret is larger; whoever names a checkpoint by mistake is told at once.
MOST_BYTES = 2**20

_OTHERS = stat.S_IROTH | stat.S_IWOTH
_PRIVATE = 0o600


def is_exposed(path: Path, mode: int) -> bool:
    """Whether others than owner and group may read or write a file of this path and ``st_mode``.

    Not where the system knows no such bits, and not for what a container engine mounts below :data:`MOUNTS`.
    """
    if os.name != "posix" or not mode & _OTHERS:
        return False
    # The links are followed: /run/secrets must not be a way around for a file that lies elsewhere.
    real = path.resolve()
    return not any(real.is_relative_to(mount) for place in MOUNTS for mount in (place, place.resolve()))


def read_secret_bytes(path: Path | str, what: str) -> bytes:
    """What the file holds.

    Args:
        path: the file.
        what: the setting that names it, for the errors: ``worker.signing_key_file``.

    Raises:
        ConfigError: it cannot be read, others may read or write it, or it is too large to be a secret. The message
            says what to do and shows nothing of the content.
    """
    path = Path(path)
    name = f"{what} = {_shown(path)}"
    try:
        with path.open("rb") as file:
            # Of the file that is open, not of the name: nothing can come in between.
            mode = os.fstat(file.fileno()).st_mode
            if is_exposed(path, mode):
                raise ConfigError(
                    f"{name}: others may {_allowed(mode)} this file, which holds a secret: "
                    f"chmod 600 {shlex.quote(str(path))} (where Kubernetes mounts it: defaultMode: 0440)"
                )
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{name}: {error.strerror}") from None
    except ValueError:
        raise ConfigError(f"{name}: this is no name of a file") from None
    if len(content) > MOST_BYTES:
        raise ConfigError(f"{name}: holds more than {MOST_BYTES} bytes, which no secret does")
    return content


def read_secret(path: Path | str, what: str) -> str:
    """As :func:`read_secret_bytes`, as text without the space and line ends around it.

    Raises :class:`ConfigError` also if it holds no text.
    """
    content = read_secret_bytes(path, what)
    try:
        text = content.decode().strip()
    except UnicodeDecodeError:
        raise ConfigError(f"{what} = {_shown(Path(path))}: holds no text, but bytes") from None
    if not text:
        raise ConfigError(f"{what} = {_shown(Path(path))}: holds nothing")
    return text


def write_secret(path: Path | str, content: bytes) -> None:
    """Write a new file that its owner alone can read, from the first moment; it is durable when this returns.

    Raises :class:`ConfigError` if there is something of that name, which stays as it is, or if it cannot be written.
    """
    path = Path(path)
    try:
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, _PRIVATE)
    except FileExistsError:
        raise ConfigError(f"{path} exists already and may be in use: remove it first, or name another file") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be made: {error.strerror}") from None
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path.parent)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None


def _sync_folder(folder: Path) -> None:
    """Make durable which files ``folder`` has."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _allowed(mode: int) -> str:
    words = {stat.S_IROTH: "read", stat.S_IWOTH: "write"}
    return " and ".join(word for bit, word in words.items() if mode & bit)


def _shown(path: Path) -> str:
    """The path for a message, unless somebody gave the secret itself in its place."""
    text = str(path)
    # An address loses one of its slashes when it is taken for a path.
    is_none = ":/" in text or "\n" in text or len(text) > 500
    return "(not a path, and not shown)" if is_none else repr(text)
