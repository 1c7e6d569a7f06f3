import { verify } from 'node:crypto'
import { concat, parseAll, sized, TpmFormatError, u16, u32, u64, u8, type Reader } from './bytes.ts'
import { alg, generated, tag } from './constants.ts'
import { hashName } from './kdf.ts'
import { keyObjectOf, marshalPcrSelection, parsePublic, readHash, readPcrSelection, type PcrBank } from './structures.ts'

export interface ClockInfo {
  /** Milliseconds that the TPM was powered. */
  readonly clock: bigint
  readonly resetCount: number
  readonly restartCount: number
  readonly safe: boolean
}

interface AttestCommon {
  readonly qualifiedSigner: Uint8Array
  readonly extraData: Uint8Array
  readonly clockInfo: ClockInfo
  readonly firmwareVersion: bigint
}

/** TPMS_ATTEST (Part 2 §10.12.8) of a quote or of a certified key. */
export type Attest =
  | (AttestCommon & { readonly type: 'quote'; readonly selection: readonly PcrBank[]; readonly pcrDigest: Uint8Array })
  | (AttestCommon & { readonly type: 'certify'; readonly name: Uint8Array; readonly qualifiedName: Uint8Array })

const readClock = (reader: Reader): ClockInfo => {
  const clock = { clock: reader.u64(), resetCount: reader.u32(), restartCount: reader.u32() }
  const safe = reader.u8()
  if (safe > 1) throw new TpmFormatError('a YES/NO that is neither')
  return { ...clock, safe: safe === 1 }
}

/** Parses a TPMS_ATTEST; throws TpmFormatError for another magic, another type, trailing bytes. */
export const parseAttest = (bytes: Uint8Array): Attest =>
  parseAll(bytes, (reader): Attest => {
    if (reader.u32() !== generated) throw new TpmFormatError('not made by a TPM: another magic')
    const type = reader.u16()
    const common = { qualifiedSigner: reader.sized(68), extraData: reader.sized(68), clockInfo: readClock(reader), firmwareVersion: reader.u64() }
    if (type === tag.attestQuote) return { type: 'quote', ...common, selection: readPcrSelection(reader), pcrDigest: reader.sized(64) }
    if (type === tag.attestCertify) return { type: 'certify', ...common, name: reader.sized(68), qualifiedName: reader.sized(68) }
    throw new TpmFormatError(`attestation type ${type.toString(16)}`)
  })

/** TPMS_ATTEST bytes. */
export const marshalAttest = (of: Attest): Uint8Array =>
  concat(
    u32(generated),
    u16(of.type === 'quote' ? tag.attestQuote : tag.attestCertify),
    sized(of.qualifiedSigner),
    sized(of.extraData),
    u64(of.clockInfo.clock),
    u32(of.clockInfo.resetCount),
    u32(of.clockInfo.restartCount),
    u8(of.clockInfo.safe ? 1 : 0),
    u64(of.firmwareVersion),
    ...(of.type === 'quote' ? [marshalPcrSelection(of.selection), sized(of.pcrDigest)] : [sized(of.name), sized(of.qualifiedName)]),
  )

/** TPMT_SIGNATURE (Part 2 §11.3.4): ECDSA, RSASSA, RSAPSS. */
export type Signature =
  | { readonly scheme: typeof alg.ecdsa; readonly hash: number; readonly r: Uint8Array; readonly s: Uint8Array }
  | { readonly scheme: typeof alg.rsassa | typeof alg.rsapss; readonly hash: number; readonly signature: Uint8Array }

export const readSignature = (reader: Reader): Signature => {
  const scheme = reader.u16()
  if (scheme === alg.ecdsa) return { scheme, hash: readHash(reader), r: reader.sized(66), s: reader.sized(66) }
  if (scheme === alg.rsassa || scheme === alg.rsapss) return { scheme, hash: readHash(reader), signature: reader.sized(512) }
  throw new TpmFormatError(`signature scheme ${scheme.toString(16)}`)
}

export const parseSignature = (bytes: Uint8Array): Signature => parseAll(bytes, readSignature)

export const marshalSignature = (of: Signature): Uint8Array =>
  of.scheme === alg.ecdsa ? concat(u16(of.scheme), u16(of.hash), sized(of.r), sized(of.s)) : concat(u16(of.scheme), u16(of.hash), sized(of.signature))

/** Raw r‖s (64 bytes) of an ECDSA P-256 signature. */
export const rawOf = (signature: Signature): Uint8Array => {
  if (signature.scheme !== alg.ecdsa) throw new TpmFormatError('not an ECDSA signature')
  const raw = new Uint8Array(64)
  if (signature.r.length > 32 || signature.s.length > 32) throw new TpmFormatError('not a P-256 signature')
  raw.set(signature.r, 32 - signature.r.length)
  raw.set(signature.s, 64 - signature.s.length)
  return raw
}

/**
 * Whether the key signed these bytes with exactly the scheme of its own public area: the algorithm named in the signature is the attacker's choice and counts
 * only when it is the key's. P-256 ECDSA keys. Throws TpmFormatError for what does not parse.
 */
export const verifyAttest = (attest: Uint8Array, signatureBytes: Uint8Array, publicBytes: Uint8Array): boolean => {
  const key = parsePublic(publicBytes)
  const signature = parseSignature(signatureBytes)
  if (key.type !== alg.ecc || signature.scheme !== alg.ecdsa) return false
  if (key.scheme?.scheme !== alg.ecdsa || key.scheme.hash !== signature.hash || signature.hash === alg.sha1) return false
  return verify(hashName(signature.hash).name, attest, { key: keyObjectOf(key), dsaEncoding: 'ieee-p1363' }, rawOf(signature))
}
