"""The start of a lab: fixed seeds, quiet libraries, one model."""

from __future__ import annotations

import random
import warnings
from importlib.metadata import version

import numpy as np
import torch
from IPython import get_ipython

from refusallab.errors import RefusalLabError
from refusallab.memory import give_back
from refusallab.model import Model, is_on_disk, load
from refusallab.plots import use_style


def start(model: str = "charter-chat") -> Model:
    """Fix seeds, choose the figures' style, load a model and say what was loaded. Free memory goes back after cells."""
    warnings.filterwarnings("ignore")
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_grad_enabled(True)
    use_style()
    if shell := get_ipython():
        shell.events.register("post_run_cell", give_back)
    m = load(model)
    versions = ", ".join(f"{name} {version(name).partition('+')[0]}" for name in ("torch", "transformers", "nnsight"))
    print(f"{versions}\n{m}")
    return m


def real_model(name: str, *, download: bool = False) -> Model | None:
    """A hub model for the section "On a real model", or None, with one line that says why, if it is not available now.

    Without `download` only a model that is already on this computer is loaded: you decide whether to fetch gigabytes.
    """
    if not download and not is_on_disk(name):
        print(f"Skipped: {name} is not on this computer. To fetch it, say real_model({name!r}, download=True).")
        return None
    warnings.filterwarnings("ignore")
    use_style()
    try:
        return load(name)
    except RefusalLabError as error:
        print(f"Skipped: {error}")
        return None
