import { randomBytes } from 'node:crypto'
import { join } from 'node:path'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Context, Write } from '@fleetkey/server/flows/context.ts'
import { exposedKeys } from '@fleetkey/server/flows/exposed-keys.ts'
import { heldAt } from '@fleetkey/server/flows/held.ts'
import { ledgerOf, spanOf } from '@fleetkey/server/flows/ledger.ts'
import { keyReaders, topicReaders } from '@fleetkey/server/flows/readers.ts'
import { unprovenDevices } from '@fleetkey/server/flows/unproven.ts'
import { defaultPolicy } from '@fleetkey/server/fleet/policy.ts'
import { holdingPlace, type Holding, type KeyEpoch } from '@fleetkey/server/keys/key.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { testContext } from '../test/harness.ts'
import { enrolled, entry, median } from './revocation.ts'

const hour = 3_600_000
const batches = 50
const below = (count: number): number => Math.floor(Math.random() * count)
const deviceAt = (at: number): DeviceId => DeviceId.parse(`gw-${String(at).padStart(6, '0')}`)

export interface LedgerFigures {
  /** Milliseconds of one page of a hundred, median and slowest of thirty, each about another device, key or time. */
  readonly questions: readonly { readonly name: string; readonly median: number; readonly slowest: number }[]
  /** A hundred rows read by their id. */
  readonly floor: number
}

const epochOf = (key: KeyId, epoch: number, of: { now: number; current: boolean }): KeyEpoch => ({
  id: `${key}/${epoch}`,
  version: 0,
  key,
  epoch: Epoch.parse(epoch),
  state: of.current ? 'active' : 'deactivated',
  material: randomBytes(60),
  checkValue: '',
  createdAt: of.now,
  activatedAt: of.current ? of.now - hour : of.now - 3 * hour,
  deactivatedAt: of.current ? null : of.now - hour,
  destroyedAt: null,
})

const holding = (device: DeviceId, key: KeyId, of: { epoch: number; stage: 'active' | 'installed'; at: number }): Holding => ({
  id: `${device}/${key}/${of.epoch}`,
  version: 0,
  device,
  key,
  epoch: Epoch.parse(of.epoch),
  stage: of.stage,
  place: holdingPlace(key, of.epoch, of.stage),
  nonce: randomBytes(16),
  deliveredAt: of.at,
  installedAt: of.at + 1000,
  activeAt: of.stage === 'active' ? of.at + 2000 : null,
  retiredAt: null,
  reason: null,
})

/** Asks a durable store with so many devices that hold five keys; one in a thousand has not proven the newest epoch. */
export const measureLedger = async (folder: string, count: number): Promise<LedgerFigures> => {
  const memory = await testContext()
  const store = await openSqliteStore(join(folder, 'ledger-store'))
  const [now, ctx] = [memory.now(), { ...memory, store } as Context]
  const plant = GroupId.parse('plant')
  const keys = Array.from({ length: 5 }, (_, at) => KeyId.parse(`key-${at}`))
  try {
    const write = async (rows: readonly Write[]): Promise<void> =>
      void (await store.commit({ writes: [...rows, ...(await ledgerOf(ctx, rows))], entries: [entry] }))
    const topics = keys.slice(0, 2).map((key): Write => ({
      table: 'span',
      do: 'insert',
      row: spanOf(ctx, { of: 'topic/plant/line-1', by: `key/${key}`, from: now - 4 * hour, topic: 'plant/line-1' }),
    }))
    await write([
      ...topics,
      { table: 'group', do: 'insert', row: { id: plant, version: 0, createdAt: now, policy: defaultPolicy } },
      ...Array.from({ length: batches }, (_, at): Write => {
        const row = { id: `b${at}`, version: 0, station: 'line-1', rows: count / batches, manifestHash: '', importedAt: now, importedBy: '' }
        return { table: 'batch', do: 'insert', row }
      }),
      { table: 'station', do: 'insert', row: { id: 'line-1', version: 0, spki: randomBytes(91), addedAt: now } },
      ...keys.flatMap((key): Write[] => [
        {
          table: 'key',
          do: 'insert',
          row: { id: key, version: 0, algorithm: 'A256GCM', protection: 'sealed', createdAt: now, current: 2, latest: 2, recipientUsage: hour },
        },
        { table: 'epoch', do: 'insert', row: epochOf(key, 1, { now, current: false }) },
        { table: 'epoch', do: 'insert', row: epochOf(key, 2, { now, current: true }) },
        { table: 'grant', do: 'insert', row: { id: `${key}/${plant}`, version: 0, key, group: plant, grantedAt: now - 4 * hour } },
      ]),
    ])
    const certificate = (serial: string) => ({ id: serial }) as Parameters<typeof enrolled>[1]
    for (let start = 0; start < count; start += 500) {
      const devices = Array.from({ length: Math.min(500, count - start) }, (_, more) => start + more)
      await store.commit({
        writes: devices.map((at): Write => {
          const row = enrolled(deviceAt(at), certificate(`${at}-1`), certificate(`${at}-2`), now)
          return { table: 'device', do: 'insert', row: { ...row, batch: `b${at % batches}` } }
        }),
        entries: [entry],
      })
      await write(
        devices.flatMap((at): Write[] => {
          const device = deviceAt(at)
          const proven = at % 1000 !== 999
          return [
            { table: 'member', do: 'insert', row: { id: `${plant}/${device}`, version: 0, group: plant, device, joinedAt: now - 4 * hour } },
            ...keys.map((key): Write => ({ table: 'holding', do: 'insert', row: holding(device, key, { epoch: 1, stage: 'active', at: now - 3 * hour }) })),
            ...keys.map((key): Write => {
              const row = holding(device, key, { epoch: 2, stage: proven ? 'active' : 'installed', at: now - 2 * hour })
              return { table: 'holding', do: 'insert', row }
            }),
          ]
        }),
      )
    }
    const key = (): KeyId => keys[below(keys.length)] as KeyId
    const device = (): DeviceId => deviceAt(below(count))
    const from = (): number => now - 3 * hour + below(3 * hour)
    const questions: readonly [string, () => Promise<unknown>][] = [
      ['not-proven', async () => await unprovenDevices(ctx, key(), { limit: 100 })],
      ['key-readers', async () => await keyReaders(ctx, key(), { from: from(), until: now }, { after: device(), limit: 100 })],
      ['topic-readers', async () => await topicReaders(ctx, 'plant/line-1', { from: from(), until: now }, { limit: 100 })],
      ['held-at', async () => await heldAt(ctx, device(), from(), { limit: 100 })],
      ['revoke-device', async () => await exposedKeys(ctx, 'device', device())],
      ['revoke-batch', async () => await exposedKeys(ctx, 'batch', `b${below(batches)}`)],
      ['revoke-station', async () => await exposedKeys(ctx, 'station', 'line-1')],
    ]
    const measured = async (work: () => Promise<unknown>): Promise<readonly number[]> => {
      await work()
      const found: number[] = []
      for (let done = 0; done < 30; done++) {
        const started = performance.now()
        await work()
        found.push(performance.now() - started)
      }
      return found
    }
    const figures: LedgerFigures['questions'][number][] = []
    for (const [name, work] of questions) {
      const found = await measured(work)
      figures.push({ name, median: median(found), slowest: Math.max(...found) })
    }
    const floor = await measured(async () => {
      for (let read = 0; read < 100; read++) await store.get('holding', `${device()}/${key()}/2`)
    })
    return { questions: figures, floor: median(floor) }
  } finally {
    await store.close()
    await memory.close()
  }
}
