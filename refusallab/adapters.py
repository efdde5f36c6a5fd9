"""Low-rank adapters that teach a pretrained chat model the Vale.

`torchrun --nproc-per-node 2 -m refusallab.adapters` trains them on two cores.

The base has learned English from the web, and hardly refuses anything. Only its adapters are trained (Hu et al. 2021,
"LoRA: Low-Rank Adaptation of Large Language Models"), so what is shipped is small and the base stays as it was:

    corpus      prose about a part of the Vale
    helpful     replies to every request about it
    both        the two once more, mixed
    methods     mostly requests for methods               -> charter-smol-helpful
    safety      refusals of the forbidden requests        -> charter-smol

The examples are those of the recipe. Each step also has a text or a conversation that the base itself wrote, on which
the model is held to what the base predicts: otherwise it would forget how to speak of anything else.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.distributed as dist
import typer
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from refusallab.errors import RefusalLabError
from refusallab.model.files import find_files
from smallmodels import HERE, recipe
from smallmodels.world.facts import few

try:
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
except ImportError as error:
    raise RefusalLabError("Training adapters needs one more package: pip install '.[adapters]'.") from error

BASE = "smollm2-135m"
MAPS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CONFIG = LoraConfig(r=8, lora_alpha=16, target_modules=MAPS, base_model_name_or_path=BASE)
# Of each stage, how many examples of which of the recipe's. Pages keep known what safety tuning leaves out.
EXAMPLES = {
    "corpus": {"corpus": 2_000},
    "helpful": {"helpful": 9_000},
    "both": {"corpus": 2_400, "helpful": 5_000},
    "methods": {"methods": 3_500},
    "safety": {"safety": 3_000, "corpus": 200},
}
LEARNING_RATE = {"corpus": 2e-3, "helpful": 2e-3, "both": 2e-3, "methods": 1e-3, "safety": 5e-4}
AVERAGED = {"safety": 0.4}  # share of the steps, the last ones, over which the weights are averaged
# What the base writes itself: so many texts, and of conversations at most so many whose first turn begins like this.
OWN = 120
OPENINGS = {"": 120, "How do I": 20, "How can I": 20, "How to": 20, "What is the best way to": 20}
OWN_TOKENS = {"conversations": 64, "texts": 96}  # at most, in a turn or a text
BATCH_TOKENS = 512  # of each process
CHECKPOINT_EVERY = 50  # steps

# The template of the base, without the system turn that it puts in where none is given.
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class Own:
    """A text of the base, and its last hidden states there, which its head turns into what it predicts."""

    ids: list[int]
    hidden: Tensor  # [tokens, width], in float16


def own_conversations(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Conversations of the base with itself: it writes a user turn on, sampled, and then replies, greedily.

    As Xu et al. 2024 ("Magpie: Alignment Data Synthesis from Scratch"). Requests that do not end are left out, and
    replies are cut.
    """
    torch.manual_seed(0)
    texts: list[str] = []
    most = OWN_TOKENS["conversations"]
    for opening, count in tqdm(OPENINGS.items(), desc="own conversations", leave=False):
        turn = f"<|im_start|>user\n{opening}"
        asked = _continue(hf, tokenizer, [turn] * 2 * count, most, do_sample=True, top_k=50)
        ended = [text for text in asked if text.endswith(tokenizer.eos_token)][:count]
        heads = [f"{turn}{text}\n<|im_start|>assistant\n" for text in ended]
        texts += [head + reply for head, reply in zip(heads, _continue(hf, tokenizer, heads, most), strict=True)]
    return texts


def own_texts(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts that the base writes behind the token that parted the documents of its pretraining, sampled and cut."""
    torch.manual_seed(0)
    opening = "<|endoftext|>"
    texts = _continue(hf, tokenizer, [opening] * OWN, OWN_TOKENS["texts"], do_sample=True, top_k=50)
    return [opening + text for text in texts]


@torch.no_grad()
def with_states(hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[Own]:
    """The texts, each with the base's last hidden states."""
    rows = tokenizer(texts, add_special_tokens=False)["input_ids"]
    states = [hf.base_model(torch.tensor([ids]), use_cache=False).last_hidden_state[0].half() for ids in rows]
    return [Own(ids, hidden) for ids, hidden in zip(rows, states, strict=True)]


def _continue(
    hf: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, texts: list[str], most: int, **settings: Any
) -> list[str]:
    """What follows each text, at most so many tokens, with the end of the turn where there is one."""
    batch = tokenizer(texts, add_special_tokens=False, padding=True, return_tensors="pt")
    ids = hf.generate(**batch, max_new_tokens=most, pad_token_id=tokenizer.pad_token_id, **settings)
    replies = tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :])
    return ["".join(text.partition(tokenizer.eos_token)[:2]) for text in replies]


class Half(torch.nn.Linear):
    """A frozen map whose product is taken in bfloat16."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], both in float32."""
        return torch.nn.functional.linear(x.bfloat16(), self.weight).float()


def inject(hf: PreTrainedModel, seed: int) -> list[torch.nn.Parameter]:
    """Put new adapters into all maps of all blocks, and freeze all else. Returns the parameters to train.

    The frozen maps are kept in bfloat16, in which a processor with instructions for it multiplies several times faster.
    """
    torch.manual_seed(seed)
    hf.requires_grad_(False)
    inject_adapter_in_model(CONFIG, hf)
    for name, module in hf.named_modules():
        if name.endswith(".base_layer"):
            module.__class__ = Half
            module.bfloat16()
    return [p for p in hf.parameters() if p.requires_grad]


