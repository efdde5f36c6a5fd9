// The page: what is typed, chosen and shown. The model is in model.js.

import { edits, dot, likeliest, Llama, norm, readSafetensors, refusalMetric } from "./model.js";
import { Tokenizer } from "./tokenizer.js";

const MAX_REPLY = 40; // tokens
const $ = (id) => document.getElementById(id);
const chosen = (name) => document.querySelector(`input[name="${name}"]:checked`).value;
const pause = () => new Promise((resolve) => setTimeout(resolve));

/** A file of the page: from beside it or, in the one-file form, from inside. */
async function file(name) {
  const inside = globalThis.FILES?.[name];
  const response = await fetch(inside ? `data:application/octet-stream;base64,${inside}` : name);
  if (!response.ok) throw new Error(`${name} could not be read (${response.status}): load the page again.`);
  return response;
}

const data = await (await file("play.json")).json();
const tokenizer = new Tokenizer(await (await file("tokenizer.json")).json());
const vectors = readSafetensors(await (await file("directions.safetensors")).arrayBuffer());
const loaded = new Map();

async function model(name) {
  if (!loaded.has(name)) {
    const tensors = readSafetensors(await (await file(`${name}.safetensors`)).arrayBuffer());
    loaded.set(name, new Llama(data.models[name].config, tensors));
  }
  return loaded.get(name);
}

/** The prompt as the chat template writes it. */
const prompt = (text) => tokenizer.encode(data.template[0] + text + data.template[1]);

/** The difference in means at a site. */
function means(layer, position) {
  const { shape: [, positions, width], data: all } = vectors.means;
  const at = (layer * positions + positions + position) * width;
  return all.slice(at, at + width);
}

const LARGEST = norm(means(data.selected.layer, data.selected.position)); // of a projection, for the colours

/** The direction of the controls, and its site. */
function direction() {
  const [layer, position] = [Number($("layer").value), Number($("position").value)];
  let vector = means(layer, position);
  const width = vector.length;
  if (chosen("which") === "random") {
    const row = Math.min(20, Math.max(1, Math.round(Number($("seed").value)) || 1)) - 1;
    const unit = vectors.random.data.slice(row * width, (row + 1) * width);
    vector = unit.map((value) => value * norm(vector));
  }
  return { vector, layer, position };
}

function edit({ vector, layer }) {
  const strength = Number($("strength").value);
  if (chosen("edit") === "none" || norm(vector) === 0) return null;
  return chosen("edit") === "ablate" ? edits.ablate(vector, strength) : edits.add(vector, layer, strength);
}

/** Read a prompt: the scores of the next token, and all streams [token][layer]. */
function read(llama, tokens, change, cache = llama.start()) {
  let last;
  const streams = tokens.map((token) => {
    const result = llama.read(token, cache, change);
    last = result.last;
    return [...result.streams, last];
  });
  return { logits: llama.logits(last), streams, cache };
}

let run = 0; // what is still being computed for an older state of the page stops when this goes up
let known = new Map(); // numbers of the same words under the same edit

function state() {
  return [$("model").value, chosen("edit"), chosen("which"), $("seed").value, $("strength").value, $("layer").value, $("position").value];
}

/** The reply, token by token; then the strip of the prompt. */
async function ask() {
  const mine = ++run;
  const llama = await model($("model").value);
  const site = direction();
  const change = edit(site);
  const tokens = prompt($("text").value);
  if (tokens.length + MAX_REPLY > llama.context) {
    $("reply").textContent = "This message is too long for the model: shorten it.";
    return;
  }
  let { logits, streams, cache } = read(llama, tokens, change);
  strip(tokens, streams, site.vector);
  const reply = [];
  $("reply").textContent = "";
  while (reply.length < MAX_REPLY) {
    const next = likeliest(logits);
    if (next === llama.end) break;
    reply.push(next);
    $("reply").textContent = tokenizer.decode(reply);
    await pause();
    if (mine !== run) return;
    logits = llama.logits(llama.read(next, cache, change).last);
  }
  $("reply").dataset.tokens = reply.join(" ");
}

/** Metric and projection after every word. */
async function words() {
  const mine = run;
  const llama = await model($("model").value);
  const site = direction();
  const change = edit(site);
  const text = $("text").value.trim().split(/\s+/).filter(Boolean);
  const rows = [];
  for (let k = 1; k <= text.length; k++) {
    const start = text.slice(0, k).join(" ");
    const key = [...state(), start].join("|");
    if (!known.has(key)) {
      const tokens = prompt(start);
      const { logits, streams } = read(llama, tokens, change);
      const stream = streams[tokens.length + site.position][site.layer];
      const along = norm(site.vector) ? dot(stream, site.vector) / norm(site.vector) : 0;
      known.set(key, [refusalMetric(logits, data.tokens), along]);
      await pause();
      if (mine !== run) return;
    }
    rows.push([text[k - 1], ...known.get(key)]);
  }
  $("words").tBodies[0].replaceChildren(...rows.map(wordRow));
}

function wordRow([word, metric, along]) {
  const row = document.createElement("tr");
  const p = 1 / (1 + Math.exp(-metric));
  for (const value of [word, metric.toFixed(1), p.toFixed(2), along.toFixed(1)]) {
    row.insertCell().textContent = value === "-0.0" ? "0.0" : value;
  }
  const bar = document.createElement("span");
  bar.className = "bar";
  bar.style.width = `${p * 6}rem`;
  row.cells[2].className = "bars";
  row.cells[2].prepend(bar);
  return row;
}

