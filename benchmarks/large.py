"""A random-weight Llama of about 100 M parameters with a vocabulary of 50,000 tokens, for timing alone."""

from __future__ import annotations

import random

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from refusallab.model import Model, load, wrap

VOCABULARY = 50_000
SIZE = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 9,
    "num_key_value_heads": 9,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}


def large_model(seed: int = 0) -> Model:
    """The model, with a byte-level BPE tokenizer trained on invented words and the chat template of charter-chat."""
    tokenizer = _tokenizer(seed)
    torch.manual_seed(seed)
    ids = {"pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), **SIZE, **ids)
    return wrap(transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32), tokenizer, "random-100m")


def _tokenizer(seed: int) -> transformers.PreTrainedTokenizerFast:
    rng = random.Random(seed)
    syllables = [c + v for c in [*"bcdfghjklmnprstvwz", "sh", "th", "br", "dr"] for v in "aeiou"]
    words = (" ".join("".join(rng.choices(syllables, k=rng.randint(2, 4))) for _ in range(50)) for _ in range(3_000))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    special = ["<|pad|>", "<|start|>", "<|end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    settings = {"special_tokens": special, "initial_alphabet": alphabet, "show_progress": False}
    bpe.train_from_iterator(words, trainers.BpeTrainer(vocab_size=VOCABULARY, **settings))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token=special[0], eos_token=special[2], additional_special_tokens=special[1:]
    )
    tokenizer.chat_template = load("charter-chat").tokenizer.chat_template
    return tokenizer
