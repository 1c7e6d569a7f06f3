import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Share } from '@fleetkey/protocol/share.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { pauseAfter, sealHandlers } from '@fleetkey/server/api/admin/seal.ts'
import type { SplitOrder } from '@fleetkey/server/flows/context.ts'
import { confirmSeal, handInShare, splitSeal, type SplitOutcome } from '@fleetkey/server/flows/seal.ts'
import { grantApproval } from '@fleetkey/server/flows/second-person.ts'
import type { Safe } from '@fleetkey/server/kms/safe.ts'
import { testContext, type TestContext } from './harness.ts'
import { sealedTo, shareReader, splitInto, testSafe, type TestSafe } from './safe.ts'

const operator = (id: string, role: 'owner' | 'operator' = 'owner'): Caller => ({ kind: 'operator', id, roles: [role], from: '192.0.2.0/24' })
const stranger = (from: string): Caller => ({ kind: 'unidentified', id: from, from })

let ctx: TestContext
let place: TestSafe
let safe: Safe
beforeEach(async () => {
  ctx = await testContext()
  place = testSafe()
  safe = await place.open()
})
afterEach(async () => {
  await place.close()
  await ctx.close()
})

/** Takes away what opened it, and starts it again. */
const restarted = async (): Promise<Safe> => {
  await safe.close()
  place.passphrase(false)
  return (safe = await place.open())
}
const newEntries = async (since: number) => (await ctx.entries()).slice(since)
const count = async (): Promise<number> => (await ctx.entries()).length

describe('splitting', () => {
  const order: SplitOrder = { shares: 5, threshold: 3, only: false }
  const reader = shareReader()
  const ask = async (caller: Caller, of: SplitOrder = order): Promise<SplitOutcome> =>
    await splitSeal(ctx, safe, { caller, order: of, reason: 'two people left', recipient: reader.recipient })

  test('takes a second person, for exactly that split, once; the set counts when it is confirmed', async () => {
    const asked = await ask(operator('alice'))
    expect(asked).toEqual({ set: null, shares: [], approval: expect.any(String) })
    expect(await ask(operator('alice'))).toEqual(asked)
    expect((await safe.status()).sets).toEqual([])
    await expect(grantApproval(ctx, operator('alice'), asked.approval ?? '')).rejects.toMatchObject({ reason: 'approval.own' })
    await grantApproval(ctx, operator('bob'), asked.approval ?? '')
    // Neither another split nor another person may use it.
    expect(await ask(operator('alice'), { ...order, threshold: 2 })).toMatchObject({ set: null })
    expect(await ask(operator('alice'), { ...order, only: true })).toMatchObject({ set: null })
    expect(await ask(operator('carol'))).toMatchObject({ set: null })
    const before = await count()
    const { set, shares, approval } = await ask(operator('alice'))
    expect([approval, shares.length]).toEqual([null, 5])
    expect(await newEntries(before)).toMatchObject([
      { action: 'seal.split', caller: 'operator:alice', subject: `set ${set}`, detail: expect.stringContaining('approved by bob'), outcome: 'done' },
    ])
    expect((await safe.status()).sets).toMatchObject([{ set, confirmed: false }])
    expect(await ask(operator('alice'))).toMatchObject({ set: null, approval: expect.any(String) })
    expect(await confirmSeal(ctx, safe, operator('alice'), set ?? '')).toMatchObject({ sets: [{ set, confirmed: true }] })
    expect(await confirmSeal(ctx, safe, operator('alice'), set ?? '')).toMatchObject({ sets: [{ set, confirmed: true }] })
    await restarted()
    for (const share of shares.slice(1, 4)) await safe.unseal(await sealedTo(safe, reader.read(share)), false)
    expect(await safe.status()).toMatchObject({ sealed: false })
  })

  test('is an owner’s; refused to others, a set that is none, a key that is none, and while sealed', async () => {
    await expect(ask(operator('dave', 'operator'))).rejects.toMatchObject({ code: 'forbidden', reason: 'access.seal.split' })
    await expect(confirmSeal(ctx, safe, operator('dave', 'operator'), '0123456789abcdef')).rejects.toMatchObject({ code: 'forbidden' })
    await expect(confirmSeal(ctx, safe, operator('alice'), '0123456789abcdef')).rejects.toMatchObject({ code: 'not-found' })
    const { approval } = await ask(operator('alice'))
    await grantApproval(ctx, operator('bob'), approval ?? '')
    await expect(splitSeal(ctx, safe, { caller: operator('alice'), order, reason: 'x', recipient: new Uint8Array(65) })).rejects.toMatchObject({
      code: 'malformed',
      reason: 'seal.recipient',
    })
    await restarted()
    await expect(ask(operator('alice'))).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.sealed' })
    // What was refused has not used the approval up.
    place.passphrase(true)
    safe = await place.open()
    expect(await ask(operator('alice'))).toMatchObject({ approval: null, shares: { length: 5 } })
  })
})

