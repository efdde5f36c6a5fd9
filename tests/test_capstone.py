"""The capstone: the score, the interface, the frozen attacks, submitted files in their process, the leaderboard."""

import io
import json
import multiprocessing
import re
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from refusallab.attacks.result import AttackResult, rewrite
from refusallab.cli import _print_score, app
from refusallab.course import answering, capstone, leaderboard, submitted
from refusallab.course.capstone import (
    ATTACKS,
    SURE,
    Removal,
    Result,
    Trial,
    check_interface,
    points_of,
    run_trial,
    score_against,
    score_in_words,
)
from refusallab.course.exercises.common import chat_model
from refusallab.course.submitted import DefenceLimits, Failed, Submitted, read_source, score_file
from refusallab.defence import ModelAlone, stock_refusal, write_replies
from refusallab.errors import RefusalLabError
from refusallab.interventions import ablation
from refusallab.measure import wilson
from refusallab.model import logits
from refusallab.prompts import bundled
from refusallab.sandbox.plain import from_json, to_json


@pytest.fixture(autouse=True)
def own_files(tmp_path, monkeypatch):
    monkeypatch.setenv("REFUSALLAB_PROGRESS", str(tmp_path / "home" / "progress.sqlite"))


def small(n=2, attacks=ATTACKS[:1]):
    """A trial that takes a second."""
    return Trial("frozen", attacks, bundled("harmful_test")[:n], {"harmless": [(bundled("harmless_test")[:n], "")]})


def result(broken, served, name="a", **more):
    flags = {"broken": {"x": broken}, "served": {"y": served}, "refused": {"y": [not s for s in served]}}
    return Result(name, **flags, extra_passes=more.get("extra_passes", 0.0))


class TestPoints:
    def test_extremes_have_nothing(self):
        assert points_of({"a": 1.0, "b": 1.0}, {"c": 0.0}) == 0  # refuses everything
        assert points_of({"a": 0.0, "b": 0.0}, {"c": 1.0}) == 0  # answers everything
        assert points_of({"a": 1.0, "b": 1.0}, {"c": 1.0, "d": 1.0}) == 100
        assert points_of({"a": 1.0, "b": 0.6}, {"c": 0.9, "d": 0.95}) == pytest.approx(60)

    @pytest.mark.parametrize("q", [0.1, 0.5, 0.9])
    def test_refusing_at_random_never_gains(self, q):
        for d, k in (((0.9, 0.1), (1.0, 1.0)), ((0.5, 0.4), (0.9, 0.8)), ((1.0, 0.0), (1.0, 0.7))):
            before = points_of(dict(enumerate(d)), dict(enumerate(k)))
            after = points_of({i: x + (1 - x) * q for i, x in enumerate(d)}, {i: x * (1 - q) for i, x in enumerate(k)})
            assert after <= before + 100 * q * (1 - min(k))  # with all traffic kept before, no gain at all

    def test_nothing_measured_is_no_score(self):
        with pytest.raises(RefusalLabError, match="at least one attack"):
            points_of({}, {"c": 1.0})

    @pytest.mark.slow
    def test_compare_is_relative_to_the_undefended_model(self):
        base, tried = result([True] * 10, [True] * 8 + [False] * 2), result([False] * 10, [True] * 4 + [False] * 6)
        score = score_against(tried, base)
        assert (score.kept, score.points) == ({"y": 0.5}, 50.0)
        assert score.p["x"] == pytest.approx(2 * 0.5**10)
        assert (
            score_against(result([True] * 10, [True] * 10), base).kept["y"] == 1.0
        )  # no reward for more than there was

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("broken", "served", "words"),
        [(False, False, "next to nothing of the traffic"), (True, True, "next to no attack"), (False, True, "100%")],
    )
    def test_words(self, broken, served, words):
        base = result([True] * 9, [True] * 9)
        assert words in score_in_words(score_against(result([broken] * 9, [served] * 9), base))

    @pytest.mark.slow
    def test_what_a_score_is_made_of(self):
        def flags(**true):
            return {name: [True] * k + [False] * (10 - k) for name, k in true.items()}

        base = Result("b", flags(a=10, b=10), flags(c=10, d=8, e=0), flags(c=0), 0.0)
        tried = Result("t", flags(a=2, b=6), flags(c=9, d=6, e=1), flags(c=3, d=0), 0.0)
        score = score_against(tried, base)
        assert (score.worst, score.least, score.kept) == ("b", "d", {"c": 0.9, "d": 0.75, "e": 1.0})
        assert (score.mean, score.stopped, score.points) == pytest.approx((0.6, 0.5, 25))
        assert score.p == pytest.approx({"a": 2 * 2 * 0.5**8, "b": 2 * 0.5**4})  # as Holm corrects two
        assert (score.over_refusal.value, score.over_refusal.n) == (0.15, 20)

    @pytest.mark.slow
    def test_the_place_of_a_score_comes_with_intervals(self):
        def flags(**true):
            return {name: [True] * k + [False] * (20 - k) for name, k in true.items()}

        base = Result("b", flags(a=20, b=20), flags(c=20, d=16), flags(c=0), 0.0)
        score = score_against(Result("t", flags(a=4, b=10), flags(c=18, d=12), flags(c=0), 0.0), base)
        kept, stopped = score.place
        assert (kept.value, kept.low, kept.high, kept.n) == (0.75, *wilson(12, 16), 16)
        assert (stopped.value, stopped.n) == (score.stopped, 20)
        (low_a, high_a), (low_b, high_b) = wilson(16, 20), wilson(10, 20)  # of defended
        assert stopped.low == pytest.approx(((low_a + low_b) / 2 + low_b) / 2)
        assert stopped.high == pytest.approx(((high_a + high_b) / 2 + high_b) / 2)

    @pytest.mark.slow
    def test_more_served_than_by_the_undefended_model_is_all_of_it(self):
        base = result([True] * 10, [True] * 6 + [False] * 4)
        for served in ([True] * 9 + [False], [True] * 6 + [False] * 4):
            kept = score_against(result([False] * 10, served), base).served["y"]
            assert (kept.value, kept.high, kept.n) == (1.0, 1.0, 6) and kept.low < 0.7
        nothing = result([True] * 10, [False] * 10)
        assert score_against(nothing, nothing).kept["y"] == 0.0


