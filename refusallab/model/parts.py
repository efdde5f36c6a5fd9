"""Names of parts: one name for each part of a block, whatever the architecture calls it. And the loaded `Model`.

Each function takes the raw transformers model or its nnsight envoy and returns the same kind.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from nnsight import TransformersModel
from torch import Tensor

from refusallab.errors import RefusalLabError


@dataclass(frozen=True)
class Begun:
    """A prompt with the beginning of the reply to it, such as a thought. The model goes on from there.

    Wherever prompts are given this may stand: the last prompt token is then the last token of the beginning.
    """

    prompt: str | list[dict[str, Any]]
    reply: str


Prompt = str | list[dict[str, Any]] | Begun  # an instruction (one user turn), chat messages of role and content, ...
Edit = Callable[[Any], None]
# Before a chat template this switches thinking on, whatever setting the template is filled in with.
SWITCH = re.compile(r"\{%- set enable_thinking, thought_tokens = true, (\d+) -%\}")


@dataclass(frozen=True, repr=False)
class Model:
    """A loaded chat model. Made by `load` or `wrap`."""

    nn: TransformersModel  # nnsight's view of hf: trace this one
    hf: transformers.PreTrainedModel  # eval mode, no gradients
    tokenizer: Any  # pads on the left
    name: str
    commit: str  # of the hub repository; else the first 12 digits of sha256(weights)
    positions: tuple[int, ...]  # post-instruction positions, counted from the end: (-5, ..., -1)
    stop_ids: tuple[int, ...]  # tokens that end a reply
    equivalence: str  # see `equivalence_class`
    remote: bool | str  # True: runs on NDIF; "local": nnsight's simulation of that

    @property
    def n_layers(self) -> int:
        return len(blocks(self.hf))

    @property
    def width(self) -> int:
        return embedding(self.hf).weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return unembedding(self.hf).weight.shape[0]

    @property
    def thought_tokens(self) -> int:
        """How many tokens it may think before each reply. 0: thinking is switched off."""
        found = SWITCH.match(self.tokenizer.chat_template or "")
        return int(found[1]) if found else 0

    @property
    def device(self) -> torch.device:
        """Where prompts go. A remote model has no weights here: its prompts are made on the CPU."""
        return torch.device("cpu") if self.remote is True else self.hf.device

    def __repr__(self) -> str:
        thinking = f", thinking up to {self.thought_tokens} tokens" if self.thought_tokens else ""
        return (
            f"Model({self.name!r}, {self.n_layers} blocks, width {self.width}, vocabulary {self.vocab_size}, "
            f"post-instruction positions {self.positions[0]}..-1, equivalence {self.equivalence!r}{thinking})"
        )


def switched(template: str, thought_tokens: int) -> str:
    """A chat template with thinking switched on, or off where no tokens are for it."""
    on = f"{{%- set enable_thinking, thought_tokens = true, {thought_tokens} -%}}" if thought_tokens else ""
    return on + SWITCH.sub("", template, count=1)


def blocks(m: Any) -> Any:
    """The transformer blocks, first to last. Input and output: [batch, seq, width]."""
    return _either(_body(m), "h", "layers")


def embedding(m: Any) -> Any:
    """The token embedding; its weight is [vocab, width]."""
    return _either(_body(m), "wte", "embed_tokens")


def positional_embedding(m: Any) -> Any | None:
    """The learned position embedding (GPT-2), weight [positions, width]. None where there is none."""
    return _either(_body(m), "wpe", optional=True)


def final_norm(m: Any) -> Any:
    """The norm between the last block and the unembedding."""
    return _either(_body(m), "ln_f", "norm")


def unembedding(m: Any) -> Any:
    """The head; its weight is [vocab, width]."""
    return _either(m, "lm_head")


def attention(block: Any) -> Any:
    """The attention of a block. Its output is a tuple; [0] is the attention output [batch, seq, width]."""
    return _either(block, "attn", "self_attn")


def mlp(block: Any) -> Any:
    """The MLP of a block; its output is a tensor [batch, seq, width]."""
    return _either(block, "mlp")


def attention_writes(block: Any) -> Any:
    """The projection that ends the attention: what it writes is the attention output."""
    return _either(attention(block), "o_proj", "c_proj")


def mlp_writes(block: Any) -> Any:
    """The projection that ends the MLP: what it writes is the MLP output."""
    return _either(mlp(block), "down_proj", "c_proj")


def post_norm(block: Any) -> tuple[Any, Any]:
    """The norms between (attention output, MLP output) and the residual stream, or (None, None).

    Gemma-2/3, OLMo-2 and GLM-4 have them. Beware of the name: `post_attention_layernorm` is such a norm in the first
    two, but in Llama, Qwen and GLM-4 the same name is the norm *before* the MLP.
    """
    for after_attention, after_mlp in (
        ("post_attention_layernorm", "post_feedforward_layernorm"),
        ("post_self_attn_layernorm", "post_mlp_layernorm"),
    ):
        if _either(block, after_mlp, optional=True) is not None:
            return _either(block, after_attention), _either(block, after_mlp)
    return None, None


def norm_gain(norm: torch.nn.Module, like: Tensor) -> Tensor:
    """gamma, whatever the architecture calls it: fp32 [width], read off from +-1, which have mean 0 and size 1.

    like: any vector of the stream, [width], on the device of the norm. Some norms have no parameters.
    """
    signs = torch.ones_like(like, dtype=torch.float32)
    signs[::2] = -1
    return signs * _odd_part(norm, signs)


def norm_centres(norm: torch.nn.Module, like: Tensor) -> bool:
    """Whether the norm takes the mean off first, as LayerNorm does and RMSNorm does not. like: as in `norm_gain`."""
    return bool(_odd_part(norm, torch.ones_like(like, dtype=torch.float32)).abs().max() < 1e-3)


@torch.no_grad()
def _odd_part(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Half the difference between what a norm makes of x [width] and of -x, in fp32: a bias is not in it."""
    norm = copy.deepcopy(norm).float()
    up, down = (norm(side[None])[0] for side in (x, -x))
    return (up - down) / 2


