"""The fork server: imports what kernels need, once, and forks a kernel for every request.

It never computes: a parallel torch operation before a fork would make the children hang. It holds no secrets: children
have its memory. Run by `server.ForkServer` as `python -m refusallab.sandbox.zygote FD WALL`; it reads requests
from the socket FD and ends when that closes. Each kernel has a supervisor, which ends with it, and a *lifeline*, a
socket to whoever asked for the kernel: it says "ready" or what went wrong, and closes when the kernel is gone. Closing
its other end ends the kernel. The *meter*, a file in memory, holds the processor time that the kernel has used.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any

from refusallab.sandbox import confine
from refusallab.sandbox.server import METER, WATCH

PRELOAD = (
    "torch",
    "transformers",
    "transformers.models.llama.modeling_llama",
    "nnsight",
    "matplotlib.pyplot",
    "matplotlib_inline.backend_inline",
    "ipywidgets",
    "IPython",
    "ipykernel.kernelapp",
    "sklearn.decomposition",
    "sklearn.linear_model",
    "refusallab.course.checking",
    "refusallab.course.session",
    "refusallab.experiment",
    "refusallab.explore",
    "refusallab.course.observing:warm_up",
)


def main() -> None:
    """Import, say so, and fork a kernel for each request."""
    channel, sandboxed = socket.socket(fileno=int(sys.argv[1])), sys.argv[2] == "sandboxed"
    for name in PRELOAD:
        module, _, function = name.partition(":")
        imported = importlib.import_module(module)
        if function:
            getattr(imported, function)()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the children
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    channel.send(b"ready")
    while True:
        data, fds, _, _ = socket.recv_fds(channel, 1 << 20, 2)
        if not data:
            os._exit(0)  # and with it everything behind the outer wall
        if os.fork() == 0:
            channel.close()
            _supervise(json.loads(data), socket.socket(fileno=fds[0]), fds[1], sandboxed)
        for fd in fds:
            os.close(fd)


def _supervise(request: dict[str, Any], lifeline: socket.socket, meter: int, sandboxed: bool) -> None:
    """Fork the kernel and watch it. Does not return."""
    kernel = 0
    try:
        sockets = request["connection"]["ip"].rpartition("/")[0]
        if sandboxed:
            confine.enter_namespaces()
            confine.private_files(sockets)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        ours, theirs = socket.socketpair()
        base, own_data = _memory("statm", 1), _memory("statm", 5)
        kernel = os.fork()
        if kernel == 0:
            lifeline.close()
            os.close(meter)
            ours.close()
            _run_kernel(request, theirs, sandboxed, own_data)
        theirs.close()
        if (state := ours.recv(500)) != b"bound":
            raise RuntimeError(state.decode(errors="replace"))
        if sandboxed:
            confine.forget(sockets)
        ours.send(b"go on")
        lifeline.send(b"ready")
        end = _watch(kernel, lifeline, Meter(meter, None if sandboxed else kernel), base, request["memory"])
    except Exception as error:
        end = f"could not be started: {error}"
    with contextlib.suppress(OSError):
        lifeline.send(end.encode())
    if kernel and not sandboxed:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(kernel, signal.SIGKILL)
    os._exit(0)  # behind the wall this process is pid 1: all others of its namespace go with it


def _watch(kernel: int, lifeline: socket.socket, meter: Meter, base: int, most: int) -> str:
    """Wait for the end: of the kernel, of the lifeline, or of the memory. Says which, in words."""
    handle = os.pidfd_open(kernel)
    while True:
        ended, _, _ = select.select([lifeline, handle], [], [], WATCH)
        if handle in ended:
            code = os.waitstatus_to_exitcode(os.waitpid(kernel, 0)[1])
            return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended itself with code {code}"
        if lifeline in ended:
            return "stopped"
        meter.read()
        if most and _used(base) > most:
            return f"used more than {most / 2**30:g} GB of memory"


class Meter:
    """The processor time of a kernel and of all processes that it has started, in seconds, written to a file.

    A process that ends hands its time on to the one that waits for it. Where nobody does, its time is lost from the
    sum; what had been counted stays counted.
    """

    def __init__(self, file: int, session: int | None):
        self._file, self._session = file, session  # without a session: whatever is seen but this process
        self._last, self._used = 0, 0.0

    def read(self) -> None:
        """Look at all processes, and write down what they have used."""
        now = sum(map(self._ticks, Path("/proc").glob("[0-9]*")))
        self._used += max(0, now - self._last) / os.sysconf("SC_CLK_TCK")
        self._last = now
        os.pwrite(self._file, METER.pack(self._used), 0)

    def _ticks(self, folder: Path) -> int:
        """The time of a process and of those that it has waited for, 0 if it is none of the kernel's."""
        try:
            fields = (folder / "stat").read_bytes().rpartition(b")")[2].split()
        except OSError:
            return 0
        if int(folder.name) == os.getpid() or self._session not in (None, int(fields[3])):
            return 0
        return sum(map(int, fields[11:15]))


def _used(base: int) -> int:
    """Bytes of all processes that can be seen, beyond the `base` that each shares with the server."""
    used = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            used += max(0, _memory("statm", 1, folder) - base)
        except OSError:
            continue
    return used


def _memory(file: str, column: int, folder: Path = Path("/proc/self")) -> int:
    return int((folder / file).read_text().split()[column]) * os.sysconf("SC_PAGE_SIZE")


def _run_kernel(request: dict[str, Any], supervisor: socket.socket, sandboxed: bool, own_data: int) -> None:
    """Be the kernel. Does not return."""
    try:
        os.setsid()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _silence()
        os.environ.clear()
        os.environ.update(request["env"])
        if sandboxed:
            confine.limit(request["memory"], request["seconds"], own_data)
            confine.drop_privileges(request["number"])
        os.makedirs(request["folder"], exist_ok=True)
        os.chdir(request["folder"])
        _reseed()
        _serve(request["connection"], supervisor)
    except Exception as error:
        supervisor.send(f"{type(error).__name__}: {error}".encode()[:500])
    finally:
        os._exit(1)


def _silence() -> None:
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)


def _reseed() -> None:
    import numpy
    import torch

    seed = int.from_bytes(os.urandom(4), "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _serve(connection: dict[str, Any], supervisor: socket.socket) -> None:
    from ipykernel.kernelapp import IPKernelApp
    from traitlets.config import Config

    config = Config()
    config.HistoryManager.enabled = False
    file = Path(connection["ip"]).with_name("connection.json")
    file.write_text(json.dumps(connection), encoding="utf-8")
    app = IPKernelApp.instance(config=config)
    app.initialize(["-f", str(file)])
    supervisor.send(b"bound")
    supervisor.recv(10)
    app.start()


if __name__ == "__main__":
    main()
