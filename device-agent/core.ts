import type { BodyOf, KeyAlgorithm, Place, Protection } from '@fleetkey/protocol/messages.ts'

/**
 * What the agent does next: pure. Events in, effects out; time and randomness come with the event. The agent carries the effects out and
 * reports their outcome as events. Work on keys is done one piece at a time, in the order it came.
 */

/** One epoch of a key in this device. `active`: the consumers have taken it. */
export interface HeldEpoch {
  readonly epoch: number
  readonly stage: 'installed' | 'active'
  /** For reading old data only. */
  readonly readOnly: boolean
}

/** What this device holds, or held, of one key. */
export interface HeldKey {
  readonly key: string
  readonly algorithm: KeyAlgorithm
  readonly protection: Protection
  /** Ascending. */
  readonly epochs: readonly HeldEpoch[]
  /** The epoch in use. Only grows. */
  readonly current: number | null
  /** Highest epoch that was ever in use: nothing below it is ever taken into use again, not even after the key was withdrawn. */
  readonly floor: number
  /** Highest epoch that was erased. */
  readonly erased: number
  /** Nonces (hex) of withdrawals that were carried out, newest last: a replayed one erases nothing. */
  readonly withdrawals: readonly string[]
}

type Sealed = BodyOf<'delivery'>
/** One epoch: for this device alone, or wrapped for many of a group and opened with the labels of a place in it. */
export interface Delivery extends Omit<Sealed, 'wrapped'> {
  readonly wrapped: Sealed['wrapped'] | (Omit<Place, 'slot'> & { readonly protection: 'sealed'; readonly wraps: Uint8Array })
}
type Activate = BodyOf<'activate'>
type Retire = BodyOf<'retire'>
type Acknowledge = BodyOf<'acknowledge'>
type Attest = BodyOf<'attest'>

/** `take`: give the epoch in use to the consumers again, after a hook failed or a crash. */
export interface Take {
  readonly type: 'take'
  readonly key: string
  readonly epoch: number
  readonly nonce: Uint8Array
  readonly campaign: string | null
}
export type Work = Delivery | Activate | Retire | Take

export type Decision =
  | { readonly do: 'install'; readonly take: boolean }
  | { readonly do: 'take' }
  | { readonly do: 'say'; readonly stage: 'installed' | 'active' | 'retired'; readonly epoch: number }
  | { readonly do: 'erase'; readonly below: number | null }
  | { readonly do: 'refuse'; readonly epoch: number; readonly reason: string }
  | { readonly do: 'ignore'; readonly reason: string }

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const maxEpochs = 16
const notHeld = 'epoch.not-held'
const maxKeys = 256

/** What a message about a key leads to, given what is held of it. Asking twice is harmless. */
export const decide = (held: HeldKey | undefined, work: Work): Decision => {
  switch (work.type) {
    case 'delivery':
      return decideDelivery(held, work)
    case 'activate':
      return decideUse(held, work.epoch)
    case 'take':
      return work.epoch < (held?.floor ?? 0) ? { do: 'ignore', reason: 'a newer epoch is in use by now' } : decideUse(held, work.epoch)
    case 'retire':
      return decideRetire(held, work)
  }
}

const decideDelivery = (held: HeldKey | undefined, delivery: Delivery): Decision => {
  const { epoch } = delivery
  const refuse = (reason: string): Decision => ({ do: 'refuse', epoch, reason })
  if (held !== undefined && held.epochs.length > 0 && (held.algorithm !== delivery.algorithm || held.protection !== delivery.wrapped.protection))
    return refuse('key.other-protection')
  // HS256 keys live in the TPM and A256GCM keys in memory: neither can be put in the other's place.
  if ((delivery.algorithm === 'HS256') !== (delivery.wrapped.protection === 'tpm')) return refuse('key.algorithm')
  if (delivery.activate && delivery.readOnly) return refuse('delivery.contradiction')
  const own = held?.epochs.find((one) => one.epoch === epoch)
  if (own !== undefined) return delivery.activate ? decideUse(held, epoch) : { do: 'say', stage: 'installed', epoch }
  if (!delivery.readOnly && epoch < (held?.floor ?? 0)) return refuse('epoch.lower')
  if ((held?.epochs.length ?? 0) >= maxEpochs) return refuse('epoch.too-many')
  return { do: 'install', take: delivery.activate }
}

