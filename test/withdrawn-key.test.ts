import { afterEach, beforeEach, expect, test } from 'vitest'
import { KeyId } from '@fleetkey/protocol/ids.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { removeMember } from '@fleetkey/server/flows/group.ts'
import { answeringFleet, plant, type AnsweringDevice } from './answering.ts'
import { operator, type TestContext } from './harness.ts'

const key = KeyId.parse('telemetry')
const minute = 60_000

let ctx: TestContext
let device: AnsweringDevice
beforeEach(async () => {
  const fleet = await answeringFleet(1)
  ctx = fleet.ctx
  device = fleet.devices[0] as AnsweringDevice
  await createKey(ctx, operator(), { id: key, protection: 'sealed' })
  await grantKey(ctx, operator(), key, plant)
  await device.connect()
  while ((await device.answer()) > 0);
  expect(device.epochs(key)).toEqual([1])
})
afterEach(async () => await ctx.close())

/** Nonces of the withdrawals that it was sent. */
const withdrawals = (): readonly string[] =>
  ctx.bus.take(device.id).flatMap((bytes) => {
    const { body } = readMessage(bytes, { max: 64 << 10 }).envelope
    return body.type === 'retire' && body.below === null ? [Buffer.from(body.nonce).toString('hex')] : []
  })

test('a withdrawal is sent again as it is, and as another one to who still reports the key a minute later: a delivery that came late has undone the first', async () => {
  await removeMember(ctx, operator(), plant, device.id)
  const [first] = withdrawals()
  expect(first).toBeDefined()
  // It may not have heard it.
  ctx.clock.now += minute
  await device.report()
  expect(withdrawals()).toEqual([first])
  // It has, and takes every repetition for what it has done before.
  ctx.clock.now += 1
  await device.report()
  const [second, ...more] = withdrawals()
  expect([second === undefined, second === first, more]).toEqual([false, false, []])
  await device.report()
  expect(withdrawals()).toEqual([second])
  // Carried out and said: nothing waits any more.
  await device.report()
  while ((await device.answer()) > 0);
  expect(device.epochs(key)).toEqual([])
  ctx.clock.now += 10 * minute
  await device.report()
  expect(withdrawals()).toEqual([])
})
