import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { newTlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { connectProof, exporterLabel } from '@fleetkey/protocol/transcript.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { embeddedBus, type EmbeddedBus } from '@fleetkey/server/api/broker/embedded.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import { orderBatch } from '@fleetkey/server/flows/batch-order.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import { revokeCa } from '@fleetkey/server/flows/revoke-ca.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { activateCa, distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { grantApproval } from '@fleetkey/server/flows/second-person.ts'
import { suspendCa } from '@fleetkey/server/flows/suspend-ca.ts'
import { suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { dial } from './mqtt-wire.ts'
import { given, openDevices, type Device, type Held } from './returning.ts'

/*
 * TLS resumes a session without asking whose certificate it is, and without looking at it again (node resumes sessions of clients whose certificate was revoked or
 * has expired). Here nothing but our own decision on CONNECT stands between: tickets are not forgotten in these tests, as the server would.
 */

let ctx: TestContext
let device: Device
let held: Held
let bus: EmbeddedBus
const seen: (Uint8Array | null)[] = []

beforeEach(async () => {
  ctx = await testContext({ now: Date.now() })
  ;[device] = (await openDevices(ctx)) as [Device]
  held = given(await device.prove('enrol'))
  seen.length = 0
  bus = await embeddedBus({
    host: '127.0.0.1',
    port: 0,
    tls: await serverTls(ctx, ctx.authority, []),
    async admit(connect) {
      seen.push(connect.certificate)
      return await admitConnection(ctx, connect)
    },
    now: () => ctx.clock.now,
    log: () => undefined,
  })
  await bus.start(async () => undefined)
})
afterEach(async () => {
  await bus.stop()
  await ctx.close()
})

interface Came {
  readonly resumed: boolean
  /** CONNACK return code. */
  readonly code: number | 'closed'
  readonly session: Buffer
  readonly proof: string
}

/** One CONNECT of the device. `proof`: instead of one over this connection; null: none. */
const come = async (of: { readonly session?: Buffer; readonly proof?: string | null; readonly with?: Held | null } = {}): Promise<Came> => {
  const { with: who = held } = of
  const credentials =
    who === null ? {} : { key: who.key.private.export({ format: 'pem', type: 'pkcs8' }) as string, cert: toPem('CERTIFICATE', who.certificate) }
  const wire = await dial(bus.port, { ...credentials, ...(of.session === undefined ? {} : { session: of.session }) })
  const ticket = new Promise<Buffer>((resolve) => {
    wire.socket.once('session', resolve)
    void wire.closed.then(() => resolve(Buffer.alloc(0)))
  })
  const exporter = new Uint8Array(wire.socket.exportKeyingMaterial(32, exporterLabel, Buffer.alloc(0)))
  const made = await device.attester.sign(connectProof('plant', device.id, held.certificate, exporter))
  const proof = of.proof === undefined ? Buffer.from(made).toString('base64url') : of.proof
  const code = await wire.connect({ id: device.id, username: device.id, ...(proof === null ? {} : { password: proof }) })
  const resumed = wire.socket.isSessionReused()
  // Tickets come with a full handshake only.
  const done = { resumed, code, session: resumed && of.session !== undefined ? of.session : await ticket, proof: proof ?? '' }
  await wire.close()
  return done
}

const reason = async (): Promise<string | undefined> => (await device.row()).lastRefusal?.reason
const alice = operator()
const bob: Caller = { ...alice, id: 'bob' } as Caller

test('a device comes back on its session, with the certificate that the session began with', async () => {
  const first = await come()
  expect(first).toMatchObject({ resumed: false, code: 0 })
  const again = await come({ session: first.session })
  expect(again).toMatchObject({ resumed: true, code: 0 })
  // As often as it likes: no ticket comes with it, so that the session ends when it would have.
  expect(await come({ session: first.session })).toMatchObject({ resumed: true, code: 0 })
  expect(seen.map((certificate) => Buffer.compare(certificate ?? new Uint8Array(), held.certificate))).toEqual([0, 0, 0])
})

describe('a resumed session is refused as a new one', () => {
  const renewed = async (): Promise<void> => {
    const key = newTlsKey()
    const answer = await device.renew(await device.open(), { key })
    if (answer.type !== 'identity') throw new Error(answer.code)
    expect(await device.connect({ key, certificate: answer.tls })).toBe('accepted')
  }
  /** What a second person has to agree to. */
  const byTwo = async (order: () => Promise<{ readonly approval: string | null }>): Promise<void> => {
    await grantApproval(ctx, bob, (await order()).approval ?? '')
    await order()
  }
  const nextCa = async (): Promise<void> => {
    await prepareCa(ctx, alice, { root: false })
    await distributeCa(ctx, alice)
  }
  const caSuspended = async (): Promise<void> => {
    await nextCa()
    await activateCa(ctx, alice, null)
    await suspendCa(ctx, alice, 'issuing', 'in doubt')
  }
  const caRevoked = async (): Promise<void> => {
    await nextCa()
    await byTwo(async () => await revokeCa(ctx, alice, 'issuing', { why: 'stolen', force: true }))
  }
  const rows: readonly [string, () => Promise<unknown>, number, string][] = [
    ['revoked', async () => await revokeDevice(ctx, alice, device.id, 'stolen'), 5, 'certificate.revoked'],
    ['suspended', async () => await suspendDevice(ctx, alice, device.id, 'under repair'), 5, 'certificate.held'],
    ['of a batch that is suspended', async () => await orderBatch(ctx, alice, 'b1', { order: 'suspend', why: 'recall' }), 5, 'certificate.held'],
    ['expired', async () => (ctx.clock.now += 49 * 3_600_000), 4, 'certificate.expired'],
    ['not valid yet: the clock was set back', async () => (ctx.clock.now -= 49 * 3_600_000), 4, 'certificate.expired'],
    ['superseded', renewed, 5, 'certificate.replaced'],
    ['of a CA that is suspended', caSuspended, 4, 'certificate.ca-suspended'],
    ['of a CA that was revoked', caRevoked, 4, 'certificate.ca-revoked'],
  ]
  test.each(rows)('%s', async (_name, act, code, why) => {
    const { session } = await come()
    await act()
    expect(await come({ session })).toMatchObject({ resumed: true, code })
    const entries = await ctx.entries()
    expect(entries.findLast(({ action, outcome }) => action === 'device.connect' && outcome === 'refused')?.detail).toContain(why)
    ctx.clock.now += 6_000
    expect(await come()).toMatchObject({ resumed: false, code })
  })

  test('without a proof, or with that of the connection before: the session is worth nothing without the TPM', async () => {
    const first = await come()
    expect(await come({ session: first.session, proof: null })).toMatchObject({ resumed: true, code: 4 })
    expect(await reason()).toBe('connect.no-proof')
    ctx.clock.now += 6_000
    expect(await come({ session: first.session, proof: first.proof })).toMatchObject({ resumed: true, code: 4 })
    expect(await reason()).toBe('connect.proof')
    expect(await come({ session: first.session })).toMatchObject({ resumed: true, code: 0 })
  })

  test('one that began without a certificate has none, whatever the client could show now', async () => {
    const { session } = await come({ with: null })
    expect(await come({ session })).toMatchObject({ resumed: true, code: 4 })
    expect(seen).toEqual([null, null])
  })
})
