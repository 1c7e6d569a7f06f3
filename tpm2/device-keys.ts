import { createHash } from 'node:crypto'
import { readClockState, type ClockState } from './clock.ts'
import { alg, curve, ekCertificateIndex, handle as known } from './constants.ts'
import { isOfParameter, OtherEk, rc, TpmError } from './errors.ts'
import { parseSignature, rawOf } from './attest.ts'
import { sameBytes } from './bytes.ts'
import { derPrefix } from './ek-certificates.ts'
import { authPolicyOf, NotApproved, underPolicy, type ApprovalSet, type FirmwarePolicy } from './firmware.ts'
import { withPasswords } from './hierarchy.ts'
import { ImportRefused } from './import.ts'
import { Ledger } from './ledger.ts'
import { PolicySessions } from './policy-session.ts'
import { freeStale, isCrowded } from './stale.ts'
import { parsePublic, type PcrBank } from './structures.ts'
import { templates } from './templates.ts'
import type { Entity, LoadedKey, Tpm } from './tpm.ts'

/** A key outside the TPM: only its own TPM can load it. `public`: TPMT_PUBLIC; `private`: content of TPM2B_PRIVATE. */
export interface KeyBlob {
  readonly public: Uint8Array
  readonly private: Uint8Array
}

/** What a device keeps on its disk from its first start on; everything else is derived again. */
export interface DeviceKeyBlobs {
  readonly ldevid: KeyBlob
}

/** Keys that work under approved firmware only. */
export interface FirmwareKeyBlobs {
  readonly policy: FirmwarePolicy
  readonly recipient: KeyBlob
  /** Sealed storage key, 32 bytes. */
  readonly storage: KeyBlob
}

export interface Attestation {
  readonly attest: Uint8Array
  readonly signature: Uint8Array
}

/** The keys of one device. Calls may overlap; they take turns. Secrets come as plain bytes: wrap and wipe them. */
export interface DeviceKeys {
  /** TPMT_PUBLIC of each. */
  readonly publics: { readonly ek: Uint8Array; readonly ak: Uint8Array; readonly srk: Uint8Array; readonly ldevid: Uint8Array }
  readonly ekName: Uint8Array
  /** EK certificate from NV, DER, padding cut; null when the TPM has none. */
  ekCertificate(): Promise<Uint8Array | null>
  /** The secret that the server put into a credential for this EK and AK. */
  activate(credential: { readonly blob: Uint8Array; readonly secret: Uint8Array }): Promise<Uint8Array>
  quote(selection: readonly { readonly hash: 'sha256' | 'sha384'; readonly pcrs: readonly number[] }[], qualifyingData: Uint8Array): Promise<Attestation>
  /** Works whatever firmware runs, also for a key under firmware: it says that the key is in this TPM, not that it may be used. */
  certify(key: 'srk' | 'ldevid' | KeyBlob, qualifyingData: Uint8Array): Promise<Attestation>
  /** ECDSA P-256 with SHA-256 by the LDevID key over `data`: raw r‖s, 64 bytes. */
  sign(data: Uint8Array): Promise<Uint8Array>
  /** Makes a recipient key and a storage key under this policy. They work once the running firmware is approved under it. */
  make(policy: FirmwarePolicy): Promise<FirmwareKeyBlobs>
  /** What is approved from now on, by policy. */
  approve(sets: readonly ApprovalSet[]): void
  /** Recipient key times this point (65 bytes, uncompressed): x coordinate, 32 bytes. Throws NotApproved. */
  zgen(recipient: KeyBlob, point: Uint8Array): Promise<Uint8Array>
  /** The 32 bytes of a sealed storage key. Throws NotApproved. */
  storageKey(storage: KeyBlob): Promise<Uint8Array>
  /** Throws ImportRefused when the TPM refuses what it was handed. */
  importHmacKey(wrapped: { public: Uint8Array; duplicate: Uint8Array; seed: Uint8Array; innerKey: Uint8Array }): Promise<KeyBlob>
  /** HMAC-SHA256 by an imported key. Throws NotApproved. */
  hmac(key: KeyBlob, data: Uint8Array): Promise<Uint8Array>
  clock(): Promise<ClockState>
  /** Flushes what is loaded. The transport stays open: its owner closes it. */
  close(): Promise<void>
}

const hashIds = { sha256: alg.sha256, sha384: alg.sha384 } as const