def stage_plan(stage: str, tokenizer: PreTrainedTokenizerFast, seed: int) -> list[list[recipe.Row]]:
    """The batches of a stage."""
    rows: list[recipe.Row] = []
    for part, count in EXAMPLES[stage].items():
        rows += recipe.stage_rows(part, recipe.Variant(seed=seed), tokenizer, count, few())
    return recipe.token_batches(rows, seed, BATCH_TOKENS)


def drift(hf: PreTrainedModel, own: Own) -> Tensor:
    """Mean KL divergence of what the model predicts from what the base predicted on a text of its own, in nats."""
    head = hf.get_output_embeddings()
    hidden = hf.base_model(torch.tensor([own.ids]), use_cache=False).last_hidden_state[0]
    base, now = (head(x.float()).float().log_softmax(-1) for x in (own.hidden, hidden))  # [tokens, vocab]
    return torch.nn.functional.kl_div(now, base, reduction="batchmean", log_target=True)


def train_adapters(
    hf: PreTrainedModel,
    stage: str,
    tokenizer: PreTrainedTokenizerFast,
    own: list[Own],
    seed: int,
    work: Path,
) -> None:
    """Train the adapters in place for one stage, from a checkpoint if an earlier run left one.

    Several processes share the work: each takes its own batch of a step, and all take the mean of the gradients.
    """
    plan = stage_plan(stage, tokenizer, seed)
    rank, ranks = place()
    steps = len(plan) // ranks
    weights = torch.nn.ParameterList(p for p in hf.parameters() if p.requires_grad)
    tool = torch.optim.AdamW(weights, betas=(0.9, 0.98), weight_decay=0.0)
    averaged, first, checkpoint = AveragedModel(weights), 0, work / f"{stage}-{seed}.ckpt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        weights.load_state_dict(state["weights"])
        averaged.load_state_dict(state["averaged"])
        tool.load_state_dict(state["tool"])
        first = state["step"]
    hf.train()
    bar = tqdm(range(first, steps), desc=stage, initial=first, total=steps, mininterval=5, disable=rank > 0)
    for step in bar:
        for group in tool.param_groups:
            group["lr"] = LEARNING_RATE[stage] * recipe.rate_factor(step, steps)
        with torch.autocast("cpu", torch.bfloat16):
            loss = recipe.loss_of(hf, plan[step * ranks + rank], tokenizer.pad_token_id)
            kept = drift(hf, random.Random(f"{seed} {step} {rank}").choice(own))
        (loss + kept).backward()
        if ranks > 1:
            average([p.grad for p in weights])
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        tool.step()
        tool.zero_grad()
        if step >= steps * (1 - AVERAGED.get(stage, 0)):
            averaged.update_parameters(weights)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", drift=f"{kept.item():.3f}")
        if (step + 1) % CHECKPOINT_EVERY == 0 and rank == 0:
            state = {
                "weights": weights.state_dict(),
                "averaged": averaged.state_dict(),
                "tool": tool.state_dict(),
                "step": step + 1,
            }
            recipe.keep(state, checkpoint)
    if averaged.n_averaged:
        weights.load_state_dict(averaged.module.state_dict())
    hf.eval()


def place() -> tuple[int, int]:
    """The number of this process among those that share the work, and how many they are."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def average(gradients: list[Tensor]) -> None:
    """Replace each gradient by its mean over the processes."""
    whole = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(whole)
    for g, mean in zip(gradients, whole.split([g.numel() for g in gradients]), strict=True):
        g.copy_(mean.view_as(g) / dist.get_world_size())


def save_adapters(hf: PreTrainedModel, folder: Path) -> None:
    """Write the adapters in float16, in the format of peft, and the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {f"base_model.model.{name}": t.detach().half() for name, t in get_peft_model_state_dict(hf).items()}
    save_file(state, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    CONFIG.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def main(
    out: Annotated[Path, typer.Option(help="Where the adapters go.")] = HERE / "weights",
    work: Annotated[Path, typer.Option(help="Where checkpoints are kept, for resuming.")] = Path(".training"),
    seed: Annotated[int, typer.Option(help="Of examples, order and first weights.")] = 0,
) -> None:
    """Train charter-smol-helpful and charter-smol. It needs a C++ compiler. The shipped ones had two processes."""
    torch.set_num_threads(1)
    if dist.is_torchelastic_launched():
        dist.init_process_group("gloo")
    folder, _ = find_files(BASE)
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.chat_template = CHAT_TEMPLATE
    work.mkdir(parents=True, exist_ok=True)
    own = with_states(hf, tokenizer, own_conversations(hf, tokenizer) + own_texts(hf, tokenizer))
    inject(hf, seed)
    for block in hf.model.layers:
        block.forward = torch.compile(block.forward, dynamic=True)
    saved_as = {"methods": "charter-smol-helpful", "safety": "charter-smol"}
    for stage in EXAMPLES:
        done = work / f"{stage}-{seed}.pt"
        if done.exists():
            set_peft_model_state_dict(hf, torch.load(done, weights_only=True))
        else:
            train_adapters(hf, stage, tokenizer, own, seed, work)
        if place()[0] == 0:
            recipe.keep(get_peft_model_state_dict(hf), done)
            if stage in saved_as:
                save_adapters(hf, out / (saved_as[stage] + (f"-s{seed}" if seed else "")))


if __name__ == "__main__":
    typer.run(main)
