import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Store } from '@fleetkey/server/flows/context.ts'
import { sweepEnrolments } from '@fleetkey/server/flows/enrol.ts'
import { findAll } from '@fleetkey/server/flows/rows.ts'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { testContext, type TestContext } from './harness.ts'

const minute = 60_000
const bytes = new Uint8Array(8)

const stores: readonly { readonly name: string; readonly open: (folder: string) => Promise<Store> }[] = [
  { name: 'memory', open: async () => openMemoryStore() },
  { name: 'SQLite', open: async (folder) => await openSqliteStore(folder) },
]

describe.each(stores)('what enrolments leave behind is swept away ($name)', ({ open }) => {
  let base: TestContext
  let store: Store
  let folder: string
  beforeEach(async () => {
    folder = mkdtempSync(join(tmpdir(), 'fleetkey-sweep-'))
    base = await testContext()
    store = await open(folder)
  })
  afterEach(async () => {
    await store.close()
    await base.close()
    rmSync(folder, { recursive: true, force: true })
  })

  /** As many challenges that ended, and answers that were given, so many milliseconds ago. */
  const leave = async (name: string, count: number, ago: number): Promise<void> => {
    const at = base.clock.now - ago
    const challenge = { version: 1, client: name, purpose: 'enrol', hello: bytes, challenge: bytes, secret: null, expires: at, spentAt: null } as const
    const verdict = await store.commit({
      writes: Array.from({ length: count }, (_, one) => [
        { table: 'challenge', do: 'insert', row: { ...challenge, id: `${name}-${one}` } } as const,
        { table: 'request', do: 'insert', row: { id: `${name}/${one}`, version: 1, answer: bytes, createdAt: at } } as const,
      ]).flat(),
      entries: [{ at, caller: 'system:test', from: 'server', action: 'enrol.sweep', subject: name, outcome: 'done', code: null, detail: '' }],
    })
    expect(verdict).toMatchObject({ committed: true })
  }
  const left = async (table: 'challenge' | 'request'): Promise<readonly string[]> => [
    ...new Set((await findAll(store, table)).map(({ id }) => id.split(/[-/]/, 1)[0] ?? '')),
  ]

  test('what is over goes, to the second, however much it is; the rest is not even read', async () => {
    await leave('now', 3, 0)
    await leave('lately', 3, 119_000)
    await leave('before', 250, 4 * minute)
    await leave('hourly', 130, 59 * minute)
    await leave('old', 3, 62 * minute)
    const read: string[] = []
    let commits = 0
    const watched: Store = {
      ...store,
      async get(table, id, options) {
        if (table === 'challenge' || table === 'request') read.push(id)
        return await store.get(table, id, options)
      },
      async commit(changes, options) {
        commits++
        return await store.commit(changes, options)
      },
      find: async () => await Promise.reject(new Error('a sweep searches by time alone')),
    }
    await sweepEnrolments({ ...base, store: watched })
    expect(await left('challenge')).toEqual(['lately', 'now'])
    expect(await left('request')).toEqual(['before', 'hourly', 'lately', 'now'])
    expect(read.filter((id) => id.startsWith('now') || id.startsWith('lately'))).toEqual([])
    // A hundred of each in a commit.
    expect(commits).toBe(4)
    await sweepEnrolments({ ...base, store: watched })
    base.clock.now += 3 * minute
    await sweepEnrolments({ ...base, store: watched })
    expect(await left('challenge')).toEqual([])
    expect(await left('request')).toEqual(['before', 'lately', 'now'])
  })

  test('a commit that fails leaves what it was about; the next run goes on', async () => {
    await leave('before', 250, 90 * minute)
    let commits = 0
    const failing: Store = {
      ...store,
      async commit(changes, options) {
        if (++commits === 2) throw new Error('no disk')
        return await store.commit(changes, options)
      },
    }
    await expect(sweepEnrolments({ ...base, store: failing })).rejects.toThrow('no disk')
    expect(await findAll(store, 'challenge')).toHaveLength(150)
    await sweepEnrolments({ ...base, store })
    expect(await findAll(store, 'challenge')).toEqual([])
    expect(await findAll(store, 'request')).toEqual([])
  })
})
