import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import type { RequestPolicy } from '@fleetkey/protocol/x509/request/request.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { deviceIdentityEku, roleEku, stationEku } from '@fleetkey/protocol/x509/roles.ts'
import { z } from 'zod'
import { AlertSettings } from './alerts.ts'
import type { ProfileName } from './certificate.ts'
import { RetentionSettings } from './retention.ts'

const hour = 3_600_000
const day = 24 * hour
const year = 365 * day

/** One kind of certificate. */
export interface Profile {
  /** Whose common name it carries. */
  readonly subject: 'the id of the device' | 'the id of the station' | 'the server’s own name for it'
  /** Milliseconds from issuing until the certificate ends; the least and the most that a configuration may say. */
  readonly life: number
  readonly lifeBounds: readonly [least: number, most: number]
  readonly usages: readonly (keyof typeof keyUsages)[]
  /** OID; `role` for the one named in the order; null for none. */
  readonly eku: string | null
  /** Path length of a CA; null for end entities. */
  readonly ca: number | null
  /** Alternative names: `spiffe://TENANT/device/ID` (or `station`), host names and addresses, or none. */
  readonly names: 'device' | 'station' | 'hosts' | null
  /** Kinds of keys, and those that a configuration may add. */
  readonly keys: readonly KeyKind[]
  readonly keyBounds: readonly KeyKind[]
  /** Whether it names where others ask about it, when the server offers that: long-lived certificates only, what lives for hours is not worth a list. */
  readonly status?: true
  /** Nobody asks about it (RFC 6960 §4.2.2.2.1): short-lived instead. */
  readonly noCheck?: true
}

export type Profiles = Readonly<Record<ProfileName, Profile>>

const leaf = { ca: null, usages: ['digitalSignature'], keys: ['p256'], keyBounds: ['p256'] } as const
const own = { subject: 'the server’s own name for it', keys: ['p256'], keyBounds: ['p256'], names: null } as const
const authority = { ...own, usages: ['keyCertSign', 'crlSign'], eku: null } as const

/** What each kind of certificate is. Nothing in a certificate comes from a request but the public key. */
export const defaultProfiles: Profiles = {
  'root-ca': { ...authority, life: 20 * year, lifeBounds: [5 * year, 30 * year], ca: 1 },
  // A root's key, certified by another root: over the change from the one to the other.
  'cross-ca': { ...authority, life: 10 * year, lifeBounds: [year, 20 * year], ca: 1 },
  'issuing-ca': { ...authority, life: 10 * year, lifeBounds: [year, 15 * year], ca: 0 },
  // Renewed by the server itself once half of its life is over, as the next two (flows/own-certificates.ts).
  'server-signing': { ...leaf, ...own, life: 2 * year, lifeBounds: [30 * day, 5 * year], eku: 'role' },
  'server-tls': { ...leaf, ...own, life: 30 * day, lifeBounds: [20 * day, 90 * day], eku: oids.serverAuth, names: 'hosts' },
  'ocsp-responder': { ...leaf, ...own, life: 30 * day, lifeBounds: [15 * day, 90 * day], eku: oids.ocspSigning, noCheck: true },
  // Messages are ES256 (protocol/signed.ts): its key is P-256 and no other.
  'device-identity': {
    ...leaf,
    subject: 'the id of the device',
    life: 3 * year,
    lifeBounds: [day, 10 * year],
    eku: deviceIdentityEku,
    names: 'device',
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
  },
  // Manifests are signed with ECDSA P-256.
  station: { ...leaf, subject: 'the id of the station', life: 90 * day, lifeBounds: [day, 2 * year], eku: stationEku, names: 'station' },
}

export const profileNames = Object.keys(defaultProfiles) as readonly ProfileName[]

const units: Readonly<Record<string, number>> = { m: 60_000, h: hour, d: day, y: year }

const lifetime = z
  .string()
  .regex(/^[1-9]\d{0,5}[mhdy]$/, 'not a lifetime such as 48h, 90d or 3y')
  .transform((text) => Number(text.slice(0, -1)) * (units[text.slice(-1)] ?? 0))

const inWords = (life: number): string => {
  const [unit, size] = Object.entries(units).findLast(([, of]) => life % of === 0) ?? ['m', 60_000]
  return `${life / size}${unit}`
}

