import { join } from 'node:path'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import type { Member } from '@fleetkey/server/fleet/device.ts'
import type { Changes, Context, Store, Write } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { mayBeCut } from '@fleetkey/server/flows/cut.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { createGroup, removeMember } from '@fleetkey/server/flows/group.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { othersFirst } from '@fleetkey/server/flows/turn.ts'
import { unprovenDevices } from '@fleetkey/server/flows/unproven.ts'
import { holdingPlace, type Holding } from '@fleetkey/server/keys/key.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { operator, testContext } from '../test/harness.ts'
import { enrolled, entry } from './revocation.ts'

const [group, key, other] = [GroupId.parse('fleet'), KeyId.parse('telemetry'), KeyId.parse('commands')]
const nameOf = (at: number): DeviceId => DeviceId.parse(`d-${String(at).padStart(7, '0')}`)

/** The longest time for which nothing else had its turn, and the most CPU time that this thread used meanwhile, milliseconds. */
export interface Pause {
  readonly pause: number
  readonly cpu: number
}

/** What a whole fleet is asked for, beside the same commits with nothing else to do. */
export interface PauseFigure extends Pause {
  readonly name: string
  /** How long all of it took, seconds. */
  readonly took: number
  readonly floor: Pause
}

/** By a timer of a millisecond: between two of its turns there is a whole one of everything else. */
const pauseOf = async (work: () => Promise<unknown>): Promise<Pause> => {
  let [at, used, pause, cpu] = [performance.now(), process.threadCpuUsage(), 0, 0]
  const look = (): void => {
    const now = performance.now()
    const { user, system } = process.threadCpuUsage(used)
    pause = Math.max(pause, now - at)
    cpu = Math.max(cpu, (user + system) / 1_000)
    used = process.threadCpuUsage()
    at = performance.now()
  }
  const timer = setInterval(look, 1)
  await othersFirst()
  look()
  pause = cpu = 0
  try {
    await work()
    look()
  } finally {
    clearInterval(timer)
  }
  return { pause, cpu }
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

/** A store that keeps what is committed. */
const recording = (store: Store): { readonly store: Store; take(): readonly Changes[] } => {
  let kept: Changes[] = []
  return {
    store: {
      ...store,
      async commit(changes, options) {
        kept.push(changes)
        return await store.commit(changes, options)
      },
    },
    take() {
      const taken = kept
      kept = []
      return taken
    },
  }
}

/** Runs what goes through a whole fleet of so many members, one after the other. */
export const measurePauses = async (folder: string, members: number): Promise<readonly PauseFigure[]> => {
  const base = await testContext()
  const [kept, bare] = [recording(await openSqliteStore(join(folder, 'store'))), await openSqliteStore(join(folder, 'floor'))]
  const ctx: Context = { ...base, store: kept.store }
  const figures: PauseFigure[] = []
  const measure = async (name: string, work: () => Promise<unknown>): Promise<void> => {
    kept.take()
    base.clock.now += 1_000
    const began = performance.now()
    const found = await pauseOf(work)
    const took = (performance.now() - began) / 1_000
    const commits = kept.take().map(({ writes, entries }, at) => ({
      entries,
      // Into an empty store everything is an insertion, also what changed a row.
      writes: writes.flatMap((write): Write[] =>
        write.do === 'delete' ? [] : [{ ...write, do: 'insert', row: { ...write.row, id: `${name}/${at}/${write.row.id}` } } as Write],
      ),
    }))
    const floor = await pauseOf(async () => {
      for (const changes of commits) {
        await bare.commit(changes)
        await othersFirst()
      }
    })
    figures.push({ name, ...found, took, floor })
  }
  try {
    await furnish(ctx, members)
    const rotation = async (): Promise<string> => {
      const policy = { waves: [{ devices: 10 }, 0.1, 1], overlap: 'strict' } as const
      return (await startRotation(ctx, operator(), key, { policy, because: 'bench', mayCut: members, supersede: 'aborted' })).campaign
    }
    await measure('place-and-grant', async () => await grantKey(ctx, operator(), key, group))
    await measure('grant', async () => await grantKey(ctx, operator(), other, group))
    await measure('cut-preview', async () => await mayBeCut(ctx, key, { limit: 100 }))
    await measure('not-proven', async () => await unprovenDevices(ctx, key, { limit: 100 }))
    await measure('evict', async () => await removeMember(ctx, operator(), group, nameOf(0)))
    const running = (await ctx.store.get('key', other))?.campaign ?? ''
    await measure('order', rotation)
    const campaign = (await ctx.store.get('key', key))?.campaign ?? ''
    await measure('prepare', async () => await drive(ctx, campaign))
    await measure('prepare-urgent', async () => await drive(ctx, running))
    base.clock.now += 3_600_001
    await measure('time-out', async () => await drive(ctx, campaign))
    return figures
  } finally {
    await kept.store.close()
    await bare.close()
    await base.close()
  }
}
