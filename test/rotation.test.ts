import { rmSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { evidenceOf } from './invariants/agent-evidence.ts'
import { openWorld, until, using } from './world.ts'

test('the old epoch is kept everywhere until the last device has proven the new one, whatever its recipient-usage period', { timeout: 60_000 }, async () => {
  const world = await openWorld()
  try {
    const { client } = world
    const [one, two] = [await world.simulated('GW-1'), await world.simulated('GW-2')]
    await world.enlist([one, two], 'plant')
    const refuse = join(world.folder, 'refuse')
    const hook = ['/bin/sh', '-c', `while test -e '${refuse}'; do sleep 0.05; done`]
    const outputs = [{ key: 'telemetry' as never, path: join(world.folder, 'telemetry.key'), format: 'raw' as const, owner: { mode: 0o600 }, hook }]
    let first = world.agent(one)
    const second = world.agent(two, { outputs })
    await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
    await client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    const stage = async (id: string, epoch: number): Promise<string | undefined> =>
      (await client.call('device.show', { params: { id } })).holdings.find((holding) => holding.epoch === epoch)?.stage
    await until('both use epoch 1', () => using([first, second], 'telemetry', 1))
    await until('and the second one has given it to its application', async () => (await stage('gw-2', 1)) === 'active')
    // The second one's application does not take the new epoch yet.
    writeFileSync(refuse, '')
    const { campaign } = await client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 3_600_000 } })
    const show = async () => await client.call('campaign.show', { params: { id: campaign } })
    await until('the first has proven it', async () => (await stage('gw-1', 2)) === 'active')
    expect(await show()).toMatchObject({ state: 'activating', counts: { installed: 1 } })
    // The first one reconnects, and can still read what the second one writes.
    await first.stop()
    const written = await evidenceOf('gw-2', second).encrypt('telemetry', 'from the second')
    first = world.agent(one)
    await until('it is back', async () => (await client.call('device.show', { params: { id: 'gw-1' } })).online)
    await until('it reads epoch 1', async () => (await evidenceOf('gw-1', first).decrypt('telemetry', written)) === 'from the second')
    expect(await stage('gw-1', 1)).toBe('active')
    expect(await show()).toMatchObject({ state: 'activating', counts: { installed: 1, active: 1 }, waitsFor: 'devices', behind: 1 })
    rmSync(refuse)
    // Not at the deadline of an hour.
    await until('the rotation ends', async () => (await show()).state === 'done')
    expect(await show()).toMatchObject({ counts: { retired: 2 } })
    expect((await client.call('key.show', { params: { id: 'telemetry' } })).epochs[0]?.state).toBe('destroyed')
  } finally {
    await world.stop()
  }
})
