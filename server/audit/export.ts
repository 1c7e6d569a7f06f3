import { z } from 'zod'
import type { SequencedEntry } from './entry.ts'

/**
 * The export: JSON lines. First `{"format":"fleetkey/audit/1"}`, then one line per entry in order (hashes in hex), last
 * `{"checkpoint":"…"}` with the signed note about exactly these entries.
 */
export const exportHeader = '{"format":"fleetkey/audit/1"}\n'

/** One entry as a line, with its newline. */
export const exportLine = (entry: SequencedEntry): string => {
  const { sequence, at, caller, from, action, subject, outcome, code, detail } = entry
  const hashes = { previous: Buffer.from(entry.previous).toString('hex'), chain: Buffer.from(entry.chain).toString('hex') }
  return `${JSON.stringify({ sequence, at, caller, from, action, subject, outcome, code, detail, ...hashes })}\n`
}

/** The last line. `note`: signed checkpoint whose size is the number of entries before it. */
export const exportFooter = (note: string): string => `${JSON.stringify({ checkpoint: note })}\n`

const hash = z
  .string()
  .regex(/^[0-9a-f]{64}$/)
  .transform((hex) => new Uint8Array(Buffer.from(hex, 'hex')))

const Line = z.strictObject({
  sequence: z.int().min(1),
  at: z.number(),
  caller: z.string(),
  from: z.string(),
  action: z.string(),
  subject: z.string(),
  outcome: z.enum(['done', 'refused']),
  code: z.string().nullable(),
  detail: z.string(),
  previous: hash,
  chain: hash,
})

const Header = z.strictObject({ format: z.literal('fleetkey/audit/1') })
const Footer = z.strictObject({ checkpoint: z.string() })

/** A line that cannot be read, 1-based. */
export class ExportError extends Error {
  readonly line: number

  constructor(line: number, what: string) {
    super(`line ${line}: ${what}`)
    this.line = line
  }
}

const readLine = <T>(schema: z.ZodType<T>, text: string | undefined, at: { readonly line: number; readonly what: string }): T => {
  let value: unknown
  try {
    value = JSON.parse(text ?? '')
  } catch {
    value = undefined
  }
  const parsed = schema.safeParse(value)
  if (!parsed.success) throw new ExportError(at.line, `not ${at.what}`)
  return parsed.data
}

/** What an export holds. Entries are parsed as they are walked; a line that cannot be read throws ExportError then. */
export const readExport = (content: string): { readonly checkpoint: string; readonly entries: Iterable<SequencedEntry> } => {
  const lines = content.split('\n')
  if (lines.at(-1) === '') lines.pop()
  readLine(Header, lines[0], { line: 1, what: 'the header of an audit export (fleetkey/audit/1)' })
  const { checkpoint } = readLine(Footer, lines.at(-1), { line: lines.length, what: 'a checkpoint: the export is cut off' })
  return {
    checkpoint,
    entries: {
      *[Symbol.iterator]() {
        for (let at = 1; at < lines.length - 1; at++) yield readLine(Line, lines[at], { line: at + 1, what: 'an audit entry' })
      },
    },
  }
}
