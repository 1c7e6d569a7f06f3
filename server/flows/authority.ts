import { createHash, generateKeyPairSync } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import type { TrustBundle } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Signer } from '@fleetkey/protocol/signed.ts'
import { nameOf, parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Role } from '@fleetkey/protocol/x509/roles.ts'
import type { Caller } from '../access/caller.ts'
import { defaultProfiles, type Profiles } from '../ca/profiles.ts'
import {
  activeOf,
  firstRollover,
  isOver,
  isRootNeeded,
  knownOf,
  rootState,
  rootsOf,
  type Generation,
  type GenerationState,
  type Rollover,
} from '../ca/rollover.ts'
import type { StatusPlaces } from '../ca/tbs.ts'
import type { Base, KmsKeyPurpose } from './context.ts'
import { certifyAgain, prepareCertificates, recordIssued, type Issuer, type Order } from './issue.ts'
import { ensureKek, keksOf } from './kek.ts'
import { kmsSigner } from './message.ts'
import { perform, type Transaction } from './perform.ts'

/** The server's own standing: its CAs, and the keys that sign messages, each with its certificate. The issuer is the CA that is active. */
interface Standing extends Issuer {
  readonly rollover: Rollover
  /** Certificates, DER: root and issuing CA that are active. */
  readonly root: Uint8Array
  readonly issuing: Uint8Array
  /** What leads from a certificate of the active CA to every root that a device may still trust: the active CA, and roots certified by older roots. */
  readonly chain: readonly Uint8Array[]
  /** The same for a certificate (DER) of any CA that is not retired: another one may have become active since it was signed. */
  readonly chainOf: (certificate: Uint8Array) => readonly Uint8Array[]
  /** The root as an issuer: of the issuing CA, and of what speaks for the root. */
  readonly byRoot: Issuer
  readonly roles: Readonly<Record<Role, Signer & { readonly certificate: Uint8Array }>>
  /** CAs whose key is at hand, by the name of the key: what they have issued can be revoked. */
  readonly issuers: ReadonlyMap<string, Issuer>
  /** Certificates of every CA that devices are told of, for others, by the names under which they are handed out: `issuing-2.cer`, `root-1-2.cer`. */
  readonly certificates: ReadonlyMap<string, Uint8Array>
  /** What others may come to need to follow a rollover (RFC 7030 §4.1.3): the active CA and root first, the next ones, and roots certified by each other, both ways. */
  readonly anchors: readonly Uint8Array[]
  /** Names of the keys of CAs from which nothing is accepted (any more, or while they are suspended), and of those that devices are renewed away from. */
  readonly retired: ReadonlySet<string>
  readonly tainted: ReadonlySet<string>
  /** What devices are to believe; null while that is what their configuration says. */
  readonly bundle: TrustBundle | null
  /** Name of the KMS key that wraps data keys, challenge secrets and what checks tokens. */
  readonly kek: string
  /** With those before it that may still have wrapped something: what opens wraps, newest first. */
  readonly keks: readonly string[]
}

/** Its standing as it is: a rollover changes it while the server runs. */
export interface Authority extends Standing {
  /** Takes what is durable. Whoever asked by `onChange` is told, one after the other. */
  reload(): Promise<void>
  onChange(listener: () => Promise<void>): void
}

const system: Caller = { kind: 'system', id: 'setup', from: 'server' }
export const roles: readonly Role[] = ['challenge', 'delivery', 'group', 'release']

const publicKeyOf = async (ctx: Base, name: string, purpose: KmsKeyPurpose): Promise<Uint8Array> => {
  const { spki } = await ctx.kms.create(name, purpose)
  if (spki === null) throw new Problem('internal', `KMS key ${name} has no public key`)
  return spki
}