/** Taking into use never goes back: an epoch below the one in use is refused, the one in use is stated again. */
const decideUse = (held: HeldKey | undefined, epoch: number): Decision => {
  const own = held?.epochs.find((one) => one.epoch === epoch)
  if (held === undefined || own === undefined) return { do: 'refuse', epoch, reason: notHeld }
  if (own.readOnly || epoch < held.floor) return { do: 'refuse', epoch, reason: 'epoch.lower' }
  return own.stage === 'active' ? { do: 'say', stage: 'active', epoch } : { do: 'take' }
}

const decideRetire = (held: HeldKey | undefined, { below, nonce }: Retire): Decision => {
  const repeated = held?.withdrawals.includes(hex(nonce)) === true
  const erased = Math.max(held?.erased ?? 0, 1)
  if (held === undefined || held.epochs.length === 0) return { do: 'say', stage: 'retired', epoch: erased }
  if (below === null) return repeated ? { do: 'ignore', reason: 'a withdrawal that was carried out before' } : { do: 'erase', below: null }
  // A device is never left without the epoch in use.
  if (held.current !== null && below > held.current) return { do: 'refuse', epoch: held.current, reason: 'epoch.in-use' }
  return held.epochs.some(({ epoch }) => epoch < below) ? { do: 'erase', below } : { do: 'say', stage: 'retired', epoch: erased }
}

/** What the core needs to know of the identity: the device id and the life of its TLS certificate (milliseconds since 1970). */
export interface IdentityFacts {
  readonly device: string
  readonly ldevidNotBefore: number
  readonly ldevidNotAfter: number
  readonly tlsNotBefore: number
  readonly tlsNotAfter: number
}

export type Phase = 'starting' | 'waiting' | 'connecting' | 'enrolling' | 'online' | 'stopped'
export type TimerName = 'reconnect' | 'welcome' | 'report' | 'renew' | 'consume'

export interface Core {
  readonly phase: Phase
  readonly identity: IdentityFacts | null
  /** Whether the keys in the TPM are those of an earlier enrolment. */
  readonly known: boolean
  /** The keys do not open under the firmware that runs: nothing is said of what is held, and nothing is taken. */
  readonly locked: boolean
  readonly held: ReadonlyMap<string, HeldKey>
  /** `since`: the server's time in its welcome. */
  readonly session: { readonly nonce: Uint8Array; readonly since: number; readonly reportEvery: number; readonly sequence: number } | null
  /** Attempts to connect since the last success. */
  readonly attempt: number
  /** No return leads on: the LDevID is over, or not the one that the server knows. */
  readonly mustEnrol: boolean
  /** The last attempt to enrol got nowhere: what can be renewed is renewed meanwhile. */
  readonly enrolFailed: boolean
  /** Connections in a row that the server refused for this device's credentials. */
  readonly refusals: number
  /** No connection before this time: the server said so (uptime, milliseconds). */
  readonly notBefore: number
  readonly renewAt: number
  readonly queue: readonly Work[]
  readonly working: { readonly work: Work; readonly decision: Decision } | null
  /** Epochs whose consumers have not taken them yet, by key, with the attempts so far. */
  readonly owed: ReadonlyMap<string, Take & { readonly attempts: number }>
  /** What the server asked to attest, being made and waiting: the newest only, older ones count no more. */
  readonly attesting: { readonly now: Attest; readonly next: Attest | null } | null
  /** The challenge that was taken up last: a replayed one is not quoted again. */
  readonly challenged: Uint8Array | null
  /** Erasures carried out to their end since the start, files of the consumers included, as KEY/BELOW. */
  readonly cleared: ReadonlySet<string>
}

