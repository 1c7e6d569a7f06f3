import { spawnSync } from 'node:child_process'
import { generateKeyPairSync } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { prepareCertificates, recordIssued } from '@fleetkey/server/flows/issue.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { activateCa, distributeCa, prepareCa, retireCa, taintCa } from '@fleetkey/server/flows/rollover.ts'
import { grantApproval, approvals } from '@fleetkey/server/flows/second-person.ts'
import { caStatus } from '@fleetkey/server/flows/ca-status.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { theNextCaWasKnown } from './invariants/invariants.ts'
import { hasProgram } from './programs.ts'

let ctx: TestContext
beforeEach(async () => void (ctx = await testContext()))
afterEach(async () => await ctx.close())

const alice = operator()
const named = (id: string): Caller => ({ kind: 'operator', id, roles: ['owner'], from: 'test' })
const year = 365 * 86_400_000

const reasonOf = async (act: Promise<unknown>): Promise<string> =>
  await act.then(
    () => 'done',
    (thrown: unknown) => `${toProblem(thrown).code} ${toProblem(thrown).reason ?? ''}`.trim(),
  )

/** A certificate of a device by the CA that is active now, recorded. */
const issue = async (id: string): Promise<Uint8Array> => {
  const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const intent = { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: id } as const
  const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [{ profile: 'device-identity', device: DeviceId.parse(id), subject: id, spki }])
  if (issued === undefined) throw new Error('one was ordered')
  await perform(ctx, intent, (tx) => {
    recordIssued(tx, issued)
    tx.insert('device', {
      id,
      version: 0,
      state: 'enrolled',
      serial: id,
      ldevidSerial: issued.intent.id,
      tlsSerial: issued.intent.id,
      previousTlsSerial: null,
    } as never)
  })
  return issued.der
}

const rollOver = async (root: boolean): Promise<void> => {
  await prepareCa(ctx, alice, { root })
  ctx.clock.now += 1_000
  await distributeCa(ctx, alice)
  ctx.clock.now += 1_000
  await activateCa(ctx, alice, null)
}

test('only the owner rolls over; each command is in the audit log once, repeated or not', async () => {
  expect(await reasonOf(prepareCa(ctx, operator('operator'), { root: false }))).toBe('forbidden access.ca.prepare')
  await rollOver(false)
  await activateCa(ctx, alice, null)
  await taintCa(ctx, alice, { within: 60 })
  await taintCa(ctx, alice, { within: 60 })
  await retireCa(ctx, alice, { force: null })
  await retireCa(ctx, alice, { force: null })
  const log = await ctx.entries()
  for (const action of ['ca.distribute', 'ca.taint']) expect(log.filter((entry) => entry.action === action && entry.outcome === 'done')).toHaveLength(1)
  expect(await ctx.kms.describe('issuing-ca')).toBeUndefined()
  expect(await ctx.kms.describe('root-ca')).toBeDefined()
  await theNextCaWasKnown({ store: ctx.store })
})

test('a connected device that has not acknowledged it holds up the activation', async () => {
  await issue('gw-1')
  await prepareCa(ctx, alice, { root: false })
  await distributeCa(ctx, alice)
  const connection = ctx.bus.connect({ client: 'gw-1', device: 'gw-1' })
  expect(await reasonOf(activateCa(ctx, alice, null))).toBe('conflict rollover.stranded')
  expect((await caStatus(ctx)).readiness).toMatchObject({ waiting: 1, away: 0, stranded: 0, first: [{ device: 'gw-1', because: 'waiting' }] })
  ctx.bus.disconnect(connection)
  expect((await caStatus(ctx)).readiness).toMatchObject({ waiting: 0, away: 1 })
  expect(await reasonOf(activateCa(ctx, alice, null))).toBe('done')
})

test('a device whose way back has run out is stranded: said, refused, and forced by two people only', async () => {
  await issue('gw-1')
  await rollOver(true)
  ctx.clock.now += 6 * year
  await rollOver(true)
  // The certificate of the second root by the first has run out; the device has never heard of anything.
  ctx.clock.now += 5 * year
  await prepareCa(ctx, alice, { root: false })
  await distributeCa(ctx, alice)
  expect((await caStatus(ctx)).readiness).toMatchObject({ devices: 1, away: 0, stranded: 1, first: [{ device: 'gw-1', because: 'stranded' }] })
  expect(await reasonOf(activateCa(ctx, alice, null))).toBe('conflict rollover.stranded')
  const force = { reason: 'it was scrapped' }
  const { approval } = await activateCa(ctx, alice, force)
  expect((await activateCa(ctx, alice, force)).approval).toBe(approval)
  expect(await reasonOf(grantApproval(ctx, alice, approval ?? ''))).toBe('forbidden approval.own')
  expect(await reasonOf(grantApproval(ctx, named('bob'), 'ffff'))).toBe('not-found')
  expect(await reasonOf(grantApproval(ctx, operator('auditor'), approval ?? ''))).toBe('forbidden access.approval.grant')
  await grantApproval(ctx, named('bob'), approval ?? '')
  // What was granted to alice is nothing to carol.
  expect((await activateCa(ctx, named('carol'), force)).approval).not.toBe(approval)
  expect(await activateCa(ctx, alice, force)).toEqual({ generation: 4, already: false, approval: null })
  expect((await approvals(ctx)).find(({ id }) => id === approval)?.spentAt).not.toBeNull()
  expect(await reasonOf(grantApproval(ctx, named('bob'), approval ?? ''))).toBe('conflict approval.spent')
})

