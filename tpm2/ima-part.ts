import { concat } from './bytes.ts'
import { imaPcr } from './ima.ts'

/** Some whole entries of a measurement list. */
export interface ImaPart {
  readonly list: Uint8Array
  /** Whether the list ended with them when it was read. */
  readonly ended: boolean
}

const headSize = 28
const maxName = 32
const maxData = 16 << 10

/**
 * Length of the record that `bytes` start with; undefined when more bytes must be seen to know, null for what is no record of templates ima-ng or ima-sig.
 * Only lengths are read: what the entry says is the verifier's to judge.
 */
const recordLength = (bytes: Uint8Array): number | null | undefined => {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.length)
  if (bytes.length < headSize) return undefined
  const name = view.getUint32(headSize - 4, true)
  if (view.getUint32(0, true) !== imaPcr || name > maxName) return null
  if (bytes.length < headSize + name + 4) return undefined
  const data = view.getUint32(headSize + name, true)
  return data > maxData ? null : headSize + name + 4 + data
}

/**
 * The entries of a binary measurement list from number `from` on, as many whole ones as `max` bytes hold. The list comes in pieces of any size and is not kept: a
 * machine that has run for a year has a long one. What cannot be cut into entries is given as it stands, so that the verifier names what is wrong with it.
 */
export const imaPart = async (pieces: AsyncIterable<Uint8Array>, from: number, max: number): Promise<ImaPart> => {
  const kept: Uint8Array[] = []
  let size = 0
  let at = 0
  let rest: Uint8Array = new Uint8Array(0)
  const result = (ended: boolean): ImaPart => ({ list: concat(...kept), ended })
  for await (const piece of pieces) {
    rest = rest.length === 0 ? Uint8Array.from(piece) : concat(rest, piece)
    for (;;) {
      const length = recordLength(rest)
      if (length === undefined || (length !== null && length > rest.length)) break
      const record = length === null ? rest : rest.subarray(0, length)
      if (size + record.length > max) return result(false)
      if (at >= from || length === null) {
        kept.push(record)
        size += record.length
      }
      if (length === null) return result(false)
      at++
      rest = rest.subarray(length)
    }
  }
  // A record that the list breaks off in.
  if (rest.length > 0 && size + rest.length <= max) kept.push(rest)
  return result(true)
}