def residual_scale(hf: torch.nn.Module) -> float:
    """What attention and MLP outputs are multiplied by before they join the stream: 1 except in Granite."""
    return getattr(hf.config, "residual_multiplier", None) or 1.0


@torch.no_grad()
def unembed(hf: torch.nn.Module, x: Tensor) -> Tensor:
    """What the model makes of the end of its stream: [..., width] -> fp32 logits [..., vocab].

    Final norm, unembedding, then the scale (Granite, Cohere) and the cap (Gemma-2) that some models put on logits.
    """
    head, config = unembedding(hf), hf.config
    logits = head(final_norm(hf)(x.to(head.weight))).float()
    if scale := getattr(config, "logit_scale", None):
        logits = logits * scale
    if divisor := getattr(config, "logits_scaling", None):
        logits = logits / divisor
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def equivalence_class(hf: torch.nn.Module) -> str:
    """What the weight edit needs to equal ablation by hooks. One of these, or a sum such as "untie+biases":

    "exact"      projecting the output matrices is enough
    "untie"      the head shares the embedding: give it a copy of its own first
    "positions"  learned position embeddings write to the stream: project them too
    "biases"     output biases write to the stream: project them too
    "post-norm"  norms after attention and MLP rotate what is written: equality is not promised
    """
    writers = [write for block in blocks(hf) for write in (attention_writes(block), mlp_writes(block))]
    if any(norm is not None for block in blocks(hf) for norm in post_norm(block)):
        return "post-norm"
    tied = unembedding(hf).weight is embedding(hf).weight
    needs = [
        ("untie", tied),
        ("positions", positional_embedding(hf) is not None),
        ("biases", any(write.bias is not None for write in writers)),
    ]
    return "+".join(name for name, needed in needs if needed) or "exact"


def digest_of_weights(m: Model) -> str:
    """The first 12 digits of the SHA-256 of the weights as they are, edits included. Of a remote model, its commit."""
    if m.remote is True:
        return m.commit
    digest = hashlib.sha256()
    for name, value in sorted(m.hf.state_dict().items()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]


def _body(m: Any) -> Any:
    return _either(m, "transformer", "model")


def _either(parent: Any, *names: str, optional: bool = False) -> Any:
    module = getattr(parent, "_module", parent)  # an envoy holds its module there
    for name in names:
        if isinstance(getattr(module, name, None), torch.nn.Module):
            return getattr(parent, name)
    if optional:
        return None
    if isinstance(parent, Model):
        raise RefusalLabError("Give m.hf, the model of transformers, or m.nn in a trace, not the Model around both.")
    raise RefusalLabError(
        f"{type(module).__name__} has no {' or '.join(names)}: use a model of the Llama kind, such as qwen2.5-0.5b."
    )
