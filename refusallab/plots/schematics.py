"""Schematics: drawings of how things are arranged, without data. Each is an SVG file in the folder beside this one."""

from __future__ import annotations

import base64
import html
from pathlib import Path
from typing import TYPE_CHECKING

from refusallab.errors import RefusalLabError

if TYPE_CHECKING:
    from IPython.display import HTML

FOLDER = Path(__file__).with_name("schematics")
ALT = {
    "sites": (
        "The residual stream runs from left to right through one block. Attention and MLP each read it and add their "
        "output to it. Directional ablation acts at three sites of every block: 1 at the block input, 2 at the "
        "attention output and 3 at the MLP output, each before it is added. Activation addition acts at the input of "
        "one block. Both act at all positions."
    ),
    "template": (
        "The prompt 'How do I brew Guzzex?' as a row of 14 tokens, numbered from -14 to -1: three tokens of the "
        "template, six of the instruction, and the five post-instruction positions -5 to -1, which are template "
        "again. Below each token is a column with a cell for each layer, 0 to 7, and one for the end of the stream. "
        "The cell at position -3 and layer 4 is marked: the site (-3, 4) is the stream that enters block 4 at position "
        "-3. The first token of the reply is predicted from the end of position -1."
    ),
    "interface": (
        "From left to right: the prompt, a filter, the model with its activations and weights, and the reply. Above, "
        "what the defender does: a system prompt or a self-reminder adds words to the prompt; the filter reads the "
        "text and refuses; a monitor reads the stream and refuses; steering adds r where a probe fires; a test "
        "looks for an edit in the weights; SmoothLLM votes over noisy copies. Below, what an attacker may hold, with "
        "more access to the right: the prompt; a prefill, which enters behind the filter; the activations; the weights."
    ),
}


def schematic(name: str) -> HTML:
    """A schematic of the course for the output of a cell: "sites", "template" or "interface", 700 pixels wide.

    The image is part of the output, so it needs no file and no network later. RefusalLabError for another name.
    """
    from IPython.display import HTML  # notebooks have it; the figures need no IPython

    if name not in ALT:
        raise RefusalLabError(f"There is no schematic {name!r}: choose from {', '.join(ALT)}.")
    data = base64.b64encode((FOLDER / f"{name}.svg").read_bytes()).decode()
    return HTML(f'<img alt="{html.escape(ALT[name])}" src="data:image/svg+xml;base64,{data}">')
