import { keyId } from '@fleetkey/protocol/signed.ts'
import { enrolmentNonce, enrolmentTranscript, tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import type { AnswerOf } from '@fleetkey/protocol/messages.ts'
import type { SoftwareKeys } from '../software-keys.ts'
import { demandedBy, type Attester, type Challenged } from './attester.ts'

type Software = 'idevid' | 'token'

const nothing = new Uint8Array(0)

/** What every attester without a TPM has in common: its LDevID key signs, and no chip counts its resets. */
export const softwareSigner = ({ ldevid }: SoftwareKeys): Pick<Attester, 'signer' | 'sign' | 'resetCount'> => ({
  signer: { kid: keyId(ldevid.spki), sign: ldevid.sign },
  sign: ldevid.sign,
  resetCount: async () => 0,
})

/** The answer to a challenge; `prove` is handed what both ends commit to. `subject`: see `enrolmentNonce`. */
export const softwareAnswer = async <M extends Software>(
  method: M,
  { ldevid }: SoftwareKeys,
  of: Challenged,
  subject: Uint8Array,
  prove: (nonce: Uint8Array, transcript: Uint8Array) => Promise<AnswerOf<M>['proven']>,
): Promise<AnswerOf<M>> => {
  const { tenant, hello, challenge } = of
  demandedBy(method, challenge)
  // Computed here and never taken from the challenge: a relay cannot make this device sign a nonce of its choice.
  const nonce = enrolmentNonce({
    tenant,
    subject,
    purpose: hello.purpose,
    exporter: of.exporter,
    helloRandom: hello.random,
    challengeRandom: challenge.random,
  })
  const ldevidCsr = await makeCsr({ subject: hello.serial, spki: ldevid.spki, sign: ldevid.sign })
  const transcript = enrolmentTranscript({
    hello: of.helloBytes,
    challenge: of.challengeBytes,
    ldevidCsr,
    tlsCsr: of.tls.csr,
    eventLog: nothing,
    recipient: null,
  })
  return {
    type: 'answer',
    challenge: challenge.challenge,
    proven: await prove(nonce, transcript),
    csr: { ldevid: ldevidCsr, tls: of.tls.csr },
    binding: await ldevid.sign(tlsBinding(tenant, challenge.challenge, of.tls.spki)),
  }
}