export type Event =
  | {
      readonly on: 'start'
      readonly identity: IdentityFacts | null
      readonly known: boolean
      readonly locked: boolean
      /** The server has replaced this identity while it could not be stored: the device proves itself anew at once. */
      readonly replaced: boolean
      readonly held: readonly HeldKey[]
      readonly owed: readonly Take[]
    }
  | { readonly on: 'unlocked'; readonly held: readonly HeldKey[]; readonly owed: readonly Take[] }
  | { readonly on: 'timer'; readonly name: TimerName }
  | { readonly on: 'online' }
  | { readonly on: 'offline'; readonly why: 'lost' | 'refused' | 'over' | 'unreachable' }
  | { readonly on: 'welcome'; readonly session: Uint8Array; readonly time: number; readonly reportEvery: number }
  | { readonly on: 'work'; readonly work: Work }
  | { readonly on: 'done'; readonly held: HeldKey | undefined }
  | { readonly on: 'failed'; readonly reason: string; readonly transient: boolean; readonly held: HeldKey | undefined }
  /** What came by broadcast is not for this device's place, which changes nothing; `ask`: for labels that it lacks, so that the server should hear what it has. */
  | { readonly on: 'skipped'; readonly ask: boolean }
  | { readonly on: 'attest'; readonly attest: Attest }
  /** Evidence went out, or could not be made or sent. */
  | { readonly on: 'attested'; readonly failed: string | null }
  | { readonly on: 'enrolled'; readonly identity: IdentityFacts; readonly locked: boolean }
  | { readonly on: 'enrol-failed'; readonly code: string | null; readonly retryAfter: number | null }
  | { readonly on: 'renewed'; readonly identity: IdentityFacts }
  /** `code`: what the server refused it with; seconds to wait if it said so. */
  | { readonly on: 'renew-failed'; readonly code?: string; readonly retryAfter?: number | null }
  /** Another trust bundle is stored; `renewWithin`: milliseconds over which the renewal that it calls for is spread, null when it calls for none. */
  | { readonly on: 'trusted'; readonly renewWithin: number | null }
  | { readonly on: 'refused'; readonly code: string; readonly retryAfter: number | null }
  | { readonly on: 'stop' }

export type Effect =
  | { readonly do: 'connect'; readonly device: string }
  | { readonly do: 'enrol'; readonly purpose: 'enrol' | 'return' }
  | { readonly do: 'disconnect' }
  /** Replaces a timer of that name that is running. */
  | { readonly do: 'timer'; readonly name: TimerName; readonly after: number }
  | { readonly do: 'cancel'; readonly name: TimerName }
  | { readonly do: 'report'; readonly session: Uint8Array; readonly sequence: number }
  | { readonly do: 'renew'; readonly session: Uint8Array }
  | { readonly do: 'attest'; readonly session: Uint8Array; readonly attest: Attest }
  | { readonly do: 'install'; readonly delivery: Delivery }
  | { readonly do: 'take'; readonly take: Take }
  | { readonly do: 'erase'; readonly key: string; readonly below: number | null; readonly nonce: Uint8Array }
  | { readonly do: 'acknowledge'; readonly body: Omit<Acknowledge, 'proof' | 'type'> }
  | { readonly do: 'log'; readonly line: string }

/**
 * `now`: the server's time, milliseconds since 1970, or the clock's own before the first `signed` one. `uptime`: milliseconds since the agent began, which no
 * clock that is set changes. `random`: uniform in [0, 1).
 */
export interface Environment {
  readonly now: number
  readonly signed: boolean
  readonly uptime: number
  random(): number
}

export const timing = {
  /** Full jitter: uniform between 0 and base × 2^attempt, at most cap (milliseconds). */
  backoffBase: 1_000,
  backoffCap: 300_000,
  /** Refused credentials are rarely a passing trouble. */
  refusedCap: 3_600_000,
  welcome: 20_000,
  /** Refusals in a row after which the device proves itself anew. */
  refusalsBeforeReturn: 3,
  /** A renewal starts between these shares of the certificate's life. */
  renewFrom: 0.45,
  renewTo: 0.65,
  renewRetry: 300_000,
  consumeBase: 1_000,
  consumeCap: 300_000,
  /** Attempts to give an epoch to its consumers before the server hears of the trouble. */
  consumeAttempts: 3,
  transientRetry: 30_000,
  askWithin: 5_000,
} as const

const maxQueue = 1024

export const initialCore: Core = {
  phase: 'starting',
  identity: null,
  known: false,
  locked: false,
  held: new Map(),
  session: null,
  attempt: 0,
  mustEnrol: false,
  enrolFailed: false,
  refusals: 0,
  notBefore: 0,
  renewAt: 0,
  queue: [],
  working: null,
  owed: new Map(),
  attesting: null,
  challenged: null,
  cleared: new Set(),
}

