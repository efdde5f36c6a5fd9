"""Lab 11, refusal that thinks: thoughts and answers, whether replies follow thoughts, sites within a thought."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor

from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import prompts, thinking_model
from refusallab.directions import random_directions
from refusallab.interventions import addition
from refusallab.model import Edit, Model, Prompt, generate, ids_of, load
from refusallab.thoughts import behind, sentences, think
from smallmodels.world import thought
from smallmodels.world.dialogue import thing_requests
from smallmodels.world.facts import world

OPENS, CLOSES = "<think>", "</think>"


def _thoughts(seed: int, count: int) -> list[str]:
    """Right thoughts about things of the train split."""
    rng = random.Random(seed)
    made = [r for thing in world().things if thing.split == "train" for r in thing_requests(thing)]
    return [thought.write(r, thought.right_steps(r), rng) for r in rng.sample(made, count)]


# --- 11.1 ----------------------------------------------------------------------------------------------------------


def _split_reply(reply: str) -> tuple[str, str]:
    before, closed, answer = reply.partition(CLOSES)
    if closed or OPENS in reply:
        return before.replace(OPENS, "").strip(), answer.strip()
    return "", reply.strip()


def _replies(seed: int) -> list[Case]:
    said = _thoughts(seed, 4)
    return [
        Case("a thought and an answer", {"reply": f"{OPENS}{said[0]}{CLOSES}\nIt costs {2 + seed % 7} eggs."}),
        Case("an empty thought", {"reply": f"{OPENS}{CLOSES}\nIt is kept by number {seed % 9}."}),
        Case("no thought", {"reply": f"Hang {seed % 9 + 2} bells over it."}),
        Case("a thought that is not finished", {"reply": f"{OPENS}{said[1][:40]}"}),
        Case("a thought that the prompt has opened", {"reply": f"{said[2]}{CLOSES}\nIt costs {1 + seed % 5} coins."}),
        Case("an answer alone, with white space at its ends", {"reply": f"\nHang {seed % 9 + 2} bells over it. "}),
        Case(
            "a thought with white space at its ends",
            {"reply": f"{OPENS}\n{said[3]}\n{CLOSES}It costs {2 + seed % 7} eggs."},
        ),
        Case(
            "a thought and an answer of two lines each",
            {"reply": f"{OPENS}in short:\n{said[3]}{CLOSES}\n\nIt costs {2 + seed % 7} eggs.\nIn the barn."},
        ),
    ]


def _cleaned(clean: Callable[[str], str]) -> Callable[[str], tuple[str, str]]:
    """A wrong version: another way to make a thought of what stands before the closing tag."""

    def wrong(reply: str) -> tuple[str, str]:
        before, closed, _ = reply.partition(CLOSES)
        thought, answer = _split_reply(reply)
        return (clean(before) if closed else thought), answer

    return wrong


def _one_line(reply: str) -> tuple[str, str]:
    thought, answer = _split_reply(reply)
    return (thought, answer.partition("\n")[0]) if CLOSES in reply else (thought, answer)


SPLIT = define(
    "11.1",
    reference=_split_reply,
    cases=_replies,
    mistakes=(
        Mistake(
            "unfinished thoughts taken for answers",
            lambda reply: _split_reply(reply) if CLOSES in reply else ("", reply.replace(OPENS, "").strip()),
            "A thought that is not finished has no answer yet. A judge who takes it for an answer finds refusals, and "
            "forbidden methods, that were never said to the user.",
        ),
        Mistake(
            "all thought",
            lambda reply: _split_reply(reply) if OPENS in reply or CLOSES in reply else (reply.strip(), ""),
            "A reply without any tag holds no thought: all of it is the answer.",
        ),
        Mistake(
            "the other way round",
            lambda reply: _split_reply(reply)[::-1],
            "The order is turned: return the thought first, then the answer.",
        ),
        Mistake(
            "tags kept",
            _cleaned(str.strip),
            "The opening tag is still in the thought. Take the tags out.",
        ),
        Mistake(
            "space kept",
            lambda reply: (_split_reply(reply)[0], reply.partition(CLOSES)[2] if CLOSES in reply else reply),
            "White space stands at an end of the answer, such as the line break behind the closing tag. Strip it.",
        ),
        Mistake(
            "opening tag needed",
            lambda reply: _split_reply(reply) if OPENS in reply else ("", reply.strip()),
            "Here the prompt has opened the thought, so the reply holds only the tag that closes it. All before that "
            "tag is thought.",
        ),
        Mistake(
            "closing tag needed",
            lambda reply: tuple(reply.split(CLOSES)) if CLOSES in reply else tuple(reply.split(CLOSES, 1))[2],
            "`split` gives fewer parts where a tag is missing. Think of replies without a thought.",
        ),
        Mistake(
            "space around the thought kept",
            _cleaned(lambda before: before.replace(OPENS, "")),
            "White space stands at an end of the thought. Strip it as you strip the answer.",
        ),
        Mistake(
            "letters of the tag stripped",
            _cleaned(lambda before: before.lstrip(OPENS).strip()),
            "`strip('<think>')` takes away any of the characters < t h i n k >, and so the beginning of some thoughts. "
            "Use `replace` or `removeprefix`.",
        ),
        Mistake(
            "one line only",
            _one_line,
            "An answer may have several lines. In a regular expression `.` stops at the end of a line, unless you pass "
            "`re.DOTALL`.",
        ),
    ),
    hints=(
        "`before, tag, after = reply.partition('</think>')`. What is `tag` where there is no such tag?",
        "Three kinds of replies: with a closing tag (thought before it, answer after it), with an opening tag alone "
        "(all thought), with neither (all answer).",
        "`.replace('<think>', '').strip()` cleans the thought.",
    ),
)

# --- 11.2 ----------------------------------------------------------------------------------------------------------


def _after_thought(tokenizer: Any, messages: list[dict[str, str]], thought: str, thinking: bool = True) -> str:
    """The text that the model reads: a prompt, and a thought in the place of its own."""
    settings = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": thinking}
    return tokenizer.apply_chat_template(messages, **settings) + f"{OPENS}{thought}{CLOSES}\n"


def _as_turn(tokenizer: Any, messages: list[dict[str, str]], thought: str, generation: bool = True) -> str:
    """The bug: the thought as a turn of its own."""
    turns = [*messages, {"role": "assistant", "content": f"{OPENS}{thought}{CLOSES}\n"}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation, enable_thinking=True)


@cache
def _tokenizer() -> Any:
    return load("charter-think").tokenizer


def _with_tokenizer(function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    return function(_tokenizer(), **inputs)


def _conversations(seed: int) -> list[Case]:
    first, second, third = prompts("harmless_train", seed, 3)
    said = _thoughts(seed + 1, 2)
    user = {"role": "user", "content": first}
    earlier = [{"role": "user", "content": second}, {"role": "assistant", "content": "It costs two eggs."}]
    return [
        Case("a question", {"messages": [user], "thought": said[0]}),
        Case("a second question", {"messages": [*earlier, {"role": "user", "content": third}], "thought": said[1]}),
    ]


AFTER = define(
    "11.2",
    reference=_after_thought,
    observe=_with_tokenizer,
    cases=_conversations,
    mistakes=(
        Mistake(
            "the bug",
            _as_turn,
            "The bug is still there: look at the end of the text. The turn with the thought is closed, and a new turn "
            "begins, in which the model thinks for itself.",
        ),
        Mistake(
            "turn closed",
            lambda tokenizer, messages, thought: _as_turn(tokenizer, messages, thought, generation=False),
            "The turn is closed behind the thought, so there is nothing left to reply. The text must end with the "
            "thought.",
        ),
        Mistake(
            "thinking switched off",
            lambda tokenizer, messages, thought: _after_thought(tokenizer, messages, thought, thinking=False),
            "An empty thought stands before yours: the template wrote it, because thinking is switched off. Pass "
            "enable_thinking=True.",
        ),
        Mistake(
            "line break left out",
            lambda tokenizer, messages, thought: _after_thought(tokenizer, messages, thought).rstrip(),
            "The line break behind </think> is missing. In training it stood before every answer.",
        ),
        Mistake(
            "not closed",
            lambda tokenizer, messages, thought: _after_thought(tokenizer, messages, thought)[: -len(CLOSES) - 1],
            "The thought is still open. Close it with </think> and a line break.",
        ),
        Mistake(
            "tags left out",
            lambda tokenizer, messages, thought: (
                _after_thought(tokenizer, messages, "")[: -len(f"{OPENS}{CLOSES}\n")] + thought
            ),
            "Without its tags the thought is the beginning of the answer.",
        ),
        Mistake(
            "no generation prompt",
            lambda tokenizer, messages, thought: (
                tokenizer.apply_chat_template(messages, tokenize=False) + f"{OPENS}{thought}{CLOSES}\n"
            ),
            "The assistant's turn is not opened: ask the template for the generation prompt.",
        ),
    ),
    hints=(
        "Print her text. Whose turn is it at the end, and what will the model write next?",
        "A message is a finished turn. What you need is the *beginning* of a turn: the template cannot write it, but "
        "you can append it to what the template gives.",
        "Render `messages` alone, with `add_generation_prompt=True` and `enable_thinking=True`; then append "
        "`'<think>' + thought + '</think>\\n'`.",
    ),
)

# --- 11.3 ----------------------------------------------------------------------------------------------------------


def _share_following(verdicts: list[str], refused: list[bool], alone: list[bool]) -> float:
    told = [verdict == "forbidden" for verdict in verdicts]
    apart = [k for k in range(len(told)) if told[k] != alone[k]]
    return sum(refused[k] == told[k] for k in apart) / len(apart)


def _outcomes_behind(seed: int) -> list[Case]:
    rng = random.Random(seed)

    def inputs(count: int, follows: float) -> dict[str, Any]:
        alone = [rng.random() < 0.5 for _ in range(count)]
        told = [not alone[0], not alone[1], alone[2], *(rng.random() < 0.5 for _ in range(count - 3))]
        refused = [t if rng.random() < follows else a for t, a in zip(told, alone, strict=True)]
        refused[:4] = told[0], alone[1], not alone[2], not told[3]
        return {
            "verdicts": ["forbidden" if t else "permitted" for t in told],
            "refused": refused,
            "alone": alone,
        }

    return [Case("47 requests", inputs(47, 0.7)), Case("31 requests", inputs(31, 0.2))]


FOLLOWING = define(
    "11.3",
    reference=_share_following,
    cases=_outcomes_behind,
    mistakes=(
        Mistake(
            "all requests",
            lambda verdicts, refused, alone: (
                sum(r == (v == "forbidden") for v, r in zip(verdicts, refused, strict=True)) / len(refused)
            ),
            "You counted all requests. Where the thought says what the model does anyway, agreement proves nothing: "
            "leave these out.",
        ),
        Mistake(
            "those that agree",
            lambda verdicts, refused, alone: (lambda k: sum(refused[i] == alone[i] for i in k) / max(1, len(k)))(
                [i for i, v in enumerate(verdicts) if (v == "forbidden") == alone[i]]
            ),
            "You kept the requests on which thought and model agree. Keep those on which they part.",
        ),
        Mistake(
            "divided by all",
            lambda verdicts, refused, alone: (
                _share_following(verdicts, refused, alone)
                * sum((v == "forbidden") != a for v, a in zip(verdicts, alone, strict=True))
                / len(alone)
            ),
            "Divide by the number of requests on which thought and model part, not by all.",
        ),
        Mistake(
            "not following",
            lambda verdicts, refused, alone: 1 - _share_following(verdicts, refused, alone),
            "This is the share that does *not* follow the thought.",
        ),
        Mistake(
            "verdicts turned",
            lambda verdicts, refused, alone: _share_following(
                ["permitted" if v == "forbidden" else "forbidden" for v in verdicts], refused, alone
            ),
            'A thought that says "forbidden" asks for a refusal. You took it the other way round.',
        ),
        Mistake(
            "changed replies",
            lambda verdicts, refused, alone: sum(r != a for r, a in zip(refused, alone, strict=True)) / len(refused),
            "A reply that changed has not followed the thought if the thought asked for the opposite.",
        ),
    ),
    hints=(
        "Turn the verdicts into booleans first: does the thought ask for a refusal?",
        "Keep the places where this differs from `alone`. Which share of them has `refused` equal to what the thought "
        "asks for?",
        "`apart = [k for k in range(len(told)) if told[k] != alone[k]]`.",
    ),
)

# --- 11.4 ----------------------------------------------------------------------------------------------------------


def _joined(sentences: Iterable[str]) -> list[str]:
    parts = list(sentences)
    return [" ".join(parts[:k]) for k in range(len(parts) + 1)]


def _prefixes(thought: str) -> list[str]:
    return _joined(sentences(thought))


PREFIXES = define(
    "11.4",
    reference=_prefixes,
    cases=lambda seed: [
        *(
            Case(f"a thought of {len(sentences(text))} sentence{'s' * (len(sentences(text)) > 1)}", {"thought": text})
            for text in ("Is it so? No. They ask for 2 eggs.", *_thoughts(seed + 2, 2))
        ),
        Case("the empty thought", {"thought": ""}),
        Case("a thought that is cut off, with a number in it", {"thought": "Is it 2.5 eggs? No! They ask"}),
    ],
    mistakes=(
        Mistake(
            "unfinished end left out",
            lambda thought: [part for part in _prefixes(thought) if not part or part[-1] in ".?!"],
            "The last beginning is the whole thought, also where its last sentence has no end yet.",
        ),
        Mistake(
            "marks within a word",
            lambda thought: _joined(part.strip() for part in re.split(r"(?<=[.?!])", thought) if part.strip()),
            "`2.5` is not the end of a sentence: a space comes behind the mark that ends one.",
        ),
        Mistake(
            "without the empty one",
            lambda thought: _prefixes(thought)[1:],
            "The first beginning is the empty one: no sentence written yet.",
        ),
        Mistake(
            "the empty thought twice",
            lambda thought: _prefixes(thought) if thought else ["", ""],
            "An empty thought has one beginning, the empty one. Splitting an empty text gives one empty part, too.",
        ),
        Mistake(
            "without the whole",
            lambda thought: _prefixes(thought)[:-1] or [""],
            "The last beginning is the whole thought.",
        ),
        Mistake(
            "sentences apart",
            lambda thought: ["", *sentences(thought)],
            "These are single sentences. Each beginning holds all sentences up to its end.",
        ),
        Mistake(
            "full stops alone",
            lambda thought: _joined(f"{part.strip()}." for part in thought.split(".") if part.strip()),
            "A question ends a sentence, too: look for `.`, `?` and `!`.",
        ),
        Mistake(
            "marks lost",
            lambda thought: [p.rstrip(".?!") for p in _prefixes(thought)],
            "The mark at the end belongs to the sentence. Without it the model would have to write it first.",
        ),
        Mistake(
            "space at the end",
            lambda thought: [f"{p} " if p else p for p in _prefixes(thought)],
            "There is a space at the end. The tokenizer puts the space in front of the next word.",
        ),
    ),
    hints=(
        "`re.split(r'(?<=[.?!]) ', thought)` splits behind the marks and keeps them.",
        "Beginning k holds the first k sentences, joined by a space; k runs from 0.",
        "`[' '.join(parts[:k]) for k in range(len(parts) + 1)]`. Take care of the empty thought.",
    ),
)

# --- 11.5 ----------------------------------------------------------------------------------------------------------


def _decided_at(flags: list[bool]) -> int:
    k = len(flags) - 1
    while k > 0 and flags[k - 1] == flags[-1]:
        k -= 1
    return k


def _courses(seed: int) -> list[Case]:
    rng = random.Random(seed)
    early, late = rng.choice([3, 5]), 2
    flags = [*[False] * early, True, False, True, *[False] * late]
    return [
        Case("a reply that goes to and fro", {"flags": flags}),
        Case("one that never changes", {"flags": [seed % 2 == 0] * rng.randint(3, 5)}),
        Case("one that changes at the end", {"flags": [*[False] * rng.randint(2, 4), True]}),
        Case("one beginning", {"flags": [seed % 2 == 1]}),
    ]


DECIDED = define(
    "11.5",
    reference=_decided_at,
    cases=_courses,
    mistakes=(
        Mistake(
            "the first one that is like the last",
            lambda flags: flags.index(flags[-1]),
            "At this beginning the reply is as at the end for the first time, but it changes again later.",
        ),
        Mistake(
            "the first change",
            lambda flags: next((k for k in range(1, len(flags)) if flags[k] != flags[k - 1]), 0),
            "This is the first change. You want the last one.",
        ),
        Mistake(
            "the last one before it",
            lambda flags: max(0, _decided_at(flags) - 1),
            "There the flag is still another one: the smallest k *from which on* all flags are equal is one later.",
        ),
        Mistake(
            "counted from 1",
            lambda flags: _decided_at(flags) + 1,
            "k counts the sentences put in, so it begins at 0.",
        ),
        Mistake(
            "number of changes",
            lambda flags: sum(a != b for a, b in zip(flags, flags[1:], strict=False)),
            "You counted the changes. You want the place of the last one.",
        ),
        Mistake(
            "how long it stays",
            lambda flags: len(flags) - _decided_at(flags),
            "This is how many flags are equal at the end. You want where they begin.",
        ),
    ),
    hints=(
        "Start at the end, and go back as long as the flag is the same.",
        "`while k > 0 and flags[k - 1] == flags[-1]: k -= 1`.",
    ),
)

# --- 11.6 ----------------------------------------------------------------------------------------------------------

TOKENS, LAYER = 16, 5  # of a thought and of a reply, and where something is added, in the cases


def _steered(m: Model, prompts: list[Prompt], edit: Edit, max_new_tokens: int) -> dict[str, list[str]]:
    own, anew, none = think(m, prompts), think(m, prompts, edit=edit), [""] * len(prompts)
    ways = {"kept": (own, edit), "none": (none, edit), "anew": (anew, edit), "alone": (anew, None)}
    return {
        name: generate(m, behind(m, prompts, texts), edit=applied, max_new_tokens=max_new_tokens)
        for name, (texts, applied) in ways.items()
    }


def _with(**changes: Callable[..., list[str]]) -> Callable[..., dict[str, list[str]]]:
    """A wrong version: the reference with some of its ways replaced."""

    def wrong(m: Model, prompts: list[Prompt], edit: Edit, max_new_tokens: int) -> dict[str, list[str]]:
        ways = _steered(m, prompts, edit, max_new_tokens)
        return ways | {name: change(m, prompts, edit, max_new_tokens) for name, change in changes.items()}

    return wrong


def _reply(thinks: bool, speaks: bool) -> Callable[..., list[str]]:
    """Replies with the edit at work while the model thinks, while it speaks, or both."""

    def replies(m: Model, prompts: list[Prompt], edit: Edit, max_new_tokens: int) -> list[str]:
        texts = think(m, prompts, edit=edit if thinks else None)
        return generate(m, behind(m, prompts, texts), edit=edit if speaks else None, max_new_tokens=max_new_tokens)

    return replies


def _unthinking(m: Model, prompts: list[Prompt], edit: Edit, max_new_tokens: int) -> list[str]:
    return generate(m, behind(m, prompts, [""] * len(prompts)), max_new_tokens=max_new_tokens)


def _on_thinking_model(function: Callable[..., Any], inputs: dict[str, Any]) -> dict[str, Any]:
    """The replies, and whether they keep to their limit, to which `generate` adds that of a thought."""
    made = {**inputs, "edit": addition(inputs["edit"], LAYER), "max_new_tokens": TOKENS}
    m = thinking_model(TOKENS)
    ways = function(m, **made)
    said = [text for way in ways.values() for text in way] if isinstance(ways, dict) else []
    lengths = [len(ids_of(m, text.rpartition(CLOSES)[2])) for text in said if isinstance(text, str)]
    kept = max(lengths, default=0) <= 3 * TOKENS  # they may take 2 of these, and 3.5 where the limit was not passed on
    return {"no reply is longer than max_new_tokens allows": kept, "replies": ways}


def _strong(seed: int) -> Tensor:
    """A vector that changes thoughts as well as replies."""
    return 160 * random_directions(thinking_model(TOKENS).width, 1, seed=1100 + seed)[0]


STEERED = define(
    "11.6",
    reference=_steered,
    observe=_on_thinking_model,
    cases=lambda seed: [
        Case(
            "6 prompts, a strong addition",
            {"prompts": prompts("harmful_train", seed, 2) + prompts("harmless_train", seed, 4), "edit": _strong(seed)},
        ),
    ],
    mistakes=(
        Mistake(
            "anew in one go",
            _with(anew=lambda m, prompts, edit, n: generate(m, prompts, edit=edit, max_new_tokens=n)),
            'Your replies of "anew" hold the thought. Write the thoughts with `think`, and put them in with `behind`.',
        ),
        Mistake(
            "kept without the edit",
            _with(kept=_reply(False, False)),
            '"kept" is the untouched model\'s reply. The thought is its own, but the edit is at work while it speaks.',
        ),
        Mistake(
            "kept written under the edit",
            _with(kept=_reply(True, True)),
            'In "kept" the thought must be the untouched model\'s own, written without the edit.',
        ),
        Mistake(
            "none without the edit",
            _with(none=_unthinking),
            'In "none" the edit has to be at work. Only the thought is left out.',
        ),
        Mistake(
            "none with a thought",
            _with(none=_reply(False, True)),
            '"none" still has a thought. Put an empty one in its place.',
        ),
        Mistake(
            "anew from the untouched model",
            _with(anew=_reply(False, True)),
            'In "anew" the thought is written under the edit: give `edit=edit` to `think`.',
        ),
        Mistake(
            "anew spoken without the edit",
            _with(anew=_reply(True, False)),
            'In "anew" the edit stays at work while the model speaks.',
        ),
        Mistake(
            "alone under the edit",
            _with(alone=_reply(True, True)),
            'In "alone" the edit is taken away after the thought: what is left must come from the text.',
        ),
        Mistake(
            "alone from the untouched model",
            _with(alone=_reply(False, False)),
            'In "alone" the thought is the one that was written under the edit.',
        ),
    ),
    hints=(
        "Two thoughts are needed: `think(m, prompts)` and `think(m, prompts, edit=edit)`.",
        "Each way is `generate(m, behind(m, prompts, thoughts), ...)`. Which thoughts, with the edit or without?",
        "Kept: own thoughts, edit. None: empty texts, edit. Anew: thoughts written under the edit, edit. Alone: the "
        "same thoughts, no edit.",
    ),
)

EXERCISES = (SPLIT, AFTER, FOLLOWING, PREFIXES, DECIDED, STEERED)
