import { TpmError } from '@fleetkey/tpm2/errors.ts'
import { withPasswords } from '@fleetkey/tpm2/hierarchy.ts'
import { inspectTpm } from '@fleetkey/tpm2/inspect.ts'
import { lockoutText, readLockout } from '@fleetkey/tpm2/lockout.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { SettingsError, type PasswordFiles } from './config.ts'
import { nodeFileSystem } from './filesystem.ts'
import { readPasswords } from './tpm-passwords.ts'
import { explained } from './tpm-trouble.ts'

/** What a command on the TPM came to: for the person who typed it. */
export interface Outcome {
  readonly done: boolean
  readonly text: string
}

/**
 * TPM2_DictionaryAttackLockReset. A wrong lockout password shuts the hierarchy for the recovery time, so that what can be known to be wrong is not tried.
 * Throws SettingsError for an unusable password file, TpmTransportError.
 */
export const resetLockout = async (of: { open(): Promise<Transport>; random(length: number): Uint8Array; tpmAuth: PasswordFiles }): Promise<Outcome> => {
  const passwords = await readPasswords(async (path) => await nodeFileSystem.read(path), of.tpmAuth)
  const transport = await of.open()
  const tpm = new Tpm(transport, { random: (length) => of.random(length), passwords })
  try {
    const { passwordSet } = await inspectTpm(tpm)
    if (passwordSet.lockout && passwords.lockout === undefined) throw new SettingsError('the lockout hierarchy has a password: --lockout-auth-file FILE')
    if (!passwordSet.lockout && passwords.lockout !== undefined) throw new SettingsError('the lockout hierarchy has no password: leave --lockout-auth-file out')
    const before = await tpm.exclusive(async () => await readLockout(tpm))
    await tpm.exclusive(async () => await withPasswords(tpm, async () => await tpm.resetLockout()))
    return { done: true, text: `${before.locked ? 'the lockout is over' : 'the TPM was not in lockout'}; ${before.failures} failures forgotten` }
  } catch (thrown) {
    if (!(thrown instanceof TpmError)) throw thrown
    if (thrown.wrongPassword === 'lockout')
      return { done: false, text: `wrong lockout password; ${lockoutText({ ...(await readLockout(tpm)), locked: false })}` }
    const error = await explained(tpm, of.tpmAuth, thrown)
    return { done: false, text: error instanceof Error ? error.message : String(error) }
  } finally {
    for (const secret of Object.values(passwords)) secret.destroy()
    await transport.close().catch(() => undefined)
  }
}
