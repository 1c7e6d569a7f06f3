import { Problem } from '../problem.ts'
import { inside, readOid, tags, whole, type Element } from './der.ts'

/** One GeneralName (RFC 5280 §4.2.1.6). Text is ASCII; `directory` is a Name, DER; `other` covers the kinds that nothing here interprets. */
export type GeneralName =
  | { readonly kind: 'dns' | 'email' | 'uri'; readonly text: string }
  | { readonly kind: 'ip'; readonly bytes: Uint8Array }
  | { readonly kind: 'directory'; readonly name: Uint8Array }
  | { readonly kind: 'other'; readonly tag: number }

const fail = (what: string): never => {
  throw new Problem('malformed', `name: ${what}`, { reason: 'x509.name' })
}

const ascii = (bytes: Uint8Array): string =>
  bytes.some((byte) => byte < 0x21 || byte > 0x7e) ? fail('characters beyond printable ASCII') : new TextDecoder('latin1').decode(bytes)

/** Reads a GeneralName; throws Problem('malformed'). */
export const readGeneralName = (element: Element): GeneralName => {
  switch (element.tag) {
    case 0x81:
      return { kind: 'email', text: ascii(element.content) }
    case 0x82:
      return { kind: 'dns', text: ascii(element.content) }
    case 0x86:
      return { kind: 'uri', text: ascii(element.content) }
    case 0x87:
      return { kind: 'ip', bytes: element.content }
    case 0xa4:
      return { kind: 'directory', name: whole(element.content, tags.sequence).bytes }
    case 0xa0:
    case 0xa3:
    case 0xa5:
    case 0x88:
      return { kind: 'other', tag: element.tag }
    default:
      return fail(`tag ${element.tag.toString(16)}`)
  }
}

const label = /^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/i

/** Preferred name syntax (RFC 1034 §3.5): no address, no underscore; a wildcard only as the whole first label. */
export const isHostName = (text: string): boolean => {
  const labels = text.split('.')
  const plain = labels[0] === '*' ? labels.slice(1) : labels
  return text.length <= 253 && plain.length > 0 && plain.every((one) => label.test(one)) && !/^\d+$/.test(plain.at(-1) ?? '')
}

/** Whether the name may stand in a subjectAltName (RFC 5280 §4.2.1.6). */
export const isWellFormed = (name: GeneralName): boolean => {
  switch (name.kind) {
    case 'dns':
      return isHostName(name.text)
    case 'email':
      return /^[^@]+@[^@]+$/.test(name.text) && isHostName(name.text.slice(name.text.indexOf('@') + 1))
    case 'uri':
      return /^[a-z][a-z0-9+.-]*:/i.test(name.text)
    case 'ip':
      return name.bytes.length === 4 || name.bytes.length === 16
    case 'directory':
    case 'other':
      return true
  }
}

/** One attribute of a distinguished name. */
export interface NameAttribute {
  readonly type: string
  /** Case folded, white space collapsed where it is a string (RFC 5280 §7.1); hexadecimal where it is not. */
  readonly value: string
}

const strings: ReadonlySet<number> = new Set([tags.utf8, tags.printable, tags.ia5])

/** Relative distinguished names of a Name (DER), in order, each with its attributes sorted. Throws Problem('malformed'). */
export const readName = (name: Uint8Array): readonly (readonly NameAttribute[])[] => {
  const rdns = inside(whole(name, tags.sequence))
  const found: NameAttribute[][] = []
  while (!rdns.done) {
    if (found.length >= 32) fail('more than 32 parts')
    const attributes = rdns.enter(tags.set)
    const rdn: NameAttribute[] = []
    while (!attributes.done) {
      const attribute = attributes.enter(tags.sequence)
      const type = readOid(attribute.next(tags.oid))
      const value = attribute.next()
      attribute.end()
      const text = new TextDecoder('utf-8').decode(value.content)
      rdn.push({ type, value: strings.has(value.tag) ? text.trim().replace(/\s+/g, ' ').toLowerCase() : Buffer.from(value.bytes).toString('hex') })
    }
    if (rdn.length === 0) fail('an empty part')
    found.push(rdn.toSorted((a, b) => (`${a.type} ${a.value}` < `${b.type} ${b.value}` ? -1 : 1)))
  }
  return found
}
