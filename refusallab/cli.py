"""The command line: `refusallab demo`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from refusallab.errors import RefusalLabError

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Refusal Mechanics Labs.")


@app.callback()
def main() -> None:
    """Refusal Mechanics Labs."""


@app.command()
def demo(
    model: Annotated[str, typer.Option(help="A bundled model, a local folder or a hub id.")] = "charter-chat",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    figure: Annotated[Path | None, typer.Option(help="Write the figure to this file (.png, .svg, .pdf).")] = None,
    scores: Annotated[Path | None, typer.Option(help="Write the scores of every candidate to this JSON file.")] = None,
) -> None:
    """Find the refusal direction of a model and show what ablating, orthogonalizing and adding it does."""
    from refusallab import headline as experiment
    from refusallab.model import load

    try:
        for path in (figure, scores):
            if path and not path.resolve().parent.is_dir():
                raise RefusalLabError(f"There is no folder {path.parent} for {path.name}: make it, or name another.")
        m = load(model)
        with tqdm(total=experiment.n_steps(m), file=sys.stderr, leave=False) as bar:

            def step(text: str) -> None:
                bar.set_description(text)
                bar.update()

            result = experiment.headline(m, step, scores)
        print(json.dumps(result.as_json(), indent=1)) if as_json else _print_headline(result)
        if figure:
            _save_figure(m, result, figure)
    except RefusalLabError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(1) from error


def _save_figure(m, result, path: Path) -> None:
    from refusallab.activations import residual
    from refusallab.plots import headline_figure
    from refusallab.prompts import prompt_set

    best, streams = result.search.selected, {}
    for name in ("harmful_test", "harmless_test", "borderline"):
        if prompts := [i.prompt for i in prompt_set(m, name)]:
            stream = residual(m, prompts, layers=[best.layer], positions=[best.position])  # [n, 1, 1, width]
            streams[name.removesuffix("_test")] = stream[:, 0, 0]
    try:
        headline_figure(result.search, streams).savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        raise RefusalLabError(
            f"The figure was not saved ({error}). Give a .png, .svg or .pdf file on a disk with free space."
        ) from error


def _print_headline(result) -> None:
    from refusallab.headline import METRICS

    shown = [name for name in METRICS if name in result.table["baseline"]]
    table = Table(title=f"{result.model}: test set, share [95 % Wilson interval]", caption=f"judged by {result.judge}")
    for heading in ("", *(METRICS[name] for name in shown)):
        table.add_column(heading)
    for condition, rates in result.table.items():
        table.add_row(
            condition,
            *(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]\nn={r.n}" for r in (rates[name] for name in shown)),
        )
    console, best = Console(width=None if sys.stdout.isatty() else 130), result.search.selected
    console.print(table)
    console.print(
        f"Selected: position {best.position}, layer {best.layer} "
        f"(bypass {best.bypass:.2f}, induce {best.induce:.2f}, KL {best.kl:.3f}).\n"
        f"Hooks and orthogonalized weights differ by at most {result.hooks_vs_weights:.1e} in any logit. "
        f"{result.seconds:.0f} s.",
        highlight=False,
    )
    if result.judge != "exact answers":
        console.print(
            "No exact answers are known for this model: phrases stand in, and a reply without one may still be useless."
        )


if __name__ == "__main__":
    app()