export type Next = readonly [Core, readonly Effect[]]

const then = ([core, effects]: Next, more: (core: Core) => Next): Next => {
  const [next, added] = more(core)
  return [next, [...effects, ...added]]
}

/** The next state and what is to be done, in this order. */
export const advance = (core: Core, event: Event, env: Environment): Next => {
  if (core.phase === 'stopped') return [core, []]
  switch (event.on) {
    case 'start':
      return started(core, event, env)
    case 'unlocked':
      return unlocked(core, event, env)
    case 'timer':
      return timed(core, event.name, env)
    case 'online':
      return [{ ...core, phase: 'online', attempt: 0, refusals: 0 }, [{ do: 'timer', name: 'welcome', after: timing.welcome }]]
    case 'offline':
      return offline(core, event.why, env)
    case 'welcome':
      return welcomed(core, event, env)
    case 'work':
      return queued(core, event.work)
    case 'done':
      return finished(withHeld(core, event.held), env)
    case 'failed':
      return workFailed(withHeld(core, event.held), event, env)
    case 'skipped':
      return skipped(core, event.ask, env)
    case 'attest':
      return asked(core, event.attest, env)
    case 'attested':
      return attested(core, event.failed, env)
    case 'enrolled':
      return connectSoon(
        {
          ...core,
          identity: event.identity,
          known: true,
          locked: event.locked,
          attempt: 0,
          refusals: 0,
          mustEnrol: false,
          renewAt: renewalOf(event.identity, env),
        },
        0,
      )
    case 'enrol-failed':
      // A return that was refused for the LDevID: enrolment is what is left. Taking turns, since the code does not say what it was refused for.
      return again(
        { ...core, enrolFailed: true, mustEnrol: (event.code === 'expired' || event.code === 'forbidden') && !core.mustEnrol },
        { code: event.code, retryAfter: event.retryAfter },
        env,
      )
    case 'renewed': {
      const renewed = { ...core, identity: event.identity, renewAt: renewalOf(event.identity, env) }
      // The new certificate counts from the next connection on.
      return core.phase === 'online' ? then([renewed, [{ do: 'disconnect' }]], (next) => connectSoon(next, env.random() * 5_000)) : [renewed, []]
    }
    case 'renew-failed':
      return renewFailed(core, event, env)
    case 'trusted':
      return trusted(core, event.renewWithin, env)
    case 'refused':
      return refused(core, event, env)
    case 'stop':
      return [{ ...core, phase: 'stopped', session: null }, [{ do: 'disconnect' }]]
  }
}

/** Tried again when the server said, at once where only the request was spent, else after a while; an LDevID that is over is enrolled anew. */
const renewFailed = (core: Core, { code, retryAfter }: Extract<Event, { on: 'renew-failed' }>, env: Environment): Next => {
  if (code === 'expired' && core.identity !== null && core.session !== null)
    return renewing({ ...core, enrolFailed: false, identity: { ...core.identity, ldevidNotAfter: Math.min(core.identity.ldevidNotAfter, env.now) } }, env)
  const after = typeof retryAfter === 'number' ? retryAfter * 1_000 : timing.renewRetry
  return [core, [{ do: 'timer', name: 'renew', after: Math.round(after * (1 + env.random())) }]]
}

/** When to ask for the next TLS certificate: before two thirds of its life, spread over the fleet. */
const renewalOf = (identity: IdentityFacts, env: Environment): number =>
  identity.tlsNotBefore + (identity.tlsNotAfter - identity.tlsNotBefore) * (timing.renewFrom + (timing.renewTo - timing.renewFrom) * env.random())

const started = (core: Core, event: Extract<Event, { on: 'start' }>, env: Environment): Next => {
  const begun: Core = {
    ...core,
    identity: event.identity,
    known: event.known,
    locked: event.locked,
    refusals: event.replaced ? timing.refusalsBeforeReturn : 0,
    held: new Map(event.held.map((one) => [one.key, one])),
    renewAt: event.identity === null ? 0 : renewalOf(event.identity, env),
  }
  return then(
    event.owed.reduce<Next>((next, take) => then(next, (before) => queued(before, take)), [begun, []]),
    // No jitter at the first start after a power cut of the whole plant would be a storm.
    (next) => connectSoon(next, env.random() * timing.backoffBase),
  )
}

