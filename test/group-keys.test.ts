import { cpSync, rmSync } from 'node:fs'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { isIn, type Keyring } from '@fleetkey/device-agent/keyring.ts'
import { openBoundKeys } from '@fleetkey/device-agent/bound-keys.ts'
import { openDocument } from '@fleetkey/device-agent/files.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import { openVault } from '@fleetkey/device-agent/vault.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openWorld, random, until, using, type Machine, type World } from './world.ts'

interface Fleet {
  readonly world: World
  readonly machines: readonly Machine[]
  readonly agents: Agent[]
}

/** Boards in a group that is served by broadcast, and a key that they use. */
const served = async (count: number, of: Parameters<typeof openWorld>[0] = {}): Promise<Fleet> => {
  const world = await openWorld(of)
  const machines = await Promise.all(Array.from({ length: count }, async (_, at) => await world.simulated(`GW-${at + 1}`)))
  await world.enlist(machines, 'plant')
  await world.client.call('group.policy.set', { params: { id: 'plant' }, body: { delivery: 'broadcast' } })
  const agents = machines.map((machine) => world.agent(machine))
  await until('all are connected', () => agents.every((agent) => agent.status().connected))
  await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
  await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
  await until('all use epoch 1', () => using(agents, 'telemetry', 1))
  return { world, machines, agents }
}

const stagesOf = async ({ client }: World, device: string, epoch: number) =>
  (await client.call('device.show', { params: { id: device } })).holdings.find((one) => one.epoch === epoch)?.stage

/** Rotates the key, and waits until no other rotation is in the way. */
const rotated = async (world: World, body: object = {}): Promise<string> => {
  await atRest(world)
  return (await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 3_600_000, ...body } })).campaign
}
const atRest = async ({ client }: World): Promise<void> =>
  await until('no device is waited for', async () =>
    (await client.call('campaign.list')).items.every(
      ({ state, counts }) =>
        !['installing', 'activating'].includes(state) || (state === 'activating' && !counts['pending'] && !counts['delivered'] && !counts['installed']),
    ),
  )

/** Nobody is waited for who is away. */
const impatient = { deadline: 500, successThreshold: 0, errorThreshold: 1 }

const again = (world: World, machine: Machine | undefined): Agent => {
  if (machine === undefined) throw new Error('no such machine')
  return world.agent(machine)
}

const notes = async ({ client }: World, action: string): Promise<readonly string[]> =>
  (await client.call('audit.list', { query: { after: 0, limit: 1000 } })).items.filter((entry) => entry.action === action).map(({ detail }) => detail)

test('one message a shard carries an epoch to every member, one leaves, one is away and is healed by the same message', { timeout: 120_000 }, async () => {
  const { world, machines, agents } = await served(4)
  try {
    const { client } = world
    expect((await client.call('group.show', { params: { id: 'plant' } })).shards).toMatchObject([{ shard: 0, generation: 1, given: 4 }])

    const campaign = await rotated(world)
    await until('all use epoch 2', () => using(agents, 'telemetry', 2))
    await until('all have proven it', async () => (await client.call('campaign.show', { params: { id: campaign } })).counts['active'] === 4)
    // No delivery of its own for anybody since the labels came.
    expect((await notes(world, 'key.broadcast')).some((detail) => detail.startsWith('to 4 devices'))).toBe(true)

    await client.call('group.remove', { params: { id: 'plant', device: 'gw-1' } })
    const staying = agents.slice(1)
    await until('those that stay use epoch 3', () => using(staying, 'telemetry', 3))
    await until('who left has erased all', () => agents[0]?.status().holdings.length === 0)

    // One is away for three epochs.
    await atRest(world)
    await agents[3]?.stop()
    for (const epoch of [4, 5, 6]) {
      await rotated(world, impatient)
      await until(`the others use epoch ${epoch}`, () => using(agents.slice(1, 3), 'telemetry', epoch))
    }
    const before = (await notes(world, 'key.deliver')).length
    const back = again(world, machines[3])
    await until('who was away uses epoch 6', () => using([back], 'telemetry', 6))
    const sent = (await notes(world, 'key.deliver')).slice(before).join('; ')
    expect(sent).toContain('deliver telemetry/6 as active, as it was broadcast')
    expect(sent).not.toContain('labels')
    await until('and has proven it', async () => (await stagesOf(world, 'gw-4', 6)) === 'active')
  } finally {
    await world.stop()
  }
})

