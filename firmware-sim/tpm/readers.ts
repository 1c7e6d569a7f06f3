import { alg, curve, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import type { Signature } from '@fleetkey/tpm2/attest.ts'
import type { PcrBank, Public, Scheme, Symmetric } from '@fleetkey/tpm2/structures.ts'
import type { Input } from './input.ts'
import { rc, Refusal } from './refusal.ts'

/** Readers of command parameters (Part 2), each refusing with the code of its type. */
type Read<T> = (input: Input) => T

const oneOf =
  (values: ReadonlySet<number>, code: number) =>
  (value: number): number => {
    if (!values.has(value)) throw new Refusal(code)
    return value
  }

export const u16: Read<number> = (input) => input.u16()
export const u32: Read<number> = (input) => input.u32()
export const u64: Read<bigint> = (input) => input.u64()
/** TPM2B of at most `max` bytes, copied: what is kept must not hold on to the command. */
export const buffer =
  (max: number): Read<Uint8Array> =>
  (input) =>
    input.sized(max).slice()
export const digestBytes = buffer(64)
/** TPM2B_DATA: the size of a TPMT_HA. */
export const dataBytes = buffer(66)
export const nameBytes = buffer(68)
export const secretBytes = buffer(384)
export const privateBytes = buffer(1490)
export const maxBuffer = buffer(1024)

export const yesNo: Read<boolean> = (input) => {
  const value = input.u8()
  if (value > 1) throw new Refusal(rc.value)
  return value === 1
}

const hashes: ReadonlySet<number> = new Set([alg.sha1, alg.sha256, alg.sha384, alg.sha512])
const checkHash = oneOf(hashes, rc.hash)
export const hashAlg: Read<number> = (input) => checkHash(input.u16())
/** null for TPM_ALG_NULL. */
export const hashOrNull: Read<number | null> = (input) => {
  const hash = input.u16()
  return hash === alg.null ? null : checkHash(hash)
}

const hierarchies: ReadonlySet<number> = new Set([known.owner, known.endorsement, known.platform, known.null])
const checkHierarchy = oneOf(hierarchies, rc.value)
export const hierarchyOrNull: Read<number> = (input) => checkHierarchy(input.u32())

const keyBits = oneOf(new Set([128, 256]), rc.value)
/** CTR, OFB, CBC, CFB, ECB. */
const modes = oneOf(new Set([0x40, 0x41, 0x42, 0x43, 0x44]), rc.mode)

/** A cipher with its key size and mode, AES in all of them; null for TPM_ALG_NULL. */
export const symmetricObject: Read<Symmetric | null> = (input) => {
  const algorithm = input.u16()
  if (algorithm === alg.null) return null
  if (algorithm !== alg.aes) throw new Refusal(rc.symmetric)
  const bits = keyBits(input.u16())
  const mode = input.u16()
  return { algorithm, keyBits: bits, mode: mode === alg.null ? mode : modes(mode) }
}

/** TPMT_SYM_DEF of a session: a cipher, or XOR with a hash. */
export const symmetricSession: Read<Symmetric | { readonly xor: number } | null> = (input) => {
  const algorithm = input.u16()
  if (algorithm === alg.null) return null
  if (algorithm === alg.xor) return { xor: hashAlg(input) }
  if (algorithm !== alg.aes) throw new Refusal(rc.symmetric)
  const bits = keyBits(input.u16())
  const mode = input.u16()
  return { algorithm, keyBits: bits, mode: mode === alg.null ? mode : modes(mode) }
}

const schemeOf =
  (allowed: readonly number[], code: number): Read<Scheme | null> =>
  (input) => {
    const scheme = input.u16()
    if (scheme === alg.null) return null
    if (!allowed.includes(scheme)) throw new Refusal(code)
    // RSAES is a scheme without a hash.
    return { scheme, hash: scheme === alg.rsaes ? 0 : hashAlg(input) }
  }

const eccScheme = schemeOf([alg.ecdsa, alg.ecdh], rc.scheme)
const rsaScheme = schemeOf([alg.rsassa, alg.rsapss, alg.rsaes, alg.oaep], rc.value)
const keyedHashScheme = schemeOf([alg.hmac], rc.value)
export const signatureScheme = schemeOf([alg.rsassa, alg.rsapss, alg.ecdsa, alg.hmac], rc.scheme)

const curves = oneOf(new Set([curve.p256, curve.p384]), rc.curve)
const rsaBits = oneOf(new Set([1024, 2048, 3072]), rc.value)
const objectReserved = 0xfff0_f309

const eccParameters = (input: Input): { symmetric: Symmetric | null; scheme: Scheme | null; curve: number } => {
  const parameters = { symmetric: symmetricObject(input), scheme: eccScheme(input), curve: curves(input.u16()) }
  if (input.u16() !== alg.null) throw new Refusal(rc.kdf)
  return parameters
}
const rsaParameters = (input: Input): { symmetric: Symmetric | null; scheme: Scheme | null; keyBits: number; exponent: number } => ({
  symmetric: symmetricObject(input),
  scheme: rsaScheme(input),
  keyBits: rsaBits(input.u16()),
  exponent: input.u32(),
})

const objectType = oneOf(new Set<number>([alg.rsa, alg.ecc, alg.keyedhash]), rc.type)

/** TPMT_PUBLIC: RSA, ECC and keyed-hash objects. */
export const publicArea: Read<Public> = (input) => {
  const type = objectType(input.u16())
  const common = { nameAlg: hashAlg(input), attributes: input.u32(), authPolicy: new Uint8Array(0) }
  if ((common.attributes & objectReserved) !== 0) throw new Refusal(rc.reservedBits)
  common.authPolicy = input.sized(64).slice()
  if (type === alg.rsa) return { type, ...common, ...rsaParameters(input), modulus: input.sized(384).slice() }
  if (type === alg.ecc) return { type, ...common, ...eccParameters(input), x: input.sized(80).slice(), y: input.sized(80).slice() }
  return { type: alg.keyedhash, ...common, scheme: keyedHashScheme(input), unique: input.sized(64).slice() }
}

export const publicSized: Read<Public> = (input) => input.inner(publicArea)

/** TPMT_PUBLIC_PARMS of TPM2_TestParms. */
export const publicParameters: Read<void> = (input) => {
  const type = objectType(input.u16())
  if (type === alg.rsa) rsaParameters(input)
  else if (type === alg.ecc) eccParameters(input)
  else keyedHashScheme(input)
}

/** TPMS_SENSITIVE_CREATE in its TPM2B. */
export const sensitiveCreate: Read<{ auth: Uint8Array; data: Uint8Array }> = (input) =>
  input.inner((inner) => ({ auth: inner.sized(64).slice(), data: inner.sized(128).slice() }))

export const eccPoint: Read<{ x: Uint8Array; y: Uint8Array }> = (input) => ({ x: input.sized(80).slice(), y: input.sized(80).slice() })

/** Signature by an HMAC key, besides those of `@fleetkey/tpm2`. */
export type AnySignature = Signature | { readonly scheme: typeof alg.hmac; readonly hash: number; readonly mac: Uint8Array }

const digestSize = new Map<number, number>([
  [alg.sha1, 20],
  [alg.sha256, 32],
  [alg.sha384, 48],
  [alg.sha512, 64],
])
export const sizeOfHash = (hash: number): number => digestSize.get(hash) ?? 0

/** TPMT_SIGNATURE. */
export const signature: Read<AnySignature> = (input) => {
  const scheme = signatureScheme(input)
  if (scheme === null) throw new Refusal(rc.scheme)
  const { hash } = scheme
  if (scheme.scheme === alg.hmac) return { scheme: alg.hmac, hash, mac: input.bytes(sizeOfHash(hash)).slice() }
  if (scheme.scheme === alg.ecdsa) return { scheme: alg.ecdsa, hash, r: input.sized(80).slice(), s: input.sized(80).slice() }
  return { scheme: scheme.scheme === alg.rsassa ? alg.rsassa : alg.rsapss, hash, signature: input.sized(384).slice() }
}

export interface Ticket {
  readonly hierarchy: number
  readonly digest: Uint8Array
}

/** TPM_ST constants (Part 2 §6.9): what is none of them is a VALUE, one of another kind a TAG. */
export const structureTags: ReadonlySet<number> = new Set([
  0x00c4, 0x8000, 0x8001, 0x8002, 0x8014, 0x8015, 0x8016, 0x8017, 0x8018, 0x8019, 0x801a, 0x8021, 0x8022, 0x8023, 0x8024, 0x8025,
])

const ticket =
  (kind: number): Read<Ticket> =>
  (input) => {
    const found = input.u16()
    if (!structureTags.has(found)) throw new Refusal(rc.value)
    if (found !== kind) throw new Refusal(rc.tag)
    return { hierarchy: hierarchyOrNull(input), digest: input.sized(64).slice() }
  }

export const creationTicket = ticket(tag.creation)
export const verifiedTicket = ticket(tag.verified)
export const hashTicket = ticket(tag.hashcheck)

/** One bank of a selection; a TPM may be asked in fewer bytes than it has PCRs, ours has three. */
const bank: Read<PcrBank> = (input) => {
  const hash = hashAlg(input)
  if (input.u8() !== 3) throw new Refusal(rc.value)
  const bits = input.bytes(3)
  return { hash, pcrs: Array.from({ length: 24 }, (_, pcr) => pcr).filter((pcr) => ((bits[pcr >> 3] ?? 0) >> (pcr & 7)) & 1) }
}

/** TPML_PCR_SELECTION: at most as many banks as there are hashes. */
export const pcrSelection: Read<readonly PcrBank[]> = (input) => {
  const count = input.u32()
  if (count > 4) throw new Refusal(rc.size)
  return Array.from({ length: count }, () => bank(input))
}

/** TPML_DIGEST_VALUES. */
export const digestValues: Read<readonly { hash: number; digest: Uint8Array }[]> = (input) => {
  const count = input.u32()
  if (count > 4) throw new Refusal(rc.size)
  return Array.from({ length: count }, () => {
    const hash = hashAlg(input)
    return { hash, digest: input.bytes(sizeOfHash(hash)).slice() }
  })
}
