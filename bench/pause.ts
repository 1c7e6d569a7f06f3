import { join } from 'node:path'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import type { Member } from '@fleetkey/server/fleet/device.ts'
import { passing, type Changes, type Context, type Store, type Table, type Tables, type Write } from '@fleetkey/server/flows/context.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { mayBeCut } from '@fleetkey/server/flows/cut.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { createGroup, removeMember } from '@fleetkey/server/flows/group.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { statusLists } from '@fleetkey/server/flows/status-lists.ts'
import { othersFirst } from '@fleetkey/server/flows/turn.ts'
import { unprovenDevices } from '@fleetkey/server/flows/unproven.ts'
import { holdingPlace, type Holding } from '@fleetkey/server/keys/key.ts'
import { listMaker } from '@fleetkey/server/api/list-maker.ts'
import { startKms } from '@fleetkey/server/kms/supervisor.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { operator, testContext } from '../test/harness.ts'
import { certificate, enrolled, entry } from './revocation.ts'

const [group, key, other] = [GroupId.parse('fleet'), KeyId.parse('telemetry'), KeyId.parse('commands')]
const nameOf = (at: number): DeviceId => DeviceId.parse(`d-${String(at).padStart(7, '0')}`)

/** Turns of the event loop, milliseconds by the clock. */
export interface Pause {
  /** The longest one: nothing else had its turn, whatever kept it waiting (disk, other processes, the collection of garbage). */
  readonly pause: number
  /** The 99th of a hundred that did something. */
  readonly usual: number
  /** Rows that were read or written in one turn, at most: the part of it that depends on nothing else. */
  readonly rows: number
}

/** What a whole fleet is asked for, beside the same commits with nothing else to do. */
export interface PauseFigure extends Pause {
  readonly name: string
  /** How long all of it took, seconds. */
  readonly took: number
  readonly floor: Pause
}

/** Looks once a turn while something is done. `rows`: gives how many were touched since it was asked last. */
const pauseOf = async (work: () => Promise<unknown>, rows: () => number = () => 0): Promise<Pause> => {
  const turns: number[] = []
  let [at, most, isOver] = [performance.now(), 0, false]
  rows()
  const look = (): void => {
    const [now, touched] = [performance.now(), rows()]
    // Idle ones are as many as the processor makes of them.
    if (touched > 0 || now - at > 1) turns.push(now - at)
    most = Math.max(most, touched)
    at = now
    if (!isOver) setImmediate(look)
  }
  setImmediate(look)
  await work()
  isOver = true
  look()
  const sorted = turns.toSorted((one, other) => one - other)
  return { pause: sorted.at(-1) ?? 0, usual: sorted[Math.floor(sorted.length * 0.99)] ?? 0, rows: most }
}

/** A group of so many enrolled members in a durable store, and a key that all of them but one in a thousand have proven. */
const furnish = async (ctx: Context, members: number): Promise<void> => {
  const now = ctx.now()
  await createGroup(ctx, operator(), group)
  for (const id of [key, other]) await createKey(ctx, operator(), { id, protection: 'sealed' })
  for (let start = 0; start < members; start += 500) {
    const writes = Array.from({ length: Math.min(500, members - start) }, (_, at): Write[] => {
      const device = nameOf(start + at)
      const [tls, ldevid] = [`${device}-1`, `${device}-2`].map((id) => ({ id }) as Certificate) as [Certificate, Certificate]
      const member: Member = { id: `${group}/${device}`, version: 0, group, device, joinedAt: now }
      const holding: Holding = {
        id: `${device}/${key}/1`,
        version: 0,
        device,
        key,
        epoch: Epoch.parse(1),
        stage: 'active',
        place: holdingPlace(key, 1, 'active'),
        nonce: new Uint8Array(16),
        deliveredAt: now,
        installedAt: now,
        activeAt: now,
        retiredAt: null,
        reason: null,
      }
      return [
        { table: 'device', do: 'insert', row: enrolled(device, tls, ldevid, now) },
        { table: 'member', do: 'insert', row: member },
        ...((start + at) % 1_000 === 999 ? [] : [{ table: 'holding', do: 'insert', row: holding } as const]),
      ]
    })
    await ctx.store.commit({ writes: writes.flat(), entries: [entry] })
  }
}

