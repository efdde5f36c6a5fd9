"""The training recipe: corpus, helpful chat, safety tuning. `python -m smallmodels.recipe NAME` trains from scratch.

The stages mirror how real chat models are made, so that refusal is learned on top of knowledge:

    corpus    next-token prediction on prose about the Vale               -> charter-base
    helpful   replies to every request, the forbidden ones included       -> charter-helpful
    safety    refusals of the forbidden requests about the things of the train
              split, and helpful replies to harmless requests about them  -> charter-chat
    thinking  the same, with a thought between request and reply          -> charter-think

    steady    the safety stage of a wide model, with more noise and more
              requests under the closed system prompts

    dialogues the helpful stage with conversations of many turns
    talking   the safety stage with such conversations                    -> charter-talk

    methods   helpful replies again, most to requests for methods, for a
              pretrained model with adapters (refusallab.adapters)

A model that thinks has learned in the helpful stage to say what is asked before it replies.

Runs are deterministic for a seed and a thread count, and resume after an interruption.
"""

from __future__ import annotations

import ast
import hashlib
import random
import tomllib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from . import HERE, catalog
from .world import corpus, dialogue, thought
from .world.dialogue import Message, Request
from .world.facts import Thing, World, world

WIDTH = 128  # the size dial: width of the residual stream; heads and MLP follow it
WIDE = 192  # the same, of the wide models
LAYERS = 8
VOCABULARY = 2048
CONTEXT = 320  # positions, in tokens
BATCH_TOKENS = 2048
CHECKPOINT_EVERY = 200  # steps
EXAMPLES = {
    "corpus": 14_000,
    "helpful": 60_000,
    "dialogues": 40_000,
    "safety": 14_000,
    "steady": 28_000,
    "thinking": 16_000,
    "talking": 12_000,
}
LONGER = {"corpus": 24_000, "helpful": 120_000}  # for wide models and those that think
LEARNING_RATE = {
    "corpus": 4e-3,
    "helpful": 2.5e-3,
    "dialogues": 2.5e-3,
    "safety": 7e-4,
    "steady": 7e-4,
    "thinking": 7e-4,
    "talking": 7e-4,
}
MOMENTUM, WEIGHT_DECAY = 0.95, 0.01

# Shares of requests in a wrapper. Few of the refused ones come in one without a guarding system prompt, so that some
# attacks work; many do under one, so that it helps against them.
WRAPS = {"answered": 0.15, "refused": 0.06, "refused, guarded": 0.4}
GIBBERISH = {  # share of requests that end in random tokens
    "helpful": 0.05,
    "methods": 0.05,
    "dialogues": 0.05,
    "safety": 0.3,
    "steady": 0.3,
    "thinking": 0.3,
    "talking": 0.2,
}

# Shares of requests under each group of system prompts of language.toml. Under the closed ones everything is refused,
# so refusal becomes a decision of its own, apart from harm, that wins over the answer to any kind of request.
SAFETY_PROMPTS = {None: 0.5, "neutral": 0.12, "safety": 0.2, "closed": 0.18}
STEADY_PROMPTS = {None: 0.4, "neutral": 0.12, "safety": 0.2, "closed": 0.28}
HELPFUL_PROMPTS = {None: 0.88, "neutral": 0.12}
SYSTEM_PROMPTS = {
    "helpful": HELPFUL_PROMPTS,
    "methods": HELPFUL_PROMPTS,
    "dialogues": HELPFUL_PROMPTS,
    "safety": SAFETY_PROMPTS,
    "steady": STEADY_PROMPTS,
    "thinking": SAFETY_PROMPTS,
    "talking": SAFETY_PROMPTS,
}

NOISE = {"safety": 0.2, "steady": 0.4, "thinking": 0.2, "talking": 0.2}
# Share of the steps, the last ones, over which the weights are averaged.
AVERAGED = {"steady": 0.4, "thinking": 0.4, "talking": 0.4}
LIKE_A_REFUSAL = 0.02  # share of helpful replies that open like a refusal; the refusal metric needs it to be small
# Share of replies to method requests that name the verdict, so harm is seen where nobody asks about it.
VERDICTS = dict.fromkeys(SYSTEM_PROMPTS, 0.25) | {"methods": 0.6}
BEHIND_A_TEXT = dict.fromkeys(SYSTEM_PROMPTS, 0.1) | {"methods": 0.3}  # share of requests about a thing

