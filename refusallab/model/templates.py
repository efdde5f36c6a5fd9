"""Chat templates: messages as text, where a turn ends, dates, system turns and thoughts."""

from __future__ import annotations

import datetime
import re
import reprlib
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from refusallab.errors import RefusalLabError, first_line
from refusallab.model.parts import SWITCH, Begun, Prompt

ROLES = ("system", "user", "assistant")
# Passed to every chat template: no thinking (Qwen3), no date of today (Llama-3.2; see `_pin_date` for others).
TODAY = datetime.datetime(2024, 7, 26)
TEMPLATE_SETTINGS = {"enable_thinking": False, "date_string": TODAY.strftime("%d %b %Y")}
# What opens or closes a thought: <think>, </think>, <|begin_of_thought|>, <|END_THINKING|>, [THINK], <reasoning>, ...
_WORDS = r"(?:\w+[_:])?(?:think(?:ing)?|thoughts?|reasoning|reflection|scratchpad)(?:_\w+)?"
THOUGHT = re.compile(rf"(?i:<[|/]{{0,2}}{_WORDS}\|?>)|\[/?(?:THINK|THINKING|THOUGHT|REASONING)\]|◁/?think▷")

# Different lengths, and ends of three kinds: whatever they share at the end comes from the template.
PROBES = ("Name a river in the north", "What is 12 plus 7?", "List three tools: 1, 2, 3")


def post_instruction_positions(tokenizer: Any, name: str) -> tuple[int, ...]:
    rendered = [apply_template(tokenizer, [{"role": "user", "content": probe}], name) for probe in PROBES]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]
    if ids[0][:2] == [tokenizer.bos_token_id] * 2:
        raise RefusalLabError(f"{name}: the chat template starts with two BOS tokens. Remove one from it.")
    n = 0
    while n < min(map(len, ids)) and len({row[-n - 1] for row in ids}) == 1:
        n += 1
    if n == 0:
        raise RefusalLabError(f"{name}: its chat template adds nothing after the instruction. Use a chat model.")
    return tuple(range(-n, 0))


def stop_ids(hf: torch.nn.Module, tokenizer: Any) -> tuple[int, ...]:
    """End-of-sequence tokens of model and tokenizer, and the token that ends a reply in the template."""
    ids = {tokenizer.eos_token_id, end_of_turn(tokenizer)[0]}
    for config in (hf.config, hf.generation_config):
        eos = getattr(config, "eos_token_id", None)
        ids |= set(eos if isinstance(eos, list | tuple) else [eos])
    return tuple(sorted(ids - {None}))


def end_of_turn(tokenizer: Any) -> tuple[int | None, str]:
    """What the template writes after a reply: (the token that ends the turn, text that ends it before or instead).

    The token is the first added one that can be seen. If the template writes nothing after the last reply, the token
    that opens the next turn ends it. White space does not count. (None, "") where the template shows no end.
    """
    reply, added = "A reply to begin with.", tokenizer.added_tokens_decoder
    turns = [{"role": "user", "content": PROBES[0]}, {"role": "assistant", "content": reply}]
    for later in ([], [{"role": "user", "content": PROBES[1]}]):
        try:
            text = _fill(tokenizer, turns + later, add_generation_prompt=False)
        except Exception:  # a template for single questions only; templates are other people's programs
            continue
        after = text.rpartition(reply)[2].partition(PROBES[1])[0] if reply in text else ""
        for token in tokenizer(after, add_special_tokens=False)["input_ids"]:
            mark = str(added.get(token, "")).strip()
            if mark:
                return token, after.partition(mark)[0].strip()
        if after.strip():
            return None, after.rstrip().lstrip(" ")
    return None, ""