/** The EK of this TPM: P-256 (L-2) unless only a certificate of a P-384 (H-3) or an RSA key (L-1) is there. */
export const createEk = async (tpm: Tpm): Promise<LoadedKey> => {
  const has = async (index: number): Promise<boolean> => (await tpm.nvSize(index)) !== undefined
  if (await has(ekCertificateIndex.ecc)) return await tpm.createPrimary(known.endorsement, templates.ekEcc)
  if (await has(ekCertificateIndex.ecc384)) return await tpm.createPrimary(known.endorsement, templates.ekEcc384)
  return await tpm.createPrimary(known.endorsement, (await has(ekCertificateIndex.rsa)) ? templates.ekRsa : templates.ekEcc)
}

/** Where the certificate of this EK is. */
const certificateIndex = (ek: Uint8Array): number => {
  const key = parsePublic(ek)
  if (key.type === alg.rsa) return ekCertificateIndex.rsa
  return key.type === alg.ecc && key.curve === curve.p384 ? ekCertificateIndex.ecc384 : ekCertificateIndex.ecc
}

/** The EK, if its Name is the pinned one (null: any). Throws OtherEk before anything was salted to it. */
const pinnedEk = async (tpm: Tpm, pin: Uint8Array | null): Promise<LoadedKey> => {
  const ek = await createEk(tpm)
  if (pin === null || sameBytes(pin, ek.name)) return ek
  await tpm.flush(ek.handle).catch(() => undefined)
  throw new OtherEk(pin, ek.name)
}

/**
 * Makes the key of a device that has none: the LDevID key below the SRK. What is bound to firmware comes later (`make`): its policy is the server's to say.
 * `pin`: as for `openDeviceKeys`.
 */
export const provision = async (tpm: Tpm, pin: Uint8Array | null = null): Promise<DeviceKeyBlobs> =>
  await tpm.exclusive(async () => {
    await freeStale(tpm)
    const ledger = new Ledger(tpm)
    try {
      await ensureProtected(tpm, ledger, pin)
      const srk = await ledger.use('srk', async () => await tpm.createPrimary(known.owner, templates.srk))
      return { ldevid: await tpm.create(srk, templates.ldevid) }
    } finally {
      await ledger.clear()
      await tpm.unprotect()
    }
  })

/** Random of the TPM and of the host together: neither alone decides. */
const freshKey = async (tpm: Tpm): Promise<Uint8Array> =>
  createHash('sha256')
    .update(tpm.random(32))
    .update(await tpm.getRandom(32))
    .digest()

const ensureProtected = async (tpm: Tpm, ledger: Ledger, pin: Uint8Array | null): Promise<void> => {
  if (!tpm.isProtected) await tpm.protect(await ledger.use('ek', async () => await withPasswords(tpm, async () => await pinnedEk(tpm, pin))))
}

/**
 * Opens the keys of a device. `pin`: Name of the EK that this TPM must have, null when nothing is known of it yet; the EK that is there when they are opened is
 * the only one that counts afterwards. Throws OtherEk for another, TpmError `INTEGRITY` when the blobs are another TPM's, or the owner hierarchy was cleared since.
 */
