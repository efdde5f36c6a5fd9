"""GCG here and in nanogcg, side by side: the loss reached and the seconds a step.

    pip install -c constraints.txt -e '.[benchmark]' && python benchmarks/gcg.py

Same model, prompts, targets, first suffix, steps, search width and seed. The random draws differ, so losses are
compared as means over the prompts. nanogcg evaluates all candidates in one batch by default, which is slow on some
processors: it runs with that and with our batch size, and the faster one is the one to beat. It keeps caches as pairs
(keys, values), as transformers once did: `WithPairs` translates. Times are medians over steps, without the set-up
before the first: of the clock, and of the processor, which tells more when the machine has other work.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time

import nanogcg.gcg
import torch
import transformers
from large import large_model

from refusallab.attacks.gcg import Knobs, find_suffix
from refusallab.model import Model, load
from refusallab.prompts import bundled

TARGET = "Certainly. Use a"
INIT = " the" * 20


def now() -> torch.Tensor:
    """Seconds on the clock and of the processor: float64 [2]."""
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class WithPairs(torch.nn.Module):
    """A model whose cache goes in and out as pairs of keys and values."""

    def __init__(self, hf: torch.nn.Module):
        super().__init__()
        self.hf, self.device, self.dtype = hf, hf.device, hf.dtype

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.hf.get_input_embeddings()

    def forward(self, inputs_embeds: torch.Tensor, past_key_values: tuple = (), use_cache: bool = False) -> object:
        cache = transformers.DynamicCache()
        for i, (keys, values) in enumerate(past_key_values):
            cache.update(keys, values, i)
        output = self.hf(inputs_embeds=inputs_embeds, past_key_values=cache, use_cache=True)
        output.past_key_values = tuple((layer.keys, layer.values) for layer in cache.layers)
        return output


class Timed(nanogcg.gcg.GCG):
    """nanogcg that notes when each step begins."""

    def compute_token_gradient(self, *args: object) -> torch.Tensor:
        self.starts = [*getattr(self, "starts", []), now()]
        return super().compute_token_gradient(*args)


def theirs(m: Model, prompt: str, knobs: Knobs, batch_size: int | None) -> tuple[float, torch.Tensor]:
    """(lowest loss in nats per token, seconds of each step [steps, 2] as in `now`)."""
    transformers.set_seed(knobs.seed)
    config = nanogcg.GCGConfig(
        num_steps=knobs.steps,
        optim_str_init=knobs.init,
        search_width=knobs.search_width,
        topk=knobs.topk,
        batch_size=batch_size,
        verbosity="ERROR",
    )
    search = Timed(WithPairs(m.hf), m.tokenizer, config)
    result = search.run(prompt, TARGET)
    return result.best_loss, torch.stack([*search.starts, now()]).diff(dim=0)


def ours(m: Model, prompt: str, knobs: Knobs) -> tuple[float, torch.Tensor]:
    """(lowest loss in nats per token, seconds of each step [steps, 2] as in `now`)."""
    times: list[torch.Tensor] = []
    found = find_suffix(m, [prompt], [TARGET], knobs, progress=lambda *_: times.append(now()))
    return min(found.losses), torch.stack(times).diff(dim=0)


def compare(m: Model, prompts: list[str], knobs: Knobs) -> None:
    runs = {
        "refusallab": lambda prompt: ours(m, prompt, knobs),
        f"nanogcg, batch {knobs.search_width}": lambda prompt: theirs(m, prompt, knobs, None),
        f"nanogcg, batch {knobs.batch_size}": lambda prompt: theirs(m, prompt, knobs, knobs.batch_size),
    }
    losses, seconds = {name: [] for name in runs}, {name: [] for name in runs}
    for prompt in prompts:
        for name, run in runs.items():
            loss, steps = run(prompt)
            losses[name].append(loss)
            seconds[name].append(steps)
    clock, processor = ({name: torch.cat(s).median(0).values[i].item() for name, s in seconds.items()} for i in (0, 1))
    print(
        f"\n{m.name}: {len(prompts)} prompts, {knobs.steps} steps, search width {knobs.search_width}, seed {knobs.seed}"
    )
    for name in runs:
        each = " ".join(f"{loss:.3f}" for loss in losses[name])
        times = f"{clock[name]:7.3f} s a step ({processor[name]:7.3f} s of the processor)"
        print(f"  {name:20} {times}   loss {statistics.mean(losses[name]):.3f} ({each})")
    for what, medians in {"clock": clock, "processor": processor}.items():
        mine, *others = medians.values()
        print(f"  time by the {what}: {mine / min(others):.2f} of the faster nanogcg")
    my_loss, *their_losses = (statistics.mean(values) for values in losses.values())
    print(f"  loss: {my_loss - min(their_losses):+.3f} nats")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=6, help="for charter-chat; the large model gets one")
    parser.add_argument("--steps", type=int, default=20, help="for charter-chat; the large model gets a quarter")
    parser.add_argument("--width", type=int, default=128, help="search width; the large model gets half")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    logging.getLogger("nanogcg").setLevel(logging.ERROR)
    nanogcg.gcg.tqdm = lambda steps: steps
    print(f"{platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    prompts = [item.prompt for item in bundled("harmful_test") if item.tag != "context"]
    prompts = prompts[:: len(prompts) // args.prompts][: args.prompts]
    knobs = Knobs(steps=args.steps, search_width=args.width, init=INIT, early_stop=False, seed=args.seed)
    compare(load("charter-chat"), prompts, knobs)
    knobs = Knobs(args.steps // 4, args.width // 2, init=INIT, early_stop=False, seed=args.seed)
    compare(large_model(), prompts[:1], knobs)


if __name__ == "__main__":
    main()