/** Everything that the server says to anybody, and the broker in the hands of whoever wrote it down. */
const wiretap = () => {
  const heard: Uint8Array[] = []
  let bus: EmbeddedBus | undefined
  return {
    heard,
    wrap(real: EmbeddedBus): EmbeddedBus {
      bus = real
      return Object.assign(Object.create(real) as EmbeddedBus, {
        send: async (client: string, bytes: Uint8Array) => (heard.push(bytes), await real.send(client, bytes)),
        publish: async (topic: string, bytes: Uint8Array) => (heard.push(bytes), await real.publish(topic, bytes)),
      })
    },
    say: async (client: string, bytes: Uint8Array) => await bus?.send(client, bytes),
    publish: async (topic: string, bytes: Uint8Array) => await bus?.publish(topic, bytes),
    /** Broadcasts of one epoch. */
    broadcasts: (epoch: number) =>
      heard.flatMap((bytes) => {
        const { body, device } = readMessage(bytes, { max: 1 << 20 }).envelope
        return body.type === 'broadcast' && body.epoch === epoch ? [{ bytes, body, address: device }] : []
      }),
  }
}

/** The keyring on a disk, opened with its own TPM. No agent may use it meanwhile. */
const keyringOn = async (world: World, machine: Machine, folder: string): Promise<Keyring> => {
  const document = (name: string) => openDocument({ files: nodeFileSystem, folder, name, step: () => undefined })
  const common = { tenant: world.bundle.tenant, random, step: () => undefined, log: () => undefined }
  const bound = await openBoundKeys({
    ...common,
    tpm: new Tpm(await machine.openTpm(), { random }),
    blobs: document('tpm-keys'),
    approvals: document('approvals'),
  })
  const vault = openVault({ ...common, bound, document })
  await vault.refresh()
  return await vault.keyring(machine.serial.toLowerCase())
}

/** Whether these labels open any of the broadcasts, in whatever shard, generation and slot they are tried. */
const opensAny = async (ring: Keyring, broadcasts: ReturnType<ReturnType<typeof wiretap>['broadcasts']>): Promise<boolean> => {
  for (const { body, address } of broadcasts) {
    const shard = Number(address.split('/')[2])
    const { key, epoch, nonce, generation, wraps } = body
    const wrapped = { protection: 'sealed', group: 'plant', shard, generation, wraps } as const
    const delivery = { type: 'delivery', key, epoch, nonce, activate: false, readOnly: true, algorithm: 'A256GCM', campaign: null, wrapped } as const
    if ((await ring.install(delivery as never)) !== undefined) return true
  }
  return false
}