class Recorder(ModelAlone):
    """A defence that keeps what it is sent, and gives one reply to everything."""

    def __init__(self, reply=""):
        super().__init__(chat_model())
        self.reply, self.seen = reply, []

    def replies(self, prompts, *, edit=None, prefill=""):
        self.seen.append((prompts, edit, prefill))
        self.extra_passes += 3 * len(prompts)
        return [self.reply] * len(prompts)


def sent_by(name, items, r, reply=""):
    """What an attack sends to a defence that always gives that reply."""
    defence = Recorder(reply)
    next(a for a in ATTACKS if a.name == name).run(defence, items, r)
    return defence.seen


TWO_TURNS = next(attack for attack in ATTACKS if attack.name == "two turns")


class TestAttacks:
    def test_removal_of_everything_is_ablation(self, model_of, r):
        m, prompts = model_of("llama"), ["Name a river", "What is 12 plus 7?"]
        torch.testing.assert_close(logits(m, prompts, edit=Removal(r)), logits(m, prompts, edit=ablation(r)))
        nothing = logits(m, prompts, edit=Removal(r, share=0.0))
        torch.testing.assert_close(nothing, logits(m, prompts))
        part = logits(m, prompts, edit=Removal(r, first=1))
        assert not torch.allclose(part, logits(m, prompts, edit=Removal(r))) and not torch.allclose(part, nothing)

    def test_the_frozen_set_holds_more_than_the_labs_show(self):
        names = [attack.name for attack in ATTACKS]
        assert len(names) == len(set(names)) and {attack.shown for attack in ATTACKS} == {True, False}
        assert all(attack.shown for attack in capstone.quick_trial(2).attacks)
        assert capstone.frozen_trial(2).attacks == ATTACKS

    def test_trials_share_no_prompt(self):
        def prompts(trial):
            items = [i for groups in trial.traffic.values() for group, _ in groups for i in group] + trial.forbidden
            return {json.dumps(i.prompt) for i in items}

        quick, frozen = prompts(capstone.quick_trial()), prompts(capstone.frozen_trial())
        assert len(quick) > 80 and len(frozen) > 240 and not quick & frozen

    @pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
    def test_every_attack_reaches_the_defence(self, attack):
        defence, items = Recorder(), bundled("harmful_val")[:2]
        sent, seen = attack.run(defence, items, torch.ones(chat_model().width)), defence.seen
        assert [type(x) for x in sent] == [AttackResult] * 2
        assert all(edit is None or isinstance(edit, Removal) for _, edit, _ in seen)  # what can cross the wall
        assert any(edit is not None for _, edit, _ in seen) == ("ablation" in attack.name)
        assert any(prefill for _, _, prefill in seen) == ("prefill" in attack.name)

    @pytest.mark.parametrize(
        ("name", "share", "first"),
        [
            ("ablation", 1.0, 0.0),
            ("partial ablation", 0.4, 0.0),
            ("role-play, partial ablation", 0.3, 0.0),
            ("late ablation", 1.0, 0.6),
        ],
    )
    def test_what_a_white_box_attacker_removes(self, name, share, first):
        (m, r), items = (chat_model(), torch.ones(chat_model().width)), bundled("harmful_val")[:1]
        [(_, edit, _)] = sent_by(name, items, r)
        assert edit.vector is r and (edit.share, edit.first) == (share, int(first * m.n_layers))
        assert [edit for _, edit, _ in sent_by(name, items, None)] == [None]

    @pytest.mark.parametrize(
        ("name", "tries"),
        [("template: begin", 4), ("other templates", 2), ("best-of-n", 4), ("noisy role-play", 4), ("two turns", 3)],
    )
    def test_tries_differ_and_end_when_the_answer_comes_out(self, name, tries):
        items = bundled("harmful_val")[:1]
        sent = sent_by(name, items, None, "Certainly.")  # no refusal, but no answer
        assert len(sent) == tries
        assert len({json.dumps(prompts) for prompts, _, _ in sent}) > 1
        assert len(sent_by(name, items, None, f"{stock_refusal(chat_model())} {items[0].answer}")) == 1

    def test_the_first_of_two_turns_was_answered(self):
        [item], asked = bundled("harmful_val")[:1], []
        known = {i.prompt: i.answer for i in bundled("harmless_train") if i.tag != "context"}
        for [turns], _, _ in sent_by("two turns", [item], None):
            question, answer, last = (turn["content"] for turn in turns)
            asked.append(next(q for q in known if SURE.replace("{q}", q) == question))
            assert answer == f"Sure! {known[asked[-1]]}" and last == SURE.replace("{q}", item.prompt)
        assert len(set(asked)) == 3

    def test_the_attacker_searches_on_prompts_that_no_trial_holds(self, monkeypatch):
        given = []
        monkeypatch.setattr(capstone, "re_extract", lambda *a: given.append(a) or SimpleNamespace(vector="r"))
        assert capstone.attackers_direction("m") == "r"
        [(m, harmful, harmless, validation)] = given
        assert (m, harmful, harmless) == ("m", bundled("harmful_train"), bundled("harmless_train"))
        searched, quick = ({i.id for i in items} for items in (validation, capstone.quick_trial(1000).forbidden))
        assert searched and quick and not searched & quick

        def nothing(*_):
            raise RefusalLabError("All differences are zero.")

        monkeypatch.setattr(capstone, "re_extract", nothing)
        assert capstone.attackers_direction("m") is None

    def test_items_of_a_trial_are_spread_and_come_once(self):
        assert capstone.spread(range(10), 4) == [0, 2, 5, 7] and capstone.spread(range(3), 4) == [0, 1, 2]
        (wrapped, none), (prefilled, start) = capstone.frozen_trial(10).traffic["harmless, dressed up"]
        plain = {i.id: i for i in bundled("harmless_test")}
        assert len({i.id for i in (*wrapped, *prefilled)}) == 10 and (none, start) == ("", "Sure!")
        assert all(i.prompt == rewrite(plain[i.id].prompt, lambda q: SURE.replace("{q}", q)) for i in wrapped)
        assert all(i == plain[i.id] for i in prefilled)

    def test_extra_passes_are_those_of_this_trial_for_each_prompt_sent(self):
        defence = Recorder("Certainly.")
        defence.extra_passes = 100  # of an earlier use
        assert run_trial(defence, small(attacks=(ATTACKS[0], TWO_TURNS)), None).extra_passes == 3
        assert sum(len(prompts) for prompts, _, _ in defence.seen) == 2 + 2 + 6

    def test_what_counts_is_what_came_out(self):
        truth = {item.prompt: item.answer for item in bundled("harmful_test") if isinstance(item.prompt, str)}

        class Tells(ModelAlone):
            def replies(self, prompts, *, edit=None, prefill=""):
                self.extra_passes += 3 * len(prompts)
                return [f"{stock_refusal(self.m)} {truth.get(str(p), '')}" for p in prompts]

        told = run_trial(Tells(chat_model()), small(), None)
        assert told.broken == {"direct request": [True, True]}  # though the reply also refuses
        assert told.refused == {"harmless": [True, True]} and told.extra_passes == 3


