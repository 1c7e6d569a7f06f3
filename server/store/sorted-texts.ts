/** UTF-8 byte order, as databases compare. UTF-16 order is the same once surrogates sort above everything else. */
export const byBytes = (a: string, b: string): number => {
  const length = Math.min(a.length, b.length)
  for (let at = 0; at < length; at++) {
    const [one, other] = [a.charCodeAt(at), b.charCodeAt(at)]
    if (one !== other) return rank(one) - rank(other)
  }
  return a.length - b.length
}
const rank = (unit: number): number => (unit < 0xd800 ? unit : unit < 0xe000 ? unit + 0x2000 : unit - 0x800)

/** Texts of one chunk: what an insertion moves at most. */
const most = 1024

/** Texts in byte order, each once; insertion, removal and search touch one chunk. */
export class SortedTexts {
  /** None is empty. */
  readonly #chunks: string[][] = []

  constructor(texts: readonly string[]) {
    const sorted = texts.toSorted(byBytes)
    for (let at = 0; at < sorted.length; at += most / 2) this.#chunks.push(sorted.slice(at, at + most / 2))
  }

  /** Index of the first item that is not below `bound`, by the text that `textOf` gives of it. */
  static #search<I>(items: readonly I[], bound: string, textOf: (item: I) => string): number {
    let low = 0
    for (let high = items.length; low < high;) {
      const middle = (low + high) >> 1
      if (byBytes(textOf(items[middle] as I), bound) < 0) low = middle + 1
      else high = middle
    }
    return low
  }

  /** Chunk and place of the first text that is not below `bound`. */
  #place(bound: string): readonly [chunk: number, at: number] {
    const chunk = SortedTexts.#search(this.#chunks, bound, (texts) => texts.at(-1) as string)
    return [chunk, SortedTexts.#search(this.#chunks[chunk] ?? [], bound, (text) => text)]
  }

  add(text: string): void {
    if (this.#chunks.length === 0) return void this.#chunks.push([text])
    const [found, at] = this.#place(text)
    const chunk = Math.min(found, this.#chunks.length - 1)
    const texts = this.#chunks[chunk] as string[]
    if (found === chunk && texts[at] === text) return
    texts.splice(found === chunk ? at : texts.length, 0, text)
    if (texts.length > most) this.#chunks.splice(chunk + 1, 0, texts.splice(texts.length >> 1))
  }

  remove(text: string): void {
    const [chunk, at] = this.#place(text)
    const texts = this.#chunks[chunk]
    if (texts?.[at] !== text) return
    texts.splice(at, 1)
    if (texts.length === 0) this.#chunks.splice(chunk, 1)
  }

  /** Ascending, from the first that is not below `bound`. */
  *from(bound: string): Generator<string, void> {
    const [first, start] = this.#place(bound)
    for (let chunk = first; chunk < this.#chunks.length; chunk++)
      for (let at = chunk === first ? start : 0, texts = this.#chunks[chunk] as string[]; at < texts.length; at++) yield texts[at] as string
  }
}
