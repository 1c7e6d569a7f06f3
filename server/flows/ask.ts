import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Attest } from '@fleetkey/protocol/messages.ts'
import type { Context } from './context.ts'
import { messageTo } from './message.ts'
import { selection } from './selection.ts'

/** Milliseconds: a chip with an RSA EK may have to derive it before it can quote. */
const life = 120_000
/** A challenge that was not answered for this long (milliseconds) is taken for lost when there is reason to ask again. */
const patience = 30_000

/**
 * Asks a connected device to attest. One challenge at a time, in the memory of its connection alone: it is worth nothing anywhere else. `offline`: not
 * connected, or through a broker that hides the TLS session.
 */
export const ask = async (ctx: Context, device: DeviceId): Promise<'asked' | 'offline'> => {
  const session = ctx.sessions.of(device)
  if (session === undefined || session.from.exporter === null) return 'offline'
  const at = ctx.now()
  if (session.asked !== null && at - session.asked.at < patience) return 'asked'
  const attest: Attest = { type: 'attest', challenge: ctx.random(16), random: ctx.random(32), selection, ima: null, firmware: null, expires: at + life }
  session.asked = { attest, at }
  const sent = await ctx.bus.send(device, await messageTo(ctx, ctx.authority.roles.delivery, device, attest))
  // A crash here: the challenge is gone with the connection; the device connects again, reports and is asked anew.
  ctx.step('attest.asked')
  return sent === 'offline' ? 'offline' : 'asked'
}
