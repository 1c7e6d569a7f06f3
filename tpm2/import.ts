import { concat, empty, sized, u16 } from './bytes.ts'
import { alg, attribute } from './constants.ts'
import { outerWrap, shareSeed, type Random } from './credential.ts'
import { cfbEncrypt, digest } from './kdf.ts'
import { nameOf } from './names.ts'
import { marshalPublic, type KeyedHashPublic } from './structures.ts'

/** The TPM refuses an import for what it was handed: altered, of another delivery, or for another parent. `cause`: its TpmError. */
export class ImportRefused extends Error {
  override readonly name = 'ImportRefused'
}

/** Attributes of an imported key under a policy: userWithAuth is clear, the policy is the only way to use it. */
export const importedAttributes = attribute.noDA | attribute.encryptedDuplication | attribute.sign

/**
 * An HMAC-SHA256 key (32 bytes) as TPM2_Import takes it (Part 1 §23.3.2): readable only inside the TPM that holds `parent` (an SRK that the AK has
 * certified), never to leave it again: TPM2_Duplicate asks for a policy with its own command code, and what is approved under `authPolicy` is PolicyPCR
 * alone. Without a policy (null) its empty authorisation value is enough to use it, and nothing to duplicate it. The inner wrapper's AES-128 key travels by another way. `public`: TPMT_PUBLIC, `duplicate`: content of TPM2B_PRIVATE, `seed`: content of
 * TPM2B_ENCRYPTED_SECRET.
 */
export const wrapForImport = (of: {
  parent: Uint8Array
  key: Uint8Array
  authPolicy: Uint8Array | null
  random: Random
}): { public: Uint8Array; duplicate: Uint8Array; seed: Uint8Array; innerKey: Uint8Array } => {
  const obfuscation = of.random(32)
  const object: KeyedHashPublic = {
    type: alg.keyedhash,
    nameAlg: alg.sha256,
    attributes: of.authPolicy === null ? importedAttributes | attribute.userWithAuth : importedAttributes,
    authPolicy: of.authPolicy ?? empty,
    scheme: { scheme: alg.hmac, hash: alg.sha256 },
    unique: digest(alg.sha256, obfuscation, of.key),
  }
  const publicBytes = marshalPublic(object)
  const name = nameOf(publicBytes)
  // TPM2B_SENSITIVE of TPMT_SENSITIVE: type, empty auth value, seed value, the key.
  const sensitive = sized(concat(u16(alg.keyedhash), sized(empty), sized(obfuscation), sized(of.key)))
  const innerKey = of.random(16)
  const inner = cfbEncrypt(innerKey, concat(sized(digest(alg.sha256, sensitive, name)), sensitive))
  sensitive.fill(0)
  const { seed, secret } = shareSeed(of.parent, 'DUPLICATE', of.random)
  return { public: publicBytes, duplicate: outerWrap(of.parent, seed, name, inner), seed: secret, innerKey }
}
