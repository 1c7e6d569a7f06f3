import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId, Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { EnrolmentToken } from '@fleetkey/server/fleet/enrolment-token.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import type { Context } from '@fleetkey/server/flows/context.ts'
import { verifierOf, wrappedToken } from '@fleetkey/server/flows/enrolment-token.ts'
import { keksOf, retireKek, rotateKek, settleKek } from '@fleetkey/server/flows/kek.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { rewrapAll } from '@fleetkey/server/flows/rewrap.ts'
import { openVault } from '@fleetkey/server/flows/vault.ts'
import { operator, testContext, type TestContext } from './harness.ts'

const alice = operator()
const [key, epoch] = [KeyId.parse('telemetry'), Epoch.parse(1)]
const material = (): Secret => new Secret(Buffer.alloc(32, 7))
let ctx: TestContext
/** The step at which the process ends. */
let ends: string | undefined
let sealed: Uint8Array

/** Three tokens, and key material under the data key: what has to open after everything. */
const wrapSome = async (): Promise<void> => {
  sealed = ctx.vault.seal(key, epoch, material())
  for (const number of [1, 2, 3]) {
    const row: EnrolmentToken = {
      id: `${number}`.repeat(32),
      version: 0,
      batch: 'b1',
      device: DeviceId.parse('gw-1'),
      verifier: new Uint8Array(),
      createdAt: ctx.now(),
      createdBy: 'operator:alice',
      expiresAt: ctx.now() + 1_000,
      revokedAt: null,
      spent: null,
    }
    const plaintext = new Secret(Buffer.from(`verifier ${number}`))
    const [verifier = new Uint8Array()] = await ctx.kms.wrap([{ key: ctx.authority.kek, plaintext, context: wrappedToken.contextOf(ctx.tenant, row) }])
    await perform(ctx, { caller: alice, action: 'enrolment-token.create', subject: row.id }, (tx) => tx.insert('enrolmentToken', { ...row, verifier }))
  }
}

/** What a start does on what is durable. */
const startAgain = async (): Promise<Context> => {
  const authority = await openAuthority(ctx)
  const again: Context = { ...ctx, authority, vault: await openVault(ctx, authority.kek) }
  await settleKek(again, rewrapAll)
  return again
}

const everythingOpens = async (now: Context): Promise<void> => {
  for (const row of await now.store.find('enrolmentToken', { limit: 10 }))
    expect(Buffer.from((await verifierOf(now, row)).bytes()).toString()).toBe(`verifier ${row.id[0]}`)
  const opened = now.vault.open({ id: `${key}/${epoch}`, material: sealed } as Parameters<Context['vault']['open']>[0])
  expect(opened.equals(material())).toBe(true)
}

const keks = async (): Promise<readonly string[]> => (await ctx.kms.list()).filter(({ purpose }) => purpose === 'kek').map(({ name }) => name)

beforeEach(async () => {
  ends = undefined
  ctx = await testContext({
    onStep: (name) => {
      if (name === ends) throw new Error(`the process ends at ${name}`)
    },
  })
  await wrapSome()
})
afterEach(async () => await ctx.close())

describe('the KEK', () => {
  test('is rotated: everything opens under the next one, the one before is there until it is retired, then it is gone', async () => {
    expect(await rotateKek(ctx, alice, rewrapAll)).toEqual({ kek: 'kek-2', former: ['kek'], rewrapped: 4, already: false })
    expect(ctx.authority.keks).toEqual(['kek-2', 'kek'])
    expect(await keks()).toEqual(['kek', 'kek-2'])
    await everythingOpens(ctx)
    expect(await retireKek(ctx, alice, rewrapAll)).toEqual({ kek: 'kek-2', former: [], rewrapped: 0, already: false })
    expect(await retireKek(ctx, alice, rewrapAll)).toMatchObject({ already: true })
    expect(await keks()).toEqual(['kek-2'])
    expect((await ctx.store.get('dataKey', 'dek-1'))?.kek).toBe('kek-2')
    const again = await startAgain()
    await everythingOpens(again)
    expect(await keks()).toEqual(['kek-2'])
    expect(await rotateKek(again, alice, rewrapAll)).toMatchObject({ kek: 'kek-3', former: ['kek-2'] })
  })

  test('what was under way when it changed is opened, and wrapped anew before the one before is destroyed', async () => {
    const old = ctx.authority.kek
    await rotateKek(ctx, alice, rewrapAll)
    const id = '9'.repeat(32)
    const [row] = await ctx.store.find('enrolmentToken', { limit: 1 })
    if (row === undefined) throw new Error('no token')
    const late = { ...row, id }
    const [verifier = new Uint8Array()] = await ctx.kms.wrap([
      { key: old, plaintext: new Secret(Buffer.from('verifier 9')), context: wrappedToken.contextOf(ctx.tenant, late) },
    ])
    await perform(ctx, { caller: alice, action: 'enrolment-token.create', subject: id }, (tx) => tx.insert('enrolmentToken', { ...late, verifier }))
    await everythingOpens(ctx)
    expect(await retireKek(ctx, alice, rewrapAll)).toMatchObject({ rewrapped: 1 })
    await everythingOpens(ctx)
  })

  test('commands out of order are refused; only the owner rotates', async () => {
    await rotateKek(ctx, alice, rewrapAll)
    await expect(rotateKek(ctx, alice, rewrapAll)).rejects.toMatchObject({ code: 'conflict', reason: 'kek.order' })
    for (const act of [rotateKek, retireKek]) await expect(act(ctx, operator('operator'), rewrapAll)).rejects.toMatchObject({ code: 'forbidden' })
    expect(await keksOf(ctx)).toMatchObject({ current: 'kek-2', former: ['kek'] })
  })

  test('one that the KMS has lost is not made anew', async () => {
    await rotateKek(ctx, alice, rewrapAll)
    await ctx.kms.destroy('kek-2')
    await expect(startAgain()).rejects.toMatchObject({ code: 'internal', reason: 'kms.no-key' })
  })

  const rotating = ['kek.intended', 'kek.made', 'kek.switched', 'kek.rewrapped', 'kek.wrapped']
  const retiring = ['kek.retiring', 'kek.destroyed', 'kek.retired']

  test.each([...rotating, ...retiring])('the process ends at %s: the next start goes on, and nothing is lost', async (at) => {
    if (retiring.includes(at)) await rotateKek(ctx, alice, rewrapAll)
    ends = at
    await expect(retiring.includes(at) ? retireKek(ctx, alice, rewrapAll) : rotateKek(ctx, alice, rewrapAll)).rejects.toThrow()
    ends = undefined
    const again = await startAgain()
    expect(await keksOf(again)).toMatchObject({
      current: 'kek-2',
      next: null,
      former: retiring.includes(at) ? [] : ['kek'],
      ending: [],
      wrappedAt: expect.any(Number),
    })
    await everythingOpens(again)
    await retireKek(again, alice, rewrapAll)
    expect(await keks()).toEqual(['kek-2'])
    await everythingOpens(again)
  })

  test('every durable step is one of these', async () => {
    const before = ctx.steps.length
    await rotateKek(ctx, alice, rewrapAll)
    await retireKek(ctx, alice, rewrapAll)
    expect([...new Set(ctx.steps.slice(before))]).toEqual([...rotating, ...retiring])
  })
})