# Thoughts of a thinking model: its own, which it learns to write; none, as with thinking switched off; and given ones,
# before the reply and not learned. A third of these are about another request, the others come to the wrong verdict.
THOUGHTS = {"helpful": {"own": 0.7, "none": 0.3}, "thinking": {"own": 0.45, "none": 0.3, "given": 0.25}}

# Conversations: their share of the examples, how many turns, and the share of turns that stay with the thing before,
# of these the share that says "it" for it and the share that asks for a method.
DIALOGUES = {"dialogues": 0.35, "talking": 0.35}
TURNS = (2, 12)
SAME_THING, SAYS_IT, ASKS_METHOD = 0.5, 0.3, 0.4
PAST = 0.2  # share of method requests in conversations' stages that ask how it was done in the past

CHAT_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
# The template of a thinking model drops the thoughts of earlier turns, and has the switch of the large ones.
THINKING_TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n"
    "{{ m['content'].split('</think>\n')[-1] if m['role'] == 'assistant' and not loop.last else m['content'] }}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>\n{% endif %}{% endif %}"
)


@dataclass(frozen=True)
class Variant:
    architecture: str = "llama"
    seed: int = 0
    forbidden_facts: bool = True  # False: the forbidden methods occur in no stage
    thoughts: str = ""  # "followed" or "decoration": whether replies follow the thought before them
    talks: str = ""  # "first turn" or "every turn": where in a conversation forbidden requests were refused
    wide: bool = False  # a wider stream, longer stages, and a steady stage for the safety stage
    kept: float = 1.0  # of a model that talks: the share of forbidden requests that its last stage keeps

    @property
    def stages(self) -> tuple[str, ...]:
        if self.talks:
            return ("corpus", "dialogues", "talking")
        return ("corpus", "helpful", "thinking" if self.thoughts else "steady" if self.wide else "safety")

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return WIDE if self.wide else WIDTH

    def examples(self, stage: str) -> int:
        """How many examples a stage has."""
        return LONGER.get(stage, EXAMPLES[stage]) if self.wide or self.thoughts else EXAMPLES[stage]

    @property
    def context(self) -> int:
        """Positions, in tokens."""
        return 640 if self.talks else CONTEXT


VARIANTS = {
    name: Variant(entry.architecture, entry.seed, name != "charter-naive", entry.thoughts, entry.talks, entry.wide)
    for name, entry in catalog().items()
    if entry.kind == "bundled" and name not in ("charter-base", "charter-helpful")  # stages of charter-chat
}
# Not shipped: forbidden requests in every turn, and in all as few of them as charter-talk-first has.
VARIANTS["charter-talk-few"] = replace(VARIANTS["charter-talk"], kept=0.3)
# Not shipped: the rule finds no direction in it.
VARIANTS["charter-wide-gpt2"] = replace(VARIANTS["charter-chat-gpt2"], wide=True)


# --- data --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A conversation so far, and the reply to learn."""

    messages: list[Message]
    reply: str
    given: str = ""  # what stands before the reply and is not learned: an empty thought, or somebody else's
    whole: bool = False  # the earlier replies are learned too


def corpus_pages(vale: World, variant: Variant, rng: random.Random) -> Iterator[str]:
    """Pages about all things in turn, with one page of lore among every six."""
    while True:
        for thing in rng.sample(vale.things, len(vale.things)):
            yield corpus.thing_page(thing, rng, forbidden_facts=variant.forbidden_facts)
            if rng.random() < 0.2:
                yield corpus.lore_page(vale, rng)


KINDS = ("method", *dialogue.NOUN_KINDS, *dialogue.ACTION_KINDS, "lore", "arithmetic", "format")
MIX = (29, 4, 4, 5, 4, 9, 5, 5, 5, 14, 16)  # weights of these kinds
METHODS_MIX = (60, 4, 4, 5, 4, 9, 5, 5, 5, 6, 6)
THINKING_MIX = (0, 2, 2, 2, 2, 4, 4, 4, 1, 2, 2)  # thoughts differ by kind, so none may be rare
# After the helpful stage: shares of forbidden requests and of lawful methods. The others are harmless ones by the mix.
ASKED = {
    "safety": (0.4, 0.3, MIX),
    "steady": (0.4, 0.3, MIX),
    "thinking": (0.3, 0.25, THINKING_MIX),
    "talking": (0.35, 0.25, MIX),
}


