import { Problem } from '@fleetkey/protocol/problem.ts'

/** Deeper than anything that is asked for. */
const maxDepth = 16
/** Values and structures of one body: the largest order, a list of 100,000 denied chips, has about 300,000. */
const maxParts = 400_000

const [quote, backslash, comma, opens, closes] = [0x22, 0x5c, 0x2c, [0x7b, 0x5b], [0x7d, 0x5d]]

/** Whether the quote at this place ends its text: an even number of backslashes stands before it. */
const ends = (bytes: Buffer, at: number): boolean => {
  let before = at
  while (bytes[before - 1] === backslash) before--
  return (at - before) % 2 === 0
}

/**
 * How much there is to build is counted before anything of it is built: 24 MB of empty lists take hundreds of megabytes and seconds in which nobody else is
 * served. Looks at each byte outside of texts once, and gives up at the bound.
 */
const mustBeSmall = (bytes: Buffer): void => {
  let [depth, parts] = [0, 0]
  for (let at = 0; at < bytes.length; at++) {
    const byte = bytes[at] ?? 0
    if (byte === quote) {
      do at = bytes.indexOf(quote, at + 1)
      while (at !== -1 && !ends(bytes, at))
      // A text without an end is no JSON.
      if (at === -1) return
    } else if (byte === comma) parts++
    else if (opens.includes(byte)) [depth, parts] = [depth + 1, parts + 1]
    else if (closes.includes(byte)) depth--
    if (depth > maxDepth || parts > maxParts) throw new Problem('malformed', `a body of more than ${maxParts} values, or deeper than ${maxDepth}`)
  }
}

/** A body as JSON; an empty one is an empty object. Throws Problem('malformed'). */
export const jsonIn = (bytes: Buffer): unknown => {
  if (bytes.length === 0) return {}
  mustBeSmall(bytes)
  try {
    return JSON.parse(bytes.toString('utf8'))
  } catch (cause) {
    throw new Problem('malformed', 'the body is not JSON', { cause })
  }
}
