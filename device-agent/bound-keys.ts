import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { ApprovalSet, type FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs, type DeviceKeys, type FirmwareKeyBlobs, type KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { rc, TpmError } from '@fleetkey/tpm2/errors.ts'
import { ApprovalRefused, NotApproved } from '@fleetkey/tpm2/firmware.ts'
import type { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { z } from 'zod'
import type { Document } from './files.ts'

/** The device's key blobs, and the approvals under which those that are bound to firmware work. Neither is a secret: only this TPM loads the blobs. */
export interface BoundKeys {
  readonly keys: DeviceKeys
  /** The keys in the TPM were here before this start. */
  readonly known: boolean
  /** Device id of an earlier enrolment. */
  readonly device: string | null
  /** The identity at rest was replaced while it could not be written: the server knows a newer one, which is gone. */
  readonly isReplaced: boolean
  /** Pairs of recipient and storage key, newest first; none before the first enrolment. Several while what is at rest moves to a newer pair. */
  readonly pairs: readonly FirmwareKeyBlobs[]
  /** The recipient key under this policy: the one that is there, or a new one, durable before it is told. */
  recipientFor(policy: FirmwarePolicy): Promise<KeyBlob>
  /** Remembers, durably, what is approved; in force when it resolves. */
  learn(set: ApprovalSet): Promise<void>
  /** Why the TPM refused an approval when a pair was opened last; null when it refused none. */
  readonly refusal: string | null
  /** The storage key of a pair; undefined while the running firmware is not approved for it. */
  open(pair: FirmwareKeyBlobs): Promise<Secret | undefined>
  /**
   * Everything at rest is under the newest pair, of this device: older ones are erased. From the first time on this TPM is known by its EK: the server has
   * compared that one with its manifest before there was a device to settle.
   */
  settle(device: string): Promise<void>
  /** Says of the identity at rest, durably, whether it was replaced. */
  replaced(is: boolean): Promise<void>
}

const bytes = z.custom<Uint8Array>((value) => value instanceof Uint8Array)
const blob = z.strictObject({ public: bytes, private: bytes })
/** As agents kept them before keys were bound to firmware. */
const StoredUnbound = z.strictObject({ v: z.literal(1), ldevid: blob, recipient: blob, storage: blob })
const Stored = z.strictObject({
  v: z.literal(2),
  device: DeviceId.nullable(),
  replaced: z.boolean(),
  /** The other copy on the medium is no older than this one: nothing that was erased from the list is left there. */
  swept: z.boolean(),
  /** Name of the EK that this device enrolled with: every start goes on with that one only. Null before the first enrolment. */
  ek: bytes.nullable().default(null),
  ldevid: blob,
  pairs: z.array(z.strictObject({ policy: z.strictObject({ signer: bytes, ref: bytes }), recipient: blob, storage: blob })),
})
type Stored = z.infer<typeof Stored>
const StoredApprovals = z.strictObject({ v: z.literal(1), sets: z.array(ApprovalSet) })

/** Policies whose approvals are kept: keys of older generations are read with them until they are retired. */
const keptSets = 4
const keptApprovals = 128
/** A pair that never came into force is overtaken by the next; the one in force stays. */
const keptPairs = 3

const same = (one: Uint8Array, other: Uint8Array): boolean => Buffer.compare(one, other) === 0
const samePolicy = (one: FirmwarePolicy, other: FirmwarePolicy): boolean => same(one.signer, other.signer) && same(one.ref, other.ref)

interface BoundKeysOptions {
  readonly tpm: Tpm
  readonly blobs: Document
  readonly approvals: Document
  readonly step: (name: string) => void
  readonly log: (line: string) => void
}

/** The same approvals with these added. What was approved under a policy stays so: an older message that comes late takes nothing away. */
const withSet = (sets: readonly ApprovalSet[], set: ApprovalSet): readonly ApprovalSet[] => {
  const before = sets.find((one) => samePolicy(one, set))?.approvals ?? []
  const kept = before.filter(({ policy }) => !set.approvals.some((one) => same(one.policy, policy)))
  const approvals = [...set.approvals, ...kept].toSorted((one, other) => other.number - one.number).slice(0, keptApprovals)
  return [{ signer: set.signer, ref: set.ref, approvals }, ...sets.filter((one) => !samePolicy(one, set))].slice(0, keptSets)
}

const readApprovals = async ({ approvals, log }: BoundKeysOptions): Promise<readonly ApprovalSet[]> => {
  const found = await approvals.load()
  if (found === undefined) return []
  try {
    return StoredApprovals.parse(decode(found)).sets
  } catch (thrown) {
    log(`stored approvals are not readable, the server gives them again: ${thrown instanceof Error ? thrown.message.slice(0, 200) : 'damaged'}`)
    return []
  }
}

const readBlobs = (found: Uint8Array, log: (line: string) => void): Stored => {
  const value = decode(found)
  const unbound = StoredUnbound.safeParse(value)
  if (!unbound.success) return Stored.parse(value)
  log('the stored keys are not bound to firmware: this device returns to its server with the same LDevID key and gets its keys anew, bound to it')
  return { v: 2, device: null, replaced: false, swept: false, ek: null, ldevid: unbound.data.ldevid, pairs: [] }
}

/** Name of the EK that the device with these blobs enrolled with; null before that, or when there are none that read. */
export const pinnedEkOf = async (blobs: Document): Promise<Uint8Array | null> => {
  const found = await blobs.load()
  const stored = Stored.safeParse(found === undefined ? undefined : decode(found))
  return stored.success ? stored.data.ek : null
}

/** Opens what is stored, or makes the LDevID key of a device that is new or whose TPM was cleared. */
const openStored = async (of: BoundKeysOptions): Promise<{ stored: Stored; keys: DeviceKeys; known: boolean }> => {
  const found = await of.blobs.load()
  const stored = found === undefined ? undefined : readBlobs(found, of.log)
  if (stored !== undefined) {
    try {
      return { stored, keys: await openDeviceKeys(of.tpm, stored, stored.ek), known: true }
    } catch (thrown) {
      if (!(thrown instanceof TpmError) || !thrown.is(rc.integrity)) throw thrown
      of.log('the stored keys are not of this TPM, or it was cleared: this device enrols anew')
    }
  }
  // TPM2_Clear leaves the EK as it is: it stays the one.
  const ek = stored?.ek ?? null
  const made: DeviceKeyBlobs = await provision(of.tpm, ek)
  const fresh: Stored = { v: 2, device: null, replaced: false, swept: true, ek, ldevid: made.ldevid, pairs: [] }
  await of.blobs.replace(encode(fresh))
  // A crash here: a key that nobody knows yet; it is used by the next hello.
  of.step('tpm-keys.stored')
  return { stored: fresh, keys: await openDeviceKeys(of.tpm, made, ek), known: false }
}

/** Opens the keys of this device. Calls must not overlap, `open` apart. */
export const openBoundKeys = async (of: BoundKeysOptions): Promise<BoundKeys> => {
  const { blobs, approvals, step } = of
  const { stored: first, keys, known } = await openStored(of)
  let stored = first
  let sets = await readApprovals(of)
  let refusal: string | null = null
  keys.approve(sets)

  const save = async (next: Stored): Promise<void> => {
    await blobs.save(encode({ ...next, swept: false }))
    // A crash here: the other copy still has what this one has not; the next start finds that out and sweeps.
    stored = { ...next, swept: true }
    await blobs.save(encode(stored))
  }
  if (!stored.swept) await save(stored)

  return {
    keys,
    known,
    get device() {
      return stored.device
    },
    get isReplaced() {
      return stored.replaced
    },
    get pairs() {
      return stored.pairs
    },
    get refusal() {
      return refusal
    },
    async recipientFor(policy) {
      const there = stored.pairs.find((pair) => samePolicy(pair.policy, policy))
      if (there !== undefined) return there.recipient
      const made = await keys.make({ signer: policy.signer, ref: policy.ref })
      await save({ ...stored, pairs: [made, ...stored.pairs.filter((_pair, at) => at < keptPairs - 2 || at === stored.pairs.length - 1)] })
      // A crash here: a pair that nobody knows yet; the next question for this policy finds it.
      step('firmware.made')
      return made.recipient
    },
    async learn(set) {
      const next = withSet(sets, set)
      const value = encode({ v: 1, sets: next })
      if (same(value, encode({ v: 1, sets }))) return
      await approvals.save(value)
      // A crash here: known, and the server says it again on the next connection.
      step('firmware.learned')
      sets = next
      keys.approve(sets)
    },
    async open(pair) {
      try {
        const opened = new Secret(await keys.storageKey(pair.storage))
        refusal = null
        return opened
      } catch (thrown) {
        if (!(thrown instanceof NotApproved)) throw thrown
        refusal = thrown instanceof ApprovalRefused ? thrown.message : null
        if (refusal !== null) of.log(`firmware.approval-refused: ${refusal}`)
        return undefined
      }
    },
    async settle(device) {
      const [newest] = stored.pairs
      if (newest === undefined || (stored.pairs.length === 1 && stored.device === device && stored.ek !== null)) return
      await save({ ...stored, device: DeviceId.parse(device), ek: stored.ek ?? keys.ekName, pairs: [newest] })
      // A crash here: the newest pair is all there is, and everything at rest is under it.
      step('firmware.settled')
    },
    async replaced(is) {
      if (stored.replaced === is) return
      await save({ ...stored, replaced: is })
      // A crash here: the next start goes by it.
      step('identity.replaced')
    },
  }
}
