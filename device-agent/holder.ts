import { dirname } from 'node:path'
import type { ApprovalSet, FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { fromPem } from '@fleetkey/protocol/x509/pem.ts'
import type { KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import type { Attester } from './attesters/attester.ts'
import { idevidAttester } from './attesters/idevid.ts'
import { tokenAttester } from './attesters/token.ts'
import { tpm2Attester, type RecipientFor } from './attesters/tpm2.ts'
import { openBoundKeys } from './bound-keys.ts'
import { SettingsError, type Settings } from './config.ts'
import type { Document } from './files.ts'
import type { FileSystem } from './filesystem.ts'
import { privateKeyOf, softwareSecureElement, type SecureElement } from './secure-element.ts'
import { openSoftwareKeys, type SoftwareKeys } from './software-keys.ts'
import { readPasswords } from './tpm-passwords.ts'
import { explained, inPlainWords } from './tpm-trouble.ts'
import { openSoftwareVault, openVault, type Vault } from './vault.ts'

/** Who holds the keys of this device, and proves what it is: its TPM, or files beside a secure element or a token. */
export interface Holder {
  readonly attester: Attester
  readonly vault: Vault
  /** The LDevID key was here before this start. */
  readonly known: boolean
  /** Device id of an earlier enrolment. */
  readonly device: string | null
  /** The identity at rest was replaced while it could not be written. */
  readonly isReplaced: boolean
  /** Why what was approved does not open the keys, in plain words; null when nothing was refused. */
  readonly refusal: string | null
  /** As it was when the holder was opened. */
  readonly resetCount: number
  /** The recipient key under this policy, for holders that firmware policies bind. */
  recipientFor(policy: FirmwarePolicy): Promise<KeyBlob>
  /** Remembers, durably, what firmware is approved. */
  learn(set: ApprovalSet): Promise<void>
  /** Says of the identity at rest, durably, whether it was replaced. */
  replaced(is: boolean): Promise<void>
  /** What went wrong with the hardware, for a person. */
  explained(thrown: unknown): Promise<unknown>
  /** Frees the hardware for the next process. */
  close(): Promise<void>
  /** Wipes what is in memory. */
  destroy(): void
}

export interface HolderOptions {
  readonly settings: Settings
  readonly files: FileSystem
  readonly document: (name: string) => Document
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
  readonly log: (line: string) => void
}

/** The keys are in the TPM, bound to approved firmware. `recipientFor`: how the attester asks for recipient keys. */
export const openTpmHolder = async (of: HolderOptions & { readonly transport: Transport; readonly recipientFor: RecipientFor }): Promise<Holder> => {
  const { settings, files, document, random, step, log } = of
  const tpmAuth = settings.tpmAuth ?? {}
  const passwords = await readPasswords(files.read, tpmAuth)
  const tpm = new Tpm(of.transport, { random, passwords })
  const bound = await inPlainWords(
    tpm,
    tpmAuth,
    async () => await openBoundKeys({ tpm, blobs: document('tpm-keys'), approvals: document('approvals'), step, log }),
  )
  const vault = openVault({ bound, document, tenant: settings.tenant, random, step, log })
  await vault.refresh()
  return {
    attester: tpm2Attester(bound.keys, of.recipientFor),
    vault,
    known: bound.known,
    get device() {
      return bound.device
    },
    get isReplaced() {
      return bound.isReplaced
    },
    get refusal() {
      return bound.refusal
    },
    resetCount: (await bound.keys.clock()).resetCount,
    recipientFor: async (policy) => await bound.recipientFor(policy),
    learn: async (set) => await bound.learn(set),
    replaced: async (is) => await bound.replaced(is),
    explained: async (thrown) => await explained(tpm, tpmAuth, thrown),
    close: async () => await bound.keys.close(),
    destroy() {
      vault.destroy()
      for (const password of Object.values(passwords)) password.destroy()
    },
  }
}

/** The secure element that the configuration names: a key file and its certificates. */
const configuredElement = async ({ files, settings }: HolderOptions): Promise<SecureElement> => {
  const { idevid } = settings
  if (idevid === undefined) throw new SettingsError('no "idevid" in the configuration')
  const text = async (path: string): Promise<string> => {
    const bytes = await files.read(path)
    if (bytes === undefined) throw new SettingsError(`idevid: no file ${path}`)
    return new TextDecoder('latin1').decode(bytes)
  }
  const [key, certificates] = [await text(idevid.key), await text(idevid.certificates)]
  return softwareSecureElement(privateKeyOf(key), fromPem('CERTIFICATE', certificates))
}

const attesterOf = async (of: HolderOptions & { readonly element?: SecureElement | undefined }, keys: SoftwareKeys): Promise<Attester> => {
  const { settings, files, step, log } = of
  if (settings.token === undefined) return idevidAttester(keys, of.element ?? (await configuredElement(of)))
  const path = settings.token
  const remove = async (): Promise<void> => {
    await files.remove(path)
    await files.syncFolder(dirname(path))
  }
  return tokenAttester(keys, { path, read: files.read, remove, step, log })
}

const noTpm = async (): Promise<never> => {
  throw new Problem('unsupported', 'this device has no TPM', { reason: 'key.needs-tpm' })
}

/** The keys are in files. `element`: the secure element of a simulated board; else the one that the configuration names. */
export const openSoftwareHolder = async (of: HolderOptions & { readonly element?: SecureElement | undefined }): Promise<Holder> => {
  const { settings, document, random, step, log } = of
  const keys = await openSoftwareKeys({ document: document('software-keys'), random, step })
  const vault = openSoftwareVault({ keys, document, tenant: settings.tenant, random, step, log })
  return {
    attester: await attesterOf(of, keys),
    vault,
    known: keys.known,
    get device() {
      return keys.device
    },
    isReplaced: false,
    refusal: null,
    resetCount: 0,
    recipientFor: noTpm,
    // Approvals are for keys that firmware binds: there are none here.
    learn: async () => undefined,
    replaced: async () => undefined,
    explained: async (thrown) => thrown,
    close: async () => undefined,
    destroy: () => vault.destroy(),
  }
}
