import { Secret } from '@fleetkey/protocol/secret.ts'
import { keyId } from '@fleetkey/protocol/signed.ts'
import {
  activationProof,
  attestNonce,
  enrolmentNonce,
  enrolmentTranscript,
  evidenceTranscript,
  qualifyingData,
  tlsBinding,
} from '@fleetkey/protocol/transcript.ts'
import { makeCsr } from '@fleetkey/protocol/x509/csr.ts'
import type { BodyOf, FirmwarePolicy } from '@fleetkey/protocol/messages.ts'
import type { DeviceKeys, KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { demandedBy, type Asked, type AttesterBy } from './attester.ts'

/** Gives the recipient key under a firmware policy. */
export type RecipientFor = (policy: FirmwarePolicy) => Promise<KeyBlob>

type List = BodyOf<'evidence'>['ima']

/** A quote takes so long that files may be measured meanwhile: then the list is read and quoted anew, this often. After that the server asks for the rest. */
const quoteTries = 4

/** Quotes over the measurement list that the server asks for, such that the list reaches as far as the quote wherever the machine holds still for that long. */
const measured = async <Q>(attest: BodyOf<'attest'>, measurements: Asked['measurements'], quote: (list: List) => Promise<Q>): Promise<Q> => {
  const from = attest.ima
  const read = async () => (from === null || measurements === undefined ? null : await measurements(from))
  let part = await read()
  for (let tries = 1; ; tries++) {
    // Nothing to show: the server is told so and says what follows from it.
    const made = await quote(part === null || from === null ? null : { from, list: part.list })
    if (part?.ended !== true || tries === quoteTries) return made
    const after = await read()
    if (after?.ended === true && after.list.length === part.list.length) return made
    part = after
  }
}

/** Attests with a TPM 2.0: quote and certifications by its AK, the LDevID key inside it. A new recipient key for every challenge unless `recipientFor` keeps them. */
export const tpm2Attester = (keys: DeviceKeys, recipientFor: RecipientFor = async (policy) => (await keys.make(policy)).recipient): AttesterBy<'tpm2'> => {
  const spki = spkiOf(keys.publics.ldevid)
  const sign = async (data: Uint8Array): Promise<Uint8Array> => await keys.sign(data)
  return {
    signer: { kid: keyId(spki), sign },
    sign,
    resetCount: async () => (await keys.clock()).resetCount,
    clock: async () => await keys.clock(),

    async hello(of) {
      return { type: 'hello', ...of, presented: { method: 'tpm2', ekCertificate: await keys.ekCertificate(), ...keys.publics } }
    },

    async answer(of) {
      const { tenant, hello, challenge } = of
      const demanded = demandedBy('tpm2', challenge)
      // Durable before the activated secret is used: a challenge is answered with a key that is still there after a power cut.
      const recipient = await recipientFor(demanded.firmware)
      const secret = new Secret(await keys.activate(demanded.credential))
      // Computed here and never taken from the challenge: a relay cannot make this device quote a nonce of its choice.
      const nonce = enrolmentNonce({
        tenant,
        subject: keys.ekName,
        purpose: hello.purpose,
        exporter: of.exporter,
        helloRandom: hello.random,
        challengeRandom: challenge.random,
      })
      const ldevidCsr = await makeCsr({ subject: hello.serial, spki, sign })
      const transcript = enrolmentTranscript({
        hello: of.helloBytes,
        challenge: of.challengeBytes,
        ldevidCsr,
        tlsCsr: of.tls.csr,
        eventLog: of.eventLog,
        recipient: recipient.public,
      })
      const proof = activationProof(secret, nonce, transcript)
      secret.destroy()
      const certify = async (role: 'srk' | 'ldevid' | 'recipient') =>
        await keys.certify(role === 'recipient' ? recipient : role, qualifyingData(role, nonce, transcript))
      return {
        type: 'answer',
        challenge: challenge.challenge,
        proven: {
          method: 'tpm2',
          proof,
          quote: await keys.quote(demanded.selection, qualifyingData('quote', nonce, transcript)),
          eventLog: of.eventLog,
          recipient: recipient.public,
          certify: { srk: await certify('srk'), ldevid: await certify('ldevid'), recipient: await certify('recipient') },
        },
        csr: { ldevid: ldevidCsr, tls: of.tls.csr },
        binding: await sign(tlsBinding(tenant, challenge.challenge, of.tls.spki)),
      }
    },

    async evidence({ attest, eventLog, measurements, ...of }) {
      // Computed here, as in enrolment: this device quotes no nonce that it was handed.
      const nonce = attestNonce({ ...of, challenge: attest.challenge, random: attest.random })
      const key = attest.firmware === null ? null : await recipientFor(attest.firmware)
      const { ima, transcript, quote } = await measured(attest, measurements, async (ima) => {
        const transcript = evidenceTranscript({ eventLog, ima, recipient: key?.public ?? null })
        return { ima, transcript, quote: await keys.quote(attest.selection, qualifyingData('quote', nonce, transcript)) }
      })
      // Below the SRK that enrolment proved: that one is not certified again.
      const recipient =
        key === null ? null : { public: key.public, certify: await keys.certify(key, qualifyingData('recipient', nonce, transcript)), srk: null }
      return { type: 'evidence', challenge: attest.challenge, quote, eventLog, ima, recipient }
    },
  }
}
