import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { emptyLog, extend } from '@fleetkey/server/audit/chain.ts'
import type { AuditEntry } from '@fleetkey/server/audit/entry.ts'
import { rootOf } from '@fleetkey/server/audit/tree.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import type { EnrolmentToken } from '@fleetkey/server/fleet/enrolment-token.ts'
import type { RegisteredDevice } from '@fleetkey/server/fleet/device.ts'
import type { Changes, Store, Write } from '@fleetkey/server/flows/context.ts'

export const anEntry = (detail = ''): AuditEntry => ({
  at: 1_800_000_000_000,
  caller: 'operator:alice',
  from: '127.0.0.0/24',
  action: 'test',
  subject: 'rows',
  outcome: 'done',
  code: null,
  detail,
})

export const aDevice = (id: string, more: Partial<RegisteredDevice> = {}): RegisteredDevice => ({
  id: DeviceId.parse(id),
  version: 0,
  state: 'registered',
  serial: `sn-${id}`,
  model: 'm1',
  batch: 'b1',
  registeredAt: 5,
  lastRefusal: null,
  ...more,
})

const aCertificate = (id: string, device: string | null, more: Partial<Certificate> = {}): Certificate => ({
  id,
  version: 0,
  profile: 'device-tls',
  device: device === null ? null : DeviceId.parse(device),
  der: Uint8Array.of(1, 2, 3),
  spkiHash: `s${id}`,
  notBefore: 1,
  notAfter: 2,
  status: 'valid',
  revokedAt: null,
  reason: null,
  ...more,
})

export const insertDevice = (id: string, more: Partial<RegisteredDevice> = {}): Write => ({ table: 'device', do: 'insert', row: aDevice(id, more) })

/** A commit with one entry. */
export const change = (...writes: Write[]): Changes => ({ writes, entries: [anEntry(`${writes.length} writes`)] })

