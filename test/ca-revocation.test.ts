import { execFile } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { createClient, type Client } from '@fleetkey/cli/client.ts'
import type { Agent } from '@fleetkey/device-agent/agent.ts'
import { DeviceId, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import type { EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { activateCa, distributeCa, prepareCa, retireCa, settleRollover, taintCa } from '@fleetkey/server/flows/rollover.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import { caBlastRadius } from '@fleetkey/server/flows/under-ca.ts'
import type { Write } from '@fleetkey/server/flows/context.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { addMembers, createGroup, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { caStatus } from '@fleetkey/server/flows/ca-status.ts'
import { reinstateCa, suspendCa } from '@fleetkey/server/flows/suspend-ca.ts'
import { mustBeInForce } from '@fleetkey/server/flows/trust.ts'
import { caNamed, revokeCa } from '@fleetkey/server/flows/revoke-ca.ts'
import { approvals, grantApproval } from '@fleetkey/server/flows/second-person.ts'
import { endSessions } from '@fleetkey/server/flows/sessions.ts'
import { anEntry } from './conformance/store.ts'
import { expectCut, stepClock } from './cut.ts'
import { enrolledDevice, p256 } from './enrolled-device.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { theNextCaWasKnown } from './invariants/invariants.ts'
import { freePort } from './ports.ts'
import { hasProgram } from './programs.ts'
import { rolloverHolds } from './rollover-evidence.ts'
import { openWorld, until, using, type Machine, type World } from './world.ts'

const run = promisify(execFile)
const refusal = async (act: Promise<unknown>): Promise<string> =>
  await act.then(
    () => 'done',
    (thrown: unknown) => `${toProblem(thrown).code} ${toProblem(thrown).reason ?? ''}`.trim(),
  )

describe.skipIf(!hasProgram('openssl'))('an issuing CA is revoked, judged by its boards and by openssl', () => {
  let world: World
  let bob: Client
  let url = ''
  let agents: Agent[] = []
  let machines: Machine[] = []
  const steps = stepClock()
  /** Whose connections have ended: they come back at once, by another CA. */
  const gone = new Set<string>()
  let identity = ''
  const folder = mkdtempSync(join(tmpdir(), 'fk-ca-'))
  const path = (name: string): string => join(folder, name)
  const ids = ['rv-1', 'rv-2', 'rv-3']
  const radius = async (name: string) => await world.client.call('ca.blast-radius', { params: { name } })
  const revoke = async (name: string, force: boolean) =>
    await world.client.call('ca.revoke', { params: { name }, body: { reason: 'the HSM was stolen', code: 'keyCompromise', force } })

  /** PEM of what the server hands out; an empty string when there is none. */
  const fetched = async (place: string, kind: 'x509' | 'crl'): Promise<string> => {
    const response = await fetch(`${url}/${place}`)
    if (response.status !== 200) return ''
    writeFileSync(path('der'), new Uint8Array(await response.arrayBuffer()))
    return (await run('openssl', [kind, '-inform', 'der', '-in', path('der')])).stdout
  }
  const openssl = async (...args: string[]): Promise<string> => {
    const done = await run('openssl', args).catch((error: { stdout: string; stderr: string }) => error)
    return `${done.stdout}\n${done.stderr}`
  }
  const verdict = async (): Promise<string> => {
    writeFileSync(
      path('lists.pem'),
      `${await fetched('crl/root.crl', 'crl')}${await fetched('crl/root-delta.crl', 'crl')}${readFileSync(path('issuing.crl'), 'utf8')}`,
    )
    return await openssl(
      'verify',
      '-crl_check_all',
      '-use_deltas',
      '-extended_crl',
      '-trusted',
      path('root.pem'),
      '-untrusted',
      path('issuing.pem'),
      '-CRLfile',
      path('lists.pem'),
      path('leaf.pem'),
    )
  }

  beforeAll(async () => {
    const port = await freePort()
    url = `http://127.0.0.1:${port}`
    const bus = (inner: EmbeddedBus): EmbeddedBus => {
      inner.onPresence(({ device }, isPresent) => void (isPresent || device === null || gone.add(device)))
      return inner
    }
    world = await openWorld({ args: ['--http-port', String(port)], step: steps.step, bus })
    machines = await Promise.all(ids.map(async (id) => await world.simulated(id.toUpperCase())))
    await world.enlist(machines, 'plant')
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    agents = machines.map((machine) => world.agent(machine))
    await until('all use the key', () => using(agents, 'telemetry', 1), 60_000)
    const { token } = await world.client.call('operator.add', { body: { id: 'bob', roles: ['owner'] } })
    bob = createClient({ ...(JSON.parse(readFileSync(world.server.cliFile, 'utf8')) as { server: string; ca: string }), token })
    const shown = await world.client.call('device.show', { params: { id: ids[0] ?? '' } })
    identity = shown.certificates.find(({ profile }) => profile === 'device-identity')?.pem ?? ''
    writeFileSync(path('leaf.pem'), identity)
    writeFileSync(path('root.pem'), await fetched('ca/root.cer', 'x509'))
    writeFileSync(path('issuing.pem'), await fetched('ca/issuing.cer', 'x509'))
    await until('its list is made', async () => (await fetched('crl/issuing.crl', 'crl')) !== '')
    writeFileSync(path('issuing.crl'), await fetched('crl/issuing.crl', 'crl'))
  }, 120_000)
  afterAll(async () => {
    bob.close()
    await world.stop()
    rmSync(folder, { recursive: true, force: true })
  }, 60_000)

  test('before: what stands behind it; it is the only one, and stays', { timeout: 60_000 }, async () => {
    expect(await verdict()).toContain('leaf.pem: OK')
    const before = await radius('issuing')
    expect(before).toMatchObject({ generation: 1, state: 'active', revoked: null, until: null, devices: 3, connected: 3, first: ids, rotated: ['telemetry'] })
    expect(before.topics).toEqual(ids.flatMap((id) => [`fk/1/${id}/up`, `fk/1/${id}/down`]))
    expect(before.keys).toMatchObject([{ key: 'telemetry', epochs: [{ epoch: 1, state: 'active', devices: 3, heldUntil: null, usedUntil: null }] }])
    expect((await radius(before.serial)).generation).toBe(1)
    await expect(revoke('issuing', true)).rejects.toMatchObject({ code: 'conflict' })
    await expect(revoke('issuing-9', true)).rejects.toMatchObject({ code: 'not-found' })
    await expect(revoke('root', true)).rejects.toMatchObject({ code: 'unsupported' })
    await world.client.call('ca.prepare', { body: {} })
    await expect(revoke('issuing', true)).rejects.toMatchObject({ code: 'conflict' })
    await world.client.call('ca.distribute')
    await until('they know the next one', async () => (await world.client.call('ca.status')).readiness.acknowledged === 3, 60_000)
    await expect(revoke('issuing', false)).rejects.toMatchObject({ code: 'conflict' })
  })

  test('revoked by two people: cut at once, on the list of its root, in OCSP; its boards come back as themselves', { timeout: 120_000 }, async () => {
    await agents[2]?.stop()
    await until('one is away', async () => (await radius('issuing')).connected === 2)
    const asked = await revoke('issuing', true)
    expect(asked).toMatchObject({ generation: 1, already: false, keys: [], campaigns: [] })
    expect((await world.client.call('approval.list')).items.at(-1)?.detail).toContain(
      '3 devices have to prove themselves anew (2 connected): rv-1, rv-2, rv-3; keys rotated: telemetry; generation 2 signs',
    )
    await expect(world.client.call('approval.grant', { params: { id: asked.approval ?? '' } })).rejects.toMatchObject({ code: 'forbidden' })
    await bob.call('approval.grant', { params: { id: asked.approval ?? '' } })

    gone.clear()
    const revoked = await expectCut({
      order: async () => await revoke('issuing', true),
      isCut: () => gone.size === 2,
      durable: () => steps.at('rollover.revoking'),
    })
    expect(revoked).toMatchObject({ generation: 1, already: false, approval: null, keys: ['telemetry'] })
    expect(revoked.campaigns).toHaveLength(1)
    const [first, second] = (await world.client.call('ca.status')).generations
    expect(first).toMatchObject({ state: 'retired', revoked: { code: 'cACompromise', reason: 'the HSM was stolen', by: 'operator:owner' } })
    expect(second).toMatchObject({ state: 'active' })

    await until('its root lists it', async () => (await verdict()).includes('certificate revoked'))
    expect(await verdict()).toMatch(/error 23 at 1 depth lookup: certificate revoked/)
    const ocsp = await openssl(
      'ocsp',
      '-issuer',
      path('root.pem'),
      '-cert',
      path('issuing.pem'),
      '-url',
      `${url}/ocsp`,
      '-CAfile',
      path('root.pem'),
      '-no_nonce',
    )
    expect(ocsp).toContain('Response verify OK')
    expect(ocsp).toContain('issuing.pem: revoked')
    expect(ocsp).toContain('Reason: cACompromise')

    await until(
      'those that were connected are back, with certificates of the next one',
      () => agents.slice(0, 2).every((agent) => agent.status().connected),
      60_000,
    )
    const after = await radius('1')
    expect(after).toMatchObject({ state: 'retired', revoked: { code: 'cACompromise' }, devices: 3, connected: 0 })
    expect(after.until).toBe(first?.revoked?.at)
    for (const id of ids.slice(0, 2)) {
      const { certificates, lastRefusal } = await world.client.call('device.show', { params: { id } })
      const fresh = certificates.filter(({ notBefore }) => notBefore >= (after.until ?? 0) - 3_600_000 - 60_000)
      expect(fresh.map(({ profile }) => profile)).toContain('device-identity')
      expect(lastRefusal === null || lastRefusal.reason === 'certificate.ca-revoked').toBe(true)
    }
    // Whoever was away is refused once, for the reason, and comes back by its hardware.
    const back = world.agent(machines[2] as Machine)
    await until('the third is back', () => back.status().connected, 60_000)
    await until('all use the next epoch', () => using([...agents.slice(0, 2), back], 'telemetry', 2), 60_000)
    expect((await radius('1')).keys[0]?.epochs[0]).toMatchObject({ epoch: 1, devices: 3 })
    expect((await radius('1')).keys[0]?.epochs[0]?.usedUntil).not.toBeNull()
    expect(await revoke('issuing', true)).toMatchObject({ already: true, approval: null, keys: [] })
    const { items } = await world.client.call('audit.list', { query: { after: 0, limit: 1000 } })
    expect(items.filter(({ action, outcome }) => action === 'ca.revoke' && outcome === 'done')[0]?.detail).toMatch(
      /cACompromise: the HSM was stolen; .*approved by bob/,
    )
    await world.restart()
    await until('all are back after a restart', () => [...agents.slice(0, 2), back].every((agent) => agent.status().connected), 60_000)
    await until('the list of the root has it still', async () => (await verdict()).includes('certificate revoked'))
    await rolloverHolds(world)
  })
})

describe('by its flow', () => {
  let ctx: TestContext
  beforeEach(async () => void (ctx = await testContext()))
  afterEach(async () => await ctx.close())
  const alice = operator()
  const bob: Caller = { ...alice, id: 'bob' } as Caller

  const revoke = async (name: string, force = false): Promise<string> => {
    const of = { why: 'stolen', force }
    const { approval, already } = await revokeCa(ctx, alice, name, of)
    if (approval === null) return already ? 'already' : 'done'
    await grantApproval(ctx, bob, approval)
    await revokeCa(ctx, alice, name, of)
    return 'revoked'
  }
  const rollOver = async (root: boolean): Promise<void> => {
    await prepareCa(ctx, alice, { root })
    ctx.clock.now += 1_000
    await distributeCa(ctx, alice)
    ctx.clock.now += 1_000
    await activateCa(ctx, alice, null)
  }
  const states = (): string => ctx.authority.rollover.generations.map(({ state, revoked }) => (revoked === undefined ? state : `${state}!`)).join(' ')

  test('only owners, and nobody alone', async () => {
    await rollOver(false)
    for (const role of ['operator', 'auditor', 'factory'] as const)
      expect(await refusal(revokeCa(ctx, operator(role), 'issuing', { why: 'x', force: false }))).toMatch(/^forbidden/)
    const { approval } = await revokeCa(ctx, alice, 'issuing', { why: 'x', force: false })
    expect(await refusal(grantApproval(ctx, alice, approval ?? ''))).toBe('forbidden approval.own')
    // What was approved for one CA is good for no other.
    await grantApproval(ctx, bob, approval ?? '')
    expect((await revokeCa(ctx, alice, 'issuing-2', { why: 'x', force: true }).catch(toProblem)) instanceof Error).toBe(true)
    expect(states()).toBe('superseded active')
    expect((await approvals(ctx)).map(({ spentAt }) => spentAt)).toEqual([null])
  })

  test('one that was superseded: its key is gone, the root keeps its own to list it', async () => {
    await rollOver(true)
    expect(await revoke('issuing')).toBe('revoked')
    expect(states()).toBe('retired! active')
    expect(await ctx.kms.describe('issuing-ca')).toBeUndefined()
    expect(await ctx.kms.describe('root-ca')).toBeDefined()
    expect([...ctx.authority.issuers.keys()]).toEqual(['root-ca-2', 'root-ca', 'issuing-ca-2'])
    expect(ctx.published.map(({ profile, status, code }) => [profile, status, code])).toEqual([['issuing-ca', 'revoked', 'unspecified']])
    // Devices do not trust that root any more, and are told whose signatures do not count.
    expect(ctx.authority.bundle).toMatchObject({ version: 4, roots: [ctx.authority.root] })
    expect(ctx.authority.bundle?.retired).toHaveLength(2)
    expect(await revoke('issuing')).toBe('already')
    expect(await refusal(taintCa(ctx, alice, { number: 1, within: 1 }))).toBe('done')
    await theNextCaWasKnown({ store: ctx.store })
  })

  test('the next one, before it ever signed: the one that signs goes on, and another one can be prepared', async () => {
    await prepareCa(ctx, alice, { root: false })
    await distributeCa(ctx, alice)
    expect(await revoke('issuing-2')).toBe('revoked')
    expect(states()).toBe('active retired!')
    await rollOver(false)
    expect(states()).toBe('superseded retired! active')
    expect(await refusal(revokeCa(ctx, alice, '2', { why: 'x', force: false }))).toBe('done')
    await theNextCaWasKnown({ store: ctx.store })
  })

  test('the one that signs: the next one signs in the same commit', async () => {
    await prepareCa(ctx, alice, { root: false })
    await distributeCa(ctx, alice)
    expect(await refusal(revokeCa(ctx, alice, 'issuing', { why: 'x', force: false }))).toBe('conflict rollover.active')
    expect(await revoke('issuing', true)).toBe('revoked')
    expect(states()).toBe('retired! active')
    expect(ctx.authority.key).toBe('issuing-ca-2')
    await theNextCaWasKnown({ store: ctx.store })
  })

  test('what waits for devices under it is dropped, nobody else’s; keys are rotated as the policies of their groups say', async () => {
    await rollOver(false)
    const { spki } = p256()
    const under = { old: ['gw-1', 'gw-2'], next: ['gw-3'] } as const
    const groups = { plant: true, yard: false } as const
    const keyOf = (group: string): KeyId => KeyId.parse(`key-of-${group}`)
    for (const [group, rotateOnLeave] of Object.entries(groups)) {
      await createGroup(ctx, alice, GroupId.parse(group))
      await setGroupPolicy(ctx, alice, GroupId.parse(group), { rotateOnLeave })
      await createKey(ctx, alice, { id: keyOf(group), protection: 'sealed' })
      await grantKey(ctx, alice, keyOf(group), GroupId.parse(group))
    }
    const ids = [...under.old, ...under.next].map((name) => DeviceId.parse(name))
    await ctx.store.commit({
      writes: ids.flatMap((device, at): Write[] => [
        { table: 'device', do: 'insert', row: enrolledDevice(device, { spki, at: ctx.now() }) },
        {
          table: 'certificate',
          do: 'insert',
          row: {
            id: `${device}-2`,
            version: 0,
            profile: 'device-tls',
            device,
            issuer: at < 2 ? 'issuing-ca' : 'issuing-ca-2',
            der: new Uint8Array(at),
            spkiHash: String(at),
            notBefore: 0,
            notAfter: ctx.now() + 3_600_000,
            status: 'valid',
            revokedAt: null,
            reason: null,
          },
        },
        { table: 'outbox', do: 'insert', row: { id: `${device}/x`, version: 0, device, subject: 'x', bytes: new Uint8Array(1), createdAt: ctx.now() } },
      ]),
      entries: [anEntry()],
    })
    for (const group of ['plant', 'yard'] as const) await addMembers(ctx, alice, GroupId.parse(group), { devices: ids })
    const latest = async (): Promise<readonly (number | undefined)[]> =>
      await Promise.all(Object.keys(groups).map(async (group) => (await ctx.store.get('key', keyOf(group)))?.latest))
    const page = { limit: 10 }
    const before = await caBlastRadius(ctx, await caNamed(ctx, 'issuing'), page)
    expect(before).toMatchObject({ devices: 2, first: under.old, waiting: 2, rotated: [keyOf('plant')], revoked: null })
    const first = await latest()
    expect(await revoke('issuing')).toBe('revoked')
    expect((await ctx.store.find('outbox', { limit: 10 })).map(({ device }) => device)).toEqual(under.next)
    expect(await latest()).toEqual([(first[0] ?? 0) + 1, first[1]])
    expect(await caBlastRadius(ctx, await caNamed(ctx, 'issuing'), page)).toMatchObject({
      devices: 2,
      waiting: 0,
      revoked: { reason: 'stolen' },
      until: ctx.now(),
    })
  })

  test('one that was retired has nothing left to revoke', async () => {
    await rollOver(false)
    await taintCa(ctx, alice, { within: 1 })
    await retireCa(ctx, alice, { force: null })
    expect(await refusal(revokeCa(ctx, alice, 'issuing', { why: 'x', force: false }))).toBe('conflict rollover.order')
    expect(await refusal(caNamed(ctx, 'ROOT-2'))).toBe('unsupported')
    expect((await caNamed(ctx, ctx.authority.rollover.generations.length.toString())).number).toBe(2)
  })

  test('suspended: nothing of it is accepted, its key and its lists stay; reinstated it counts again', async () => {
    expect(await refusal(suspendCa(ctx, operator('operator'), 'issuing', 'x'))).toBe('conflict rollover.order')
    await rollOver(false)
    const row = { issuer: 'issuing-ca', id: '01', status: 'valid', notBefore: 0, notAfter: Number.MAX_SAFE_INTEGER } as Certificate
    const hear = ctx.bus.connect
    ctx.bus.onPresence((from, present) =>
      present
        ? void ctx.sessions.open({ ...from, certificate: { issuer: 'issuing-ca', notAfter: Number.MAX_SAFE_INTEGER } }, new Uint8Array(16))
        : ctx.sessions.close(from),
    )
    hear({ client: 'gw-1', device: 'gw-1' })
    await endSessions(ctx)
    expect(await refusal(suspendCa(ctx, operator('operator'), 'issuing', 'x'))).toBe('forbidden access.ca.suspend')
    expect(ctx.bus.kicked).toEqual([])
    expect(await suspendCa(ctx, alice, 'issuing', 'the HSM is being looked for')).toMatchObject({ generation: 1, already: false })
    await endSessions(ctx)
    expect(ctx.bus.kicked).toEqual(['gw-1'])
    expect(await refusal((async () => mustBeInForce(ctx, row))())).toBe('unauthenticated certificate.ca-suspended')
    expect(await suspendCa(ctx, alice, '1', 'again')).toMatchObject({ already: true })
    expect((await caStatus(ctx)).generations[0]).toMatchObject({ state: 'superseded', suspended: { reason: 'the HSM is being looked for' } })
    expect(await ctx.kms.describe('issuing-ca')).toBeDefined()
    expect(ctx.published).toEqual([])
    expect(await refusal(suspendCa(ctx, alice, 'issuing-2', 'x'))).toBe('conflict rollover.order')
    expect(await reinstateCa(ctx, alice, 'issuing')).toMatchObject({ already: false })
    expect(await reinstateCa(ctx, alice, 'issuing')).toMatchObject({ already: true })
    expect(() => mustBeInForce(ctx, row)).not.toThrow()
    expect(await suspendCa(ctx, alice, 'issuing', 'x')).toMatchObject({ already: false })
    expect(await revoke('issuing')).toBe('revoked')
    expect(await refusal(reinstateCa(ctx, alice, 'issuing'))).toBe('conflict rollover.order')
    expect(await refusal((async () => mustBeInForce(ctx, row))())).toBe('unauthenticated certificate.ca-revoked')
  })

  test('a crash at any step is made good at the next start', async () => {
    await rollOver(false)
    const { approval } = await revokeCa(ctx, alice, 'issuing', { why: 'stolen', force: false })
    await grantApproval(ctx, bob, approval ?? '')
    for (const at of ['rollover.revoking', 'rollover.revoked', 'rollover.destroyed']) {
      const dying = { ...ctx, step: (name: string) => name === at && fall(at) }
      expect(await refusal(revokeCa(dying as never, alice, 'issuing', { why: 'stolen', force: false }))).toMatch(/^internal/)
      expect(ctx.authority.retired.has('issuing-ca') || at === 'rollover.revoking').toBe(true)
    }
    await settleRollover(ctx)
    expect(states()).toBe('retired! active')
  })

  test('a session rests on its certificate and on the CA behind it', async () => {
    const hear = ctx.bus.connect
    ctx.bus.onPresence((from, present) =>
      present
        ? void ctx.sessions.open({ ...from, certificate: { issuer: 'issuing-ca', notAfter: ctx.clock.now + 1_000 } }, new Uint8Array(16))
        : ctx.sessions.close(from),
    )
    hear({ client: 'gw-1', device: 'gw-1' })
    await endSessions(ctx)
    expect(ctx.bus.kicked).toEqual([])
    ctx.clock.now += 1_001
    await endSessions(ctx)
    expect(ctx.bus.kicked).toEqual(['gw-1'])
    await rollOver(false)
    hear({ client: 'gw-2', device: 'gw-2' })
    await endSessions(ctx)
    expect(ctx.bus.kicked).toEqual(['gw-1'])
    expect(await revoke('issuing')).toBe('revoked')
    expect(ctx.bus.kicked).toEqual(['gw-1', 'gw-2'])
    // Admitted while that happened: found by the clock.
    hear({ client: 'gw-3', device: 'gw-3' })
    await endSessions(ctx)
    expect(ctx.bus.kicked).toEqual(['gw-1', 'gw-2', 'gw-3'])
  })
})

const fall = (at: string): never => {
  throw new Error(`power cut at ${at}`)
}
