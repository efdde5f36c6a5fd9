"""Kernels of the fork server for whatever speaks to jupyter_client: nbclient, nbval, nbgrader, JupyterLab.

The kernels are named `refusallab` and `refusallab-sandbox`; JUPYTER_PATH has to name this package's folder:
JUPYTER_PATH=$(python -m refusallab.sandbox.provisioner) pytest --nbval --nbval-kernel-name refusallab solutions
"""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
from pathlib import Path
from typing import Any

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import KernelProvisionerBase
from traitlets import Bool

from refusallab.sandbox.server import HOME, Limits, shared

FOLDER = Path(__file__).parent


class ForkProvisioner(KernelProvisionerBase):
    """A kernel that is forked from a server with everything imported."""

    sandboxed = Bool(False, config=True, help="Whether the kernel runs in the sandbox.")
    lifeline: socket.socket | None = None
    folder: Path | None = None

    @property
    def has_process(self) -> bool:
        return self.lifeline is not None

    async def pre_launch(self, **kwargs: Any) -> dict[str, Any]:
        manager = self.parent
        self.folder = shared(self.sandboxed).new_folder()
        manager.transport, manager.ip = "ipc", str(self.folder / "k")
        manager.write_connection_file()
        self.connection_info = manager.get_connection_info()
        return await super().pre_launch(cmd=["refusallab"], **kwargs)

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> KernelConnectionInfo:
        connection = {k: v.decode() if isinstance(v, bytes) else v for k, v in self.connection_info.items()}
        here = {} if self.sandboxed else {"folder": str(kwargs.get("cwd") or os.getcwd()), "env": kwargs.get("env")}
        server = shared(self.sandboxed)
        self.lifeline = await asyncio.to_thread(_ready, server, connection, here)
        return self.connection_info

    async def poll(self) -> int | None:
        """None while the kernel lives."""
        if self.lifeline is None:
            return 0
        return 1 if select.select([self.lifeline], [], [], 0)[0] else None

    async def wait(self) -> int | None:
        while await self.poll() is None:
            await asyncio.sleep(0.05)
        self._drop()
        return 0

    async def send_signal(self, signum: int) -> None:
        """Only the end can be signalled; interrupts are messages."""
        if signum:
            self._drop()

    async def kill(self, restart: bool = False) -> None:
        self._drop()

    async def terminate(self, restart: bool = False) -> None:
        self._drop()

    async def cleanup(self, restart: bool = False) -> None:
        self._drop()
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _drop(self) -> None:
        if self.lifeline:
            self.lifeline.close()
        self.lifeline = None


def _ready(server: Any, connection: dict[str, Any], here: dict[str, Any]) -> socket.socket:
    lifeline, meter = server.start_kernel(connection, Limits(timeout=600), **{"folder": HOME} | here)
    os.close(meter)
    lifeline.recv(5)  # "ready"
    return lifeline


if __name__ == "__main__":
    print(FOLDER)
