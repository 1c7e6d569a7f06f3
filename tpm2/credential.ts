import { constants, createECDH, publicEncrypt } from 'node:crypto'
import { ascii, concat, empty, sized, TpmFormatError, u8 } from './bytes.ts'
import { alg, curve } from './constants.ts'
import { cfbEncrypt, hashName, hmac, kdfA, kdfE } from './kdf.ts'
import { keyObjectOf, marshalPoint, parsePublic } from './structures.ts'

const curves: ReadonlyMap<number, { readonly name: string; readonly size: number }> = new Map([
  [curve.p256, { name: 'prime256v1', size: 32 }],
  [curve.p384, { name: 'secp384r1', size: 48 }],
])

/** Fresh random bytes. */
export type Random = (length: number) => Uint8Array

/**
 * A seed that only the owner of this storage key can get at (Part 1 Annex B.10.3, C.6.3), and its TPM2B_ENCRYPTED_SECRET content. Labels: `IDENTITY`
 * for credentials, `DUPLICATE` for import, `SECRET` for session salts. Throws TpmFormatError for a point that is not on its curve.
 */
export const shareSeed = (publicBytes: Uint8Array, label: 'IDENTITY' | 'DUPLICATE' | 'SECRET', random: Random): { seed: Uint8Array; secret: Uint8Array } => {
  const key = parsePublic(publicBytes)
  const { name, size } = hashName(key.nameAlg)
  if (key.type === alg.rsa) {
    const seed = random(size)
    const padding = constants.RSA_PKCS1_OAEP_PADDING
    const secret = publicEncrypt({ key: keyObjectOf(key), padding, oaepHash: name, oaepLabel: Buffer.from(concat(ascii(label), u8(0))) }, seed)
    return { seed, secret: new Uint8Array(secret) }
  }
  const known = key.type === alg.ecc ? curves.get(key.curve) : undefined
  if (key.type !== alg.ecc || known === undefined) throw new TpmFormatError('seeds are shared with RSA, P-256 and P-384 keys')
  keyObjectOf(key)
  const pair = createECDH(known.name)
  pair.generateKeys()
  const ephemeral = new Uint8Array(pair.getPublicKey())
  const [x, y] = [ephemeral.subarray(1, 1 + known.size), ephemeral.subarray(1 + known.size)]
  const field = (bytes: Uint8Array): Uint8Array => concat(new Uint8Array(known.size - bytes.length), bytes)
  const z = pair.computeSecret(concat(u8(4), field(key.x), field(key.y)))
  return { seed: kdfE(key.nameAlg, z, label, x, field(key.x), size * 8), secret: marshalPoint(x, y) }
}

/** Outer wrapper of credentials and imports (Part 1 §24.3, §23.3.2.3): HMAC(dup ‖ name) as TPM2B, and the encrypted bytes. */
export const outerWrap = (publicBytes: Uint8Array, seed: Uint8Array, name: Uint8Array, plaintext: Uint8Array): Uint8Array => {
  const { nameAlg, ...key } = parsePublic(publicBytes)
  const bits = key.type !== alg.keyedhash && key.symmetric !== null ? key.symmetric.keyBits : 128
  const encrypted = cfbEncrypt(kdfA(nameAlg, seed, 'STORAGE', name, empty, bits), plaintext)
  const macKey = kdfA(nameAlg, seed, 'INTEGRITY', empty, empty, hashName(nameAlg).size * 8)
  return concat(sized(hmac(nameAlg, macKey, encrypted, name)), encrypted)
}

/**
 * TPM2_MakeCredential in software: only the TPM that holds this EK, and in it the object of this Name, can get at `secret` (at most 32 bytes).
 * `blob` is the content of TPM2B_ID_OBJECT, `secret` that of TPM2B_ENCRYPTED_SECRET.
 */
export const makeCredential = (of: {
  ek: Uint8Array
  name: Uint8Array
  secret: { bytes(): Uint8Array }
  random: Random
}): { blob: Uint8Array; secret: Uint8Array } => {
  const { seed, secret } = shareSeed(of.ek, 'IDENTITY', of.random)
  return { blob: outerWrap(of.ek, seed, of.name, sized(of.secret.bytes())), secret }
}