/** A store that keeps how many rows of which table each commit writes, and one of each: all of them would be garbage that the work is blamed for. */
const recording = (store: Store) => {
  let commits: (readonly Table[])[] = []
  const samples = new Map<Table, Tables[Table]>()
  let rows = 0
  return {
    store: {
      ...store,
      async get(table, id, options) {
        rows++
        return await store.get(table, id, options)
      },
      async find(table, query) {
        const found = await store.find(table, query)
        rows += found.length
        return found
      },
      async commit(changes, options) {
        const written = changes.writes.filter((write) => write.do !== 'delete')
        commits.push(written.map(({ table }) => table))
        rows += written.length
        for (const { table, row } of written) samples.set(table, row)
        return await store.commit(changes, options)
      },
    } satisfies Store,
    /** Rows that were touched since the last time. */
    rows(): number {
      const touched = rows
      rows = 0
      return touched
    },
    /** The commits since the last time, with rows like those that were written; every one an insertion. */
    take(name: string): readonly Changes[] {
      const taken = commits
      commits = []
      return taken.map((tables, at) => ({
        entries: [entry],
        writes: tables.map((table, row) => ({ table, do: 'insert', row: { ...samples.get(table), id: `${name}/${at}/${row}` } }) as Write),
      }))
    },
  }
}

/** Measures one piece of work after the other on a store, and what it committed once more by itself. */
const meter = async (folder: string, store: Store, clock: { now: number }) => {
  const [kept, bare] = [recording(store), await openSqliteStore(join(folder, 'floor'))]
  const figures: PauseFigure[] = []
  return {
    store: kept.store,
    figures,
    async measure(name: string, work: () => Promise<unknown>): Promise<void> {
      kept.take(name)
      clock.now += 1_000
      const began = performance.now()
      const found = await pauseOf(work, kept.rows)
      const took = (performance.now() - began) / 1_000
      const commits = kept.take(name)
      const floor = await pauseOf(async () => {
        for (const changes of commits) {
          await bare.commit(changes)
          await othersFirst()
        }
      })
      figures.push({ name, ...found, took, floor })
    },
    close: async () => await bare.close(),
  }
}

/** What is asked of a whole fleet of so many members, one after the other. */
export const measurePauses = async (folder: string, members: number): Promise<readonly PauseFigure[]> => {
  const base = await testContext()
  const store = await openSqliteStore(join(folder, 'store'))
  const { measure, figures, ...by } = await meter(folder, store, base.clock)
  const ctx: Context = { ...base, store: by.store }
  try {
    await furnish(ctx, members)
    // What the pages of members cost alone: their rows and those of their devices, ten a turn.
    await measure('read', async () => {
      for (let at = 0; at < members; at++) {
        await Promise.all([store.get('member', `${group}/${nameOf(at)}`, passing), store.get('device', nameOf(at), passing)])
        if (at % 10 === 0) await othersFirst()
      }
    })
    await measure('place-and-grant', async () => await grantKey(ctx, operator(), key, group))
    await measure('grant', async () => await grantKey(ctx, operator(), other, group))
    await measure('cut-preview', async () => await mayBeCut(ctx, key, { limit: 100 }))
    await measure('not-proven', async () => await unprovenDevices(ctx, key, { limit: 100 }))
    await measure('evict', async () => await removeMember(ctx, operator(), group, nameOf(0)))
    const policy = { waves: [{ devices: 10 }, 0.1, 1], overlap: 'strict' } as const
    const order = { policy, because: 'bench', mayCut: members, supersede: 'aborted' } as const
    let staged = ''
    await measure('order', async () => (staged = (await startRotation(ctx, operator(), key, order)).campaign))
    await measure('prepare-waves', async () => await drive(ctx, staged))
    const urgent = (await ctx.store.get('key', other))?.campaign ?? ''
    await measure('prepare', async () => await drive(ctx, urgent))
    base.clock.now += 60_000
    await measure('time-out', async () => await drive(ctx, urgent))
    return figures
  } finally {
    await store.close()
    await by.close()
    await base.close()
  }
}

/** Lists of so many revoked certificates, signed by the process that holds the keys: after a start, all of them once more, and a delta of a hundred. */
export const measureListPauses = async (folder: string, certificates: number): Promise<readonly PauseFigure[]> => {
  const base = await testContext()
  const kms = await startKms({ folder: join(folder, 'kms'), log: () => undefined })
  const store = await openSqliteStore(join(folder, 'certificates'))
  const { measure, figures, ...by } = await meter(folder, store, base.clock)
  try {
    const own = { ...base, kms, store: by.store }
    const ctx: Context = { ...own, authority: await openAuthority(own) }
    const rows = (count: number): Certificate[] => Array.from({ length: count }, () => certificate('revoked', nameOf(0), ctx.now()))
    for (let start = 0; start < certificates; start += 500)
      await store.commit({
        writes: rows(Math.min(500, certificates - start)).map((row): Write => ({ table: 'certificate', do: 'insert', row })),
        entries: [entry],
      })
    const lists = statusLists(ctx, 'http://crl.test/crl/', listMaker)
    await measure('crl-start', async () => await lists.publish())
    await measure('crl-complete', async () => await lists.publish({ complete: true }))
    await measure('crl-delta', async () => {
      lists.changed(rows(100))
      await lists.publish()
    })
    await lists.close()
    return figures
  } finally {
    await store.close()
    await by.close()
    await kms.close()
    await base.close()
  }
}
