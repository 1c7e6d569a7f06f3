import { createHash, createHmac, hash as oneShot } from 'node:crypto'
import type { TrustBundle } from './messages.ts'
import type { Secret } from './secret.ts'
import { encode } from './cbor.ts'

/** What both ends commit to. Each value is SHA-256 over the deterministic CBOR array that starts with its own label. */
const hash = (...parts: readonly unknown[]): Uint8Array => sha256(encode(parts))
export const sha256 = (...data: readonly Uint8Array[]): Uint8Array => {
  const [only] = data
  // Through a string: a Buffer of its own costs more than the hash.
  if (only !== undefined && data.length === 1) return Buffer.from(oneShot('sha256', only, 'binary'), 'latin1')
  const digest = createHash('sha256')
  for (const part of data) digest.update(part)
  return digest.digest()
}

/** Label and (explicitly empty) context of `tlsSocket.exportKeyingMaterial(32, …)` (RFC 8446 §7.5). */
export const exporterLabel = 'EXPERIMENTAL-fleetkey-1'

/**
 * The nonce that the device computes itself and quotes or signs: bound to its own TLS connection, so that a relay gets nothing. `subject`: what the proof is
 * about: the TPM name of the EK, or SHA-256 of the SPKI of the IDevID key (method idevid) or of the LDevID key (method token).
 */
export const enrolmentNonce = (of: {
  tenant: string
  subject: Uint8Array
  purpose: string
  exporter: Uint8Array
  helloRandom: Uint8Array
  challengeRandom: Uint8Array
}): Uint8Array => hash('fleetkey/1/enrol', of.tenant, of.subject, of.purpose, of.exporter, of.helloRandom, of.challengeRandom)

/** hello and challenge as the signed bytes on the wire; `recipient`: the TPMT_PUBLIC that the answer carries, null where the hello had it. */
export const enrolmentTranscript = (of: {
  hello: Uint8Array
  challenge: Uint8Array
  ldevidCsr: Uint8Array
  tlsCsr: Uint8Array
  eventLog: Uint8Array
  recipient: Uint8Array | null
}): Uint8Array =>
  hash(
    'fleetkey/1/transcript',
    sha256(of.hello),
    sha256(of.challenge),
    sha256(of.ldevidCsr),
    sha256(of.tlsCsr),
    sha256(of.eventLog),
    of.recipient === null ? null : sha256(of.recipient),
  )

/**
 * policyRef of keys under firmware: which model, and which generation of approvals. An approval that was ever given can be replayed for ever: withdrawing one
 * takes a new generation, for which it is worth nothing.
 */
export const firmwareRef = (tenant: string, model: string, generation: number): Uint8Array =>
  new Uint8Array(hash('fleetkey/1/firmware', tenant, model, generation))

/** The nonce of a re-attestation, computed on each side and quoted: `session` is that of the connection's welcome, `challenge` and `random` are of `attest`. */
export const attestNonce = (of: {
  tenant: string
  device: string
  exporter: Uint8Array
  session: Uint8Array
  challenge: Uint8Array
  random: Uint8Array
}): Uint8Array => hash('fleetkey/1/attest', of.tenant, of.device, of.exporter, of.session, of.challenge, of.random)

/** What the quote and the certifications of `evidence` cover beside the nonce; `recipient`: TPMT_PUBLIC of a new recipient key. */
export const evidenceTranscript = (of: { eventLog: Uint8Array; ima: { from: number; list: Uint8Array } | null; recipient: Uint8Array | null }): Uint8Array =>
  hash(
    'fleetkey/1/evidence',
    sha256(of.eventLog),
    of.ima === null ? null : [of.ima.from, sha256(of.ima.list)],
    of.recipient === null ? null : sha256(of.recipient),
  )

/** qualifyingData of TPM2_Certify for one key role (srk, ldevid, recipient); of the quote with role `quote`. */
export const qualifyingData = (role: 'quote' | 'srk' | 'ldevid' | 'recipient', nonce: Uint8Array, transcript: Uint8Array): Uint8Array =>
  hash('fleetkey/1/certify', role, nonce, transcript)

/** Proof of TPM2_ActivateCredential: the secret itself is never sent. */
export const activationProof = (secret: Secret, nonce: Uint8Array, transcript: Uint8Array): Uint8Array =>
  createHmac('sha256', secret.bytes())
    .update(encode(['fleetkey/1/activated', nonce, transcript]))
    .digest()

/** What a key signs that proves a device without quoting: the IDevID key, or the LDevID key of a device that enrols by token. */
export const possessionOf = (role: 'idevid' | 'ldevid', nonce: Uint8Array, transcript: Uint8Array): Uint8Array =>
  encode(['fleetkey/1/possession', role, nonce, transcript])

/** What a server keeps of a token to check proofs with: nothing leads back to the token. `secret`: the token's secret half. */
export const tokenVerifier = (secret: Secret): Uint8Array => createHmac('sha256', secret.bytes()).update('fleetkey/1 token').digest()

/** Proof of a token: the token itself is never sent, and a server that does not know it learns nothing. `verifier`: `tokenVerifier` of it. */
export const tokenProof = (verifier: Secret, nonce: Uint8Array, transcript: Uint8Array): Uint8Array =>
  createHmac('sha256', verifier.bytes())
    .update(encode(['fleetkey/1/token', nonce, transcript]))
    .digest()

/** What the LDevID key signs to bind a software TLS key: `context` is the challenge id (enrolment) or the session nonce (renewal). */
export const tlsBinding = (tenant: string, context: Uint8Array, tlsSpki: Uint8Array): Uint8Array => encode(['fleetkey/1/tls', tenant, context, sha256(tlsSpki)])

/** What the LDevID key signs in the CONNECT password. */
export const connectProof = (tenant: string, clientId: string, certificateDer: Uint8Array, exporter: Uint8Array): Uint8Array =>
  encode(['fleetkey/1/connect', tenant, clientId, sha256(certificateDer), exporter])

/** What a proof of use covers. */
export const useTranscript = (of: { tenant: string; device: string; key: string; epoch: number; nonce: Uint8Array }): Uint8Array =>
  encode(['fleetkey/1/use', of.tenant, of.device, of.key, of.epoch, of.nonce])

/** `tpm` keys: the TPM MACs this prefix ‖ transcript; the local socket's `mac` always prepends `applicationPrefix`, so no application can forge a proof. */
export const proofPrefix = new TextEncoder().encode('fleetkey/1 proof\0')
export const applicationPrefix = new TextEncoder().encode('fleetkey/1 app\0')

/** Proof of use of a `sealed` key: HMAC-SHA256 under HKDF-Expand(key, "fleetkey/1 proof") (RFC 5869; extract is skipped: the key is uniform). */
export const sealedProof = (key: Secret, transcript: Uint8Array): Uint8Array =>
  createHmac('sha256', expand(key, 'fleetkey/1 proof')).update(transcript).digest()

/** Proof of use of a `tpm` key, computed by the server from its copy; the device computes it with TPM2_HMAC. */
export const tpmProof = (key: Secret, transcript: Uint8Array): Uint8Array => createHmac('sha256', key.bytes()).update(proofPrefix).update(transcript).digest()

/** HKDF-Expand with SHA-256, one block (RFC 5869 §2.3). */
const expand = (key: Secret, info: string): Uint8Array => createHmac('sha256', key.bytes()).update(info).update(Uint8Array.of(1)).digest()

/** What a device says it has stored: over every field of a trust bundle but the type. */
export const trustDigest = ({ type: _type, ...bundle }: TrustBundle): Uint8Array => hash('fleetkey/1/trust', bundle)
