import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { trustDigest } from '@fleetkey/protocol/transcript.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { issuerKeyOf, secondOf, type Certificate } from '../ca/certificate.ts'
import { rootsAt, type Generation } from '../ca/rollover.ts'
import { acknowledgedVersion, hasIdentity, versionText, type IdentifiedDevice } from '../fleet/device.ts'
import { caCertificates, issuingKey } from './authority.ts'
import type { Base, Context, IndexEntry } from './context.ts'
import { messageTo } from './message.ts'
import { perform } from './perform.ts'
import { inChunks } from './rows.ts'

/** Messages that are signed at a time, and certificates that are read at a time. */
const atOnce = 32
const pageSize = 1000

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/** Whether nothing that this CA has issued is accepted any more, and how it ended; undefined while it counts. */
const endOf = ({ authority }: Pick<Context, 'authority'>, certificate: Certificate): 'retired' | 'revoked' | 'suspended' | undefined => {
  const key = issuerKeyOf(certificate)
  if (!authority.retired.has(key)) return undefined
  const { revoked, suspended } = authority.rollover.generations.find(({ number }) => issuingKey(number) === key) ?? {}
  if (revoked !== undefined) return 'revoked'
  return suspended === undefined ? 'retired' : 'suspended'
}

/** Throws Problem('unauthenticated') for a certificate of a CA that was retired, revoked or suspended: its device has to prove itself anew. */
export const caMustCount = (ctx: Pick<Context, 'authority'>, certificate: Certificate): void => {
  const end = endOf(ctx, certificate)
  if (end !== undefined)
    throw new Problem('unauthenticated', `certificate ${certificate.id} comes from a CA that is ${end}`, { reason: `certificate.ca-${end}` })
}

/** One rule for every door that a certificate opens. Throws Problem unless it is neither revoked nor on hold, its CA counts, and it is valid now. */
export const mustBeInForce = (ctx: Pick<Context, 'authority' | 'now'>, certificate: Certificate): void => {
  const { id, status, notBefore, notAfter } = certificate
  if (status !== 'valid') throw new Problem('forbidden', `certificate ${id} is ${status}`, { reason: `certificate.${status}` })
  caMustCount(ctx, certificate)
  const now = ctx.now()
  if (notBefore > now || notAfter < now) throw new Problem('expired', `certificate ${id} is not valid now`, { reason: 'certificate.expired' })
}

/** Tells a connected device whom to believe. */
export const sendTrust = async (ctx: Context, device: DeviceId): Promise<void> => {
  const { bundle, roles } = ctx.authority
  if (bundle !== null) await ctx.bus.send(device, await messageTo(ctx, roles.delivery, device, bundle))
}

/** The same for every connected device. The others hear it after their first report. */
export const announceTrust = async (ctx: Context): Promise<void> =>
  void (await inChunks(ctx.sessions.devices(), atOnce, async (id) => await sendTrust(ctx, id)))

/**
 * What a report says of the device's trust: the bundle that is in force is acknowledged by it, for any other the newest is sent. A device that holds less than it
 * has acknowledged was restored from an old copy; one that holds more than there is shows that this server was.
 */
export const hearTrust = async (ctx: Context, device: IdentifiedDevice, { trust }: BodyOf<'report'>): Promise<void> => {
  const { bundle, rollover } = ctx.authority
  const [before, said] = [acknowledgedVersion(device), trust?.version ?? 0]
  const isCurrent = bundle !== null && trust !== null && said === bundle.version && same(trust.digest, trustDigest(bundle))
  const alarm =
    said < before
      ? `ALARM: the device lost trust bundle ${before}, which it had acknowledged`
      : said > rollover.version
        ? 'ALARM: this server has never issued it: it was restored from an old copy'
        : bundle !== null && said === bundle.version && !isCurrent
          ? 'ALARM: its content is another'
          : undefined
  if (alarm !== undefined) ctx.log(`${device.id} reports trust bundle ${said}: ${alarm}`)
  // What it holds instead counts as nothing acknowledged.
  const counts = isCurrent || (said < before && said <= rollover.version) ? said : before
  if (counts !== before) {
    const caller = { kind: 'device', id: device.id, from: 'report' } as const
    await perform(ctx, { caller, action: 'device.trust', subject: device.id, detail: `trust bundle ${said}` }, async (tx) => {
      const row = await ctx.store.get('device', device.id)
      if (!hasIdentity(row)) return
      tx.update('device', { ...row, trust: { version: counts, at: ctx.now() } })
      if (alarm !== undefined) tx.note(alarm)
    })
    // A crash here: recorded; the device says it with every report.
    ctx.step('trust.acknowledged')
  }
  if (!isCurrent && said <= rollover.version) await sendTrust(ctx, device.id)
}

/** How the fleet stands to one version of the bundle and to the CA that is active, or to follow. */
export interface Readiness {
  readonly devices: number
  /** Have acknowledged this version or a newer one. */
  readonly acknowledged: number
  /** Are connected and have not: a moment, or something is wrong. */
  readonly waiting: number
  /** Are not connected, and come back: certificates lead from what they trust to that CA. */
  readonly away: number
  /** Have not acknowledged it, and nothing leads from what they trust to that CA. */
  readonly stranded: number
  /** Some of those that wait or are stranded. */
  readonly first: readonly { readonly device: DeviceId; readonly because: 'waiting' | 'stranded' }[]
}

const shown = 20

