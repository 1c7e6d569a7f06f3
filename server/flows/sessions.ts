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
  /** Notes a contact that its device's record does not have yet. */
  hear(device: DeviceId, contact: Contact): void
  /** The contacts that were noted, up to so many; they are the caller's now. */
  heard(max: number): readonly (readonly [DeviceId, Contact])[]
}

export const liveSessions = (): Sessions => {
  const live = new Map<string, LiveSession>()
  const contacts = new Map<DeviceId, Contact>()
  return {
    open(from, nonce) {
      const session: LiveSession = { from, nonce, asked: null, ima: null, resetCount: null, withheld: null, places: new Set() }
      live.set(from.client, session)
      return session
    },
    close(from) {
      // A newer connection of the same device has taken its place.
      if (live.get(from.client)?.from.connection === from.connection) live.delete(from.client)
    },
    of: (device) => live.get(device),
    devices: () => [...live.values()].flatMap(({ from }) => (from.device === null ? [] : [from.device])),
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
 * second; a connection that was being admitted while its CA was revoked is found here.
 */
export const endSessions = async (ctx: Context): Promise<void> => {
  const now = ctx.now()
  for (const id of ctx.sessions.devices()) {
    const certificate = ctx.sessions.of(id)?.from.certificate
    if (certificate === undefined) continue
    if (certificate.notAfter < now) await ctx.bus.kick(id, 'its certificate has run out')
    else if (ctx.authority.retired.has(certificate.issuer)) await ctx.bus.kick(id, 'the CA of its certificate counts no more')
  }
}
