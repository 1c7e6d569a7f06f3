import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import type { RequestPolicy } from '@fleetkey/protocol/x509/request/request.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { deviceIdentityEku, roleEku, stationEku } from '@fleetkey/protocol/x509/roles.ts'
import type { ProfileName } from './certificate.ts'
import { nameBy, type NamePattern } from './name-pattern.ts'
import type { NamedPurpose } from './purposes.ts'
import type { SubjectSettings } from './subject.ts'

export const hour = 3_600_000
export const day = 24 * hour
export const year = 365 * day

type Usage = keyof typeof keyUsages

/** One kind of certificate. */
export interface Profile {
  /** Whose common name it carries. */
  readonly subject: 'the id of the device' | 'the id of the station' | 'the server’s own name for it'
  /** In front of the common name. */
  readonly attributes: SubjectSettings
  /** Milliseconds from issuing until the certificate ends; the least and the most that a configuration may say. */
  readonly life: number
  readonly lifeBounds: readonly [least: number, most: number]
  /** Key usages, and those that a configuration may add. */
  readonly usages: readonly Usage[]
  readonly usageBounds: readonly Usage[]
  /** OID of its own purpose; `role` for the one named in the order; null for none. */
  readonly eku: string | null
  /** OIDs of further purposes; the names of those that a configuration may add, besides an enterprise's own; null for none at all. */
  readonly purposes: readonly string[]
  readonly purposeBounds: readonly NamedPurpose[] | null
  /** Path length of a CA; null for end entities. */
  readonly ca: number | null
  /** Alternative names: `spiffe://TENANT/device/ID` (or `station`), host names and addresses, or none. */
  readonly names: 'device' | 'station' | 'hosts' | null
  /** Further names of a device or station. */
  readonly patterns: readonly NamePattern[]
  /** Kinds of keys, and those that a configuration may add. */
  readonly keys: readonly KeyKind[]
  readonly keyBounds: readonly KeyKind[]
  /** Whether it names where others ask about it, when the server offers that: long-lived certificates only, what lives for hours is not worth a list. */
  readonly status?: true
  /** Nobody asks about it (RFC 6960 §4.2.2.2.1): short-lived instead. */
  readonly noCheck?: true
}

export type Profiles = Readonly<Record<ProfileName, Profile>>

const plain = { attributes: {}, purposes: [], purposeBounds: null, patterns: [], usageBounds: [], keys: ['p256'], keyBounds: ['p256'] } as const
const leaf = { ...plain, ca: null, usages: ['digitalSignature'] } as const
const own = { ...plain, subject: 'the server’s own name for it', names: null } as const
const authority = { ...own, usages: ['keyCertSign', 'crlSign'], eku: null } as const

/** What each kind of certificate is. Nothing in a certificate comes from a request but the public key. */
export const defaultProfiles: Profiles = {
  'root-ca': { ...authority, life: 20 * year, lifeBounds: [5 * year, 30 * year], ca: 1 },
  // A root's key, certified by another root: over the change from the one to the other.
  'cross-ca': { ...authority, life: 10 * year, lifeBounds: [year, 20 * year], ca: 1 },
  'issuing-ca': { ...authority, life: 10 * year, lifeBounds: [year, 15 * year], ca: 0 },
  // Renewed by the server itself once half of its life is over, as the next two (flows/own-certificates.ts).
  'server-signing': { ...own, ...leaf, life: 2 * year, lifeBounds: [30 * day, 5 * year], eku: 'role' },
  'server-tls': {
    ...own,
    ...leaf,
    life: 30 * day,
    lifeBounds: [20 * day, 90 * day],
    eku: oids.serverAuth,
    names: 'hosts',
    usageBounds: ['keyAgreement'],
    purposeBounds: [],
  },
  'ocsp-responder': { ...own, ...leaf, life: 30 * day, lifeBounds: [15 * day, 90 * day], eku: oids.ocspSigning, noCheck: true },
  // Messages are ES256 (protocol/signed.ts): its key is P-256 and no other.
  'device-identity': {
    ...leaf,
    subject: 'the id of the device',
    life: 3 * year,
    lifeBounds: [day, 10 * year],
    eku: deviceIdentityEku,
    names: 'device',
    usageBounds: ['contentCommitment'],
    purposeBounds: [],
    status: true,
  },
  'device-tls': {
    ...leaf,
    subject: 'the id of the device',
    life: 48 * hour,
    lifeBounds: [hour, 90 * day],
    eku: oids.clientAuth,
    names: 'device',
    keyBounds: ['p256', 'p384'],
    usageBounds: ['keyAgreement'],
    purposeBounds: ['eapOverLAN', 'eapOverPPP', 'ipsecIKE'],
  },
  // Manifests are signed with ECDSA P-256.
  station: {
    ...leaf,
    subject: 'the id of the station',
    life: 90 * day,
    lifeBounds: [day, 2 * year],
    eku: stationEku,
    names: 'station',
    status: true,
    usageBounds: ['contentCommitment'],
    purposeBounds: [],
  },
}