/** What is held can be read again: it is reported at once, and what the consumers had not taken is given to them. */
const unlocked = (core: Core, event: Extract<Event, { on: 'unlocked' }>, env: Environment): Next =>
  then(
    event.owed.reduce<Next>(
      (next, take) => then(next, (before) => queued(before, take)),
      [{ ...core, locked: false, held: new Map(event.held.map((one) => [one.key, one])) }, []],
    ),
    (next) => reporting(next, env),
  )

const connectSoon = (core: Core, after: number): Next => [
  // A question of the connection that is gone is void; what is being made for it ends by itself.
  { ...core, phase: 'waiting', session: null, attesting: core.attesting === null ? null : { ...core.attesting, next: null } },
  [
    { do: 'cancel', name: 'welcome' },
    { do: 'cancel', name: 'report' },
    { do: 'cancel', name: 'renew' },
    { do: 'timer', name: 'reconnect', after: Math.round(after) },
  ],
]

const backoff = (core: Core, cap: number, env: Environment): number => {
  const ceiling = Math.min(cap, timing.backoffBase * 2 ** Math.min(core.attempt, 20))
  return Math.max(env.random() * ceiling, core.notBefore - env.uptime)
}

const again = (core: Core, why: { readonly code: string | null; readonly retryAfter: number | null }, env: Environment): Next => {
  const notBefore = why.retryAfter === null ? core.notBefore : env.uptime + why.retryAfter * 1_000 * (1 + env.random())
  const passing = why.code === null || ['unavailable', 'rate-limited', 'internal', 'expired', 'conflict', 'not-found'].includes(why.code)
  const next = { ...core, attempt: core.attempt + 1, notBefore }
  // Refused for what the device is, not for the moment: patience, the reason has to change first.
  const wait = passing ? backoff(next, timing.backoffCap, env) : Math.max(backoff({ ...next, attempt: next.attempt + 3 }, timing.refusedCap, env), 5_000)
  return connectSoon(next, wait)
}

const offline = (core: Core, why: 'lost' | 'refused' | 'over' | 'unreachable', env: Environment): Next => {
  // We closed it ourselves and know what comes next.
  if (core.phase === 'waiting') return [core, []]
  // The server says that these credentials are what is wrong: they are not shown again.
  if (why === 'over') return again({ ...core, refusals: timing.refusalsBeforeReturn }, { code: null, retryAfter: null }, env)
  if (why !== 'refused') return again(core, { code: null, retryAfter: null }, env)
  return again({ ...core, refusals: core.refusals + 1 }, { code: core.refusals === 0 ? null : 'unauthenticated', retryAfter: null }, env)
}

const timed = (core: Core, name: TimerName, env: Environment): Next => {
  switch (name) {
    case 'reconnect':
      return core.phase === 'waiting' ? connecting(core, env) : [core, []]
    case 'welcome':
      return core.phase === 'online' && core.session === null
        ? then([core, [{ do: 'log', line: 'no welcome from the server' }, { do: 'disconnect' }]], (next) => again(next, { code: null, retryAfter: null }, env))
        : [core, []]
    case 'report':
      return core.session === null ? [core, []] : reporting(core, env)
    case 'renew':
      return renewing(core, env)
    case 'consume':
      return consumeAgain(core)
  }
}

/** The LDevID itself is replaced by enrolling anew, when less than this share of its life is left, spread over the fleet. */
const isLdevidDue = ({ ldevidNotBefore, ldevidNotAfter }: IdentityFacts, env: Environment): boolean =>
  ldevidNotAfter - env.now < (ldevidNotAfter - ldevidNotBefore) * (0.1 + 0.1 * env.random())

const renewing = (core: Core, env: Environment): Next => {
  if (core.session === null || core.identity === null) return [core, []]
  if (core.enrolFailed || !isLdevidDue(core.identity, env)) return [core, [{ do: 'renew', session: core.session.nonce }]]
  return [
    { ...core, phase: 'enrolling', session: null, attesting: core.attesting === null ? null : { ...core.attesting, next: null } },
    [{ do: 'log', line: 'the LDevID ends soon: enrolling anew' }, { do: 'disconnect' }, { do: 'cancel', name: 'report' }, { do: 'enrol', purpose: 'enrol' }],
  ]
}

