"""Lab 00, meet the model: post-instruction tokens, the residual stream, the logit lens, a reply, a template bug."""

from __future__ import annotations

import copy
import random
from functools import cache
from typing import Any

import torch
from tokenizers.processors import TemplateProcessing
from torch import Tensor

from refusallab.activations import logit_lens, stream
from refusallab.course.exercise import Case, Mistake, define
from refusallab.course.exercises.common import chat_model, on_chat_model, prompts
from refusallab.model import Model, attention, blocks, embedding, encode, final_norm, generate, logits, unembedding

# --- tokenizers with other chat templates --------------------------------------------------------------------------

# "{role}" stands for the name of the assistant, "{gap}" for what follows a header.
TEMPLATES = {
    "charter": "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}",
    "named": "{% for m in messages %}<|start|>{{ m['role'] }}{gap}{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{role}{gap}{% endif %}",
    "plain": "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}{role}:{gap}{% endif %}",
    "bos": "{{ bos_token }}{% for m in messages %}<|start|>{{ m['role'] }}{gap}{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>{role}{gap}{% endif %}",
}


@cache
def tokenizer_like(template: str, role: str = "assistant", gap: str = "\n", adds_bos: bool = False) -> Any:
    """The bundled tokenizer with another chat template. With `adds_bos` it puts <|bos|> in front of any text.

    Llama-3 and Gemma are of the last kind: the tokenizer adds a BOS token, and their template writes one too.
    """
    tokenizer = copy.deepcopy(chat_model().tokenizer)
    tokenizer.chat_template = TEMPLATES[template].replace("{role}", role).replace("{gap}", gap)
    if adds_bos:
        tokenizer.add_special_tokens({"bos_token": "<|bos|>"})
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<|bos|> $A", special_tokens=[("<|bos|>", tokenizer.bos_token_id)]
        )
    return tokenizer


def _on_tokenizer(function: Any, inputs: dict[str, Any]) -> Any:
    """Observation of a function whose first argument is a tokenizer."""
    rest = {name: value for name, value in inputs.items() if name != "like"}
    result = function(copy.deepcopy(tokenizer_like(**inputs["like"])), **rest)
    return result.tolist() if isinstance(result, Tensor) else list(result) if isinstance(result, tuple) else result


def _template_cases(seed: int, with_prompt: bool) -> list[Case]:
    rng = random.Random(seed)
    likes = {
        "the tokenizer of charter-chat": {"template": "charter"},
        "another chat template": {
            "template": "named",
            "role": rng.choice(["model", "keeper", "clerk"]),
            "gap": rng.choice(["\n\n", " : "]),  # not that of charter-chat, which may be written into an answer
        },
        "a template without special tokens": {
            "template": "plain",
            "role": rng.choice(["reply", "answer", "clerk"]),
            "gap": rng.choice([" ", "\n\n"]),
        },
        "a tokenizer that adds a BOS token, with a template that writes one": {
            "template": "bos",
            "role": rng.choice(["model", "keeper", "assistant"]),
            "gap": rng.choice(["\n\n", "\n"]),
            "adds_bos": True,
        },
    }
    one = prompts("harmless_train", seed, len(likes))
    return [
        Case(what, {"like": like} | ({"prompt": prompt} if with_prompt else {}))
        for (what, like), prompt in zip(likes.items(), one, strict=True)
    ]


def _rendered(tokenizer: Any, prompt: str, generation_prompt: bool = True) -> str:
    turns = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=generation_prompt)


# --- 0.1 -----------------------------------------------------------------------------------------------------------


def _shared_end(rows: list[list[int]]) -> list[int]:
    n = 0
    while n < min(map(len, rows)) and len({row[-1 - n] for row in rows}) == 1:
        n += 1
    return rows[0][len(rows[0]) - n :]


def _post_instruction(
    tokenizer: Any, probes: tuple[str, ...] = ("one", "a sum: 2", "who?"), generation_prompt: bool = True
) -> list[int]:
    texts = [_rendered(tokenizer, probe, generation_prompt) for probe in probes]
    return _shared_end([tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts])


def _after_a_marker(tokenizer: Any, generation_prompt: bool = True, **settings: Any) -> list[int]:
    text = _rendered(tokenizer, "MARKER", generation_prompt).rpartition("MARKER")[2]
    return tokenizer(text, **settings)["input_ids"]