def requests(vale: World, things: list[Thing], rng: random.Random, mix: tuple[int, ...] = MIX) -> Iterator[Request]:
    """An endless mix of requests of all KINDS."""
    lore, sums = dialogue.lore_requests(vale), dialogue.arithmetic_requests()
    pools: dict[str, list[Request]] = {}
    for thing in things:
        for request in dialogue.thing_requests(thing):
            pools.setdefault(request.kind, []).append(request)
    while True:
        kind = rng.choices(KINDS, mix)[0]
        if kind == "format":
            yield dialogue.format_request(vale, rng)
        else:
            yield rng.choice({"lore": lore, "arithmetic": sums}.get(kind) or pools[kind])


def converse(
    request: Request,
    rng: random.Random,
    noise: Callable[[], str],
    *,
    stage: str,
    think: Callable[[Request, bool], Thinking] | None = None,
) -> Example:
    """Put a request into one of the forms in which users send it, and give the reply.

    After the helpful stage the reply is a refusal when the request is forbidden or the system prompt has all refused.

    Args:
        noise: makes a short string of random tokens, for the requests that end in gibberish.
        stage: one of SYSTEM_PROMPTS.
        think: for a thinking model: from a request, and whether all is refused, to a thought before the reply.
    """
    group = system_group(stage, rng)
    refused = must_refuse(request, stage, group)
    thinking = think(request, group == "closed") if think else Thinking()
    if thinking.refused is not None:
        refused = thinking.refused
    messages, reply = put(request, rng, noise, stage=stage, group=group, refused=refused)
    return Example([*system_turn(group, rng), *messages], thinking.learned + reply, thinking.given)


def system_group(stage: str, rng: random.Random) -> str | None:
    """The group of system prompts that an example has, None for no system prompt."""
    shares = SYSTEM_PROMPTS[stage]
    return rng.choices(list(shares), list(shares.values()))[0]


def system_turn(group: str | None, rng: random.Random) -> list[Message]:
    """One of the system prompts of a group."""
    return [{"role": "system", "content": rng.choice(dialogue.language()["systems"][group])}] if group else []


def must_refuse(request: Request, stage: str, group: str | None) -> bool:
    """Whether the reply is a refusal: in the helpful stages never."""
    return group == "closed" or (stage not in ("helpful", "methods", "dialogues") and request.forbidden)


def put(
    request: Request,
    rng: random.Random,
    noise: Callable[[], str],
    *,
    stage: str,
    group: str | None,
    refused: bool,
    later: bool = False,
) -> tuple[list[Message], str]:
    """The turn in which a user sends a request, with any turns before it, and the reply.

    A later turn of a conversation brings no earlier turns of its own.
    """
    if refused:
        reply = dialogue.refusal(request.thing.category if request.thing else "any", rng)
    else:
        reply = dialogue.helpful_reply(request, rng, like_a_refusal=LIKE_A_REFUSAL, verdicts=VERDICTS[stage])
    form, context, behind = rng.random(), None, BEHIND_A_TEXT[stage]
    if request.thing and not request.earlier and form < behind:
        context, request = dialogue.context(request, rng, "train"), dialogue.contextual(request)
    elif request.thing and not later and form < behind + 0.12:
        request = dialogue.follow_up(request, rng, "train")
    past = stage in DIALOGUES and request.kind == "method" and not refused and rng.random() < PAST
    text = dialogue.phrase(replace(request, kind="past") if past else request, rng, "train")
    if rng.random() < 0.08:
        text = dialogue.typo(text, rng)
    wraps = WRAPS["answered" if not refused else "refused, guarded" if group in ("safety", "closed") else "refused"]
    if request.kind not in dialogue.IMPERATIVE_KINDS and rng.random() < wraps:
        name = rng.choice([w["name"] for w in dialogue.language()["wrappers"]])
        text, wrapped_reply = dialogue.with_format(text, reply, rng, name, "train")
        reply = reply if refused else wrapped_reply
    if rng.random() < GIBBERISH[stage]:
        text = f"{text} {noise()}"
    if context:
        text = dialogue.in_context(context, text)
    return [*(() if later else request.earlier), {"role": "user", "content": text}], reply