/** Certificates that expired, or that the server keeps refusing, are replaced by proving the device anew. */
const connecting = (core: Core, env: Environment): Next => {
  if (core.notBefore > env.uptime) return connectSoon(core, core.notBefore - env.uptime)
  const { identity } = core
  if (identity === null) return [{ ...core, phase: 'enrolling' }, [{ do: 'enrol', purpose: core.known && !core.mustEnrol ? 'return' : 'enrol' }]]
  // A clock that is not signed proves nothing: the certificate is tried, and one refusal bears the clock out.
  const isOver = identity.tlsNotAfter <= env.now && (env.signed || core.refusals > 0)
  return isOver || core.refusals >= timing.refusalsBeforeReturn
    ? [{ ...core, phase: 'enrolling' }, [{ do: 'enrol', purpose: core.mustEnrol ? 'enrol' : 'return' }]]
    : [{ ...core, phase: 'connecting' }, [{ do: 'connect', device: identity.device }]]
}

const welcomed = (core: Core, event: Extract<Event, { on: 'welcome' }>, env: Environment): Next => {
  // That of an earlier connection may come first, held up on its way, and the server takes no report under its nonce: the newest counts. An older one is a replay.
  if (core.phase !== 'online' || (core.session !== null && event.time <= core.session.since)) return [core, []]
  const session = { nonce: event.session, since: event.time, reportEvery: event.reportEvery, sequence: 0 }
  const renewIn = Math.max(core.renewAt - env.now, 0)
  return then(reporting({ ...core, session, notBefore: 0 }, env), (next) => [
    next,
    [
      { do: 'cancel', name: 'welcome' },
      { do: 'timer', name: 'renew', after: renewIn },
    ],
  ])
}

const reporting = (core: Core, env: Environment): Next => {
  // A locked device cannot tell what it holds: a report of nothing would have it all delivered again.
  if (core.session === null || core.locked) return [core, []]
  const { nonce, sequence, reportEvery } = core.session
  return [
    { ...core, session: { ...core.session, sequence: sequence + 1 } },
    [
      { do: 'report', session: nonce, sequence },
      { do: 'timer', name: 'report', after: Math.round(reportEvery * 1_000 * (0.8 + 0.4 * env.random())) },
    ],
  ]
}

/** One quote at a time. A newer question makes an older one void: the server takes evidence for its newest challenge only. */
const asked = (core: Core, attest: Attest, env: Environment): Next => {
  if (core.session === null) return [core, [{ do: 'log', line: 'asked to attest before a welcome' }]]
  if (core.challenged !== null && Buffer.compare(core.challenged, attest.challenge) === 0) return [core, []]
  if (attest.expires <= env.now) return [core, [{ do: 'log', line: 'asked to attest too late' }]]
  if (core.attesting !== null) return [{ ...core, attesting: { ...core.attesting, next: attest } }, []]
  return [{ ...core, attesting: { now: attest, next: null }, challenged: attest.challenge }, [{ do: 'attest', session: core.session.nonce, attest }]]
}

/** After a failure the report is repeated, and the server asks again. */
const attested = (core: Core, failed: string | null, env: Environment): Next => {
  if (core.attesting === null) return [core, []]
  const { next } = core.attesting
  const idle: Core = { ...core, attesting: null }
  const told: Effect[] = failed === null ? [] : [{ do: 'log', line: `no evidence: ${failed}` }]
  if (core.session === null) return [idle, told]
  if (next !== null) return then([idle, told], (now) => asked(now, next, env))
  const again: Effect[] = failed === null ? [] : [{ do: 'timer', name: 'report', after: Math.round(timing.transientRetry * (1 + env.random())) }]
  return [idle, [...told, ...again]]
}

const refused = (core: Core, event: Extract<Event, { on: 'refused' }>, env: Environment): Next => {
  if (core.session === null || event.retryAfter === null) return [core, []]
  return [core, [{ do: 'timer', name: 'report', after: Math.round(event.retryAfter * 1_000 * (1 + env.random())) }]]
}

