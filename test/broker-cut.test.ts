import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { cutPoints, cuttingBus, moments } from './faults/cutting-bus.ts'
import { evidenceOf } from './invariants/agent-evidence.ts'
import { invariants } from './invariants/invariants.ts'
import { openWorld, until, using, type Machine } from './world.ts'

const hour = 3_600_000
const patience = 120_000
const keys = ['telemetry', 'command-auth'] as const

/**
 * Enrolment, a campaign in waves, an eviction by broadcast and the way back, a boot, five rotations missed and caught up with, a renewal: over TCP connections that are cut at these
 * points. What is ordered is never ordered again: whatever was lost comes by itself. The points that were come to.
 */
const runCut = async (points: readonly string[]): Promise<ReadonlySet<string>> => {
  const cutting = cuttingBus(points)
  const clock = { ahead: 0 }
  const now = (): number => Date.now() + clock.ahead
  const world = await openWorld({ bus: cutting.wrap, now })
  const history: { device: string; key: string; epoch: number }[] = []
  const agents = new Map<Machine, Agent>()
  const switchOn = (machine: Machine): void => {
    agents.get(machine)?.kill()
    const agent = world.agent(machine, { now })
    agents.set(machine, agent)
    agent.onChange(({ device, current }) => {
      if (device !== null) for (const [key, epoch] of Object.entries(current)) history.push({ device, key, epoch })
    })
  }
  try {
    const [first, second] = await Promise.all([world.simulated('GW-1'), world.simulated('GW-2')])
    await world.enlist([first, second], 'plant')
    const { client } = world
    const idOf = ({ serial }: Machine): string => serial.toLowerCase()
    const cell = { params: { id: 'cell' } }
    await client.call('group.create', { body: { id: 'cell' as never } })
    await client.call('group.policy.set', { ...cell, body: { delivery: 'broadcast' } })
    await client.call('group.add', { ...cell, body: { devices: [idOf(first), idOf(second)] as never } })
    await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
    await client.call('key.create', { body: { id: 'command-auth', protection: 'tpm', recipientUsage: 0 } })
    await client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'cell' as never } })
    await client.call('key.grant', { params: { id: 'command-auth' }, body: { group: 'plant' } })
    const current = async (key: string): Promise<number> => (await client.call('key.show', { params: { id: key } })).current
    const comesAbout = async (what: string, holds: () => boolean | Promise<boolean>): Promise<void> => await until(what, holds, patience)
    /** Everybody uses and has proven the newest epochs, every campaign is over, no older epoch is left. */
    const atRest = async (after: string): Promise<void> =>
      await comesAbout(`at rest after ${after}`, async () => {
        await new Promise((resolve) => void setTimeout(resolve, 80))
        const epochs = await Promise.all(keys.map(current))
        if (!keys.every((key, at) => using([...agents.values()], key, epochs[at] ?? 0))) return false
        if (!(await client.call('campaign.list')).items.every(({ state }) => state === 'done' || state === 'aborted')) return false
        const views = await Promise.all([first, second].map(async (machine) => await client.call('device.show', { params: { id: idOf(machine) } })))
        return views.every(({ holdings }) =>
          holdings.every(({ key, epoch, stage }) => (epoch === epochs[keys.indexOf(key as (typeof keys)[number])] ? stage === 'active' : stage === 'retired')),
        )
      })

    for (const machine of [first, second]) switchOn(machine)
    await atRest('the enrolment')

    for (const id of keys) await client.call('key.rotate', { params: { id }, body: { waves: [{ devices: 1 }, 1] } })
    await atRest('a campaign')

    await client.call('group.remove', { params: { id: 'cell', device: idOf(second) } })
    await comesAbout(
      'the evicted device holds nothing',
      () =>
        agents
          .get(second)
          ?.status()
          .holdings.every(({ key }) => key !== 'telemetry') === true,
    )
    await client.call('group.add', { ...cell, body: { devices: [idOf(second)] as never } })
    await client.call('key.rotate', { params: { id: 'telemetry' }, body: {} }).catch(() => undefined)
    await atRest('an eviction')

    agents.get(second)?.kill()
    agents.delete(second)
    for (let missed = 0; missed < 5; missed++)
      for (const id of keys) {
        const before = await current(id)
        const policy = { deadline: 300, successThreshold: 0, errorThreshold: 1 }
        await comesAbout('the next rotation', async () => {
          return await client.call('key.rotate', { params: { id }, body: policy }).then(
            () => true,
            () => false,
          )
        })
        await comesAbout('it is in use', async () => (await current(id)) === before + 1)
      }
    second.board.boot()
    switchOn(second)
    await atRest('five missed rotations')

    clock.ahead = 36 * hour
    for (const machine of [first, second]) switchOn(machine)
    const ends = (): readonly number[] => [...agents.values()].map((agent) => agent.status().tlsNotAfter ?? 0)
    await comesAbout('both have renewed', () => ends().every((end) => end > now() + 24 * hour))
    await comesAbout('both are connected', () => [...agents.values()].every((agent) => agent.status().connected))
    await atRest('a renewal')

    let log = ''
    await client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const auditKey = Buffer.from((await client.call('audit.key')).spki, 'base64')
    const devices = [...agents].map(([machine, agent]) => evidenceOf(idOf(machine), agent))
    await world.server.stop()
    const store = await openSqliteStore(join(world.folder, 'server', 'store'), { now, log: () => undefined, step: () => undefined })
    try {
      for (const invariant of invariants) await invariant({ store, devices, history, log, auditKey })
    } finally {
      await store.close()
    }
    return cutting.cut
  } catch (thrown) {
    const statuses = [...agents].map(([{ serial }, agent]) => `${serial}: ${JSON.stringify(agent.status())}`)
    const why = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown)
    throw new Error([why, `cut at ${[...cutting.cut].join(', ')}`, ...statuses, ...world.lines.slice(-60)].join('\n'), { cause: thrown })
  } finally {
    await world.stop()
  }
}

// All points of a moment in one run; the long tests have a run for each point besides.
const runs = moments.map((moment) => [`${moment} a message of each kind`, cutPoints.filter((point) => point.endsWith(moment))] as const)
const each = process.env['FLEETKEY_LONG'] === '1' ? cutPoints.map((point) => [point, [point]] as const) : []

describe.concurrent('TCP connections are cut', { timeout: 600_000 }, () => {
  test.for([...runs, ...each])('%s', async ([, points]) => expect([...(await runCut(points))].toSorted()).toEqual(points.toSorted()))
})
