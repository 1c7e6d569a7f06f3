import { handle as known } from './constants.ts'
import { templates } from './templates.ts'
import type { Tpm } from './tpm.ts'

/**
 * Runs `work` in a session of its own when a password of a hierarchy is needed before there is an endorsement key to salt a session to. The session is salted
 * to a key of the null hierarchy, which nobody has set a password for: who only listens on the bus gets nothing to try passwords against. Needs a free slot;
 * leaves nothing loaded.
 */
export const withPasswords = async <R>(tpm: Tpm, work: () => Promise<R>): Promise<R> => {
  const needed = (['owner', 'endorsement', 'lockout'] as const).some((name) => tpm.hasPassword(name))
  if (tpm.isProtected || !needed) return await work()
  const salter = await tpm.createPrimary(known.null, templates.srk)
  try {
    await tpm.protect(salter)
  } finally {
    await tpm.flush(salter.handle)
  }
  try {
    return await work()
  } finally {
    await tpm.unprotect()
  }
}
