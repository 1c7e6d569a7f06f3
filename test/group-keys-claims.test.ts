import { randomBytes } from 'node:crypto'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { readMessage, verifyMessage } from '@fleetkey/protocol/signed.ts'
import { openWraps } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { sealedProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { openSealed, placeName } from '@fleetkey/protocol/wrap.ts'
import type { EnrolledDevice } from '@fleetkey/server/fleet/device.ts'
import { acknowledge } from '@fleetkey/server/flows/acknowledge.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { addMembers, createGroup, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { anEntry } from './conformance/store.ts'
import { enrolledDevice, p256, type Recipient } from './enrolled-device.ts'
import { operator, testContext, type TestContext } from './harness.ts'

/** Devices that say what they like: what a statement about a broadcast is worth without the key. */
const [plant, telemetry] = [GroupId.parse('plant'), KeyId.parse('telemetry')]
const names = ['gw-1', 'gw-2', 'gw-3'].map((name) => DeviceId.parse(name))
const [one, two, three] = names as [DeviceId, DeviceId, DeviceId]
let ctx: TestContext
const recipients = new Map<string, Recipient>()

const enrolled = (id: DeviceId, at: number): EnrolledDevice => {
  const recipient = p256()
  recipients.set(id, recipient)
  return enrolledDevice(id, { spki: recipient.spki, at })
}

type Labels = BodyOf<'labels'> & { readonly open: Uint8Array }

beforeEach(async () => {
  ctx = await testContext()
  const rows = names.map((name) => enrolled(name, ctx.clock.now))
  await ctx.store.commit({ writes: rows.map((row) => ({ table: 'device', do: 'insert', row }) as const), entries: [anEntry()] })
  for (const name of names) ctx.sessions.open(ctx.bus.connect({ client: name, device: name }), new Uint8Array(16))
  await createGroup(ctx, operator(), plant)
  await setGroupPolicy(ctx, operator(), plant, { delivery: 'broadcast' })
  await addMembers(ctx, operator(), plant, { devices: names })
  await createKey(ctx, operator(), { id: telemetry, protection: 'sealed' })
  await grantKey(ctx, operator(), telemetry, plant)
})
afterEach(async () => await ctx.close())

/** What a device was sent, opened with its recipient key. */
const heard = async (device: DeviceId): Promise<{ readonly labels: readonly Labels[]; readonly broadcasts: readonly BodyOf<'broadcast'>[] }> => {
  const labels: Labels[] = []
  const broadcasts: BodyOf<'broadcast'>[] = []
  const recipient = recipients.get(device)
  if (recipient === undefined) throw new Error(`no device ${device}`)
  for (const bytes of ctx.bus.take(device)) {
    const message = readMessage(bytes, { max: 64 << 10 })
    const { body, device: to } = message.envelope
    if (body.type === 'labels' && body.sealed !== null) {
      const context = { tenant: 'plant', device, key: placeName(body), epoch: body.generation, protection: 'sealed', purpose: 'labels' } as const
      labels.push({ ...body, open: Uint8Array.from((await openSealed(body.sealed, context, recipient)).bytes()) })
    }
    if (body.type !== 'broadcast') continue
    expect(to).toBe('g/plant/0')
    verifyMessage(message, parseCertificate(ctx.authority.roles.group.certificate).spki)
    broadcasts.push(body)
  }
  return { labels, broadcasts }
}

const open = (place: Labels | undefined, of: BodyOf<'broadcast'> | undefined): Secret | undefined => {
  if (place === undefined || of === undefined) throw new Error('nothing was sent')
  const { key, epoch, nonce, generation } = of
  return openWraps(of.wraps, place.open, place.slot, { tenant: 'plant', group: 'plant', shard: 0, key, epoch, nonce, generation })
}

const claim = async (device: DeviceId, of: { epoch: number; nonce: Uint8Array; proof: Uint8Array | null }): Promise<string> =>
  await acknowledge(ctx, device, {
    type: 'acknowledge',
    key: telemetry,
    campaign: null,
    reason: null,
    stage: 'active',
    ...of,
    epoch: Epoch.parse(of.epoch),
  }).then(
    () => 'active',
    (thrown: { code?: string; reason?: string }) => `${thrown.code} ${thrown.reason}`,
  )
const proofOf = (device: DeviceId, secret: Secret, of: { epoch: number; nonce: Uint8Array }): Uint8Array =>
  sealedProof(secret, useTranscript({ tenant: 'plant', device, key: telemetry, ...of }))
const stageOf = async (device: DeviceId, epoch: number) => (await ctx.store.get('holding', `${device}/telemetry/${epoch}`))?.stage

describe('a broadcast', () => {
  test('opens for each member with its own labels, and use is proven by a MAC under the key and nothing else', async () => {
    const [first, second] = [await heard(one), await heard(two)]
    const [message] = first.broadcasts
    const secret = open(first.labels[0], message)
    expect(secret?.equals(open(second.labels[0], second.broadcasts[0]) as Secret)).toBe(true)
    expect(first.labels[0]?.slot).not.toBe(second.labels[0]?.slot)
    if (message === undefined || secret === undefined) throw new Error('it was not opened')
    const { epoch, nonce } = message

    // Too early: no key yet, a guess, the key of something else, somebody else's proof, another nonce.
    expect(await claim(two, { epoch, nonce, proof: null })).toBe('unauthenticated acknowledge.proof')
    expect(await claim(two, { epoch, nonce, proof: randomBytes(32) })).toBe('unauthenticated acknowledge.proof')
    expect(await claim(two, { epoch, nonce, proof: proofOf(two, new Secret(randomBytes(32)), message) })).toBe('unauthenticated acknowledge.proof')
    expect(await claim(two, { epoch, nonce, proof: proofOf(one, secret, message) })).toBe('unauthenticated acknowledge.proof')
    expect(await claim(two, { epoch, nonce: randomBytes(16), proof: proofOf(two, secret, message) })).toBe('conflict acknowledge.nonce')
    expect(await stageOf(two, 1)).toBe('delivered')
    expect(await claim(two, { epoch, nonce, proof: proofOf(two, secret, message) })).toBe('active')
    expect(await stageOf(two, 1)).toBe('active')
  })

  test('counts for nothing to who was evicted: what it recorded does not open, and what it claims was never sent to it', async () => {
    const evicted = await heard(three)
    for (const name of [one, two, three]) {
      const { labels, broadcasts } = name === three ? evicted : await heard(name)
      const [message] = broadcasts
      if (message !== undefined) await claim(name, { ...message, proof: proofOf(name, open(labels[0], message) as Secret, message) })
    }
    await removeMember(ctx, operator(), plant, three)
    for (const campaign of ctx.woken) await drive(ctx, campaign)
    const [message] = (await heard(one)).broadcasts
    if (message === undefined) throw new Error('nothing was broadcast')
    expect(message).toMatchObject({ epoch: 2, activate: false })
    expect(open(evicted.labels[0], message)).toBeUndefined()
    expect(await claim(three, { ...message, proof: proofOf(three, new Secret(randomBytes(32)), message) })).toBe('not-found acknowledge.unknown')
    expect((await heard(three)).broadcasts).toEqual([])
  })

  test('that reached a device nobody knew to be there is acknowledged like any other', async () => {
    const places = new Map(await Promise.all(names.map(async (name) => [name, await heard(name)] as const)))
    for (const [name, { labels, broadcasts }] of places) {
      const [message] = broadcasts
      if (message !== undefined) await claim(name, { ...message, proof: proofOf(name, open(labels[0], message) as Secret, message) })
    }
    // Gone for the server, and yet it hears what is published.
    const session = ctx.sessions.of(two)
    if (session !== undefined) ctx.sessions.close(session.from)
    const { campaign } = await startRotation(ctx, operator(), telemetry, { because: 'test' })
    ctx.bus.assign(two, ['fk/1/g/plant/0'])
    await drive(ctx, campaign)
    expect(await stageOf(one, 2)).toBe('delivered')
    const [message] = (await heard(one)).broadcasts
    if (message === undefined) throw new Error('nothing was broadcast')
    const holding = await ctx.store.get('holding', 'gw-2/telemetry/2')
    const secret = open(places.get(two)?.labels[0], message)
    if (secret === undefined) throw new Error('it was not opened')
    expect(holding === undefined || Buffer.compare(holding.nonce, message.nonce) === 0).toBe(true)
    expect(await claim(two, { ...message, proof: proofOf(two, secret, message) })).toBe('active')
    expect(await stageOf(two, 2)).toBe('active')
  })
})
