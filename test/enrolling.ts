import { randomBytes } from 'node:crypto'
import type { Attester } from '@fleetkey/device-agent/attesters/attester.ts'
import { tokenAttester } from '@fleetkey/device-agent/attesters/token.ts'
import type { Document } from '@fleetkey/device-agent/files.ts'
import { openSoftwareKeys, type SoftwareKeys } from '@fleetkey/device-agent/software-keys.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { DeviceId, EnrolmentId, TenantId } from '@fleetkey/protocol/ids.ts'
import type { Body, BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage, signMessage } from '@fleetkey/protocol/signed.ts'
import type { Device } from '@fleetkey/server/fleet/device.ts'
import type { DeviceRef } from '@fleetkey/server/flows/context.ts'
import type { TestContext } from './harness.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const max = 1 << 20

/** The server's side without a broker: its context, and what takes the messages of devices. */
export interface ServerSide {
  readonly ctx: TestContext
  readonly handle: (from: DeviceRef, bytes: Uint8Array) => Promise<void>
}

/** Keys of a device without a TPM, in memory. */
export const softwareKeys = async (): Promise<SoftwareKeys> => {
  let stored: Uint8Array | undefined
  const save = async (bytes: Uint8Array): Promise<void> => void (stored = Uint8Array.from(bytes))
  const document: Document = { load: async () => stored?.slice(), save, replace: save }
  return await openSoftwareKeys({ document, random, step: () => undefined })
}

/** A board without a key of its own, and the text that lies in its token file. */
export const byToken = async (text: string | null, keys?: SoftwareKeys): Promise<Attester> =>
  tokenAttester(keys ?? (await softwareKeys()), {
    path: 'token',
    read: async () => (text === null ? undefined : new TextEncoder().encode(text)),
    remove: async () => undefined,
    step: () => undefined,
    log: () => undefined,
  })
export interface Attempt {
  readonly serial: string
  readonly attester: Attester
  readonly purpose?: 'enrol' | 'return'
  hello?(body: BodyOf<'hello'>): BodyOf<'hello'>
  /** The exporter that the device computes its nonce with; its own connection's unless told. */
  readonly deviceExporter?: Uint8Array
  readonly eventLog?: Uint8Array
  answer?(body: BodyOf<'answer'>): BodyOf<'answer'> | Promise<BodyOf<'answer'>>
  readonly between?: () => unknown
  /** Not beside others: the clock may go on. */
  readonly alone?: boolean
}

const refusalOf = (ctx: TestContext, body: Body, device: Device | undefined): string => {
  if (body.type === 'identity') return 'admitted'
  if (body.type !== 'refusal') return body.type
  return device?.lastRefusal?.reason ?? [...(ctx.refusals.take() ?? '').matchAll(/[a-z-]+(?:\.[a-z-]+)+/g)].at(-1)?.[0] ?? body.code
}

/** One enrolment whose every message can be changed on its way: `admitted`, or the private reason. */
export const attemptAt = async ({ ctx, handle }: ServerSide, of: Attempt): Promise<string> => {
  const client = EnrolmentId.parse(`e-${randomBytes(16).toString('hex')}`)
  const from = ctx.bus.connect({ client })
  // A device's record takes a refusal every five seconds.
  if (of.alone !== false) ctx.clock.now += 6_000
  const say = async (body: Body): Promise<{ bytes: Uint8Array; heard: Body; heardBytes: Uint8Array }> => {
    const bytes = await signMessage({ v: 1, tenant: TenantId.parse('plant'), device: client, from: 'device', id: random(16), seq: 1, body }, of.attester.signer)
    await handle(from, bytes)
    const heardBytes = ctx.bus.take(client).at(-1) ?? new Uint8Array()
    return { bytes, heard: readMessage(heardBytes, { max }).envelope.body, heardBytes }
  }
  const device = async (): Promise<Device | undefined> => await ctx.store.get('device', DeviceId.parse(of.serial.toLowerCase()))
  const made = await of.attester.hello({ serial: of.serial, purpose: of.purpose ?? 'enrol', random: random(32), agent: 'test' })
  const hello = of.hello?.(made) ?? made
  const first = await say(hello)
  if (first.heard.type !== 'challenge') return refusalOf(ctx, first.heard, await device())
  const key = newTlsKey()
  const answered = await of.attester.answer({
    tenant: 'plant',
    hello,
    helloBytes: first.bytes,
    challenge: first.heard,
    challengeBytes: first.heardBytes,
    exporter: of.deviceExporter ?? from.exporter ?? new Uint8Array(),
    eventLog: of.eventLog ?? new Uint8Array(),
    tls: { spki: key.spki, csr: await tlsCsr(key, of.serial) },
  })
  await of.between?.()
  const second = await say((await of.answer?.(answered)) ?? answered)
  return refusalOf(ctx, second.heard, await device())
}
