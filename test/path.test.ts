import { execFile } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { verifyExport } from '@fleetkey/cli/offline/audit.ts'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { hasProgram } from './programs.ts'
import { openWorld, until, using, type Machine, type World } from './world.ts'

const bytes = (text: string): Uint8Array => new TextEncoder().encode(text)
const text = (of: Uint8Array): string => new TextDecoder().decode(of)

/** One path, two TPMs: enrol, distribute, rotate, revoke. */
describe.each(['simulator', 'swtpm'] as const)('the main path on %s', (kind) => {
  const here = kind === 'simulator' || hasProgram('swtpm')
  let world: World
  let machine: Machine
  let agent: Agent
  let companion: Agent
  const id = 'gw-1'

  beforeAll(async () => {
    if (!here) return
    world = await openWorld()
    machine = kind === 'swtpm' ? await world.onSwtpm('GW-1') : await world.simulated('GW-1')
    const other = await world.simulated('GW-2')
    await world.enlist([machine, other], 'plant')
    agent = world.agent(machine, {
      outputs: [{ key: 'telemetry' as never, path: join(world.folder, 'telemetry.key'), format: 'raw', owner: { mode: 0o640 }, hook: null }],
    })
    companion = world.agent(other)
    await until('both are connected', () => agent.status().connected && companion.status().connected, 60_000)
  }, 90_000)
  afterAll(async () => {
    if (here) await world.stop()
  }, 60_000)

  // oxlint-disable-next-line vitest/expect-expect, vitest/valid-title -- the titles and assertions are below
  const on = (name: string, work: () => Promise<void>): void => test.skipIf(!here)(name, work, 60_000)
  const rotated = async (key: string, policy: object = {}): Promise<string> =>
    (await world.client.call('key.rotate', { params: { id: key }, body: policy })).campaign

  on('it is enrolled as what the manifest says, on the release it runs', async () => {
    const view = await world.client.call('device.show', { params: { id } })
    expect(view).toMatchObject({ state: 'enrolled', serial: 'GW-1', release: 'gateway/1.0.0', assurance: 'simulated', online: true })
    expect(view.certificates.map(({ profile }) => profile).toSorted()).toStrictEqual(['device-identity', 'device-tls'])
  })

  on('openssl accepts both certificates under root and issuing CA', async () => {
    const folder = mkdtempSync(join(tmpdir(), 'fk-chain-'))
    const { certificates } = await world.client.call('device.show', { params: { id } })
    writeFileSync(join(folder, 'root.pem'), world.bundle.trust.join(''))
    writeFileSync(join(folder, 'issuing.pem'), world.bundle.chain.join(''))
    for (const { pem, profile } of certificates) {
      writeFileSync(join(folder, 'leaf.pem'), pem)
      const purpose = profile === 'device-tls' ? ['-purpose', 'sslclient'] : []
      const { stdout } = await promisify(execFile)(
        'openssl',
        ['verify', '-x509_strict', ...purpose, '-CAfile', 'root.pem', '-untrusted', 'issuing.pem', 'leaf.pem'],
        { cwd: folder },
      )
      expect(stdout).toBe('leaf.pem: OK\n')
    }
    rmSync(folder, { recursive: true })
  })

  on('keys arrive: a sealed one and one that never leaves the TPM', async () => {
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed', recipientUsage: 0 } })
    await world.client.call('key.create', { body: { id: 'command-auth', protection: 'tpm' } })
    for (const key of ['telemetry', 'command-auth']) await world.client.call('key.grant', { params: { id: key }, body: { group: 'plant' } })
    await until('both use both keys', () => using([agent, companion], 'telemetry', 1) && using([agent, companion], 'command-auth', 1))
    const sealed = await agent.encrypt('telemetry', bytes('4.2 bar'))
    expect(text(companion.decrypt('telemetry', sealed.ciphertext).plaintext)).toBe('4.2 bar')
    const { mac } = await agent.mac('command-auth', bytes('close'))
    expect(await companion.verify('command-auth', 1, bytes('close'), mac)).toBe(true)
    expect(await companion.verify('command-auth', 1, bytes('open'), mac)).toBe(false)
    expect(() => agent.get('command-auth')).toThrow(Problem)
  })

  on('a local consumer has the key in its file, with its mode', async () => {
    const path = join(world.folder, 'telemetry.key')
    expect(readFileSync(path)).toStrictEqual(Buffer.from(companion.get('telemetry').material))
    expect(statSync(path).mode & 0o777).toBe(0o640)
  })

  on('a rotation is done when both have used the new epoch, and the old one is gone then', async () => {
    for (const key of ['telemetry', 'command-auth']) {
      const campaign = await rotated(key, { waves: [0.5, 1], deadline: 30_000 })
      await until(`${key} is proven`, async () => {
        const { counts, state } = await world.client.call('campaign.show', { params: { id: campaign } })
        return state !== 'installing' && (counts['active'] ?? 0) + (counts['retired'] ?? 0) === 2
      })
    }
    expect(using([agent, companion], 'telemetry', 2) && using([agent, companion], 'command-auth', 2)).toBe(true)
    await until(
      'epoch 1 of telemetry is destroyed',
      async () => (await world.client.call('key.show', { params: { id: 'telemetry' } })).epochs[0]?.state === 'destroyed',
    )
    await until(
      'no device holds it',
      () =>
        agent
          .list()
          .find(({ key }) => key === 'telemetry')
          ?.epochs.join() === '2',
    )
    expect(readFileSync(join(world.folder, 'telemetry.key'))).toStrictEqual(Buffer.from(companion.get('telemetry').material))
  })

  on('a device that was away during a rotation converges when it is back', async () => {
    agent.kill()
    await until('it is away', async () => !(await world.client.call('device.show', { params: { id } })).online)
    const campaign = await rotated('telemetry', { deadline: 500 })
    await until('it is given up', async () => ((await world.client.call('campaign.show', { params: { id: campaign } })).counts['timed-out'] ?? 0) === 1)
    await until('the others use it', () => using([companion], 'telemetry', 3))
    // Overlap does not end by time-out: the old epoch stays readable, and the campaign open, for the one that may still need it.
    expect(await world.client.call('campaign.show', { params: { id: campaign } })).toMatchObject({ state: 'activating' })
    agent = world.agent(machine)
    await until('it uses epoch 3', () => using([agent, companion], 'telemetry', 3), 40_000)
    await until('it has proven epoch 3, and erased epoch 2', async () => {
      const { holdings } = await world.client.call('device.show', { params: { id } })
      const stage = (epoch: number): string | undefined => holdings.find((one) => one.key === 'telemetry' && one.epoch === epoch)?.stage
      return stage(3) === 'active' && stage(2) === 'retired'
    })
    await until('the rotation is done', async () => (await world.client.call('campaign.show', { params: { id: campaign } })).state === 'done')
  })

  on('the server starts again: devices come back and nothing is forgotten', async () => {
    await world.restart()
    await until('both are back', () => agent.status().connected && companion.status().connected, 40_000)
    expect(using([agent, companion], 'telemetry', 3)).toBe(true)
  })

  on('revoked: the session ends at once, no certificate counts, the others go on without it', async () => {
    const done = await world.client.call('device.revoke', { params: { id }, body: { reason: 'stolen' } })
    expect(done.keys).toStrictEqual(['command-auth', 'telemetry'])
    await until('its session is closed', () => !agent.status().connected, 2_000)
    await until('the companion uses the next epochs', () => using([companion], 'telemetry', 4) && using([companion], 'command-auth', 3))
    await until('it is refused', () => agent.status().lastRefusal !== null, 30_000)
    const { ciphertext } = await companion.encrypt('telemetry', bytes('without you'))
    expect(() => agent.decrypt('telemetry', ciphertext)).toThrow(/telemetry/)
    const view = await world.client.call('device.show', { params: { id } })
    expect(view).toMatchObject({ state: 'revoked', online: false, revocationReason: 'stolen', lastRefusal: { reason: 'certificate.revoked' } })
    expect(view.certificates.every(({ status }) => status === 'revoked')).toBe(true)
  })

  on('it cannot enrol again', async () => {
    agent.kill()
    rmSync(join(world.folder, 'agents', 'GW-1'), { recursive: true })
    const again = world.agent(machine)
    await until('it is refused', () => again.status().lastRefusal !== null, 30_000)
    expect(again.status().device).toBeNull()
    again.kill()
  })

  on('the audit log says all of it, and has not been edited', async () => {
    let log = ''
    await world.client.stream('/api/1/audit/export', (chunk) => void (log += chunk))
    const key = Buffer.from((await world.client.call('audit.key')).spki, 'base64')
    expect(verifyExport(log, key, [])).toMatchObject({ ok: true })
    for (const action of ['batch.import', 'key.create', 'key.grant', 'key.deliver', 'device.acknowledge', 'key.rotate', 'device.revoke'])
      expect(log).toContain(`"${action}"`)
    expect(verifyExport(log.replace('stolen', 'st0len'), key, [])).toMatchObject({ ok: false })
  })
})
