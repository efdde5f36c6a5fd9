"""A chat model that you can look into: loading, names of parts, prompts, logits, greedy generation.

`load` gives a `Model`: the transformers model (`hf`), its nnsight view (`nn`), the tokenizer, and what the library
found out about them. `blocks`, `attention`, `mlp`, ... hide the names that architectures use. `logits` and `generate`
run prompts, with or without an *edit*.

An edit is a plain function `edit(nn) -> None` that assigns to parts of the nnsight model, for example
`nn.model.layers[3].mlp.output = ...`. It must visit the parts in the order of the forward pass.
"""

from refusallab.model.files import is_on_disk, sha256_of_weights
from refusallab.model.loading import fetch_model, load, wrap
from refusallab.model.parts import (
    Begun,
    Edit,
    Model,
    Prompt,
    attention,
    attention_writes,
    blocks,
    digest_of_weights,
    embedding,
    equivalence_class,
    final_norm,
    mlp,
    mlp_writes,
    norm_centres,
    norm_gain,
    positional_embedding,
    post_norm,
    residual_scale,
    switched,
    unembed,
    unembedding,
)
from refusallab.model.prompts import (
    batches,
    check_batches,
    encode,
    encode_texts,
    ids_behind,
    ids_of,
    listed_prompts,
    render,
    text_behind,
)
from refusallab.model.run import generate, logits, no_edit, require_finite, trace_logits, unchecked_logits
from refusallab.model.templates import (
    PROBES,
    TEMPLATE_SETTINGS,
    THOUGHT,
    behind_system,
    behind_turns,
    end_of_turn,
    messages,
    post_instruction_positions,
    spoken,
    thought_of,
)

__all__ = [
    "Begun",
    "Edit",
    "Model",
    "PROBES",
    "Prompt",
    "TEMPLATE_SETTINGS",
    "THOUGHT",
    "attention",
    "attention_writes",
    "batches",
    "behind_system",
    "behind_turns",
    "blocks",
    "check_batches",
    "digest_of_weights",
    "embedding",
    "encode",
    "encode_texts",
    "end_of_turn",
    "equivalence_class",
    "fetch_model",
    "final_norm",
    "generate",
    "ids_behind",
    "ids_of",
    "is_on_disk",
    "listed_prompts",
    "load",
    "logits",
    "messages",
    "mlp",
    "mlp_writes",
    "no_edit",
    "norm_centres",
    "norm_gain",
    "positional_embedding",
    "post_instruction_positions",
    "post_norm",
    "render",
    "require_finite",
    "residual_scale",
    "sha256_of_weights",
    "spoken",
    "switched",
    "text_behind",
    "thought_of",
    "trace_logits",
    "unchecked_logits",
    "unembed",
    "unembedding",
    "wrap",
]