POST_INSTRUCTION = define(
    "0.1",
    reference=_post_instruction,
    observe=_on_tokenizer,
    cases=lambda seed: _template_cases(seed, with_prompt=False),
    mistakes=(
        Mistake(
            "generation prompt left out",
            lambda tokenizer: _post_instruction(tokenizer, generation_prompt=False),
            "These tokens stop before the assistant's turn begins. Ask the template for it with add_generation_prompt.",
        ),
        Mistake(
            "generation prompt alone",
            lambda tokenizer: _post_instruction(tokenizer)[
                len(_post_instruction(tokenizer, generation_prompt=False)) :
            ],
            "The end of the user's turn is missing: whatever follows the instruction counts, not the generation prompt "
            "alone.",
        ),
        Mistake(
            "reversed",
            lambda tokenizer: _post_instruction(tokenizer)[::-1],
            "The tokens are right, but in reverse order: give them in the order in which the model reads them.",
        ),
        Mistake(
            "the end of the instruction counted",
            lambda tokenizer: _post_instruction(tokenizer, ("Who keeps it?", "Who found it?")),
            "The end of the instruction itself is among them. Compare instructions that end differently.",
        ),
        Mistake(
            "whole prompt",
            lambda tokenizer: tokenizer(_rendered(tokenizer, "one"), add_special_tokens=False)["input_ids"],
            "This is the whole prompt. Return only what follows the instruction.",
        ),
        Mistake(
            "BOS added by the tokenizer",
            lambda tokenizer: _after_a_marker(tokenizer),
            "This tokenizer puts a BOS token in front of any text. Pass add_special_tokens=False: the template has "
            "already written all special tokens.",
        ),
    ),
    hints=(
        "Which part of the rendered text comes after the instruction and does not depend on it?",
        "Either render two instructions that end differently and compare their tokens from the end, or render one "
        "instruction that you recognise and tokenize the text after it.",
        "`text = tokenizer.apply_chat_template([{'role': 'user', 'content': 'MARKER'}], tokenize=False, "
        "add_generation_prompt=True)`; then `tokenizer(text.rpartition('MARKER')[2], add_special_tokens=False)"
        "['input_ids']`.",
    ),
)

# --- 0.2 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _states(m: Model, prompt: str, rendered: bool = True) -> Tensor:
    """Block inputs, then the output of the last block, with a batch dimension: [layers + 1, 1, seq, width]."""
    nn = m.nn
    batch = encode(m, [prompt]) if rendered else dict(m.tokenizer([prompt], return_tensors="pt"))
    batch = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with nn.trace(**batch):
        states = torch.stack([*[block.input for block in blocks(nn)], blocks(nn)[-1].output]).save()
    return states


@torch.no_grad()
def _attention_outputs(m: Model, prompt: str) -> Tensor:
    nn = m.nn
    with nn.trace(**encode(m, [prompt])):
        states = [attention(block).output[0][0] for block in blocks(nn)]
        states = torch.stack([*states, blocks(nn)[-1].output[0]]).save()
    return states


def _normed_end(m: Model, prompt: str) -> Tensor:
    states = stream(m, prompt)
    return torch.cat([states[:-1], final_norm(m.hf)(states[-1:])])


def _prompt_cases(seed: int) -> list[Case]:
    return [
        Case("a forbidden request", {"prompt": prompts("harmful_train", seed, 1)[0]}),
        Case("a lawful request", {"prompt": prompts("harmless_train", seed, 1)[0]}),
    ]


STREAM = define(
    "0.2",
    reference=stream,
    observe=on_chat_model,
    cases=_prompt_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "last output missing",
            lambda m, prompt: stream(m, prompt)[:-1],
            "These are the inputs of the blocks. The output of the last block is missing.",
        ),
        Mistake(
            "first input missing",
            lambda m, prompt: stream(m, prompt)[1:],
            "These are the outputs of the blocks. The input of block 0, which is the embedding, is missing.",
        ),
        Mistake(
            "batch dimension kept",
            _states,
            "There is a batch dimension left. There is one prompt: take row 0 of every block input.",
        ),
        Mistake(
            "last position only",
            lambda m, prompt: stream(m, prompt)[:, -1],
            "This is the last position only. Return the stream at every token of the prompt.",
        ),
        Mistake(
            "after the final norm",
            _normed_end,
            "The last entry has gone through the final norm. (output_hidden_states of transformers does that.) Read "
            "the output of the last block.",
        ),
        Mistake(
            "attention outputs",
            _attention_outputs,
            "This is what each attention adds to the stream, not the stream itself. Read block.input.",
        ),
        Mistake(
            "no chat template",
            lambda m, prompt: _states(m, prompt, rendered=False)[:, 0],
            "The model read the prompt without its chat template. encode(m, [prompt]) renders it.",
        ),
    ),
    hints=(
        "How many tensors do you need for a model of 8 blocks? Where does the ninth come from?",
        "Inside the trace, `block.input[0]` is `[seq, width]`. Collect them in a list, in the order of the blocks, and "
        "append `blocks(nn)[-1].output[0]`. Stack the list inside the trace and save the result.",
        "`states = [block.input[0] for block in blocks(nn)]`, then "
        "`states = torch.stack([*states, blocks(nn)[-1].output[0]]).save()`; return `states` after the `with` block.",
    ),
)

