"""Why ablation leaves refusals on charter-wide-s1: behind "Use a" the model decides once more."""

import pytest
import torch

from refusallab import final_stream
from refusallab.card import FREED
from refusallab.directions import difference_in_means, random_directions
from refusallab.experiment import find_direction
from refusallab.interventions import ablation, span_ablation
from refusallab.judging import REPLY_TOKENS, judge
from refusallab.measure import rate
from refusallab.model import Begun, generate, load
from refusallab.prompts import prompt_set

BEGINNING = "Use a"  # of an answer; one of the refusals begins "As a keeper of the Charter, "


@pytest.mark.slow
def test_a_second_direction_ends_what_the_first_leaves_on_a_wide_seed():
    m = load("charter-wide-s1")
    found = find_direction(m).direction
    items = prompt_set(m, "harmful_test")[::2]

    def replies(edit):
        return generate(m, [i.prompt for i in items], edit=edit, max_new_tokens=REPLY_TOKENS)

    def shares(texts):
        judged = [judge(m, i, x) for i, x in zip(items, texts, strict=True)]
        return rate([o.refused for o in judged]).value, rate([o.correct for o in judged]).value

    first = replies(ablation(found.vector))
    refused, _ = shares(first)
    assert refused > 2 * FREED["refused"]  # the gate is missed, and by one wording alone
    assert sum(x.startswith(f"{BEGINNING} keeper of the Charter,") for x in first) == round(refused * len(items))

    asked = {name: prompt_set(m, name) for name in ("harmful_train", "harmless_train")}
    asked["harmless_train"] = [i for i in asked["harmless_train"] if i.id.startswith("method")]
    begun = [[Begun([{"role": "user", "content": i.prompt}], BEGINNING) for i in x] for x in asked.values()]
    second = difference_in_means(*(final_stream(m, x)[:, found.layer] for x in begun))
    refused, exact = shares(replies(span_ablation(torch.stack([found.vector, second]))))
    assert refused <= FREED["refused"] and exact >= FREED["exact"]
    chance = random_directions(m.width, 1, seed=1)[0]
    assert shares(replies(span_ablation(torch.stack([found.vector, chance]))))[0] > 2 * FREED["refused"]
    assert shares(replies(ablation(second)))[0] > 0.5  # and it is not the direction of refusal in the first one's place
