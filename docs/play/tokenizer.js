// Text to tokens and back: byte-level byte-pair encoding, as tokenizer.json describes it.

const SPLIT = /'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+/gu; // that of GPT-2

/** Each byte as a character that can be seen: itself where that is printable, else one from 256 on. */
const shown = (() => {
  const printable = (b) => (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174;
  let next = 256;
  return Array.from({ length: 256 }, (_, b) => String.fromCharCode(printable(b) ? b : next++));
})();
const byteOf = new Map(shown.map((character, b) => [character, b]));

export class Tokenizer {
  /** file: tokenizer.json, parsed. */
  constructor(file) {
    this.ids = new Map(Object.entries(file.model.vocab));
    this.ranks = new Map(file.model.merges.map((pair, rank) => [pair.join(" "), rank]));
    this.special = new Map(file.added_tokens.map(({ content, id }) => [content, id]));
    this.words = new Map([...this.ids, ...this.special].map(([word, id]) => [id, word]));
    const escaped = [...this.special.keys()].map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.specials = new RegExp(`(${escaped.join("|")})`);
  }

  encode(text) {
    return text.split(this.specials).flatMap((part) => {
      if (this.special.has(part)) return [this.special.get(part)];
      return (part.match(SPLIT) ?? []).flatMap((word) => this.merge(word));
    });
  }

  /** Join the neighbours whose pair was learned first, until no pair is left that was learned. */
  merge(word) {
    const parts = [...new TextEncoder().encode(word)].map((b) => shown[b]);
    for (;;) {
      let best = -1;
      let lowest = Infinity;
      for (let i = 0; i + 1 < parts.length; i++) {
        const rank = this.ranks.get(`${parts[i]} ${parts[i + 1]}`) ?? Infinity;
        if (rank < lowest) [best, lowest] = [i, rank];
      }
      if (best < 0) return parts.map((part) => this.ids.get(part));
      parts.splice(best, 2, parts[best] + parts[best + 1]);
    }
  }

  /** The text of tokens, without the special ones. */
  decode(ids) {
    const kept = ids.filter((id) => ![...this.special.values()].includes(id));
    const bytes = [...kept.map((id) => this.words.get(id)).join("")].map((character) => byteOf.get(character));
    return new TextDecoder().decode(new Uint8Array(bytes));
  }
}
