import { toProblem } from '@fleetkey/protocol/problem.ts'
import { alertText, type Deadline } from '../ca/alerts.ts'
import { alertDelivered, raisedAlerts, raiseAlerts, type RaisedAlert } from '../flows/alerts.ts'
import type { Context } from '../flows/context.ts'
import { post, type Webhook } from './webhook.ts'

const second = 1000
/** Between looks at what is due, and at what waits for its receiver. */
const every = { round: 60 * second, delivery: second } as const
/** Pauses after failures: doubled from the first to the longest. */
const pauses = { first: 5 * second, longest: 3_600 * second } as const
/** Failures in a row after which the receiver counts as gone. */
const patience = 5

/** How the receiver stands. `failures`: in a row; `since`: when the first of them was. */
export interface WebhookHealth {
  readonly host: string
  readonly failures: number
  readonly since: number | null
  readonly error: string | null
  readonly isDead: boolean
  readonly waiting: number
}

export interface AlertService {
  start(): void
  /** Looks now at what is due, then sends what waits and may be sent. */
  round(): Promise<void>
  /** Null when no webhook is configured. */
  health(): WebhookHealth | null
  /** Sends a message of type `test` now. Null when it was taken; otherwise why not. Undefined without a webhook. */
  test(): Promise<string | null | undefined>
  stop(): Promise<void>
}

/** The body of a message (Standard Webhooks: `type`, `timestamp`, `data`). */
const bodyOf = (tenant: string, alert: RaisedAlert): string => {
  const { type, subject, at, mark, certificates, raisedAt } = alert
  const data = { tenant, subject, at: new Date(at).toISOString(), markHours: mark === null ? null : mark / 3_600_000, certificates, text: alertText(alert) }
  return JSON.stringify({ type, timestamp: new Date(raisedAt).toISOString(), data })
}

/**
 * Raises alerts once for each mark and sends them to the webhook, oldest first, one at a time. While the receiver fails nothing is sent but one message after each
 * pause, which grows from 5 seconds to an hour and is spread by a fifth; nothing is lost meanwhile, what waits is durable (at most 1,000).
 */
export const alertService = (
  ctx: Context,
  of: { readonly marks: readonly number[]; readonly webhook: Webhook | undefined; readonly deadlines: () => Promise<readonly Deadline[]> },
): AlertService => {
  const { webhook } = of
  let waiting: RaisedAlert[] | undefined
  /** Of alerts that were refused: others go first, so that one that is never taken holds nobody up. */
  const attempts = new Map<string, number>()
  let failing: { readonly count: number; readonly since: number; readonly error: string; readonly until: number } | null = null
  const stopping = new AbortController()
  let work: Promise<void> = Promise.resolve()
  let [timer, isQueued, lastRound]: [NodeJS.Timeout | undefined, boolean, number] = [undefined, false, Number.NEGATIVE_INFINITY]

  const failed = (error: string): void => {
    const count = (failing?.count ?? 0) + 1
    const pause = Math.min(pauses.longest, pauses.first * 2 ** (count - 1))
    const spread = 0.8 + (0.4 * (ctx.random(1)[0] ?? 0)) / 255
    failing = { count, since: failing?.since ?? ctx.now(), error, until: ctx.now() + pause * spread }
    if (count === 1 || count === patience) ctx.log(`${count === 1 ? '' : 'ALARM: '}webhook: ${error}`)
  }
  const worked = (): void => {
    if (failing !== null) ctx.log('webhook: works again')
    failing = null
  }

  const next = (): RaisedAlert | undefined =>
    waiting?.reduce<RaisedAlert | undefined>(
      (least, one) => (least === undefined || (attempts.get(one.id) ?? 0) < (attempts.get(least.id) ?? 0) ? one : least),
      undefined,
    )

  const deliver = async (to: Webhook): Promise<void> => {
    for (let alert = next(); alert !== undefined && !stopping.signal.aborted && (failing === null || failing.until <= ctx.now()); alert = next()) {
      const { id } = alert
      const error = await post(to, { id, at: ctx.now(), body: bodyOf(ctx.tenant, alert) }, stopping.signal)
      if (stopping.signal.aborted && error !== null) return
      if (error !== null) {
        attempts.set(id, (attempts.get(id) ?? 0) + 1)
        return failed(error)
      }
      worked()
      await alertDelivered(ctx, alert)
      attempts.delete(id)
      waiting = waiting?.filter((one) => one.id !== id)
    }
  }

  const raise = async (): Promise<void> => {
    lastRound = ctx.now()
    await raiseAlerts(ctx, { deadlines: await of.deadlines(), marks: of.marks })
    waiting = (await raisedAlerts(ctx)).filter(({ state }) => state === 'waiting')
  }

  const guarded = async (isDue: boolean): Promise<void> => {
    isQueued = false
    try {
      if (isDue || waiting === undefined || ctx.now() - lastRound >= every.round) await raise()
      if (webhook !== undefined) await deliver(webhook)
    } catch (thrown) {
      ctx.log(`alerts: ${toProblem(thrown).message.slice(0, 500)}`)
    }
  }
  const queue = async (isDue: boolean): Promise<void> => {
    isQueued = true
    work = work.then(async () => await guarded(isDue))
    await work
  }

  return {
    start() {
      timer = setInterval(() => {
        if (!isQueued) void queue(false)
      }, every.delivery)
    },
    round: async () => await queue(true),
    health: () =>
      webhook === undefined
        ? null
        : {
            host: webhook.url.host,
            failures: failing?.count ?? 0,
            since: failing?.since ?? null,
            error: failing?.error ?? null,
            isDead: (failing?.count ?? 0) >= patience,
            waiting: waiting?.length ?? 0,
          },
    async test() {
      if (webhook === undefined) return undefined
      const at = ctx.now()
      const body = JSON.stringify({ type: 'test', timestamp: new Date(at).toISOString(), data: { tenant: ctx.tenant, text: 'a test of the webhook' } })
      const error = await post(webhook, { id: `msg_test_${Buffer.from(ctx.random(12)).toString('hex')}`, at, body }, stopping.signal)
      if (error === null) worked()
      return error
    },
    async stop() {
      stopping.abort()
      clearInterval(timer)
      await work
    },
  }
}
