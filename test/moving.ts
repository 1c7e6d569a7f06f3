import { readdirSync } from 'node:fs'
import { join } from 'node:path'
import { expect } from 'vitest'
import { openWorld, until, using, type PlainMachine } from './world.ts'

/**
 * A server with its fleet moves from files to another back end, by the commands of docs/operations.md and in their order: started with `options` (and `env` from
 * the start), the next CA under a new root, the KEK; nothing of the old ones is left, and whoever was there or came late goes on after one more restart. Where
 * each key of the server is then.
 */
export const moveFromFiles = async (of: {
  readonly options: readonly string[]
  readonly env?: NodeJS.ProcessEnv
  readonly place: 'pkcs11' | 'aws'
}): Promise<Readonly<Record<string, string>>> => {
  const args: string[] = []
  const world = await openWorld({ args, ...(of.env === undefined ? {} : { env: of.env }) })
  try {
    const machines = [await world.simulated('GATEWAY-1'), await world.simulated('GATEWAY-2')]
    const plain: PlainMachine = { serial: 'METER-1' }
    const batch = await world.enlist([...machines, plain], 'plant')
    // Made before the move, used after it.
    const token = await world.token(batch)
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    const agents = machines.map((machine) => world.agent(machine))
    await until('they use their key', () => using(agents, 'telemetry', 1), 60_000)

    args.push(...of.options)
    await world.restart()
    const back = async (): Promise<void> => await until('they are back', () => agents.every((agent) => agent.status().connected), 60_000)
    await back()
    const { client } = world
    const known = async (): Promise<void> => await until('both know it', async () => (await client.call('ca.status')).readiness.acknowledged === 2, 60_000)
    await client.call('ca.prepare', { body: { root: true } })
    await client.call('ca.distribute')
    await known()
    await client.call('ca.activate', { body: {} })
    await known()
    await client.call('ca.taint', { body: { within: 1 } })
    await until('both have renewed', async () => (await client.call('ca.status')).generations[0]?.devices === 0, 60_000)
    await client.call('ca.retire', { body: {} })
    expect(await client.call('kms.rotate-kek')).toMatchObject({ kek: 'kek-2', former: ['kek'] })
    expect(await client.call('kms.retire-kek')).toMatchObject({ kek: 'kek-2', former: [] })

    const placed = async (): Promise<Record<string, string>> =>
      Object.fromEntries((await world.client.call('kms.status')).keys.map(({ name, place }) => [name, place]))
    expect(await placed()).toMatchObject({ 'root-ca-2': of.place, 'issuing-ca-2': of.place, 'kek-2': of.place, 'delivery-signing': 'file' })
    for (const gone of ['root-ca', 'issuing-ca', 'kek']) expect(await placed()).not.toHaveProperty(gone)
    const files = readdirSync(join(world.folder, 'server', 'kms'))
    expect(files.filter((name) => /^(?:root-ca|issuing-ca|kek)(?:-\d+)?\.key\.cbor$/.test(name))).toEqual([])

    await world.restart()
    await back()
    const late = world.agent(plain, { token })
    await until('the token lets the third in', () => using([late], 'telemetry', 1), 60_000)
    await world.client.call('key.rotate', { params: { id: 'telemetry' }, body: {} })
    await until('they use the next', () => using([...agents, late], 'telemetry', 2), 60_000)
    // There is no way back past it.
    args.splice(0)
    await expect(world.restart()).rejects.toMatchObject({ reason: of.place === 'aws' ? 'kms.aws' : 'kms.token' })
    args.push(...of.options)
    await world.restart()
    await back()
    return await placed()
  } finally {
    await world.stop()
  }
}