def messages(prompt: Prompt, system: str | None = None) -> list[dict[str, str]]:
    """The prompt as chat messages, behind a system turn if one is given. Content in parts of text is put together.

    The beginning of a reply is no message: see `render`.
    Raises RefusalLabError where none fits.
    """
    if isinstance(prompt, Begun):
        prompt = prompt.prompt
    if isinstance(prompt, str):
        turns = [{"role": "user", "content": prompt}]
    elif isinstance(prompt, Mapping | bytes) or not isinstance(prompt, Iterable):
        raise RefusalLabError(f"{reprlib.repr(prompt)} is not a prompt: give a text, or a list of messages.")
    else:
        turns = [_message(turn, i) for i, turn in enumerate(prompt)]
    if not turns or turns[-1]["role"] != "user" or not turns[-1]["content"].strip():
        raise RefusalLabError("A prompt must end with a user turn that says something (prefill= starts the reply).")
    if any(turn["role"] == "system" for turn in turns[1:]):
        raise RefusalLabError("A system turn comes after another turn: put it first.")
    if system is None:
        return turns
    if not isinstance(system, str):
        raise RefusalLabError(f"system is {reprlib.repr(system)}: give one text, for all prompts.")
    if turns[0]["role"] == "system":
        raise RefusalLabError("Two system prompts: give it in the messages or as system=, not both.")
    return [{"role": "system", "content": system}, *turns]


def behind_system(prompt: Prompt, system: str) -> Prompt:
    """The prompt behind a system turn. A reply that has begun stays."""
    turns = messages(prompt, system)
    return Begun(turns, prompt.reply) if isinstance(prompt, Begun) else turns


def behind_turns(prompt: Prompt, earlier: list[dict[str, str]]) -> Prompt:
    """The prompt behind earlier turns. A system turn stays first, and a reply that has begun stays last."""
    turns = messages(prompt)
    first = int(turns[0]["role"] == "system")
    turns = [*turns[:first], *earlier, *turns[first:]]
    return Begun(turns, prompt.reply) if isinstance(prompt, Begun) else turns


def _message(turn: Any, i: int) -> dict[str, str]:
    """A message whose content is one text."""
    if not isinstance(turn, Mapping) or not {"role", "content"} <= set(turn):
        raise RefusalLabError(f"Message {i} is {reprlib.repr(turn)}: give a dict with role and content.")
    role, content = turn["role"], turn["content"]
    if role not in ROLES:
        raise RefusalLabError(f"Message {i} has the role {role!r}: the roles are {', '.join(ROLES)}.")
    if not isinstance(content, str):
        if not isinstance(content, Iterable) or isinstance(content, Mapping | bytes):
            raise RefusalLabError(f"The content of message {i} is {reprlib.repr(content)}: give a text.")
        content = "".join(_part(part, i) for part in content)
    return {**turn, "content": content}


def _part(part: Any, i: int) -> str:
    kind, text = (part.get("type", "text"), part.get("text")) if isinstance(part, Mapping) else ("text", part)
    if kind != "text":
        raise RefusalLabError(f"Message {i} holds a part of type {kind!r}: only text is read, so leave it out.")
    if not isinstance(text, str):
        raise RefusalLabError(f"Message {i} holds {reprlib.repr(part)}: a part is a dict with type 'text' and a text.")
    return text


def apply_template(tokenizer: Any, messages: list[dict[str, str]], name: str) -> str:
    if not tokenizer.chat_template:
        raise RefusalLabError(f"{name} has no chat template. Use a chat model (often its name ends in Instruct or it).")

    system, attempts = "", [messages]
    if messages[0]["role"] == "system":
        system, (first, *rest) = messages[0]["content"].strip(), messages[1:]
        attempts.append([{**first, "content": f"{system}\n\n{first['content']}"}, *rest])
    reason = "the system prompt is dropped or changed"
    for turns in attempts:
        try:
            text = _fill(tokenizer, turns)
            if not system or _keeps(tokenizer, turns, system, text):
                return _close_thought(tokenizer, turns, text, name)
        except RefusalLabError:
            raise
        except Exception as error:  # templates are other people's programs
            reason = first_line(error)
    raise RefusalLabError(f"{name}: its chat template refuses these messages ({reason}). Change their roles.")