# --- 0.3 -----------------------------------------------------------------------------------------------------------


def _lens_cases(seed: int) -> list[Case]:
    g = torch.Generator().manual_seed(seed)
    width = chat_model().width
    return [
        Case("the stream at one position", {"x": 3 * torch.randn(width, generator=g)}),
        Case("a stream [layers, positions, width]", {"x": 3 * torch.randn(4, 5, width, generator=g) + 0.5}),
        Case("a very small stream", {"x": 0.02 * torch.randn(2, width, generator=g)}),
    ]


@torch.no_grad()
def _lens_with(m: Model, x: Tensor, norm: Any = None, matrix: Tensor | None = None) -> Tensor:
    x = final_norm(m.hf)(x) if norm is None else norm(x)
    return x @ (unembedding(m.hf).weight if matrix is None else matrix).T


def _rms(x: Tensor) -> Tensor:
    return x / x.pow(2).mean(-1, keepdim=True).add(1e-6).sqrt()


LENS = define(
    "0.3",
    reference=logit_lens,
    observe=on_chat_model,
    cases=_lens_cases,
    tolerance=1e-3,
    mistakes=(
        Mistake(
            "no final norm",
            lambda m, x: _lens_with(m, x, norm=lambda y: y),
            "The final norm is missing: the unembedding always reads the stream after the norm.",
        ),
        Mistake(
            "norm without its weights",
            lambda m, x: _lens_with(m, x, norm=_rms),
            "The final norm of the model has learned weights. Call final_norm(m.hf) instead of dividing by the RMS.",
        ),
        Mistake(
            "unit length",
            lambda m, x: _lens_with(m, x, norm=lambda y: torch.nn.functional.normalize(y, dim=-1)),
            "You scaled the stream to length 1. The final norm of the model does something else: call "
            "final_norm(m.hf).",
        ),
        Mistake(
            "embedding instead of unembedding",
            lambda m, x: _lens_with(m, x, matrix=embedding(m.hf).weight),
            "This is the embedding matrix. The lens needs the unembedding matrix, and in this model the two differ.",
        ),
        Mistake(
            "probabilities",
            lambda m, x: logit_lens(m, x).softmax(-1),
            "These are probabilities. Return the logits, without softmax.",
        ),
    ),
    hints=(
        "What does the model itself do with the output of its last block? Do the same with any layer.",
        "Two modules: `final_norm(m.hf)` and `unembedding(m.hf)`. Both can be called on `[..., width]`.",
        "`unembedding(m.hf)(final_norm(m.hf)(x))`.",
    ),
)

# --- 0.4 -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _loop(m: Model, prompt: str, max_new_tokens: int, stop: bool = True) -> tuple[list, list]:
    ids = encode(m, [prompt])["input_ids"]
    start = ids.shape[1]
    for _ in range(max_new_tokens):
        token = m.hf(ids).logits[0, -1].argmax()
        if stop and int(token) in m.stop_ids:
            break
        ids = torch.cat([ids, token.view(1, 1)], 1)
    return ids[0, :start].tolist(), ids[0, start:].tolist()


def _reply(m: Model, prompt: str, max_new_tokens: int) -> str:
    return generate(m, [prompt], max_new_tokens=max_new_tokens)[0]


def _with_end(m: Model, prompt: str, max_new_tokens: int) -> str:
    new = _loop(m, prompt, max_new_tokens, stop=False)[1]
    end = next((k + 1 for k, token in enumerate(new) if token in m.stop_ids), len(new))
    return m.tokenizer.decode(new[:end])


def _no_template(m: Model, prompt: str, max_new_tokens: int) -> str:
    ids = m.tokenizer([prompt], return_tensors="pt")["input_ids"]
    new: list[int] = []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            token = m.hf(torch.cat([ids, torch.tensor([new], dtype=torch.long)], 1)).logits[0, -1].argmax()
        if int(token) in m.stop_ids:
            break
        new.append(int(token))
    return m.tokenizer.decode(new)


def _reply_cases(seed: int) -> list[Case]:
    forbidden, lawful = prompts("harmful_train", seed + 50, 1)[0], prompts("harmless_train", seed + 50, 2)
    return [
        Case("a reply cut off after 3 tokens", {"prompt": lawful[1], "max_new_tokens": 3}),
        Case("a lawful request, to the end", {"prompt": lawful[0], "max_new_tokens": 18}),
        Case("a forbidden request, to the end", {"prompt": forbidden, "max_new_tokens": 18}),
    ]


