import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'
import { algorithmsOf, banksOf, commandsOf, curvesOf, missingIn } from '@fleetkey/tpm2/capabilities.ts'
import { OtherEk, rc, TpmError, TpmTransportError } from '@fleetkey/tpm2/errors.ts'
import { lockoutText, readLockout } from '@fleetkey/tpm2/lockout.ts'
import { isCrowded } from '@fleetkey/tpm2/stale.ts'
import type { Tpm } from '@fleetkey/tpm2/tpm.ts'
import type { PasswordFiles } from './config.ts'

/** What a TPM refused, told to the person who runs the machine: what it means and what to do. `cause`: the refusal itself. */
export class TpmTrouble extends Error {
  override readonly name = 'TpmTrouble'
}

/** The TPM is at fault or out of reach, and nothing else. */
export const isTpmTrouble = (thrown: unknown): boolean =>
  [TpmTrouble, TpmError, TpmTransportError, TpmFormatError, OtherEk].some((kind) => thrown instanceof kind)

/** TPM_RC_FAILURE: after a failed self-test nothing but GetCapability and GetTestResult is answered. */
const failureMode = 0x101

const password = (error: TpmError, files: PasswordFiles): string | undefined => {
  const hierarchy = error.wrongPassword
  if (hierarchy === undefined) return undefined
  const file = files[hierarchy]
  const remedy = file === undefined ? `name the file that holds it: "tpmAuth": {"${hierarchy}AuthFile": "…"}` : `the one in ${file} is wrong`
  return `the ${hierarchy} hierarchy of the TPM has a password: ${remedy}`
}

const crowded = (tpm: Tpm): string =>
  tpm.isManaged
    ? 'other programs hold all sessions of the TPM: end them, or look with tpm2_getcap handles-saved-session'
    : 'other programs hold all slots of the TPM: give the agent /dev/tpmrm0, or end them'

/** Asked only after a refusal: each list costs a slow chip a command. */
const lacking = async (tpm: Tpm): Promise<string | undefined> => {
  const missing = missingIn({ commands: await commandsOf(tpm), algorithms: await algorithmsOf(tpm), curves: await curvesOf(tpm), banks: await banksOf(tpm) })
  const needed = missing.filter((one) => one.needed).map((one) => `${one.name} (for ${one.for})`)
  return needed.length === 0 ? undefined : `this TPM does not have ${needed.join(', ')}`
}

const explain = async (tpm: Tpm, files: PasswordFiles, error: TpmError): Promise<string | undefined> => {
  if (error.code === rc.lockout) return lockoutText(await readLockout(tpm))
  if (error.code === failureMode) return 'the TPM is in failure mode after a failed self-test: switch the board off and on; if it stays, the TPM is broken'
  if (isCrowded(error)) return crowded(tpm)
  if (error.is(rc.hierarchy)) return 'the firmware of this machine has switched off a hierarchy of the TPM: enable the TPM in the firmware settings'
  return password(error, files) ?? (await lacking(tpm))
}

/** What was thrown, in plain words where there are any; otherwise as it is. Asks the TPM again for that. */
export const explained = async (tpm: Tpm, files: PasswordFiles, thrown: unknown): Promise<unknown> => {
  if (!(thrown instanceof TpmError)) return thrown
  const text = await tpm.exclusive(async () => await explain(tpm, files, thrown)).catch(() => undefined)
  return text === undefined ? thrown : new TpmTrouble(text, { cause: thrown })
}

/** Runs `work`; what the TPM refuses is thrown in plain words. */
export const inPlainWords = async <R>(tpm: Tpm, files: PasswordFiles, work: () => Promise<R>): Promise<R> => {
  try {
    return await work()
  } catch (thrown) {
    throw await explained(tpm, files, thrown)
  }
}