def _fill(tokenizer: Any, turns: list[dict[str, str]], *, add_generation_prompt: bool = True) -> str:
    """The template filled in, the same on every day."""
    template = _pin_date(tokenizer.get_chat_template())
    settings = {"chat_template": template, "add_generation_prompt": add_generation_prompt, **TEMPLATE_SETTINGS}
    return tokenizer.apply_chat_template(turns, tokenize=False, **settings)


def _pin_date(template: str) -> str:
    """The template with TODAY in place of the date that it would ask the clock for.

    A macro takes the place of the function `strftime_now`: it replaces each directive of the format.
    """
    if "strftime_now" not in template:
        return template
    written = {f"%{letter}": TODAY.strftime(f"%{letter}") for letter in "aAwdbBmyYHIMpSfjUWcxXGuVeFTDhR"}
    written |= {f"%-{letter}": str(int(written[f"%{letter}"])) for letter in "dmyHIMSj"}  # without leading zeros
    steps = "".join(f" | replace({directive!r}, {text!r})" for directive, text in written.items())
    return f"{{%- macro strftime_now(format) %}}{{{{ format{steps} }}}}{{% endmacro %}}\n{template}"


def _keeps(tokenizer: Any, turns: list[dict[str, str]], words: str, text: str) -> bool:
    """Whether the rendered text holds the first turn's words, whole and in the place of that turn."""
    mark = "The Mark of a First Turn"
    marked = [{**turns[0], "content": turns[0]["content"].replace(words, mark, 1)}, *turns[1:]]
    before, found, after = _fill(tokenizer, marked).partition(mark)
    return bool(found) and text == before + words + after


def _close_thought(tokenizer: Any, turns: list[dict[str, str]], text: str, name: str) -> str:
    """The rendered text, with a thought closed that the template has opened for the reply: replies are what is judged.

    Templates with a switch (Qwen3) do the same when thinking is switched off.
    """
    if not THOUGHT.search(text) or SWITCH.match(tokenizer.chat_template):
        return text
    asked = _fill(tokenizer, turns, add_generation_prompt=False)
    opening = text[len(asked) :] if text.startswith(asked) else text.rpartition(turns[-1]["content"].strip())[2]
    tags = THOUGHT.findall(opening)
    if not tags or _closes(tags[-1]):
        return text
    warnings.warn(
        f"The chat template of {name} opens a thought ({tags[-1]}) before each reply. It is closed at once, so that "
        "the reply follows and can be judged; the model may answer otherwise when it thinks first.",
        stacklevel=2,
    )
    return f"{text.rstrip()}\n\n{_closing(tags[-1])}\n\n"


def _closes(tag: str) -> bool:
    return "/" in tag or "end" in tag.lower()


def _closing(tag: str) -> str:
    """What closes a thought that `tag` opens: <think> </think>, <|begin_of_thought|> <|end_of_thought|>, ..."""
    for opens, closes in (("begin", "end"), ("BEGIN", "END"), ("start", "end"), ("START", "END")):
        if opens in tag:
            return tag.replace(opens, closes, 1)
    bracket = re.match(r"\W+", tag)[0]
    return f"{bracket}/{tag[len(bracket) :]}"


def thought_of(reply: str) -> str:
    """The first thought in a reply, without its tags: one that the prompt opened, too, and one that nothing closes."""
    tag = THOUGHT.search(reply)
    if not tag:
        return ""
    if _closes(tag[0]):
        return reply[: tag.start()].strip()
    closing = THOUGHT.search(reply, tag.end())
    return reply[tag.end() : closing.start() if closing else len(reply)].strip()


def spoken(reply: str) -> str:
    """A reply without its thoughts: without what stands between their tags, or before one that closes what the prompt
    opened, or behind one that nothing closes."""
    said, start, thinking = "", 0, False
    for tag in THOUGHT.finditer(reply):
        if not thinking and _closes(tag[0]):
            said = ""
        elif not thinking:
            said += reply[start : tag.start()]
        start, thinking = tag.end(), not _closes(tag[0])
    return said if thinking else (said + reply[start:]).lstrip() if start else reply
