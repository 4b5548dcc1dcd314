"""A private RabbitMQ node: for tests, for demonstrations, and for a federation on one machine.

It runs from the installed package in a temporary folder, on free ports of the loopback interface, with an
Erlang port mapper (epmd), a cookie, a user and a password of its own, so it neither meets nor disturbs any
other RabbitMQ of the machine, and nothing is left of it afterwards.

That includes the case that this process is killed with SIGKILL: a *lifeline*, a shell that reads a pipe which
only this process holds open, then ends what is left and removes the folder. (Linux's ``PR_SET_PDEATHSIG``
would not do: it follows the thread that started the child, is forgotten when the child changes its user, and
cannot remove a folder.)
"""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self, TypedDict

import pika
import pika.exceptions

from broker.amqp.session import quiet_pika
from broker.errors import BrokerError, BrokerUnreachable

__all__ = ["PrivateNode", "installed_version"]

# Debian's package, the generic Unix archive, the official image, Homebrew. Never Debian's wrapper in
# /usr/sbin: it insists on the users root and rabbitmq, and changes to the latter.
PLACES = (
    "/usr/lib/rabbitmq/bin",
    "/usr/lib/rabbitmq/lib/*/sbin",
    "/opt/rabbitmq/sbin",
    "/opt/rabbitmq*/sbin",
    "/opt/homebrew/opt/rabbitmq/sbin",
    "/usr/local/opt/rabbitmq/sbin",
)

# $1 is the folder. Each line on standard input replaces the process groups to end; "done" means that nothing
# is left to do; end of file means that the owner is gone.
LIFELINE = """
groups=
while read -r line; do
    test "$line" = done && exit 0
    groups="$line"
done
for group in $groups; do kill -s KILL -- "-$group" 2>/dev/null; done
sleep 0.2
rm -rf -- "$1"
"""

# Ports are chosen before they are used, so somebody else may be quicker.
ATTEMPTS = 3


