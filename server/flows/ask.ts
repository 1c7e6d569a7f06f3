import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Attest, FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import { hasIdentity } from '../fleet/device.ts'
import { isOutdated } from '../fleet/firmware.ts'
import { firmwareOf } from './approvals.ts'
import type { Context } from './context.ts'
import { messageTo } from './message.ts'
import { selection } from './selection.ts'

/** Milliseconds: a chip with an RSA EK may have to derive it before it can quote. */
const life = 120_000
/** A challenge that was not answered for this long (milliseconds) is taken for lost when there is reason to ask again. */
const patience = 30_000

/** The policy that a new recipient key has to be made under; null while the one on record is under the policy of now. */
const firmwareAsked = async (ctx: Context, id: DeviceId): Promise<FirmwarePolicy | null> => {
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) return null
  const { policy, authPolicy } = await firmwareOf(ctx, device.model)
  return isOutdated(device, authPolicy) ? policy : null
}

/**
 * Asks a connected device to attest. One challenge at a time, in the memory of its connection alone: it is worth nothing anywhere else. `offline`: not
 * connected, or through a broker that hides the TLS session.
 */
export const ask = async (ctx: Context, device: DeviceId): Promise<'asked' | 'offline'> => {
  const firmware = await firmwareAsked(ctx, device)
  const session = ctx.sessions.of(device)
  if (session === undefined || session.from.exporter === null) return 'offline'
  const at = ctx.now()
  // What is on its way counts, unless it does not ask for the new recipient key that is wanted now.
  const waiting = session.asked !== null && (firmware === null || session.asked.attest.firmware !== null)
  if (waiting && session.asked !== null && at - session.asked.at < patience) return 'asked'
  const attest: Attest = { type: 'attest', challenge: ctx.random(16), random: ctx.random(32), selection, ima: null, firmware, expires: at + life }
  session.asked = { attest, at }
  const sent = await ctx.bus.send(device, await messageTo(ctx, ctx.authority.roles.delivery, device, attest))
  // A crash here: the challenge is gone with the connection; the device connects again, reports and is asked anew.
  ctx.step('attest.asked')
  return sent === 'offline' ? 'offline' : 'asked'
}
