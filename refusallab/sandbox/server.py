"""Kernels from a fork server, in a sandbox or not: starting the server, asking it for kernels."""

from __future__ import annotations

import atexit
import json
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import refusallab
import smallmodels
from refusallab.errors import RefusalLabError

INSIDE = Path("/run/kernels")  # where kernels in the sandbox keep their sockets
HOME = "/tmp/home"
METER = struct.Struct("d")  # what a meter holds: seconds of processor time
WATCH = 0.2  # seconds between two looks at what a kernel uses
KERNELS = 50_000  # users for the kernels of one server: processes are limited by user, and servers run side by side
START = 600  # seconds for the imports, on a busy machine
SETTINGS = {
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "TQDM_DISABLE": "1",
}


@dataclass(frozen=True)
class Limits:
    """What one submission may use."""

    timeout: float = 20  # seconds of processor time for a cell or an exercise, all threads and processes together
    memory: float = 2  # GB

    @property
    def total(self) -> float:
        """Seconds of processor time for everything."""
        return 6 * self.timeout

    @staticmethod
    def by_the_clock(seconds: float) -> float:
        """Seconds by the clock allowed for so many seconds of processor time: a busy machine takes longer."""
        return 5 * seconds


class ForkServer:
    """A process that forks kernels. One is enough for many threads. It ends with `close`, or with this process."""

    def __init__(self, sandboxed: bool = True):
        if sandboxed and shutil.which("bwrap") is None:
            raise RefusalLabError(
                "bubblewrap is not installed, so there is no sandbox. Install it (apt-get install bubblewrap), or pass "
                "--unsafe to run the students' code with your rights."
            )
        if sandboxed and (hidden := [path for path in _readable() if Path("/tmp") in path.parents]):
            raise RefusalLabError(f"{hidden[0]} is below /tmp, which is private in the sandbox: move it elsewhere.")
        self.sandboxed = sandboxed
        self._folder = Path(tempfile.mkdtemp(prefix="rl-"))
        self._run = self._folder / "run"
        self._run.mkdir()
        self._run.chmod(0o755)
        self._lock, self._count = threading.Lock(), 0
        self._channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        zygote = [sys.executable, "-m", "refusallab.sandbox.zygote", str(theirs.fileno())]
        command = [*bubblewrap(self._run), *zygote, "sandboxed"] if sandboxed else [*zygote, "open"]
        env = sandbox_environment() if sandboxed else os.environ | SETTINGS
        with (self._folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                command, env=env, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        theirs.close()
        atexit.register(self.close)
        self._channel.settimeout(START)
        if self._receive() != b"ready":
            reason = (self._folder / "log").read_text(errors="replace").strip()[-500:]
            self.close()
            hint = " Pass --unsafe to run the students' code without a sandbox, with your rights." if sandboxed else ""
            raise RefusalLabError(f"The kernels' server did not start: {reason or 'it took too long'}.{hint}")

    def _receive(self) -> bytes:
        try:
            return self._channel.recv(100)
        except OSError:
            return b""

    def start_kernel(
        self, connection: dict[str, Any], limits: Limits, folder: str = HOME, env: dict[str, str] | None = None
    ) -> tuple[socket.socket, int]:
        """Start a kernel with its sockets in a folder from `new_folder`. Returns lifeline and meter (see zygote)."""
        ours, theirs = socket.socketpair()
        meter = os.memfd_create("meter")
        sockets = Path(connection["ip"])
        inside = INSIDE / sockets.relative_to(self._run) if self.sandboxed else sockets
        with self._lock:
            self._count += 1
            request = {
                "connection": connection | {"ip": str(inside)},
                "memory": int(limits.memory * 2**30) if self.sandboxed else 0,
                "seconds": int(limits.total) + 1,
                "folder": folder,
                "env": env or sandbox_environment(),
                "number": self._process.pid % 20_000 * KERNELS + self._count % KERNELS,
            }
            try:
                socket.send_fds(self._channel, [json.dumps(request).encode()], [theirs.fileno(), meter])
            except OSError as error:
                os.close(meter)
                raise RefusalLabError(f"The kernels' server is gone ({error}): start again.") from error
        theirs.close()
        return ours, meter

    def new_folder(self) -> Path:
        """A new folder for the sockets of a kernel."""
        folder = self._run / uuid.uuid4().hex[:8]
        folder.mkdir()
        folder.chmod(0o777)  # for a user without rights; the folder above is ours alone
        return folder

    def close(self) -> None:
        """End the server and every kernel of it."""
        self._channel.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)
        atexit.unregister(self.close)


