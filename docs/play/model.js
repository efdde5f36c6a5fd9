// A small Llama in plain JavaScript, one token at a time, with the residual stream in the open.
//
// x is the residual stream: one vector of `width` numbers. Each block reads it, and adds to it what its attention and
// its MLP write. A direction is removed at three sites of each block: its input, what its attention writes, what its
// MLP writes. It is added at the input of one block. That is all there is to directional ablation and addition
// (Arditi et al. 2024, arXiv 2406.11717, section 2.4).

/** Numbers in half precision, as the weights are stored, to single precision. */
export function fromHalf(halves) {
  const out = new Float32Array(halves.length);
  for (let i = 0; i < halves.length; i++) {
    const h = halves[i];
    const exponent = (h >> 10) & 31;
    const fraction = h & 1023;
    let value;
    if (exponent === 0) value = fraction * 2 ** -24;
    else if (exponent === 31) value = fraction ? NaN : Infinity;
    else value = (1 + fraction / 1024) * 2 ** (exponent - 15);
    out[i] = h & 0x8000 ? -value : value;
  }
  return out;
}

/** The tensors of a safetensors file: name -> { shape, data }. F16 and F32 only. */
export function readSafetensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true));
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const tensors = {};
  delete header.__metadata__;
  for (const [name, { dtype, shape, data_offsets: [start, end] }] of Object.entries(header)) {
    const bytes = buffer.slice(8 + length + start, 8 + length + end);
    if (dtype === "F16") tensors[name] = { shape, data: fromHalf(new Uint16Array(bytes)) };
    else if (dtype === "F32") tensors[name] = { shape, data: new Float32Array(bytes) };
    else throw new Error(`${name} is stored as ${dtype}: this page reads F16 and F32.`);
  }
  return tensors;
}

export function dot(a, b) {
  let sum = 0;
  for (let i = 0; i < a.length; i++) sum += a[i] * b[i];
  return sum;
}

/** W x for W [rows, columns]. */
function multiply({ shape: [rows, columns], data }, x) {
  const out = new Float32Array(rows);
  for (let i = 0, k = 0; i < rows; i++) {
    let sum = 0;
    for (let j = 0; j < columns; j++, k++) sum += data[k] * x[j];
    out[i] = sum;
  }
  return out;
}

function rmsNorm({ data }, x, epsilon) {
  const scale = 1 / Math.sqrt(dot(x, x) / x.length + epsilon);
  return x.map((value, i) => value * scale * data[i]);
}

function add(x, y) {
  for (let i = 0; i < x.length; i++) x[i] += y[i];
}

/** x without `share` of its component along the unit vector. */
function project(x, unit, share) {
  const along = share * dot(x, unit);
  for (let i = 0; i < x.length; i++) x[i] -= along * unit[i];
}

export function norm(r) {
  return Math.sqrt(dot(r, r));
}

/** Turn the pairs (i, i + half) of each head by an angle that grows with the place of the token. */
function rotate(x, place, headDim, theta) {
  const half = headDim / 2;
  for (let start = 0; start < x.length; start += headDim) {
    for (let i = 0; i < half; i++) {
      const angle = place * theta ** ((-2 * i) / headDim);
      const [cos, sin] = [Math.cos(angle), Math.sin(angle)];
      const [a, b] = [x[start + i], x[start + half + i]];
      x[start + i] = a * cos - b * sin;
      x[start + half + i] = b * cos + a * sin;
    }
  }
}

/** What the heads read from earlier tokens: softmax(q . k / sqrt(headDim)) over the values, head by head. */
function attend(q, keys, values, heads, keyHeads, headDim) {
  const out = new Float32Array(heads * headDim);
  for (let head = 0; head < heads; head++) {
    const from = head * headDim;
    const shared = Math.floor((head * keyHeads) / heads) * headDim;
    const scores = keys.map((k) => {
      let sum = 0;
      for (let i = 0; i < headDim; i++) sum += q[from + i] * k[shared + i];
      return sum / Math.sqrt(headDim);
    });
    const largest = Math.max(...scores);
    const weights = scores.map((score) => Math.exp(score - largest));
    const total = weights.reduce((a, b) => a + b);
    values.forEach((v, t) => {
      for (let i = 0; i < headDim; i++) out[from + i] += (weights[t] / total) * v[shared + i];
    });
  }
  return out;
}

