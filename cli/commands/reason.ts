import { revocationReasons, type RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'
import { required, text, UsageError, type Invocation } from '../command.ts'

/** `--reason TEXT [--code CODE]` of every revocation. */
export const reasonOptions = { reason: { type: 'string' }, code: { type: 'string' } } as const

/** What they say: the words, and the reason of RFC 5280, which may stand as the words themselves (`--reason keyCompromise`). */
export const reasonOf = (call: Invocation): { reason: string; code?: RevocationReason } => {
  const reason = required(text(call, 'reason'), '--reason TEXT')
  const given = text(call, 'code')
  const code = revocationReasons.find((name) => name.toLowerCase() === given?.toLowerCase())
  if (given !== undefined && code === undefined) throw new UsageError(`--code takes ${revocationReasons.join(', ')}, not ${given}`)
  return code === undefined ? { reason } : { reason, code }
}
