"""Progress bars: in a notebook while something takes long, and nowhere in what is stored."""

import os

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

from refusallab import bars

CELL = "from refusallab import bars\nbars.DELAY = 0\nprint(sum(bars.with_bar(range(4), 'replies', 4)))"


def test_a_bar_is_drawn_moves_on_and_is_wiped_out_and_one_within_it_is_not_drawn(monkeypatch, capsys):
    monkeypatch.setattr(bars, "_in_a_notebook", lambda: True)
    monkeypatch.setattr(bars, "DELAY", 0)
    with bars.bar("GCG", 4) as drawn:
        assert list(bars.with_bar("ab", "replies", 2)) == ["a", "b"]
        drawn.update(2)
        drawn.refresh()
    shown = capsys.readouterr().out
    assert "GCG: 50%" in " ".join(shown.split())
    assert "replies" not in shown
    assert shown.split("\r")[-2].isspace()
    list(bars.with_bar("ab", "replies", 2))
    assert "replies" in capsys.readouterr().out


def test_outside_of_a_notebook_there_is_none(monkeypatch, capsys):
    monkeypatch.setattr(bars, "DELAY", 0)
    assert list(bars.with_bar("ab", "replies", 2)) == ["a", "b"]
    assert capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(("disabled", "drawn"), [("", True), ("1", False)])
def test_a_kernel_draws_one_unless_told_otherwise(disabled, drawn):
    nb = new_notebook(cells=[new_code_cell(CELL)])
    NotebookClient(nb).execute(env=os.environ | ({"TQDM_DISABLE": disabled} if disabled else {}))
    text = "".join(output.text for output in nb.cells[0].outputs)
    assert ("replies" in text) is drawn
    assert text.endswith("6\n")
