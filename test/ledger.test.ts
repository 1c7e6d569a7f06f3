import fc from 'fast-check'
import { expect, test } from 'vitest'
import { DeviceId, Epoch, GroupId, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { readMessage } from '@fleetkey/protocol/signed.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import { sealedProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { openSealed } from '@fleetkey/protocol/wrap.ts'
import { acknowledge } from '@fleetkey/server/flows/acknowledge.ts'
import { blastRadius } from '@fleetkey/server/flows/blast-radius.ts'
import { converge } from '@fleetkey/server/flows/converge.ts'
import { createKey, grantKey } from '@fleetkey/server/flows/create-key.ts'
import { exposedKeys } from '@fleetkey/server/flows/exposed-keys.ts'
import { addMembers, createGroup, removeMember } from '@fleetkey/server/flows/group.ts'
import { heldAt } from '@fleetkey/server/flows/held.ts'
import { setTopics } from '@fleetkey/server/flows/key-topics.ts'
import { keyReaders, topicReaders, type Page } from '@fleetkey/server/flows/readers.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { drive } from '@fleetkey/server/flows/drive.ts'
import { destroyEpochs } from '@fleetkey/server/flows/old-epochs.ts'
import { startRotation } from '@fleetkey/server/flows/rotate.ts'
import { settleLedger } from '@fleetkey/server/flows/settle-ledger.ts'
import { unprovenDevices } from '@fleetkey/server/flows/unproven.ts'
import { suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import type { Holding } from '@fleetkey/server/keys/key.ts'
import { filterTakes } from '@fleetkey/server/keys/span.ts'
import { anEntry } from './conformance/store.ts'
import { enrolledDevice, p256, type Recipient } from './enrolled-device.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { attesterOf, given, openDevices } from './returning.ts'

const max = 64 << 10
const day = 86_400_000

/** Names of which one is the beginning of another: the order of ids is not that of names. */
const names = ['gw', 'gw-1', 'gw-10', 'gw-2', 'gw0'].map((name) => DeviceId.parse(name))
const batchOf = (device: string): string => (device < 'gw-2' ? 'b1' : 'b2')
const groups = ['east', 'west'].map((name) => GroupId.parse(name))
const keys = ['alarm', 'telemetry'].map((name) => KeyId.parse(name))
const topics = ['plant/east/t', 'plant/west/t', 'plant/+/t', 'plant/#'] as const

/** A fleet without sockets: devices that open what they are sent, and answer as the agent does when they are let. */
const openFleet = async () => {
  const ctx = await testContext()
  const recipients = new Map(names.map((name) => [name as string, p256()]))
  const writes = names.map(
    (name) =>
      ({
        table: 'device',
        do: 'insert',
        row: enrolledDevice(name, { spki: (recipients.get(name) as Recipient).spki, at: ctx.clock.now, batch: batchOf(name), ldevidSpki: p256().spki }),
      }) as const,
  )
  await ctx.store.commit({ writes, entries: [anEntry()] })
  for (const group of groups) await createGroup(ctx, operator(), group)
  const held = new Map<string, Map<string, { secret: Secret; nonce: Uint8Array; stage: 'installed' | 'active' }>>(names.map((name) => [name, new Map()]))
  const online = new Map<string, ReturnType<TestContext['bus']['connect']>>()
  const campaigns = new Set<string>()

  const say = async (device: DeviceId, body: Omit<BodyOf<'acknowledge'>, 'type' | 'campaign' | 'reason'>): Promise<void> => {
    await acknowledge(ctx, device, { type: 'acknowledge', campaign: null, reason: null, ...body }).catch(() => undefined)
  }
  const use = async (device: DeviceId, key: KeyId, epoch: Epoch): Promise<void> => {
    const own = held.get(device)?.get(`${key}/${epoch}`)
    if (own === undefined) return
    own.stage = 'active'
    await say(device, {
      key,
      epoch,
      stage: 'active',
      nonce: own.nonce,
      proof: sealedProof(own.secret, useTranscript({ tenant: ctx.tenant, device, key, epoch, nonce: own.nonce })),
    })
  }
  const hear = async (device: DeviceId, bytes: Uint8Array): Promise<void> => {
    const { body } = readMessage(bytes, { max }).envelope
    const mine = held.get(device) as Map<string, { secret: Secret; nonce: Uint8Array; stage: 'installed' | 'active' }>
    if (body.type === 'delivery') {
      const { key, epoch, nonce, wrapped } = body
      const secret = await openSealed(
        wrapped.sealed,
        { tenant: ctx.tenant, device, key, epoch, protection: 'sealed', purpose: 'key' },
        recipients.get(device) as Recipient,
      )
      mine.set(`${key}/${epoch}`, { secret, nonce, stage: 'installed' })
      if (body.activate) await use(device, key, epoch)
      else await say(device, { key, epoch, stage: 'installed', nonce, proof: null })
    } else if (body.type === 'activate') await use(device, body.key, body.epoch)
    else if (body.type === 'retire') {
      for (const name of mine.keys()) if (name.startsWith(`${body.key}/`) && (body.below === null || Number(name.split('/')[1]) < body.below)) mine.delete(name)
      await say(device, { key: body.key, epoch: Epoch.parse(1), stage: 'retired', nonce: body.nonce, proof: null })
    }
  }
  return {
    ctx,
    campaigns,
    connect: async (device: DeviceId): Promise<void> => {
      if (online.has(device)) return
      online.set(device, ctx.bus.connect({ client: device, device }))
    },
    disconnect: (device: DeviceId): void => {
      const ref = online.get(device)
      if (ref !== undefined) ctx.bus.disconnect(ref)
      online.delete(device)
      ctx.bus.take(device)
    },
    report: async (device: DeviceId): Promise<void> => {
      if (!online.has(device)) return
      const epochs = (key: KeyId) =>
        [...(held.get(device) ?? [])].flatMap(([name, { stage }]) =>
          name.startsWith(`${key}/`) ? [{ epoch: Epoch.parse(Number(name.split('/')[1])), stage }] : [],
        )
      const holdings = keys.map((key) => ({ key, epochs: epochs(key) })).filter((one) => one.epochs.length > 0)
      const report = {
        type: 'report',
        session: new Uint8Array(16),
        sequence: 1,
        holdings,
        usage: [] as BodyOf<'report'>['usage'],
        places: [] as BodyOf<'report'>['places'],
        resetCount: 0,
        tlsNotAfter: 1,
        trust: null,
        agent: 'test',
      } as const
      await converge(ctx, device, report)
    },
    /** Everybody answers what waits for them, and campaigns go on, until nothing happens any more. */
    settle: async (lost: (device: string) => boolean): Promise<void> => {
      for (let rounds = 0; rounds < 20; rounds++) {
        const waiting = [...online.keys()].flatMap((device) => ctx.bus.take(device).map((bytes) => ({ device: DeviceId.parse(device), bytes })))
        for (const { device, bytes } of waiting) if (!lost(device)) await hear(device, bytes)
        for (const id of ctx.woken.splice(0)) campaigns.add(id)
        for (const id of campaigns) await drive(ctx, id)
        if (waiting.length === 0) return
      }
    },
  }
}
type Fleet = Awaited<ReturnType<typeof openFleet>>

interface Tenure {
  from: number
  until: number | null
  installed: number | null
  active: number | null
}
interface Interval {
  of: string
  by: string
  from: number
  until: number | null
}

/** Copies that were lost with their device: held for good, and no proof any more. */
const lostWith = new Set<Tenure>()

/** The whole truth, derived from nothing but the entries of the audit log. */
const retold = async (ctx: TestContext) => {
  const tenures = new Map<string, Tenure[]>()
  const spans: Interval[] = []
  const epochs = new Map<string, { activated: number | null; deactivated: number | null; destroyed: number | null }>()
  const campaigns = new Map<string, { key: string; to: number }>()
  const current = new Map<string, number>()
  const close = (of: string, by: string, at: number): void => {
    for (const span of spans) if (span.of === of && span.by === by && span.until === null) span.until = at
  }
  for (const { at, action, subject, outcome, detail } of await ctx.entries()) {
    if (outcome !== 'done') continue
    if (action === 'key.create') {
      epochs.set(`${subject}/1`, { activated: at, deactivated: null, destroyed: null })
      current.set(subject, 1)
    } else if (action === 'key.destroy') (epochs.get(subject) ?? { destroyed: null }).destroyed = at
    else if (action === 'key.grant') spans.push({ of: `key/${subject}`, by: `group/${detail.replace('to group ', '')}`, from: at, until: null })
    else if (action === 'key.topics') {
      const wanted = detail === '' ? [] : detail.split(' ')
      for (const span of spans) if (span.by === `key/${subject}` && !wanted.includes(span.of) && span.until === null) span.until = at
      for (const topic of wanted)
        if (!spans.some((span) => span.of === topic && span.by === `key/${subject}` && span.until === null))
          spans.push({ of: topic, by: `key/${subject}`, from: at, until: null })
    } else if (action === 'group.change') {
      const [, added] = /^\d+ added: (.*)$/.exec(detail) ?? []
      const [, removed] = /^(\S+) removed$/.exec(detail) ?? []
      for (const device of added === undefined || added === '' ? [] : added.split(', '))
        spans.push({ of: `group/${subject}`, by: `device/${device}`, from: at, until: null })
      if (removed !== undefined) close(`group/${subject}`, `device/${removed}`, at)
    } else if (action === 'device.revoke') {
      if (!detail.includes('revoked before')) for (const group of groups) close(`group/${group}`, `device/${subject}`, at)
      for (const [name, list] of tenures) {
        const last = list.at(-1)
        // What it proved counts no more; that it held it does.
        if (name.startsWith(`${subject} `) && last !== undefined && last.until === null) lostWith.add(last)
      }
    } else if (action === 'key.rotate') {
      const [, campaign, to] = /campaign (\S+): epoch (\d+)/.exec(detail) ?? []
      campaigns.set(campaign ?? '', { key: subject, to: Number(to) })
      epochs.set(`${subject}/${to}`, { activated: null, deactivated: null, destroyed: null })
    } else if (action === 'campaign.step') {
      const campaign = campaigns.get(subject)
      if (campaign === undefined || !/^epoch \d+ active$/.test(detail)) continue
      const before = epochs.get(`${campaign.key}/${current.get(campaign.key)}`)
      if (before?.deactivated === null) before.deactivated = at
      const next = epochs.get(`${campaign.key}/${campaign.to}`)
      if (next !== undefined) next.activated = at
      current.set(campaign.key, campaign.to)
    } else if (action === 'device.acknowledge') {
      const [, name = '', stage] = /^(\S+) (installed|active|retired)/.exec(detail) ?? []
      if (stage === 'retired') {
        const [, erased = ''] = /erased ([\d, ]+)/.exec(detail) ?? []
        for (const epoch of erased.split(', ')) {
          const last = tenures.get(`${subject} ${name.split('/')[0]}/${epoch}`)?.at(-1)
          if (last?.until === null) last.until = at
        }
      } else if (!/ again/.test(detail)) {
        const last = tenures.get(`${subject} ${name}`)?.at(-1)
        if (stage === 'installed' && last !== undefined) last.installed ??= at
        if (stage === 'active' && last !== undefined) last.active ??= at
      }
    }
    for (const [, name = ''] of detail.matchAll(/deliver (\S+\/\d+) as/g)) {
      const list = tenures.get(`${subject} ${name}`) ?? []
      tenures.set(`${subject} ${name}`, list)
      if (list.at(-1)?.until !== null) list.push({ from: at, until: null, installed: null, active: null })
    }
  }
  return { tenures, spans, epochs, current }
}
type Truth = Awaited<ReturnType<typeof retold>>

const end = (until: number | null): number => until ?? Infinity
const covers = (span: { from: number; until: number | null }, at: number): boolean => span.from <= at && at < end(span.until)

const readersBy = (truth: Truth, windows: readonly { key: string; from: number; until: number }[]): string[] =>
  [...truth.tenures]
    .flatMap(([name, list]) => {
      const [device = '', id = ''] = name.split(' ')
      const epoch = truth.epochs.get(id)
      if (epoch === undefined || epoch.activated === null) return []
      const usedUntil = end(epoch.deactivated ?? epoch.destroyed)
      const spans = windows
        .filter(({ key }) => id.startsWith(`${key}/`))
        .map((one) => ({ from: Math.max(one.from, epoch.activated as number), until: Math.min(one.until, usedUntil) }))
        .filter(({ from, until }) => from < until)
      const then = list.find((tenure) => spans.some((span) => tenure.from < span.until && span.from < end(tenure.until)))
      const later = list.find((tenure) => spans.some((span) => tenure.from >= span.until))
      const found = then ?? later
      return found === undefined ? [] : [`${device} ${id} ${then === undefined ? 'later' : 'then'} ${found.from}-${found.until ?? ''}`]
    })
    .toSorted()

const all = async <T>(fetch: (page: Page) => Promise<{ items: readonly T[]; next: string | null }>): Promise<T[]> => {
  const items: T[] = []
  let after: string | undefined
  do {
    const found = await fetch({ limit: 2, ...(after === undefined ? {} : { after }) })
    expect(found.items.length).toBeLessThanOrEqual(2)
    items.push(...found.items)
    expect(found.next).not.toBe(after ?? '')
    after = found.next ?? undefined
  } while (after !== undefined)
  return items
}

/** How much of what the answers distinguish has come up: a run in which nothing was held proves nothing. */
const met = { proven: 0, again: 0, erased: 0, readThen: 0, readLater: 0, unproven: 0, heldBefore: 0, topics: 0 }

const expectTruth = async ({ ctx }: Fleet, share: () => number): Promise<void> => {
  const truth = await retold(ctx)
  for (const list of truth.tenures.values()) {
    met.proven += list.filter(({ active }) => active !== null).length
    met.again += list.length - 1
    met.erased += list.filter(({ until }) => until !== null).length
  }
  const { now } = ctx.clock
  // When something happened, and just before and after.
  const moments = (await ctx.entries()).map(({ at }) => at)
  const moment = (): number => (moments[Math.floor(share() * moments.length)] ?? now) + Math.floor(share() * 3) - 1
  const window = (): { from: number; until: number } => {
    const [one, other] = [moment(), moment()]
    return { from: Math.min(one, other), until: Math.max(one, other) + 1 }
  }
  const shown = (items: Awaited<ReturnType<typeof keyReaders>>['items']): string[] =>
    items.map((one) => `${one.device} ${one.key}/${one.epoch} ${one.when} ${one.heldFrom}-${one.heldUntil ?? ''}`).toSorted()
  const member = (at: number) => truth.spans.filter((span) => span.of.startsWith('group/') && covers(span, at))
  const grants = (at: number) => truth.spans.filter((span) => span.by.startsWith('group/') && covers(span, at))
  for (const key of keys) {
    for (let windows = 0; windows < 5; windows++) {
      const between = window()
      const want = readersBy(truth, [{ key, ...between }])
      expect(shown(await all(async (page) => await keyReaders(ctx, key, between, page))), `readers of ${key}`).toEqual(want)
      for (const one of want) met[one.includes(' then ') ? 'readThen' : 'readLater']++
    }
    const latest = (await ctx.store.get('key', key))?.latest ?? 0
    for (let epoch = 1; epoch <= latest; epoch++) {
      const proven = (device: string): boolean =>
        [...truth.tenures].some(([name, list]) => {
          const last = list.at(-1)
          return (
            name.startsWith(`${device} ${key}/`) &&
            Number(name.split('/').at(-1)) >= epoch &&
            last?.active !== null &&
            last?.until === null &&
            !lostWith.has(last)
          )
        })
      const through = new Set(
        grants(now)
          .filter(({ of }) => of === `key/${key}`)
          .map(({ by }) => by),
      )
      const want = [
        ...new Set(
          member(now)
            .filter(({ of }) => through.has(of))
            .map(({ by }) => by.slice('device/'.length)),
        ),
      ]
        .filter((device) => !proven(device))
        .toSorted()
      const found = await all(async (page) => await unprovenDevices(ctx, key, { ...page, epoch }))
      expect(
        found.map(({ device }) => device as string),
        `not proven: ${key}/${epoch}`,
      ).toEqual(want)
      met.unproven += want.length
    }
  }
  for (const topic of ['plant/east/t', 'plant/west/t', 'plant/west/u', 'plant']) {
    const between = window()
    const protecting = truth.spans
      .filter(({ of, by }) => by.startsWith('key/') && !of.startsWith('group/') && filterTakes(of, topic))
      .map(({ by, from, until }) => ({ key: by.slice('key/'.length), from: Math.max(from, between.from), until: Math.min(end(until), between.until) }))
      .filter(({ from, until }) => from < until)
    expect(shown(await all(async (page) => await topicReaders(ctx, topic, between, page))), `readers of ${topic}`).toEqual(readersBy(truth, protecting))
    met.topics += readersBy(truth, protecting).length
  }
  const erasedOf = (device: string): number[] =>
    [...truth.tenures].flatMap(([name, list]) =>
      (name.startsWith(`${device} `) ? list.filter(({ from, until }) => end(until) > from + 1) : []).map(({ from, until }) =>
        until === null ? now : from + 1,
      ),
    )
  for (const [device, at] of names.flatMap((name) => [moment(), moment(), ...erasedOf(name).slice(0, 3)].map((time) => [name, time] as const))) {
    const found = await all(async (page) => await heldAt(ctx, device, at, page))
    const want = [...truth.tenures].flatMap(([name, list]) => {
      const tenure = list.find((one) => covers(one, at))
      if (!name.startsWith(`${device} `) || tenure === undefined) return []
      const isLast = tenure === list.at(-1)
      const by = (moment: number | null): boolean => isLast && moment !== null && moment <= at
      return [`${name.split(' ')[1]} ${by(tenure.active) ? 'active' : by(tenure.installed) ? 'installed' : 'delivered'} ${tenure.from}-${tenure.until ?? ''}`]
    })
    expect(found.map((one) => `${one.key}/${one.epoch} ${one.proof} ${one.heldFrom}-${one.heldUntil ?? ''}`).toSorted(), `held by ${device}`).toEqual(
      want.toSorted(),
    )
    met.heldBefore += want.filter((one) => !one.endsWith('-')).length
    const { groups: were, granted } = await heldAt(ctx, device, at, { limit: 1 })
    const wereIn = member(at)
      .filter(({ by }) => by === `device/${device}`)
      .map(({ of }) => of)
    expect(were.map((group) => `group/${group}`)).toEqual(wereIn.toSorted())
    const keysThen = new Set(
      grants(at)
        .filter(({ by }) => wereIn.includes(by))
        .map(({ of }) => of.slice('key/'.length)),
    )
    expect(granted).toEqual([...keysThen].toSorted())
  }
  const exposed = (devices: readonly string[]): string[] => {
    const of = new Set(
      member(now)
        .filter(({ by }) => devices.includes(by.slice('device/'.length)))
        .map((span) => span.of),
    )
    return [
      ...new Set(
        grants(now)
          .filter(({ by }) => of.has(by))
          .map((span) => span.of.slice('key/'.length)),
      ),
    ].toSorted()
  }
  for (const device of names) expect((await exposedKeys(ctx, 'device', device)).keys).toEqual(exposed([device]))
  for (const batch of ['b1', 'b2'])
    expect((await exposedKeys(ctx, 'batch', batch)).keys, batch).toEqual(exposed(names.filter((device) => batchOf(device) === batch)))
}

const some = <D extends string, T extends object>(weight: number, what: D, more: { [K in keyof T]: fc.Arbitrary<T[K]> }) => ({
  weight,
  arbitrary: fc.record({ do: fc.constant(what), ...more }) as fc.Arbitrary<{ do: D } & T>,
})
const device = fc.constantFrom(...names)
const group = fc.constantFrom(...groups)
const key = fc.constantFrom(...keys)
const orders = fc.oneof(
  some<'join', { device: DeviceId; group: GroupId }>(6, 'join', { device, group }),
  some<'leave', { device: DeviceId; group: GroupId }>(4, 'leave', { device, group }),
  some<'grant', { key: KeyId; group: GroupId }>(2, 'grant', { key, group }),
  some<'rotate', { key: KeyId }>(4, 'rotate', { key }),
  some<'topics', { key: KeyId; topics: string[] }>(2, 'topics', { key, topics: fc.uniqueArray(fc.constantFrom(...topics)) }),
  some<'connect', { device: DeviceId }>(4, 'connect', { device }),
  some<'disconnect', { device: DeviceId }>(2, 'disconnect', { device }),
  some<'revoke', { device: DeviceId }>(1, 'revoke', { device }),
  some<'settle', { deaf: string[] }>(3, 'settle', { deaf: fc.subarray<string>(names) }),
  some<'settle', { deaf: string[] }>(9, 'settle', { deaf: fc.constant([]) }),
  some<'wait', { time: number }>(4, 'wait', { time: fc.constantFrom(1, 10, 2_000, 10_000) }),
)
type Order = typeof orders extends fc.Arbitrary<infer T> ? T : never

/** Rotations are refused when nobody has the key: something to begin with. */
const beginning: readonly Order[] = [
  ...keys.map((one, at) => ({ do: 'grant', key: one, group: groups[at] as GroupId }) as const),
  ...names.map((one) => ({ do: 'connect', device: one }) as const),
  ...names.slice(0, 3).map((one, at) => ({ do: 'join', device: one, group: groups[at % 2] as GroupId }) as const),
  { do: 'settle', deaf: [] },
]

const carryOut = async ({ ctx, ...fleet }: Fleet, order: Order): Promise<void> => {
  const caller = operator()
  switch (order.do) {
    case 'join':
      return void (await addMembers(ctx, caller, order.group, { devices: [order.device] }))
    case 'leave':
      return void (await removeMember(ctx, caller, order.group, order.device))
    case 'grant':
      return void (await grantKey(ctx, caller, order.key, order.group))
    case 'rotate':
      return void (await startRotation(ctx, caller, order.key, { policy: { deadline: 1_000, errorThreshold: 1, successThreshold: 0 }, because: 'test' }))
    case 'topics':
      return await setTopics(ctx, caller, order.key, order.topics)
    case 'connect':
      await fleet.connect(order.device)
      return await fleet.report(order.device)
    case 'disconnect':
      return fleet.disconnect(order.device)
    case 'revoke':
      return void (await revokeDevice(ctx, caller, order.device, 'lost'))
    case 'settle':
      return await fleet.settle((device) => order.deaf.some((one) => one === device))
    case 'wait':
      ctx.clock.now += order.time
      for (const device of names) await fleet.report(device)
      for (const key of keys) await destroyEpochs(ctx, key)
  }
}

test('what the ledger answers is what the audit log tells, whatever happened', { timeout: 120_000 }, async () => {
  await fc.assert(
    fc.asyncProperty(
      fc.array(orders, { minLength: 80, maxLength: 160, size: 'max' }),
      fc.infiniteStream(fc.double({ min: 0, max: 0.999, noNaN: true })),
      async (list, shares) => {
        const fleet = await openFleet()
        const { ctx } = fleet
        try {
          lostWith.clear()
          for (const key of keys) await createKey(ctx, operator(), { id: key, protection: 'sealed', recipientUsage: 5_000 })
          for (const batch of ['b1', 'b2'])
            await ctx.store.commit({
              writes: [
                { table: 'batch', do: 'insert', row: { id: batch, version: 0, station: 'line-1', rows: 1, manifestHash: '', importedAt: 1, importedBy: '' } },
              ],
              entries: [anEntry()],
            })
          for (const order of [...beginning, ...list]) {
            ctx.clock.now += 1
            // Refused orders change nothing.
            await carryOut(fleet, order).catch((thrown: unknown) => {
              if (!(thrown instanceof Error) || !('code' in thrown)) throw thrown
            })
          }
          ctx.clock.now += 1
          await expectTruth(fleet, () => shares.next().value as number)
        } finally {
          await ctx.close()
        }
      },
    ),
    process.env['FLEETKEY_LONG'] === '1' ? { numRuns: 300 } : { numRuns: 6, seed: 3 },
  )
})

test('and all that the answers distinguish has come up', () => {
  for (const [what, count] of Object.entries(met)) expect(count, what).toBeGreaterThan(0)
})

test('memberships and grants from before there was a ledger get their spans once', async () => {
  const fleet = await openFleet()
  const { ctx } = fleet
  const [east = GroupId.parse('east')] = groups
  const [gw = DeviceId.parse('gw'), gw1 = DeviceId.parse('gw-1')] = names
  const [key = KeyId.parse('alarm')] = keys
  await createKey(ctx, operator(), { id: key, protection: 'sealed' })
  const old = [
    { table: 'member', do: 'insert', row: { id: `${east}/${gw}`, version: 0, group: east, device: gw, joinedAt: 5 } },
    { table: 'member', do: 'insert', row: { id: `${east}/${gw1}`, version: 0, group: east, device: gw1, joinedAt: 6 } },
    { table: 'grant', do: 'insert', row: { id: `${key}/${east}`, version: 0, key, group: east, grantedAt: 7 } },
  ] as const
  await ctx.store.commit({ writes: old, entries: [anEntry()] })
  // One of them leaves before the ledger knows it.
  await removeMember(ctx, operator(), east, gw)
  await settleLedger(ctx)
  await settleLedger(ctx)
  expect((await ctx.store.find('span', { limit: 10 })).map(({ of, by, from, until, lot }) => ({ of, by, from, until, lot }))).toEqual([
    { of: 'group/east', by: 'device/gw', from: 5, until: ctx.clock.now, lot: null },
    { of: 'group/east', by: 'device/gw-1', from: 6, until: null, lot: 'east/b1' },
    { of: 'key/alarm', by: 'group/east', from: 7, until: null, lot: null },
  ])
  expect(await heldAt(ctx, gw, 6, { limit: 9 })).toMatchObject({ groups: ['east'], granted: [] })
  expect(await heldAt(ctx, gw1, 8, { limit: 9 })).toMatchObject({ groups: ['east'], granted: ['alarm'] })
  await ctx.close()
})

test('a device that proves itself anew is the same device: its identity and what it held have no gap before that', async () => {
  const ctx = await testContext()
  const [device] = await openDevices(ctx)
  const [east = GroupId.parse('east')] = groups
  const [key = KeyId.parse('alarm')] = keys
  if (device === undefined) throw new Error('no device')
  const { id } = device
  const first = ctx.clock.now
  expect(await device.connect(given(await device.prove('enrol')))).toBe('accepted')
  await createGroup(ctx, operator(), east)
  await addMembers(ctx, operator(), east, { devices: [id] })
  await createKey(ctx, operator(), { id: key, protection: 'sealed' })
  await grantKey(ctx, operator(), key, east)
  const holding: Holding = {
    id: `${id}/${key}/1`,
    version: 0,
    device: id,
    key,
    epoch: Epoch.parse(1),
    stage: 'active',
    nonce: new Uint8Array(16),
    deliveredAt: first,
    installedAt: first,
    activeAt: first,
    retiredAt: null,
    reason: null,
    place: `${key}/1/active`,
  }
  await ctx.store.commit({ writes: [{ table: 'holding', do: 'insert', row: holding }], entries: [anEntry()] })

  // Its storage is lost: other keys, and an identity for them.
  ctx.clock.now += 40 * day
  const before = (await device.row()).keys
  given(await device.prove('enrol', { attester: await attesterOf(device.board) }))
  expect((await device.row()).keys).not.toEqual(before)
  expect((await blastRadius(ctx, id)).identity).toEqual({ from: first, until: null })
  expect(await heldAt(ctx, id, first + day, { limit: 9 })).toMatchObject({ items: [{ key, epoch: 1, proof: 'active' }], groups: [east], granted: [key] })
  ctx.clock.now += day
  await suspendDevice(ctx, operator(), id, 'looked at')
  expect((await blastRadius(ctx, id)).identity).toEqual({ from: first, until: ctx.clock.now })
  await revokeDevice(ctx, operator(), id, 'stolen')
  expect(await blastRadius(ctx, id)).toMatchObject({
    identity: { from: first, until: ctx.clock.now },
    keys: [{ key, epochs: [{ epoch: 1, heldFrom: first }] }],
  })
  expect(await heldAt(ctx, id, first + day, { limit: 9 })).toMatchObject({ items: [{ key, epoch: 1 }], groups: [east], granted: [key] })
  await ctx.close()
})