/** The certificate of that setting, issued now if there is none yet. A crash in between leaves an open intent; the next start issues anew. */
const ensure = async (ctx: Base, setting: string, issuer: Issuer, order: Omit<Order, 'device'>): Promise<Uint8Array> => {
  const known = await ctx.store.get('setting', setting)
  if (known !== undefined) return known.value
  const [issued] = await prepareCertificates(ctx, issuer, { caller: system, action: 'server.setup', subject: setting }, [{ ...order, device: null }])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  await perform(ctx, { caller: system, action: 'server.setup', subject: setting, detail: `${order.profile} ${issued.intent.id}` }, async (tx) => {
    // Roots certify each other's keys, and each CA those that sign messages: the same key in more than one certificate.
    await certifyAgain(ctx, tx, issued)
    recordIssued(tx, issued)
    tx.insert('setting', { id: setting, value: issued.der })
  })
  ctx.step(`setup.${setting}`)
  return issued.der
}

const rolloverSetting = 'ca/rollover'

/** As it is durable; the first generation alone before any rollover. */
export const rolloverOf = async (ctx: Base): Promise<Rollover> => {
  const setting = await ctx.store.get('setting', rolloverSetting)
  return setting === undefined ? firstRollover(0) : (decode(setting.value) as Rollover)
}

/** Adds the next standing to a commit. */
export const setRollover = async (ctx: Base, tx: Transaction, rollover: Rollover): Promise<void> => {
  const [setting, value] = [await ctx.store.get('setting', rolloverSetting), encode(rollover)]
  if (setting === undefined) tx.insert('setting', { id: rolloverSetting, value })
  else tx.update('setting', { ...setting, value })
}

/** Places where what belongs to a generation, or a root, is found: the first has no number. */
const numbered = (name: string, number: number, separator: string): string => (number === 1 ? name : `${name}${separator}${number}`)
export const issuingKey = (number: number): string => numbered('issuing-ca', number, '-')
export const rootKey = (number: number): string => numbered('root-ca', number, '-')
const issuingSetting = (number: number): string => numbered('ca/issuing', number, '/')
const rootSetting = (number: number): string => numbered('ca/root', number, '/')
export const roleSetting = (role: Role, number: number): string => numbered(`ca/role/${role}`, number, '/')
const crossSetting = (by: number, of: number): string => `ca/cross/${by}-${of}`

/** Roots have one name: certified by each other they are self-issued (RFC 4210 §4.4), which no path length counts. Issuing CAs have lists of their own, and names. */
const rootName = (ctx: Base): string => `Fleetkey root of ${ctx.tenant}`
const issuingName = (ctx: Base, number: number): string => `Fleetkey issuing CA${number === 1 ? '' : ` ${number}`} of ${ctx.tenant}`

/** What certificates are, and where others ask about those of the CA with this key. */
export interface Issuance {
  readonly profiles: Profiles
  readonly places?: ((key: string) => StatusPlaces) | undefined
}

/** What an issuer takes from its own certificate. */
type Own = Pick<Issuer, 'spki' | 'until'>
const ownOf = ({ spki, notAfter }: Certificate): Own => ({ spki, until: notAfter })

const rootIssuer = (ctx: Base, number: number, { spki, until }: Own, profiles: Profiles): Issuer => ({
  subject: nameOf(rootName(ctx)),
  spki,
  until,
  key: rootKey(number),
  purpose: 'root-ca',
  profiles,
})
const issuingIssuer = (ctx: Base, number: number, { spki, until }: Own, { profiles, places }: Issuance): Issuer => ({
  subject: nameOf(issuingName(ctx, number)),
  spki,
  until,
  key: issuingKey(number),
  purpose: 'issuing-ca',
  profiles,
  status: places?.(issuingKey(number)),
})

/**
 * Keys and CA certificates of a generation; a new root and the one before it certify each other. Harmless to repeat after a crash at any point: what is there
 * is kept.
 */