class PrivateNode:
    """A context manager that starts a node on entry and leaves nothing behind on exit.

    Args:
        plugins: names of plugins to enable. ``rabbitmq_management`` is the admin UI and its HTTP API.
        settings: further lines for ``rabbitmq.conf``, such as ``{"max_message_size": "1000000"}``. In them,
            ``{folder}`` stands for the node's folder, and ``{NAME}`` for a port of ``ports``.
        ports: names of further ports, which are chosen as the node's own ones are.
        files: further files for its folder, by name, such as certificates; or ``advanced.config``.
        start_timeout: seconds until a start counts as failed.

    Raises:
        BrokerError: RabbitMQ is not installed, or did not start; the message holds its last log lines.
    """

    def __init__(
        self,
        *,
        plugins: Sequence[str] = ("rabbitmq_management",),
        settings: dict[str, str] | None = None,
        ports: Sequence[str] = (),
        files: Mapping[str, bytes] | None = None,
        start_timeout: float = 60.0,
    ) -> None:
        self.user = f"fedmq-{secrets.token_hex(3)}"
        self.password = secrets.token_urlsafe(18)
        self._plugins = tuple(plugins)
        self._settings = dict(settings or {})
        self._further = tuple(ports)
        self._files = dict(files or {})
        self._start_timeout = start_timeout
        quiet_pika()
        self._name = f"fedmq-{secrets.token_hex(4)}@localhost"
        self._folder: Path | None = None
        self._ports: dict[str, int] = {}
        self._server: subprocess.Popen[bytes] | None = None
        self._epmd: subprocess.Popen[bytes] | None = None
        self._lifeline: subprocess.Popen[str] | None = None
        self._lock = threading.RLock()

    @staticmethod
    def available() -> tuple[bool, str]:
        """Whether a node can be started here, and if not, why."""
        try:
            _programs()
        except BrokerError as error:
            return False, str(error)
        return True, ""

    @property
    def url(self) -> str:
        """The node's AMQP address, with user and password."""
        return f"amqp://{self.user}:{self.password}@127.0.0.1:{self._ports['amqp']}/"

    @property
    def management_url(self) -> str:
        """The admin UI's address; log in with :attr:`user` and :attr:`password`."""
        return f"http://127.0.0.1:{self._ports['management']}"

    @property
    def prometheus_url(self) -> str:
        """Where Prometheus finds the node's metrics, if the plugin ``rabbitmq_prometheus`` is enabled."""
        return f"http://127.0.0.1:{self._ports['prometheus']}/metrics"

    def port(self, name: str) -> int:
        """Which port a name stands for."""
        return self._ports[name]

    @property
    def folder(self) -> Path:
        """The node's folder: data, log, configuration."""
        if self._folder is None:
            raise BrokerError("the private RabbitMQ node has not been started")
        return self._folder

    @property
    def log(self) -> str:
        """What the node has logged."""
        texts = []
        for name in ("console.log", "node.log"):
            path = self.folder / name
            texts.append(path.read_text(errors="replace") if path.exists() else "")
        return "\n".join(texts)

    # ------------------------------------------------------------------------------------------- life cycle

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    def start(self) -> None:
        """Start the node (again, with the same data and ports, after :meth:`stop` or :meth:`kill`)."""
        with self._lock:
            if self._server is not None:
                return
            fresh = self._folder is None
            try:
                for attempt in range(1, ATTEMPTS + 1):
                    if fresh:
                        self._prepare()
                    try:
                        self._launch()
                        return
                    except _PortTaken as error:
                        self.kill()
                        if attempt == ATTEMPTS or not fresh:
                            raise BrokerError(str(error)) from None
                        self.discard()
            except BaseException:
                # KeyboardInterrupt too: whoever gives up waiting must not be left with half a node.
                self.kill()
                if fresh:
                    self.discard()
                raise

    @property
    def is_running(self) -> bool:
        """Whether the node's process is there."""
        return self._server is not None and self._server.poll() is None

    def stop(self) -> None:
        """Stop the node in order; its data stay, for :meth:`start`."""
        with self._lock:
            if self._server is None:
                return
            self._server.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._server.wait(timeout=30)
            self.kill()

    def kill(self) -> None:
        """End the node at once (SIGKILL), as a power cut would end it; its data stay, for :meth:`start`."""
        with self._lock:
            if self._server is not None:
                _kill_group(self._server)
                self._server = None
                self._tell_lifeline()

    def restart(self) -> None:
        """Stop in order, and start again."""
        self.stop()
        self.start()

    def pause(self) -> None:
        """Freeze the node (SIGSTOP): connections stay open and nothing answers."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after :meth:`pause`."""
        self._signal(signal.SIGCONT)

    def discard(self) -> None:
        """End the node and its port mapper, remove the folder."""
        with self._lock:
            self.kill()
            if self._epmd is not None:
                _kill_group(self._epmd)
                self._epmd = None
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._folder = None
            if self._lifeline is not None and self._lifeline.stdin is not None:
                with contextlib.suppress(OSError):
                    self._lifeline.stdin.write("done\n")
                    self._lifeline.stdin.close()
                self._lifeline.wait(timeout=10)
                self._lifeline = None

    def ctl(self, *arguments: str) -> str:
        """Run ``rabbitmqctl`` against the node and return what it prints. Takes one or two seconds."""
        command = [str(_programs().ctl), "--quiet", "-n", self._name, *arguments]
        done = subprocess.run(
            command,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            **_unprivileged(),
        )
        if done.returncode:
            raise BrokerError(f"rabbitmqctl {' '.join(arguments)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout

    # --------------------------------------------------------------------------------------------- the parts

    def _prepare(self) -> None:
        _programs()
        folder = Path(tempfile.mkdtemp(prefix="fedmq-node-"))
        self._folder = folder
        names = ["amqp", "management", "distribution", "epmd", "prometheus", *self._further]
        self._ports = dict(zip(names, _free_ports(len(names)), strict=True))
        (folder / "plugins").write_text(f"[{','.join(self._plugins)}].\n")
        # Read by RabbitMQ instead of the machine's /etc/rabbitmq/rabbitmq-env.conf and advanced.config.
        (folder / "rabbitmq-env.conf").touch()
        (folder / "advanced.config").write_text("[].\n")
        for name, content in self._files.items():
            (folder / name).touch(mode=0o600)
            (folder / name).write_bytes(content)
        conf = folder / "rabbitmq.conf"
        conf.touch(mode=0o600)
        conf.write_text("".join(f"{key} = {value}\n" for key, value in self._configuration().items()))
        for path in (folder, *folder.iterdir()):
            if owner := _unprivileged():
                os.chown(path, owner["user"], owner["group"])
        self._lifeline = subprocess.Popen(
            ["/bin/sh", "-c", LIFELINE, "lifeline", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            bufsize=1,
            start_new_session=True,
            cwd="/",
        )

    def _configuration(self) -> dict[str, str]:
        result = {
            "listeners.tcp.1": f"127.0.0.1:{self._ports['amqp']}",
            "distribution.listener.interface": "127.0.0.1",
            "default_user": self.user,
            "default_pass": self.password,
            "default_user_tags.administrator": "true",
            "log.file.level": "info",
            "log.console": "false",
            # The defaults suit a server: alarms at 50 MB of free disk, statistics every five seconds.
            "disk_free_limit.absolute": "200MB",
            "collect_statistics_interval": "1000",
        }
        if "rabbitmq_management" in self._plugins:
            result |= {"management.tcp.ip": "127.0.0.1", "management.tcp.port": str(self._ports["management"])}
        if "rabbitmq_prometheus" in self._plugins:
            result |= {"prometheus.tcp.ip": "127.0.0.1", "prometheus.tcp.port": str(self._ports["prometheus"])}
        known = {"folder": self.folder, **self._ports}
        return result | {key: value.format_map(known) for key, value in self._settings.items()}

    def _environment(self) -> dict[str, str]:
        folder = self.folder
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "LC_ALL") if key in os.environ}
        return kept | {
            "HOME": str(folder),  # where Erlang puts the cookie
            "RABBITMQ_NODENAME": self._name,
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self._ports["amqp"]),
            # By default the AMQP port plus 20000, which for a high port does not exist.
            "RABBITMQ_DIST_PORT": str(self._ports["distribution"]),
            "RABBITMQ_CTL_DIST_PORT_MIN": "1024",
            "RABBITMQ_CTL_DIST_PORT_MAX": "65535",
            "RABBITMQ_MNESIA_BASE": str(folder / "data"),
            "RABBITMQ_LOG_BASE": str(folder),
            "RABBITMQ_LOGS": str(folder / "node.log"),
            "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "plugins"),
            "RABBITMQ_CONFIG_FILE": str(folder / "rabbitmq.conf"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(folder / "advanced.config"),
            "RABBITMQ_CONF_ENV_FILE": str(folder / "rabbitmq-env.conf"),
            "ERL_EPMD_PORT": str(self._ports["epmd"]),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            # Makes the start script exec Erlang instead of being its parent, so that our child is the node.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _launch(self) -> None:
        deadline = time.monotonic() + self._start_timeout
        if self._epmd is None:
            # In the foreground, as a child: RabbitMQ would start one itself that outlives the node.
            self._epmd = self._spawn([_programs().epmd])
            self._tell_lifeline()
        seen = len(self.log)
        self._server = self._spawn([_programs().server])
        self._tell_lifeline()
        while not self._answers():
            if self._server.poll() is not None:
                report = self._report(seen)
                kind = _PortTaken if "eaddrinuse" in self.log[seen:].lower() else BrokerError
                raise kind(f"the private RabbitMQ node did not start (exit code {self._server.returncode}):\n{report}")
            if time.monotonic() > deadline:
                waited = f"{self._start_timeout:.0f} s"
                raise BrokerUnreachable(f"the private RabbitMQ node gave no answer in {waited}:\n{self._report(seen)}")
            time.sleep(0.1)

    def _report(self, seen: int) -> str:
        """What matters of the log since this start: Erlang states the cause first and much about it after."""
        lines = self.log[seen:].strip().splitlines()
        errors = [line for line in lines if "[error]" in line and not line.rstrip().endswith("> ")]
        return "\n".join(errors[:25] or lines[-25:])

    def _spawn(self, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal is for us, and we stop the node in order.
        with (self.folder / "console.log").open("ab") as console:
            return subprocess.Popen(
                [str(part) for part in command],
                env=self._environment(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **_unprivileged(),
            )

    def _answers(self) -> bool:
        # The port is open before users and queues are recovered, so only a whole handshake counts.
        port = self._ports["amqp"]
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            connection = pika.BlockingConnection(
                pika.ConnectionParameters(
                    "127.0.0.1", port, credentials=pika.PlainCredentials(self.user, self.password), socket_timeout=2
                )
            )
            # Closed also if it does not come to a channel: else the socket stays until somebody collects it.
            with connection:
                connection.channel()
        except (OSError, pika.exceptions.AMQPError):
            return False
        return True

    def _signal(self, number: signal.Signals) -> None:
        if self._server is None:
            raise BrokerError("the private RabbitMQ node does not run")
        os.killpg(self._server.pid, number)

    def _tell_lifeline(self) -> None:
        if self._lifeline is not None and self._lifeline.stdin is not None:
            groups = " ".join(str(process.pid) for process in (self._server, self._epmd) if process is not None)
            with contextlib.suppress(OSError):
                self._lifeline.stdin.write(f"{groups}\n")


class _Rights(TypedDict, total=False):
    """Arguments for Popen that change whom a process belongs to."""

    user: int
    group: int


class _PortTaken(BrokerError):
    """Somebody else took a port between the choice and its use."""


class _Programs(NamedTuple):
    """Where the installed programs are."""

    server: Path
    ctl: Path
    epmd: Path


def _programs() -> _Programs:
    places = [folder for place in PLACES for folder in sorted(Path("/").glob(place.lstrip("/")))]
    found = next((folder for folder in places if os.access(folder / "rabbitmq-server", os.X_OK)), None)
    epmd = shutil.which("epmd")
    if found is None:
        raise BrokerError(
            "RabbitMQ's server is not installed here (Debian and Ubuntu: apt-get install --no-install-recommends "
            f"rabbitmq-server); looked in {', '.join(PLACES)}"
        )
    if epmd is None:
        raise BrokerError("Erlang's port mapper 'epmd' is not on the PATH; it comes with RabbitMQ's package")
    return _Programs(found / "rabbitmq-server", found / "rabbitmqctl", Path(epmd))


def installed_version() -> str:
    """Which RabbitMQ :class:`PrivateNode` would start; the empty text if there is none, or it does not say."""
    with contextlib.suppress(BrokerError, OSError, subprocess.SubprocessError):
        done = subprocess.run([_programs().ctl, "version"], capture_output=True, text=True, timeout=60, check=True)
        return done.stdout.strip()
    return ""


def _unprivileged() -> _Rights:
    """Arguments for Popen that drop root's rights; nothing if there are none to drop."""
    if os.geteuid() != 0:
        return {}
    for name in ("rabbitmq", "nobody"):
        with contextlib.suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid}
    raise BrokerError("a private RabbitMQ node does not run as root, and there is no user 'rabbitmq' or 'nobody'")


def _free_ports(count: int) -> list[int]:
    # All are held at once, else the system may hand out one of them twice.
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