/** Said at once: the server waits for it. A fleet that leaves a CA does so over time, each device at a moment of its own. */
const trusted = (core: Core, renewWithin: number | null, env: Environment): Next => {
  const at = renewWithin === null ? null : env.now + renewWithin * env.random()
  const renewAt = at === null ? core.renewAt : Math.min(core.renewAt, at)
  const sooner: Effect[] = at === null || core.session === null ? [] : [{ do: 'timer', name: 'renew', after: Math.max(0, Math.round(renewAt - env.now)) }]
  return then([{ ...core, renewAt }, sooner], (next) => reporting(next, env))
}

const queued = (core: Core, work: Work): Next => {
  if (core.locked) return [core, [{ do: 'log', line: `locked: ${work.type} of ${work.key} has to come again` }]]
  // Beyond the bound nothing is lost: the server sends it again after the next report.
  if (core.queue.length >= maxQueue) return [core, [{ do: 'log', line: `too much at once: ${work.type} of ${work.key} dropped` }]]
  return startNext({ ...core, queue: [...core.queue, work] })
}

const startNext = (core: Core): Next => {
  const [work, ...queue] = core.queue
  if (core.working !== null || work === undefined) return [core, []]
  const held = core.held.get(work.key)
  const tooMany = work.type === 'delivery' && held === undefined && [...core.held.values()].filter(({ epochs }) => epochs.length > 0).length >= maxKeys
  const decision: Decision = tooMany ? { do: 'refuse', epoch: work.epoch, reason: 'key.too-many' } : whole(core, work, decide(held, work))
  const next: Core = { ...core, queue, working: { work, decision } }
  switch (decision.do) {
    case 'install':
      return work.type === 'delivery' ? [next, [{ do: 'install', delivery: work }]] : [next, []]
    case 'take':
      return work.type === 'retire' ? [next, []] : [next, [{ do: 'take', take: takeOf(work) }]]
    case 'erase':
      if (work.type !== 'retire') return [next, []]
      return [
        { ...next, cleared: new Set([...core.cleared].filter((name) => name !== clearedName(work))) },
        [{ do: 'erase', key: work.key, below: decision.below, nonce: work.nonce }],
      ]
    case 'say':
      return then([{ ...next, working: null }, [say(work, decision.stage, decision.epoch)]], startNext)
    case 'refuse':
      return then([{ ...next, working: null }, [say(work, 'failed', decision.epoch, decision.reason), ...told(core, decision.reason)]], startNext)
    case 'ignore':
      return then([{ ...next, working: null }, [{ do: 'log', line: `${work.type} of ${work.key}: ${decision.reason}` }]], startNext)
  }
}

/** The server counts on an epoch that is not here: an older copy of the disk took the place of the one that had it. It hears soon what is, and sends what is missing. */
const told = ({ session }: Core, reason: string): readonly Effect[] =>
  reason === notHeld && session !== null ? [{ do: 'timer', name: 'report', after: timing.askWithin }] : []

const clearedName = ({ key, below }: Retire): string => `${key}/${below ?? 'all'}`

/**
 * A crash or a failed hook may have cut an erasure short: the older copy on the medium or a consumer's file would outlive its `retired`. So it is
 * carried out once more before it is stated. Replays of it write nothing.
 */
const whole = (core: Core, work: Work, decision: Decision): Decision =>
  work.type === 'retire' && decision.do === 'say' && !core.cleared.has(clearedName(work)) ? { do: 'erase', below: work.below } : decision

const takeOf = ({ key, epoch, nonce, campaign }: Delivery | Activate | Take): Take => ({ type: 'take', key, epoch, nonce, campaign })

const say = (work: Work, stage: Acknowledge['stage'], epoch: number, reason: string | null = null): Effect => ({
  do: 'acknowledge',
  body: {
    key: work.key as Acknowledge['key'],
    epoch: epoch as Acknowledge['epoch'],
    stage,
    campaign: work.campaign,
    nonce: work.nonce,
    reason: reason === null ? null : reason.slice(0, 200),
  },
})

const withHeld = (core: Core, held: HeldKey | undefined): Core => (held === undefined ? core : { ...core, held: new Map(core.held).set(held.key, held) })