/** What every back end of the store must do. `open` gives an empty one; the suite closes it. */
export const storeConformance = (name: string, open: () => Promise<Store>): void => {
  describe(`store: ${name}`, () => {
    let store: Store
    beforeEach(async () => {
      store = await open()
    })
    afterEach(async () => {
      await store.close()
    })
    const ids = async (query: Parameters<typeof store.find<'device'>>[1]): Promise<string[]> => (await store.find('device', query)).map(({ id }) => id)

    test('a row comes back as it was, with version 1, then 2', async () => {
      expect(await store.get('device', 'd1')).toBeUndefined()
      expect(await store.commit(change(insertDevice('d1', { lastRefusal: { at: 2, code: 'forbidden', reason: 'ä\u0000"' } })))).toEqual({
        committed: true,
        sequence: 1,
      })
      const row = await store.get('device', 'd1')
      expect(row).toEqual({ ...aDevice('d1', { lastRefusal: { at: 2, code: 'forbidden', reason: 'ä\u0000"' } }), version: 1 })
      expect(await store.commit(change({ table: 'device', do: 'update', row: { ...aDevice('d1'), version: 1, model: 'm2' } }))).toEqual({
        committed: true,
        sequence: 2,
      })
      expect(await store.get('device', 'd1')).toEqual({ ...aDevice('d1'), version: 2, model: 'm2' })
    })

    test('bytes come back as Uint8Array of their own', async () => {
      const value = Buffer.from('value')
      await store.commit(change({ table: 'setting', do: 'insert', row: { id: 's', version: 0, value } }))
      value.fill(0)
      const first = await store.get('setting', 's')
      expect(first?.value).toEqual(new Uint8Array(Buffer.from('value')))
      first?.value.fill(0)
      expect((await store.get('setting', 's'))?.value).toEqual(new Uint8Array(Buffer.from('value')))
    })

    const conflicts: readonly [string, Write, object][] = [
      ['insert of an id that is there', insertDevice('d1', { serial: 'other' }), { id: 'd1', why: 'exists' }],
      ['insert that also repeats a unique field', insertDevice('d1'), { id: 'd1', why: 'exists' }],
      ['insert of a unique value that is there', insertDevice('d9', { serial: 'sn-d1' }), { id: 'd9', why: 'unique', field: 'serial' }],
      ['update with an old version', { table: 'device', do: 'update', row: { ...aDevice('d1'), version: 0 } }, { id: 'd1', why: 'version' }],
      ['update of a missing row', { table: 'device', do: 'update', row: { ...aDevice('d9'), version: 1 } }, { id: 'd9', why: 'missing' }],
      [
        'update onto a unique value',
        { table: 'device', do: 'update', row: { ...aDevice('d1'), version: 1, serial: 'sn-d2' } },
        { id: 'd1', why: 'unique', field: 'serial' },
      ],
      ['deletion with another version', { table: 'device', do: 'delete', id: 'd1', version: 2 }, { id: 'd1', why: 'version' }],
      ['deletion of a missing row', { table: 'device', do: 'delete', id: 'd9', version: 1 }, { id: 'd9', why: 'missing' }],
    ]
    test.each(conflicts)('conflict: %s; nothing of the commit is written', async (_name, write, conflict) => {
      await store.commit(change(insertDevice('d1'), insertDevice('d2')))
      const before = await store.checkpoint()
      const verdict = await store.commit(change(insertDevice('d5'), write, insertDevice('d6')))
      expect(verdict).toEqual({ committed: false, conflict: { table: 'device', ...conflict } })
      expect(await ids({ limit: 10 })).toEqual(['d1', 'd2'])
      expect(await ids({ where: { serial: 'sn-d5' }, limit: 10 })).toEqual([])
      expect(await store.checkpoint()).toEqual(before)
    })

    test('of commits made at once each has its own verdict', async () => {
      const verdicts = await Promise.all(
        [[insertDevice('d1')], [insertDevice('d2')], [insertDevice('d4'), insertDevice('d1')], [insertDevice('d3')]].map(
          async (writes) => await store.commit(change(...writes)),
        ),
      )
      expect(verdicts.map(({ committed }) => committed)).toEqual([true, true, false, true])
      expect(verdicts.filter((verdict) => verdict.committed).map((verdict) => verdict.sequence)).toEqual([1, 2, 3])
      // The third one's first write is taken back with it, and is counted nowhere.
      expect(await ids({ limit: 10 })).toEqual(['d1', 'd2', 'd3'])
      expect(await store.count('device', { state: 'registered' })).toBe(3)
      expect((await store.checkpoint()).size).toBe(3)
    })

    test('of a hundred updates of one version exactly one wins', async () => {
      await store.commit(change(insertDevice('d1')))
      const row = { ...aDevice('d1'), version: 1 }
      const verdicts = await Promise.all(
        Array.from({ length: 100 }, async (_, at) => await store.commit(change({ table: 'device', do: 'update', row: { ...row, model: `m${at}` } }))),
      )
      expect(verdicts.filter(({ committed }) => committed)).toHaveLength(1)
      expect((await store.checkpoint()).size).toBe(2)
    })

    test('of sixty-four that spend one token exactly one wins; tokens are found by batch', async () => {
      const token: EnrolmentToken = {
        id: 'a1',
        version: 0,
        batch: 'b1',
        device: null,
        verifier: Uint8Array.of(1, 2),
        createdAt: 1,
        createdBy: 'operator:alice',
        expiresAt: 2,
        revokedAt: null,
        spent: null,
      }
      await store.commit(
        change({ table: 'enrolmentToken', do: 'insert', row: token }, { table: 'enrolmentToken', do: 'insert', row: { ...token, id: 'a2', batch: 'b2' } }),
      )
      const spend = (at: number): Write => ({
        table: 'enrolmentToken',
        do: 'update',
        row: { ...token, version: 1, spent: { at, device: DeviceId.parse(`d${at}`), key: 'k' } },
      })
      const verdicts = await Promise.all(Array.from({ length: 64 }, async (_, at) => await store.commit(change(spend(at)))))
      const winner = verdicts.findIndex(({ committed }) => committed)
      expect(verdicts.filter(({ committed }) => committed)).toHaveLength(1)
      expect(await store.find('enrolmentToken', { where: { batch: 'b1' }, limit: 9 })).toEqual([
        { ...token, version: 2, spent: { at: winner, device: `d${winner}`, key: 'k' } },
      ])
    })

    test('a unique value is free again in the same commit that gives it up', async () => {
      await store.commit(change(insertDevice('d1')))
      expect(await store.commit(change({ table: 'device', do: 'delete', id: 'd1', version: 1 }, insertDevice('d2', { serial: 'sn-d1' })))).toMatchObject({
        committed: true,
      })
      expect(await ids({ where: { serial: 'sn-d1' }, limit: 2 })).toEqual(['d2'])
    })

    test('one commit may insert, update and delete the same row', async () => {
      const writes: Write[] = [insertDevice('d1'), { table: 'device', do: 'update', row: { ...aDevice('d1'), version: 1, batch: 'b2' } }]
      await store.commit(change(...writes))
      expect(await store.get('device', 'd1')).toMatchObject({ version: 2, batch: 'b2' })
      await store.commit(change({ table: 'device', do: 'delete', id: 'd1', version: 2 }, insertDevice('d1')))
      expect(await store.get('device', 'd1')).toMatchObject({ version: 1, batch: 'b1' })
    })

    test('find: index fields together, prefix, cursor, limit; ascending by bytes', async () => {
      const rows = ['a-1', 'a-10', 'a-2', 'b-1'].map((id) => insertDevice(id, { batch: id === 'a-2' ? 'b2' : 'b1' }))
      await store.commit(change(...rows.toReversed()))
      expect(await ids({ limit: 10 })).toEqual(['a-1', 'a-10', 'a-2', 'b-1'])
      expect(await ids({ limit: 2 })).toEqual(['a-1', 'a-10'])
      expect(await ids({ limit: 0 })).toEqual([])
      expect(await ids({ after: 'a-10', limit: 10 })).toEqual(['a-2', 'b-1'])
      expect(await ids({ after: 'a-15', limit: 10 })).toEqual(['a-2', 'b-1'])
      expect(await ids({ prefix: 'a-', limit: 10 })).toEqual(['a-1', 'a-10', 'a-2'])
      expect(await ids({ prefix: 'a-', after: 'a-1', limit: 1 })).toEqual(['a-10'])
      expect(await ids({ where: { batch: 'b1' }, limit: 10 })).toEqual(['a-1', 'a-10', 'b-1'])
      expect(await ids({ where: { batch: 'b1', state: 'registered' }, prefix: 'a-', after: 'a-1', limit: 10 })).toEqual(['a-10'])
      expect(await ids({ where: { state: 'revoked' }, limit: 10 })).toEqual([])
      expect(await store.count('device')).toBe(4)
      expect(await store.count('device', { batch: 'b1' })).toBe(3)
      expect(await store.count('device', { batch: 'none' })).toBe(0)
    })

    test('characters of a pattern are characters', async () => {
      const settings = ['a%b', 'a_b', 'axb', "a'b", 'ä/1', 'z'].map((id): Write => ({
        table: 'setting',
        do: 'insert',
        row: { id, version: 0, value: new Uint8Array() },
      }))
      await store.commit(change(...settings))
      const found = async (prefix: string): Promise<string[]> => (await store.find('setting', { prefix, limit: 9 })).map(({ id }) => id)
      expect(await found('a%')).toEqual(['a%b'])
      expect(await found('a_')).toEqual(['a_b'])
      expect(await found("a'")).toEqual(["a'b"])
      expect(await found('')).toEqual(['a%b', "a'b", 'a_b', 'axb', 'z', 'ä/1'])
    })

    test('an update moves the row in the indexes', async () => {
      await store.commit(change(insertDevice('d1')))
      await store.commit(change({ table: 'device', do: 'update', row: { ...aDevice('d1'), version: 1, batch: 'b2', serial: 'new' } }))
      expect(await ids({ where: { batch: 'b1' }, limit: 9 })).toEqual([])
      expect(await ids({ where: { batch: 'b2' }, limit: 9 })).toEqual(['d1'])
      expect(await store.commit(change(insertDevice('d2', { serial: 'sn-d1' })))).toMatchObject({ committed: true })
    })

    test('a field that is null is in no index', async () => {
      await store.commit(
        change({ table: 'certificate', do: 'insert', row: aCertificate('01', null) }, { table: 'certificate', do: 'insert', row: aCertificate('02', 'd1') }),
      )
      expect((await store.find('certificate', { where: { device: 'd1' }, limit: 9 })).map(({ id }) => id)).toEqual(['02'])
      expect(await store.count('certificate')).toBe(2)
      const withdrawn = async (): Promise<string[]> =>
        (await store.scan('certificate', 'withdrawn', { from: '', to: '~', limit: 9 })).map(({ value, id }) => `${value} ${id}`)
      expect(await withdrawn()).toEqual([])
      await store.commit(change({ table: 'certificate', do: 'update', row: { ...aCertificate('02', 'd1'), version: 1, status: 'held' } }))
      expect(await withdrawn()).toEqual(['held 02'])
      expect((await store.find('certificate', { where: { withdrawn: 'held', device: 'd1' }, limit: 9 })).map(({ id }) => id)).toEqual(['02'])
      await store.commit(change({ table: 'certificate', do: 'update', row: { ...aCertificate('02', 'd1'), version: 2 } }))
      expect(await withdrawn()).toEqual([])
    })

    test('an index is scanned in order of its values, page by page', async () => {
      const insert = (id: string, notAfter: number, more: Partial<Certificate> = {}): Write => ({
        table: 'certificate',
        do: 'insert',
        row: aCertificate(id, 'd1', { notAfter, ...more }),
      })
      await store.commit(change(insert('03', 5000), insert('01', 5000), insert('02', 4000), insert('04', 9000), insert('05', 5000, { profile: 'station' })))
      const place = (second: number): string => `valid/device-tls/issuing-ca/1970-01-01T00:00:0${second}`
      const all = [
        { value: place(4), id: '02' },
        { value: place(5), id: '01' },
        { value: place(5), id: '03' },
        { value: place(9), id: '04' },
      ]
      const range = { from: 'valid/device-tls/', to: 'valid/device-tls/~', limit: 9 }
      expect(await store.scan('certificate', 'calendar', range)).toEqual(all)
      expect(await store.scan('certificate', 'calendar', { ...range, limit: 2 })).toEqual(all.slice(0, 2))
      expect(await store.scan('certificate', 'calendar', { ...range, after: all[1] as never, limit: 1 })).toEqual([all[2]])
      expect(await store.scan('certificate', 'calendar', { ...range, from: place(5), to: place(5) })).toEqual(all.slice(1, 3))
      expect(await store.scan('certificate', 'calendar', { ...range, from: place(9), after: all[0] as never })).toEqual(all.slice(3))
      const row = { ...aCertificate('01', 'd1', { notAfter: 5000 }), version: 1 }
      await store.commit(
        change({ table: 'certificate', do: 'update', row: { ...row, replacedAt: 1 } }, { table: 'certificate', do: 'delete', id: '02', version: 1 }),
      )
      expect(await store.scan('certificate', 'calendar', range)).toEqual(all.slice(2))
      expect(await store.scan('certificate', 'device', { from: 'd', to: 'd~', limit: 9 })).toEqual(['01', '03', '04', '05'].map((id) => ({ value: 'd1', id })))
      await expect(store.scan('certificate', 'reason' as never, range)).rejects.toMatchObject({ code: 'internal', reason: 'store.index' })
    })

    test('rows are counted by value as they change; what a commit did not do is not counted', async () => {
      const day = 86_400_000
      const insert = (id: string, notAfter: number): Write => ({ table: 'certificate', do: 'insert', row: aCertificate(id, null, { notAfter }) })
      await store.commit(change(insert('01', day), insert('02', day + 1000), insert('03', 3 * day), insertDevice('d1'), insertDevice('d2')))
      const place = (standing: string, date: string): string => `${standing}/device-tls/issuing-ca/1970-01-0${date}`
      const all = { from: '', to: '~' }
      expect(await store.tally('certificate', 'calendar', all)).toEqual([
        { value: place('valid', '2'), rows: 2 },
        { value: place('valid', '4'), rows: 1 },
      ])
      expect(await store.tally('certificate', 'calendar', { from: place('valid', '3'), to: place('valid', '9') })).toEqual([
        { value: place('valid', '4'), rows: 1 },
      ])
      expect(await store.count('device', { state: 'registered' })).toBe(2)
      const revoked = { ...aCertificate('03', null, { notAfter: 3 * day }), version: 1, status: 'revoked' } as const
      expect(await store.commit(change(insert('04', day), { table: 'certificate', do: 'update', row: { ...revoked, version: 7 } }))).toMatchObject({
        committed: false,
      })
      await store.commit(
        change(
          { table: 'certificate', do: 'update', row: revoked },
          { table: 'certificate', do: 'delete', id: '01', version: 1 },
          { table: 'device', do: 'delete', id: 'd2', version: 1 },
        ),
      )
      expect(await store.tally('certificate', 'calendar', all)).toEqual([
        { value: place('revoked', '4'), rows: 1 },
        { value: place('valid', '2'), rows: 1 },
      ])
      expect(await store.count('device', { state: 'registered' })).toBe(1)
      expect(await store.tally('device', 'acknowledged', all)).toEqual([])
      await expect(store.tally('device', 'batch' as never, all)).rejects.toMatchObject({ code: 'internal', reason: 'store.index' })
    })

    test('a search on a field without index, a row with undefined and a commit without entry are mistakes', async () => {
      await expect(store.find('device', { where: { model: 'm1' } as never, limit: 1 })).rejects.toMatchObject({ code: 'internal', reason: 'store.index' })
      await expect(store.commit(change(insertDevice('d1', { model: undefined as never })))).rejects.toMatchObject({ code: 'internal', reason: 'store.row' })
      await expect(store.commit({ writes: [insertDevice('d1')], entries: [] })).rejects.toMatchObject({ code: 'internal', reason: 'store.unaudited' })
      expect(await store.count('device')).toBe(0)
    })

    test('entries are numbered without a gap, chained, and under the tree', async () => {
      expect(await store.checkpoint()).toEqual({ size: 0, root: rootOf(emptyLog.tree), chain: emptyLog.chain })
      const entries = Array.from({ length: 21 }, (_, at) => ({ ...anEntry(`number ${at + 1}`), at: at * 1000, code: at % 2 === 0 ? null : 'forbidden' }))
      expect(await store.commit({ writes: [], entries: entries.slice(0, 3) })).toEqual({ committed: true, sequence: 3 })
      await Promise.all(entries.slice(3).map(async (entry) => await store.commit({ writes: [], entries: [entry] })))
      let head = emptyLog
      const expected = entries.map((entry) => {
        const extended = extend(head, entry)
        head = extended.head
        return extended.sequenced
      })
      expect(await store.audit({ after: 0, limit: 100 })).toEqual(expected)
      expect(await store.audit({ after: 5, limit: 2 })).toEqual(expected.slice(5, 7))
      expect(await store.audit({ after: 21, limit: 2 })).toEqual([])
      expect(await store.checkpoint()).toEqual({ size: 21, root: rootOf(head.tree), chain: head.chain })
    })

    test('healthy while open; closed means unavailable, twice is harmless', async () => {
      expect(store.health()).toEqual({ writable: true, reason: null })
      const last = store.commit(change(insertDevice('d1')))
      await store.close()
      await store.close()
      expect(await last).toMatchObject({ committed: true })
      expect(store.health().writable).toBe(false)
      await expect(store.get('device', 'd1')).rejects.toMatchObject({ code: 'unavailable' })
      await expect(store.commit(change(insertDevice('d2')))).rejects.toMatchObject({ code: 'unavailable' })
    })
  })
}