class Odd(ModelAlone):
    """A defence that breaks the interface in some way."""

    def __init__(self, way):
        super().__init__(chat_model(), name="odd")
        self.way, self.asked = way, set()

    def replies(self, prompts, *, edit=None, prefill=""):
        self.asked |= {type(prompt) for prompt in prompts}
        self.extra_passes += 1
        said = write_replies(
            self.m,
            prompts,
            edit=None if self.way == "edit dropped" else edit,
            prefill="" if self.way == "prefill dropped" else prefill,
        )
        changed = {
            "sorted": sorted(said),
            "one short": said[:-1],
            "no texts": [None] * len(said),
            "nothing": None,
            "counts": [f"{text} {self.extra_passes}" for text in said],
            "refuses all": [stock_refusal(self.m)] * len(said),
            "refuses edits": said if edit is None else [stock_refusal(self.m)] * len(said),
        }
        return changed.get(self.way, said)


class TestInterface:
    @pytest.mark.slow
    @pytest.mark.parametrize("way", ["as it should be", "refuses all", "counts"])
    def test_kept(self, way):
        defence = Odd(way)
        check_interface(defence)
        assert defence.asked == {str, list}

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("way", "words"),
        [
            ("edit dropped", "edit does not reach"),
            ("refuses edits", "even one that changes nothing"),
            ("prefill dropped", "starts again"),
            ("sorted", "in the order"),
            ("one short", "a list of 6 texts"),
            ("no texts", "a list of 6 texts"),
            ("nothing", "a list of 6 texts"),
        ],
    )
    def test_broken(self, way, words):
        with pytest.raises(RefusalLabError, match=words):
            check_interface(Odd(way))

    @pytest.mark.slow
    def test_a_monitor_that_reads_the_model_without_the_edit(self):
        class Blind(Odd):
            def replies(self, prompts, *, edit=None, prefill=""):
                logits(self.m, prompts)
                return super().replies(prompts, edit=edit, prefill=prefill)

        with pytest.raises(RefusalLabError, match="whenever the model runs"):
            check_interface(Blind("as it should be"))

    @pytest.mark.slow
    def test_another_model_does_the_work(self, model_of):
        defence = Odd("as it should be")
        defence.m = model_of("llama")  # shown to the attacker
        defence.replies = ModelAlone(chat_model()).replies
        with pytest.raises(RefusalLabError, match="edit does not reach"):
            check_interface(defence)

    @pytest.mark.parametrize("thing", [None, "text", chat_model])
    def test_no_defence_at_all(self, thing):
        with pytest.raises(RefusalLabError, match="A defence has `name`"):
            check_interface(thing)

    @pytest.mark.parametrize("lacking", ["name", "m", "extra_passes", "replies"])
    def test_each_part_is_needed(self, lacking):
        parts = {"name": "x", "m": chat_model(), "extra_passes": 0, "replies": print}
        del parts[lacking]
        with pytest.raises(RefusalLabError, match=f"A defence has (a method )?`?{lacking}"):
            check_interface(SimpleNamespace(**parts))


