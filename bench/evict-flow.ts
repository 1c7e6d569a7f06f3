import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import type { Member } from '@fleetkey/server/fleet/device.ts'
import { passing, type Context, type Write } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { createGroup, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { othersFirst } from '@fleetkey/server/flows/turn.ts'
import { broadcastId } from '@fleetkey/server/keys/broadcast.ts'
import { isFor } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { operator, testContext } from '../test/harness.ts'
import { enrolled, entry, median } from './revocation.ts'

const [group, key] = [GroupId.parse('fleet'), KeyId.parse('telemetry')]
const nameOf = (at: number): DeviceId => DeviceId.parse(`d-${String(at).padStart(7, '0')}`)
const chunk = 1_000

/** CPU milliseconds, and the longest time for which nothing else had its turn, milliseconds. */
interface Turns {
  readonly cpu: number
  readonly pause: number
}

/** What an eviction costs a server. */
export interface EvictionFlow extends Turns {
  /** Reading the row of each member and of its device once, ten a turn: what a busy machine and the collection of garbage make of it. */
  readonly floor: Turns
}

const turnsOf = async (work: () => Promise<unknown>): Promise<Turns> => {
  const delay = monitorEventLoopDelay({ resolution: 1 })
  const before = process.cpuUsage()
  delay.enable()
  await work()
  delay.disable()
  const { user, system } = process.cpuUsage(before)
  return { cpu: (user + system) / 1_000, pause: delay.max / 1e6 }
}

/** A group of so many enrolled members in a durable store, all with a place, and a key that they have. */
const furnish = async (ctx: Context, members: number): Promise<void> => {
  const now = ctx.now()
  await createGroup(ctx, operator(), group)
  await setGroupPolicy(ctx, operator(), group, { delivery: 'broadcast' })
  for (let start = 0; start < members; start += chunk) {
    const writes = Array.from({ length: Math.min(chunk, members - start) }, (_, at): Write[] => {
      const device = nameOf(start + at)
      const [tls, ldevid] = [`${device}-1`, `${device}-2`].map((id) => ({ id }) as Certificate) as [Certificate, Certificate]
      const row: Member = { id: `${group}/${device}`, version: 0, group, device, joinedAt: now }
      return [
        { table: 'device', do: 'insert', row: enrolled(device, tls, ldevid, now) },
        { table: 'member', do: 'insert', row },
      ]
    })
    await ctx.store.commit({ writes: writes.flat(), entries: [entry] })
  }
  await createKey(ctx, operator(), { id: key, protection: 'sealed' })
  await grantKey(ctx, operator(), key, group)
}

/** Throws when a member that was evicted, or one that stays, is not treated as such by the epoch that was made. */
const judge = async (ctx: Context, epoch: number, device: DeviceId, seat: NonNullable<Member['seat']>, isMember: boolean): Promise<void> => {
  const row = await ctx.store.get('broadcast', broadcastId({ key, epoch, group, shard: seat.shard }))
  if (row === undefined || isFor(row.wraps, seat.slot) !== isMember) throw new Error(`epoch ${epoch} is${isMember ? ' not' : ''} for ${device}`)
}

/**
 * One member after the other leaves a group that is served by broadcast: from the operator's call until the next epoch, with its wraps for all the others, is durable.
 * Medians of rounds.
 */
export const measureEvictionFlow = async (folder: string, members: number, rounds: number): Promise<EvictionFlow> => {
  const base = await testContext()
  const store = await openSqliteStore(join(folder, 'store'))
  const ctx: Context = { ...base, store }
  try {
    await furnish(ctx, members)
    const evictions: Turns[] = []
    for (let round = 0; round < rounds; round++) {
      const [out, stays] = [nameOf(2 * round), nameOf(2 * round + 1)]
      const [left, right] = await Promise.all([out, stays].map(async (device) => (await store.get('member', `${group}/${device}`))?.seat))
      if (left === undefined || right === undefined) throw new Error('a member without a place')
      base.clock.now += 1_000
      evictions.push(await turnsOf(async () => await removeMember(ctx, operator(), group, out)))
      await judge(ctx, round + 2, out, left, false)
      await judge(ctx, round + 2, stays, right, true)
    }
    const floor = await turnsOf(async () => {
      for (let at = 0; at < members; at++) {
        await Promise.all([store.get('member', `${group}/${nameOf(at)}`, passing), store.get('device', nameOf(at), passing)])
        if (at % 10 === 0) await othersFirst()
      }
    })
    return { cpu: median(evictions.map(({ cpu }) => cpu)), pause: median(evictions.map(({ pause }) => pause)), floor }
  } finally {
    await store.close()
    await base.close()
  }
}
