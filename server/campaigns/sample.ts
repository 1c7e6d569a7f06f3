import { createHash } from 'node:crypto'
import { waveEnds, type WaveEnd } from './campaign.ts'

const parts = 1 << 12
const bits = 48

/** Where a device stands among the targets of a campaign, in an order that nobody chose: waves are fair samples. Below 2^48, by hash. */
export const drawOf = (campaign: string, device: string): number =>
  createHash('sha256')
    .update(`${campaign}/${device}`)
    .digest()
    .readUIntBE(0, bits / 8)

/** The draws of all targets of a campaign, from which it follows where each wave ends. Eight bytes each, in parts that are few enough to be sorted in no time. */
export class Sample {
  readonly #parts = Array.from({ length: parts }, (): number[] => [])
  #size = 0

  add(draw: number): void {
    this.#parts[Math.floor(draw / (2 ** bits / parts))]?.push(draw)
    this.#size++
  }

  /** The least draw of each wave after the first; Infinity: nobody is in it. */
  bounds(waves: readonly WaveEnd[]): readonly number[] {
    return waveEnds(waves, this.#size)
      .slice(0, -1)
      .map((end) => this.#at(end))
  }

  /** The draw at this place among all, ascending. */
  #at(place: number): number {
    let before = 0
    for (const part of this.#parts) {
      if (place < before + part.length) return part.toSorted((one, other) => one - other)[place - before] ?? Infinity
      before += part.length
    }
    return Infinity
  }
}

/** 0-based wave of a draw. `bounds`: of the sample that it is from. */
export const waveAt = (bounds: readonly number[], draw: number): number => bounds.filter((bound) => draw >= bound).length