describe('attacks', { timeout: 180_000 }, () => {
  test('who left, with its labels and everything that was ever said; who joins; replays, swaps and a restored disk', async () => {
    const tap = wiretap()
    const { world, machines, agents } = await served(3, { bus: tap.wrap })
    try {
      const { client } = world
      const [one, two, three] = machines
      if (one === undefined || two === undefined || three === undefined) throw new Error('three boards')
      const folderOf = (machine: Machine): string => join(world.folder, 'agents', machine.serial)
      await rotated(world)
      await until('all use epoch 2', () => using(agents, 'telemetry', 2))
      const secret = await agents[1]?.encrypt('telemetry', new TextEncoder().encode('before'))

      // A disk image of the first and the second, labels and all.
      await agents[0]?.stop()
      await agents[1]?.stop()
      cpSync(folderOf(one), join(world.folder, 'image-1'), { recursive: true })
      cpSync(folderOf(two), join(world.folder, 'image-2'), { recursive: true })
      agents[1] = again(world, two)

      // The leaver: its image opens what it was a member for, and nothing that was made since.
      await client.call('group.remove', { params: { id: 'plant', device: 'gw-1' } })
      await until('the others use epoch 3', () => using(agents.slice(1), 'telemetry', 3), 90_000)
      await rotated(world)
      await until('the others use epoch 4', () => using(agents.slice(1), 'telemetry', 4))
      const leaver = await keyringOn(world, one, join(world.folder, 'image-1'))
      expect(leaver.places()).toEqual([{ group: 'plant', shard: 0, generation: 1, slot: expect.any(Number) as number }])
      expect(leaver.material('telemetry', 2).epoch).toBe(2)
      expect(tap.broadcasts(3).length).toBeGreaterThan(0)
      expect(await opensAny(leaver, [...tap.broadcasts(3), ...tap.broadcasts(4)])).toBe(false)
      leaver.close()

      const lowest: number[] = []
      for (const agent of agents.slice(1)) agent.onChange(({ current }) => void ((current['telemetry'] ?? 4) < 4 && lowest.push(current['telemetry'] ?? 0)))
      // Replays: an older epoch, and its order to use it, move nobody back.
      for (const { bytes } of tap.broadcasts(2)) {
        await tap.publish('fk/1/g/plant/0', bytes)
        await tap.say('gw-2', bytes)
      }
      // Swapped: to another group, signed by the server, said to one that listens and is not in it.
      await client.call('group.create', { body: { id: 'others' } })
      await client.call('group.policy.set', { params: { id: 'others' }, body: { delivery: 'broadcast' } })
      await client.call('group.add', { params: { id: 'others' }, body: { devices: ['gw-3' as never] } })
      await client.call('key.create', { body: { id: 'meter', protection: 'sealed' } })
      await client.call('key.grant', { params: { id: 'meter' }, body: { group: 'others' } })
      await client.call('key.rotate', { params: { id: 'meter' }, body: impatient })
      const swapped = () => tap.broadcasts(2).filter(({ address }) => address === 'g/others/0')
      await until('the other group is sent its own', () => swapped().length > 0)
      const refused = () => world.lines.filter((line) => line.startsWith('GW-2: ') && line.includes('a message to g/others/0')).length
      expect(refused()).toBe(0)
      for (const { bytes } of swapped()) await tap.say('gw-2', bytes)
      await until('it refuses it', () => refused() === swapped().length)
      expect(agents[1]?.status().holdings.map(({ key }) => key)).not.toContain('meter')
      await rotated(world)
      await until('the others use epoch 5', () => using(agents.slice(1), 'telemetry', 5))
      expect(lowest).toEqual([])

      // The second one's disk is put back to epoch 2: it is served epoch 5 at once, by the message that it had.
      await agents[1]?.stop()
      rmSync(folderOf(two), { recursive: true })
      cpSync(join(world.folder, 'image-2'), folderOf(two), { recursive: true })
      agents[1] = again(world, two)
      await until('its epoch is the newest again', () => using(agents.slice(1), 'telemetry', 5))
      expect((await notes(world, 'key.deliver')).some((detail) => detail.includes('ALARM: the device lost an epoch that it had proven active'))).toBe(true)

      // The joiner reads nothing from before: not what was protected, not the epochs, whatever it recorded.
      await client.call('group.policy.set', { params: { id: 'plant' }, body: { rotateOnJoin: true } })
      const late = await world.simulated('GW-9')
      const joining = world.agent(late)
      await world.enlist([late], 'plant')
      await until('all use epoch 6', () => using([...agents.slice(1), joining], 'telemetry', 6), 90_000)
      expect(joining.status().holdings.map(({ epoch }) => epoch)).toEqual([6])
      await joining.stop()
      const joiner = await keyringOn(world, late, folderOf(late))
      for (const epoch of [1, 2, 3, 4, 5]) expect(await opensAny(joiner, tap.broadcasts(epoch))).toBe(false)
      expect(
        tap.broadcasts(5).every(({ body }) => joiner.places().every((place) => isIn({ group: place.group, shard: 0, generation: body.generation }, place))),
      ).toBe(true)
      joiner.close()
      expect(() => joining.decrypt('telemetry', secret?.ciphertext ?? new Uint8Array())).toThrow()
      // Unless that is granted.
      await client.call('group.policy.set', { params: { id: 'plant' }, body: { history: true } })
      const reading = again(world, late)
      await until('it reads what is older', () => {
        const { holdings } = reading.status()
        return [2, 3, 4, 5].every((epoch) => holdings.some((held) => held.epoch === epoch))
      })
      expect(new TextDecoder().decode(reading.decrypt('telemetry', secret?.ciphertext ?? new Uint8Array()).plaintext)).toBe('before')
    } finally {
      await world.stop()
    }
  })
})