const without = <V>(map: ReadonlyMap<string, V>, key: string): ReadonlyMap<string, V> => {
  const copy = new Map(map)
  copy.delete(key)
  return copy
}

const finished = (core: Core, _env: Environment): Next => {
  if (core.working === null) return [core, []]
  const { work, decision } = core.working
  const idle: Core = { ...core, working: null }
  if (decision.do === 'install' && work.type === 'delivery')
    // Installed and to be used at once: the same piece of work goes on, and only the use is stated.
    return decision.take ? startNext({ ...idle, queue: [takeOf(work), ...idle.queue] }) : then([idle, [say(work, 'installed', work.epoch)]], startNext)
  if (decision.do === 'take' && work.type !== 'retire')
    return then([{ ...idle, owed: without(idle.owed, work.key) }, [say(work, 'active', work.epoch)]], startNext)
  if (decision.do === 'erase' && work.type === 'retire') {
    const cleared = new Set(core.cleared).add(clearedName(work))
    return then(
      [{ ...idle, owed: without(idle.owed, work.key), cleared }, [say(work, 'retired', Math.max(core.held.get(work.key)?.erased ?? 0, 1))]],
      startNext,
    )
  }
  return startNext(idle)
}

/** A whole shard may lack the same labels: the reports that ask for them are spread. */
const skipped = (core: Core, ask: boolean, env: Environment): Next => {
  const report: Effect[] = ask && core.session !== null ? [{ do: 'timer', name: 'report', after: Math.round(timing.askWithin * env.random()) }] : []
  return then([{ ...core, working: null }, report], startNext)
}

const workFailed = (core: Core, event: Extract<Event, { on: 'failed' }>, env: Environment): Next => {
  if (core.working === null) return [core, []]
  const { work, decision } = core.working
  const idle: Core = { ...core, working: null }
  const log: Effect = { do: 'log', line: `${work.type} of ${work.key} failed: ${event.reason}` }
  if (decision.do === 'take' && work.type !== 'retire')
    return then(owe(idle, { take: takeOf(work), isAsked: work.type !== 'take' }, event, env), (next) => then([next, [log]], startNext))
  // Full disk, TPM away: nothing is stated, the report is repeated and the server sends it again.
  if (event.transient) {
    const retry: Effect[] = core.session === null ? [] : [{ do: 'timer', name: 'report', after: Math.round(timing.transientRetry * (1 + env.random())) }]
    return then([idle, [log, ...retry]], startNext)
  }
  const epoch = work.type === 'retire' ? Math.max(core.held.get(work.key)?.current ?? 1, 1) : work.epoch
  return then([idle, [log, say(work, 'failed', epoch, event.reason)]], startNext)
}

/** Reasons that the consumers gave: unlike a full disk they may stay for good, so the server is to know. */
const byConsumer = /^(?:hook|output|consumer)\./

/** The consumers did not take it: tried again with growing pauses; the server hears of it once, after a few attempts. */
const owe = (
  core: Core,
  { take, isAsked }: { readonly take: Take; readonly isAsked: boolean },
  event: { readonly reason: string; readonly transient: boolean },
  env: Environment,
): Next => {
  const attempts = (core.owed.get(take.key)?.attempts ?? 0) + 1
  const after = Math.round(Math.min(timing.consumeCap, timing.consumeBase * 2 ** Math.min(attempts, 20)) * (0.5 + env.random() / 2))
  // Again when the server has asked again since: it may have tried the device anew.
  const isDue = attempts === timing.consumeAttempts || (attempts > timing.consumeAttempts && isAsked)
  const told: Effect[] = isDue && (!event.transient || byConsumer.test(event.reason)) ? [say(take, 'failed', take.epoch, event.reason)] : []
  return [{ ...core, owed: new Map(core.owed).set(take.key, { ...take, attempts }) }, [...told, { do: 'timer', name: 'consume', after }]]
}

const consumeAgain = (core: Core): Next => {
  const waiting = [...core.owed.values()].filter(({ key }) => core.working?.work.key !== key)
  return waiting.reduce<Next>((next, take) => then(next, (before) => queued(before, takeOf(take))), [core, []])
}
