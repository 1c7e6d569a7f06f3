import { Epoch, KeyId } from '@fleetkey/protocol/ids.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import {
  advance,
  decide,
  initialCore,
  timing,
  type Core,
  type Decision,
  type Effect,
  type Event,
  type HeldKey,
  type IdentityFacts,
  type Take,
  type Work,
} from './core.ts'

const day = 86_400_000
const at = 1_800_000_000_000
const middle = { now: at, signed: true, uptime: 0, random: () => 0.5 }
const identity: IdentityFacts = {
  device: 'd-1',
  ldevidNotBefore: at - 100 * day,
  ldevidNotAfter: at + 900 * day,
  tlsNotBefore: at - day,
  tlsNotAfter: at + 9 * day,
}
const nonce = new Uint8Array(16).fill(7)
const session = new Uint8Array(16).fill(9)

const delivery = (epoch: number, more: Partial<BodyOf<'delivery'>> = {}): BodyOf<'delivery'> => ({
  type: 'delivery',
  key: KeyId.parse('site'),
  algorithm: 'A256GCM',
  epoch: Epoch.parse(epoch),
  campaign: 'c-1',
  nonce,
  activate: false,
  readOnly: false,
  wrapped: { protection: 'sealed', sealed: new Uint8Array(64) },
  ...more,
})
const tpmWrapped: BodyOf<'delivery'>['wrapped'] = {
  protection: 'tpm',
  sealed: new Uint8Array(64),
  public: new Uint8Array(8),
  duplicate: new Uint8Array(8),
  seed: new Uint8Array(8),
}
const activate = (epoch: number): BodyOf<'activate'> => ({ type: 'activate', key: KeyId.parse('site'), epoch: Epoch.parse(epoch), campaign: 'c-1', nonce })
const retire = (below: number | null, of: Uint8Array = nonce): BodyOf<'retire'> => ({
  type: 'retire',
  key: KeyId.parse('site'),
  below: below === null ? null : Epoch.parse(below),
  campaign: 'c-1',
  nonce: of,
})
const take = (epoch: number): Take => ({ type: 'take', key: 'site', epoch, nonce, campaign: 'c-1' })
const held = (more: Partial<HeldKey> = {}): HeldKey => ({
  key: 'site',
  algorithm: 'A256GCM',
  protection: 'sealed',
  epochs: [
    { epoch: 3, stage: 'active', readOnly: true },
    { epoch: 4, stage: 'active', readOnly: false },
  ],
  current: 4,
  floor: 4,
  erased: 2,
  withdrawals: [],
  ...more,
})
const withNext = held({ epochs: [...held().epochs, { epoch: 5, stage: 'installed', readOnly: false }] })

const play = (core: Core, events: readonly Event[], env = middle): readonly [Core, readonly Effect[]] => {
  let now = core
  let last: readonly Effect[] = []
  for (const event of events) [now, last] = advance(now, event, env)
  return [now, last]
}
const start = (more: Partial<Extract<Event, { on: 'start' }>> = {}): Event => ({
  on: 'start',
  identity,
  known: true,
  locked: false,
  replaced: false,
  held: [],
  owed: [],
  ...more,
})
const reconnect: Event = { on: 'timer', name: 'reconnect' }
const online: readonly Event[] = [start(), reconnect, { on: 'online' }, { on: 'welcome', session, time: at, reportEvery: 60 }]
const onlineWith = (...keys: readonly HeldKey[]): Core => play(initialCore, [start({ held: keys }), ...online.slice(1)])[0]
const timerOf = (effects: readonly Effect[], name: string): number | undefined =>
  effects.flatMap((one) => (one.do === 'timer' && one.name === name ? [one.after] : []))[0]
const saidBy = (effects: readonly Effect[]) =>
  effects.flatMap((one) => (one.do === 'acknowledge' ? [`${one.body.stage} ${one.body.epoch} ${one.body.reason ?? ''}`.trim()] : []))

