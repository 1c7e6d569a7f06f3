import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { FirmwareKeyBlobs } from '@fleetkey/tpm2/device-keys.ts'
import { ApprovalRefused, NotApproved } from '@fleetkey/tpm2/firmware.ts'
import { pointOf } from '@fleetkey/tpm2/structures.ts'
import type { BoundKeys } from './bound-keys.ts'
import type { Document } from './files.ts'
import { identityStore, memoryStore, renewalStore, type Identity, type PendingRenewal, type Store } from './identity.ts'
import { openKeyring, type Keyring, type KeyringTpm } from './keyring.ts'
import type { SoftwareKeys } from './software-keys.ts'

/** For a person who looks at the status of a device that runs something else than it should, or something newer than its server knows. */
export const lockedWords =
  'locked: the firmware that runs here is not approved for the keys of this device. They open again on approved firmware, or once the server approves this one'

/**
 * Everything of this device that is at rest under its storage key, which the TPM gives out to approved firmware only. Closed while no other firmware runs: an
 * identity is held in memory only then.
 */
export interface Vault {
  readonly isOpen: boolean
  /** It was open once, and the firmware that runs may not use its keys. */
  readonly isLocked: boolean
  readonly identities: Store<Identity>
  readonly renewals: Store<PendingRenewal | null>
  /** Tries what is approved now: opens, or goes over to a newer pair of keys. `moved`: what is at rest is to be brought over (`settle`). */
  refresh(): Promise<'opened' | 'moved' | 'unchanged'>
  keyring(device: string): Promise<Keyring>
  /** Puts everything at rest under the newest storage key and erases the older ones. `keyring`: the open one. Harmless to repeat. */
  settle(identity: Identity, keyring: Keyring): Promise<void>
  destroy(): void
}

interface VaultOptions {
  readonly bound: BoundKeys
  readonly document: (name: string) => Document
  readonly tenant: string
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
  readonly log: (line: string) => void
}

interface Open {
  readonly pair: FirmwareKeyBlobs
  readonly storage: Secret
  /** Of pairs that something at rest may still be under. */
  readonly older: readonly Secret[]
  readonly identities: Store<Identity>
  readonly renewals: Store<PendingRenewal | null>
}

/** A refusal that passes: nothing is wrong with the key that was asked for. */
const guarded = async <R>(work: Promise<R>): Promise<R> => {
  try {
    return await work
  } catch (thrown) {
    if (thrown instanceof ApprovalRefused) throw new Problem('unavailable', thrown.message, { reason: 'firmware.approval-refused', cause: thrown })
    if (thrown instanceof NotApproved) throw new Problem('unavailable', lockedWords, { reason: 'firmware.not-approved', cause: thrown })
    throw thrown
  }
}

const tpmOf = ({ keys }: BoundKeys, { recipient }: FirmwareKeyBlobs): KeyringTpm => ({
  point: pointOf(recipient.public),
  zgen: async (point) => await guarded(keys.zgen(recipient, point)),
  importHmacKey: async (wrapped) => await keys.importHmacKey(wrapped),
  hmac: async (key, data) => await guarded(keys.hmac(key, data)),
})

/** The vault of this device, closed until `refresh`. */
export const openVault = (of: VaultOptions): Vault => {
  const { bound, document, tenant, random, step, log } = of
  const memory = { identities: memoryStore<Identity>(), renewals: memoryStore<PendingRenewal | null>() }
  let open: Open | undefined

  const openWith = (pair: FirmwareKeyBlobs, storage: Secret, older: readonly Secret[]): Open => {
    const sealed = { storage, older, tenant, random, onLoss: (why: string) => log(`not readable: ${why}`) }
    return {
      pair,
      storage,
      older,
      identities: identityStore({ ...sealed, document: document('identity') }),
      renewals: renewalStore({ ...sealed, document: document('renewal') }),
    }
  }

  const need = (): Open => {
    if (open === undefined) throw new Problem('unavailable', lockedWords, { reason: 'firmware.not-approved' })
    return open
  }

  return {
    get isOpen() {
      return open !== undefined
    },
    get isLocked() {
      return open === undefined && bound.device !== null && bound.pairs.length > 0
    },
    get identities() {
      return open?.identities ?? memory.identities
    },
    get renewals() {
      return open?.renewals ?? memory.renewals
    },
    async refresh() {
      const before = open
      if (before !== undefined && before.pair === bound.pairs[0]) return 'unchanged'
      const opened: { readonly pair: FirmwareKeyBlobs; readonly storage: Secret }[] = []
      for (const pair of bound.pairs) {
        const storage = pair === before?.pair ? before.storage : await bound.open(pair)
        if (storage !== undefined) opened.push({ pair, storage })
      }
      const [first, ...others] = opened
      if (first === undefined || first.pair === before?.pair) return 'unchanged'
      open = openWith(
        first.pair,
        first.storage,
        others.map(({ storage }) => storage),
      )
      return before === undefined ? 'opened' : 'moved'
    },
    async keyring(device) {
      const { pair, storage, older } = need()
      return await openKeyring({
        document: document('keyring'),
        storage,
        older,
        tpm: tpmOf(bound, pair),
        tenant,
        device,
        random,
        step,
        onLoss: (why) => log(`stored keys are lost, the server delivers them anew: ${why}`),
      })
    },
    async settle(identity, keyring) {
      const { pair, storage, older, identities, renewals } = need()
      if (pair !== bound.pairs[0]) return
      if (older.length > 0) {
        await keyring.rekey(storage, tpmOf(bound, pair))
        const pending = await renewals.load()
        if (pending !== undefined) await renewals.save(pending)
        await identities.save(identity)
        // A crash here: all of it is under the newest storage key, the older ones are still on the medium.
        step('firmware.rekeyed')
      }
      await bound.settle(identity.device)
      for (const one of older) one.destroy()
      open = openWith(pair, storage, [])
    },
    destroy() {
      open?.storage.destroy()
      for (const one of open?.older ?? []) one.destroy()
    },
  }
}

/** The vault of a device without a TPM: always open, no firmware decides about it. */
export const openSoftwareVault = (of: Omit<VaultOptions, 'bound'> & { readonly keys: SoftwareKeys }): Vault => {
  const { keys, document, tenant, random, step, log } = of
  const { storage } = keys
  const sealed = { storage, tenant, random, onLoss: (why: string) => log(`not readable: ${why}`) }
  return {
    isOpen: true,
    isLocked: false,
    identities: identityStore({ ...sealed, document: document('identity') }),
    renewals: renewalStore({ ...sealed, document: document('renewal') }),
    refresh: async () => 'unchanged',
    keyring: async (device) =>
      await openKeyring({
        document: document('keyring'),
        storage,
        tpm: keys.recipient,
        tenant,
        device,
        random,
        step,
        onLoss: (why) => log(`stored keys are lost, the server delivers them anew: ${why}`),
      }),
    settle: async (identity) => await keys.settle(identity.device),
    destroy: () => storage.destroy(),
  }
}