test('an approval that nobody used in a day is none', async () => {
  await issue('gw-1')
  await rollOver(false)
  await taintCa(ctx, alice, { within: 1 })
  const { approval } = await retireCa(ctx, alice, { force: { reason: 'in a hurry' } })
  await grantApproval(ctx, named('bob'), approval ?? '')
  ctx.clock.now += 25 * 3_600_000
  expect((await retireCa(ctx, alice, { force: { reason: 'in a hurry' } })).approval).not.toBe(approval)
  expect(await reasonOf(grantApproval(ctx, named('bob'), approval ?? ''))).toBe('expired approval.expired')
})

test('I19 notices a CA that signed before anybody was told of it', async () => {
  await prepareCa(ctx, alice, { root: true })
  await issue('gw-1')
  const row = (await ctx.store.find('certificate', { limit: 100 })).find(({ device }) => device === 'gw-1')
  await ctx.store.commit({
    writes: [{ table: 'certificate', do: 'update', row: { ...(row as NonNullable<typeof row>), issuer: 'issuing-ca-2' } }],
    entries: [{ at: 0, caller: 'x', from: 'x', action: 'x', subject: 'x', outcome: 'done', code: null, detail: '' }],
  })
  await expect(theNextCaWasKnown({ store: ctx.store })).rejects.toThrow('I19')
})

describe.skipIf(!hasProgram('openssl'))('chains over a change of the root, by openssl and our own validator', () => {
  test('old, new, and the ones across', async () => {
    const old = await issue('gw-1')
    const before = { root: ctx.authority.root, issuing: ctx.authority.issuing }
    await rollOver(true)
    const fresh = await issue('gw-2')
    const cross = { forward: ctx.authority.certificates.get('root-1-2.cer'), back: ctx.authority.certificates.get('root-2-1.cer') }
    const { root, issuing } = ctx.authority
    const folder = mkdtempSync(join(tmpdir(), 'fk-chains-'))
    const verify = (trust: Uint8Array, between: readonly (Uint8Array | undefined)[], leaf: Uint8Array): string => {
      const pem = (name: string, certificates: readonly (Uint8Array | undefined)[]): string => {
        const path = join(folder, name)
        writeFileSync(path, certificates.map((der) => toPem('CERTIFICATE', der ?? new Uint8Array())).join(''))
        return path
      }
      const [ca, chain, certificate] = [pem('ca.pem', [trust]), pem('chain.pem', between), pem('leaf.pem', [leaf])]
      const at = String(Math.floor(ctx.clock.now / 1000))
      const { status } = spawnSync('openssl', ['verify', '-x509_strict', '-attime', at, '-CAfile', ca, '-untrusted', chain, certificate])
      const own = validateChain({
        leaf: parseCertificate(leaf),
        intermediates: between.flatMap((der) => (der === undefined ? [] : [parseCertificate(der)])),
        roots: [parseCertificate(trust)],
        at: ctx.clock.now,
      })
      return `${status === 0 ? 'good' : 'bad'} ${own.ok ? 'good' : 'bad'}`
    }
    try {
      expect(verify(before.root, [before.issuing], old)).toBe('good good')
      expect(verify(root, [issuing], fresh)).toBe('good good')
      expect(verify(before.root, [issuing, cross.forward], fresh)).toBe('good good')
      expect(verify(root, [before.issuing, cross.back], old)).toBe('good good')
      // What the server shows in TLS serves those who know either root.
      for (const trust of [before.root, root]) expect(verify(trust, ctx.authority.chain, fresh)).toBe('good good')
      expect(verify(before.root, [issuing], fresh)).toBe('bad bad')
      expect(verify(root, [before.issuing], old)).toBe('bad bad')
      expect(verify(before.root, [before.issuing, cross.back], fresh)).toBe('bad bad')
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  })
})
