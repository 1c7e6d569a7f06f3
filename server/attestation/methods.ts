import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Answer, Challenge, Hello, PresentedEvidence } from '@fleetkey/protocol/messages.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import type { Claims } from './claims.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import type { EndorsementCa } from './endorsements.ts'
import { tpm2 } from './tpm2.ts'

export interface AttestationPolicy {
  /** A device must present an EK certificate that a known endorsement issued. Without it the signed batch manifest alone vouches for an EK. */
  readonly requireEkCertificate: boolean
  /** The operator's deny list and TPM firmware floors. */
  readonly endorsement?: EndorsementPolicy
  /** Kinds of software TLS keys that the profile admits; P-256 unless it says. */
  readonly tlsKeys?: readonly KeyKind[]
}

/** A hello whose every public area was found to be ours: what the challenge is made from. */
export interface Presented {
  /** Hex SHA-256 of the EK's TPMT_PUBLIC: the key into the batch manifest. */
  readonly ekHash: string
  readonly ekName: Uint8Array
  /** Computed here from the public area, never taken from the device. */
  readonly akName: Uint8Array
  readonly srkName: Uint8Array
  readonly ldevidSpki: Uint8Array
  readonly assurance: 'simulated' | 'attested'
  readonly endorsement: string | null
  /** SHA-256 (hex) of the CA certificates that vouch for the EK, nearest first. */
  readonly endorsedBy: readonly string[]
  readonly manufacturer: string | null
}

export type { EndorsementCa }

/** What a device sent in the two round trips. `helloBytes`, `challengeBytes`: the signed messages as they were on the wire. */
export interface Evidence {
  readonly hello: Hello
  readonly helloBytes: Uint8Array
  readonly challenge: Challenge
  readonly challengeBytes: Uint8Array
  readonly answer: Answer
}

/** What the server knows that the evidence must agree with. `exporter`: 32 bytes of the TLS connection the answer came through. */
export interface Expected {
  readonly tenant: string
  readonly exporter: Uint8Array
  readonly secret: Secret
  readonly policy: AttestationPolicy
}

/** One attestation method. All pure: time, randomness and endorsements come in. Refusals are Problem('attestation-failed') with a stable reason. */
export interface Method {
  present(hello: Hello, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number): Presented
  /** DER SubjectPublicKeyInfo of the presented LDevID key, which signs hello and answer. */
  ldevidSpki(hello: Hello): Uint8Array
  credential(hello: Hello, presented: Presented, secret: Secret, random: (length: number) => Uint8Array): Challenge['credential']
  verify(evidence: Evidence, expected: Expected, endorsements: readonly EndorsementCa[], now: number): Claims
}

/** One more method is one file and one line. */
export const methods: Readonly<Record<string, Method>> = { tpm2 }

/** The method that this evidence is for; throws Problem('unsupported'). */
export const methodOf = ({ method: name }: Pick<PresentedEvidence, 'method'>): Method => {
  const method = Object.hasOwn(methods, name) ? methods[name] : undefined
  if (method === undefined) throw new Problem('unsupported', `attestation method ${name}`, { reason: 'method.unknown' })
  return method
}