describe('handing in', () => {
  let parts: readonly Share[]
  const wrong = ({ set, index }: Share): Share => ({ set, index, value: new Secret(new Uint8Array(33).fill(7)) })
  beforeEach(async () => {
    parts = await splitInto(safe, { shares: 3, threshold: 2, only: false })
    await restarted()
  })
  const handIn = async (share: Share | undefined, reset = false) =>
    await handInShare(ctx, safe, { caller: stranger('198.51.100.0/24'), share: await sealedTo(safe, share), reset })

  test('whose shares opened the keys, and from where, stands in the log; one handed in again does not', async () => {
    const [before, set] = [await count(), parts[0]?.set]
    await handIn(parts[2])
    await handIn(parts[2])
    await handIn(parts[0], true)
    await handIn(parts[1])
    const from = { caller: 'unidentified:198.51.100.0/24', action: 'seal.unseal', outcome: 'done' }
    expect(await newEntries(before)).toMatchObject([
      { ...from, subject: `share 3 of set ${set}`, detail: '' },
      { ...from, subject: `share 1 of set ${set}`, detail: 'those before it are forgotten' },
      { ...from, subject: `share 2 of set ${set}`, detail: 'the keys are open' },
    ])
  })

  test('a wrong one has its sender wait, longer each time, restarts included; nobody else', async () => {
    const handlers = () => sealHandlers(ctx, safe)
    let serving = handlers()
    const send = async (share: Share | undefined, from: string) =>
      await serving['seal.unseal']({
        caller: stranger(from),
        params: {},
        query: undefined,
        body: { share: Buffer.from(await sealedTo(safe, share)).toString('base64'), reset: false },
      })
    const bad = wrong(parts[0] as Share)
    const [here, there] = ['198.51.100.0/24', '203.0.113.0/24']
    for (const wait of [1, 2, 4, 8]) {
      await expect(send(bad, here)).rejects.toMatchObject({ code: 'forbidden', reason: 'seal.share.wrong' })
      // Not even the right one is looked at: it cannot be told by trying.
      await expect(send(parts[0], here)).rejects.toMatchObject({ code: 'rate-limited', reason: 'seal.paced', retryAfterSeconds: wait })
      ctx.clock.now += wait * 1000
    }
    expect(await safe.status()).toMatchObject({ wrong: 4, sets: [{ gathered: [] }] })
    expect(ctx.lines.at(-1)).toContain('a wrong share from 198.51.100.0/24, 4 since')
    await restarted()
    serving = handlers()
    await expect(send(bad, here)).rejects.toMatchObject({ reason: 'seal.share.wrong' })
    await expect(send(parts[0], here)).rejects.toMatchObject({ retryAfterSeconds: 16 })
    expect(await send(parts[1], there)).toMatchObject({ sealed: true, wrong: 5, sets: [{ gathered: [2] }] })
    ctx.clock.now += 16_000
    expect(await send(parts[0], here)).toMatchObject({ sealed: false, wrong: 0 })
  })

  test('from many addresses: memory stays bounded, each waits by how many there were', async () => {
    expect([1, 2, 6, 7, 8, 1000].map(pauseAfter)).toEqual([1, 2, 32, 60, 60, 60])
    const serving = sealHandlers(ctx, safe)
    const bad = Buffer.from(await sealedTo(safe, wrong(parts[0] as Share))).toString('base64')
    const send = async (from: string) =>
      await serving['seal.unseal']({ caller: stranger(from), params: {}, query: undefined, body: { share: bad, reset: false } })
    for (let at = 0; at < 260; at++) await expect(send(`10.${at >> 8}.${at & 255}.0/24`)).rejects.toMatchObject({ reason: 'seal.share.wrong' })
    // The first were let go, the last still wait.
    await expect(send('10.1.3.0/24')).rejects.toMatchObject({ reason: 'seal.paced' })
    await expect(send('10.0.0.0/24')).rejects.toMatchObject({ reason: 'seal.share.wrong' })
    expect(await safe.status()).toMatchObject({ wrong: 261 })
  })
})
