import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toProblem, type Problem } from '@fleetkey/protocol/problem.ts'
import type { Base } from './context.ts'
import { callerName, isAudited, markAudited, refuse, type Intent } from './perform.ts'

/** A device's record takes a refusal at most this often: whoever knows its public EK could otherwise fill the disk with them. */
const every = 5_000

/**
 * Audits a refusal of a peer that is known only by what it presents (an EK of the manifest), and keeps the reason on the device's
 * record for `device show`. Bounded: one entry per device in five seconds, what exceeds it is counted.
 */
export const refuseKnown = async (ctx: Base, device: DeviceId, intent: Intent, problem: Problem): Promise<void> => {
  if (isAudited(problem) || problem.code === 'unavailable') return
  markAudited(problem)
  const row = await ctx.store.get('device', device)
  const at = ctx.now()
  if (row === undefined || (row.lastRefusal !== null && Math.abs(at - row.lastRefusal.at) < every)) return ctx.refusals.count(intent, problem, at)
  const reason = (problem.reason ?? problem.code).slice(0, 100)
  const verdict = await ctx.store.commit(
    {
      writes: [{ table: 'device', do: 'update', row: { ...row, lastRefusal: { at, code: problem.code, reason } } }],
      entries: [
        {
          at,
          caller: callerName(intent.caller),
          from: intent.caller.from,
          action: intent.action,
          subject: device,
          outcome: 'refused',
          code: problem.code,
          detail: `${reason}: ${problem.message}`.slice(0, 2000),
        },
      ],
    },
    { reserved: true },
  )
  // Somebody changed the device meanwhile: its record is fresher than this refusal.
  if (!verdict.committed) ctx.refusals.count(intent, problem, at)
}

/** Runs what a device asks for; its refusal is audited, and kept on the record of the device once `known` says whose hardware or key it is. */
export const auditedFor = async <R>(ctx: Base, intent: Intent, known: { device: DeviceId | null }, work: () => Promise<R>): Promise<R> => {
  try {
    return await work()
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (known.device !== null) await refuseKnown(ctx, known.device, intent, problem)
    else if (problem.code !== 'unavailable') await refuse(ctx, intent, problem)
    throw problem
  }
}