describe('what a message about a key leads to', () => {
  const cases: readonly (readonly [string, HeldKey | undefined, Work, Decision])[] = [
    ['a first delivery', undefined, delivery(1), { do: 'install', take: false }],
    ['a first delivery to be used at once', undefined, delivery(1, { activate: true }), { do: 'install', take: true }],
    ['the next epoch', held(), delivery(5), { do: 'install', take: false }],
    ['an epoch that is held', withNext, delivery(5), { do: 'say', stage: 'installed', epoch: 5 }],
    ['an installed epoch, now to be used', withNext, delivery(5, { activate: true }), { do: 'take' }],
    ['the epoch in use again', held(), delivery(4, { activate: true }), { do: 'say', stage: 'active', epoch: 4 }],
    ['an older epoch for writing', held(), delivery(2), { do: 'refuse', epoch: 2, reason: 'epoch.lower' }],
    ['an older epoch to be used', held(), delivery(2, { activate: true }), { do: 'refuse', epoch: 2, reason: 'epoch.lower' }],
    ['a held older epoch to be used', held(), delivery(3, { activate: true }), { do: 'refuse', epoch: 3, reason: 'epoch.lower' }],
    ['an older epoch for reading', held(), delivery(2, { readOnly: true }), { do: 'install', take: false }],
    ['an older epoch after the key was withdrawn', held({ epochs: [], current: null }), delivery(3), { do: 'refuse', epoch: 3, reason: 'epoch.lower' }],
    ['reading only and to be used', held(), delivery(5, { readOnly: true, activate: true }), { do: 'refuse', epoch: 5, reason: 'delivery.contradiction' }],
    ['another algorithm', held(), delivery(5, { algorithm: 'HS256', wrapped: tpmWrapped }), { do: 'refuse', epoch: 5, reason: 'key.other-protection' }],
    ['an encryption key for the TPM', undefined, delivery(1, { wrapped: tpmWrapped }), { do: 'refuse', epoch: 1, reason: 'key.algorithm' }],
    ['a MAC key in memory', undefined, delivery(1, { algorithm: 'HS256' }), { do: 'refuse', epoch: 1, reason: 'key.algorithm' }],
    [
      'more epochs than fit',
      held({ epochs: Array.from({ length: 16 }, (_, index) => ({ epoch: index + 4, stage: 'installed', readOnly: false })) }),
      delivery(40),
      { do: 'refuse', epoch: 40, reason: 'epoch.too-many' },
    ],
    ['activation of an installed epoch', withNext, activate(5), { do: 'take' }],
    ['activation of an epoch that is not here', held(), activate(5), { do: 'refuse', epoch: 5, reason: 'epoch.not-held' }],
    ['activation of a key that is not here', undefined, activate(1), { do: 'refuse', epoch: 1, reason: 'epoch.not-held' }],
    ['activation of an older epoch', held(), activate(3), { do: 'refuse', epoch: 3, reason: 'epoch.lower' }],
    ['activation of the epoch in use', held(), activate(4), { do: 'say', stage: 'active', epoch: 4 }],
    ['an epoch owed to consumers, overtaken', held(), take(3), { do: 'ignore', reason: 'a newer epoch is in use by now' }],
    ['an epoch owed to consumers', withNext, take(5), { do: 'take' }],
    ['retirement of what is below the epoch in use', held(), retire(4), { do: 'erase', below: 4 }],
    ['retirement of the epoch in use', held(), retire(5), { do: 'refuse', epoch: 4, reason: 'epoch.in-use' }],
    ['withdrawal', held(), retire(null), { do: 'erase', below: null }],
    [
      'a withdrawal from before, replayed',
      held({ withdrawals: [Buffer.from(nonce).toString('hex')] }),
      retire(null),
      { do: 'ignore', reason: 'a withdrawal that was carried out before' },
    ],
  ]
  test.each(cases)('%s', (_name, known, work, want) => expect(decide(known, work)).toEqual(want))
})