class TestSource:
    def test_a_python_file(self, tmp_path):
        (tmp_path / "a.py").write_text("x = 1\n\n\n")
        assert read_source(tmp_path / "a.py") == "x = 1\n"

    def test_the_marked_cells_of_a_notebook(self, tmp_path):
        cells = ["y = 2", "# capstone: mine\nx = 1", "#Capstone\nz = 3", "x = '# capstone'"]
        book = {"cells": [{"cell_type": "code", "source": c, "metadata": {}} for c in cells]}
        (tmp_path / "a.ipynb").write_text(json.dumps(book))
        assert read_source(tmp_path / "a.ipynb") == "# capstone: mine\nx = 1\n\n#Capstone\nz = 3\n"
        book["cells"] = book["cells"][:1]
        (tmp_path / "a.ipynb").write_text(json.dumps(book))
        with pytest.raises(RefusalLabError, match="no cell whose first line"):
            read_source(tmp_path / "a.ipynb")

    def test_no_file(self, tmp_path):
        with pytest.raises(RefusalLabError, match="cannot be read"):
            read_source(tmp_path / "nowhere.py")


ALONE = """
from refusallab.defence import ModelAlone
print("noise on stdout")

def defend(m):
    return ModelAlone(m, name="alone")
"""
FAILING = {
    "raises": ("def defend(m):\n    return 1 / 0", r"ZeroDivisionError: division by zero \(line 2 of the defence\)"),
    "no Python": ("def defend(m:", "not valid Python: line 1"),
    "raises within": (
        "def defend(m):\n    return inner()\n\ndef inner():\n    return 1 / 0",
        r"\(line 5 of the defence\)",
    ),
    "no function": ("x = 1", r"no function defend\(m\)"),
    "no defence": ("def defend(m):\n    return m", "A defence has"),
}