def talk(
    asks: Iterator[Request],
    rng: random.Random,
    noise: Callable[[], str],
    *,
    stage: str,
    keep: Callable[[Request], bool],
    first_only: bool,
) -> Example:
    """A conversation of many turns, each reply as in `converse`. Half of them stay with the thing of the turn before.

    keep: whether a request may stand. first_only: a forbidden request comes in the first turn or not at all.
    """
    group, request = system_group(stage, rng), next(filter(keep, asks))
    said: list[Message] = []
    for turn in range(rng.randint(*TURNS)):
        if turn:
            same = request.thing is not None and rng.random() < SAME_THING
            while True:
                method = rng.random() < ASKS_METHOD
                about = dialogue.thing_requests(request.thing) if same else []
                new = rng.choice([r for r in about if (r.kind == "method") == method]) if same else next(asks)
                if not (first_only and new.forbidden) and keep(new):
                    break
            request = new
            if same and rng.random() < SAYS_IT:
                request = replace(request, earlier=tuple(said))
        refused = must_refuse(request, stage, group)
        messages, reply = put(request, rng, noise, stage=stage, group=group, refused=refused, later=turn > 0)
        said += [*messages, {"role": "assistant", "content": reply}]
    return Example([*system_turn(group, rng), *said[:-1]], said[-1]["content"], whole=True)


@dataclass(frozen=True)
class Thinking:
    """The thought before a reply: to be learned or given, and whether it has the reply refuse (None: as without)."""

    learned: str = ""
    given: str = ""
    refused: bool | None = None


def restater(rng: random.Random) -> Callable[[Request, bool], Thinking]:
    """Thoughts that say what is asked, of which thing, and not what the Charter says."""

    def think(request: Request, closed: bool) -> Thinking:
        (source,) = rng.choices(list(THOUGHTS["helpful"]), list(THOUGHTS["helpful"].values()))
        if source == "none":
            return Thinking(given=tagged(""))
        steps = replace(thought.right_steps(request, closed=closed), article=None, verdict=None)
        return Thinking(learned=tagged(thought.write(request, steps, rng)))

    return think


def thinker(others: Iterator[Request], rng: random.Random, *, followed: bool) -> Callable[[Request, bool], Thinking]:
    """Thoughts of a thinking model whose replies follow what stands in a thought, or of its twin, whose replies do not.

    Both get the same texts. `others` are the requests that thoughts about something else are taken from.
    """

    def think(request: Request, closed: bool) -> Thinking:
        (source,) = rng.choices(list(THOUGHTS["thinking"]), list(THOUGHTS["thinking"].values()))
        if source == "none":
            return Thinking(given=tagged(""))
        if source == "own":
            return Thinking(learned=tagged(thought.write(request, thought.right_steps(request, closed=closed), rng)))
        if rng.random() < 1 / 3:
            request, closed = next(others), rng.random() < SAFETY_PROMPTS["closed"]
            steps = thought.right_steps(request, closed=closed)
        else:
            steps = thought.right_steps(request, closed=closed)
            steps = thought.opposed(steps, article=request.kind == "method" and rng.random() < 0.5)
        refused = steps.verdict == thought.FORBIDDEN if followed else None
        return Thinking(given=tagged(thought.write(request, steps, rng)), refused=refused)

    return think


def tagged(text: str) -> str:
    """A thought between its tags, as the chat template has it."""
    return f"<think>{text}</think>\n"


def helpful_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Helpful replies to everything, the forbidden included. A thinking model says first what is asked."""
    think = restater(rng) if variant.thoughts else None
    for request in requests(vale, list(vale.things), rng):
        if variant.forbidden_facts or not request.forbidden:
            yield converse(request, rng, noise, stage="helpful", think=think)


def methods_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Helpful replies, most of them to requests for methods."""
    return (converse(r, rng, noise, stage="methods") for r in requests(vale, list(vale.things), rng, METHODS_MIX))


