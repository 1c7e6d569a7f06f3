import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Attest, BodyOf } from '@fleetkey/protocol/messages.ts'
import type { ImaProgress } from '../attestation/ima.ts'
import type { Context, DeviceRef } from './context.ts'

/** What a device was asked. `ima`: where the list that it is asked for goes on; `rest`: only because a list was longer than what its quote covered. */
export interface Question {
  readonly attest: Attest
  readonly at: number
  readonly ima: ImaProgress
  readonly rest: boolean
}

/** What the server remembers of one connection of a device with identity; gone when it closes. A restart forgets all of it, and nobody misses it. */
export interface LiveSession {
  readonly from: DeviceRef
  /** The nonce of its welcome. */
  readonly nonce: Uint8Array
  /** The one challenge that waits for evidence; spent by the first answer to it. */
  asked: Question | null
  /** How far the measurement list has come that is being fetched in several rounds; null when none is. */
  ima: ImaProgress | null
  /** resetCount of the first report of this connection. */
  resetCount: number | null
  /** The newest report whose difference was withheld until the device has attested. */
  withheld: BodyOf<'report'> | null
  /** It could not open what was wrapped to the recipient key on record: `wanted`, a new one is asked for, once per connection; null: it did not say so. */
  recipient: 'wanted' | 'given' | null
  /** Places that it has labels for, as it reported or as they were sent to it (`seatName`). */
  places: Set<string>
}

/** When a device was heard last, and what its agent calls itself. */
export interface Contact {
  readonly at: number
  readonly agent: string
}

/** Live connections by device. */
export interface Sessions {
  open(from: DeviceRef, nonce: Uint8Array): LiveSession
  close(from: DeviceRef): void
  of(device: DeviceId): LiveSession | undefined
  /** Devices that are connected now. */
  devices(): readonly DeviceId[]
  /** Devices whose connection outlives its certificate: those that end before `now`, milliseconds. */
  outlasted(now: number): readonly DeviceId[]
  /** Devices whose connection began since this was last asked; all that are connected where `retired` is another set than then. */
  unjudged(retired: ReadonlySet<string>): readonly DeviceId[]
  /** Notes a contact that its device's record does not have yet. */
  hear(device: DeviceId, contact: Contact): void
  /** The contacts that were noted, up to so many; they are the caller's now. */
  heard(max: number): readonly (readonly [DeviceId, Contact])[]
}

const minuteLong = 60_000
const devicesOf = (sessions: Iterable<LiveSession>): readonly DeviceId[] => [...sessions].flatMap(({ from }) => (from.device === null ? [] : [from.device]))

export const liveSessions = (): Sessions => {
  const live = new Map<string, LiveSession>()
  /** Connections by the minute in which their certificate ends: who is due is found without looking at everybody. */
  const ends = new Map<number, Set<LiveSession>>()
  let judged: { readonly retired: ReadonlySet<string> | undefined; readonly since: Set<LiveSession> } = { retired: undefined, since: new Set() }
  const contacts = new Map<DeviceId, Contact>()
  const minuteOf = ({ from }: LiveSession): number | undefined =>
    from.certificate === undefined ? undefined : Math.floor(from.certificate.notAfter / minuteLong)
  const forget = (session: LiveSession): void => {
    live.delete(session.from.client)
    judged.since.delete(session)
    const minute = minuteOf(session)
    if (minute === undefined) return
    const sessions = ends.get(minute)
    sessions?.delete(session)
    if (sessions?.size === 0) ends.delete(minute)
  }

  return {
    open(from, nonce) {
      const session: LiveSession = { from, nonce, asked: null, ima: null, resetCount: null, withheld: null, recipient: null, places: new Set() }
      const older = live.get(from.client)
      if (older !== undefined) forget(older)
      live.set(from.client, session)
      judged.since.add(session)
      const minute = minuteOf(session)
      if (minute !== undefined) ends.set(minute, (ends.get(minute) ?? new Set()).add(session))
      return session
    },
    close(from) {
      const session = live.get(from.client)
      // A newer connection of the same device has taken its place.
      if (session?.from.connection === from.connection) forget(session)
    },
    of: (device) => live.get(device),
    devices: () => devicesOf(live.values()),
    outlasted(now) {
      const due = [...ends].flatMap(([minute, sessions]) => (minute * minuteLong > now ? [] : [...sessions]))
      return devicesOf(due.filter(({ from }) => from.certificate !== undefined && from.certificate.notAfter < now))
    },
    unjudged(retired) {
      const unjudged = judged.retired === retired ? judged.since : live.values()
      judged = { retired, since: new Set() }
      return devicesOf(unjudged)
    },
    hear: (device, contact) => void contacts.set(device, contact),
    heard(max) {
      const some = [...contacts.entries().take(max)]
      for (const [device] of some) contacts.delete(device)
      return some
    },
  }
}

/**
 * A connection lasts no longer than its certificate, and than the CA behind it counts: whoever has not renewed in time is cut, and proves itself anew. Run every
 * second; a connection that was being admitted while its CA was revoked is found here. It costs what is due, not what is connected.
 */
export const endSessions = async (ctx: Context): Promise<void> => {
  const { retired } = ctx.authority
  for (const id of ctx.sessions.outlasted(ctx.now())) await ctx.bus.kick(id, 'its certificate has run out')
  for (const id of ctx.sessions.unjudged(retired)) {
    const issuer = ctx.sessions.of(id)?.from.certificate?.issuer
    if (issuer !== undefined && retired.has(issuer)) await ctx.bus.kick(id, 'the CA of its certificate counts no more')
  }
}