export const openDeviceKeys = async (tpm: Tpm, blobs: DeviceKeyBlobs, pin: Uint8Array | null = null): Promise<DeviceKeys> => {
  const ledger = new Ledger(tpm)
  let pinned = pin
  const ek = async (): Promise<LoadedKey> => await ledger.use('ek', async () => await pinnedEk(tpm, pinned))
  const ak = async (): Promise<LoadedKey> => await ledger.use('ak', async () => await tpm.createPrimary(known.endorsement, templates.ak))
  const srk = async (): Promise<LoadedKey> => await ledger.use('srk', async () => await tpm.createPrimary(known.owner, templates.srk))
  const child = async (blob: KeyBlob): Promise<LoadedKey> => await ledger.use(nameInLedger(blob), async () => await tpm.load(await srk(), blob))
  let approved: readonly ApprovalSet[] = []
  const policies = new PolicySessions({ tpm, sets: () => approved, salter: ek, load: async (name, load) => await ledger.use(name, load) })
  /** Loads a key and has it authorised as its public area says: by an empty value, or by the policy it is under. */
  const authorised = async <R>(blob: KeyBlob, use: (key: Entity) => Promise<R>): Promise<R> => {
    const { authPolicy } = parsePublic(blob.public)
    if (authPolicy.length === 0) return await use(await child(blob))
    return await policies.under(authPolicy, async (session) => await use({ ...(await child(blob)), session }))
  }

  /** The TPM was reset or out of reach: what was loaded may be gone, and a command may have been carried out without our knowing. */
  let lost = false
  const startOver = async (): Promise<void> => {
    ledger.forget()
    policies.forget()
    await freeStale(tpm)
    lost = false
  }

  const attempt = async <R>(work: () => Promise<R>): Promise<R> => {
    try {
      if (lost) await startOver()
      await ensureProtected(tpm, ledger, pinned)
      return await work()
    } catch (error) {
      if (!(error instanceof NotApproved)) lost ||= !(error instanceof TpmError) || wasReset(error) || isCrowded(error)
      throw error
    }
  }

  /** Runs `work`; when the TPM has forgotten everything (it was reset), or others have filled it, starts over once. */
  const run = async <R>(work: () => Promise<R>): Promise<R> =>
    await tpm.exclusive(async () => {
      try {
        return await attempt(work)
      } catch (error) {
        if (!lost || !(error instanceof TpmError)) throw error
        return await attempt(work)
      }
    })

  const publics = await tpm.exclusive(async () => {
    await freeStale(tpm)
    await ensureProtected(tpm, ledger, pinned)
    const [endorsement, attestation, storage] = [await ek(), await ak(), await srk()]
    pinned = endorsement.name
    await child(blobs.ldevid)
    return {
      keys: { ek: endorsement.public, ak: attestation.public, srk: storage.public, ldevid: blobs.ldevid.public },
      ekName: endorsement.name,
    }
  })

  return {
    publics: publics.keys,
    ekName: publics.ekName,
    ekCertificate: async () =>
      await run(async () => {
        const bytes = await tpm.nvRead(certificateIndex(publics.keys.ek))
        return bytes === undefined ? null : derPrefix(bytes)
      }),
    activate: async (credential) =>
      await run(async () => {
        const endorsement = await ek()
        return await tpm.activateCredential(await ak(), endorsement, credential)
      }),
    quote: async (selection, qualifyingData) =>
      await run(async () => {
        const banks = selection.map(({ hash, pcrs }): PcrBank => ({ hash: hashIds[hash], pcrs }))
        return await tpm.quote(await ak(), banks, qualifyingData)
      }),
    certify: async (key, qualifyingData) =>
      await run(async () => {
        const object = key === 'srk' ? await srk() : await child(key === 'ldevid' ? blobs.ldevid : key)
        return await tpm.certify(object, await ak(), qualifyingData)
      }),
    sign: async (data) =>
      await run(async () => {
        const digest = createHash('sha256').update(data).digest()
        return rawOf(parseSignature(await tpm.sign(await child(blobs.ldevid), digest)))
      }),
    make: async (policy) =>
      await run(async () => {
        const authPolicy = authPolicyOf(policy)
        const parent = await srk()
        // TPM2_Create takes a slot while it works.
        await ledger.makeRoom('srk')
        const recipient = await tpm.create(parent, underPolicy(templates.recipient, authPolicy))
        const fresh = await freshKey(tpm)
        const storage = await tpm.create(parent, underPolicy(templates.sealed, authPolicy), fresh)
        fresh.fill(0)
        return { policy, recipient, storage }
      }),
    approve: (sets) => {
      approved = sets
    },
    zgen: async (recipient, point) =>
      await run(async () => await authorised(recipient, async (key) => await tpm.ecdhZGen(key, point.subarray(1, 33), point.subarray(33, 65)))),
    storageKey: async (storage) => await run(async () => await authorised(storage, async (object) => await tpm.unseal(object))),
    importHmacKey: async (wrapped) => {
      try {
        return await run(async () => ({ public: wrapped.public, private: await tpm.import(await srk(), wrapped) }))
      } catch (cause) {
        throw isOfParameter(cause) ? new ImportRefused(`the TPM refuses the key: ${cause.message}`, { cause }) : cause
      }
    },
    hmac: async (key, data) =>
      await run(
        async () =>
          await authorised(key, async (loaded) => {
            // A sequence takes a slot of its own.
            if (data.length > 1024) await ledger.makeRoom(nameInLedger(key))
            return await tpm.hmac(loaded, data)
          }),
      ),
    clock: async () => await run(async () => await readClockState(tpm)),
    close: async () =>
      await tpm.exclusive(async () => {
        await policies.close()
        await ledger.clear()
        await tpm.unprotect()
      }),
  }
}

const nameInLedger = (blob: KeyBlob): string => `key/${createHash('sha256').update(blob.private).digest('base64')}`

/** A handle or session that we hold is unknown to the TPM, or it wants to be started. */
const wasReset = (error: TpmError): boolean =>
  error.code === rc.initialize ||
  (error.code & 0xff8) === rc.referenceH0 ||
  (error.code & 0xff8) === rc.referenceS0 ||
  ((error.code & 0x0c0) === 0x080 && (error.code & 0x3f) === (rc.handle & 0x3f)) ||
  // The number of a session that another one has taken since: its HMAC fails. What the TPM calls it depends on whether failures are counted.
  ((error.code & 0x8c0) === 0x880 && [rc.authFail, rc.badAuth].some((base) => error.is(base)))
