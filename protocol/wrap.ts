import { decode, encode } from './cbor.ts'
import { open, seal } from './hpke.ts'
import type { Protection } from './messages.ts'
import { Problem } from './problem.ts'
import { Secret } from './secret.ts'

/**
 * What sealed key material is for; all of it is authenticated, so that bytes cannot be moved to another device, key, epoch or protection.
 * `inner`: the key of a `tpm` delivery's inner wrapper; `labels`: labels of a broadcast group, `key` is then the place (`placeName`) and `epoch` the generation.
 */
export interface WrapContext {
  readonly tenant: string
  readonly device: string
  readonly key: string
  readonly epoch: number
  readonly protection: Protection
  readonly purpose: 'key' | 'inner' | 'labels'
}

/** What labels are sealed for: `<group>/<shard>/<slot>`. */
export const placeName = (of: { readonly group: string; readonly shard: number; readonly slot: number }): string => `${of.group}/${of.shard}/${of.slot}`

/** Who opens. `dh` multiplies the point by the recipient's private key, inside the TPM, and gives the x coordinate (32 bytes). */
export interface Recipient {
  readonly point: Uint8Array
  dh(ephemeral: Uint8Array): Promise<Uint8Array>
}

const tag = 0xd0
/** HPKE-7: DHKEM(P-256), HKDF-SHA256, AES-256-GCM (draft-ietf-cose-hpke). The one suite; anything else is refused, nothing is negotiated. */
const hpke7 = 45
const ek = -4
const protectedHeader = encode(new Map([[1, hpke7]]))

const infoOf = (of: WrapContext): Uint8Array => encode(['fleetkey/1/wrap', hpke7, of.tenant, of.device, of.key, of.epoch, of.protection, of.purpose])
/** Enc_structure (RFC 9052 §5.3) with the same context as external_aad. */
const aadOf = (info: Uint8Array): Uint8Array => encode(['Encrypt0', protectedHeader, info])

/** COSE_Encrypt0 (RFC 9052 §5.2, tag 16) of `plaintext` to a recipient key: P-256 point, 65 bytes uncompressed. */
export const sealTo = (recipient: Uint8Array, plaintext: Secret, context: WrapContext): Uint8Array => {
  const info = infoOf(context)
  const { enc, ciphertext } = seal('aes-256-gcm', recipient, info, aadOf(info), plaintext.bytes())
  return Buffer.concat([Uint8Array.of(tag), encode([protectedHeader, new Map([[ek, enc]]), ciphertext])])
}

/** Opens what `sealTo` made for this recipient and context. Throws Problem: `malformed`, `unsupported` suite, or `unauthenticated` when it is not ours or was moved. */
export const openSealed = async (bytes: Uint8Array, context: WrapContext, recipient: Recipient): Promise<Secret> => {
  if (bytes[0] !== tag || bytes.length > 4096) throw new Problem('malformed', 'not a COSE_Encrypt0', { reason: 'wrap.tag' })
  const outer = decode(bytes.subarray(1), { useMaps: true })
  const [header, unprotected, ciphertext] = (Array.isArray(outer) && outer.length === 3 ? outer : []) as readonly unknown[]
  if (!(header instanceof Uint8Array && unprotected instanceof Map && ciphertext instanceof Uint8Array))
    throw new Problem('malformed', 'not a COSE_Encrypt0', { reason: 'wrap.layout' })
  if (Buffer.compare(header, protectedHeader) !== 0) throw new Problem('unsupported', 'another suite than HPKE-7', { reason: 'wrap.suite' })
  const enc: unknown = unprotected.get(ek)
  if (unprotected.size !== 1 || !(enc instanceof Uint8Array) || enc.length !== 65 || enc[0] !== 4)
    throw new Problem('malformed', 'no encapsulated key', { reason: 'wrap.ek' })
  const dh = await recipient.dh(enc)
  const info = infoOf(context)
  const plaintext = open('aes-256-gcm', dh, recipient.point, info, aadOf(info), { enc, ciphertext })
  dh.fill(0)
  if (plaintext === undefined) throw new Problem('unauthenticated', 'the wrapped key does not open here', { reason: 'wrap.open' })
  const secret = new Secret(plaintext)
  plaintext.fill(0)
  return secret
}
