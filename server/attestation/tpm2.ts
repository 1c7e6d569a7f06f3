import { hash } from 'node:crypto'
import type { AnswerOf, ChallengeOf, HelloOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { activationProof, enrolmentNonce, enrolmentTranscript, qualifyingData } from '@fleetkey/protocol/transcript.ts'
import { handle } from '@fleetkey/tpm2/constants.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { authPolicyOf } from '@fleetkey/tpm2/firmware.ts'
import { qualifiedName } from '@fleetkey/tpm2/names.ts'
import { makeClaims, type Tpm2Claims } from './claims.ts'
import { byMethod, presentedBy } from './conversation.ts'
import { checkEkCertificate } from './ek-certificate.ts'
import { checkEk } from './ek-template.ts'
import { noEndorsementPolicy } from './endorsement-policy.ts'
import { checkEkDenied, vouchedFor, type EndorsementCa } from './endorsements.ts'
import { bankOf, checkLog, type Measured } from './event-log.ts'
import { checkFirmware } from './firmware.ts'
import { checkKey, type TpmKey } from './keys.ts'
import type { AttestationPolicy, Evidence, Expected, Method, Presented } from './methods.ts'
import { checkCertification, checkOneBoot, checkQuote, type Quote, type StatementExpectation } from './quote.ts'
import { fail } from './reasons.ts'
import { checkRequests } from './requests.ts'

/** The keys of a hello, each found acceptable. */
interface Keys {
  readonly ek: TpmKey
  readonly ak: TpmKey
  readonly srk: TpmKey
  readonly ldevid: TpmKey
}

const keysOf = ({ presented }: HelloOf<'tpm2'>): Keys => ({
  ek: checkEk(presented.ek),
  ak: checkKey('ak', presented.ak),
  srk: checkKey('srk', presented.srk),
  ldevid: checkKey('ldevid', presented.ldevid),
})

/** The recipient key of an answer, under exactly the policy that the challenge named. */
const recipientOf = ({ demanded }: ChallengeOf<'tpm2'>, { proven }: AnswerOf<'tpm2'>): TpmKey =>
  checkKey('recipient', proven.recipient, authPolicyOf(demanded.firmware))

const ekHashOf = ({ presented }: HelloOf<'tpm2'>): string => hash('sha256', presented.ek)

/** Who vouches for the EK; nobody but the signed manifest when there is no certificate and policy allows that. */
const endorsed = (hello: HelloOf<'tpm2'>, ek: TpmKey, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number) => {
  const { ekCertificate } = hello.presented
  const nobody = { assurance: 'attested', endorsement: null, endorsedBy: [], manufacturer: null } as const
  if (ekCertificate === null) return policy.requireEkCertificate ? fail('ek.cert.missing') : nobody
  const read = checkEkCertificate(ekCertificate, ek)
  const { root, by, test } = vouchedFor(read, endorsements, policy.endorsement ?? noEndorsementPolicy, now)
  return { assurance: test ? 'simulated' : 'attested', endorsement: root.subject, endorsedBy: by, manufacturer: read.tpm.manufacturer } as const
}

const read = (
  hello: HelloOf<'tpm2'>,
  endorsements: readonly EndorsementCa[],
  policy: AttestationPolicy,
  now: number,
): { keys: Keys; presented: Presented & { readonly manufacturer: string | null; readonly assurance: Tpm2Claims['assurance'] } } => {
  const keys = keysOf(hello)
  const ekHash = ekHashOf(hello)
  checkEkDenied(ekHash, policy.endorsement ?? noEndorsementPolicy)
  return {
    keys,
    presented: {
      hardware: ekHash,
      ldevidSpki: keys.ldevid.spki,
      ...endorsed(hello, keys.ek, endorsements, policy, now),
    },
  }
}

/** What both ends commit to: computed here from the messages as they were on the wire. */
const commitments = (
  { hello, helloBytes, challenge, challengeBytes, answer }: Evidence & { readonly answer: AnswerOf<'tpm2'> },
  { tenant, exporter }: Expected,
  ekName: Uint8Array,
) => ({
  nonce: enrolmentNonce({ tenant, subject: ekName, purpose: hello.purpose, exporter, helloRandom: hello.random, challengeRandom: challenge.random }),
  transcript: enrolmentTranscript({
    hello: helloBytes,
    challenge: challengeBytes,
    ldevidCsr: answer.csr.ldevid,
    tlsCsr: answer.csr.tls,
    eventLog: answer.proven.eventLog,
    recipient: answer.proven.recipient,
  }),
})

/** Every statement of the AK: SRK, LDevID and recipient key are in its TPM, the PCRs are as the log says, all within one boot. */
const statements = (
  answer: AnswerOf<'tpm2'>,
  { demanded }: ChallengeOf<'tpm2'>,
  keys: Keys & { readonly recipient: TpmKey },
  data: (role: 'quote' | 'srk' | 'ldevid' | 'recipient') => Uint8Array,
): { quote: Quote } & Measured => {
  // The AK is an endorsement primary: its qualified name follows from nothing but the hierarchy and its own name.
  const signers = [qualifiedName(handle.endorsement, keys.ak.name)]
  const expected = (role: 'quote' | 'srk' | 'ldevid' | 'recipient'): StatementExpectation => ({ ak: keys.ak, nonce: data(role), signers })
  const { certify } = answer.proven
  const certified = (['srk', 'ldevid', 'recipient'] as const).map((role) => checkCertification(role, certify[role], keys[role].name, expected(role)))
  const bank = bankOf(demanded.selection[0])
  const quote = checkQuote(answer.proven.quote, bank, expected('quote'))
  checkOneBoot([quote, ...certified])
  return { quote, ...checkLog(answer.proven.eventLog, quote, bank, keys.ak.public.scheme?.hash ?? 0) }
}

const verify = (all: Evidence, expected: Expected, endorsements: readonly EndorsementCa[], now: number): Tpm2Claims => {
  const evidence = byMethod('tpm2', all)
  const { hello, challenge, answer } = evidence
  const { keys: presentedKeys, presented } = read(hello, endorsements, expected.policy, now)
  const keys = { ...presentedKeys, recipient: recipientOf(challenge, answer) }
  const { nonce, transcript } = commitments(evidence, expected, keys.ek.name)
  if (expected.secret === null || !new Secret(activationProof(expected.secret, nonce, transcript)).equals(new Secret(answer.proven.proof)))
    fail('credential.proof')
  const { quote, pcrs, events } = statements(answer, challenge, keys, (role) => qualifyingData(role, nonce, transcript))
  checkFirmware(quote.firmwareVersion, presented.manufacturer, expected.policy.endorsement ?? noEndorsementPolicy)
  const { assurance, endorsement, endorsedBy, manufacturer, hardware } = presented
  return makeClaims({
    method: 'tpm2',
    hardware,
    assurance,
    endorsement,
    endorsedBy,
    manufacturer,
    ak: keys.ak.name,
    srk: keys.srk.name,
    ldevid: keys.ldevid.name,
    recipient: keys.recipient.name,
    srkPublic: keys.srk.bytes,
    recipientPublic: keys.recipient.bytes,
    ...checkRequests(answer, keys.ldevid, expected.tenant, expected.policy.tlsKeys),
    pcrs,
    events,
    resetCount: quote.clockInfo.resetCount,
    restartCount: quote.clockInfo.restartCount,
    clockSafe: quote.clockInfo.safe,
    clock: quote.clockInfo.clock,
    firmwareVersion: quote.firmwareVersion,
    // Asked for once the device has an identity: what may be sent before that is bounded.
    ima: null,
  })
}

/** TPM 2.0: EK certificate and manifest, ActivateCredential, Certify, Quote and event log. `continuity` judges clock and counters against the record. */
export const tpm2: Method = {
  present: (hello, endorsements, policy, now) => read(presentedBy('tpm2', hello), endorsements, policy, now).presented,
  shown: (hello) => ekHashOf(presentedBy('tpm2', hello)),
  ldevidSpki: (hello) => checkKey('ldevid', presentedBy('tpm2', hello).presented.ldevid).spki,
  demand(hello, { share, random, selection, firmware }) {
    const { ek, ak } = presentedBy('tpm2', hello).presented
    // For the AK name that is computed here from the public area, never taken from the device.
    return { method: 'tpm2', credential: makeCredential({ ek, name: checkKey('ak', ak).name, secret: share(), random }), selection, firmware }
  },
  verify,
  reasons: { unlisted: 'manifest.unknown-ek', otherHardware: 'identity.other-ek' },
}
