import { execFile } from 'node:child_process'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { hasProgram } from './programs.ts'
import { openWorld, storedIdentity, until, type World } from './world.ts'

const here = hasProgram('mosquitto_sub')

/** mosquitto's clients, which nobody here wrote, try what a stolen certificate would. */
describe.skipIf(!here)('mosquitto with a device certificate', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-mosquitto-'))
  const at = (name: string): string => join(folder, name)
  const clock = { ahead: 0 }
  let world: World

  /** Exit code, standard output and what it complained about. */
  const tool = async (name: 'mosquitto_sub' | 'mosquitto_pub', args: readonly string[]): Promise<{ code: number; stdout: string; stderr: string }> => {
    const all = ['-h', '127.0.0.1', '-p', String(world.server.mqttPort), '--cafile', at('root.pem'), ...args]
    try {
      return { code: 0, ...(await promisify(execFile)(name, all, { timeout: 4_000 })) }
    } catch (error) {
      const { code, stdout = '', stderr = '' } = error as { code?: number | null; stdout?: string; stderr?: string }
      return { code: code ?? 124, stdout, stderr }
    }
  }
  const as = (device: string, of: { id?: string; cert?: string } = {}): string[] => [
    '-i',
    of.id ?? device,
    '--cert',
    at(`${of.cert ?? device}.crt`),
    '--key',
    at(`${of.cert ?? device}.key`),
  ]
  const down = (device: string): string => `fk/1/${device}/down`
  const up = (device: string): string => `fk/1/${device}/up`
  /** Code 0 only if the subscription was granted: the tool itself is content with a refusal. */
  const sub = async (args: readonly string[], topic: string) => {
    const done = await tool('mosquitto_sub', [...args, '-q', '1', '-E', '-d', '-t', topic])
    return { ...done, code: done.code === 0 && /Subscribed \(mid: 1\): 1$/m.test(done.stdout) ? 0 : done.code || 128 }
  }
  const pub = async (args: readonly string[], topic: string, more: readonly string[] = ['-q', '1']) =>
    await tool('mosquitto_pub', [...args, '-t', topic, '-m', 'x', ...more])

  beforeAll(async () => {
    if (!here) return
    world = await openWorld({ now: () => Date.now() + clock.ahead })
    // gw-1: a group without the connection proof. gw-2: as usual. gw-3: without the proof, and revoked.
    const machines = await Promise.all(['GW-1', 'GW-2', 'GW-3'].map(async (serial) => await world.simulated(serial)))
    const [open, usual, stolen] = machines
    if (open === undefined || usual === undefined || stolen === undefined) throw new Error('no machines')
    await world.enlist([open, stolen], 'open')
    await world.enlist([usual], 'usual')
    await world.client.call('group.policy.set', { params: { id: 'open' }, body: { connectionProof: false } })
    const agents = machines.map((machine) => world.agent(machine))
    await until('all are connected', () => agents.every((agent) => agent.status().connected), 60_000)
    for (const agent of agents) await agent.stop()
    writeFileSync(at('root.pem'), world.bundle.trust.join(''))
    for (const machine of machines) {
      const { tls, tlsKey, chain, device } = await storedIdentity(world, machine)
      writeFileSync(at(`${device}.crt`), [tls, ...chain].map((der) => toPem('CERTIFICATE', der)).join(''))
      writeFileSync(at(`${device}.key`), tlsKey.private.export({ format: 'pem', type: 'pkcs8' }))
    }
    // The same name from a CA that nobody trusts.
    const openssl = async (...args: string[]) => await promisify(execFile)('openssl', args, { cwd: folder })
    await openssl(
      'req',
      '-x509',
      '-newkey',
      'ec',
      '-pkeyopt',
      'ec_paramgen_curve:P-256',
      '-nodes',
      '-days',
      '2',
      '-subj',
      '/CN=gw-1',
      '-keyout',
      'forged.key',
      '-out',
      'forged.crt',
    )
    await world.client.call('device.revoke', { params: { id: 'gw-3' }, body: { reason: 'stolen' } })
  }, 90_000)
  afterAll(async () => {
    if (here) await world.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  describe('without the connection proof it reaches its own topics', () => {
    test('it subscribes to its own, and hears the server greet it', async () => {
      const { code, stdout } = await tool('mosquitto_sub', [...as('gw-1'), '-q', '1', '-t', down('gw-1'), '-C', '1', '-W', '3', '-F', '%l'])
      expect(code).toBe(0)
      expect(Number(stdout)).toBeGreaterThan(100)
    })
    test('it publishes to its own', async () => expect(await pub(as('gw-1'), up('gw-1'))).toMatchObject({ code: 0 }))
    test('what it published was not a message of the device: refused by its code, and audited', async () => {
      const { items } = await world.client.call('audit.list', { query: { limit: 1000 } })
      expect(items.some(({ action, subject, code }) => action === 'device.message' && subject.startsWith('gw-1') && code === 'malformed')).toBe(true)
    })
  })

  describe('without the connection proof it reaches nothing else', () => {
    test.each([
      ['another device', down('gw-2')],
      ['its own up topic', up('gw-1')],
      ['everything', '#'],
      ['four levels', '+/+/+/+'],
      ['every device', 'fk/1/+/down'],
      ['below itself', 'fk/1/gw-1/#'],
      ['both of its topics', 'fk/1/gw-1/+'],
      ['every enrolment', 'fk/1/e/+/down'],
      ['a group', 'fk/1/g/open/0'],
      ['every group', 'fk/1/g/#'],
      ['the broker', '$SYS/#'],
      ['one topic of the broker', '$SYS/broker/uptime'],
      ['a shared subscription', `$share/x/${down('gw-1')}`],
      ['its topic below another root', `x/${down('gw-1')}`],
      ['its topic with a slash too many', `/${down('gw-1')}`],
    ])('subscribe to %s', async (_, topic) => expect((await sub(as('gw-1'), topic)).code).not.toBe(0))

    test.each([
      ['another device', up('gw-2'), ['-q', '1']],
      ['the down topic of another device', down('gw-2'), ['-q', '1']],
      ['its own down topic', down('gw-1'), ['-q', '1']],
      ['an enrolment', `fk/1/e/e-${'0'.repeat(32)}/up`, ['-q', '1']],
      ['a group', 'fk/1/g/open/0', ['-q', '1']],
      ['the broker', '$SYS/x', ['-q', '1']],
      ['retained', up('gw-1'), ['-q', '1', '-r']],
      ['with QoS 2', up('gw-1'), ['-q', '2']],
    ] as const)('publish: %s', async (_, topic, more) => expect((await pub(as('gw-1'), topic, more)).code).not.toBe(0))

    test.each([
      ['a will on its own topic', ['--will-topic', up('gw-1'), '--will-payload', 'x']],
      ['a will on the topic of another', ['--will-topic', up('gw-2'), '--will-payload', 'x', '--will-qos', '1']],
      ['a retained will', ['--will-topic', down('gw-2'), '--will-payload', 'x', '--will-retain']],
      ['MQTT 5', ['-V', 'mqttv5']],
      ['MQTT 3.1', ['-V', 'mqttv31']],
      ['the name of another user', ['-u', 'gw-2']],
      ['a password that is no proof', ['-u', 'gw-1', '-P', 'hunter2']],
      ['a password of the right form', ['-u', 'gw-1', '-P', 'A'.repeat(86)]],
    ])('connect with %s', async (_, more) => expect((await pub([...as('gw-1'), ...more], up('gw-1'))).code).not.toBe(0))

    test.each([
      ['another device', { id: 'gw-2' }],
      ['with +', { id: 'gw-1+' }],
      ['with #', { id: 'gw-1/#' }],
      ['in capitals', { id: 'GW-1' }],
      ['with a dot', { id: 'gw-1.x' }],
      ['that nobody has', { id: 'gw-9' }],
    ])('client id %s', async (_, of) => expect((await sub(as('gw-1', of), down('gw-1'))).code).not.toBe(0))

    test('no certificate', async () => expect((await sub(['-i', 'gw-1'], down('gw-1'))).code).not.toBe(0))
    test('a certificate of an unknown CA', async () => expect((await sub(as('gw-1', { cert: 'forged' }), down('gw-1'))).code).not.toBe(0))
    test('a revoked certificate', async () => expect((await sub(as('gw-3'), down('gw-3'))).code).not.toBe(0))
    test('an enrolment id reaches no device', async () => expect((await sub(['-i', `e-${'1'.repeat(32)}`], down('gw-1'))).code).not.toBe(0))
    test('an enrolment id with the certificate of a device', async () =>
      expect((await sub(as('gw-1', { id: `e-${'2'.repeat(32)}` }), down('gw-1'))).code).not.toBe(0))
  })

  describe('where the proof is required, a certificate and its key reach nothing', () => {
    test('subscribe to its own topic', async () => expect((await sub(as('gw-2'), down('gw-2'))).code).not.toBe(0))
    test('publish to its own topic', async () => expect((await pub(as('gw-2'), up('gw-2'))).code).not.toBe(0))
    test('with a made-up proof', async () => expect((await pub([...as('gw-2'), '-u', 'gw-2', '-P', 'A'.repeat(86)], up('gw-2'))).code).not.toBe(0))
    test('and its record says why', async () =>
      expect((await world.client.call('device.show', { params: { id: 'gw-2' } })).lastRefusal?.reason).toMatch(/^connect\.(no-)?proof/))
  })

  test('an expired certificate', async () => {
    clock.ahead = 3 * 86_400_000
    expect((await sub(as('gw-1'), down('gw-1'))).code).not.toBe(0)
    clock.ahead = 0
    expect(await sub(as('gw-1'), down('gw-1'))).toMatchObject({ code: 0 })
  })
})
