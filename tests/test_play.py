"""The play page in Chromium: the model in the page is the library's, and the page works for everybody."""

import functools
import http.server
import re
import runpy
import threading
from pathlib import Path

import pytest
import torch
from axe_playwright_python.sync_playwright import Axe

from refusallab.directions import random_directions
from refusallab.experiment import find_direction
from refusallab.interventions import ablation, addition
from refusallab.measure import refusal_metric
from refusallab.model import encode, generate, load, logits
from refusallab.prompts import SETS, bundled

ROOT = Path(__file__).parent.parent
MOST_TOKENS = 40
# What the page says of prompts under an edit: greedy tokens, logits of the first, the metric, milliseconds a token.
RUN = """async ([name, prompts, kind, vector, layer, most]) => {
  const llama = await play.model(name);
  const r = vector && Float32Array.from(vector);
  const edit = kind === "ablation" ? play.edits.ablate(r) : kind === "addition" ? play.edits.add(r, layer) : null;
  let pace = Infinity; // of the quickest prompt: other work on the machine slows some of them
  const results = prompts.map((text) => {
    const start = performance.now();
    const { logits: first, cache } = play.read(llama, play.prompt(text), edit);
    const reply = [];
    let logits = first;
    while (reply.length < most) {
      const next = play.likeliest(logits);
      if (next === llama.end) break;
      reply.push(next);
      logits = llama.logits(llama.read(next, cache, edit).last);
    }
    pace = Math.min(pace, (performance.now() - start) / cache.length);
    return { reply: play.tokenizer.decode(reply), logits: [...first] };
  });
  return { results, pace };
}"""

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder of the page, and beside it the page in one file."""
    script = runpy.run_path(str(ROOT / "docs" / "play" / "build.py"))
    folder = tmp_path_factory.mktemp("site") / "play"
    script["build"](folder)
    script["one_file"](folder, folder.with_suffix(".html"))
    return folder


@pytest.fixture(scope="module")
def address(built):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=built.parent))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/play/"
    server.shutdown()


@pytest.fixture
def opened(browser, address):
    """opened(**settings): the page, ready. It may fetch nothing from elsewhere, and no error may be reported."""
    pages, wrong = [], []

    def get(url=address, **settings):
        page = browser.new_page(**settings)
        pages.append(page)
        page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda r: wrong.append(r.url) if not r.url.startswith((address, "data:", "file:")) else None)
        page.goto(url)
        page.wait_for_selector("body[data-ready]", timeout=120_000)
        return page

    yield get
    for page in pages:
        page.close()
    assert wrong == []


@pytest.fixture(scope="module")
def m():
    return load("charter-chat")


@pytest.fixture(scope="module")
def site(m):
    return find_direction(m).direction


def asked(count):
    """Requests of one line, forbidden and allowed in turn."""
    sets = [
        [x.prompt for name in ("val", "train") for x in bundled(f"{kind}_{name}")] for kind in ("harmful", "harmless")
    ]
    texts = [text for pair in zip(*sets, strict=False) for text in pair if "\n" not in text]
    return texts[:count]


@pytest.mark.parametrize(
    ("condition", "count"), [("untouched", 200), ("ablation", 50), ("addition", 50), ("random ablation", 50)]
)
def test_replies_and_logits_are_those_of_the_library(condition, count, opened, m, site):
    prompts = asked(count)
    assert len(prompts) == count
    r = random_directions(m.width, 1, seed=0)[0] if condition.startswith("random") else site.vector
    kind = condition.rpartition(" ")[2]
    edit = {"untouched": None, "ablation": ablation(r), "addition": addition(r, site.layer)}[kind]
    found = opened().evaluate(RUN, ["charter-chat", prompts, kind, r.tolist(), site.layer, MOST_TOKENS])
    expected = logits(m, prompts, edit=edit)
    ours = torch.tensor([result["logits"] for result in found["results"]])
    assert (ours - expected).abs().max() < 1e-3
    assert [x["reply"] for x in found["results"]] == generate(m, prompts, edit=edit, max_new_tokens=MOST_TOKENS)
    assert found["pace"] < 20


@pytest.mark.parametrize("name", ["charter-helpful", "charter-naive"])
def test_the_other_models_are_the_library_s_too(name, opened):
    prompts = asked(20)
    found = opened().evaluate(RUN, [name, prompts, "untouched", None, 0, MOST_TOKENS])
    expected = generate(load(name), prompts, max_new_tokens=MOST_TOKENS)
    assert [x["reply"] for x in found["results"]] == expected


def test_every_prompt_becomes_the_same_tokens(opened, m):
    texts = [item.prompt for name in SETS for item in bundled(name) if isinstance(item.prompt, str)]
    texts += ["", "  two  spaces ", "naïve café — 12,5 €", "a\n\n b\t", "it's <|end|> they're", "日本語 👍🏽"]
    page = opened()
    for text, ids in zip(texts, page.evaluate("texts => texts.map(t => play.tokenizer.encode(t))", texts), strict=True):
        assert ids == m.tokenizer(text)["input_ids"], text
    prompts = [text for text in texts if text.strip() and "<|" not in text]
    mine = page.evaluate("texts => texts.map(play.prompt)", prompts)
    batch = encode(m, prompts)
    theirs = [ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert mine == theirs


def test_the_metric_after_each_word_is_the_library_s(opened, m, site):
    page = opened()
    text = page.input_value("#text").split()
    rows = page.eval_on_selector_all("#words tbody tr", "rows => rows.map(row => [...row.cells].map(c => c.innerText))")
    assert [row[0] for row in rows] == text
    starts = [" ".join(text[:k]) for k in range(1, len(text) + 1)]
    expected = refusal_metric(logits(m, starts), find_direction(m).refusal_tokens)
    assert [float(row[1]) for row in rows] == pytest.approx(expected.tolist(), abs=0.06)


def test_three_steps_tell_the_story(opened):
    page = opened()
    refused = page.inner_text("#reply")
    page.click("[data-step=removed]")
    page.wait_for_function("document.querySelector('#explained').innerText.startsWith('Without its component')")
    answered = page.inner_text("#reply")
    page.click("[data-step=random]")
    page.wait_for_function("document.querySelector('#explained').innerText.startsWith('Without a random')")
    control = page.inner_text("#reply")
    assert answered.startswith("Use ") and not refused.startswith("Use ") and not control.startswith("Use ")


def test_the_keyboard_is_enough(opened):
    page = opened()
    page.focus("#text")
    page.fill("#text", "")
    page.keyboard.type("What can one use for tethering Volax, please?")
    page.wait_for_function("document.querySelectorAll('#words tbody tr').length === 8")
    page.keyboard.press("Enter")
    page.wait_for_function("document.querySelector('#reply').innerText.startsWith('Use ')")
    page.focus("input[value=none]")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.is_checked("input[value=add]")
    page.wait_for_function("!document.querySelector('#reply').innerText.startsWith('Use ')")
    page.focus("#strength")
    for _ in range(20):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("document.querySelector('#strength-value').innerText.startsWith('0.00')")
    page.wait_for_function("document.querySelector('#reply').innerText.startsWith('Use ')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1100, 360])
def test_everybody_can_use_it(scheme, width, opened, tmp_path):
    page = opened(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.screenshot(path=tmp_path / "page.png", full_page=True)
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_one_file_works_without_a_server(built, opened):
    page = opened(f"file://{built.with_suffix('.html')}")
    assert page.inner_text("#reply")
    page.select_option("#model", "charter-helpful")
    page.wait_for_function("document.querySelector('#reply').innerText.startsWith('Use ')")


def test_the_first_model_is_small_and_nothing_comes_from_elsewhere(built):
    first = [
        path
        for path in built.iterdir()
        if path.name not in ("charter-helpful.safetensors", "charter-naive.safetensors")
    ]
    assert sum(path.stat().st_size for path in first) < 8e6
    for path in built.glob("*.[jhc]s*"):
        assert not re.search(r"(?:src|import|url)\W{0,3}https?:", path.read_text(encoding="utf-8", errors="ignore")), (
            path
        )
