import Database from 'better-sqlite3'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { certificateStates, issuerKeyOf, stateOf, type Certificate } from '@fleetkey/server/ca/certificate.ts'
import { calendar, dayText, spanBegins, spanEnds } from '@fleetkey/server/flows/calendar.ts'
import type { Base, Store, Write } from '@fleetkey/server/flows/context.ts'
import { findCertificate, searchCertificates, type CertificateSearch } from '@fleetkey/server/flows/inventory.ts'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { aDevice, change } from './conformance/store.ts'

const folder = mkdtempSync(join(tmpdir(), 'fleetkey-inventory-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const now = Date.UTC(2027, 0, 15, 12)
const day = 86_400_000
let state = 4
/** The same rows in every run. */
const random = (): number => (state = (state * 48_271) % 2_147_483_647) / 2_147_483_647
const pick = <T>(values: readonly T[]): T => values[Math.floor(random() * values.length)] as T

const devices = Array.from({ length: 60 }, (_, at) => `gw-${at}`)
const batchOf = (device: string): string => `b${Number(device.slice(3)) % 4}`

const certificates = Array.from({ length: 600 }, (_, at): Certificate => {
  const profile = pick(['device-tls', 'device-identity', 'server-tls', 'issuing-ca', 'ocsp-responder'] as const)
  const status = pick(['valid', 'valid', 'valid', 'held', 'revoked'] as const)
  const issuer = pick(['issuing-ca', 'issuing-ca-2', undefined])
  return {
    id: `${pick(['4a', '4b'])}${at.toString(16).padStart(6, '0')}`,
    version: 0,
    profile,
    device: profile.startsWith('device') ? DeviceId.parse(pick(devices)) : null,
    ...(issuer === undefined ? {} : { issuer }),
    der: Uint8Array.of(at),
    spkiHash: `s${at}`,
    notBefore: now - 90 * day,
    // Some at the same second, some on a day's edge.
    notAfter: pick([now + 1000, now - 1000, Date.UTC(2027, 1, 1) - 1000, Date.UTC(2027, 1, 1), now + Math.floor((random() - 0.5) * 200) * day]),
    status,
    revokedAt: status === 'valid' ? null : now - day,
    reason: status === 'valid' ? null : 'stolen',
    ...(status === 'valid' && random() < 0.3 ? { replacedAt: now - 1 } : {}),
  }
})

const filled = async (store: Store): Promise<Base> => {
  const writes: Write[] = [
    ...devices.map((id): Write => ({ table: 'device', do: 'insert', row: aDevice(id, { batch: batchOf(id) }) })),
    ...certificates.map((row): Write => ({ table: 'certificate', do: 'insert', row })),
  ]
  expect(await store.commit(change(...writes))).toMatchObject({ committed: true })
  return { store, now: () => now } as unknown as Base
}

const all = async (ctx: Base, search: Omit<CertificateSearch, 'limit'>, limit: number): Promise<string[]> => {
  const found: string[] = []
  let after: string | null = null
  do {
    const page = await searchCertificates(ctx, { ...search, limit, ...(after === null ? {} : { after }) })
    expect(page.certificates.length).toBeLessThanOrEqual(limit)
    found.push(...page.certificates.map(({ id }) => id))
    after = page.next
  } while (after !== null)
  return found
}

/** The same without any index. */
const expected = (search: Omit<CertificateSearch, 'limit'>): Certificate[] =>
  certificates.filter(
    (one) =>
      (search.serial === undefined || one.id.startsWith(search.serial)) &&
      (search.device === undefined || one.device === search.device) &&
      (search.devicePrefix === undefined || one.device?.startsWith(search.devicePrefix) === true) &&
      (search.batch === undefined || (one.device !== null && batchOf(one.device) === search.batch)) &&
      (search.profile === undefined || one.profile === search.profile) &&
      (search.issuer === undefined || issuerKeyOf(one) === search.issuer) &&
      (search.state === undefined || stateOf(one, now) === search.state) &&
      (search.from === undefined || one.notAfter >= search.from) &&
      (search.until === undefined || one.notAfter < search.until),
  )

const maybe = <T>(arbitrary: fc.Arbitrary<T>): fc.Arbitrary<T | undefined> => fc.option(arbitrary, { nil: undefined, freq: 2 })
const time = fc.constantFrom(now, now + 1000, now + 1001, now - 1000, now - 999, Date.UTC(2027, 1, 1), now + 30 * day, now - 30 * day, 0)
const searches: fc.Arbitrary<Omit<CertificateSearch, 'limit'>> = fc.record({
  serial: maybe(fc.constantFrom('4', '4a', '4b0000', '4a00001', '5')),
  device: maybe(fc.constantFrom(...devices.slice(0, 5), 'gw-x')),
  devicePrefix: maybe(fc.constantFrom('g', 'gw-1', 'gw-59', 'x')),
  batch: maybe(fc.constantFrom('b0', 'b3', 'b9')),
  profile: maybe(fc.constantFrom('device-tls', 'issuing-ca', 'station')),
  issuer: maybe(fc.constantFrom('issuing-ca', 'issuing-ca-2', 'root-ca')),
  state: maybe(fc.constantFrom(...certificateStates)),
  from: maybe(time),
  until: maybe(time),
})

const stores = [
  ['memory', async () => openMemoryStore()],
  ['sqlite', async () => await openSqliteStore(join(folder, 'store'))],
] as const

describe.each(stores)('inventory: %s', (_name, open) => {
  test('every search finds what holds, each once, whatever the size of its pages', { timeout: 60_000 }, async () => {
    const ctx = await filled(await open())
    try {
      await fc.assert(
        fc.asyncProperty(searches, fc.constantFrom<number>(7, 100), async (search, limit) => {
          const found = await all(ctx, search, limit)
          expect(found.toSorted()).toEqual(
            expected(search)
              .map(({ id }) => id)
              .toSorted(),
          )
        }),
        {
          numRuns: 50,
          examples: [
            [{ state: 'revoked' }, 1],
            [{}, 100],
          ],
        },
      )
      // Without anything that names few: in order of their ends.
      const inOrder = expected({ state: 'valid' }).toSorted((a, b) => a.notAfter - b.notAfter || (a.id < b.id ? -1 : 1))
      expect(await all(ctx, { state: 'valid' }, 50)).toEqual(inOrder.map(({ id }) => id))
      for (const cursor of ['x', 'd.gw-1', 'e.2027', 's..', 'e.a.b.c', `s.${'4'.repeat(65)}`])
        await expect(searchCertificates(ctx, { limit: 1, after: cursor, ...(cursor.startsWith('s') ? { serial: '4' } : {}) })).rejects.toMatchObject({
          code: 'malformed',
        })
      expect((await findCertificate(ctx, certificates[3]?.id ?? '')).id).toBe(certificates[3]?.id)
      await expect(findCertificate(ctx, 'ff')).rejects.toMatchObject({ code: 'not-found' })
    } finally {
      await ctx.store.close()
    }
  })

  test('the calendar counts what is in force, by day, week and month', async () => {
    const ctx = await filled(await openStore(open))
    try {
      for (const by of ['day', 'week', 'month'] as const) {
        const [from, until] = [now - 40 * day, now + 90 * day]
        const spans = await calendar(ctx, { by, from, until })
        const wanted = new Map<number, number>()
        for (const one of certificates) {
          const isCounted = one.status === 'valid' && one.replacedAt === undefined
          if (!isCounted || one.notAfter < spanBegins(by, from) || one.notAfter >= spanEnds('day', until)) continue
          const at = spanBegins(by, one.notAfter)
          wanted.set(at, (wanted.get(at) ?? 0) + 1)
        }
        expect(spans.map((span) => [span.from, span.certificates])).toEqual([...wanted].toSorted(([a], [b]) => a - b))
        for (const { certificates: sum, kinds } of spans) expect(kinds.reduce((total, kind) => total + kind.certificates, 0)).toBe(sum)
      }
      const some = await calendar(ctx, { by: 'month', from: now, until: now + 90 * day, profile: 'device-tls', issuer: 'issuing-ca-2' })
      expect(some.length).toBeGreaterThan(0)
      for (const { kinds } of some) expect(kinds).toMatchObject([{ profile: 'device-tls', issuer: 'issuing-ca-2' }])
    } finally {
      await ctx.store.close()
    }
  })
})

let count = 0
const openStore = async (open: () => Promise<Store>): Promise<Store> =>
  open === stores[1][1] ? await openSqliteStore(join(folder, `again-${count++}`)) : await open()

test('spans: weeks begin on Monday, months on their first', () => {
  const texts = (by: 'day' | 'week' | 'month', at: number): string[] => [spanBegins(by, at), spanEnds(by, at)].map(dayText)
  expect(texts('day', Date.UTC(2027, 1, 28, 23, 59))).toEqual(['2027-02-28', '2027-03-01'])
  // The 1st of March 2027 is a Monday.
  expect(texts('week', Date.UTC(2027, 1, 28, 23, 59))).toEqual(['2027-02-22', '2027-03-01'])
  expect(texts('week', Date.UTC(2027, 2, 1))).toEqual(['2027-03-01', '2027-03-08'])
  expect(texts('month', Date.UTC(2028, 1, 29))).toEqual(['2028-02-01', '2028-03-01'])
  expect(texts('month', Date.UTC(2027, 11, 31, 23))).toEqual(['2027-12-01', '2028-01-01'])
})

test('every statement of a search goes by an index, and sorts nothing', async () => {
  const asked = new Set<string>()
  const { prepare } = Database.prototype
  Database.prototype.prepare = function (this: Database.Database, source: string) {
    asked.add(source)
    return prepare.call(this, source)
  } as typeof prepare
  const path = join(folder, 'plans')
  try {
    const ctx = await filled(await openSqliteStore(path))
    asked.clear()
    const kinds: readonly Omit<CertificateSearch, 'limit'>[] = [
      {},
      { serial: '4a' },
      { device: 'gw-1' },
      { devicePrefix: 'gw-' },
      { batch: 'b1' },
      { profile: 'device-tls' },
      { issuer: 'issuing-ca' },
      { from: now, until: now + 30 * day },
      ...certificateStates.map((state) => ({ state })),
    ]
    for (const search of kinds) await all(ctx, search, 20)
    await calendar(ctx, { by: 'day' })
    for (const after of [{}, { after: '4' }]) {
      await ctx.store.find('certificate', { where: { withdrawn: 'revoked' }, limit: 9, ...after })
      await ctx.store.find('intent', { where: { unissued: 'open' }, limit: 9, ...after })
    }
    await ctx.store.scan('certificate', 'withdrawn', { from: 'held', to: 'revoked', limit: 9, after: { value: 'held', id: '4' } })
    await expect(findCertificate(ctx, '4f3')).rejects.toMatchObject({ code: 'not-found' })
    await ctx.store.close()
  } finally {
    Database.prototype.prepare = prepare
  }
  const db = new Database(join(path, 'fleetkey.db'))
  const selects = [...asked].filter((source) => /^select/i.test(source))
  expect(selects.length).toBeGreaterThan(3)
  for (const source of selects) {
    const parameters = Array.from({ length: source.split('?').length - 1 }, () => 'x')
    const plan = (db.prepare(`EXPLAIN QUERY PLAN ${source}`).all(...parameters) as { detail: string }[]).map(({ detail }) => detail)
    expect({ source, plan }).toEqual({ source, plan: [expect.stringMatching(/^SEARCH .* USING (COVERING )?(INDEX|PRIMARY KEY)/)] })
  }
  db.close()
})
