import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { authorise, type Action } from '../access/authorise.ts'
import type { Caller } from '../access/caller.ts'
import type { Base, Changes, Table, Tables, Write } from './context.ts'
import { concernsLedger, ledgerOf } from './ledger.ts'

/** Caller + action + subject. */
export interface Intent {
  readonly caller: Caller
  readonly action: Action
  readonly subject: string
  /** What the audit entry says besides; set further by `tx.note`. */
  readonly detail?: string
}

/** Collects the rows of one commit; nothing is written before perform commits. */
export interface Transaction {
  insert<T extends Table>(table: T, row: Omit<Tables[T], 'version'> & { version?: number }): void
  /** `row.version` is the version that was read: the commit is refused if somebody was faster. */
  update<T extends Table>(table: T, row: Tables[T]): void
  /** The row stays as it is, and the commit is refused if somebody changed it meanwhile. Any number of times for one row that this commit does not write. */
  touch<T extends Table>(table: T, row: Tables[T]): void
  remove<T extends Table>(table: T, row: Tables[T]): void
  note(detail: string): void
}

const attempts = 8

/** Acts that a full disk must not hold up: they may use the store's reserve. */
const reserved: ReadonlySet<Action> = new Set([
  'device.revoke',
  'device.suspend',
  'batch.revoke',
  'batch.suspend',
  'station.revoke',
  'station.suspend',
  'ca.suspend',
  'ca.revoke',
  'operator.remove',
  'seal.unseal',
])

/** Refusals that have their audit entry: a refusal that passes several doors on its way out is written once. */
const audited = new WeakSet<Problem>()
export const isAudited = (problem: Problem): boolean => audited.has(problem)
export const markAudited = (problem: Problem): void => void audited.add(problem)

/** `operator:alice`; `unidentified:192.0.2.0/24` */
export const callerName = (caller: Caller): string => `${caller.kind}:${caller.id}`

class Collected implements Transaction {
  readonly writes: Write[] = []
  readonly notes: string[] = []
  #touched: Set<string> | undefined

  insert<T extends Table>(table: T, row: Omit<Tables[T], 'version'> & { version?: number }): void {
    this.writes.push({ table, do: 'insert', row: { ...row, version: 0 } } as unknown as Write)
  }

  update<T extends Table>(table: T, row: Tables[T]): void {
    this.writes.push({ table, do: 'update', row } as unknown as Write)
  }

  touch<T extends Table>(table: T, row: Tables[T]): void {
    const name = `${table}/${row.id}`
    this.#touched ??= new Set()
    if (this.#touched.has(name)) return
    this.#touched.add(name)
    this.update(table, row)
  }

  remove<T extends Table>(table: T, row: Tables[T]): void {
    this.writes.push({ table, do: 'delete', id: row.id, version: row.version } as Write)
  }

  note(detail: string): void {
    this.notes.push(detail)
  }
}

/**
 * The one door to every write: authorises, collects the change, commits it together with its audit entry; audits the refusal otherwise.
 * `change` reads what it needs from the store and is run again when somebody else was faster, so it must be harmless to repeat
 * (slow or remote work belongs before `perform`). Throws Problem: what `change` threw, `forbidden`, or `conflict` after eight losses.
 */
export const perform = async <R>(ctx: Base, intent: Intent, change: (tx: Transaction) => Promise<R> | R): Promise<R> => {
  try {
    authorise(intent.caller, intent.action)
    for (let attempt = 1; ; attempt++) {
      const tx = new Collected()
      const result = await change(tx)
      const ledger = tx.writes.some(concernsLedger) ? await ledgerOf(ctx, tx.writes) : []
      const verdict = await ctx.store.commit(changesOf(ctx, intent, [...tx.writes, ...ledger], tx.notes), { reserved: reserved.has(intent.action) })
      if (verdict.committed) return result
      const { table, id, why, field } = verdict.conflict
      if (why === 'unique' || why === 'exists' || attempt === attempts)
        throw new Problem('conflict', `${table} ${id}: ${why}${field === undefined ? '' : ` ${field}`}`, { reason: `conflict.${table}.${field ?? why}` })
    }
  } catch (thrown) {
    const problem = toProblem(thrown)
    if (problem.code !== 'unavailable') await refuse(ctx, intent, problem)
    throw problem
  }
}

const changesOf = (ctx: Base, intent: Intent, writes: readonly Write[], notes: readonly string[]): Changes => ({
  writes,
  entries: [
    {
      at: ctx.now(),
      caller: callerName(intent.caller),
      from: intent.caller.from,
      action: intent.action,
      subject: intent.subject,
      outcome: 'done',
      code: null,
      detail: [...(intent.detail === undefined ? [] : [intent.detail]), ...notes].join('; '),
    },
  ],
})

/**
 * Audits a refusal. Peers without identity are counted and summarised (access/refusals.ts) so that a flood of them
 * cannot fill the disk; everybody else's refusal is an entry of its own.
 */
export const refuse = async (ctx: Base, intent: Intent, problem: Problem): Promise<void> => {
  if (isAudited(problem)) return
  markAudited(problem)
  if (intent.caller.kind === 'unidentified') {
    ctx.refusals.count(intent, problem, ctx.now())
    return
  }
  await ctx.store.commit(
    {
      writes: [],
      entries: [
        {
          at: ctx.now(),
          caller: callerName(intent.caller),
          from: intent.caller.from,
          action: intent.action,
          subject: intent.subject,
          outcome: 'refused',
          code: problem.code,
          detail: [...(problem.reason === undefined ? [] : [problem.reason]), problem.message].join(': ').slice(0, 2000),
        },
      ],
    },
    { reserved: true },
  )
}
