import { toProblem } from '@fleetkey/protocol/problem.ts'
import type { Context } from '../flows/context.ts'
import { sweepEnrolments } from '../flows/enrol.ts'
import { renewRoles } from '../flows/own-certificates.ts'
import { followAll } from '../flows/group-query.ts'
import { perform } from '../flows/perform.ts'
import { destroyEpochs } from '../flows/old-epochs.ts'
import { drive } from '../flows/drive.ts'
import { unfinishedCampaigns } from '../flows/campaign.ts'
import { rotateWhatIsDue } from '../flows/rotate-due.ts'
import { findAll } from '../flows/rows.ts'
import { storeContacts } from '../flows/contacts.ts'
import { endSessions } from '../flows/sessions.ts'
import { settleOverdue } from '../flows/settle.ts'

const every = { tick: 1000, retry: 5000, contacts: 10_000, minute: 60_000 } as const

/**
 * Wakes what is due: campaigns (on an event, and when their next deadline passes), sweeps, the summary of refusals. It decides nothing; every flow it calls
 * is harmless to repeat. `wake` may be called before `start`.
 */
export const clock = (): {
  readonly wake: (campaign: string) => void
  /** `chores`: what else is looked at every minute, by what it is called. */
  readonly start: (ctx: Context, chores?: Readonly<Record<string, () => Promise<unknown>>>) => { stop(): Promise<void> }
} => {
  const due = new Map<string, number>()
  const awake = new Set<string>()
  let nudge: (() => void) | undefined
  return {
    wake(campaign) {
      awake.add(campaign)
      nudge?.()
    },
    start(ctx, chores = {}) {
      let running: Promise<void> = Promise.resolve()
      let stopped = false
      let queued = false
      // The first round sweeps as well: it finishes what a crash has left.
      let lastMinute = Number.NEGATIVE_INFINITY
      let isFirst = true
      let owed: ReadonlySet<string> = new Set()
      let paying: Promise<void> | undefined
      let lastContacts = Number.NEGATIVE_INFINITY
      const guarded = async (what: string, work: () => Promise<unknown>): Promise<void> => {
        try {
          await work()
        } catch (thrown) {
          ctx.log(`${what}: ${toProblem(thrown).message.slice(0, 1000)}`)
        }
      }
      const driveOne = async (id: string): Promise<void> => {
        awake.delete(id)
        // Should this fail, on a full disk say, it is asked again: nothing else may happen that would wake it.
        due.set(id, ctx.now() + every.retry)
        await guarded(`campaign ${id}`, async () => {
          const until = await drive(ctx, id)
          if (until === null) due.delete(id)
          else due.set(id, until)
        })
      }
      const round = async (): Promise<void> => {
        queued = false
        await guarded('sessions', async () => await endSessions(ctx))
        for (const id of awake) if (!stopped) await driveOne(id)
        for (const [id, at] of due) if (!stopped && at <= ctx.now()) await driveOne(id)
        if (ctx.now() - lastContacts >= every.contacts) {
          lastContacts = ctx.now()
          await guarded('contacts', async () => await storeContacts(ctx))
        }
        if (stopped || ctx.now() - lastMinute < every.minute) return
        lastMinute = ctx.now()
        if (isFirst) await guarded('groups', async () => await followAll(ctx))
        isFirst = false
        await guarded('sweep', async () => await sweepEnrolments(ctx))
        // Beside the rounds: a fleet to be judged anew takes longer than one, and whoever is at it is waited for.
        paying ??= guarded('owed', async () => void (owed = await settleOverdue(ctx, owed))).finally(() => (paying = undefined))
        await guarded('epochs', async () => {
          for (const { id } of await findAll(ctx.store, 'key')) {
            await guarded(`rotation of ${id}`, async () => await rotateWhatIsDue(ctx, id))
            await destroyEpochs(ctx, id)
          }
        })
        await guarded('certificates of message keys', async () => await renewRoles(ctx))
        for (const [what, work] of Object.entries(chores)) await guarded(what, work)
        await guarded('refusals', async () => await summarise(ctx))
      }
      const soon = (): void => {
        if (queued || stopped) return
        queued = true
        running = running.then(round)
      }
      // Events come in bursts: one round serves many.
      let burst: NodeJS.Timeout | undefined
      nudge = () => {
        burst ??= setTimeout(() => {
          burst = undefined
          soon()
        }, 25)
      }
      const timer = setInterval(soon, every.tick)
      void guarded('campaigns', async () => {
        for (const id of await unfinishedCampaigns(ctx)) awake.add(id)
        soon()
      })
      return {
        async stop() {
          stopped = true
          nudge = undefined
          clearInterval(timer)
          clearTimeout(burst)
          await running
          await paying
          await guarded('contacts', async () => await storeContacts(ctx))
          await guarded('refusals', async () => await summarise(ctx))
        },
      }
    },
  }
}

/** Refusals of peers without identity, as one bounded entry a minute. */
const summarise = async (ctx: Context): Promise<void> => {
  const summary = ctx.refusals.take()
  if (summary === undefined) return
  await perform(
    ctx,
    { caller: { kind: 'system', id: 'refusals', from: 'server' }, action: 'audit.summary', subject: 'unidentified', detail: summary },
    () => undefined,
  )
}
