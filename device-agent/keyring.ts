import { timingSafeEqual } from 'node:crypto'
import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { Epoch, KeyId, type GroupId } from '@fleetkey/protocol/ids.ts'
import { KeyAlgorithm, Place, Protection, type BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openWraps } from '@fleetkey/protocol/subset-difference/broadcast.ts'
import { labelCount, labelLength } from '@fleetkey/protocol/subset-difference/labels.ts'
import { applicationPrefix, proofPrefix, sealedProof, useTranscript } from '@fleetkey/protocol/transcript.ts'
import { openSealed, placeName, type Recipient, type WrapContext } from '@fleetkey/protocol/wrap.ts'
import type { DeviceKeys, KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { ImportRefused } from '@fleetkey/tpm2/import.ts'
import { z } from 'zod'
import { openAtRest, sealAtRest, type RestContext } from './at-rest.ts'
import type { Delivery, HeldEpoch, HeldKey, Take } from './core.ts'
import type { Document } from './files.ts'

type Labels = BodyOf<'labels'>
/** Whether a broadcast was made for this place. */
export const isIn = (of: Omit<Place, 'slot'>, place: Place): boolean =>
  of.group === place.group && of.shard === place.shard && of.generation === place.generation

/** What the keyring needs of the TPM, or of what stands in for it: the recipient key (its point, 65 bytes, and its product with another), imported keys. */
export interface KeyringTpm extends Pick<DeviceKeys, 'importHmacKey' | 'hmac'> {
  readonly point: Uint8Array
  zgen(point: Uint8Array): Promise<Uint8Array>
}

/** The keys of this device: in memory, and whole on the medium before anything is said about them. */
export interface Keyring {
  held(): readonly HeldKey[]
  heldOf(key: string): HeldKey | undefined
  /** Epochs in use that the consumers have not confirmed: a crash came between. */
  owed(): readonly Take[]
  /** Milliseconds since 1970 that the server has signed for: time never runs below it. */
  readonly time: number
  setTime(time: number): Promise<void>
  /**
   * Opens the delivered epoch with the TPM, or with the labels of a place, and stores it. Throws Problem when it is for this device and does not open; nothing has
   * changed then. Undefined: what came by broadcast is for others.
   */
  install(delivery: Delivery): Promise<HeldKey | undefined>
  /** The places in groups that it has labels for. */
  places(): readonly Place[]
  /** Opens the labels with the TPM and stores them in the place of those that it has for the group, of which no copy is left; or erases those. */
  place(labels: Labels): Promise<void>
  /** Makes the epoch the one in use, durably; older ones serve for reading from now on. Never backwards: throws Problem('conflict'). */
  use(of: Pick<Take, 'key' | 'epoch' | 'nonce' | 'campaign'>): Promise<HeldKey>
  /** The consumers have taken it. */
  settle(key: string, epoch: number): Promise<HeldKey>
  /** Erases epochs below `below` (null: all of them), from both copies on the medium and from memory. */
  erase(key: string, below: number | null, nonce: Uint8Array): Promise<HeldKey | undefined>
  /** Proof of use for the server (transcript.ts). */
  proof(key: string, epoch: number, nonce: Uint8Array): Promise<Uint8Array>
  /** The live bytes of a `sealed` epoch (the one in use unless told). Throws Problem: `not-found`, `forbidden` for `tpm` keys. */
  material(key: string, epoch?: number): { readonly epoch: number; readonly secret: Secret }
  /** MAC of an application's data under a `tpm` key; never that of a proof, whatever the data. */
  mac(key: string, data: Uint8Array, epoch?: number): Promise<{ readonly epoch: number; readonly mac: Uint8Array }>
  verify(of: { readonly key: string; readonly epoch: number; readonly data: Uint8Array; readonly mac: Uint8Array }): Promise<boolean>
  /** Puts everything at rest under another storage key, no copy under the older one left, and takes deliveries to another recipient key (and to the older ones). */
  rekey(storage: Secret, tpm: KeyringTpm): Promise<void>
  /** Wipes what is in memory. */
  close(): void
}

const bytes = z.custom<Uint8Array>((value) => value instanceof Uint8Array)
const StoredPlace = z.strictObject({ ...Place.shape, labels: bytes })
const Stored = z.strictObject({
  v: z.literal(1),
  time: z.int().min(0),
  places: z.array(StoredPlace).default([]),
  keys: z.array(
    z.strictObject({
      key: KeyId,
      algorithm: KeyAlgorithm,
      protection: Protection,
      current: Epoch.nullable(),
      floor: z.int().min(0),
      erased: z.int().min(0),
      withdrawals: z.array(z.string()),
      epochs: z.array(
        z.strictObject({
          epoch: Epoch,
          stage: z.enum(['installed', 'active']),
          readOnly: z.boolean(),
          nonce: bytes,
          campaign: z.string().nullable(),
          material: bytes,
        }),
      ),
    }),
  ),
})
type StoredPlace = z.infer<typeof StoredPlace>
const Blob = z.strictObject({ public: bytes, private: bytes })

interface Entry extends HeldEpoch {
  readonly nonce: Uint8Array
  readonly campaign: string | null
  /** As on the medium. */
  readonly atRest: Uint8Array
  /** Key bytes, or the blob that only this TPM loads. */
  readonly open: { readonly secret: Secret } | { readonly blob: KeyBlob }
}
interface Key extends Omit<HeldKey, 'epochs'> {
  readonly epochs: readonly Entry[]
}

const samePlace = (one: Place, other: Place): boolean => isIn(one, other) && one.slot === other.slot

/** A place, with its labels as on the medium and open. */
interface Placed {
  readonly stored: StoredPlace
  readonly labels: Secret
}

const keptWithdrawals = 8
const maxPlaces = 30
const keyLength = 32
const keptRecipients = 2

const heldOf = ({ epochs, ...key }: Key): HeldKey => ({ ...key, epochs: epochs.map(({ epoch, stage, readOnly }) => ({ epoch, stage, readOnly })) })
const hex = (value: Uint8Array): string => Buffer.from(value).toString('hex')

/**
 * Opens the keyring of one device. A document that does not open under a storage key counts as none (`onLoss` is told): the server delivers anew. One that opens
 * under an `older` storage key is put under `storage` first.
 */
export const openKeyring = async (of: {
  readonly document: Document
  readonly storage: Secret
  readonly older?: readonly Secret[]
  readonly tpm: KeyringTpm
  readonly tenant: string
  readonly device: string
  readonly random: (length: number) => Uint8Array
  readonly step: (name: string) => void
  readonly onLoss: (why: string) => void
}): Promise<Keyring> => {
  const { document, tenant, device, random, step } = of
  let { storage, tpm } = of
  const rest = (key: string, epoch: number, kind: RestContext['kind']): RestContext => ({ tenant, device, key, epoch, kind })
  let keys: ReadonlyMap<string, Key> = new Map()
  let places: ReadonlyMap<GroupId, Placed> = new Map()
  let time = 0
  let turn: Promise<unknown> = Promise.resolve()

  const read = (bytes: Uint8Array, by: Secret): void => {
    const plain = openAtRest(by, bytes, rest('', 0, 'keyring'))
    const parsed = Stored.parse(decode(plain.bytes()))
    plain.destroy()
    time = parsed.time
    keys = new Map(parsed.keys.map((one) => [one.key, { ...one, epochs: one.epochs.map((entry) => openEntry(one, entry, by)) }]))
    places = new Map(parsed.places.map((stored) => [stored.group, { stored, labels: openAtRest(by, stored.labels, restOf(stored)) }]))
  }

  const restOf = (place: Place): RestContext => rest(placeName(place), place.generation, 'labels')

  const openEntry = (key: { key: string; protection: Protection }, entry: Omit<Entry, 'atRest' | 'open'> & { material: Uint8Array }, by: Secret): Entry => {
    const { material, ...facts } = entry
    const secret = openAtRest(by, material, rest(key.key, entry.epoch, key.protection))
    const open = key.protection === 'sealed' ? { secret } : { blob: Blob.parse(decode(secret.bytes())) }
    return { ...facts, atRest: material, open }
  }

  /** What an epoch's material looks like on the medium, under this storage key. */
  const sealed = (by: Secret, key: { key: string; protection: Protection }, { epoch, open }: Pick<Entry, 'epoch' | 'open'>): Uint8Array => {
    const context = rest(key.key, epoch, key.protection)
    if ('secret' in open) return sealAtRest(by, open.secret.bytes(), context, random)
    return sealAtRest(by, encode({ public: open.blob.public, private: open.blob.private }), context, random)
  }

  const encoded = (next: ReadonlyMap<string, Key>, at: number, by: Secret = storage, placed: typeof places = places): Uint8Array => {
    const stored = {
      v: 1,
      time: at,
      places: [...placed.values()].map((one) => one.stored),
      keys: [...next.values()].map(({ epochs, ...key }) => ({
        ...key,
        epochs: epochs.map(({ atRest, open: _open, ...entry }) => ({ ...entry, material: atRest })),
      })),
    }
    return sealAtRest(by, encode(stored), rest('', 0, 'keyring'), random)
  }

  /** One change after the other; memory follows the medium, never the other way round. */
  const change = async <R>(work: () => Promise<R>): Promise<R> => {
    const mine = turn.then(work, work)
    turn = mine.catch(() => undefined)
    return await mine
  }
  const commit = async (key: Key, how: 'save' | 'replace' = 'save'): Promise<HeldKey> => {
    const next = new Map(keys).set(key.key, key)
    await document[how](encoded(next, time))
    keys = next
    return heldOf(key)
  }

  const keyOf = (name: string): Key => {
    const key = keys.get(name)
    if (key === undefined || key.epochs.length === 0) throw new Problem('not-found', `no key ${name.slice(0, 64)} on this device`, { reason: 'key.not-held' })
    return key
  }
  const entryOf = (key: Key, epoch: number | undefined): Entry => {
    const wanted = epoch ?? key.current
    if (wanted === null) throw new Problem('unavailable', `no epoch of ${key.key} is in use yet`, { reason: 'key.not-active' })
    const entry = key.epochs.find((one) => one.epoch === wanted)
    if (entry === undefined) throw new Problem('not-found', `no epoch ${wanted} of ${key.key} on this device`, { reason: 'epoch.not-held' })
    return entry
  }

  const recipientOf = (by: KeyringTpm): Recipient => ({ point: by.point, dh: async (point) => await by.zgen(point) })
  /** Newest first. What was on its way when the recipient key changed is still for the older one. */
  let recipients: readonly Recipient[] = [recipientOf(tpm)]
  const opened = async (bytes: Uint8Array, context: WrapContext, [recipient, ...others]: readonly Recipient[] = recipients): Promise<Secret> => {
    if (recipient === undefined) throw new Problem('internal', 'no recipient key')
    try {
      return await openSealed(bytes, context, recipient)
    } catch (thrown) {
      if (others.length === 0 || !(thrown instanceof Problem) || thrown.reason !== 'wrap.open') throw thrown
      return await opened(bytes, context, others)
    }
  }

  /** Durable under the other storage key first, then in force. */
  const reseal = async (by: Secret): Promise<void> => {
    const next = new Map(
      [...keys].map(([name, key]) => [name, { ...key, epochs: key.epochs.map((entry): Entry => ({ ...entry, atRest: sealed(by, key, entry) })) }]),
    )
    const placed = new Map(
      [...places].map(([group, { stored, labels }]) => [
        group,
        { stored: { ...stored, labels: sealAtRest(by, labels.bytes(), restOf(stored), random) }, labels },
      ]),
    )
    await document.replace(encoded(next, time, by, placed))
    // A crash here: the keyring is under the other storage key already; both open it at the next start.
    step('keyring.rekeyed')
    keys = next
    places = placed
    storage = by
  }

  const imported = async (wrapped: Parameters<KeyringTpm['importHmacKey']>[0]): Promise<KeyBlob> => {
    try {
      return await tpm.importHmacKey(wrapped)
    } catch (cause) {
      // The server hears it with the acknowledgement: it wrapped for another TPM, or somebody altered what it wrapped.
      if (cause instanceof ImportRefused) throw new Problem('malformed', cause.message, { reason: 'key.import-refused', cause })
      throw cause
    }
  }

  /** With the labels of the place that it was made for; undefined when this device is not in that place, or is in none of the subsets. */
  const fromBroadcast = (delivery: Delivery): Secret | undefined => {
    const { key, epoch, nonce, wrapped } = delivery
    if (!('wraps' in wrapped)) return undefined
    const { group, shard, generation, wraps } = wrapped
    const placed = places.get(group)
    if (placed === undefined || !isIn(wrapped, placed.stored)) return undefined
    return openWraps(wraps, placed.labels.bytes(), placed.stored.slot, { tenant, group, key, shard, generation, epoch, nonce })
  }

  const unwrap = async (delivery: Delivery): Promise<Pick<Entry, 'atRest' | 'open'> | undefined> => {
    const { key, epoch, wrapped } = delivery
    if ('wraps' in wrapped) {
      const secret = fromBroadcast(delivery)
      if (secret === undefined) return undefined
      const open = { secret }
      return { atRest: sealed(storage, { key, protection: 'sealed' }, { epoch, open }), open }
    }
    const context: WrapContext = { tenant, device, key, epoch, protection: wrapped.protection, purpose: wrapped.protection === 'tpm' ? 'inner' : 'key' }
    const secret = await opened(wrapped.sealed, context)
    try {
      if (wrapped.protection === 'sealed') {
        if (secret.length !== keyLength) throw new Problem('malformed', `a key of ${secret.length} bytes`, { reason: 'key.length' })
        const open = { secret: new Secret(secret.bytes()) }
        return { atRest: sealed(storage, { key, protection: 'sealed' }, { epoch, open }), open }
      }
      const blob = await imported({ public: wrapped.public, duplicate: wrapped.duplicate, seed: wrapped.seed, innerKey: secret.bytes() })
      return { atRest: sealed(storage, { key, protection: 'tpm' }, { epoch, open: { blob } }), open: { blob } }
    } finally {
      secret.destroy()
    }
  }

  const macOf = async (key: Key, entry: Entry, data: Uint8Array): Promise<Uint8Array> => {
    if (!('blob' in entry.open)) throw new Problem('unsupported', `${key.key} is an encryption key`, { reason: 'key.algorithm' })
    return await tpm.hmac(entry.open.blob, Buffer.concat([applicationPrefix, data]))
  }

  const stored = await document.load()
  const candidates = [storage, ...(of.older ?? [])]
  for (const [at, candidate] of stored === undefined ? [] : candidates.entries()) {
    try {
      read(stored ?? new Uint8Array(), candidate)
      if (candidate !== storage) await reseal(storage)
      break
    } catch (thrown) {
      if (!(thrown instanceof Problem || thrown instanceof z.ZodError)) throw thrown
      keys = new Map()
      places = new Map()
      if (at === candidates.length - 1) of.onLoss(thrown.message)
    }
  }

  return {
    held: () => [...keys.values()].map(heldOf),
    heldOf: (name) => {
      const key = keys.get(name)
      return key === undefined ? undefined : heldOf(key)
    },
    owed: () =>
      [...keys.values()].flatMap(({ key, current, epochs }): Take[] => {
        const entry = epochs.find(({ epoch }) => epoch === current)
        return entry === undefined || entry.stage === 'active' ? [] : [{ type: 'take', key, epoch: entry.epoch, nonce: entry.nonce, campaign: entry.campaign }]
      }),
    get time() {
      return time
    },
    setTime: async (at) =>
      await change(async () => {
        if (at <= time) return
        await document.save(encoded(keys, at))
        time = at
      }),

    install: async (delivery) =>
      await change(async () => {
        const { key: name, epoch, algorithm, wrapped, nonce, campaign, readOnly } = delivery
        const known = keys.get(name)
        const before: Key = known ?? { key: name, algorithm, protection: wrapped.protection, epochs: [], current: null, floor: 0, erased: 0, withdrawals: [] }
        if (before.epochs.some((one) => one.epoch === epoch)) return heldOf(before)
        if (!readOnly && epoch < before.floor) throw new Problem('conflict', `epoch ${epoch} of ${name} after ${before.floor}`, { reason: 'epoch.lower' })
        const fresh = await unwrap(delivery)
        if (fresh === undefined) return undefined
        const entry: Entry = { epoch, stage: 'installed', readOnly, nonce, campaign, ...fresh }
        const epochs = [...before.epochs, entry].toSorted((one, other) => one.epoch - other.epoch)
        const held = await commit({ ...before, algorithm, protection: wrapped.protection, epochs })
        // A crash here: the epoch is stored and nobody was told; the next report shows it.
        step('key.installed')
        return held
      }),

    use: async ({ key: name, epoch, nonce, campaign }) =>
      await change(async () => {
        const key = keyOf(name)
        const entry = entryOf(key, epoch)
        if (entry.readOnly || epoch < key.floor) throw new Problem('conflict', `epoch ${epoch} of ${name} after ${key.floor}`, { reason: 'epoch.lower' })
        const epochs = key.epochs.map((one): Entry => {
          if (one.epoch === epoch) return { ...one, nonce, campaign }
          return one.epoch < epoch ? { ...one, readOnly: true } : one
        })
        const held = await commit({ ...key, epochs, current: epoch, floor: epoch })
        // A crash here: the epoch is in use, the consumers may still have the older one; the next start gives it to them.
        step('key.used')
        return held
      }),

    settle: async (name, epoch) =>
      await change(async () => {
        const key = keyOf(name)
        if (entryOf(key, epoch).stage === 'active') return heldOf(key)
        const held = await commit({ ...key, epochs: key.epochs.map((one): Entry => (one.epoch === epoch ? { ...one, stage: 'active' } : one)) })
        // A crash here: the server has not heard it; it asks again and the device proves its use again.
        step('key.settled')
        return held
      }),

    erase: async (name, below, nonce) =>
      await change(async () => {
        const key = keys.get(name)
        if (key === undefined) return undefined
        const gone = key.epochs.filter(({ epoch }) => below === null || epoch < below)
        const epochs = key.epochs.filter((one) => !gone.includes(one))
        if (key.current !== null && below !== null && !epochs.some(({ epoch }) => epoch === key.current))
          throw new Problem('conflict', `epoch ${key.current} of ${name} is in use`, { reason: 'epoch.in-use' })
        const withdrawals = below === null ? [...key.withdrawals.filter((one) => one !== hex(nonce)), hex(nonce)].slice(-keptWithdrawals) : key.withdrawals
        const erased = Math.max(key.erased, ...gone.map(({ epoch }) => epoch))
        const held = await commit({ ...key, epochs, current: below === null ? null : key.current, erased, withdrawals }, 'replace')
        for (const { open } of gone) if ('secret' in open) open.secret.destroy()
        // A crash here: erased and not stated; the server asks again and hears it then.
        step('key.erased')
        return held
      }),

    places: () => [...places.values()].map(({ stored: { labels: _labels, ...place } }) => place),

    place: async ({ sealed: wrapped, group, shard, generation, slot }) =>
      await change(async () => {
        const before = places.get(group)
        const next = new Map(places)
        if (wrapped === null) {
          if (before === undefined) return
          next.delete(group)
        } else {
          const place: Place = { group, shard, generation, slot }
          // A replay: the labels in force are newer, or these.
          if (before?.stored.shard === shard && (before.stored.generation > generation || samePlace(before.stored, place))) return
          if (before === undefined && places.size >= maxPlaces)
            throw new Problem('conflict', `a place in a ${places.size + 1}th group`, { reason: 'labels.too-many' })
          const labels = await opened(wrapped, { tenant, device, key: placeName(place), epoch: generation, protection: 'sealed', purpose: 'labels' })
          if (labels.length !== labelCount * labelLength) throw new Problem('malformed', `labels of ${labels.length} bytes`, { reason: 'labels.length' })
          next.set(group, { stored: { ...place, labels: sealAtRest(storage, labels.bytes(), restOf(place), random) }, labels })
        }
        // What the older labels open must not be opened by whoever takes the medium later: no copy is left.
        await document.replace(encoded(keys, time, storage, next))
        places = next
        before?.labels.destroy()
        // A crash here: stored, and the server does not know; the next report says it.
        step('labels.stored')
      }),

    async proof(name, epoch, nonce) {
      const key = keyOf(name)
      const { open } = entryOf(key, epoch)
      const transcript = useTranscript({ tenant, device, key: name, epoch, nonce })
      return 'secret' in open ? sealedProof(open.secret, transcript) : await tpm.hmac(open.blob, Buffer.concat([proofPrefix, transcript]))
    },

    material(name, epoch) {
      const key = keyOf(name)
      const entry = entryOf(key, epoch)
      if (!('secret' in entry.open)) throw new Problem('forbidden', `${name} never leaves the TPM`, { reason: 'key.in-tpm' })
      return { epoch: entry.epoch, secret: entry.open.secret }
    },

    async mac(name, data, epoch) {
      const key = keyOf(name)
      const entry = entryOf(key, epoch)
      return { epoch: entry.epoch, mac: await macOf(key, entry, data) }
    },

    async verify({ key: name, epoch, data, mac }) {
      const key = keyOf(name)
      const expected = await macOf(key, entryOf(key, epoch), data)
      return expected.length === mac.length && timingSafeEqual(expected, mac)
    },

    rekey: async (by, next) =>
      await change(async () => {
        await reseal(by)
        tpm = next
        recipients = [recipientOf(next), ...recipients].slice(0, keptRecipients)
      }),

    close() {
      for (const { epochs } of keys.values()) for (const { open } of epochs) if ('secret' in open) open.secret.destroy()
      for (const { labels } of places.values()) labels.destroy()
      keys = new Map()
      places = new Map()
    },
  }
}
