"""Submissions for the tests of grading: answers to lab 02 with known scores, and notebooks made of them."""

import json

POINTS = {"2.1": 2, "2.2": 2, "2.3": 3, "2.4": 2, "2.5": 2}

RIGHT = {
    "2.1": """\
from torch import Tensor

def mean_difference(harmful: Tensor, harmless: Tensor) -> Tensor:
    return harmful.mean(0) - harmless.mean(0)
""",
    "2.2": """\
def kl(base_logits, edited_logits):
    p = base_logits.softmax(-1)
    return (p * (base_logits.log_softmax(-1) - edited_logits.log_softmax(-1))).sum(-1)
""",
    "2.3": """\
from refusallab.interventions import ablation, addition
from refusallab.measure import kl_divergence, refusal_metric
from refusallab.model import Model, logits

def score(m: Model, r, layer, harmful, harmless, tokens):
    bypass = refusal_metric(logits(m, harmful, edit=ablation(r)), tokens).mean()
    induce = refusal_metric(logits(m, harmless, edit=addition(r, layer)), tokens).mean()
    moved = kl_divergence(logits(m, harmless), logits(m, harmless, edit=ablation(r))).mean()
    return bypass.item(), induce.item(), moved.item()
""",
    "2.4": """\
def choose(candidates, n_layers):
    kept = [c for c in candidates if c["induce"] > 0 and c["kl"] <= 0.1 and c["bypass"] == c["bypass"]]
    kept = [c for c in kept if c["layer"] < int(0.8 * n_layers)]
    return min(kept, key=lambda c: c["bypass"])
""",
    "2.5": """\
import torch
from refusallab.model import blocks, render

@torch.no_grad()
def last_token_stream(m, prompts, layer):
    texts = [render(m, p) for p in prompts]
    batch = m.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with m.nn.trace(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]) as tracer:
        stream = blocks(m.nn)[layer].input.save()
        tracer.stop()
    return stream[:, -1]
""",
}

# What else may stand in an answer, and the named mistake that has to be recognised.
WRONG = {
    "2.1": [
        (RIGHT["2.1"].replace("harmful.mean(0) - harmless", "harmless.mean(0) - harmful"), "harmless minus harmful"),
        (RIGHT["2.1"].replace("mean(0)", "mean()"), "one number for all"),
    ],
    "2.2": [
        (RIGHT["2.2"].replace("sum(-1)", "mean(-1)"), "mean over the vocabulary"),
        (
            RIGHT["2.2"].replace("p = base", "p = edited").replace("return (p * (", "return -(p * ("),
            "arguments swapped",
        ),
    ],
    "2.3": [(RIGHT["2.3"].replace("harmful, edit", "harmless, edit"), ""), ("def score(*args):\n    return 0.5\n", "")],
    "2.4": [
        (RIGHT["2.4"].replace("c['kl'] <= 0.1 and ", "").replace('c["kl"] <= 0.1 and ', ""), "no KL filter"),
        (RIGHT["2.4"].replace("min(", "max("), "highest bypass"),
    ],
    "2.5": [(RIGHT["2.5"].replace('"left"', '"right"'), "right padding")],
}
STUB = {
    "2.1": "def mean_difference(harmful, harmless):\n    raise NotImplementedError()\n",
    "2.2": "def kl(base_logits, edited_logits):\n    raise NotImplementedError()\n",
}


def cell(source, kind="code", **metadata):
    """A cell of a notebook file."""
    return {"cell_type": kind, "metadata": metadata, "source": source} | (
        {"outputs": [], "execution_count": None} if kind == "code" else {}
    )


def answer(number, source):
    """An answer cell with the metadata that the release gives it."""
    grader = {"grade_id": f"ex-{number.replace('.', '-')}", "solution": True, "grade": False, "locked": False}
    return cell(source, refusallab={"role": "answer", "exercise": number}, nbgrader=grader)


def notebook(answers=RIGHT, before=(), after=(), written=""):
    """The bytes of a notebook with answers by exercise, and code cells before and after them."""
    cells = [cell("# Lab 02", "markdown"), *map(cell, before)]
    cells += [answer(number, source) for number, source in answers.items()]
    cells += map(cell, after)
    cells.append(cell("### Question 2.6 · What did the test set decide?", "markdown"))
    cells.append(cell("A friend reports: ...", "markdown"))
    cells.append(cell(written, "markdown", refusallab={"role": "written", "number": "2.6"}))
    return save(cells)


def save(cells):
    """The bytes of a notebook with these cells."""
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}).encode()


def put(folder, student, data, name="02_the_refusal_direction.ipynb"):
    """Hand a notebook in, in nbgrader's layout."""
    path = folder / student / "02" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def points_of(records):
    """{student: {exercise: points}} of the exercises that the machine grades."""
    found = {}
    for g in records.all_grades():
        if g.answer is None:
            found.setdefault(g.student, {})[g.exercise] = g.points
    return found