describe('connecting', () => {
  test('a first start enrols, a TPM that is known returns', () => {
    expect(play(initialCore, [start({ identity: null, known: false }), reconnect])[1]).toEqual([{ do: 'enrol', purpose: 'enrol' }])
    expect(play(initialCore, [start({ identity: null, known: true }), reconnect])[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
  })

  test('with an identity it connects, spread over the first second', () => {
    for (const random of [0, 0.25, 0.999]) {
      const [core, effects] = play(initialCore, [start()], { now: at, signed: true, uptime: 0, random: () => random })
      expect(timerOf(effects, 'reconnect')).toBe(Math.round(random * timing.backoffBase))
      expect(advance(core, reconnect, middle)[1]).toEqual([{ do: 'connect', device: 'd-1' }])
    }
  })

  test('an expired certificate is replaced by proving the device anew', () => {
    const expired = start({ identity: { ...identity, tlsNotAfter: at } })
    expect(play(initialCore, [expired, reconnect])[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
  })

  test('a clock that is not signed makes no certificate over: it is tried, and one refusal bears the clock out', () => {
    const wrong = { now: at + 900 * day, signed: false, uptime: 0, random: () => 0.5 }
    const [connecting, effects] = play(initialCore, [start(), reconnect], wrong)
    expect(effects).toEqual([{ do: 'connect', device: 'd-1' }])
    const waiting = advance(connecting, { on: 'offline', why: 'refused' }, wrong)[0]
    expect(advance(waiting, reconnect, wrong)[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
  })

  test('credentials that the server calls over are not shown again', () => {
    const [connecting] = play(initialCore, [start(), reconnect])
    const [waiting, effects] = advance(connecting, { on: 'offline', why: 'over' }, middle)
    expect(timerOf(effects, 'reconnect')).toBeLessThanOrEqual(2_000)
    expect(advance(waiting, reconnect, middle)[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
  })

  test('a return that is refused for what the device is: enrolment and return take turns', () => {
    let core = play(initialCore, [start({ identity: { ...identity, tlsNotAfter: at } }), reconnect])[0]
    const purposes: string[] = []
    for (let round = 0; round < 4; round += 1) {
      const [waiting] = advance(core, { on: 'enrol-failed', code: 'expired', retryAfter: null }, middle)
      const [next, effects] = advance(waiting, reconnect, middle)
      core = next
      purposes.push(...effects.flatMap((one) => (one.do === 'enrol' ? [one.purpose] : [])))
    }
    expect(purposes).toEqual(['enrol', 'return', 'enrol', 'return'])
  })

  test('an LDevID that ends soon is enrolled anew before anything is over; refused, the TLS certificate is renewed meanwhile', () => {
    const ending = { ...identity, ldevidNotBefore: at - 1000 * day, ldevidNotAfter: at + 100 * day }
    const [core] = play(initialCore, [start({ identity: ending }), ...online.slice(1)])
    const [enrolling, effects] = advance(core, { on: 'timer', name: 'renew' }, middle)
    expect([enrolling.phase, effects.at(-1)]).toEqual(['enrolling', { do: 'enrol', purpose: 'enrol' }])
    const refused = play(enrolling, [{ on: 'enrol-failed', code: 'forbidden', retryAfter: null }, reconnect, ...online.slice(2)])[0]
    expect(advance(refused, { on: 'timer', name: 'renew' }, middle)[1]).toEqual([{ do: 'renew', session }])
  })

  test('a renewal that another one keeps waiting is tried when the server said; one refused for the LDevID leads to enrolment', () => {
    const [core] = play(initialCore, online)
    const after = timerOf(advance(core, { on: 'renew-failed', code: 'conflict', retryAfter: 600 }, middle)[1], 'renew')
    expect(after).toBe(900_000)
    expect(advance(core, { on: 'renew-failed', code: 'expired', retryAfter: null }, middle)[1].at(-1)).toEqual({ do: 'enrol', purpose: 'enrol' })
  })

  test('full jitter: between 0 and a ceiling that doubles up to the cap', () => {
    let core = play(initialCore, [start(), reconnect])[0]
    for (let attempt = 1; attempt <= 12; attempt += 1) {
      const ceiling = Math.min(timing.backoffCap, timing.backoffBase * 2 ** attempt)
      for (const random of [0, 0.5, 0.999_999]) {
        const [, effects] = advance(core, { on: 'offline', why: 'unreachable' }, { now: at, signed: true, uptime: 0, random: () => random })
        expect(timerOf(effects, 'reconnect')).toBe(Math.round(random * ceiling))
      }
      core = play(core, [{ on: 'offline', why: 'unreachable' }, reconnect])[0]
      expect(core.attempt).toBe(attempt)
    }
    expect(play(core, [{ on: 'online' }])[0].attempt).toBe(0)
  })

  test('refused once it may be chance, refused again it waits long, refused for good it proves itself anew', () => {
    let core = play(initialCore, [start(), reconnect])[0]
    const refused: Event = { on: 'offline', why: 'refused' }
    const [first, chance] = advance(core, refused, { now: at, signed: true, uptime: 0, random: () => 0 })
    expect(timerOf(chance, 'reconnect')).toBe(0)
    core = advance(first, reconnect, middle)[0]
    const [second, patience] = advance(core, refused, { now: at, signed: true, uptime: 0, random: () => 0 })
    expect(timerOf(patience, 'reconnect')).toBe(5_000)
    core = advance(second, reconnect, middle)[0]
    const [third, longer] = advance(core, refused, { now: at, signed: true, uptime: 0, random: () => 0.999 })
    expect(timerOf(longer, 'reconnect')).toBe(Math.round(0.999 * timing.backoffBase * 2 ** 6))
    expect(advance(third, reconnect, middle)[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
  })

  const refusals: readonly (readonly [code: string | null, retryAfter: number | null, least: number, most: number])[] = [
    [null, null, 0, 2_000],
    ['unavailable', null, 0, 2_000],
    ['rate-limited', 60, 60_000, 120_000],
    ['expired', null, 0, 2_000],
    ['attestation-failed', null, 5_000, 16_000],
    ['unauthenticated', null, 5_000, 16_000],
    ['forbidden', 600, 600_000, 1_200_000],
  ]
  test.each(refusals)('enrolment refused with %s, retry after %s s: between %i and %i ms', (code, retryAfter, least, most) => {
    const enrolling = play(initialCore, [start({ identity: null }), reconnect])[0]
    for (const random of [0, 0.3, 0.999]) {
      const [core, effects] = advance(enrolling, { on: 'enrol-failed', code, retryAfter }, { now: at, signed: true, uptime: 0, random: () => random })
      const after = timerOf(effects, 'reconnect') ?? -1
      expect(after).toBeGreaterThanOrEqual(least)
      expect(after).toBeLessThanOrEqual(most)
      if (retryAfter !== null) {
        // A timer that fires early does not break the server's word.
        const [waiting, again] = advance(core, reconnect, { now: at, signed: true, uptime: 0, random: () => random })
        expect([waiting.phase, (timerOf(again, 'reconnect') ?? 0) >= retryAfter * 1_000]).toEqual(['waiting', true])
      }
    }
  })

  test('refusals for what the device is grow to an hour, never more', () => {
    let core = play(initialCore, [start({ identity: null }), reconnect])[0]
    for (let round = 0; round < 30; round += 1) {
      const [next, effects] = advance(
        core,
        { on: 'enrol-failed', code: 'forbidden', retryAfter: null },
        { now: at, signed: true, uptime: 0, random: () => 0.999_999_999 },
      )
      expect(timerOf(effects, 'reconnect')).toBe(Math.round(0.999_999_999 * Math.min(timing.refusedCap, timing.backoffBase * 2 ** Math.min(round + 4, 20))))
      core = advance(next, reconnect, middle)[0]
    }
  })

  test('enrolled: connects at once, and the refusals are forgotten', () => {
    const enrolling: Core = { ...play(initialCore, [start({ identity: null }), reconnect])[0], refusals: 5, attempt: 9 }
    const [core, effects] = advance(enrolling, { on: 'enrolled', identity, locked: false }, middle)
    expect([core.phase, core.refusals, core.attempt, timerOf(effects, 'reconnect')]).toEqual(['waiting', 0, 0, 0])
    expect(advance(core, reconnect, middle)[1]).toEqual([{ do: 'connect', device: 'd-1' }])
  })

  test('a connection that is lost: the session ends, its timers too', () => {
    const [core, effects] = play(initialCore, [...online, { on: 'offline', why: 'lost' }])
    expect([core.phase, core.session]).toEqual(['waiting', null])
    expect(effects.map((one) => ('name' in one ? `${one.do} ${one.name}` : one.do))).toEqual([
      'cancel welcome',
      'cancel report',
      'cancel renew',
      'timer reconnect',
    ])
  })

  test('the end of a connection that it closed itself changes nothing', () => {
    const [waiting] = play(initialCore, [...online, { on: 'renewed', identity }])
    expect(advance(waiting, { on: 'offline', why: 'lost' }, middle)).toEqual([waiting, []])
  })

  test('stopped: nothing is done any more, whatever happens', () => {
    const [stopped, effects] = play(initialCore, [...online, { on: 'stop' }])
    expect(effects).toEqual([{ do: 'disconnect' }])
    for (const event of [...online, { on: 'work', work: delivery(1) } as const, { on: 'enrolled', identity, locked: false } as const])
      expect(advance(stopped, event, middle)).toEqual([stopped, []])
  })
})

describe('a session', () => {
  test('reports on the welcome, then on the heartbeat with jitter, in sequence', () => {
    let [core, effects] = play(initialCore, online, { now: at, signed: true, uptime: 0, random: () => 0 })
    expect(effects).toContainEqual({ do: 'report', session, sequence: 0 })
    expect(timerOf(effects, 'report')).toBe(48_000)
    for (const sequence of [1, 2, 3]) {
      ;[core, effects] = advance(core, { on: 'timer', name: 'report' }, { now: at, signed: true, uptime: 0, random: () => 0.999_999 })
      expect([effects[0], timerOf(effects, 'report')]).toEqual([{ do: 'report', session, sequence }, 72_000])
    }
  })

  test.each([0, -1, -60_000])('a second welcome that is no newer (%d ms), or one outside a connection, is passed over', (age) => {
    const [core] = play(initialCore, online)
    expect(advance(core, { on: 'welcome', session: nonce, time: at + age, reportEvery: 1 }, middle)).toEqual([core, []])
    const [waiting] = play(initialCore, [start()])
    expect(advance(waiting, { on: 'welcome', session, time: at, reportEvery: 1 }, middle)).toEqual([waiting, []])
  })

  test('asked to use an epoch that is not here, it says so, and soon what is', () => {
    const [core] = play(initialCore, [start({ held: [held()] }), ...online.slice(1)])
    const [, effects] = advance(core, { on: 'work', work: activate(5) }, middle)
    expect(effects[0]).toMatchObject({ do: 'acknowledge', body: { epoch: 5, stage: 'failed', reason: 'epoch.not-held' } })
    expect(timerOf(effects, 'report')).toBeLessThanOrEqual(timing.askWithin)
  })

  test('the welcome of an earlier connection came first: that of this one counts, and the reports begin anew under it', () => {
    const [core] = play(initialCore, [...online, { on: 'timer', name: 'report' }])
    const [now, effects] = advance(core, { on: 'welcome', session: nonce, time: at + 1, reportEvery: 60 }, middle)
    expect(effects[0]).toEqual({ do: 'report', session: nonce, sequence: 0 })
    expect(advance(now, { on: 'timer', name: 'report' }, middle)[1][0]).toEqual({ do: 'report', session: nonce, sequence: 1 })
    expect(advance(now, { on: 'timer', name: 'renew' }, middle)[1]).toEqual([{ do: 'renew', session: nonce }])
  })

  test('no welcome in time: disconnects and tries again', () => {
    const [core, effects] = play(initialCore, [...online.slice(0, 3), { on: 'timer', name: 'welcome' }])
    expect([core.phase, effects.some((one) => one.do === 'disconnect'), timerOf(effects, 'reconnect')]).toEqual(['waiting', true, 1_000])
    expect(play(initialCore, [...online, { on: 'timer', name: 'welcome' }])[1]).toEqual([])
  })

  test.each([0, 0.5, 0.999_999])('renews before two thirds of the life, spread over the fleet (random %f)', (random) => {
    const fresh = { ...identity, tlsNotBefore: at, tlsNotAfter: at + 30 * day }
    const [core, effects] = play(initialCore, [start({ identity: fresh }), ...online.slice(1)], { now: at, signed: true, uptime: 0, random: () => random })
    const after = timerOf(effects, 'renew') ?? 0
    expect(after).toBeGreaterThanOrEqual(0.44 * 30 * day)
    expect(after).toBeLessThan((2 / 3) * 30 * day)
    expect(advance(core, { on: 'timer', name: 'renew' }, middle)[1]).toEqual([{ do: 'renew', session }])
  })

  test('a renewal that is overdue starts at once; one that failed is tried again; one that succeeded counts from the next connection', () => {
    const old = { ...identity, tlsNotBefore: at - 9 * day, tlsNotAfter: at + day }
    const [core, effects] = play(initialCore, [start({ identity: old }), ...online.slice(1)])
    expect(timerOf(effects, 'renew')).toBe(0)
    const later = timerOf(advance(core, { on: 'renew-failed' }, middle)[1], 'renew') ?? 0
    expect([later >= timing.renewRetry, later <= 2 * timing.renewRetry]).toEqual([true, true])
    const [renewed, after] = advance(core, { on: 'renewed', identity }, middle)
    expect([renewed.identity, renewed.phase, after[0]]).toEqual([identity, 'waiting', { do: 'disconnect' }])
    expect(renewed.renewAt).toBeGreaterThan(at)
  })

  test('a timer that fires after the connection is gone does nothing', () => {
    const [core] = play(initialCore, [...online, { on: 'offline', why: 'lost' }])
    for (const name of ['welcome', 'report', 'renew', 'consume'] as const) expect(advance(core, { on: 'timer', name }, middle)).toEqual([core, []])
  })

  test('a refused report is repeated when the server says', () => {
    const [core] = play(initialCore, online)
    expect(timerOf(advance(core, { on: 'refused', code: 'rate-limited', retryAfter: 10 }, middle)[1], 'report')).toBe(15_000)
    expect(advance(core, { on: 'refused', code: 'forbidden', retryAfter: null }, middle)[1]).toEqual([])
  })
})

describe('work on keys', () => {
  test('installed is said after the install, activation is a step of its own', () => {
    const [working, install] = advance(onlineWith(), { on: 'work', work: delivery(1) }, middle)
    expect(install).toEqual([{ do: 'install', delivery: delivery(1) }])
    const one = held({ epochs: [{ epoch: 1, stage: 'installed', readOnly: false }], current: null, floor: 0, erased: 0 })
    const [installed, said] = advance(working, { on: 'done', held: one }, middle)
    expect(said).toEqual([{ do: 'acknowledge', body: { key: 'site', epoch: 1, stage: 'installed', campaign: 'c-1', nonce, reason: null } }])
    const [taking, effects] = advance(installed, { on: 'work', work: activate(1) }, middle)
    expect(effects).toEqual([{ do: 'take', take: take(1) }])
    expect(saidBy(advance(taking, { on: 'done', held: held({ epochs: [{ epoch: 1, stage: 'active', readOnly: false }] }) }, middle)[1])).toEqual(['active 1'])
  })

  test('installed and used at once: one statement, at the end', () => {
    const [working] = advance(onlineWith(), { on: 'work', work: delivery(1, { activate: true }) }, middle)
    const one = held({ epochs: [{ epoch: 1, stage: 'installed', readOnly: false }], current: null, floor: 0 })
    const [taking, effects] = advance(working, { on: 'done', held: one }, middle)
    expect(effects).toEqual([{ do: 'take', take: take(1) }])
    expect(saidBy(advance(taking, { on: 'done', held: held({ epochs: [{ epoch: 1, stage: 'active', readOnly: false }] }) }, middle)[1])).toEqual(['active 1'])
  })

  test('one piece after the other, in the order it came', () => {
    const [working, first] = play(onlineWith(held()), [
      { on: 'work', work: delivery(5) },
      { on: 'work', work: activate(5) },
      { on: 'work', work: retire(5) },
    ])
    expect([first, working.queue.length]).toEqual([[], 2])
    const [taking, second] = advance(working, { on: 'done', held: withNext }, middle)
    expect([saidBy(second), second.at(-1)]).toEqual([['installed 5'], { do: 'take', take: take(5) }])
    const used = held({ ...withNext, epochs: withNext.epochs.map((one) => ({ ...one, stage: 'active', readOnly: one.epoch < 5 })), current: 5, floor: 5 })
    const [erasing, third] = advance(taking, { on: 'done', held: used }, middle)
    expect([saidBy(third), third.at(-1)]).toEqual([['active 5'], { do: 'erase', key: 'site', below: 5, nonce }])
    const [idle, fourth] = advance(erasing, { on: 'done', held: { ...used, epochs: used.epochs.slice(-1), erased: 4 } }, middle)
    expect([saidBy(fourth), idle.working]).toEqual([['retired 4'], null])
  })

  test('a failure is stated, and the next piece goes on; a passing one is not stated but reported anew', () => {
    const [working] = play(onlineWith(), [
      { on: 'work', work: delivery(1) },
      { on: 'work', work: delivery(2) },
    ])
    const [, effects] = advance(working, { on: 'failed', reason: 'wrap.open', transient: false, held: undefined }, middle)
    expect([saidBy(effects), effects.at(-1)]).toEqual([['failed 1 wrap.open'], { do: 'install', delivery: delivery(2) }])
    const [, passing] = advance(working, { on: 'failed', reason: 'internal', transient: true, held: undefined }, middle)
    expect([saidBy(passing), timerOf(passing, 'report')]).toEqual([[], 1.5 * timing.transientRetry])
  })

  test('consumers that do not take it are asked again with growing pauses; the server hears of it once', () => {
    let [core] = advance(onlineWith(withNext), { on: 'work', work: activate(5) }, middle)
    const failed: Event = { on: 'failed', reason: 'hook.failed', transient: false, held: held({ ...withNext, current: 5, floor: 5 }) }
    const said: string[] = []
    for (let attempt = 1; attempt <= 10; attempt += 1) {
      const [owing, effects] = advance(core, failed, middle)
      said.push(...saidBy(effects).map((line) => `${attempt}: ${line}`))
      expect(timerOf(effects, 'consume')).toBe(0.75 * Math.min(timing.consumeCap, timing.consumeBase * 2 ** attempt))
      const [again, retry] = advance(owing, { on: 'timer', name: 'consume' }, middle)
      expect(retry).toEqual([{ do: 'take', take: take(5) }])
      core = again
    }
    expect(said).toEqual(['3: failed 5 hook.failed'])
    const used = held({ epochs: [{ epoch: 5, stage: 'active', readOnly: false }], current: 5, floor: 5 })
    const [settled, effects] = advance(core, { on: 'done', held: used }, middle)
    expect([saidBy(effects), settled.owed.size]).toEqual([['active 5'], 0])
  })

  test('what a crash left to be given out is given out at the start', () => {
    const crashed = held({ epochs: [{ epoch: 5, stage: 'installed', readOnly: false }], current: 5, floor: 5 })
    expect(play(initialCore, [start({ held: [crashed], owed: [take(5)] })])[1]).toContainEqual({ do: 'take', take: take(5) })
  })

  test('too many keys, too much at once', () => {
    const many = Array.from({ length: 256 }, (_, index) => held({ key: `k-${index}` }))
    expect(saidBy(advance(onlineWith(...many), { on: 'work', work: delivery(1) }, middle)[1])).toEqual(['failed 1 key.too-many'])
    const busy = advance(onlineWith(), { on: 'work', work: delivery(1) }, middle)[0]
    const [full, effects] = play(
      busy,
      Array.from({ length: 1_025 }, (): Event => ({ on: 'work', work: delivery(2) })),
    )
    expect([full.queue.length, effects]).toEqual([1_024, [{ do: 'log', line: 'too much at once: delivery of site dropped' }]])
  })

  test('a withdrawal that may have been cut short is carried out again before it is stated, once', () => {
    const withdrawn = held({ epochs: [], current: null, erased: 4, withdrawals: [Buffer.from(nonce).toString('hex')] })
    const [erasing, effects] = advance(onlineWith(withdrawn), { on: 'work', work: retire(null) }, middle)
    expect(effects).toEqual([{ do: 'erase', key: 'site', below: null, nonce }])
    const [failed, failure] = advance(erasing, { on: 'failed', reason: 'hook.failed', transient: false, held: withdrawn }, middle)
    expect(saidBy(failure)).toEqual(['failed 1 hook.failed'])
    const [again, retry] = advance(failed, { on: 'work', work: retire(null) }, middle)
    expect(retry).toEqual([{ do: 'erase', key: 'site', below: null, nonce }])
    const [done, said] = advance(again, { on: 'done', held: withdrawn }, middle)
    expect(saidBy(said)).toEqual(['retired 4'])
    // Replayed: nothing is written to the medium any more.
    expect(advance(done, { on: 'work', work: retire(null) }, middle)[1]).toEqual(said)
  })

  test('the same for older epochs', () => {
    const erased = held({ epochs: held().epochs.slice(1), erased: 3 })
    const [erasing, effects] = advance(onlineWith(erased), { on: 'work', work: retire(4) }, middle)
    expect(effects).toEqual([{ do: 'erase', key: 'site', below: 4, nonce }])
    const [done, said] = advance(erasing, { on: 'done', held: erased }, middle)
    expect(saidBy(said)).toEqual(['retired 3'])
    expect(advance(done, { on: 'work', work: retire(4) }, middle)[1]).toEqual(said)
  })
})

describe('locked: the running firmware may not use the keys', () => {
  const locked = play(initialCore, [
    start({ identity: null, locked: true }),
    reconnect,
    { on: 'enrolled', identity, locked: true },
    reconnect,
    { on: 'online' },
  ])[0]

  test('it proves itself anew at once, says nothing of what it holds, and takes nothing', () => {
    expect(play(initialCore, [start({ identity: null, locked: true }), reconnect])[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
    const [welcomed, effects] = advance(locked, { on: 'welcome', session, time: at, reportEvery: 60 }, middle)
    expect(effects.map(({ do: what }) => what)).not.toContain('report')
    expect(advance(welcomed, { on: 'timer', name: 'report' }, middle)[1]).toEqual([])
    const [after, worked] = advance(welcomed, { on: 'work', work: delivery(1) }, middle)
    expect([after, worked.map(({ do: what }) => what)]).toEqual([welcomed, ['log']])
  })

  test('unlocked it reports what it holds, and what was owed to the consumers goes on', () => {
    const [welcomed] = advance(locked, { on: 'welcome', session, time: at, reportEvery: 60 }, middle)
    const owed = { type: 'take', key: 'site', epoch: 4, nonce, campaign: null } as const
    const [core, effects] = advance(welcomed, { on: 'unlocked', held: [held()], owed: [owed] }, middle)
    expect(core).toMatchObject({ locked: false, held: new Map([[held().key, held()]]) })
    expect(effects.map(({ do: what }) => what)).toContain('report')
    expect(advance(core, { on: 'work', work: delivery(5) }, middle)[1].map(({ do: what }) => what)).not.toContain('log')
  })

  test('unlocked without a connection it waits for one', () => {
    const [core, effects] = advance({ ...locked, session: null }, { on: 'unlocked', held: [], owed: [] }, middle)
    expect([core.locked, effects]).toEqual([false, []])
  })

  test('an identity that was replaced meanwhile is not tried', () => {
    expect(play(initialCore, [start({ replaced: true }), reconnect])[1]).toEqual([{ do: 'enrol', purpose: 'return' }])
    expect(play(initialCore, [start(), reconnect])[1]).toMatchObject([{ do: 'connect' }])
  })
})

describe('attestation', () => {
  const attest = (fill: number, expires = at + 60_000): BodyOf<'attest'> => ({
    type: 'attest',
    challenge: new Uint8Array(16).fill(fill),
    random: new Uint8Array(32),
    selection: [{ hash: 'sha256', pcrs: [0, 4] }],
    ima: null,
    firmware: null,
    expires,
  })
  const asked = (fill: number): Event => ({ on: 'attest', attest: attest(fill) })
  const done: Event = { on: 'attested', failed: null }

  test('is answered for the session it was asked in', () =>
    expect(advance(onlineWith(), asked(1), middle)[1]).toEqual([{ do: 'attest', session, attest: attest(1) }]))

  test('before a welcome, or too late, is not', () => {
    const [early] = play(initialCore, online.slice(0, 3))
    expect(advance(early, asked(1), middle)[1]).toMatchObject([{ do: 'log' }])
    expect(advance(onlineWith(), { on: 'attest', attest: attest(1, at) }, middle)[1]).toMatchObject([{ do: 'log' }])
  })

  test('one quote at a time, and then only the newest question', () => {
    const [busy, effects] = play(onlineWith(), [asked(1), asked(2), asked(3)])
    expect(effects).toEqual([])
    const [next, third] = advance(busy, done, middle)
    expect(third).toEqual([{ do: 'attest', session, attest: attest(3) }])
    expect(advance(next, done, middle)[0].attesting).toBeNull()
  })

  test('a question that is repeated is answered once', () => {
    const [busy] = advance(onlineWith(), asked(1), middle)
    const [same, nothing] = advance(busy, asked(1), middle)
    expect([same.attesting?.next, nothing]).toEqual([null, []])
    expect(advance(advance(same, done, middle)[0], asked(1), middle)[1]).toEqual([])
  })

  test('what waits for a connection that is gone is forgotten', () => {
    const [offline] = play(onlineWith(), [asked(1), asked(2), { on: 'offline', why: 'lost' }])
    const [idle, effects] = advance(offline, { on: 'attested', failed: 'the connection is gone' }, middle)
    expect([idle.attesting, effects]).toEqual([null, [{ do: 'log', line: 'no evidence: the connection is gone' }]])
  })

  test('a failure is followed by a report, so that the server asks again', () => {
    const [busy] = advance(onlineWith(), asked(1), middle)
    const [idle, effects] = advance(busy, { on: 'attested', failed: 'TPM_RC_RETRY' }, middle)
    expect([idle.attesting, timerOf(effects, 'report')]).toEqual([null, 1.5 * timing.transientRetry])
  })

  test('work on keys goes on beside it', () => {
    const [busy] = advance(onlineWith(), asked(1), middle)
    expect(advance(busy, { on: 'work', work: delivery(1) }, middle)[1]).toMatchObject([{ do: 'install' }])
  })
})

describe('any order of events', () => {
  const names = ['site', 'meter'] as const
  const epochs = fc.integer({ min: 1, max: 6 })
  const key = fc.constantFrom(...names).map((name) => KeyId.parse(name))
  const nonces = fc.integer({ min: 0, max: 3 }).map((value) => new Uint8Array(16).fill(value))
  const seldom = fc.integer({ min: 0, max: 9 }).map((value) => value === 0)
  const deliveries = fc
    .record({ key, epoch: epochs, nonce: nonces, activate: fc.boolean(), readOnly: seldom, tpm: seldom })
    .map(({ tpm, epoch, ...more }) => delivery(epoch, { ...more, ...(tpm ? { algorithm: 'HS256', wrapped: tpmWrapped } : {}) }))
  const activations = fc.record({ key, epoch: epochs, nonce: nonces }).map(({ epoch, ...more }) => ({ ...activate(epoch), ...more }))
  // The nonce tells which request a statement answers.
  const retirements = fc.record({ key, below: epochs }).map(({ below, ...more }) => ({ ...retire(below, new Uint8Array(16).fill(below)), ...more }))
  const withdrawals = fc.record({ key, nonce: nonces.map((of) => of.map((value) => value + 100)) }).map((more) => ({ ...retire(null), ...more }))
  const works: fc.Arbitrary<Work> = fc.oneof(
    { weight: 6, arbitrary: deliveries },
    { weight: 6, arbitrary: activations },
    { weight: 2, arbitrary: retirements },
    { weight: 1, arbitrary: withdrawals },
  )
  const outcome = { on: fc.constant('outcome' as const), how: fc.constantFrom('done', 'done', 'done', 'failed', 'transient') }
  type Move = Event | { readonly on: 'outcome'; readonly how: string } | { readonly on: 'restart' }
  const moves: fc.Arbitrary<Move> = fc.oneof(
    { weight: 6, arbitrary: works.map((work): Move => ({ on: 'work', work })) },
    { weight: 6, arbitrary: fc.record(outcome) },
    { weight: 3, arbitrary: fc.constantFrom('reconnect', 'welcome', 'report', 'renew', 'consume').map((name): Move => ({ on: 'timer', name }) as Event) },
    {
      weight: 4,
      arbitrary: fc.constantFrom<Move>(
        { on: 'online' },
        { on: 'offline', why: 'lost' },
        { on: 'offline', why: 'refused' },
        { on: 'offline', why: 'over' },
        { on: 'welcome', session, time: at, reportEvery: 30 },
        { on: 'enrolled', identity, locked: false },
        { on: 'enrol-failed', code: 'forbidden', retryAfter: 5 },
        { on: 'renewed', identity },
        { on: 'renew-failed' },
        { on: 'refused', code: 'internal', retryAfter: 1 },
        { on: 'attested', failed: null },
        { on: 'attested', failed: 'test' },
        { on: 'restart' },
      ),
    },
  )

  /** A device that does what it is told without looking: what it holds durably. */
  const carriedOut = (before: HeldKey | undefined, effect: Effect): HeldKey | undefined => {
    if (effect.do === 'install') {
      const { key: name, epoch, algorithm, wrapped, readOnly } = effect.delivery
      const known = before ?? held({ key: name, epochs: [], current: null, floor: 0, erased: 0 })
      return { ...known, algorithm, protection: wrapped.protection, epochs: [...known.epochs, { epoch, stage: 'installed', readOnly }] }
    }
    if (before === undefined) return undefined
    if (effect.do === 'take') {
      const { epoch } = effect.take
      const after = before.epochs.map((one) =>
        one.epoch === epoch ? { ...one, stage: 'active' as const } : { ...one, readOnly: one.readOnly || one.epoch < epoch },
      )
      return { ...before, epochs: after, current: epoch, floor: epoch }
    }
    if (effect.do !== 'erase') return before
    const gone = before.epochs.filter(({ epoch }) => effect.below === null || epoch < effect.below)
    return {
      ...before,
      epochs: before.epochs.filter((one) => !gone.includes(one)),
      current: effect.below === null ? null : before.current,
      erased: Math.max(before.erased, ...gone.map(({ epoch }) => epoch)),
      withdrawals: effect.below === null ? [...before.withdrawals, Buffer.from(effect.nonce).toString('hex')] : before.withdrawals,
    }
  }
  const keyOf = (effect: Effect): string =>
    effect.do === 'install' ? effect.delivery.key : effect.do === 'take' ? effect.take.key : effect.do === 'erase' ? effect.key : ''

  test('never throws, never lowers the epoch in use, says nothing that is not durable', () => {
    fc.assert(
      fc.property(
        fc.array(moves, { maxLength: 60, size: 'max' }),
        fc.array(fc.double({ min: 0, max: 0.999, noNaN: true }), { minLength: 1, maxLength: 8 }),
        (events, dice) => {
          const medium = new Map<string, HeldKey>()
          const used = new Map<string, number>()
          let underWay: Effect | undefined
          let core = initialCore
          let rolls = 0
          const env = { now: at, signed: true, uptime: 0, random: () => dice[rolls++ % dice.length] ?? 0 }

          const check = (effects: readonly Effect[]): void => {
            for (const effect of effects) {
              if (effect.do === 'timer') expect(effect.after).toBeGreaterThanOrEqual(0)
              if (effect.do === 'install' || effect.do === 'take' || effect.do === 'erase') {
                expect(underWay).toBeUndefined()
                underWay = effect
              }
              if (effect.do === 'take') {
                expect(effect.take.epoch).toBeGreaterThanOrEqual(used.get(effect.take.key) ?? 0)
                expect(medium.get(effect.take.key)?.epochs.some(({ epoch }) => epoch === effect.take.epoch)).toBe(true)
              }
              if (effect.do !== 'acknowledge') continue
              const { key: name, epoch, stage } = effect.body
              const own = medium.get(name)?.epochs.find((one) => one.epoch === epoch)
              if (stage === 'installed') expect(own).toBeDefined()
              if (stage === 'active') expect(own?.stage).toBe('active')
              if (stage === 'retired') expect(medium.get(name)?.epochs.some((one) => one.epoch < (effect.body.nonce[0] ?? 0)) ?? false).toBe(false)
            }
          }
          const feed = (event: Event): void => {
            const [next, effects] = advance(core, event, env)
            core = next
            check(effects)
          }
          feed(start())
          for (const move of events) {
            if (move.on === 'restart') {
              underWay = undefined
              core = initialCore
              feed(start({ held: [...medium.values()] }))
            } else if (move.on !== 'outcome') feed(move)
            else if (underWay !== undefined) {
              const effect = underWay
              underWay = undefined
              const name = keyOf(effect)
              if (move.how !== 'done') {
                feed({ on: 'failed', reason: 'test', transient: move.how === 'transient', held: medium.get(name) })
                continue
              }
              const after = carriedOut(medium.get(name), effect)
              if (after !== undefined) medium.set(name, after)
              if (effect.do === 'take') used.set(name, effect.take.epoch)
              feed({ on: 'done', held: after })
            }
          }
        },
      ),
      { numRuns: 500 },
    )
  })
})