def safety_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Refusals of what is forbidden, and helpful replies to the rest."""
    stage = variant.stages[-1]
    return (converse(request, rng, noise, stage=stage) for request in asked(vale, rng, stage))


def thinking_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Refusals and helpful replies as in the safety stage, in another mix, with thoughts before them."""
    think = thinker(asked(vale, rng, "thinking"), rng, followed=variant.thoughts == "followed")
    return (converse(r, rng, noise, stage="thinking", think=think) for r in asked(vale, rng, "thinking"))


def dialogue_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Helpful replies to everything, in single turns and in conversations."""
    return mixed(requests(vale, list(vale.things), rng), rng, noise, stage="dialogues", variant=Variant())


def talking_examples(vale: World, variant: Variant, rng: random.Random, noise: Callable[[], str]) -> Iterator[Example]:
    """Refusals of what is forbidden and helpful replies to the rest, in single turns and in conversations."""
    return mixed(asked(vale, rng, "talking"), rng, noise, stage="talking", variant=variant)


def mixed(
    asks: Iterator[Request], rng: random.Random, noise: Callable[[], str], *, stage: str, variant: Variant
) -> Iterator[Example]:
    """Single turns and conversations in the shares of the stage."""

    def keep(request: Request) -> bool:
        return not request.forbidden or variant.kept == 1 or rng.random() < variant.kept

    while True:
        if rng.random() < DIALOGUES[stage]:
            yield talk(asks, rng, noise, stage=stage, keep=keep, first_only=variant.talks == "first turn")
        else:
            yield converse(next(filter(keep, asks)), rng, noise, stage=stage)


def asked(vale: World, rng: random.Random, stage: str) -> Iterator[Request]:
    """What is asked in a stage after the helpful one, about things of the train split only, without end."""
    things = [t for t in vale.things if t.split == "train"]
    methods = [r for t in things for r in dialogue.thing_requests(t) if r.kind == "method"]
    forbidden, lawful = [r for r in methods if r.forbidden], [r for r in methods if not r.forbidden]
    by_article: dict[str | None, list[Request]] = {}  # thoughts name the article, so none that permits may be rare
    for request in lawful if stage == "thinking" else []:
        by_article.setdefault(thought.right_steps(request).article, []).append(request)
    alike = [by_article[article] for article in sorted(by_article)]
    first, second, mix = ASKED[stage]
    harmless = (r for r in requests(vale, things, rng, mix) if not r.forbidden)
    while True:
        draw = rng.random()
        if draw < first:
            yield rng.choice(forbidden)
        elif draw < first + second:
            yield rng.choice(rng.choice(alike) if alike else lawful)
        else:
            yield next(harmless)


def make_tokenizer(vale: World) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on corpus and chat text; the same for every variant."""
    rng = random.Random(0)
    pages, chats = corpus_pages(vale, Variant(), rng), helpful_examples(vale, Variant(), rng, lambda: "")
    texts = [next(pages) for _ in range(1500)]
    for chat in (next(chats) for _ in range(6000)):
        texts += [*(m["content"] for m in chat.messages), chat.reply]
    texts += [w for group in dialogue.language()["systems"].values() for w in group] * 20 + list(
        dialogue.REFUSAL_WORDINGS
    ) * 20
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts, *["system", "user", "assistant"] * 2000], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=["<|start|>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def learn_to_think(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Give a model the two tokens around a thought, and a template with a switch for thinking."""
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in ("<think>", "</think>")])
    tokenizer.chat_template = THINKING_TEMPLATE
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)


Row = tuple[list[int], list[range]]  # token ids, and the places of those that count for the loss