export const profileNames = Object.keys(defaultProfiles) as readonly ProfileName[]

/** Certificates begin a little earlier, for clocks that run behind. */
export const backdate = hour

export const validityOf = ({ life }: Profile, now: number): { readonly notBefore: number; readonly notAfter: number } => {
  const whole = Math.floor(now / 1000) * 1000
  return { notBefore: whole - backdate, notAfter: whole + life }
}

/** The URI of a device or station: unique over tenants and kinds, and what others match on (the form of a SPIFFE ID). */
export const uriOf = (tenant: string, kind: 'device' | 'station', id: string): string => `spiffe://${tenant}/${kind}/${id}`

/** `URI:…` and `DNS:…` of a device or station, its `spiffe://` URI first. */
export const namesOf = ({ names, patterns }: Profile, of: { readonly tenant: string; readonly id: string }): readonly string[] =>
  names === 'device' || names === 'station'
    ? [`URI:${uriOf(of.tenant, names, of.id)}`, ...patterns.map((pattern) => nameBy(pattern, of)).filter((name) => name !== undefined)]
    : []

/** OIDs of the extended key usages; every role's for the profile that has one of them. */
const purposesOf = ({ eku, purposes }: Profile): readonly string[] => (eku === null ? [] : [...(eku === 'role' ? Object.values(roleEku) : [eku]), ...purposes])

/** What a request for this profile may ask for. `subject`: common name of the certificate; `hosts`: names of a server, as `DNS:…` and `IP:hex`. */
export const requestPolicyOf = (
  profile: Profile,
  of: { readonly tenant: string; readonly subject?: string; readonly hosts?: readonly string[] },
): RequestPolicy => ({
  keys: profile.keys,
  usages: profile.usages.map((usage) => keyUsages[usage]),
  purposes: purposesOf(profile),
  names: profile.names === 'hosts' ? (of.hosts ?? []) : of.subject === undefined ? [] : namesOf(profile, { tenant: of.tenant, id: of.subject }),
  ...(of.subject === undefined ? {} : { subject: of.subject }),
})

const nameText: Readonly<Record<string, string>> = {
  device: '`spiffe://TENANT/device/ID`',
  station: '`spiffe://TENANT/station/ID`',
  hosts: 'host names and addresses',
}

/** A lifetime as a configuration spells it. */
export const units: Readonly<Record<string, number>> = { m: 60_000, h: hour, d: day, y: year }
export const inWords = (life: number): string => {
  const [unit, size] = Object.entries(units).findLast(([, of]) => life % of === 0) ?? ['m', 60_000]
  return `${life / size}${unit}`
}

const more = (added: readonly string[]): string => (added.length === 0 ? '' : ` (${added.join(', ')})`)

/** The profiles as docs/pki.md has them. */
export const profilesMarkdown = (): string =>
  [
    '| profile | subject CN | alternative names | key usage (may be added) | purpose (may be added) | lifetime (bounds) | keys (may be added) |',
    '|---|---|---|---|---|---|---|',
    ...profileNames.map((name) => {
      const { subject, names, usages, usageBounds, eku, purposeBounds, ca, life, lifeBounds, keys, keyBounds } = defaultProfiles[name]
      const purpose = ca === null ? `${eku ?? '–'}${more(purposeBounds === null ? [] : [...purposeBounds, 'an enterprise’s own'])}` : `CA, path length ${ca}`
      const bounds = `${inWords(life)} (${inWords(lifeBounds[0])} to ${inWords(lifeBounds[1])})`
      const admitted = `${keys.join(', ')}${more(keyBounds.filter((kind) => !keys.includes(kind)))}`
      return `| \`${name}\` | ${subject} | ${names === null ? '–' : (nameText[names] ?? '')} | ${usages.join(', ')}${more(usageBounds)} | ${purpose} | ${bounds} | ${admitted} |`
    }),
  ].join('\n')