/** Every device that has an identity and is not barred, a bounded number at a time. */
export const eachDevice = async (ctx: Base, visit: (device: IdentifiedDevice) => void | Promise<void>): Promise<void> => {
  for (const state of ['enrolled', 'quarantined'] as const)
    for (let after: string | undefined; ;) {
      const page = await ctx.store.find('device', { where: { state }, limit: pageSize, ...(after === undefined ? {} : { after }) })
      await inChunks(page.filter(hasIdentity), atOnce, async (device) => await visit(device))
      if (page.length < pageSize) break
      after = page.at(-1)?.id
    }
}

/** Whether certificates that are handed out lead, now, from a device's roots to the CA of this generation. */
export const leadsTo = async (ctx: Base, generation: Generation): Promise<(roots: readonly number[]) => boolean> => {
  const { issuing, roots, crosses } = await caCertificates(ctx, generation)
  const known = new Map<number, boolean>()
  const from = (number: number): boolean => {
    const found = known.get(number)
    if (found !== undefined) return found
    const root = roots.get(number)
    const { ok } =
      root === undefined
        ? { ok: false }
        : validateChain({ leaf: issuing, intermediates: crosses, roots: [root], at: ctx.now(), leafMayBeCa: true, maxIntermediates: 16 })
    known.set(number, ok)
    return ok
  }
  return (numbers) => numbers.some(from)
}

/** Devices that are connected and have not acknowledged this version. `behind`: how many have not, connected or not: whoever is fewer is looked through. */
const waitingFor = async (ctx: Context, version: number, behind: number): Promise<readonly { readonly device: DeviceId; readonly version: number }[]> => {
  if (behind > manyBehind) {
    const rows = await inChunks(ctx.sessions.devices(), atOnce, async (id) => await ctx.store.get('device', id))
    return rows.flatMap((device) =>
      hasIdentity(device) && acknowledgedVersion(device) < version ? [{ device: device.id, version: acknowledgedVersion(device) }] : [],
    )
  }
  const found: { device: DeviceId; version: number }[] = []
  for (let after: IndexEntry | undefined; version > 0;) {
    const to = versionText(version - 1)
    const page = await ctx.store.scan('device', 'acknowledged', { from: '', to, limit: pageSize, ...(after === undefined ? {} : { after }) })
    for (const { value, id } of page) if (ctx.bus.online(id)) found.push({ device: id as DeviceId, version: Number(value) })
    after = page.at(-1)
    if (page.length < pageSize) break
  }
  return found
}
const manyBehind = 10_000

/** How the fleet stands: counted as devices acknowledge, not now. Costs as much as there are versions and connections, however many devices. */
export const readiness = async (ctx: Context, version: number, generation: Generation): Promise<Readiness> => {
  const leads = await leadsTo(ctx, generation)
  const versions = (await ctx.store.tally('device', 'acknowledged', { from: '', to: '~' })).map(({ value, rows }) => ({ version: Number(value), rows }))
  const sum = (of: typeof versions): number => of.reduce((total, { rows }) => total + rows, 0)
  const behind = versions.filter((one) => one.version < version)
  const waiting = await waitingFor(ctx, version, sum(behind))
  const counts = { devices: sum(versions), acknowledged: sum(versions) - sum(behind), waiting: waiting.length, away: 0, stranded: 0 }
  const first: Readiness['first'][number][] = waiting.slice(0, shown).map(({ device }) => ({ device, because: 'waiting' }))
  for (const one of behind) {
    const away = Math.max(0, one.rows - waiting.filter((other) => other.version === one.version).length)
    if (leads(rootsAt(ctx.authority.rollover, one.version))) counts.away += away
    else {
      counts.stranded += away
      const value = versionText(one.version)
      const some = away === 0 ? [] : await ctx.store.scan('device', 'acknowledged', { from: value, to: value, limit: shown + waiting.length })
      for (const { id } of some) if (first.length < shown && !ctx.bus.online(id)) first.push({ device: id as DeviceId, because: 'stranded' })
    }
  }
  return { ...counts, first }
}

const deviceProfiles = ['device-identity', 'device-tls'] as const

/** Device certificates of the CA with this key that are in force, those that end today included: counted when they changed, not now. */
export const certificatesUnder = async (ctx: Base, key: string): Promise<number> => {
  const today = secondOf(ctx.now()).slice(0, 10)
  const kinds = deviceProfiles.map((profile) => `valid/${profile}/${key}/`)
  const days = await Promise.all(kinds.map(async (kind) => await ctx.store.tally('certificate', 'calendar', { from: `${kind}${today}`, to: `${kind}~` })))
  return days.flat().reduce((total, { rows }) => total + rows, 0)
}

/**
 * Devices whose identity or TLS certificate comes from the CA with this key and has not run out: they would be refused without it. The TLS certificate before the
 * newest counts until that one was used: its answer may have been lost on the way. Reads every certificate of that CA that is in force, and its device.
 */
export const devicesUnder = async (ctx: Context, key: string): Promise<readonly DeviceId[]> => {
  const found = new Set<DeviceId>()
  for (const profile of deviceProfiles) {
    const kind = `valid/${profile}/${key}/`
    for (let after: IndexEntry | undefined; ;) {
      const range = { from: `${kind}${secondOf(ctx.now())}`, to: `${kind}~`, limit: pageSize }
      const page = await ctx.store.scan('certificate', 'calendar', { ...range, ...(after === undefined ? {} : { after }) })
      await inChunks(page, atOnce, async ({ id }) => {
        const row = await ctx.store.get('certificate', id)
        const device = row?.device === null || row === undefined ? undefined : await ctx.store.get('device', row.device)
        if (row === undefined || row.notAfter <= ctx.now() || !hasIdentity(device)) return
        if ([device.ldevidSerial, device.tlsSerial, device.previousTlsSerial].includes(row.id)) found.add(device.id)
      })
      after = page.at(-1)
      if (page.length < pageSize) break
    }
  }
  return [...found].toSorted()
}
