import { Problem } from '../problem.ts'
import { inside, readOid, tags, whole, type Element } from './der.ts'

/** One attribute of a Name (RFC 5280 §4.1.2.4); `rdn` counts the relative names from the first. */
export interface NameAttribute {
  readonly type: string
  readonly value: string
  readonly rdn: number
}

const teletex = 0x14
const universal = 0x1c
const bmp = 0x1e

const fail = (what: string): never => {
  throw new Problem('malformed', `name: ${what}`, { reason: 'x509.certificate' })
}

/** The text of a DirectoryString or IA5String, as OpenSSL reads it too (T61 as Latin-1). */
const textOf = ({ tag, content }: Element): string => {
  switch (tag) {
    case tags.utf8:
      return decoded('utf-8', content)
    case tags.printable:
    case tags.ia5:
      return content.every((byte) => byte < 0x80) ? decoded('utf-8', content) : fail('a string with bytes beyond ASCII')
    case teletex:
      return Buffer.from(content).toString('latin1')
    case bmp:
      return decoded('utf-16be', content)
    case universal:
      return fail('a UniversalString')
    default:
      return fail('an attribute that is no string')
  }
}

const decoders = {
  'utf-8': new TextDecoder('utf-8', { fatal: true, ignoreBOM: true }),
  'utf-16be': new TextDecoder('utf-16be', { fatal: true, ignoreBOM: true }),
} as const

const decoded = (encoding: keyof typeof decoders, content: Uint8Array): string => {
  try {
    return decoders[encoding].decode(content)
  } catch (cause) {
    throw new Problem('malformed', `name: not ${encoding}`, { reason: 'x509.certificate', cause })
  }
}

/** Attributes of a Name (DER), in order, at most 32. Throws Problem('malformed'). */
export const nameAttributes = (name: Uint8Array): readonly NameAttribute[] => {
  const rdns = inside(whole(name, tags.sequence))
  const found: NameAttribute[] = []
  for (let rdn = 0; !rdns.done; rdn++) {
    const attributes = rdns.enter(tags.set)
    if (attributes.done) fail('an empty relative name')
    while (!attributes.done) {
      if (found.length >= 32) fail('more than 32 attributes')
      const attribute = attributes.enter(tags.sequence)
      const type = readOid(attribute.next(tags.oid))
      found.push({ type, value: textOf(attribute.next()), rdn })
      attribute.end()
    }
  }
  return found
}

/** [4] of GeneralName: a directoryName, explicit because a Name is a CHOICE (X.680 §31.2.7). */
export const directoryNameTag = 0xa4

/** The Names among the GeneralNames of a subjectAltName (RFC 5280 §4.2.1.6). */
export const directoryNames = (altNames: readonly Uint8Array[]): readonly (readonly NameAttribute[])[] =>
  altNames.filter(([tag]) => tag === directoryNameTag).map((name) => nameAttributes(whole(name, directoryNameTag).content))