export const makeGeneration = async (
  ctx: Base,
  profiles: Profiles,
  { number, root, before }: { readonly number: number; readonly root: number; readonly before: number | null },
): Promise<void> => {
  const rootSpki = await publicKeyOf(ctx, rootKey(root), 'root-ca')
  const issuingSpki = number === 1 ? await publicKeyOf(ctx, issuingKey(number), 'issuing-ca') : null
  const itself = rootIssuer(ctx, root, { spki: rootSpki, until: Infinity }, profiles)
  const rootDer = await ensure(ctx, rootSetting(root), itself, { profile: 'root-ca', subject: rootName(ctx), spki: rootSpki })
  const byRoot = rootIssuer(ctx, root, ownOf(parseCertificate(rootDer)), profiles)
  if (before !== null && before !== root) {
    const older = await need(ctx, rootSetting(before))
    const byOlder = rootIssuer(ctx, before, ownOf(older), profiles)
    await ensure(ctx, crossSetting(before, root), byOlder, { profile: 'cross-ca', subject: rootName(ctx), spki: rootSpki })
    await ensure(ctx, crossSetting(root, before), byRoot, { profile: 'cross-ca', subject: rootName(ctx), spki: older.spki })
  }
  const spki = issuingSpki ?? (await publicKeyOf(ctx, issuingKey(number), 'issuing-ca'))
  await ensure(ctx, issuingSetting(number), byRoot, { profile: 'issuing-ca', subject: issuingName(ctx, number), spki })
}

/** The certificate of a key that signs messages. */
export const roleOrder = (ctx: Base, role: Role, spki: Uint8Array): Omit<Order, 'device'> => ({
  profile: 'server-signing',
  subject: `Fleetkey ${role} of ${ctx.tenant}`,
  spki,
  role,
})

/** Certificates of the keys that sign messages, by the CA of this generation. Harmless to repeat. */
export const certifyRoles = async (ctx: Base, profiles: Profiles, number: number): Promise<void> => {
  const issuer = issuingIssuer(ctx, number, ownOf(await need(ctx, issuingSetting(number))), { profiles })
  for (const role of roles) {
    const key = `${role}-signing` as const
    const spki = await publicKeyOf(ctx, key, key)
    await ensure(ctx, roleSetting(role, number), issuer, roleOrder(ctx, role, spki))
  }
}

const certificateIn = async (ctx: Base, setting: string): Promise<Certificate | undefined> => {
  const found = await ctx.store.get('setting', setting)
  return found === undefined ? undefined : parseCertificate(found.value)
}

const need = async (ctx: Base, setting: string): Promise<Certificate> => {
  const found = await certificateIn(ctx, setting)
  if (found === undefined) throw new Problem('internal', `there is no ${setting}`)
  return found
}

const keyHash = ({ spki }: Certificate): Uint8Array => new Uint8Array(createHash('sha256').update(spki).digest())
/** Each once, DER, in this order. */
const distinct = (certificates: readonly Certificate[]): readonly Uint8Array[] => [
  ...new Map(certificates.map(({ fingerprint, der }) => [fingerprint, der])).values(),
]
const present = <T>(found: readonly (T | undefined)[]): readonly T[] => found.filter((one) => one !== undefined)

/** Every CA that devices are told of, and the roots that were certified by others, newest first. */
const load = async (ctx: Base, rollover: Rollover) => {
  const known = knownOf(rollover).toReversed()
  const numbers = [...new Set(known.map(({ root }) => root))].toSorted((one, other) => other - one)
  const issuing = await Promise.all(known.map(async (generation) => ({ generation, certificate: await need(ctx, issuingSetting(generation.number)) })))
  const roots = await Promise.all(numbers.map(async (number) => ({ number, certificate: await need(ctx, rootSetting(number)) })))
  // Also of retired roots: a device that slept through everything comes back this way.
  const crosses = await Promise.all(
    numbers.flatMap((by) => numbers.map(async (of) => ({ by, of, certificate: await certificateIn(ctx, crossSetting(by, of)) }))),
  )
  return { issuing, roots, crosses: crosses.flatMap(({ by, of, certificate }) => (certificate === undefined ? [] : [{ by, of, certificate }])) }
}

