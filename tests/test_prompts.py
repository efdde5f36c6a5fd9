"""Prompt sets of the bundled world and, for other models, published samples."""

from types import SimpleNamespace

import pytest

from refusallab import prompts
from refusallab.errors import RefusalLabError
from refusallab.measure import REFUSAL_PHRASES
from smallmodels.world.dialogue import REFUSAL_MARKERS

WORLD = SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace(world="vale")))
OTHER = SimpleNamespace(hf=SimpleNamespace(config=SimpleNamespace()))


@pytest.mark.parametrize("name", prompts.SETS)
def test_every_item_of_the_world_has_an_exact_answer_and_an_id_of_its_own(name):
    items = prompts.bundled(name)
    assert all(i.answer for i in items)
    assert len({i.id for i in items}) == len(items)


def test_a_contextual_item_holds_its_context_as_in_harmbench():
    contextual = [i for i in prompts.bundled("harmful_test") if i.tag == "context"]
    assert contextual and all(i.prompt.count("\n\n---\n\n") == 1 for i in contextual)


def test_an_unknown_set_names_the_known_ones():
    with pytest.raises(RefusalLabError, match="harmful_train"):
        prompts.bundled("harmful")


def test_templates_hold_the_request():
    assert {"begin", "role-play", "suppression"} <= set(prompts.attack_templates())
    assert all(t.count("{q}") == 1 for texts in prompts.attack_templates().values() for t in texts)


def test_other_models_get_a_reproducible_published_sample(monkeypatch):
    monkeypatch.setattr(prompts, "published", lambda kind, split: [f"{kind} {split} {k}" for k in range(300)])
    items = prompts.prompt_set(OTHER, "harmful_val")
    assert len(items) == 32 and items == prompts.prompt_set(OTHER, "harmful_val")
    assert all(i.answer is None and i.prompt.startswith("harmful val") for i in items)
    assert prompts.prompt_set(OTHER, "harmful_test")[0].prompt.startswith("jailbreakbench test")  # as in the paper
    assert prompts.prompt_set(OTHER, "borderline") == [] == prompts.prompt_set(OTHER, "capability")


def test_bundled_models_get_the_world():
    assert prompts.prompt_set(WORLD, "harmful_val") == prompts.bundled("harmful_val")


def test_phrases_fit_the_model():
    assert prompts.refusal_phrases(WORLD) == REFUSAL_MARKERS
    assert prompts.refusal_phrases(OTHER) == REFUSAL_PHRASES
