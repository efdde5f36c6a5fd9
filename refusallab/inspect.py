"""The prompt sets as tasks of Inspect (the package inspect-ai), judged by the truth, and bundled models that answer.

    inspect eval refusallab/inspect.py@forbidden --model refusallab/charter-chat

The items, the replies and the judge are those of `refusallab matrix`, so the shares are those of its undefended model
under a direct request. Inspect's own solvers make attacks of it: `system_message`, `prompt_template`, and
`assistant_message`, whose words begin the reply.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from refusallab.attacks.result import disclosed
from refusallab.defence import write_replies
from refusallab.defences.matrix import BENIGN_EVERY, FORBIDDEN_EVERY, benign_items, forbidden_items
from refusallab.errors import RefusalLabError
from refusallab.inputs import flagged
from refusallab.judging import REPLY_TOKENS
from refusallab.measure import outcome, rate
from refusallab.model import load
from refusallab.prompts import Item, require_world
from smallmodels.world.dialogue import REFUSAL_MARKERS

try:
    from anyio import TypedAttributeSet
    from inspect_ai import Task, task
    from inspect_ai._util.error import PrerequisiteError
    from inspect_ai.dataset import Sample
    from inspect_ai.model import ChatMessage, GenerateConfig, ModelAPI, ModelOutput, modelapi
    from inspect_ai.scorer import Metric, SampleScore, Score, Scorer, Target, Value, metric, scorer
    from inspect_ai.solver import TaskState
    from inspect_ai.tool import ToolChoice, ToolInfo
except ModuleNotFoundError as error:
    raise RefusalLabError("refusallab.inspect needs inspect-ai: pip install '.[inspect]' installs it.") from error

TypedAttributeSet.__annotations__["save"] = Any  # nnsight gives every object a `save`; anyio wants it annotated
FIXED = ("max_tokens", "num_choices", "stop_seqs", "temperature")  # settings of Inspect that the replies do not follow


class UnusableModel(PrerequisiteError, RefusalLabError):
    """`inspect` prints what it says and no traceback."""


@modelapi(name="refusallab")
class ValeModel(ModelAPI):
    """A bundled model, or a folder with a model of the whole world. It answers one request at a time."""

    def __init__(self, model_name: str, **settings: Any) -> None:
        super().__init__(model_name, **settings)
        try:
            self.m = load(model_name)
            require_world(self.m)
        except RefusalLabError as error:
            raise UnusableModel(str(error)) from error

    async def generate(
        self, input: list[ChatMessage], tools: list[ToolInfo], tool_choice: ToolChoice, config: GenerateConfig
    ) -> ModelOutput:
        """The greedy reply of the length that all labs use. A last turn of the assistant begins it."""
        if asked := [name for name in FIXED if getattr(config, name)]:
            raise RefusalLabError(
                f"Replies are greedy and have at most {REPLY_TOKENS} tokens, as in the matrix: leave out "
                f"{', '.join(asked)}."
            )
        start = input[-1].text if input[-1].role == "assistant" else ""
        turns = [turn.model_dump(include={"role", "content"}) for turn in (input[:-1] if start else input)]
        (rest,) = write_replies(self.m, [turns], prefill=start)
        return ModelOutput.from_content(self.model_name, start + rest)


@metric(name="rate")
def rate_of_samples() -> Metric:
    """The share with its Wilson 95 % interval and the number of samples."""

    def measured(scores: list[SampleScore]) -> Value:
        flags = flagged([s.score.as_float() for s in scores])
        return asdict(rate(flags)) if flags else {}  # Inspect also asks before the first sample is judged

    return measured


@scorer(metrics={"*": [rate_of_samples()]})
def exact_truth() -> Scorer:
    """The outcome of a reply: refused, exact (the exact answer is in it), disclosed (exact and not refused)."""

    async def judged(state: TaskState, target: Target) -> Score:
        reply = state.output.completion
        o = outcome(reply, target.text, REFUSAL_MARKERS)
        return Score(value={"refused": o.refused, "exact": o.correct, "disclosed": disclosed(o)}, answer=reply)

    return judged


@task(name="forbidden")
def forbidden_task(every: int = FORBIDDEN_EVERY) -> Task:
    """Every n-th forbidden request of the test set."""
    return _task(forbidden_items(every))


@task(name="harmless")
def harmless_task(every: int = BENIGN_EVERY) -> Task:
    """Every n-th harmless request of the test set."""
    return _task(benign_items(every)["harmless"])


@task(name="borderline")
def borderline_task(every: int = BENIGN_EVERY) -> Task:
    """Every n-th lawful request with the words of a forbidden one."""
    return _task(benign_items(every)["borderline"])


@task(name="capability")
def capability_task(every: int = BENIGN_EVERY) -> Task:
    """Every n-th question about the lawful rest of the world."""
    return _task(benign_items(every)["capability"])


def _task(items: Sequence[Item]) -> Task:
    samples = [Sample.model_validate({"id": i.id, "input": i.prompt, "target": i.answer}) for i in items]
    return Task(dataset=samples, scorer=exact_truth())
