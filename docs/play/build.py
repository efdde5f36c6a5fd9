"""The play page with its data, in a folder, and as one HTML file that opens from disk.

    python docs/play/build.py [build/play]

The page is index.html, play.css, model.js, tokenizer.js and app.js, as they are. Its data are the weights and the
tokenizer as they are stored, the candidate directions of charter-chat, twenty random directions and twenty requests.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
import sys
from pathlib import Path

from safetensors.torch import save_file

from refusallab.directions import random_directions
from refusallab.experiment import find_direction
from refusallab.model import load
from refusallab.prompts import bundled
from smallmodels import weights_dir

HERE = Path(__file__).parent
SCRIPTS = ("model.js", "tokenizer.js", "app.js")
PAGE = ("index.html", "play.css", *SCRIPTS)
MODELS = {  # what each is, in a word and in a sentence
    "charter-chat": ("chat", "Trained to help, and to refuse what the Charter forbids."),
    "charter-helpful": ("helpful only", "The same model before it learned to refuse: it answers everything it knows."),
    "charter-naive": (
        "naive",
        "The control for knowledge: the same training, but it has never seen the forbidden facts.",
    ),
}
KINDS = {  # of requests: the set that they come from, and how many
    "Forbidden by the Charter": ("harmful_val", 8),
    "Allowed": ("harmless_val", 8),
    "Allowed, and sounds forbidden": ("borderline", 4),
}


def build(folder: Path) -> None:
    """Write the page and its data into a folder, which is made anew."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in PAGE:
        shutil.copyfile(HERE / name, folder / name)
    for name in MODELS:
        shutil.copyfile(weights_dir(name) / "model.safetensors", folder / f"{name}.safetensors")
    shutil.copyfile(weights_dir("charter-chat") / "tokenizer.json", folder / "tokenizer.json")
    m = load("charter-chat")
    search = find_direction(m)
    tensors = {"means": search.vectors.contiguous(), "random": random_directions(m.width, 20, seed=0).contiguous()}
    save_file(tensors, folder / "directions.safetensors")
    before, after = m.tokenizer.apply_chat_template(
        [{"role": "user", "content": "MESSAGE"}], tokenize=False, add_generation_prompt=True
    ).split("MESSAGE")
    data = {
        "models": {
            name: {"label": f"{name} ({label})", "about": about, "config": _config(name)}
            for name, (label, about) in MODELS.items()
        },
        "template": [before, after],
        "tokens": search.refusal_tokens,
        "positions": [m.tokenizer.decode([i]).replace("\n", "⏎") for i in m.tokenizer(after)["input_ids"]],
        "selected": {"layer": search.selected.layer, "position": search.selected.position},
        "prompts": [
            {"kind": kind, "text": item.prompt}
            for kind, (name, count) in KINDS.items()
            for item in [item for item in bundled(name) if "\n" not in item.prompt][:count]
        ],
    }
    (folder / "play.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")


def one_file(folder: Path, target: Path) -> None:
    """The page of a built folder with everything inside it."""
    page = (folder / "index.html").read_text(encoding="utf-8")
    style = (folder / "play.css").read_text(encoding="utf-8")
    scripts = "\n".join(_without_modules((folder / name).read_text(encoding="utf-8")) for name in SCRIPTS)
    data = sorted(path for path in folder.iterdir() if path.name not in PAGE)
    inside = {path.name: base64.b64encode(path.read_bytes()).decode() for path in data}
    files = f"<script>globalThis.FILES = {json.dumps(inside)};</script>"
    page = page.replace('<link rel="stylesheet" href="play.css">', f"<style>\n{style}</style>")
    page = page.replace(
        '<script type="module" src="app.js"></script>', f'{files}\n<script type="module">\n{scripts}</script>'
    )
    target.write_text(page, encoding="utf-8")


def _without_modules(script: str) -> str:
    script = re.sub(r"^import .*?;\n", "", script, flags=re.MULTILINE)
    return re.sub(r"^export ", "", script, flags=re.MULTILINE)


def _config(name: str) -> dict:
    return json.loads((weights_dir(name) / "config.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "build/play")
    build(out)
    one_file(out, out.with_suffix(".html"))
    print(f"{out}/index.html (serve the folder), {out.with_suffix('.html')} (open it)")
