import { isHostName } from '@fleetkey/protocol/x509/general-names.ts'

/**
 * A further name of a device or station, made from its id: `DNS:{id}.devices.example.com`, `URI:urn:example:{tenant}:{id}`, `URI:https://example.com/{id}`.
 * `parts`: labels of the host name, or what stands between the colons and slashes of the URI; one of them is the id and nothing else.
 */
export interface NamePattern {
  readonly kind: 'DNS' | 'URI'
  readonly text: string
  readonly parts: readonly string[]
}

const [id, tenant] = ['{id}', '{tenant}']
/** Characters of the longest id or tenant; of a label of a host name; of a whole name. */
const longest = { id: 64, label: 63, DNS: 253, URI: 255 } as const

/** A label that an id makes: no A-label (RFC 5890 §2.3.2.1), which would be read as another name. */
const isLabel = (text: string): boolean => /^(?!..--)[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$/.test(text)

const fill = (text: string, of: { readonly tenant: string; readonly id: string }): string => text.replace(id, of.id).replaceAll(tenant, of.tenant)
const placeholders = (parts: readonly string[], of: string): number => parts.filter((part) => part === of).length

const hostFault = (text: string, parts: readonly string[]): string | undefined => {
  if (!/^[a-z0-9.{}-]+$/.test(text)) return 'a host name of small letters, digits, hyphens and dots'
  const last = parts.at(-1) ?? ''
  if (last === id || last === tenant) return 'a host name that ends in a domain of yours'
  return undefined
}

const urn = /^urn:[a-z0-9][a-z0-9-]{0,30}[a-z0-9](:[a-z0-9._~{}-]+)+$/
const url = /^(?!spiffe:)[a-z][a-z0-9+-]{0,31}:\/\/([a-z0-9.-]+)(\/[a-z0-9._~{}-]+)+$/

const uriFault = (text: string, parts: readonly string[]): string | undefined => {
  if (text.startsWith('spiffe:')) return 'another scheme: there is one spiffe:// URI'
  const host = url.exec(text)?.[1]
  if (!urn.test(text) && host === undefined) return 'a URI in small letters, urn:NAMESPACE:… or SCHEME://HOST/…, without query, port or escapes'
  if (host !== undefined && !isHostName(host)) return 'a URI with the name of a host'
  return parts.includes('.') || parts.includes('..') ? 'a URI without . and .. between its slashes' : undefined
}

/** Reads a pattern; what it would have to be instead where it is none. */
export const readPattern = (said: string): NamePattern | { readonly fault: string } => {
  const [, kind, text] = /^(DNS|URI):(.+)$/s.exec(said) ?? []
  if ((kind !== 'DNS' && kind !== 'URI') || text === undefined) return { fault: 'DNS:… or URI:…' }
  const parts = text.split(kind === 'DNS' ? '.' : /[:/]/)
  const fault = kind === 'DNS' ? hostFault(text, parts) : uriFault(text, parts)
  if (fault !== undefined) return { fault }
  const rest = parts.filter((part) => part !== id && part !== tenant)
  if (placeholders(parts, id) !== 1 || rest.some((part) => /[{}]/.test(part)))
    return { fault: `a name with {id} once, {id} and {tenant} each alone between ${kind === 'DNS' ? 'dots' : 'colons or slashes'}` }
  const size = kind === 'DNS' ? longest.label : longest.id
  const whole = fill(text, { tenant: 'x'.repeat(size), id: 'x'.repeat(size) })
  if (whole.length > longest[kind]) return { fault: `a name of at most ${longest[kind]} characters, with ${size} for each of {id} and {tenant}` }
  if (kind === 'DNS' && !isHostName(whole)) return { fault: 'a legal host name (RFC 1034 §3.5)' }
  return { kind, text, parts }
}

/**
 * `DNS:…` or `URI:…` of a device or station; undefined where its id makes no such name: an id of 64 characters, one that ends with a hyphen and one with hyphens in
 * the third and fourth place are no labels of a host name, and whoever has one goes without it.
 */
export const nameBy = ({ kind, text, parts }: NamePattern, of: { readonly tenant: string; readonly id: string }): string | undefined => {
  if (kind === 'DNS' && (!isLabel(of.id) || (parts.includes(tenant) && !isLabel(of.tenant)))) return undefined
  return `${kind}:${fill(text, of)}`
}

/** Where the id stands in the names that it makes, from the first character behind `DNS:` or `URI:`. */
export const placeOfId = ({ text }: NamePattern, of: { readonly tenant: string }): number =>
  text.slice(0, text.indexOf(id)).replaceAll(tenant, of.tenant).length

/** The pattern of a name without placeholders. */
export const patternOfHost = (host: string): NamePattern => ({ kind: 'DNS', text: host, parts: host.toLowerCase().split('.') })

const mayBeSame = (one: string, other: string): boolean => one === other || [one, other].some((part) => part === id || part === tenant)

/** Whether both can make one name, of one id or of two. */
export const canMeet = (one: NamePattern, other: NamePattern): boolean =>
  one.kind === other.kind && one.parts.length === other.parts.length && one.parts.every((part, at) => mayBeSame(part, other.parts[at] ?? ''))

/** Whether both can make the name of two different ids: a name would not say any more who carries it. */
export const areConfused = (one: NamePattern, other: NamePattern): boolean => canMeet(one, other) && one.parts.indexOf(id) !== other.parts.indexOf(id)
