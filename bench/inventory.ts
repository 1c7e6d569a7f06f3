import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import { calendar } from '@fleetkey/server/flows/calendar.ts'
import { caStatus } from '@fleetkey/server/flows/ca-status.ts'
import type { Context, Write } from '@fleetkey/server/flows/context.ts'
import { searchCertificates, type CertificateSearch } from '@fleetkey/server/flows/inventory.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { testContext } from '../test/harness.ts'
import { enrolled, entry, median } from './revocation.ts'

const day = 86_400_000
const hex = (bytes: number): string => randomBytes(bytes).toString('hex')
const below = (count: number): number => Math.floor(Math.random() * count)
const batches = 50

export interface InventoryFigures {
  /**
   * Milliseconds of one page of a hundred, median and slowest of fifty, each from another place, by what is searched for; and the CPU time of the one that took most of
   * it: on a machine that does other things the slowest by the clock is one that had to wait for a core.
   */
  readonly pages: readonly { readonly name: string; readonly median: number; readonly slowest: number; readonly slowestCpu: number }[]
  /** A hundred rows read by their serial. */
  readonly floor: number
}

const certificate = (device: DeviceId, more: Partial<Certificate>, now: number): Certificate => ({
  id: `4${hex(16).slice(1)}`,
  version: 0,
  profile: 'device-tls',
  device,
  issuer: 'issuing-ca',
  der: randomBytes(460),
  spkiHash: hex(32),
  notBefore: now - day,
  notAfter: now + 1000 * below(2 * 86_400),
  status: 'valid',
  revokedAt: null,
  reason: null,
  ...more,
})

/** A device with an identity, a TLS certificate in use, and one before it; one in a hundred is on hold, one in fifty revoked. */
const rowsOf = (at: number, now: number): Write[] => {
  const id = DeviceId.parse(`gw-${String(at).padStart(6, '0')}`)
  const status = at % 100 === 0 ? ('held' as const) : at % 50 === 1 ? ('revoked' as const) : ('valid' as const)
  const issuer = at % 10 === 0 ? 'issuing-ca-2' : 'issuing-ca'
  const ldevid = certificate(id, { profile: 'device-identity', notAfter: now + 1000 * below(3 * 365 * 86_400), status, issuer }, now)
  const tls = certificate(id, { status, issuer }, now)
  const before = certificate(id, { replacedAt: now - 1000 }, now)
  return [
    { table: 'device', do: 'insert', row: { ...enrolled(id, tls, ldevid, now), batch: `b${at % batches}` } },
    ...[ldevid, tls, before].map((row): Write => ({ table: 'certificate', do: 'insert', row })),
  ]
}

/** Milliseconds of each call, by the clock and of this process. */
const times = async (count: number, work: () => Promise<unknown>): Promise<{ readonly clock: readonly number[]; readonly cpu: readonly number[] }> => {
  const [clock, cpu]: [number[], number[]] = [[], []]
  for (let done = 0; done < count; done++) {
    const [before, started] = [process.cpuUsage(), performance.now()]
    await work()
    clock.push(performance.now() - started)
    const { user, system } = process.cpuUsage(before)
    cpu.push((user + system) / 1000)
  }
  return { clock, cpu }
}

/** Searches a durable store with so many certificates, three of each device. */
export const measureInventory = async (folder: string, count: number): Promise<InventoryFigures> => {
  const memory = await testContext()
  const store = await openSqliteStore(join(folder, 'inventory-store'))
  const now = memory.now()
  const ctx: Context = { ...memory, store, authority: await openAuthority({ ...memory, store }) }
  const serials: string[] = []
  try {
    for (let at = 0; at < count / 3; at += 1000) {
      const writes = Array.from({ length: Math.min(1000, count / 3 - at) }, (_, more) => rowsOf(at + more, now)).flat()
      for (const write of writes) if (write.table === 'certificate' && write.do === 'insert' && serials.length < 100_000) serials.push(write.row.id)
      await store.commit({ writes, entries: [entry] })
    }
    const device = (): string => `gw-${String(below(count / 3)).padStart(6, '0')}`
    const some = (span: number): number => now + below(span) * day
    const searches: readonly [string, () => Omit<CertificateSearch, 'limit'>][] = [
      ['by-end', () => ({ from: some(900) })],
      ['device', () => ({ device: device() })],
      ['prefix', () => ({ devicePrefix: device().slice(0, -2) })],
      ['serial', () => ({ serial: (serials[below(serials.length)] ?? '').slice(0, 3) })],
      ['profile', () => ({ profile: 'device-identity', from: some(900) })],
      ['issuer', () => ({ issuer: 'issuing-ca-2', from: some(900) })],
      ...(['valid', 'superseded', 'suspended', 'revoked', 'expired'] as const).map(
        (state) => [state, () => ({ state, from: state === 'expired' ? now - below(60) * day : some(2) })] as [string, () => Omit<CertificateSearch, 'limit'>],
      ),
      [
        'range',
        () => {
          const from = some(900)
          return { from, until: from + 30 * day }
        },
      ],
      ['batch', () => ({ batch: `b${below(batches)}` })],
      // Few or none of the batch is what is looked for: a page ends at its bound.
      ['combined', () => ({ batch: `b${below(batches)}`, state: 'revoked', profile: 'device-tls', issuer: 'issuing-ca-2' })],
    ]
    const pages: { name: string; median: number; slowest: number; slowestCpu: number }[] = []
    const measured = async (name: string, work: () => Promise<unknown>): Promise<void> => {
      await work()
      const { clock, cpu } = await times(50, work)
      pages.push({ name, median: median(clock), slowest: Math.max(...clock), slowestCpu: Math.max(...cpu) })
    }
    for (const [name, search] of searches) await measured(name, async () => await searchCertificates(ctx, { ...search(), limit: 100 }))
    await measured('calendar', async () => await calendar(ctx, { by: 'day', from: now, until: now + 1100 * day }))
    await measured('ca-status', async () => await caStatus(ctx))
    const { clock: floor } = await times(50, async () => {
      for (let read = 0; read < 100; read++) await store.get('certificate', serials[below(serials.length)] ?? '')
    })
    return { pages, floor: median(floor) }
  } finally {
    await store.close()
    await memory.close()
  }
}
