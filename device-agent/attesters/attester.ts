import type { AnswerOf, BodyOf, ChallengeOf, HelloOf, MethodName } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Signer } from '@fleetkey/protocol/signed.ts'
import type { ClockState } from '@fleetkey/tpm2/clock.ts'
import type { ImaPart } from '@fleetkey/tpm2/ima-part.ts'

/** What an attester says about the TLS key and the conversation so far when it answers a challenge. */
export interface Challenged {
  readonly tenant: string
  readonly hello: BodyOf<'hello'>
  /** Signed messages as they were on the wire. */
  readonly helloBytes: Uint8Array
  readonly challenge: BodyOf<'challenge'>
  readonly challengeBytes: Uint8Array
  /** 32 bytes of the TLS exporter of the agent's own connection. */
  readonly exporter: Uint8Array
  readonly eventLog: Uint8Array
  readonly tls: { readonly spki: Uint8Array; readonly csr: Uint8Array }
}

/** What an attester says when the server asks for the state the device is in. */
export interface Asked {
  readonly tenant: string
  readonly device: string
  /** Nonce of the connection's welcome. */
  readonly session: Uint8Array
  readonly attest: BodyOf<'attest'>
  readonly exporter: Uint8Array
  readonly eventLog: Uint8Array
  /** The kernel's measurement list from this entry on, as it is now; null when there is none. Absent: this device has none. */
  readonly measurements?: (from: number) => Promise<ImaPart | null>
}

/** One way to prove what this device is. One more is one file beside this one, and one line in holder.ts. */
export interface Attester {
  /** Signs the device's messages: the LDevID key. */
  readonly signer: Signer
  hello(of: { readonly serial: string; readonly purpose: 'enrol' | 'return'; readonly random: Uint8Array; readonly agent: string }): Promise<BodyOf<'hello'>>
  /** Throws Problem('unsupported') for a challenge by another method than the hello. */
  answer(of: Challenged): Promise<BodyOf<'answer'>>
  /** The state it is in now; absent where nothing can quote it. */
  evidence?(of: Asked): Promise<BodyOf<'evidence'>>
  /** LDevID signature (raw r‖s) over data that the transcript functions made. */
  sign(data: Uint8Array): Promise<Uint8Array>
  /** The identity is durable: what was needed once to get it can go. */
  enrolled?(): Promise<void>
  /** How often the device was reset since its hardware was made new or cleared; 0 where nothing counts it. */
  resetCount(): Promise<number>
  /** The clock that its quotes will state; absent where nothing quotes one. */
  clock?(): Promise<ClockState>
}

/** An attester by one method. */
export interface AttesterBy<M extends MethodName> extends Attester {
  hello(of: Parameters<Attester['hello']>[0]): Promise<HelloOf<M>>
  answer(of: Challenged): Promise<AnswerOf<M>>
}

/** What the challenge demands of this method. */
export const demandedBy = <M extends MethodName>(method: M, { demanded }: BodyOf<'challenge'>): ChallengeOf<M>['demanded'] => {
  if (demanded.method !== method) throw new Problem('unsupported', `a challenge by ${demanded.method}`, { reason: 'method.mixed' })
  return demanded as ChallengeOf<M>['demanded']
}
