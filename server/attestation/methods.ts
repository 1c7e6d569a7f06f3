import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Answer, Challenge, Demanded, FirmwarePolicy, Hello, MethodName, PcrSelection, PresentedEvidence } from '@fleetkey/protocol/messages.ts'
import type { Secret } from '@fleetkey/protocol/secret.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import type { Claims } from './claims.ts'
import type { EndorsementPolicy } from './endorsement-policy.ts'
import type { EndorsementCa } from './endorsements.ts'
import { idevid } from './idevid.ts'
import type { ReasonCode } from './reasons.ts'
import { token } from './token.ts'
import { tpm2 } from './tpm2.ts'

export interface AttestationPolicy {
  /** A device must present an EK certificate that a known endorsement issued. Without it the signed batch manifest alone vouches for an EK. */
  readonly requireEkCertificate: boolean
  /** The operator's deny list and TPM firmware floors. */
  readonly endorsement?: EndorsementPolicy
  /** Kinds of software TLS keys that the profile admits; P-256 unless it says. */
  readonly tlsKeys?: readonly KeyKind[]
}

/** A hello whose every key was found acceptable. Nothing is proven yet. */
export interface Presented {
  /**
   * The key into the batch manifest: hex SHA-256 of the EK's TPMT_PUBLIC; `idevid/` and hex SHA-256 of the IDevID's SPKI; `serial/` and the serial of a board
   * that has no key of its own.
   */
  readonly hardware: string
  readonly ldevidSpki: Uint8Array
  readonly assurance: Claims['assurance']
  readonly endorsement: string | null
  /** SHA-256 (hex) of the CA certificates that vouch for the hardware, nearest first. */
  readonly endorsedBy: readonly string[]
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
  /** What only the right device can know: the activated secret, the verifier of a token; null where nothing of the kind is shared. */
  readonly secret: Secret | null
  readonly policy: AttestationPolicy
}

/** What a challenge is made of. */
export interface Demand {
  /** A fresh secret for the right device alone to find out; it is kept until the answer. */
  readonly share: () => Secret
  readonly selection: PcrSelection
  readonly firmware: FirmwarePolicy
  readonly random: (length: number) => Uint8Array
}

/** One attestation method. All pure: time, randomness and endorsements come in. Refusals are Problem('attestation-failed') with a stable reason. */
export interface Method {
  present(hello: Hello, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number): Presented
  /** What the manifest knows the hardware by that this hello shows, proven or not; null when it does not read. */
  shown(hello: Hello): string | null
  /** DER SubjectPublicKeyInfo of the presented LDevID key, which signs hello and answer. */
  ldevidSpki(hello: Hello): Uint8Array
  demand(hello: Hello, of: Demand): Demanded
  verify(evidence: Evidence, expected: Expected, endorsements: readonly EndorsementCa[], now: number): Claims
  /** Reasons of its own for hardware that no manifest lists, and for hardware that is not the one on record. */
  readonly reasons: { readonly unlisted: ReasonCode; readonly otherHardware: ReasonCode }
}

/** One more method is one file and one line. */
export const methods: Readonly<Record<MethodName, Method>> = { tpm2, idevid, token }

/** The method that this evidence is for; throws Problem('unsupported'). */
export const methodOf = ({ method: name }: Pick<PresentedEvidence, 'method'>): Method => {
  if (!Object.hasOwn(methods, name)) throw new Problem('unsupported', `attestation method ${String(name)}`, { reason: 'method.unknown' })
  return methods[name]
}
