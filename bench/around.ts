import { randomBytes } from 'node:crypto'

/** Randomness and time as the real programs have them. */
export const around = {
  random: (length: number): Uint8Array => new Uint8Array(randomBytes(length)),
  now: (): number => Date.now(),
}