/** Orange above 0, blue below; white or black letters, whichever can be read. */
function colour(share) {
  const far = Math.min(1, Math.abs(share));
  const to = share > 0 ? [180, 83, 9] : [11, 92, 171];
  const rgb = to.map((c) => Math.round(255 + (c - 255) * far));
  const light = 0.2126 * (rgb[0] / 255) ** 2.2 + 0.7152 * (rgb[1] / 255) ** 2.2 + 0.0722 * (rgb[2] / 255) ** 2.2;
  return { background: `rgb(${rgb})`, color: light > 0.18 ? "#000000" : "#ffffff" };
}

/** One scale of colours for all edits and directions, so that what is gone looks gone. */
function strip(tokens, streams, vector) {
  const along = streams.map((layers) => layers.map((x) => (norm(vector) ? dot(x, vector) / norm(vector) : 0)));
  const table = $("strip");
  table.tHead?.remove();
  [...table.tBodies].forEach((body) => body.remove());
  const head = table.createTHead().insertRow();
  head.append(cell("layer"));
  tokens.forEach((token) => head.append(cell(tokenizer.words.get(token).replace("Ġ", "␣").replace("Ċ", "⏎"))));
  const body = table.createTBody();
  for (let layer = along[0].length - 1; layer >= 0; layer--) {
    const row = body.insertRow();
    row.append(cell(layer === along[0].length - 1 ? "end" : String(layer), "row"));
    along.forEach((layers) => {
      const td = row.insertCell();
      td.textContent = layers[layer].toFixed(1).replace("-0.0", "0.0");
      Object.assign(td.style, colour(layers[layer] / LARGEST));
    });
  }
}

function cell(text, scope = "col") {
  const th = document.createElement("th");
  th.scope = scope;
  th.textContent = text;
  return th;
}

/** Everything that depends on the controls. */
async function refresh() {
  run += 1;
  $("explained").textContent = "";
  const adds = chosen("edit") === "add";
  Object.assign($("strength"), adds ? { min: -2, max: 2 } : { min: 0, max: 1 });
  const strength = Number($("strength").value);
  $("strength-value").textContent = adds ? `${strength.toFixed(2)} lengths` : `${Math.round(100 * strength)} %`;
  $("strength").disabled = chosen("edit") === "none";
  $("seed").disabled = chosen("which") !== "random";
  $("about").textContent = data.models[$("model").value].about;
  const site = direction();
  const best = site.layer === data.selected.layer && site.position === data.selected.position;
  const length = norm(site.vector).toFixed(1);
  $("site").textContent = norm(site.vector) === 0
    ? "At layer 0 every prompt has the same vector there, so this direction is zero and does nothing."
    : chosen("which") === "random"
      ? `A random direction of length ${length}. When it is removed, only its axis counts; when it is added, its length and layer, too.`
      : `Length ${length}, found on charter-chat. ${best ? "The selection rule of the paper takes this one." : ""}`;
  const asked = ask();
  await words();
  await asked;
}

const steps = {
  refuses: [{ edit: "none", which: "means" }, "The untouched model refuses."],
  removed: [{ edit: "ablate", which: "means" },
    "Without its component along one direction the model answers. Nothing was trained, and no weight changed. " +
    "Is the answer right? Choose \"helpful only\" as the model, which never refuses, and compare."],
  random: [{ edit: "ablate", which: "random" },
    "Without a random direction it refuses as before. One random direction is one example: try other seeds."],
};

async function guide(name) {
  const [settings, text] = steps[name];
  for (const [field, value] of Object.entries(settings)) {
    document.querySelector(`input[name="${field}"][value="${value}"]`).checked = true;
  }
  $("model").value = "charter-chat";
  $("layer").value = data.selected.layer;
  $("position").value = data.selected.position;
  $("text").value = data.prompts[0].text;
  $("prompts").value = data.prompts[0].text;
  $("strength").value = 1;
  await refresh();
  $("explained").textContent = text;
}

function fill(select, entries) {
  select.replaceChildren(...entries.map(([value, label]) => new Option(label, value)));
}

fill($("model"), Object.entries(data.models).map(([name, { label }]) => [name, label]));
const kinds = [...new Set(data.prompts.map(({ kind }) => kind))];
$("prompts").replaceChildren(...kinds.map((kind) => {
  const group = document.createElement("optgroup");
  group.label = kind;
  group.append(...data.prompts.filter((p) => p.kind === kind).map(({ text }) => new Option(text, text)));
  return group;
}));
const [layers, positions] = vectors.means.shape;
fill($("layer"), Array.from({ length: layers }, (_, i) => [i, String(i)]));
fill($("position"), Array.from({ length: positions }, (_, i) => [i - positions, `${i - positions} ${data.positions[i]}`]));
$("layer").value = data.selected.layer;
$("position").value = data.selected.position;
if (new URLSearchParams(location.search).has("embed")) document.body.classList.add("embedded");

$("chat").addEventListener("submit", (event) => { event.preventDefault(); refresh(); });
$("prompts").addEventListener("change", () => { $("text").value = $("prompts").value; refresh(); });
$("text").addEventListener("input", () => {
  run += 1;
  $("explained").textContent = "";
  $("reply").textContent = "(press Ask)";
  words();
});
for (const id of ["model", "seed", "strength", "layer", "position"]) $(id).addEventListener("input", refresh);
document.querySelectorAll('input[type="radio"]').forEach((radio) => radio.addEventListener("change", refresh));
document.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => guide(button.dataset.step)));
globalThis.play = { edits, likeliest, model, prompt, read, refusalMetric, tokenizer, vectors }; // for the console, and tests
await guide("refuses");
document.body.dataset.ready = "yes";