const bundleOf = async (ctx: Base, rollover: Rollover, { issuing, roots, crosses }: Awaited<ReturnType<typeof load>>): Promise<TrustBundle | null> => {
  if (rollover.version === 1) return null
  const trusted = rootsOf(rollover)
  const withKeys = issuing.filter(({ generation: { state, activatedAt } }) => activatedAt !== null && (state === 'active' || state === 'superseded'))
  const keys = await Promise.all(
    withKeys.flatMap(({ generation }) => roles.map(async (role) => await certificateIn(ctx, roleSetting(role, generation.number)))),
  )
  const hashes = (states: readonly GenerationState[]): readonly Certificate[] => [
    ...issuing.filter(({ generation }) => states.includes(generation.state)).map(({ certificate }) => certificate),
    ...roots.filter(({ number }) => states.includes(rootState(rollover, number) as GenerationState)).map(({ certificate }) => certificate),
  ]
  return {
    type: 'trust',
    version: rollover.version,
    roots: roots.filter(({ number }) => trusted.includes(number)).map(({ certificate }) => certificate.der),
    chain: [...issuing.filter(({ generation }) => !isOver(generation)), ...crosses.filter(({ by, of }) => by < of)].map(({ certificate }) => certificate.der),
    keys: present(keys).map(({ der }) => der),
    tainted: hashes(['tainted']).map(keyHash),
    retired: hashes(['retiring', 'retired']).map(keyHash).slice(0, 32),
    renewWithin: rollover.renewWithin,
  }
}

const standingOf = async (ctx: Base, issuance: Issuance): Promise<Standing> => {
  const [rollover, { current: kek, former }] = [await rolloverOf(ctx), await keksOf(ctx)]
  const active = activeOf(rollover)
  const all = await load(ctx, rollover)
  const [root, issuing] = [await need(ctx, rootSetting(active.root)), await need(ctx, issuingSetting(active.number))]
  const found = await Promise.all(
    roles.map(async (role): Promise<[Role, Signer & { certificate: Uint8Array }]> => {
      const { spki, der } = await need(ctx, roleSetting(role, active.number))
      const key = `${role}-signing` as const
      return [role, { ...kmsSigner(ctx.kms, key, key, spki), certificate: der }]
    }),
  )
  const trusted = rootsOf(rollover)
  const alive = all.issuing.filter(({ generation }) => !isOver(generation))
  const issuers = [
    ...all.roots
      .filter(({ number }) => isRootNeeded(rollover, number))
      .map(({ number, certificate }) => rootIssuer(ctx, number, ownOf(certificate), issuance.profiles)),
    ...alive.map(({ generation, certificate }) => issuingIssuer(ctx, generation.number, ownOf(certificate), issuance)),
  ]
  const keysOf = (states: readonly GenerationState[]): ReadonlySet<string> =>
    new Set(rollover.generations.filter(({ state }) => states.includes(state)).map(({ number }) => issuingKey(number)))
  const newerFirst = all.crosses.filter(({ by, of }) => by < of && of <= active.root).toSorted((one, other) => other.of - one.of)
  const chainOf = (ca: Certificate): readonly Uint8Array[] => [ca.der, ...newerFirst.map(({ certificate }) => certificate.der)]
  const fixed = issuingIssuer(ctx, active.number, ownOf(issuing), issuance)
  return {
    ...fixed,
    fixed,
    rollover,
    root: root.der,
    issuing: issuing.der,
    chain: chainOf(issuing),
    chainOf(certificate) {
      const { issuer } = parseCertificate(certificate)
      return chainOf(alive.find((one) => Buffer.compare(one.certificate.subject, issuer) === 0)?.certificate ?? issuing)
    },
    byRoot: rootIssuer(ctx, active.root, ownOf(root), issuance.profiles),
    roles: Object.fromEntries(found) as Authority['roles'],
    issuers: new Map(issuers.map((issuer) => [issuer.key, issuer])),
    certificates: new Map([
      ...all.roots.map(({ number, certificate }) => [`${numbered('root', number, '-')}.cer`, certificate.der] as const),
      ...all.issuing.map(({ generation, certificate }) => [`${numbered('issuing', generation.number, '-')}.cer`, certificate.der] as const),
      ...all.crosses.map(({ by, of, certificate }) => [`root-${by}-${of}.cer`, certificate.der] as const),
    ]),
    anchors: distinct([
      issuing,
      root,
      ...alive.map(({ certificate }) => certificate),
      ...all.roots.filter(({ number }) => trusted.includes(number)).map(({ certificate }) => certificate),
      ...all.crosses.filter(({ by, of }) => trusted.includes(by) && trusted.includes(of)).map(({ certificate }) => certificate),
    ]),
    retired: new Set([
      ...keysOf(['retiring', 'retired']),
      ...rollover.generations.filter(({ suspended }) => suspended !== undefined).map(({ number }) => issuingKey(number)),
    ]),
    tainted: keysOf(['tainted']),
    bundle: await bundleOf(ctx, rollover, all),
    kek,
    keks: [kek, ...former],
  }
}