test('labels of a new generation, a returning device, a tpm key that cannot be broadcast', { timeout: 180_000 }, async () => {
  const clock = { ahead: 0 }
  const { world, machines, agents } = await served(3, { now: () => Date.now() + clock.ahead })
  try {
    const { client } = world
    const shards = async () => (await client.call('group.show', { params: { id: 'plant' } })).shards
    // Who comes back has another slot.
    await client.call('group.remove', { params: { id: 'plant', device: 'gw-1' } })
    await until('those that stay use epoch 2', () => using(agents.slice(1), 'telemetry', 2))
    await until('who left has erased all', () => agents[0]?.status().holdings.length === 0)
    await client.call('group.add', { params: { id: 'plant' }, body: { devices: ['gw-1' as never] } })
    await until('who is back uses epoch 2', () => using(agents, 'telemetry', 2))
    expect(agents[0]?.status().holdings.map(({ epoch }) => epoch)).toEqual([2])
    expect(await shards()).toMatchObject([{ shard: 0, generation: 1, given: 4 }])
    await rotated(world)
    await until('all use epoch 3', () => using(agents, 'telemetry', 3))

    // A generation that is over: one is away, the others get labels anew and the epoch with them.
    await atRest(world)
    await agents[2]?.stop()
    await client.call('group.policy.set', { params: { id: 'plant' }, body: { generationLife: 60 } })
    clock.ahead = 61_000
    await rotated(world, impatient)
    await until('those that are there use epoch 4', () => using(agents.slice(0, 2), 'telemetry', 4), 60_000)
    expect(await shards()).toMatchObject([{ shard: 0, generation: 2, given: 3 }])
    const back = again(world, machines[2])
    await until('who was away uses epoch 4', () => using([back], 'telemetry', 4))
    await until('and has proven it', async () => (await stagesOf(world, 'gw-3', 4)) === 'active')

    await client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
    await expect(client.call('key.grant', { params: { id: 'command-auth' }, body: { group: 'plant' } })).rejects.toMatchObject({ code: 'unsupported' })
    await client.call('group.policy.set', { params: { id: 'plant' }, body: { delivery: 'unicast' } })
    await client.call('key.grant', { params: { id: 'command-auth' }, body: { group: 'plant' } })
    await expect(client.call('group.policy.set', { params: { id: 'plant' }, body: { delivery: 'broadcast' } })).rejects.toMatchObject({ code: 'unsupported' })
    // Each by itself again.
    const broadcast = (await notes(world, 'key.broadcast')).length
    await rotated(world)
    await until('all use epoch 5', () => using([...agents.slice(0, 2), back], 'telemetry', 5))
    expect(await notes(world, 'key.broadcast')).toHaveLength(broadcast)
    // By size.
    await client.call('group.policy.set', { params: { id: 'plant' }, body: { delivery: 'auto', broadcastFrom: 3 } })
    await rotated(world)
    await until('all use epoch 6', () => using([...agents.slice(0, 2), back], 'telemetry', 6))
    expect((await notes(world, 'key.broadcast')).length).toBeGreaterThan(broadcast)
  } finally {
    await world.stop()
  }
})