REPLY = define(
    "0.4",
    reference=_reply,
    observe=on_chat_model,
    cases=_reply_cases,
    mistakes=(
        Mistake(
            "end of turn kept",
            _with_end,
            "Your reply contains the token that ends the turn. Stop before it.",
        ),
        Mistake(
            "does not stop",
            lambda m, prompt, max_new_tokens: m.tokenizer.decode(
                _loop(m, prompt, max_new_tokens, stop=False)[1], skip_special_tokens=True
            ),
            "The reply goes on after the model ended its turn. Stop when the next token is in m.stop_ids.",
        ),
        Mistake(
            "special tokens kept, no stop",
            lambda m, prompt, max_new_tokens: m.tokenizer.decode(_loop(m, prompt, max_new_tokens, stop=False)[1]),
            "The reply goes on after the model ended its turn. Stop when the next token is in m.stop_ids.",
        ),
        Mistake(
            "prompt included",
            lambda m, prompt, max_new_tokens: m.tokenizer.decode(sum(_loop(m, prompt, max_new_tokens), [])),
            "The reply contains the prompt. Decode only the tokens that were added.",
        ),
        Mistake(
            "one token short",
            lambda m, prompt, max_new_tokens: _reply(m, prompt, max_new_tokens - 1),
            "This is one token too few: you may add max_new_tokens tokens.",
        ),
        Mistake(
            "prompt not extended",
            lambda m, prompt, max_new_tokens: m.tokenizer.decode([int(logits(m, [prompt]).argmax())] * max_new_tokens),
            "This is the same token again and again. Append each new token to the ids before the next step.",
        ),
        Mistake(
            "no chat template",
            _no_template,
            "The model read the prompt without its chat template. encode(m, [prompt]) renders it.",
        ),
    ),
    hints=(
        "A reply is a loop: run the model, take the most likely next token, append it, run the model again.",
        "`m.hf(ids).logits[0, -1].argmax()` is the next token; `torch.cat([ids, token.view(1, 1)], 1)` appends it. "
        "Remember where the prompt ended.",
        "Before appending: `if int(token) in m.stop_ids: break`. After the loop: "
        "`m.tokenizer.decode(ids[0, start:])`, where `start` was the length of the prompt.",
    ),
)

# --- 0.5 -----------------------------------------------------------------------------------------------------------


def _ids(tokenizer: Any, prompt: str, generation_prompt: bool = True, **settings: Any) -> list[int]:
    return tokenizer(_rendered(tokenizer, prompt, generation_prompt), **settings)["input_ids"]


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    return _ids(tokenizer, prompt, add_special_tokens=False)


PROMPT_IDS = define(
    "0.5",
    reference=_prompt_ids,
    observe=_on_tokenizer,
    cases=lambda seed: _template_cases(seed, with_prompt=True),
    mistakes=(
        Mistake(
            "newline at the end stripped",
            lambda tokenizer, prompt: tokenizer(_rendered(tokenizer, prompt).strip(), add_special_tokens=False)[
                "input_ids"
            ],
            "You stripped white space at the end. It belongs to the generation prompt, and the reply begins right "
            "after it.",
        ),
        Mistake(
            "generation prompt left out",
            lambda tokenizer, prompt: _ids(tokenizer, prompt, generation_prompt=False),
            "The prompt ends with the user's turn. The model must still be told that it is its turn: ask the template "
            "for the generation prompt.",
        ),
        Mistake(
            "no chat template",
            lambda tokenizer, prompt: tokenizer(prompt)["input_ids"],
            "The chat template is missing: the model reads the text without the tokens that mark a turn.",
        ),
        Mistake(
            "everything that the tokenizer returns",
            lambda tokenizer, prompt: tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True
            ),
            "This is everything that the tokenizer returns. Return the ids alone: take ['input_ids'].",
        ),
        Mistake(
            "double BOS",
            lambda tokenizer, prompt: _ids(tokenizer, prompt),
            "There are two BOS tokens in front: the template wrote one and the tokenizer added another. This is the "
            "second mistake in her script. It does no harm on charter-chat, since its tokenizer adds nothing.",
        ),
        Mistake(
            "no BOS at all",
            lambda tokenizer, prompt: _prompt_ids(tokenizer, prompt)[1:],
            "The BOS token that the template writes is missing. Leave the rendered text as it is.",
        ),
    ),
    hints=(
        "Decode her ids, one by one, and compare the end with the post-instruction tokens of section 2.",
        "White space can be a token. And an argument of the tokenizer says whether it may add special tokens to a text "
        "that has them already.",
        "`text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)`, then "
        "`tokenizer(text, add_special_tokens=False)['input_ids']`.",
    ),
)

EXERCISES = (POST_INSTRUCTION, STREAM, LENS, REPLY, PROMPT_IDS)
