import { createHash, createPublicKey, verify } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { derSignature } from '@fleetkey/protocol/signed.ts'
import type { KmsKeyPurpose } from '../../flows/context.ts'
import { isKeyName, isPurpose, purposes } from '../policy.ts'
import { ck, type Attribute, type Cryptoki, type Handle, type Mechanism } from './cryptoki.ts'
import type { Session } from './token.ts'

/** A key as it is in the token. Its handle is of the present opening. */
export interface TokenKey {
  readonly name: string
  readonly purpose: KmsKeyPurpose
  readonly handle: Handle
  readonly publicHandle: Handle | null
  readonly spki: Uint8Array | null
}

const { attribute: at } = ck
/** OBJECT IDENTIFIER prime256v1. */
const p256 = Buffer.from('06082a8648ce3d030107', 'hex')
/** SubjectPublicKeyInfo of a P-256 key up to its point (RFC 5480). */
const spkiHead = Buffer.from('3059301306072a8648ce3d020106082a8648ce3d030107034200', 'hex')
const ecdsa: Mechanism = { mechanism: ck.mechanism.ecdsa, parameter: null }
/** Objects of one token that are looked at. */
const maxObjects = 10_000

/** The purpose is in the label: who has no PIN cannot give a key another one. */
const labelOf = (namespace: string, purpose: KmsKeyPurpose, name: string): string => `fleetkey/${namespace}/${purpose}/${name}`

const readLabel = (namespace: string, label: string): { readonly name: string; readonly purpose: KmsKeyPurpose } | undefined => {
  const [head, space, purpose, name, ...more] = label.split('/')
  return head === 'fleetkey' && space === namespace && more.length === 0 && isPurpose(purpose) && isKeyName(name) ? { name, purpose } : undefined
}

const refused = (label: string, why: string): Problem => new Problem('internal', `key ${label} in the token ${why}`, { reason: 'kms.tampered' })

const objects = (cryptoki: Cryptoki, session: Session, template: readonly Attribute[]): readonly Handle[] => {
  cryptoki.C_FindObjectsInit(session.handle, template)
  try {
    const all: Handle[] = []
    for (let some = cryptoki.C_FindObjects(session.handle, 100); some.length > 0; some = cryptoki.C_FindObjects(session.handle, 100)) {
      all.push(...some)
      if (all.length > maxObjects) throw new Problem('unavailable', `the token has more than ${maxObjects} objects`, { reason: 'kms.token' })
    }
    return all
  } finally {
    cryptoki.C_FindObjectsFinal(session.handle)
  }
}

const values = (cryptoki: Cryptoki, session: Session, object: Handle, types: readonly number[]): readonly Buffer[] =>
  cryptoki
    .C_GetAttributeValue(
      session.handle,
      object,
      types.map((type) => ({ type })),
    )
    .map(({ value }) => value)

const isSet = (value: Buffer | undefined): boolean => value?.[0] === 1

/** Refuses a key that could leave the token, or ever could have. */
const mustStay = (cryptoki: Cryptoki, session: Session, object: Handle, label: string): void => {
  const [sensitive, extractable, always, never] = values(cryptoki, session, object, [at.sensitive, at.extractable, at.alwaysSensitive, at.neverExtractable])
  if (!isSet(sensitive) || isSet(extractable) || !isSet(always) || !isSet(never)) throw refused(label, 'can be, or could have been, read out of it')
}

/** CKA_EC_POINT is the point in an OCTET STRING; some tokens leave that out. */
const spkiOf = (point: Buffer | undefined, label: string): Uint8Array => {
  const bare = point?.length === 67 && point[0] === 0x04 && point[1] === 65 ? point.subarray(2) : point
  if (bare?.length !== 65 || bare[0] !== 0x04) throw refused(label, 'is not on P-256')
  return new Uint8Array(Buffer.concat([spkiHead, bare]))
}

/** ECDSA over a digest; DER. */
export const signDigest = async (cryptoki: Cryptoki, session: Session, key: Handle, digest: Buffer): Promise<Uint8Array> => {
  const out = Buffer.alloc(64)
  session.held = [digest, out]
  cryptoki.C_SignInit(session.handle, ecdsa, key)
  const started = performance.now()
  const raw = session.pace.isQuick ? cryptoki.C_Sign(session.handle, digest, out) : await cryptoki.C_SignAsync(session.handle, digest, out)
  session.pace.took(performance.now() - started)
  if (raw.length !== 64) throw new Error(`a signature of ${raw.length} bytes`)
  return derSignature(raw)
}

export const digestOf = (data: Uint8Array): Buffer => createHash('sha256').update(data).digest()

/** Public keys need no PIN to be planted: the private key has to agree. */
const mustAgree = async (cryptoki: Cryptoki, session: Session, key: TokenKey): Promise<void> => {
  if (key.spki === null) return
  const data = Buffer.from(`fleetkey/kms-pair/1 ${key.name}`)
  const signature = await signDigest(cryptoki, session, key.handle, digestOf(data))
  if (!verify('sha256', data, createPublicKey({ key: Buffer.from(key.spki), format: 'der', type: 'spki' }), signature))
    throw refused(key.name, 'has a public key that is not its own')
}

