"""The inner wall: what a forked kernel gives up before it runs a student's code.

The outer wall is bubblewrap's, around the whole fork server. This one keeps the kernels in it from one another, and
from the server: own processes, own temporary files, own (empty) network, no privileges, limits. Linux only.
"""

from __future__ import annotations

import ctypes
import os
import resource
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)

CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 1 << 27, 1 << 28, 1 << 29, 1 << 30
MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 8, 1 << 12, 1 << 14, 1 << 18
MNT_DETACH = 2
PR_SET_NO_NEW_PRIVS = 38
CAPABILITY_VERSION_3 = 0x20080522
FIRST_UID = 200_000  # ids above this one belong to nobody

FILES = "256m"  # size of each temporary file system
FILE_SIZE = 128 << 20
PROCESSES = 128


def _call(name: str, *arguments: object) -> None:
    if getattr(_libc, name)(*arguments):
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    as_bytes = (text.encode() if text else None for text in (source, target, kind, options))
    source_, target_, kind_, options_ = as_bytes
    _call("mount", source_, target_, kind_, ctypes.c_ulong(flags), options_)


def enter_namespaces() -> None:
    """Leave the server's namespaces. Afterwards this process is the first one (pid 1) of new ones."""
    uid, gid = os.getuid(), os.getgid()
    _call("unshare", CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID | CLONE_NEWNET | (CLONE_NEWUSER if uid else 0))
    if uid:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{uid} {uid} 1")
        Path("/proc/self/gid_map").write_text(f"{gid} {gid} 1")
    if os.fork():
        os._exit(0)


def private_files(sockets: str) -> None:
    """Give this process file systems of its own, in which of the folder beside `sockets` only `sockets` is seen."""
    _mount("none", "/", None, MS_REC | MS_PRIVATE)
    folder = os.open(sockets, os.O_PATH | os.O_DIRECTORY)
    for place in ("/tmp", "/dev/shm", os.path.dirname(sockets)):
        _mount("tmpfs", place, "tmpfs", MS_NOSUID | MS_NODEV, f"size={FILES},mode=1777")
    os.mkdir(sockets)
    _mount(f"/proc/self/fd/{folder}", sockets, None, MS_BIND)
    os.close(folder)
    _mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)


def forget(folder: str) -> None:
    """Take a mounted folder away. Sockets in it that are open already go on working."""
    _call("umount2", folder.encode(), MNT_DETACH)


def limit(memory: int, seconds: int, own_data: int, *, processes: bool = True) -> None:
    """Limit memory (bytes beyond `own_data`, which is there already), time, files and processes of what follows.

    All `processes` of the user count, so leave them out for a user who has others.
    """
    for what, most in (
        (resource.RLIMIT_DATA, memory + own_data),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, FILE_SIZE),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 1024),
        *([(resource.RLIMIT_NPROC, PROCESSES)] if processes else []),
    ):
        _, hard = resource.getrlimit(what)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (most, most))


def drop_privileges(number: int) -> None:
    """Become a user who owns nothing, without capabilities and with no way to gain any."""
    if os.getuid() == 0:
        user = FIRST_UID + number
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    header, nothing = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _call("capset", header, nothing)
    _call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
