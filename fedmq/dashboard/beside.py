"""The page beside a monitor, for the commands that show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from broker.errors import ConfigError
from fedmq.dashboard.config import DashboardConfig, names_of
from fedmq.monitoring.monitor import Monitor

__all__ = ["page_of", "require_server"]

PACKAGES = ("starlette", "uvicorn")


def require_server() -> None:
    """Raise :class:`ConfigError` if the server's packages are not installed."""
    for name in PACKAGES:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            raise ConfigError('the live page needs a web server: pip install "fedmq[dashboard]"') from None


@contextmanager
def page_of(
    monitor: Monitor, config: DashboardConfig, folder: Path | None = None, *, any_port: bool = False
) -> Iterator[str]:
    """Serve the page until the block is left; its address.

    ``folder``: the run's, whose history the curves begin with. ``any_port``: take another one if the port is taken.

    Raises:
        ConfigError: the page cannot be served, and what to do about it.
    """
    require_server()
    from fedmq.dashboard.past import Past  # noqa: PLC0415 (with what reads a run's folder)
    from fedmq.dashboard.scene import Scene, following  # noqa: PLC0415
    from fedmq.dashboard.serving import PageServer, PortTaken, listen  # noqa: PLC0415 (needs the packages)

    context = config.context()
    try:
        taken = listen(config.address, config.port)
    except PortTaken:
        if not any_port:
            raise
        taken = listen(config.address, 0)
    with taken:
        scene = Scene(monitor, Past(folder) if folder is not None else None)
        with (
            following(scene),
            PageServer(scene.look, taken, hosts=names_of(config.host_names), context=context) as server,
        ):
            yield server.url