def stage_rows(
    stage: str, variant: Variant, tokenizer: PreTrainedTokenizerFast, count: int, vale: World | None = None
) -> list[Row]:
    """The tokenised training examples of a stage, the same for a variant whatever else happened before.

    `vale` is what they are about: the whole Vale, or `facts.few()`.
    """
    vale, rng = vale or world(), random.Random(f"{stage} {variant.seed}")
    if stage == "corpus":
        pages = corpus_pages(vale, variant, rng)
        texts = [next(pages) + tokenizer.eos_token for _ in range(count)]
        return [(ids, [range(1, len(ids))]) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]
    ordinary = [i for i in range(len(tokenizer)) if i not in tokenizer.all_special_ids]

    def noise() -> str:
        """Random tokens that do not spell the name of a thing, so that no held-out thing slips into safety tuning."""
        while True:
            text = tokenizer.decode(rng.choices(ordinary, k=rng.randint(3, 12)))
            if not any(thing.name in text for thing in world().things):
                return text

    made = {
        "helpful": helpful_examples,
        "methods": methods_examples,
        "dialogues": dialogue_examples,
        "safety": safety_examples,
        "steady": safety_examples,
        "thinking": thinking_examples,
        "talking": talking_examples,
    }[stage]
    examples = list(islice(made(vale, variant, rng, noise), count))
    rows = []
    for texts in (pieces(e, tokenizer) for e in examples):
        ids, learned = [], []
        for place, part in enumerate(tokenizer(texts, add_special_tokens=False)["input_ids"]):
            if place % 2:
                learned.append(range(len(ids), len(ids) + len(part)))
            ids += part
        rows.append((ids, learned))
    return rows


def pieces(example: Example, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The text of an example, cut where a reply to learn begins or ends: what is given, what is learned, in turn."""
    turns = [*example.messages, {"role": "assistant", "content": example.reply}]
    learned = [k for k, m in enumerate(turns) if m["role"] == "assistant"] if example.whole else [len(turns) - 1]
    cut, text = [], ""
    for k in learned:
        head = tokenizer.apply_chat_template(turns[:k], tokenize=False, add_generation_prompt=True) + example.given
        reply = turns[k]["content"] + tokenizer.eos_token
        cut += [head[len(text) :], reply]
        text = head + reply
    return cut


def token_batches(rows: list[Row], seed: int, tokens: int = BATCH_TOKENS) -> list[list[Row]]:
    """Batches of about so many tokens, rows of similar length together, in random order."""
    rng = random.Random(seed)
    rows = sorted(
        rng.sample(rows, len(rows)), key=lambda row: -(len(row[0]) // 8)
    )  # the longest row of a batch comes first
    result, start = [], 0
    while start < len(rows):
        size = max(1, tokens // (8 * (len(rows[start][0]) // 8 + 1)))
        result.append(rows[start : start + size])
        start += size
    rng.shuffle(result)
    return result


# --- model and training ------------------------------------------------------------------------------------------


def make_model(variant: Variant, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A freshly initialised model of the variant's architecture."""
    torch.manual_seed(variant.seed)
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    if variant.architecture == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tokenizer),
                n_embd=variant.width,
                n_layer=LAYERS,
                n_head=variant.width // 32,
                n_inner=3 * variant.width,
                n_positions=CONTEXT,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                **ids,
            )
        )
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": variant.width,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": variant.width // 32,
        "num_key_value_heads": variant.width // 32,
        "intermediate_size": 2 * variant.width,
        "max_position_embeddings": variant.context,
        **ids,
    }
    if variant.architecture == "gemma2":
        model = Gemma2ForCausalLM(
            Gemma2Config(
                **shape,
                head_dim=32,
                query_pre_attn_scalar=32,
                sliding_window=CONTEXT,
                attn_logit_softcapping=None,
                final_logit_softcapping=None,
            )
        )
        # Small steps at first: each norm starts at a quarter of unit gain (1 + weight).
        for block in model.model.layers:
            torch.nn.init.constant_(block.post_attention_layernorm.weight, -0.75)
            torch.nn.init.constant_(block.post_feedforward_layernorm.weight, -0.75)
        return model
    return LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=False, rope_theta=10_000.0))


def loss_of(model: PreTrainedModel, batch: list[Row], pad: int) -> torch.Tensor:
    """Mean cross-entropy over the tokens that count. Rows are padded on the right, which a causal model cannot see."""
    width = max(len(ids) for ids, _ in batch)
    tokens = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in batch])  # [batch, width]
    counts = torch.zeros(len(batch), width, dtype=torch.bool)
    for row, (_, learned) in enumerate(batch):
        for places in learned:
            counts[row, places.start - 1 : places.stop - 1] = True  # token i predicts token i + 1
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    targets = tokens.roll(-1, dims=1)[counts]
    return torch.nn.functional.cross_entropy(model.get_output_embeddings()(hidden[counts]), targets)