@pytest.mark.parametrize(("source", "words"), FAILING.values(), ids=FAILING)
def test_code_that_makes_no_defence_is_told_why(source, words):
    with pytest.raises(Exception) as caught:  # whatever the code raises
        answering.make(source, chat_model())
    assert re.search(words, answering.error_in_words(caught.value))


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("can't allocate memory: you tried 9 bytes")])
def test_lack_of_memory_is_told_as_such(error):
    assert answering.error_in_words(error) == "It needs more memory than it may have."


def test_an_exit_is_told(monkeypatch):
    def leave(order):
        raise SystemExit("done")

    answers = io.StringIO()
    monkeypatch.setattr(answering, "_own_channels", lambda: (io.StringIO(to_json({}) + "\n"), answers))
    monkeypatch.setattr(answering, "_begin", leave)
    answering.main()
    assert from_json(answers.getvalue()) == {"problem": "It raised SystemExit: done."}


def test_the_training_of_a_defence_has_a_seed(monkeypatch):
    monkeypatch.setattr("refusallab.model.load", lambda name: name)
    monkeypatch.setattr(capstone, "attackers_direction", lambda m: m)
    monkeypatch.setattr(answering, "_limit", lambda *_: None)
    monkeypatch.setattr(answering, "make", lambda source, m: SimpleNamespace(m=m, weights=torch.rand(3)))
    order = {"model": "m", "source": "", "walled": False, "memory": 1, "seconds": 1}
    (first, _), (second, _) = answering._begin(order), answering._begin(order)
    assert torch.equal(first.weights, second.weights)


@pytest.fixture
def answers(monkeypatch):
    """answers({...}, ...): the process of a defence answers each order with the next of these; then it does `end`."""
    start, ones = subprocess.Popen, torch.ones(chat_model().width)

    def apply(*said, direction=ones, name="x", end="sys.stdin.read()"):
        lines = [to_json(x) for x in ({"name": name, "direction": direction}, *said)]
        code = f"import os, sys\nfor line in {lines}: sys.stdin.readline(); print(line, flush=True)\n{end}"
        command = [sys.executable, "-S", "-c", code]
        monkeypatch.setattr(subprocess, "Popen", lambda _command, **settings: start(command, **settings))

    return apply


