import { rc, TpmError } from './errors.ts'
import type { Tpm } from './tpm.ts'

/** First handles of what can be left behind (Part 2 §7.2): loaded objects; loaded sessions of either kind. Saved sessions are never ours. */
const left = { objects: 0x8000_0000, sessions: 0x0200_0000 } as const

/**
 * Starts the TPM if nobody has, and frees what a predecessor that crashed has left loaded. Within `exclusive` only.
 *
 * A raw TPM has three slots each for objects and sessions, and handles outlive whoever made them: whatever is loaded there is taken for a leftover, which is
 * why a raw TPM belongs to the agent alone. Behind a resource manager nothing is left over from others, and the kernel's one hides their objects but lists
 * their sessions: only objects, which are then our own, are flushed.
 */
export const freeStale = async (tpm: Tpm): Promise<void> => {
  await tpm.startup()
  tpm.forgetSession()
  for (const first of tpm.isManaged ? [left.objects] : [left.objects, left.sessions])
    for (const handle of await tpm.handles(first))
      await tpm.flush(handle).catch((thrown: unknown) => {
        if (!(thrown instanceof TpmError)) throw thrown
      })
}

/** Objects or sessions that others have left fill the TPM: on a raw TPM, freeing them helps. */
export const isCrowded = (error: TpmError): boolean =>
  [rc.objectMemory, rc.sessionMemory, rc.memory, rc.sessionHandles, rc.objectHandles].some((code) => code === error.code)
