"""A client for one kernel that may be hostile: bounded time, bounded memory, and nothing that it says is trusted."""

from __future__ import annotations

import os
import secrets
import shutil
import time
from dataclasses import dataclass
from typing import Any

import zmq
from jupyter_client.session import Session

from refusallab.errors import RefusalLabError
from refusallab.sandbox.plain import LARGEST, MIME
from refusallab.sandbox.server import METER, WATCH, ForkServer, Limits

PORTS = {"shell_port": 1, "iopub_port": 2, "stdin_port": 3, "control_port": 4, "hb_port": 5}
LARGEST_MESSAGE = LARGEST + (1 << 20)
KEPT = 20_000  # characters of output of a submission's cell
READY = 60  # seconds until a new kernel answers
PATIENCE = 10  # seconds to obey an interrupt
AFTER = 1  # seconds for output that comes after the reply
LATE = "did not finish in time"  # `--regrade timeouts` looks for it


class KernelDied(RefusalLabError):
    """The kernel is gone; the message says why, in words that follow "The kernel"."""


@dataclass
class Execution:
    """What came of one piece of code."""

    error: str = ""  # name of the exception and its message
    timed_out: str = ""  # by "processor" or by "clock"
    processor: float = 0  # seconds that it used
    output: str = ""  # what it printed, cut
    observed: str = ""  # what a probe gave


class Kernel:
    """A kernel of a fork server, ready to run code. Use it in a `with`: leaving that ends it."""

    def __init__(self, server: ForkServer, limits: Limits):
        self._folder, self._limits = server.new_folder(), limits
        connection = {"ip": str(self._folder / "k"), "transport": "ipc", **PORTS}
        connection |= {"key": secrets.token_hex(16), "signature_scheme": "hmac-sha256"}
        self._lifeline, self._meter = server.start_kernel(connection, limits)
        self._lifeline.settimeout(READY)
        self._session = Session(key=connection["key"].encode())
        self._context = zmq.Context()
        self._sockets: dict[str, zmq.Socket] = {}
        try:
            first = self._said()
            if first != "ready":
                raise KernelDied(first)
            for name in ("shell", "control", "iopub"):
                self._connect(name)
            self._wait_for_output()
        except KernelDied as died:  # before any student's code: not their fault
            self.close()
            raise RefusalLabError(f"A new kernel {died}. Is this computer out of memory, or very busy?") from died

    def _connect(self, name: str) -> None:
        """Connect a channel. A message that is too large ends a connection."""
        if name in self._sockets:
            self._sockets[name].close()
        s = self._sockets[name] = self._context.socket(zmq.SUB if name == "iopub" else zmq.DEALER)
        s.linger, s.maxmsgsize, s.rcvhwm = 0, LARGEST_MESSAGE, 20
        if name == "iopub":
            s.subscribe(b"")
        s.connect(f"ipc://{self._folder / 'k'}-{PORTS[name + '_port']}")

    def _wait_for_output(self) -> None:
        """Wait until the output channel works: what is published before a subscription is in place is lost."""
        end = time.monotonic() + READY
        while time.monotonic() < end:
            self._session.send(self._sockets["shell"], "kernel_info_request")
            if "iopub" in self._poll(0.2):
                return
        raise KernelDied("did not answer")

    def __enter__(self) -> Kernel:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the kernel and whatever it started."""
        self._lifeline.close()
        os.close(self._meter)
        self._context.destroy(linger=0)
        shutil.rmtree(self._folder, ignore_errors=True)

    def _said(self) -> str:
        """What the kernel's supervisor has to say."""
        try:
            return self._lifeline.recv(500).decode(errors="replace") or "went away"
        except OSError:
            return "did not start in time"

    def _poll(self, seconds: float) -> set[str]:
        """The channels on which something has come. KernelDied if the kernel is gone and nothing is left to read."""
        poller = zmq.Poller()
        names = {self._sockets[name]: name for name in ("shell", "iopub")}
        for s in (*names, self._lifeline):
            poller.register(s, zmq.POLLIN)
        events = dict(poller.poll(max(0, seconds) * 1000))
        ready = {names[s] for s in events if s in names}
        if not ready and self._lifeline.fileno() in events:
            raise KernelDied(self._said())
        return ready

    def _receive(self, channel: str) -> dict[str, Any] | None:
        """The next message of a channel. None if there is none, or none that makes sense."""
        try:
            _, message = self._session.recv(self._sockets[channel], zmq.NOBLOCK)
            return message
        except Exception:  # signatures, JSON, text encodings, missing parts: all up to the kernel
            return None

    def _processor(self) -> float:
        """Seconds of processor time that the kernel and all that it has started have used."""
        read = os.pread(self._meter, METER.size, 0)
        return METER.unpack(read)[0] if read else 0.0

    def run(self, code: str, seconds: float, observe: str = "", clock: float = 0) -> Execution:
        """Run code as a cell, then look at an expression. KernelDied if the kernel dies.

        After `seconds` of processor time, or after `clock` seconds have passed, it is interrupted.
        """
        sent = self._session.send(
            self._sockets["shell"],
            "execute_request",
            {
                "code": code,
                "silent": False,
                "store_history": False,
                "user_expressions": {"observed": observe} if observe else {},
                "allow_stdin": False,
                "stop_on_error": False,
            },
        )
        own, reply, before = sent["header"]["msg_id"], Execution(), self._processor()
        waiting, end = {"reply", "idle"}, time.monotonic() + (clock or self._limits.by_the_clock(seconds))
        while waiting:
            left = end - time.monotonic()
            reply.processor = self._processor() - before
            late = "clock" if left < 0 else "processor" if reply.processor > seconds else ""
            if left < 0 and "reply" not in waiting:
                break
            if left < 0 and reply.timed_out:
                raise KernelDied(f"{LATE} and could not be interrupted")
            if late and "reply" in waiting and not reply.timed_out:
                reply.timed_out = late
                self._session.send(self._sockets["control"], "interrupt_request")
                left, end = PATIENCE, time.monotonic() + PATIENCE
            for channel in self._poll(min(left, WATCH)):
                if (message := self._receive(channel)) is None:
                    continue
                try:
                    if message["parent_header"]["msg_id"] == own:
                        waiting.discard(_take(reply, message["header"]["msg_type"], message["content"]))
                except Exception:  # not what such a message holds: all of it is up to the kernel
                    continue
                if "reply" not in waiting:
                    end = min(end, time.monotonic() + AFTER)
        if waiting:
            self._connect("iopub")
        return reply


def _take(reply: Execution, kind: str, content: dict[str, Any]) -> str:
    """Note what a message says. Returns what need not be waited for any more."""
    match kind:
        case "execute_reply":
            seen = content.get("user_expressions", {}).get("observed", {})
            reply.observed = str(seen.get("data", {}).get(MIME, ""))
            reply.error = reply.error or f"{seen.get('ename', '')}: {seen.get('evalue', '')}"[:500].removeprefix(": ")
            return "reply"
        case "status" if content["execution_state"] == "idle":
            return "idle"
        case "stream":
            _add(reply, str(content["text"]))
        case "execute_result" | "display_data":
            data = content["data"]
            _add(reply, str(data.get("text/plain", "")) + "\n")
        case "error":
            reply.error = f"{content['ename']}: {content['evalue']}"[:500]
    return ""


def _add(reply: Execution, text: str) -> None:
    room = KEPT - len(reply.output)
    reply.output += text[: max(0, room)]