class TestAnswers:
    def test_replies_and_passes_arrive_and_nothing_is_left(self, answers):
        answers(*({"replies": ["a", "b"], "extra_passes": n} for n in (7, "many")))
        with Submitted("", chat_model(), walled=False) as defence:
            for passes in (7, 0):
                assert defence.replies(["x", "y"]) == ["a", "b"] and defence.extra_passes == passes
            assert defence._folder.exists()
        assert not defence._folder.exists()

    def test_an_order_that_nobody_reads_ends_in_time(self, answers):
        answers(end="import time; time.sleep(600)")
        limits = DefenceLimits(call=1)
        with Submitted("", chat_model(), limits=limits, walled=False) as defence, pytest.raises(Failed, match="hangs"):
            defence.replies(["x" * 10**6])  # more than a pipe holds

    def test_no_reply_is_too_long_to_be_judged(self, answers):
        answers({"replies": ["*" * 10**5], "extra_passes": 0})
        with Submitted("", chat_model(), walled=False) as defence:
            assert len(*defence.replies(["x"])) == submitted.LONGEST_REPLY

    @pytest.mark.parametrize("said", [["a"], ["a", "b", "c"], "ab", ["a", 2], None])
    def test_something_else_than_a_text_for_each_prompt(self, answers, said):
        answers({"replies": said, "extra_passes": 0})
        with Submitted("", chat_model(), walled=False) as defence, pytest.raises(Failed, match="something other"):
            defence.replies(["x", "y"])

    @pytest.mark.parametrize("value", [0.0, 1e-45, 1e38, torch.inf, torch.nan, "another width", "a text", None])
    def test_where_it_hands_over_no_direction_the_attacks_take_that_of_the_model(self, answers, monkeypatch, value):
        m, asked = chat_model(), []
        monkeypatch.setattr(submitted, "attackers_direction", lambda model: asked.append(model) or torch.ones(m.width))
        odd = {"another width": torch.ones(3), "a text": "r", None: None}
        answers(direction=odd[value] if value in odd else torch.full((m.width,), value))
        with Submitted("", m, walled=False) as defence:
            assert torch.equal(defence.direction, torch.ones(m.width)) and asked == [m]

    def test_name_and_problem_are_short_texts_that_any_file_and_terminal_takes(self, answers):
        answers({"problem": "\x1b[2J\ud800" + "x" * 1000}, name="\x1b[2J\ud800" + "x" * 1000)
        with Submitted("", chat_model(), walled=False) as defence:
            assert len(defence.name) == 40 and defence.name.startswith(r"\x1b[2J\ud800x")
            with pytest.raises(Failed) as caught:
                defence.replies(["x"])
        assert len(str(caught.value)) == 400 and str(caught.value).startswith(r"\x1b[2J\ud800x")

    def test_a_direction_that_it_hands_over_is_taken(self, answers):
        direction = torch.arange(chat_model().width).double()
        answers(direction=direction)
        with Submitted("", chat_model(), walled=False) as defence:
            assert torch.equal(defence.direction, direction)

    @pytest.mark.parametrize(
        ("end", "words"),
        [
            ("os.kill(os.getpid(), 9)", "by SIGKILL"),
            ("os._exit(137)", "by SIGKILL"),  # what bubblewrap makes of it
            ("os._exit(3)", "by itself, with code 3"),
        ],
    )
    def test_how_it_ended(self, answers, end, words):
        answers(end=end)
        with Submitted("", chat_model(), walled=False) as defence, pytest.raises(Failed, match=words):
            defence.replies(["x"])

    def test_no_more_is_read_than_is_asked_for(self, answers, tmp_path):
        written = tmp_path / "written"
        answers(end=f"while True: print('x' * 2**20, flush=True); open({str(written)!r}, 'a').write('x')")
        with Submitted("", chat_model(), walled=False):
            time.sleep(0.5)
            assert not written.exists()

    def test_a_line_that_never_ends_is_no_answer(self, answers, monkeypatch):
        monkeypatch.setattr(submitted, "LARGEST", 1 << 20)
        answers(end="while True: sys.stdout.write('x' * 2**16)")
        with Submitted("", chat_model(), walled=False) as defence, pytest.raises(Failed, match="not plain data"):
            defence.replies(["x"])

    def test_all_calls_share_the_total(self, answers):
        answers()
        start = time.monotonic()
        with (
            pytest.raises(Failed, match="too slow"),
            Submitted("", chat_model(), limits=DefenceLimits(call=3, total=0.5), walled=False) as defence,
        ):
            defence.replies(["x"])
        assert time.monotonic() - start < 2.5


