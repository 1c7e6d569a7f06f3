import { endorsementReasons } from './reasons/endorsement.ts'
import { idevidReasons } from './reasons/idevid.ts'
import { keyReasons } from './reasons/keys.ts'
import { logReasons } from './reasons/log.ts'
import { protocolReasons } from './reasons/protocol.ts'
import { quoteReasons } from './reasons/quote.ts'
import { tokenReasons } from './reasons/token.ts'
import type { ReasonTable } from './reasons/reason.ts'

const sections: readonly (readonly [string, ReasonTable])[] = [
  ['EK certificate and its chain', endorsementReasons],
  ['IDevID certificate and its chain', idevidReasons],
  ['Tokens, and keys in software', tokenReasons],
  ['Public areas of keys', keyReasons],
  ['Quote, certifications, counters', quoteReasons],
  ['Event log and measurement list', logReasons],
  ['Conversation, identity, firmware', protocolReasons],
]

const cell = (text: string): string => text.replaceAll('|', '\\|')

/** The table of reasons as docs/attestation.md has it: code, numbers of the acceptance list, meaning, attack, remedy. */
export const reasonsMarkdown = (): string =>
  sections
    .map(([title, table]) => {
      const rows = Object.entries(table).map(
        ([code, { cases, meaning, attack, remedy }]) => `| \`${code}\` | ${cases.join(', ') || '–'} | ${cell(meaning)} | ${cell(attack)} | ${cell(remedy)} |`,
      )
      return [`### ${title}`, '', '| code | case | meaning | attack | remedy |', '|---|---|---|---|---|', ...rows].join('\n')
    })
    .join('\n\n')
