import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { Attest, FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import { fromBoot, type ImaProgress } from '../attestation/ima.ts'
import { hasIdentity, isMeasured } from '../fleet/device.ts'
import { isOutdated } from '../fleet/firmware.ts'
import { firmwareOf } from './approvals.ts'
import type { Context } from './context.ts'
import { imaSelection, progressOf } from './measured.ts'
import { policyOf } from './membership.ts'
import { messageTo } from './message.ts'
import { selection } from './selection.ts'

/** Milliseconds: a chip with an RSA EK may have to derive it before it can quote. */
const life = 120_000
/** A challenge that was not answered for this long (milliseconds) is taken for lost when there is reason to ask again. */
const patience = 30_000

/** What is wanted besides a quote. */
interface Wanted {
  /** The policy that a new recipient key has to be made under; null while the one on record is under the policy of now. */
  readonly firmware: FirmwarePolicy | null
  /** Where the measurement list goes on; null where policy wants none. */
  readonly ima: ImaProgress | null
}

const wantedOf = async (ctx: Context, id: DeviceId): Promise<Wanted> => {
  const device = await ctx.store.get('device', id)
  if (!hasIdentity(device)) return { firmware: null, ima: null }
  const [{ policy, authPolicy }, { ima }] = await Promise.all([firmwareOf(ctx, device.model), policyOf(ctx, id)])
  const isLost = isMeasured(device) && ctx.sessions.of(id)?.recipient === 'wanted'
  return { firmware: isLost || isOutdated(device, authPolicy) ? policy : null, ima: ima === 'ignored' ? null : progressOf(device) }
}

/**
 * Asks a connected device to attest. One challenge at a time, in the memory of its connection alone: it is worth nothing anywhere else. `offline`: not
 * connected, or through a broker that hides the TLS session. `rest`: only for what a list had behind the quoted PCR 10.
 */
export const ask = async (ctx: Context, device: DeviceId, rest = false): Promise<'asked' | 'offline'> => {
  const { firmware, ima } = await wantedOf(ctx, device)
  const session = ctx.sessions.of(device)
  if (session === undefined || session.from.exporter === null) return 'offline'
  const at = ctx.now()
  const asked = session.asked?.attest
  // What is on its way counts, unless it does not ask for the new recipient key or the measurement list that is wanted now.
  const enough = asked !== undefined && (firmware === null || asked.firmware !== null) && (ima === null || asked.ima !== null)
  if (enough && session.asked !== null && at - session.asked.at < patience) return 'asked'
  const from = ima === null ? null : (session.ima ?? ima)
  const attest: Attest = {
    type: 'attest',
    challenge: ctx.random(16),
    random: ctx.random(32),
    selection: from === null ? selection : imaSelection,
    ima: from?.entries ?? null,
    firmware,
    expires: at + life,
  }
  session.asked = { attest, at, ima: from ?? fromBoot, rest }
  const sent = await ctx.bus.send(device, await messageTo(ctx, ctx.authority.roles.delivery, device, attest))
  // A crash here: the challenge is gone with the connection; the device connects again, reports and is asked anew.
  ctx.step('attest.asked')
  return sent === 'offline' ? 'offline' : 'asked'
}