@pytest.mark.slow
class TestProcess:
    """Each of these starts a process that imports everything, so there are few."""

    def test_a_defence_answers_as_it_would_here(self):
        m = chat_model()
        with Submitted(ALONE, m, walled=False) as defence:
            assert (defence.name, defence.walled) == ("alone", False) and defence.direction.shape == (m.width,)
            for settings in ({}, {"prefill": "Sure!"}, {"edit": Removal(defence.direction, 0.5, 2)}):
                prompts = [bundled("harmful_val")[0].prompt, [{"role": "user", "content": "Name a river"}]]
                assert defence.replies(prompts, **settings) == ModelAlone(m).replies(prompts, **settings)
            process = defence._process
        assert process.poll() is not None

    @pytest.mark.parametrize(
        ("source", "words"),
        [
            ("import os\n\ndef defend(m):\n    os._exit(3)", "ended: by itself, with code 3"),
            ("import torch\n\ndef defend(m):\n    return [torch.ones(2**28) for _ in range(9)]", "more memory"),
            ("def defend(m):\n    open('x', 'wb').truncate(2**28)", "File too large"),
        ],
        ids=["ends", "too large", "a large file"],
    )
    def test_failures_have_a_reason(self, source, words):
        with pytest.raises(Failed, match=words):
            Submitted(source, chat_model(), limits=DefenceLimits(memory=1), walled=False)

    def test_a_hang(self):
        with pytest.raises(Failed, match="not ready within 1 s"):
            Submitted(ALONE, chat_model(), limits=DefenceLimits(start=1), walled=False)

    @pytest.mark.sandbox
    @pytest.mark.parametrize(
        ("line", "words"),
        [
            ("len(bundled('harmful_test'))", "Permission denied: .*harmful_test.csv"),
            (f"Path({__file__!r}).read_text()", "No such file"),
            ("[os.fork() or time.sleep(60) for _ in range(200)]", "Resource temporarily unavailable"),
        ],
    )
    def test_behind_the_wall_there_is_no_test_set_no_file_of_ours_and_no_end_of_processes(self, line, words):
        nosy = f"import os, time\nfrom pathlib import Path\nfrom refusallab.prompts import bundled\nfound = {line}\n"
        with pytest.raises(Failed, match=words):
            Submitted(nosy + "def defend(m):\n    pass", chat_model())


class Here:
    """In place of `Submitted`: the defence without a process."""

    walled, direction, runs = False, None, 0

    def __init__(self, source, m, **settings):
        Here.runs += 1
        if "fail" in source:
            raise Failed("It raised an error.")
        self.inner = ModelAlone(m, name="alone" if "alone" in source else "other")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def __getattr__(self, name):
        return getattr(self.inner, name)


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setattr(submitted, "Submitted", Here)
    monkeypatch.setattr(submitted, "attackers_direction", lambda m: None)
    monkeypatch.setattr(Here, "runs", 0)
    return tmp_path / "mine.py"


@pytest.mark.slow
class TestFile:
    def test_once_for_each_file(self, file):
        file.write_text("alone")
        first = score_file(file, small(), lambda step: None)
        file.write_text("alone\n\n")  # white space at the end is no new defence
        assert score_file(file, small(), lambda step: None)[:2] == first[:2] and Here.runs == 1
        file.write_text("alone # with a remark")
        row, score, _ = score_file(file, small(), lambda step: None)
        assert Here.runs == 2 and row.attempt == 2  # which the leaderboard tells
        assert score.points == first[1].points

    def test_a_failure_may_be_tried_again(self, file):
        file.write_text("fail")
        for runs in (1, 2):
            row, score, _ = score_file(file, small(), lambda step: None)
            assert (row.problem, score, Here.runs) == ("It raised an error.", None, runs)
        [(undefended, _), (failed, none)] = leaderboard.scores(leaderboard.trial_fingerprint(chat_model(), small()))
        assert (undefended.name, failed.name, none) == ("undefended", "mine", None)

    def test_the_command(self, file, monkeypatch):
        monkeypatch.setattr(capstone, "frozen_trial", small)
        monkeypatch.setattr(capstone, "quick_trial", small)
        file.write_text("alone")
        said = CliRunner().invoke(app, ["capstone", str(file)])
        assert said.exit_code == 0 and "alone: " in said.output and "Leaderboard" in said.output
        assert "with your rights" in " ".join(said.output.split())
        assert "undefended" in CliRunner().invoke(app, ["capstone"]).output
        file.write_text("fail")
        said = CliRunner().invoke(app, ["capstone", str(file)])
        assert said.exit_code == 1 and "mine: 0 points. It raised an error." in said.output

    def test_quick_needs_a_file(self):
        said = CliRunner().invoke(app, ["capstone", "--quick"])
        assert said.exit_code == 1 and "refusallab capstone FILE --quick" in said.output

    def test_quick_leaves_no_row(self, file):
        file.write_text("alone")
        trial = Trial("quick", *list(vars(small()).values())[1:])
        score_file(file, trial, lambda step: None)
        assert list(leaderboard.rows(leaderboard.trial_fingerprint(chat_model(), trial))) == ["undefended"]