/** Serial of an issuing CA's certificate. */
export const issuingSerial = async (ctx: Base, number: number): Promise<string> => (await need(ctx, issuingSetting(number))).serial

/** CA certificates by which a device may find the CA of this generation: its own, every root, and roots certified by others. */
export const caCertificates = async (
  ctx: Base,
  generation: Pick<Generation, 'number'>,
): Promise<{ readonly issuing: Certificate; readonly roots: ReadonlyMap<number, Certificate>; readonly crosses: readonly Certificate[] }> => {
  const numbers = [...new Set((await rolloverOf(ctx)).generations.map(({ root }) => root))]
  const roots = await Promise.all(numbers.map(async (number) => [number, await certificateIn(ctx, rootSetting(number))] as const))
  const crosses = await Promise.all(numbers.flatMap((by) => numbers.map(async (of) => (by < of ? await certificateIn(ctx, crossSetting(by, of)) : undefined))))
  return {
    issuing: await need(ctx, issuingSetting(generation.number)),
    roots: new Map(roots.flatMap(([number, root]) => (root === undefined ? [] : [[number, root] as const]))),
    crosses: present(crosses),
  }
}

/**
 * First start: makes the keys in the KMS and their certificates. Later starts: reads them. Harmless to repeat after a crash at any point. `profiles`: what
 * certificates from now on are; `places`: what they say about where others ask about them.
 */
export const openAuthority = async (ctx: Base, { profiles = defaultProfiles, places }: Partial<Issuance> = {}): Promise<Authority> => {
  await ensureKek(ctx)
  ctx.step('setup.kek')
  const rollover = await rolloverOf(ctx)
  // Once another generation was active, everything of the first is there, or gone for good.
  if (activeOf(rollover).number === 1) {
    await makeGeneration(ctx, profiles, { ...activeOf(rollover), before: null })
    await certifyRoles(ctx, profiles, 1)
  }
  const listeners: (() => Promise<void>)[] = []
  const authority: Authority = {
    ...(await standingOf(ctx, { profiles, places })),
    async reload() {
      Object.assign(authority, await standingOf(ctx, { profiles, places }))
      for (const listener of listeners) await listener()
    },
    onChange: (listener) => void listeners.push(listener),
  }
  return authority
}

/** Key and chain, PEM; what the certificate is for, and how long. */
export interface ServerTls {
  readonly key: string
  readonly cert: string
  readonly names: readonly string[]
  readonly notBefore: number
  readonly notAfter: number
}

/**
 * A TLS key that lives in this process only, with a fresh certificate for these names and localhost: there is no TLS private key at rest.
 * PEM: key, and the chain from the server's certificate to the issuing CA.
 */
export const serverTls = async (ctx: Base, authority: Authority, names: readonly string[]): Promise<ServerTls> => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const { chain } = authority
  const order: Order = {
    profile: 'server-tls',
    subject: 'Fleetkey server',
    spki: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
    names: [...new Set([...names, 'localhost', '127.0.0.1', '::1'])],
    device: null,
  }
  const [issued] = await prepareCertificates(ctx, authority, { caller: system, action: 'server.setup', subject: 'server-tls' }, [order])
  if (issued === undefined) throw new Problem('internal', 'one certificate was ordered')
  await perform(ctx, { caller: system, action: 'server.setup', subject: 'server-tls', detail: issued.intent.id }, (tx) => recordIssued(tx, issued))
  return {
    key: privateKey.export({ format: 'pem', type: 'pkcs8' }) as string,
    // Whoever trusts an older root finds the way to it here.
    cert: [issued.der, ...chain].map((der) => toPem('CERTIFICATE', der)).join(''),
    names: order.names ?? [],
    notBefore: issued.intent.notBefore,
    notAfter: issued.intent.notAfter,
  }
}
