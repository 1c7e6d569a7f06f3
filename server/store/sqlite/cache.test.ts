import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { DeviceId, GroupId } from '@fleetkey/protocol/ids.ts'
import { seeded } from '@fleetkey/test/mutations.ts'
import type { Member } from '../../fleet/device.ts'
import type { Changes, Store, Write } from '../../flows/context.ts'
import { openMemoryStore } from '../memory.ts'
import { openSqliteStore } from '../sqlite.ts'
import { encodeRow } from '../rows.ts'
import { readCache } from './cache.ts'

let folder: string
let store: Store
beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-cache-'))
  store = await openSqliteStore(folder)
})
afterEach(async () => {
  await store.close()
  rmSync(folder, { recursive: true, force: true })
})

const changes = (...writes: readonly Write[]): Changes => ({
  writes,
  entries: [{ at: 1, caller: 'system:test', from: 'server', action: 'test', subject: 's', outcome: 'done', code: null, detail: '' }],
})

const some = async (write: () => Promise<Write>, next: (below: number) => number): Promise<readonly Write[]> =>
  await Promise.all(Array.from({ length: 1 + next(3) }, write))

const member = (group: number, device: number, from: number): Omit<Member, 'version'> => ({
  id: `g${group}/d${device}`,
  group: GroupId.parse(`g${group}`),
  device: DeviceId.parse(`d${device}`),
  joinedAt: 1,
  ...(from === 0 ? {} : { from: { k: from } }),
})

test.each([1, 2, 3])('what is read after any writes is what a store without a cache reads (seed %i)', async (seed) => {
  const plain = openMemoryStore()
  const next = seeded(seed)
  const write = async (): Promise<Write> => {
    const [group, device, kind] = [next(3), next(6), next(8)]
    const stored = await plain.get('member', `g${group}/d${device}`)
    // Some of them are refused: another version, no such row, a row that is there.
    const version = next(5) === 0 ? 9 : (stored?.version ?? 1)
    if (kind === 0) return { table: 'member', do: 'delete', id: `g${group}/d${device}`, version }
    // A row whose indexed values change: it leaves one answer and comes into another.
    const row = { ...member(group, device, next(3)), group: GroupId.parse(`g${next(3)}`), device: DeviceId.parse(`d${next(6)}`), version }
    return stored === undefined || next(6) === 0 ? { table: 'member', do: 'insert', row: { ...row, version: 0 } } : { table: 'member', do: 'update', row }
  }
  for (let round = 0; round < 80; round++) {
    const commits = [changes(...(await some(write, next))), changes(...(await some(write, next)))]
    // Both in one transaction, where the second may be refused for what the first has done.
    const verdicts = await Promise.all(commits.map(async (commit) => await store.commit(commit)))
    for (const [at, commit] of commits.entries()) expect(verdicts[at]).toEqual(await plain.commit(commit))
    const [group, device] = [`g${next(3)}`, `d${next(6)}`]
    const limit = 1 + next(4)
    for (const query of [
      { where: { device }, limit: 100 },
      { where: { device }, limit },
      { where: { group }, limit: 100 },
      { limit: 100 },
      { where: { group, device }, limit },
    ])
      expect(await store.find('member', query)).toEqual(await plain.find('member', query))
    const all = { from: '', to: '~' }
    expect(await store.tally('member', 'group', all)).toEqual(await plain.tally('member', 'group', all))
    expect(await store.get('member', `${group}/${device}`)).toEqual(await plain.get('member', `${group}/${device}`))
  }
  await plain.close()
})

test('nobody changes for others what he was given', async () => {
  await store.commit(changes({ table: 'member', do: 'insert', row: { ...member(1, 1, 2), version: 0 } }))
  for (let again = 0; again < 2; again++) {
    const row = (await store.get('member', 'g1/d1')) as { from: Record<string, number> }
    expect(() => (row.from['k'] = 3)).toThrow(TypeError)
    const [found] = (await store.find('member', { where: { device: 'd1' }, limit: 10 })) as unknown as { from: Record<string, number> }[]
    expect(found?.from).toEqual({ k: 2 })
  }
  await store.commit(changes({ table: 'setting', do: 'insert', row: { id: 's', version: 0, value: new Uint8Array([1, 2]) } }))
  for (let again = 0; again < 3; again++) {
    const row = await store.get('setting', 's')
    expect(row?.value).toEqual(new Uint8Array([1, 2]))
    structuredClone(row?.value.fill(0), { transfer: [row?.value.buffer as ArrayBuffer] })
    const [found] = await store.find('setting', { limit: 10 })
    expect(found?.value).toEqual(new Uint8Array([1, 2]))
    found?.value.fill(0)
  }
})

test('it keeps a bounded number of bytes, and what is in use', () => {
  const cache = readCache()
  let reads = 0
  const value = new Uint8Array(10_000)
  const bytes = Buffer.from(encodeRow('setting', { id: 'x', version: 1, value }, 1))
  const read = (id: string): unknown => cache.get('setting', id, () => (reads++, bytes))
  for (let at = 0; at < 2_000; at++) {
    read(`${at}`)
    read('used')
  }
  expect(reads).toBe(2_001)
  reads = 0
  for (let at = 1_999; at >= 0; at--) read(`${at}`)
  // Twice 2 MiB at most were there.
  expect(reads).toBeGreaterThan(2_000 - 430)
  expect(reads).toBeLessThan(2_000 - 180)
})

test('what is read in passing takes no room: it is read anew each time, and what was known stays known', () => {
  const cache = readCache()
  let reads = 0
  const read = (row: Omit<Member, 'version'>) => (): Uint8Array => {
    reads++
    return encodeRow('member', row as Member, 1)
  }
  const [known, other] = [member(0, 1, 0), member(0, 2, 0)]
  cache.get('member', known.id, read(known))
  for (let time = 0; time < 3; time++) expect(cache.get('member', other.id, read(other), false)).toMatchObject(other)
  expect(reads).toBe(4)
  expect(cache.get('member', known.id, read(known), false)).toMatchObject(known)
  expect(reads).toBe(4)
  cache.get('member', other.id, read(other))
  cache.get('member', other.id, read(other))
  expect(reads).toBe(5)
})
