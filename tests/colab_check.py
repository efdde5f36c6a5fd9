"""The released labs on a machine like Colab: Debian 13 with Python 3.13, no virtual environment, torch and numpy there.

    make colab-check                  as root, on Linux with debootstrap and a network; takes about half an hour
    python tests/colab_check.py 00    only lab 00, in the environment of `make develop`

What it is like Colab in: the version of Python, packages installed for the whole system by pip, a kernel that already
runs and has torch and numpy loaded, `google.colab` importable, labs.zip in the working folder and nothing else of the
course. What it is not like: Colab has more packages (so its set-up cell installs fewer), a proxy between page and
kernel, a GPU if you ask for one, and its own page, so that explorers are not looked at here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from refusallab.course.release import archive

ROOT = Path(__file__).parent.parent
WORK = ROOT / "build" / "colab"
SYSTEM = WORK / "root"
THERE = ("ipykernel", "ipywidgets", "nbclient", "numpy", "torch")  # what Colab has and the set-up cell does not install
RUN = '''
import json, sys, time
import nbformat
from nbclient import NotebookClient

name = sys.argv[1]
nb = nbformat.read(name, 4)
first = nbformat.v4.new_code_cell("""import importlib.machinery, sys, types
import numpy, torch
colab = sys.modules["google.colab"] = types.ModuleType("google.colab")
colab.__spec__ = importlib.machinery.ModuleSpec("google.colab", None)""")
nb.cells.insert(0, first)
client = NotebookClient(nb, timeout=1800, kernel_name="python3", allow_errors=True)
seconds, wrong = [], []
with client.setup_kernel():
    for index, cell in enumerate(nb.cells):
        if cell.cell_type != "code":
            continue
        role = cell.metadata.get("refusallab", {}).get("role", "")
        if role == "real":
            continue
        start = time.perf_counter()
        client.execute_cell(cell, index)
        seconds.append(time.perf_counter() - start)
        failed = [o for o in cell.outputs if o.output_type == "error"]
        if failed and role != "check":
            wrong.append([index - 1, failed[0].ename, failed[0].evalue[:200]])
_, set_up, first_result, *_ = seconds
print(json.dumps([round(x) for x in (set_up, set_up + first_result, sum(seconds))] + [wrong]))
'''


def build_system() -> None:
    """Debian 13 in WORK, with its Python and what Colab has there."""
    if not (SYSTEM / "usr" / "bin" / "python3").exists():
        WORK.mkdir(parents=True, exist_ok=True)
        include = "--include=ca-certificates,python3,python3-pip"
        subprocess.run(["debootstrap", "--variant=minbase", include, "trixie", SYSTEM], check=True)
        for file in SYSTEM.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            file.unlink()  # Colab's Python takes pip's packages for the whole system
    for file in ("/etc/resolv.conf", "/etc/ssl/certs/ca-certificates.crt"):  # as this network has them
        shutil.copy(file, SYSTEM / file[1:])
    inside("pip", "install", "--quiet", "--root-user-action=ignore", *THERE)


def inside(*command: str) -> str:
    """What a command says in the new system. Its mounts are seen by nobody else, and go with it."""
    settings = {"HOME": "/root", "PATH": "/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "OMP_NUM_THREADS": "1"}
    passed = {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "http_", "https_"))}
    enter = 'mount -t proc proc "$0/proc" && mount -t tmpfs tmpfs "$0/dev/shm" && exec chroot "$0" "$@"'
    call = ["unshare", "--mount", "sh", "-c", enter, SYSTEM, *command]
    return subprocess.run(call, env=settings | passed, stdout=subprocess.PIPE, text=True, check=True).stdout


def main(labs: list[str]) -> int:
    """Run the labs, print what came of each, and return the number of those that failed elsewhere than at a check."""
    if os.geteuid() or not shutil.which("debootstrap"):
        print("This needs root and debootstrap: apt-get install debootstrap.", file=sys.stderr)
        return 1
    build_system()
    folder = SYSTEM / "content"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    archive(ROOT, folder / "labs.zip")
    (folder / "run.py").write_text(RUN, encoding="utf-8")
    print(inside("python3", "--version").strip())
    failed = 0
    for path in sorted((ROOT / "labs").glob("*.ipynb")):
        if path.name.startswith(tuple(labs)):
            shutil.copy(path, folder)
            said = inside("sh", "-c", f"cd /content && python3 run.py {path.name}").splitlines()
            set_up, first, whole, wrong = json.loads(said[-1])
            failed += bool(wrong)
            print(f"{path.stem}: set-up {set_up} s, first result after {first} s, all cells {whole} s; wrong: {wrong}")
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or [""]))
