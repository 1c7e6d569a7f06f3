import { Problem } from '../problem.ts'
import type { Certificate } from './certificate.ts'
import { inside, readSmall, tags, whole, type Element } from './der.ts'
import { isHostName, readGeneralName, readName, type GeneralName } from './general-names.ts'
import { oids } from './oids.ts'

/** NameConstraints of a CA (RFC 5280 §4.2.1.10). */
export interface NameConstraints {
  readonly permitted: readonly GeneralName[]
  readonly excluded: readonly GeneralName[]
}

const fail = (what: string): never => {
  throw new Problem('malformed', `name constraints: ${what}`, { reason: 'x509.name-constraints' })
}

/** Reads the extension's value; throws Problem('malformed') for what RFC 5280 does not allow. */
export const readNameConstraints = (value: Uint8Array): NameConstraints => {
  const reader = inside(whole(value, tags.sequence))
  const [permitted, excluded] = [reader.optional(0xa0), reader.optional(0xa1)]
  reader.end()
  if (permitted === undefined && excluded === undefined) fail('none')
  return { permitted: subtrees(permitted), excluded: subtrees(excluded) }
}

const subtrees = (element: Element | undefined): readonly GeneralName[] => {
  if (element === undefined) return []
  const reader = inside(element)
  const found: GeneralName[] = []
  while (!reader.done) {
    if (found.length >= 128) fail('more than 128 subtrees')
    const subtree = reader.enter(tags.sequence)
    const base = readGeneralName(subtree.next())
    const minimum = subtree.optional(0x80)
    if (minimum !== undefined && readSmall(minimum, 0x80) !== 0) fail('a minimum')
    subtree.end()
    if (!isBase(base)) fail(`a ${base.kind} subtree of another form`)
    found.push(base)
  }
  return found.length === 0 ? fail('an empty list') : found
}

const isBase = (base: GeneralName): boolean => {
  switch (base.kind) {
    case 'dns':
      return base.text === '' || (isHostName(base.text) && !base.text.startsWith('*'))
    case 'email':
    case 'uri':
      return base.text !== '' && (base.text.includes('@') || isHostName(base.text.replace(/^\./, '')))
    case 'ip':
      return base.bytes.length === 8 || base.bytes.length === 32 ? isMask(base.bytes.subarray(base.bytes.length / 2)) : false
    case 'directory':
    case 'other':
      return true
  }
}

/** Ones, then zeros. */
const isMask = (mask: Uint8Array): boolean => /^1*0*$/.test([...mask].map((byte) => byte.toString(2).padStart(8, '0')).join(''))

const isBelow = (host: string, domain: string): boolean => host === domain || host.endsWith(`.${domain}`)

/** Whether the name is in the subtree. `excluding`: a wildcard is in it when any name it stands for is. */
const isIn = (name: GeneralName, base: GeneralName, excluding: boolean): boolean => {
  if (name.kind === 'dns' && base.kind === 'dns') return inDomain(name.text.toLowerCase(), base.text.toLowerCase(), excluding)
  if (name.kind === 'email' && base.kind === 'email') return inMailDomain(name.text, base.text)
  if (name.kind === 'uri' && base.kind === 'uri') return inHost(name.text, base.text.toLowerCase(), excluding)
  if (name.kind === 'ip' && base.kind === 'ip') return inNetwork(name.bytes, base.bytes)
  if (name.kind === 'directory' && base.kind === 'directory') return inDirectory(name.name, base.name)
  // Nothing here knows this kind of name: it is never permitted and always excluded.
  return name.kind === 'other' && excluding
}

const inDomain = (name: string, base: string, excluding: boolean): boolean => {
  if (base === '' || isBelow(name, base)) return true
  if (!excluding || !name.startsWith('*.')) return false
  const parent = name.slice(2)
  return base.endsWith(`.${parent}`) && !base.slice(0, -parent.length - 1).includes('.')
}

const inMailDomain = (name: string, base: string): boolean => {
  const [local, host = ''] = name.split('@')
  const at = base.indexOf('@')
  if (at >= 0) return base.slice(0, at) === local && base.slice(at + 1).toLowerCase() === host.toLowerCase()
  return base.startsWith('.') ? host.toLowerCase().endsWith(base.toLowerCase()) : host.toLowerCase() === base.toLowerCase()
}

const inHost = (name: string, base: string, excluding: boolean): boolean => {
  const host = URL.parse(name)?.hostname.toLowerCase() ?? ''
  // A URI without a host name cannot be shown to lie outside (RFC 5280 §4.2.1.10: such a certificate is refused).
  if (!isHostName(host)) return excluding
  return base.startsWith('.') ? host.endsWith(base) : host === base
}

const inNetwork = (address: Uint8Array, base: Uint8Array): boolean =>
  base.length === address.length * 2 &&
  address.every((byte, at) => (byte & (base[address.length + at] ?? 0)) === ((base[at] ?? 0) & (base[address.length + at] ?? 0)))

const inDirectory = (name: Uint8Array, base: Uint8Array): boolean => {
  const [own, above] = [readName(name), readName(base)]
  return above.length <= own.length && above.every((rdn, at) => JSON.stringify(rdn) === JSON.stringify(own[at]))
}

/** Every name of a certificate that constraints speak of: subject, subjectAltName, and the subject's mail addresses when there is no subjectAltName. */
const namesOf = (certificate: Certificate): readonly GeneralName[] => {
  const subject = readName(certificate.subject)
  const names = certificate.altNames.map((bytes) => readGeneralName(whole(bytes, bytes[0] ?? 0)))
  const mail = certificate.altNames.length > 0 ? [] : subject.flat().filter(({ type }) => type === oids.emailAddress)
  return [
    ...(subject.length === 0 ? [] : [{ kind: 'directory', name: certificate.subject } as const]),
    ...names,
    ...mail.map(({ value }) => ({ kind: 'email', text: value }) as const),
  ]
}

const sameKind = (a: GeneralName, b: GeneralName): boolean => a.kind === b.kind && (a.kind !== 'other' || (b.kind === 'other' && a.tag === b.tag))

/** Whether every name of the certificate lies within the permitted subtrees of its kind and none within an excluded one (RFC 5280 §6.1.3 b, c). */
export const satisfies = (certificate: Certificate, { permitted, excluded }: NameConstraints): boolean =>
  namesOf(certificate).every((name) => {
    const allowed = permitted.filter((base) => sameKind(base, name))
    const forbidden = excluded.filter((base) => sameKind(base, name))
    return (allowed.length === 0 || allowed.some((base) => isIn(name, base, false))) && !forbidden.some((base) => isIn(name, base, true))
  })
