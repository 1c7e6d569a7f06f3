import { DerProblem, inside, readBoolean, readNamedBits, readOid, tags, whole, type Element } from '../der.ts'
import { isHostName } from '../general-names.ts'
import { keyUsages, oids } from '../oids.ts'
import type { RequestPolicy } from './request.ts'
import { refuseRequest } from './reasons.ts'
import { understood, type RequestStructure } from './structure.ts'

/** What a request asks for. None of it reaches a certificate: it is compared with what the profile gives, and more than that is refused. */
export interface Wishes {
  readonly commonName: string | null
  /** OIDs of attributes and extensions that play no part. */
  readonly ignored: readonly string[]
}

type Extensions = RequestStructure['extensions']

const utf8 = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
const hasControl = (text: string): boolean => {
  for (const char of text) if (char < ' ' || char === '\u007f') return true
  return false
}

const textOf = ({ tag, content }: Element): string => {
  // Mail addresses and domain components are IA5String (RFC 5280 §A.1).
  if (tag !== tags.utf8 && tag !== tags.printable && tag !== tags.ia5) refuseRequest('csr.subject.string', `string type ${tag}`)
  let text: string
  try {
    text = utf8.decode(content)
  } catch (cause) {
    return refuseRequest('csr.subject.encoding', undefined, cause)
  }
  if (tag !== tags.utf8 && content.some((byte) => byte >= 0x80)) refuseRequest('csr.subject.encoding')
  return hasControl(text) ? refuseRequest('csr.subject.control') : text
}

/** Common name, and the types of the other attributes, of a Name (DER). Throws Problem with a reason of `requestReasons`, or DerProblem. */
export const readSubject = (subject: Uint8Array): { commonName: string | null; others: readonly string[] } => {
  const rdns = inside(whole(subject, tags.sequence))
  const others: string[] = []
  let commonName: string | null = null
  while (!rdns.done) {
    const attributes = rdns.enter(tags.set)
    if (attributes.done) refuseRequest('csr.subject', 'an empty relative name')
    while (!attributes.done) {
      const attribute = attributes.enter(tags.sequence)
      const type = readOid(attribute.next(tags.oid))
      const value = attribute.next()
      attribute.end()
      if (others.length >= 16) refuseRequest('csr.subject', 'more than 16 attributes')
      if (type !== oids.commonName) {
        textOf(value)
        others.push(type)
      } else if (commonName !== null) refuseRequest('csr.subject.names')
      else if (value.tag === tags.ia5) refuseRequest('csr.subject.string', 'a common name as IA5String')
      else commonName = textOf(value)
    }
  }
  return { commonName, others }
}

const checkName = (commonName: string, policy: RequestPolicy): void => {
  if (Array.from(commonName).length > 64) refuseRequest('csr.subject.length')
  if (commonName.length === 0) refuseRequest('csr.subject.empty')
  if (!/^[\x20-\x7e]+$/.test(commonName)) refuseRequest('csr.subject.script')
  if (policy.subject !== undefined && commonName !== policy.subject) refuseRequest('csr.subject.other')
}

const elementsOf = (value: Uint8Array): readonly Element[] => {
  const reader = inside(whole(value, tags.sequence))
  const found: Element[] = []
  while (!reader.done) {
    if (found.length >= 32) refuseRequest('csr.extension.value', 'more than 32 entries')
    found.push(reader.next())
  }
  return found.length === 0 ? refuseRequest('csr.extension.value', 'an empty list') : found
}