/** An edit: { kind: "ablate", unit, share } or { kind: "add", vector, layer }, or null for none. */
export const edits = {
  ablate: (r, share = 1) => ({ kind: "ablate", unit: r.map((value) => value / norm(r)), share }),
  add: (r, layer, coefficient = 1) => ({ kind: "add", vector: r.map((value) => value * coefficient), layer }),
};

export class Llama {
  /** config: config.json; tensors: as from `readSafetensors`. */
  constructor(config, tensors) {
    this.layers = config.num_hidden_layers;
    this.width = config.hidden_size;
    this.heads = config.num_attention_heads;
    this.keyHeads = config.num_key_value_heads;
    this.headDim = config.head_dim;
    this.theta = config.rope_parameters.rope_theta;
    this.epsilon = config.rms_norm_eps;
    this.context = config.max_position_embeddings;
    this.end = config.eos_token_id;
    this.embedding = tensors["model.embed_tokens.weight"];
    this.finalNorm = tensors["model.norm.weight"];
    this.unembedding = tensors["lm_head.weight"] ?? this.embedding;
    this.blocks = Array.from({ length: this.layers }, (_, i) => {
      const weight = (name) => tensors[`model.layers.${i}.${name}.weight`];
      return {
        inputNorm: weight("input_layernorm"),
        q: weight("self_attn.q_proj"),
        k: weight("self_attn.k_proj"),
        v: weight("self_attn.v_proj"),
        o: weight("self_attn.o_proj"),
        middleNorm: weight("post_attention_layernorm"),
        gate: weight("mlp.gate_proj"),
        up: weight("mlp.up_proj"),
        down: weight("mlp.down_proj"),
      };
    });
  }

  /** An empty cache: the keys and values of the tokens so far, block by block. */
  start() {
    return { length: 0, blocks: this.blocks.map(() => ({ keys: [], values: [] })) };
  }

  /** Read one token. Returns the stream that enters each block, and the stream that leaves the last one. */
  read(token, cache, edit = null) {
    const ablated = (x) => {
      if (edit?.kind === "ablate") project(x, edit.unit, edit.share);
      return x;
    };
    const { data } = this.embedding;
    const x = data.slice(token * this.width, (token + 1) * this.width);
    const streams = [];
    this.blocks.forEach((block, layer) => {
      if (edit?.kind === "add" && edit.layer === layer) add(x, edit.vector);
      ablated(x); // site 1: the input of the block
      streams.push(x.slice());
      const past = cache.blocks[layer];
      const read = rmsNorm(block.inputNorm, x, this.epsilon);
      const q = multiply(block.q, read);
      const k = multiply(block.k, read);
      rotate(q, cache.length, this.headDim, this.theta);
      rotate(k, cache.length, this.headDim, this.theta);
      past.keys.push(k);
      past.values.push(multiply(block.v, read));
      const seen = attend(q, past.keys, past.values, this.heads, this.keyHeads, this.headDim);
      add(x, ablated(multiply(block.o, seen))); // site 2: what attention writes
      const middle = rmsNorm(block.middleNorm, x, this.epsilon);
      const up = multiply(block.up, middle);
      const gated = multiply(block.gate, middle).map((z, i) => (z / (1 + Math.exp(-z))) * up[i]);
      add(x, ablated(multiply(block.down, gated))); // site 3: what the MLP writes
    });
    cache.length += 1;
    return { streams, last: x };
  }

  /** The scores of all next tokens, from the stream that leaves the last block. */
  logits(last) {
    return multiply(this.unembedding, rmsNorm(this.finalNorm, last, this.epsilon));
  }
}

export function likeliest(logits) {
  let best = 0;
  for (let i = 1; i < logits.length; i++) if (logits[i] > logits[best]) best = i;
  return best;
}

/** log(p / (1 - p)) for p, the probability that the next token is one of `tokens`. */
export function refusalMetric(logits, tokens, epsilon = 1e-8) {
  const largest = Math.max(...logits);
  let total = 0;
  for (const z of logits) total += Math.exp(z - largest);
  let p = 0;
  for (const token of tokens) p += Math.exp(logits[token] - largest) / total;
  return Math.log(p + epsilon) - Math.log(1 - p + epsilon);
}