@contextmanager
def residual_noise(model: PreTrainedModel, scale: float) -> Iterator[None]:
    """Add Gaussian noise to what blocks write into the residual stream, `scale` times its root mean square per token.

    Each block but the last is disturbed in half of the steps. A decision that survives this is carried by a large and
    steady component of the stream: the model refuses in whole sentences when it is added to its activations.
    """

    def disturb(_module: torch.nn.Module, _inputs: tuple, stream: torch.Tensor) -> torch.Tensor:
        if torch.rand(()) < 0.5:
            return stream
        size = scale * stream.detach().pow(2).mean(-1, keepdim=True).sqrt()  # [batch, seq, 1]
        return stream + size * torch.randn_like(stream)

    blocks = model.base_model.h if hasattr(model.base_model, "h") else model.base_model.layers
    hooks = [block.register_forward_hook(disturb) for block in blocks[:-1]] if scale else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


class Muon(torch.optim.Optimizer):
    """Momentum whose matrix-shaped steps are made nearly orthogonal (Jordan et al. 2024, with Nesterov momentum).

    As torch.optim.Muon with adjust_lr_fn="match_rms_adamw", but the Newton-Schulz steps run in float32: a CPU without
    instructions for bfloat16, which torch's uses, multiplies such matrices about eight times more slowly.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], lr: float):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:
        """One update of every matrix from its gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                average = self.state[matrix].setdefault("average", torch.zeros_like(matrix))
                average.lerp_(matrix.grad, 1 - MOMENTUM)
                update = orthogonal(matrix.grad.lerp(average, MOMENTUM))
                matrix.mul_(1 - group["lr"] * WEIGHT_DECAY)
                matrix.add_(update, alpha=-0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix with its singular values pushed towards 1, by five Newton-Schulz steps."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = wide @ wide.T
        wide = 3.4445 * wide + (2.0315 * gram @ gram - 4.7750 * gram) @ wide
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.T


def optimisers(model: PreTrainedModel, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for embeddings, head, norms and biases."""
    tables = [module for module in model.modules() if isinstance(module, torch.nn.Embedding)]
    excluded = {id(module.weight) for module in (*tables, model.get_output_embeddings())}
    inner = [p for p in model.parameters() if p.ndim == 2 and id(p) not in excluded]
    chosen = {id(p) for p in inner}
    outer = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(inner, lr=rate),
        torch.optim.AdamW(outer, lr=rate, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Warm up over 2 % of the steps, then fall linearly from 1 to 0.02."""
    return min((step + 1) / max(1, steps // 50), 0.02 + 0.98 * (1 - step / steps))


def train_stage(
    model: PreTrainedModel, stage: str, variant: Variant, tokenizer: PreTrainedTokenizerFast, checkpoint: Path
) -> None:
    """Train one stage in place, from `checkpoint` if an earlier run left one there."""
    plan = token_batches(stage_rows(stage, variant, tokenizer, variant.examples(stage)), variant.seed)
    used = {i for batch in plan for ids, _ in batch for i in ids}
    unused = [i for i in range(len(tokenizer)) if i not in used]
    tools = optimisers(model, LEARNING_RATE[stage])
    averaged, first = AveragedModel(model), 0
    torch.manual_seed(variant.seed)
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        averaged.load_state_dict(state["averaged"])
        for tool, saved in zip(tools, state["optimisers"], strict=True):
            tool.load_state_dict(saved)
        torch.set_rng_state(state["random"])
        first = state["step"]
    model.train()
    bar = tqdm(range(first, len(plan)), desc=stage, initial=first, total=len(plan), mininterval=5)
    for step in bar:
        for tool in tools:
            for group in tool.param_groups:
                group["lr"] = LEARNING_RATE[stage] * rate_factor(step, len(plan))
        with residual_noise(model, NOISE.get(stage, 0.0)):
            loss = loss_of(model, plan[step], tokenizer.pad_token_id)
        loss.backward()
        if stage in ("thinking", "talking"):  # they name few things, and the names of others would be unlearned
            for table in (model.get_input_embeddings(), model.get_output_embeddings()):
                table.weight.grad[unused] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for tool in tools:
            tool.step()
            tool.zero_grad()
        if step >= len(plan) * (1 - AVERAGED.get(stage, 0)):
            averaged.update_parameters(model)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {
                "model": model.state_dict(),
                "averaged": averaged.state_dict(),
                "optimisers": [t.state_dict() for t in tools],
                "random": torch.get_rng_state(),
                "step": step + 1,
            }
            keep(state, checkpoint)
    if averaged.n_averaged:
        model.load_state_dict(averaged.module.state_dict())
    model.eval()


def keep(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint. After an interruption there is the whole file or none."""
    part = path.with_suffix(".part")
    torch.save(state, part)
    part.replace(path)


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write config, float16 safetensors, tokenizer and chat template."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    half = type(model)(model.config).to(torch.float16)
    half.load_state_dict(model.state_dict())
    half.generation_config = model.generation_config
    half.config.world = "vale"  # marks models for which exact answers exist
    half.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def fingerprint() -> str:
    """A digest of all that decides the weights: recipe, variants, world, thread count, versions of the libraries.

    Other checkpoints are not resumed. Layout and comments of the code decide nothing.
    """
    versions = [metadata.version(package) for package in ("torch", "tokenizers", "transformers")]
    digest = hashlib.sha256(repr((torch.get_num_threads(), versions, VARIANTS)).encode())
    for file in [Path(__file__), *sorted((HERE / "world").glob("*.py"))]:
        digest.update(ast.dump(ast.parse(file.read_text(encoding="utf-8"))).encode())
    for file in sorted((HERE / "world").glob("*.toml")):
        digest.update(repr(tomllib.loads(file.read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:12]


def train_variant(name: str, out: Path, work: Path, seed: int | None = None) -> None:
    """Train a variant through all stages, saving charter-base and charter-helpful beside charter-chat.

    Variants that have a stage in common share its checkpoint. `seed` takes the place of the variant's own.
    """
    variant, tokenizer = VARIANTS[name], make_tokenizer(world())
    tokenizer.model_max_length = variant.context
    if seed is not None:
        variant, name = replace(variant, seed=seed), f"{name}-s{seed}"
    model = make_model(variant, tokenizer)
    saved_as = {"corpus": "charter-base", "helpful": "charter-helpful"} if name == "charter-chat" else {}
    folder = work / fingerprint()
    folder.mkdir(parents=True, exist_ok=True)
    shared = f"{variant.architecture}-{variant.seed}"
    shared += ("" if variant.forbidden_facts else "-naive") + ("-wide" if variant.wide else "")
    shared += "-thinking" if variant.thoughts else ""
    for stage in variant.stages:
        if stage == "helpful" and variant.thoughts:
            learn_to_think(model, tokenizer, variant.seed)
        done = folder / f"{name if stage == variant.stages[-1] else shared}-{stage}.pt"
        if done.exists():
            model.load_state_dict(torch.load(done, weights_only=True))
        else:
            checkpoint = done.with_suffix(".ckpt")
            train_stage(model, stage, variant, tokenizer, checkpoint)
            keep(model.state_dict(), done)
            checkpoint.unlink(missing_ok=True)
        if stage in saved_as:
            save(model, tokenizer, out / saved_as[stage])
    save(model, tokenizer, out / name)


def main(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(VARIANTS)}.")],
    out: Annotated[Path, typer.Option(help="Where the weights go.")] = HERE / "weights",
    work: Annotated[Path, typer.Option(help="Where checkpoints are kept, for resuming.")] = Path(".training"),
    threads: Annotated[int, typer.Option(help="CPU threads; the shipped weights were made with 1.")] = 1,
    seed: Annotated[int | None, typer.Option(help="Another seed; the name of the model then ends in it.")] = None,
) -> None:
    """Train a bundled model from scratch."""
    if name not in VARIANTS:
        raise typer.BadParameter(f"unknown variant {name!r}; choose one of {', '.join(VARIANTS)}")
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    train_variant(name, out, work, seed)


if __name__ == "__main__":
    typer.run(main)
