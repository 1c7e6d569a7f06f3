import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import fc from 'fast-check'
import { afterAll, expect, test } from 'vitest'
import type { Changes, Store, Write } from '@fleetkey/server/flows/context.ts'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { aDevice, change, storeConformance } from './conformance/store.ts'

const folder = mkdtempSync(join(tmpdir(), 'fleetkey-store-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
let count = 0

storeConformance('memory', async () => openMemoryStore())
storeConformance('sqlite', async () => await openSqliteStore(join(folder, String(++count))))

const id = fc.constantFrom('d1', 'd2', 'd3')
const serial = fc.constantFrom('s1', 's2', 's3')
const version = fc.integer({ min: 0, max: 3 })
const write: fc.Arbitrary<Write> = fc.oneof(
  fc.record({ id, serial }).map((of): Write => ({ table: 'device', do: 'insert', row: aDevice(of.id, { serial: of.serial }) })),
  fc.record({ id, serial, version }).map((of): Write => ({ table: 'device', do: 'update', row: aDevice(of.id, { serial: of.serial, version: of.version }) })),
  fc.record({ id, version }).map((of): Write => ({ table: 'device', do: 'delete', ...of })),
)
/** Rounds of commits; those of one round are made at once. */
const rounds = fc.array(fc.array(fc.array(write, { maxLength: 3 }), { minLength: 1, maxLength: 4 }), { maxLength: 6 })

const stateOf = async (store: Store): Promise<unknown> => [
  await store.find('device', { limit: 10 }),
  await store.tally('device', 'state', { from: '', to: '~' }),
  await store.scan('device', 'serial', { from: '', to: '~', limit: 10 }),
  await store.checkpoint(),
  await store.audit({ after: 0, limit: 100 }),
]

test('whatever is committed, both stores answer and hold the same', async () => {
  await fc.assert(
    fc.asyncProperty(rounds, async (commits) => {
      const [memory, sqlite] = [openMemoryStore(), await openSqliteStore(join(folder, String(++count)))]
      try {
        for (const round of commits) {
          const run = async (store: Store): Promise<unknown> =>
            await Promise.all(round.map(async (writes) => await store.commit(change(...writes) satisfies Changes)))
          expect(await run(sqlite)).toEqual(await run(memory))
        }
        expect(await stateOf(sqlite)).toEqual(await stateOf(memory))
      } finally {
        await sqlite.close()
      }
    }),
    { numRuns: 60 },
  )
})
