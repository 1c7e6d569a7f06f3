import { concat, u16, u32 } from './bytes.ts'
import { digest } from './kdf.ts'
import { parsePublic } from './structures.ts'

/**
 * Name of an object (Part 1 §16): nameAlg ‖ H(TPMT_PUBLIC). Computed here from the public area, never taken from a device. `nameAlg`: that of the area, for
 * who has read it already.
 */
export const nameOf = (publicBytes: Uint8Array, nameAlg: number = parsePublic(publicBytes).nameAlg): Uint8Array =>
  concat(u16(nameAlg), digest(nameAlg, publicBytes))

/** Qualified Name (Part 1 §16): of a child of `parent` (the parent's qualified Name), or of a primary below a hierarchy handle. */
export const qualifiedName = (parent: Uint8Array | number, name: Uint8Array): Uint8Array => {
  const hash = (name[0] ?? 0) * 256 + (name[1] ?? 0)
  return concat(u16(hash), digest(hash, typeof parent === 'number' ? u32(parent) : parent, name))
}