/** `URI:…`, `DNS:…`, `IP:…` of a GeneralName; anything else is refused. */
const nameOf = (element: Element): string => {
  const { tag, content } = element
  if (tag === 0x87) return content.length === 4 || content.length === 16 ? `IP:${Buffer.from(content).toString('hex')}` : refuseRequest('csr.name')
  if (tag === 0x81 || tag === 0x88 || (tag & 0xe0) === 0xa0) return refuseRequest('csr.name.kind')
  if (tag !== 0x82 && tag !== 0x86) return refuseRequest('csr.name', `tag ${tag}`)
  if (content.length === 0 || content.some((byte) => byte < 0x21 || byte > 0x7e)) refuseRequest('csr.name.control')
  const text = new TextDecoder('latin1').decode(content)
  if (tag === 0x86) return /^[a-z][a-z0-9+.-]*:./i.test(text) ? `URI:${text}` : refuseRequest('csr.name', 'no absolute URI')
  if (text.includes('*')) refuseRequest('csr.name.kind', 'a wildcard')
  return isHostName(text) ? `DNS:${text}` : refuseRequest('csr.name', 'no host name')
}

/** GeneralNames of the value of a subjectAltName, DER, in order. */
export const generalNames = (value: Uint8Array): readonly Uint8Array[] => elementsOf(value).map(({ bytes }) => bytes)

/** The same as `URI:…`, `DNS:…`, `IP:…` (hex). Throws Problem with a reason of `requestReasons` for names of another kind. */
export const altNameTexts = (names: readonly Uint8Array[]): readonly string[] => names.map((bytes) => nameOf(whole(bytes, bytes[0] ?? 0)))

const checkAltNames = (value: Uint8Array, policy: RequestPolicy): void => {
  const kinds = new Set(policy.names.map((name) => name.slice(0, name.indexOf(':'))))
  for (const name of elementsOf(value).map(nameOf)) {
    if (!kinds.has(name.slice(0, name.indexOf(':')))) refuseRequest('csr.name.kind', name)
    if (!policy.names.includes(name)) refuseRequest('csr.name.other', name)
  }
}

const checks: Readonly<Record<string, (value: Uint8Array, policy: RequestPolicy) => void>> = {
  [oids.basicConstraints]: (value) => {
    const reader = inside(whole(value, tags.sequence))
    const flag = reader.optional(tags.boolean)
    if (flag !== undefined) {
      if (readBoolean(flag)) refuseRequest('csr.extension.ca')
      refuseRequest('csr.der.value', 'a default written out')
    }
    reader.end()
  },
  [oids.keyUsage]: (value, policy) => {
    const asked = readNamedBits(whole(value, tags.bitString))
    if (asked.has(keyUsages.keyCertSign) || asked.has(keyUsages.crlSign)) refuseRequest('csr.usage.ca')
    for (const usage of asked) if (!policy.usages.includes(usage)) refuseRequest('csr.usage', `key usage bit ${usage}`)
  },
  [oids.extKeyUsage]: (value, policy) => {
    for (const purpose of elementsOf(value).map(readOid)) if (!policy.purposes.includes(purpose)) refuseRequest('csr.purpose', purpose)
  },
  [oids.subjectAltName]: checkAltNames,
}

/** Compares what is asked for with what would be given. Throws Problem with a reason of `requestReasons` for anything beyond. */
export const checkWishes = ({ subject, extensions }: Pick<RequestStructure, 'subject' | 'extensions'>, policy: RequestPolicy): Wishes => {
  const { commonName, others } = understood(() => readSubject(subject), 'csr.subject')
  if (commonName === null && !extensions.has(oids.subjectAltName)) refuseRequest('csr.subject.empty')
  if (commonName !== null) checkName(commonName, policy)
  return { commonName, ignored: [...others, ...checkExtensions(extensions, policy)] }
}

const checkExtensions = (extensions: Extensions, policy: RequestPolicy): readonly string[] => {
  const ignored: string[] = []
  for (const [id, { critical, value }] of extensions) {
    const check = Object.hasOwn(checks, id) ? checks[id] : undefined
    if (check === undefined) {
      if (critical) refuseRequest('csr.extension.critical', `critical extension ${id}`)
      ignored.push(id)
      continue
    }
    try {
      check(value, policy)
    } catch (error) {
      if (error instanceof DerProblem) refuseRequest('csr.extension.value', `extension ${id}: ${error.message}`, error)
      throw error
    }
  }
  return ignored
}