const settingsOf = ({ lifeBounds: [least, most], keyBounds }: Profile) =>
  z.strictObject({
    lifetime: lifetime.refine((life) => life >= least && life <= most, `outside of ${inWords(least)} to ${inWords(most)}`).optional(),
    keys: z
      .array(z.enum(keyBounds as unknown as [KeyKind, ...KeyKind[]]))
      .min(1)
      .refine((keys) => new Set(keys).size === keys.length, 'a kind of key twice')
      .optional(),
  })

/** What a configuration may say about each profile, within its bounds; everything else is fixed here. */
export const ProfileSettings = z.strictObject(
  Object.fromEntries(profileNames.map((name) => [name, settingsOf(defaultProfiles[name]).optional()])) as {
    [N in ProfileName]: z.ZodOptional<ReturnType<typeof settingsOf>>
  },
)
export type ProfileSettings = z.infer<typeof ProfileSettings>

/** What the configuration file of a server may hold. */
export const ConfigFile = z.strictObject({ profiles: ProfileSettings.optional(), alerts: AlertSettings.optional(), retention: RetentionSettings.optional() })
export type ConfigFile = z.infer<typeof ConfigFile>

/** The profiles as this server's configuration has them. */
export const profilesOf = (settings: ProfileSettings): Profiles =>
  Object.fromEntries(
    profileNames.map((name): [ProfileName, Profile] => {
      const { life, keys } = defaultProfiles[name]
      const said = settings[name]
      return [name, { ...defaultProfiles[name], life: said?.lifetime ?? life, keys: said?.keys ?? keys }]
    }),
  ) as Profiles

/** Certificates begin a little earlier, for clocks that run behind. */
export const backdate = hour

export const validityOf = ({ life }: Profile, now: number): { readonly notBefore: number; readonly notAfter: number } => {
  const whole = Math.floor(now / 1000) * 1000
  return { notBefore: whole - backdate, notAfter: whole + life }
}

/** The URI of a device or station: unique over tenants and kinds, and what others match on (the form of a SPIFFE ID). */
export const uriOf = (tenant: string, kind: 'device' | 'station', id: string): string => `spiffe://${tenant}/${kind}/${id}`

/** OID of the extended key usage; every role's for the profile that has one of them. */
const purposesOf = ({ eku }: Profile): readonly string[] => (eku === null ? [] : eku === 'role' ? Object.values(roleEku) : [eku])

/** What a request for this profile may ask for. `subject`: common name of the certificate; `hosts`: names of a server, as `DNS:…` and `IP:hex`. */
export const requestPolicyOf = (
  profile: Profile,
  of: { readonly tenant: string; readonly subject?: string; readonly hosts?: readonly string[] },
): RequestPolicy => ({
  keys: profile.keys,
  usages: profile.usages.map((usage) => keyUsages[usage]),
  purposes: purposesOf(profile),
  names:
    profile.names === 'hosts'
      ? (of.hosts ?? [])
      : profile.names === null || of.subject === undefined
        ? []
        : [`URI:${uriOf(of.tenant, profile.names, of.subject)}`],
  ...(of.subject === undefined ? {} : { subject: of.subject }),
})

const nameText: Readonly<Record<string, string>> = {
  device: '`spiffe://TENANT/device/ID`',
  station: '`spiffe://TENANT/station/ID`',
  hosts: 'host names and addresses',
}

/** The profiles as docs/pki.md has them. */
export const profilesMarkdown = (): string =>
  [
    '| profile | subject CN | alternative names | key usage | purpose | lifetime (bounds) | keys (may be added) |',
    '|---|---|---|---|---|---|---|',
    ...profileNames.map((name) => {
      const { subject, names, usages, eku, ca, life, lifeBounds, keys, keyBounds } = defaultProfiles[name]
      const more = keyBounds.filter((kind) => !keys.includes(kind))
      return `| \`${name}\` | ${subject} | ${names === null ? '–' : (nameText[names] ?? '')} | ${usages.join(', ')} | ${ca === null ? (eku ?? '–') : `CA, path length ${ca}`} | ${inWords(life)} (${inWords(lifeBounds[0])} to ${inWords(lifeBounds[1])}) | ${keys.join(', ')}${more.length === 0 ? '' : ` (${more.join(', ')})`} |`
    }),
  ].join('\n')