/**
 * Every key of this namespace. `known`: public keys that were proven to be those of their private keys before, in this process. Throws Problem('internal', reason
 * `kms.tampered`).
 */
export const findKeys = async (
  cryptoki: Cryptoki,
  session: Session,
  of: { readonly namespace: string; readonly known: ReadonlyMap<string, TokenKey> },
): Promise<ReadonlyMap<string, TokenKey>> => {
  const labelled = (kind: number): Map<string, Handle> => {
    const found = new Map<string, Handle>()
    for (const object of objects(cryptoki, session, [
      { type: at.class, value: kind },
      { type: at.token, value: true },
    ])) {
      const label = values(cryptoki, session, object, [at.label])[0]?.toString('utf8') ?? ''
      if (readLabel(of.namespace, label) === undefined) continue
      // Two of a kind could be told apart by nobody.
      if (found.has(label)) throw refused(label, 'is there twice')
      found.set(label, object)
    }
    return found
  }
  const [secrets, privates, publics] = [labelled(ck.object.secretKey), labelled(ck.object.privateKey), labelled(ck.object.publicKey)]
  const keys = new Map<string, TokenKey>()
  for (const [label, handle] of [...secrets, ...privates]) {
    const named = readLabel(of.namespace, label)
    if (named === undefined) continue
    if (keys.has(named.name)) throw refused(label, 'is there twice')
    if ((purposes[named.purpose] === 'aes') !== secrets.has(label)) throw refused(label, 'is of the wrong kind')
    mustStay(cryptoki, session, handle, label)
    const publicHandle = publics.get(label) ?? null
    if (publicHandle === null && !secrets.has(label)) throw refused(label, 'has no public key beside it')
    const spki = publicHandle === null ? null : spkiOf(values(cryptoki, session, publicHandle, [at.ecPoint])[0], label)
    const key: TokenKey = { ...named, handle, publicHandle, spki }
    const before = of.known.get(named.name)?.spki
    if (before === undefined || before === null || spki === null || Buffer.compare(before, spki) !== 0) await mustAgree(cryptoki, session, key)
    keys.set(named.name, key)
  }
  return keys
}

/** Makes a key in the token that never leaves it. */
export const generateKey = async (
  cryptoki: Cryptoki,
  session: Session,
  of: { readonly namespace: string; readonly name: string; readonly purpose: KmsKeyPurpose; readonly id: Uint8Array },
): Promise<TokenKey> => {
  const { name, purpose } = of
  const label = labelOf(of.namespace, purpose, name)
  const common: readonly Attribute[] = [
    { type: at.token, value: true },
    { type: at.label, value: label },
    { type: at.id, value: Buffer.from(of.id) },
    { type: at.modifiable, value: false },
  ]
  const stays: readonly Attribute[] = [
    { type: at.private, value: true },
    { type: at.sensitive, value: true },
    { type: at.extractable, value: false },
  ]
  if (purposes[purpose] === 'aes') {
    const handle = cryptoki.C_GenerateKey(session.handle, { mechanism: ck.mechanism.aesKeyGen, parameter: null }, [
      { type: at.class, value: ck.object.secretKey },
      { type: at.keyType, value: ck.keyType.aes },
      ...common,
      ...stays,
      { type: at.valueLength, value: 32 },
      { type: at.encrypt, value: true },
      { type: at.decrypt, value: true },
      { type: at.sign, value: false },
      { type: at.verify, value: false },
      { type: at.wrap, value: false },
      { type: at.unwrap, value: false },
    ])
    return await accepted(cryptoki, session, { name, purpose, handle, publicHandle: null, spki: null })
  }
  const made = cryptoki.C_GenerateKeyPair(
    session.handle,
    { mechanism: ck.mechanism.ecKeyPairGen, parameter: null },
    [
      { type: at.class, value: ck.object.publicKey },
      { type: at.keyType, value: ck.keyType.ec },
      ...common,
      { type: at.ecParameters, value: p256 },
      { type: at.verify, value: true },
      { type: at.encrypt, value: false },
      { type: at.wrap, value: false },
    ],
    [
      { type: at.class, value: ck.object.privateKey },
      { type: at.keyType, value: ck.keyType.ec },
      ...common,
      ...stays,
      { type: at.sign, value: true },
      { type: at.decrypt, value: false },
      { type: at.unwrap, value: false },
    ],
  )
  const spki = spkiOf(values(cryptoki, session, made.publicKey, [at.ecPoint])[0], label)
  return await accepted(cryptoki, session, { name, purpose, handle: made.privateKey, publicHandle: made.publicKey, spki })
}

/** A key that the token has not made as it was told is not left behind. */
const accepted = async (cryptoki: Cryptoki, session: Session, key: TokenKey): Promise<TokenKey> => {
  try {
    mustStay(cryptoki, session, key.handle, key.name)
    await mustAgree(cryptoki, session, key)
    return key
  } catch (thrown) {
    if (thrown instanceof Problem) for (const object of [key.handle, key.publicHandle]) if (object !== null) cryptoki.C_DestroyObject(session.handle, object)
    throw thrown
  }
}