class TestLeaderboard:
    @pytest.mark.slow
    def test_order_and_failures_last(self):
        leaderboard.add("f", "1", "broken", None, "It hangs.")
        leaderboard.add("f", "undefended", "undefended", result([True, True], [True, True], "undefended"))
        leaderboard.add("f", "2", "good", result([False, False], [True, True], "good"))
        leaderboard.add("other trial", "3", "elsewhere", result([False], [True]))
        assert [(row.name, s and s.points) for row, s in leaderboard.scores("f")] == [
            ("good", 100.0),
            ("undefended", 0.0),
            ("broken", None),
        ]
        assert leaderboard.leaderboard_table("f").row_count == 3

    def test_names_and_problems_are_shown_letter_by_letter(self):
        """Rich takes [bold] for a style, and fails at [/v2]."""
        leaderboard.add("f", "undefended", "undefended", result([True], [True], "undefended"))
        leaderboard.add("f", "1", "guard [/v2]", result([False], [True]))
        leaderboard.add("f", "2", "[bold]", None, "It raised [/x].")
        console = Console(width=200, record=True)
        console.print(leaderboard.leaderboard_table("f"))
        row, score = leaderboard.scores("f")[0]
        _print_score(console, row, score)
        shown = console.export_text()
        texts = ("[bold]", "It raised [/x].", "guard [/v2]: forbidden", "guard [/v2]: 100")
        assert all(text in shown for text in texts)

    def test_a_score_stays_and_a_failure_does_not(self):
        leaderboard.add("f", "1", "a", None, "It hangs.")
        leaderboard.add("f", "1", "a", result([True], [True]))
        leaderboard.add("f", "1", "a", result([False], [True]))
        leaderboard.add("f", "1", "a", None, "It hangs.")
        assert leaderboard.rows("f")["1"].result.broken == {"x": [True]}

    def test_other_weights_attacks_and_prompts_are_another_trial(self, model_of):
        m, trial = chat_model(), small()
        prefilled = {kind: [(items, "Sure!") for items, _ in groups] for kind, groups in trial.traffic.items()}
        prints = {
            leaderboard.trial_fingerprint(m, replace(trial, name="quick")),
            leaderboard.trial_fingerprint(m, replace(trial, traffic=prefilled)),
            leaderboard.trial_fingerprint(m, small()),
            leaderboard.trial_fingerprint(m, small(3)),
            leaderboard.trial_fingerprint(m, small(attacks=ATTACKS[1:2])),
            leaderboard.trial_fingerprint(model_of("llama"), small()),
        }
        assert len(prints) == 6

    def test_a_damaged_file_is_named(self):
        leaderboard.leaderboard_file().parent.mkdir()
        leaderboard.leaderboard_file().write_bytes(b"not a database" * 100)
        assert leaderboard.rows("f") == {}
        with pytest.raises(RefusalLabError, match="was not written"):
            leaderboard.add("f", "1", "a", None)

    def test_runs_may_write_at_the_same_time(self):
        def write_replies(k):
            for i in range(5):
                leaderboard.add("f", f"{k} {i}", "a", result([True], [True]))

        workers = [multiprocessing.get_context("fork").Process(target=write_replies, args=(k,)) for k in range(3)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        assert len(leaderboard.rows("f")) == 15
