import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { createClient } from '@fleetkey/cli/client.ts'
import { newTlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { stateOf, type Certificate } from '@fleetkey/server/ca/certificate.ts'
import { leastRetention } from '@fleetkey/server/ca/retention.ts'
import type { Context, Store } from '@fleetkey/server/flows/context.ts'
import { caNamed, revokeCa } from '@fleetkey/server/flows/revoke-ca.ts'
import { distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { grantApproval } from '@fleetkey/server/flows/second-person.ts'
import { removeSuperseded } from '@fleetkey/server/flows/superseded.ts'
import { suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { caBlastRadius } from '@fleetkey/server/flows/under-ca.ts'
import { fleetChecks } from '@fleetkey/server/flows/doctor/fleet.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { supervise, type Supervised } from './faults/supervised.ts'
import { rows } from './invariants/evidence.ts'
import { certificatesWereIntended, identitiesAreUnique } from './invariants/invariants.ts'
import { healthy } from './healthy.ts'
import { freePort } from './ports.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { given, openDevices, type Device, type Held } from './returning.ts'
import { until } from './world.ts'

const day = 86_400_000

let ctx: TestContext
let device: Device
let inUse: Held

/** So many more certificates, each taking the place of the one before, one a day. */
const renewed = async (times: number): Promise<void> => {
  for (let time = 0; time < times; time++) {
    ctx.clock.now += day
    const key = newTlsKey()
    const answer = await device.renew(await device.open(), { key })
    if (answer.type !== 'identity') throw new Error(`refused: ${answer.code}`)
    inUse = { key, certificate: answer.tls }
    expect(await device.connect(inUse)).toBe('accepted')
  }
}

const tls = async (): Promise<readonly Certificate[]> => (await rows(ctx.store, 'certificate')).filter(({ profile }) => profile === 'device-tls')
const removals = async (): Promise<readonly string[]> =>
  (await ctx.entries()).filter(({ action }) => action === 'certificate.remove').map(({ detail }) => detail)

/** What is counted is what there is. */
const countsAreRight = async (store: Store): Promise<void> => {
  const counted = (await store.tally('certificate', 'calendar', { from: '', to: '~' })).reduce((sum, one) => sum + one.rows, 0)
  expect(counted).toBe((await rows(store, 'certificate')).length)
}

const found = async (retention: number | null = leastRetention) => {
  const check = fleetChecks.find(({ name }) => name === 'superseded certificates')
  return await check?.examine(ctx, { ...healthy, retention })
}

beforeEach(async () => {
  ctx = await testContext()
})
afterEach(async () => await ctx.close())

describe('superseded TLS certificates', () => {
  beforeEach(async () => {
    ;[device] = (await openDevices(ctx)) as [Device]
    inUse = given(await device.prove('enrol'))
    expect(await device.connect(inUse)).toBe('accepted')
  })

  test('go when their time after their end is over, with their intents, and nothing else does; what is counted and searched follows', async () => {
    const serial = (await device.row()).ldevidSerial
    await renewed(12)
    const before = await tls()
    expect(before).toHaveLength(13)
    expect(await removeSuperseded(ctx, leastRetention)).toBe(3)
    const left = await tls()
    const gone = before.filter(({ id }) => !left.some((one) => one.id === id))
    expect(gone.every(({ notAfter }) => notAfter + leastRetention < ctx.clock.now)).toBe(true)
    expect(left.every(({ notAfter, replacedAt }) => replacedAt === undefined || notAfter + leastRetention >= ctx.clock.now)).toBe(true)
    for (const { id } of gone) expect(await ctx.store.get('intent', id)).toBeUndefined()
    expect(await ctx.store.get('certificate', serial)).toBeDefined()
    expect(await removals()).toEqual(['3 superseded device-tls, ended 2027-01-03T00:00:00 to 2027-01-05T00:00:00'])
    await countsAreRight(ctx.store)
    await certificatesWereIntended({ store: ctx.store } as never)
    await identitiesAreUnique({ store: ctx.store } as never)
    // Nothing more to do, and it says nothing more.
    expect(await removeSuperseded(ctx, leastRetention)).toBe(0)
    expect(await removals()).toHaveLength(1)
  })

  test('the device notices nothing, one that was away included; who comes with a certificate that is gone is nobody', async () => {
    const first = inUse
    await renewed(2)
    // Its certificate in use ends, and a year passes: nothing has taken its place.
    ctx.clock.now += 365 * day
    expect(await removeSuperseded(ctx, leastRetention)).toBe(2)
    const [last] = await tls()
    expect(stateOf(last as Certificate, ctx.clock.now)).toBe('expired')
    expect(await device.connect(inUse)).toBe('expired')
    expect(await device.connect(first)).toBe('unauthenticated')
    const again = given(await device.prove('enrol'))
    expect(await device.connect(again)).toBe('accepted')
    expect(await removeSuperseded(ctx, leastRetention)).toBe(1)
    expect(await device.connect(again)).toBe('accepted')
    await renewed(1)
  })

  test('what was revoked or is on hold stays, with the key that is refused for it', async () => {
    await renewed(3)
    await suspendDevice(ctx, operator(), device.id, 'lent')
    const held = (await tls()).filter(({ status }) => status === 'held').map(({ id }) => id)
    expect(held.length).toBeGreaterThan(0)
    ctx.clock.now += 400 * day
    await removeSuperseded(ctx, leastRetention)
    expect((await tls()).map(({ id }) => id)).toEqual(expect.arrayContaining(held))
  })

  test('what was in force when its CA was revoked stays: its blast radius is the same for good', async () => {
    await prepareCa(ctx, operator(), { root: false })
    await distributeCa(ctx, operator())
    await renewed(4)
    const order = { why: 'stolen', force: true }
    const { approval } = await revokeCa(ctx, operator(), 'issuing', order)
    await grantApproval(ctx, { kind: 'operator', id: 'bob', roles: ['owner'], from: 'test' }, approval ?? '')
    await revokeCa(ctx, operator(), 'issuing', order)
    const before = await caBlastRadius(ctx, await caNamed(ctx, '1'), { limit: 100 })
    const back = given(await device.prove('enrol'))
    expect(await device.connect(back)).toBe('accepted')
    const wereInForce = (await tls()).filter(({ issuer, notAfter }) => issuer === 'issuing-ca' && notAfter > (before.until ?? 0)).map(({ id }) => id)
    expect(wereInForce.length).toBeGreaterThan(1)
    ctx.clock.now += 60 * day
    expect(await removeSuperseded(ctx, leastRetention)).toBeGreaterThan(0)
    expect((await tls()).map(({ id }) => id)).toEqual(expect.arrayContaining(wereInForce))
    const after = await caBlastRadius(ctx, await caNamed(ctx, '1'), { limit: 100 })
    expect(after).toEqual({ ...before, connected: after.connected, state: after.state, until: after.until })
    expect(after.devices).toBe(1)
  })

  test('for good, when the policy says so', async () => {
    await renewed(3)
    ctx.clock.now += 1000 * day
    expect(await removeSuperseded(ctx, null)).toBe(0)
    expect(await tls()).toHaveLength(4)
    expect(await found(null)).toMatchObject({ grade: 'ok', found: expect.stringContaining('kept for good') as string })
  })

  test('the doctor says how many there are, and when they are not removed', async () => {
    await renewed(3)
    expect(await found()).toEqual({ grade: 'ok', found: '3 TLS certificates of devices, removed 7 days after their end' })
    ctx.clock.now += 30 * day
    expect(await found()).toMatchObject({ grade: 'warning', found: expect.stringContaining('ended on 2027-01-03 is still there') as string })
    await removeSuperseded(ctx, leastRetention)
    expect(await found()).toEqual({ grade: 'ok', found: '0 TLS certificates of devices, removed 7 days after their end' })
  })
})

/** So many superseded certificates that ended a year ago, of one device that has another one. */
const fill = async (store: Store, now: number, count: number): Promise<void> => {
  for (let from = 0; from < count; from += 500)
    await store.commit({
      writes: Array.from({ length: Math.min(500, count - from) }, (_, at) => {
        const id = (0x4000_0000 + from + at).toString(16)
        const certificate = {
          id,
          version: 0,
          profile: 'device-tls',
          device: 'gw-9' as never,
          issuer: 'issuing-ca',
          der: new Uint8Array(600),
          spkiHash: `s${id}`,
          notBefore: now - 367 * day,
          notAfter: now - 365 * day + Math.floor(at / 3) * 1000,
          status: 'valid',
          revokedAt: null,
          reason: null,
          replacedAt: now - 366 * day,
        } as const
        const { profile, notBefore, notAfter } = certificate
        const intent = {
          id,
          version: 0,
          profile,
          subject: 'gw-9',
          spki: new Uint8Array(91),
          notBefore,
          notAfter,
          state: 'issued',
          createdAt: notBefore,
        } as const
        return [{ table: 'certificate', do: 'insert', row: certificate } as const, { table: 'intent', do: 'insert', row: intent } as const]
      }).flat(),
      entries: [{ at: now, caller: 'test', from: 'test', action: 'fill', subject: 'store', outcome: 'done', code: null, detail: '' }],
    })
}

describe('a great many of them', () => {
  test('go in pages of bounded commits; one that is refused, and a crash after any, leave whole pages, and the next round takes the rest', async () => {
    const count = 950
    await fill(ctx.store, ctx.clock.now, count)
    const sizes: number[] = []
    let fails = 3
    const store: Store = {
      ...ctx.store,
      async commit(changes, options) {
        sizes.push(changes.writes.length)
        if (--fails === 0) throw new Problem('unavailable', 'the disk is full')
        return await ctx.store.commit(changes, options)
      },
    }
    await expect(removeSuperseded({ ...ctx, store } as Context, leastRetention)).rejects.toThrow('the disk is full')
    expect(await ctx.store.count('certificate', { device: 'gw-9' })).toBe(count - 200)
    let left = 2
    const crashing = {
      ...ctx,
      step: (name: string) => {
        if (name === 'certificates.removed' && --left === 0) throw new Error('killed')
      },
    }
    await expect(removeSuperseded(crashing, leastRetention)).rejects.toThrow('killed')
    expect(await ctx.store.count('certificate', { device: 'gw-9' })).toBe(count - 400)
    await countsAreRight(ctx.store)
    await certificatesWereIntended({ store: ctx.store } as never)
    expect(await removeSuperseded(ctx, leastRetention)).toBe(count - 400)
    expect(Math.max(...sizes)).toBeLessThanOrEqual(200)
    expect((await removals()).map((said) => Number(said.split(' ')[0])).reduce((sum, one) => sum + one, 0)).toBe(count)
  })

  test('SQLite removes them as the store in memory does, and another replica that is faster is no harm', { timeout: 60_000 }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'fk-superseded-'))
    const store = await openSqliteStore(join(folder, 'store'))
    try {
      const count = Number(process.env['FLEETKEY_SUPERSEDED'] ?? 600)
      await fill(store, ctx.clock.now, count)
      const other = { ...ctx, store } as Context
      const begun = performance.now()
      let removed = 0
      for (let round = await removeSuperseded(other, leastRetention); round > 0; round = await removeSuperseded(other, leastRetention)) removed += round
      const took = performance.now() - begun
      expect(removed).toBe(count)
      if (count >= 10_000) process.stdout.write(`${count} removed in ${(took / 1000).toFixed(1)} s\n`)
      await countsAreRight(store)
      await fill(store, ctx.clock.now, 300)
      const both = await Promise.all([removeSuperseded(other, leastRetention), removeSuperseded(other, leastRetention)])
      expect(both.reduce((sum, one) => sum + one, 0)).toBeGreaterThanOrEqual(300)
      expect((await rows(store, 'certificate')).length).toBe(0)
      expect((await rows(store, 'intent')).length).toBe(0)
    } finally {
      await store.close()
      rmSync(folder, { recursive: true, force: true })
    }
  })

  test('a server removes them by its configuration; killed after a page it goes on when it starts again', { timeout: 240_000 }, async () => {
    const folder = mkdtempSync(join(tmpdir(), 'fk-superseded-'))
    const data = join(folder, 'server')
    const config = join(folder, 'config.json')
    writeFileSync(config, JSON.stringify({ retention: { superseded: '8d' } }))
    const ports = [await freePort(), await freePort()].map(String)
    const started = async (fault: NodeJS.ProcessEnv): Promise<Supervised> =>
      await supervise({
        script: './server-process.ts',
        args: ['--data', data, '--mqtt-port', ports[0] ?? '', '--https-port', ports[1] ?? '', '--config', config, '--json'],
        fault,
        isReady: (line) => line.startsWith('{"ready":true'),
        onLine: () => undefined,
      })
    const stored = async <R>(work: (store: Store) => Promise<R>): Promise<R> => {
      const store = await openSqliteStore(join(data, 'store'))
      try {
        return await work(store)
      } finally {
        await store.close()
      }
    }
    let server: Supervised | undefined
    try {
      server = await started({})
      await server.stop()
      await stored(async (store) => await fill(store, Date.now(), 250))
      server = await started({ FLEETKEY_KILL_AT: 'certificates.removed#2' })
      const found = async (): Promise<string | undefined> => {
        const client = createClient(JSON.parse(readFileSync(join(data, 'cli.json'), 'utf8')) as { server: string; token: string; ca: string })
        const { findings } = await client.call('doctor').catch(() => ({ findings: [] }))
        client.close()
        return findings.find(({ check }) => check === 'superseded certificates')?.found
      }
      await until('none is left', async () => (await found()) === '0 TLS certificates of devices, removed 8 days after their end', 120_000)
      expect(server.kills).toBe(1)
      await server.stop()
      await stored(async (store) => {
        await countsAreRight(store)
        expect(await store.count('certificate', { device: 'gw-9' })).toBe(0)
        const entries = (await store.audit({ after: 0, limit: 1000 })).filter(({ action }) => action === 'certificate.remove')
        expect(entries.map(({ detail }) => detail.split(',')[0])).toEqual([100, 100, 50].map((count) => `${count} superseded device-tls`))
      })
    } finally {
      await server?.stop()
      rmSync(folder, { recursive: true, force: true })
    }
  })
})
