import type { AnswerOf, ChallengeOf, Hello, HelloOf, MethodName } from '@fleetkey/protocol/messages.ts'
import { enrolmentNonce, enrolmentTranscript } from '@fleetkey/protocol/transcript.ts'
import type { Evidence, Expected } from './methods.ts'
import { fail } from './reasons.ts'

/** A conversation all of whose parts are by one method. */
export interface EvidenceBy<M extends MethodName> extends Evidence {
  readonly hello: HelloOf<M>
  readonly challenge: ChallengeOf<M>
  readonly answer: AnswerOf<M>
}

const isBy = (method: MethodName, part: { readonly method: MethodName }): void => {
  if (part.method !== method) fail('method.mixed', `${part.method} in a conversation by ${method}`)
}

/** The hello, by this method. */
export const presentedBy = <M extends MethodName>(method: M, hello: Hello): HelloOf<M> => {
  isBy(method, hello.presented)
  return hello as HelloOf<M>
}

/** The whole conversation, by this method: what began by one is not finished by another. */
export const byMethod = <M extends MethodName>(method: M, evidence: Evidence): EvidenceBy<M> => {
  for (const part of [evidence.hello.presented, evidence.challenge.demanded, evidence.answer.proven]) isBy(method, part)
  return evidence as EvidenceBy<M>
}

const nothing = new Uint8Array(0)

/**
 * What both ends commit to where nothing is quoted: computed here from the messages as they were on the wire, and over this server's own end of the TLS
 * connection. `subject`: see `enrolmentNonce`.
 */
export const commitmentsOf = (
  { hello, helloBytes, challenge, challengeBytes, answer }: Evidence,
  { tenant, exporter }: Expected,
  subject: Uint8Array,
): { readonly nonce: Uint8Array; readonly transcript: Uint8Array } => ({
  nonce: enrolmentNonce({ tenant, subject, purpose: hello.purpose, exporter, helloRandom: hello.random, challengeRandom: challenge.random }),
  transcript: enrolmentTranscript({
    hello: helloBytes,
    challenge: challengeBytes,
    ldevidCsr: answer.csr.ldevid,
    tlsCsr: answer.csr.tls,
    eventLog: nothing,
    recipient: null,
  }),
})