_servers: dict[bool, ForkServer] = {}
_starting = threading.Lock()


def shared(sandboxed: bool) -> ForkServer:
    """The server of this process, started when it is first needed."""
    with _starting:
        if sandboxed not in _servers:
            _servers[sandboxed] = ForkServer(sandboxed)
        return _servers[sandboxed]


def _installed() -> list[str]:
    """The folders of sys.path that hold installed packages."""
    return [folder for folder in sys.path if folder.endswith("-packages") and Path(folder).is_dir()]


def sandbox_environment() -> dict[str, str]:
    """The environment of a kernel: nothing of ours."""
    packages = dict.fromkeys(str(Path(p.__file__).parent.parent) for p in (refusallab, smallmodels))
    return SETTINGS | {
        "HOME": HOME,
        "USER": "student",
        "LANG": "C.UTF-8",
        "PATH": "/usr/bin:/bin",
        "PYTHONPATH": os.pathsep.join([*packages, *_installed()]),
    }


def bubblewrap(run: Path) -> list[str]:
    """The command that puts the server behind the outer wall: a system to read, no network, nothing of ours."""
    command = [
        shutil.which("bwrap") or "bwrap",
        "--unshare-pid",
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-cgroup-try",
    ]
    if os.getuid() == 0:
        command += ["--cap-drop", "ALL"]
        for capability in ("CAP_SYS_ADMIN", "CAP_SETUID", "CAP_SETGID"):  # until the kernel gives them up
            command += ["--cap-add", capability]
    for path in _readable():
        command += _parents(path)
        kind = ["--symlink", os.readlink(path)] if path.is_symlink() else ["--ro-bind", str(path)]
        command += [*kind, str(path)]
    if os.getuid() == 0:
        command += _opened(run.parent)
    command += [*_parents(INSIDE), "--bind", str(run), str(INSIDE), "--perms", "1777", "--tmpfs", "/tmp"]
    command += ["--proc", "/proc", "--dev", "/dev", "--remount-ro", "/dev", "--remount-ro", "/"]
    return command


def _parents(path: Path) -> list[str]:
    """Arguments that make the folders above a path. Those that bubblewrap makes by itself may be closed to others."""
    return [part for parent in reversed(path.parents[:-1]) for part in ("--perms", "0755", "--dir", str(parent))]


def _opened(folder: Path) -> list[str]:
    """Arguments that show readable copies, kept in `folder`, of files of the course that only root may read."""
    command: list[str] = []
    for package in (refusallab, smallmodels):
        for path in Path(package.__file__).parent.rglob("*"):
            if path.is_file() and not path.stat().st_mode & 0o004:
                copy = shutil.copyfile(path, folder / f"copy-{len(command)}")
                copy.chmod(0o644)
                command += ["--ro-bind", str(copy), str(path)]
    return command


def _readable() -> list[Path]:
    """What the sandbox sees of this computer: system libraries, Python, the packages of the course."""
    system = ["/usr/bin", "/usr/lib", "/usr/lib32", "/usr/lib64", "/usr/share/zoneinfo", "/usr/share/fonts"]
    system += ["/bin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives", "/etc/localtime"]
    python = [Path(p) / part for p in (sys.prefix, sys.base_prefix) for part in ("bin", "lib", "lib64", "pyvenv.cfg")]
    packages = [*map(Path, _installed()), *(Path(p.__file__).parent for p in (refusallab, smallmodels))]
    paths = [path for path in dict.fromkeys([*map(Path, system), *python, *packages]) if path.exists()]
    return [path for path in paths if path.is_symlink() or not any(p in path.parents for p in paths)]
