import type { BetterSQLite3Database } from 'drizzle-orm/better-sqlite3'
import { decode } from '@fleetkey/protocol/cbor.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { chainHash, extend, type LogHead } from '../../audit/chain.ts'
import type { AuditEntry, SequencedEntry } from '../../audit/entry.ts'
import { frontierLength } from '../../audit/tree.ts'
import { compile } from './compiled.ts'
import type { Connection } from './database.ts'
import { asc, eq, gt, sql } from './drizzle.ts'
import { auditHead, auditLog } from './schema.ts'

/** The log in the database. Numbering, chain and tree are written in the transaction of the commit they belong to. */
export interface LogStatements {
  readonly head: () => LogHead
  /** Appends behind `head` and returns the new one; `save` puts it into the same transaction. */
  readonly append: (head: LogHead, entry: AuditEntry) => LogHead
  readonly save: (head: LogHead) => void
  readonly page: (after: number, limit: number) => readonly SequencedEntry[]
}

const damaged = (what: string): Problem => new Problem('internal', `the audit log is damaged: ${what}`, { reason: 'store.audit' })

/** Bytes of their own: a Buffer of the database would share memory when it is sliced. */
const plain = (buffer: Uint8Array): Uint8Array => Uint8Array.from(buffer)

/** What the bytes say, wrong or not: whether it is the true entry is for verification to tell, which must see it. */
const readEntry = (sequence: number, bytes: Uint8Array): Omit<SequencedEntry, 'chain'> => {
  try {
    return decode(plain(bytes)) as Omit<SequencedEntry, 'chain'>
  } catch {
    throw damaged(`entry ${sequence} cannot be read`)
  }
}

export const logStatements = (connection: Connection, db: BetterSQLite3Database): LogStatements => {
  const insert = compile(
    connection,
    db.insert(auditLog).values({ sequence: sql.placeholder('sequence'), bytes: sql.placeholder('bytes'), chain: sql.placeholder('chain') }),
  )
  const update = db
    .update(auditHead)
    .set({ sequence: sql.placeholder('sequence'), chain: sql.placeholder('chain'), frontier: sql.placeholder('frontier') } as never)
    .where(eq(auditHead.id, 1))
    .prepare()
  const page = db
    .select()
    .from(auditLog)
    .where(gt(auditLog.sequence, sql.placeholder('after')))
    .orderBy(asc(auditLog.sequence))
    .limit(sql.placeholder('limit'))
    .prepare()

  const head = (): LogHead => {
    const row = db.select().from(auditHead).get()
    if (row === undefined) throw damaged('its head is missing')
    const { sequence } = row
    const chain = plain(row.chain)
    const frontier = Array.from({ length: row.frontier.length / 32 }, (_, at) => plain(row.frontier.subarray(at * 32, at * 32 + 32)))
    if (frontier.length !== frontierLength(sequence)) throw damaged(`its tree is not one of ${sequence} entries`)
    return { sequence, chain, tree: { size: sequence, frontier } }
  }

  return {
    head() {
      const found = head()
      // The last entry only: `audit verify` derives the whole log again.
      const [last, beyond] = page.all({ after: Math.max(0, found.sequence - 1), limit: 2 })
      if ((found.sequence === 0 ? last : beyond) !== undefined) throw damaged(`there are entries after ${found.sequence}, its last`)
      if (found.sequence > 0 && (last?.sequence !== found.sequence || Buffer.compare(chainHash(last.bytes), found.chain) !== 0))
        throw damaged(`entry ${found.sequence} is not the one its head was made for`)
      return found
    },
    append(before, entry) {
      const { sequenced, bytes, head: next } = extend(before, entry)
      insert.run({ sequence: sequenced.sequence, bytes, chain: sequenced.chain })
      return next
    },
    save({ sequence, chain, tree }) {
      update.run({ sequence, chain: Buffer.from(chain), frontier: Buffer.concat(tree.frontier) })
    },
    page: (after, limit) =>
      page.all({ after, limit }).map(({ sequence, bytes, chain }) => {
        return { ...readEntry(sequence, bytes), chain: plain(chain) }
      }),
  }
}
