import { createHash } from 'node:crypto'
import type { Answer, Hello } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { verifySignature } from '@fleetkey/protocol/signed.ts'
import { activationProof, enrolmentNonce, enrolmentTranscript, qualifyingData, tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { parseCsr } from '@fleetkey/protocol/x509/csr.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import { parseAttest, verifyAttest, type Attest } from '@fleetkey/tpm2/attest.ts'
import { TpmFormatError } from '@fleetkey/tpm2/bytes.ts'
import { alg, handle } from '@fleetkey/tpm2/constants.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { parseEventLog, pcrDigest, replay } from '@fleetkey/tpm2/event-log.ts'
import { nameOf, qualifiedName } from '@fleetkey/tpm2/names.ts'
import { parsePublic, spkiOf } from '@fleetkey/tpm2/structures.ts'
import { mismatch, type KeyRole } from '@fleetkey/tpm2/templates.ts'
import { makeClaims, type Claims } from './claims.ts'
import type { AttestationPolicy, EndorsementCa, Method, Presented } from './methods.ts'

const logLimits = { maxEvents: 4096, maxBytes: 1 << 20 } as const

export const fail = (reason: string, detail: string = reason): never => {
  throw new Problem('attestation-failed', detail, { reason })
}

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0

/** Runs a parser of tpm2: what it does not understand is a refusal with this reason. */
const parsed = <T>(reason: string, read: () => T): T => {
  try {
    return read()
  } catch (error) {
    if (error instanceof TpmFormatError) return fail(reason, error.message)
    throw error
  }
}

/** A public area exactly as its template has it, the key itself apart. */
const expectTemplate = (bytes: Uint8Array, role: KeyRole): void => {
  const field = parsed(`${role}.malformed`, () => mismatch(bytes, role))
  if (field !== undefined) fail(`${role}.template.${field}`, `the ${role} key differs from its template in ${field}`)
  // The point must be on its curve before anything is wrapped to it or verified with it.
  parsed(`${role}.point`, () => spkiOf(bytes))
}

/** TCG EK credential profile §3.5: what an EK certificate must say. */
const ekCertificate = (bytes: Uint8Array, ek: Uint8Array): Certificate => {
  const certificate = ((): Certificate => {
    try {
      return parseCertificate(bytes)
    } catch (error) {
      return fail('ek.cert.malformed', error instanceof Error ? error.message : 'unreadable')
    }
  })()
  const ours = certificate.native.publicKey.export({ format: 'der', type: 'spki' })
  if (!same(new Uint8Array(ours), spkiOf(ek))) fail('ek.cert.other-key', 'the EK certificate is for another key')
  if (certificate.basicConstraints?.ca === true) fail('ek.cert.is-a-ca')
  if (certificate.extKeyUsage?.includes(oids.ekCertificate) !== true) fail('ek.cert.usage', 'not an EK certificate (2.23.133.8.1)')
  const usage = parsePublic(ek).type === alg.rsa ? keyUsages.keyEncipherment : keyUsages.keyAgreement
  if (certificate.keyUsage !== null && !certificate.keyUsage.has(usage)) fail('ek.cert.key-usage')
  return certificate
}

/** Which endorsement vouches for the EK; null when the signed manifest alone does and policy allows that. */
const endorsed = (hello: Hello, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number): EndorsementCa | null => {
  if (hello.presented.ekCertificate === null) return policy.requireEkCertificate ? fail('ek.cert.missing', 'no EK certificate') : null
  const leaf = ekCertificate(hello.presented.ekCertificate, hello.presented.ek)
  const roots = endorsements.map((endorsement) => ({ endorsement, certificate: parseCertificate(endorsement.certificate) }))
  const result = validateChain({ leaf, intermediates: [], roots: roots.map(({ certificate }) => certificate), at: now, eku: oids.ekCertificate })
  if (!result.ok) return fail(`ek.cert.${result.why}`, `EK certificate: ${result.why} at ${result.at}`)
  const root = result.chain.at(-1)
  return roots.find(({ certificate }) => certificate === root)?.endorsement ?? fail('ek.cert.unknown-issuer')
}

const present = (hello: Hello, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number): Presented => {
  for (const role of ['ek', 'ak', 'srk', 'ldevid', 'recipient'] as const) expectTemplate(hello.presented[role], role)
  const endorsement = endorsed(hello, endorsements, policy, now)
  return {
    ekHash: createHash('sha256').update(hello.presented.ek).digest('hex'),
    ekName: nameOf(hello.presented.ek),
    akName: nameOf(hello.presented.ak),
    srkName: nameOf(hello.presented.srk),
    ldevidSpki: spkiOf(hello.presented.ldevid),
    assurance: endorsement?.test === true ? 'simulated' : 'attested',
    endorsement: endorsement?.subject ?? null,
  }
}

/** A statement that this AK (TPMT_PUBLIC) signed over exactly this qualifying data; its signer is the endorsement primary that the AK is. */
export const attested = (ak: Uint8Array, of: Answer['proven']['quote'], role: 'quote' | 'srk' | 'ldevid' | 'recipient', qualifying: Uint8Array): Attest => {
  const attest = parsed(`${role}.malformed`, () => parseAttest(of.attest))
  if (!parsed(`${role}.signature.malformed`, () => verifyAttest(of.attest, of.signature, ak))) fail(`${role}.signature`, `${role}: not signed by the AK`)
  if (!same(attest.extraData, qualifying)) fail(`${role}.nonce`, `${role}: made for another nonce, connection or transcript`)
  if (!same(attest.qualifiedSigner, qualifiedName(handle.endorsement, nameOf(ak)))) fail(`${role}.signer`, `${role}: the AK is no endorsement primary`)
  return attest
}

/** The AK vouches that its TPM holds this very key. */
const certified = (hello: Hello, answer: Answer, role: 'srk' | 'ldevid' | 'recipient', qualifying: Uint8Array): Uint8Array => {
  const attest = attested(hello.presented.ak, answer.proven.certify[role], role, qualifying)
  const name = nameOf(hello.presented[role])
  if (attest.type !== 'certify') return fail(`${role}.type`, `${role}: not a certification`)
  if (!same(attest.name, name)) fail(`${role}.name`, `${role}: another key was certified`)
  return name
}

/** Bank and PCRs exactly as asked, the log replayed to exactly the quoted digest. */
export const measured = (
  ak: Uint8Array,
  proven: Pick<Answer['proven'], 'quote' | 'eventLog'>,
  asked: { readonly pcrs: readonly number[] },
  qualifying: Uint8Array,
) => {
  const quote = attested(ak, proven.quote, 'quote', qualifying)
  if (quote.type !== 'quote') return fail('quote.type', 'not a quote')
  const [bank, more] = quote.selection
  if (bank === undefined || more !== undefined || bank.hash !== alg.sha256) return fail('quote.selection.bank', 'another bank than asked')
  const wanted = asked.pcrs.toSorted((one, other) => one - other)
  if (wanted.some((pcr) => !bank.pcrs.includes(pcr))) fail('quote.selection.missing')
  if (bank.pcrs.length !== wanted.length) fail('quote.selection.extra')
  const values = parsed('log.malformed', () => replay(parseEventLog(proven.eventLog, logLimits)))
  if (!same(quote.pcrDigest, pcrDigest(values, wanted))) fail('log.replay.mismatch', 'the event log does not lead to the quoted PCRs')
  if (!quote.clockInfo.safe) fail('quote.clock.unsafe', 'the TPM clock may have gone back')
  const zero = '00'.repeat(32)
  return {
    quote,
    pcrs: Object.fromEntries(wanted.map((pcr) => [String(pcr), Buffer.from(values.get(pcr) ?? Buffer.from(zero, 'hex')).toString('hex')])),
    events: parseEventLog(proven.eventLog, logLimits).length,
  }
}

/** LDevID and software TLS key: each proves itself, and the TPM key binds the software key to this very challenge. */
const requested = (hello: Hello, answer: Answer, tenant: string): { ldevidSpki: Uint8Array; tlsSpki: Uint8Array } => {
  const refusing = (reason: string, bytes: Uint8Array): Uint8Array => {
    try {
      return parseCsr(bytes).spki
    } catch (error) {
      return fail(reason, error instanceof Error ? error.message : reason)
    }
  }
  const ldevidSpki = spkiOf(hello.presented.ldevid)
  if (!same(refusing('csr.ldevid', answer.csr.ldevid), ldevidSpki)) fail('csr.ldevid.other-key', 'the LDevID request is for another key than the certified one')
  const tlsSpki = refusing('csr.tls', answer.csr.tls)
  if (same(tlsSpki, ldevidSpki)) fail('csr.tls.same-key', 'the TLS key is the LDevID key')
  if (!verifySignature(ldevidSpki, tlsBinding(tenant, answer.challenge, tlsSpki), answer.binding))
    fail('csr.tls.binding', 'the LDevID key did not bind this TLS key')
  return { ldevidSpki, tlsSpki }
}

/** TPM 2.0: EK certificate and manifest, ActivateCredential, Certify, Quote and event log. */
export const tpm2: Method = {
  present,
  ldevidSpki: (hello) => parsed('ldevid.malformed', () => spkiOf(hello.presented.ldevid)),
  credential: (hello, presented, secret, random) => makeCredential({ ek: hello.presented.ek, name: presented.akName, secret, random }),
  verify(evidence, expected, endorsements, now): Claims {
    const { hello, challenge, answer } = evidence
    const presented = present(hello, endorsements, expected.policy, now)
    const nonce = enrolmentNonce({
      tenant: expected.tenant,
      ekName: presented.ekName,
      purpose: hello.purpose,
      exporter: expected.exporter,
      helloRandom: hello.random,
      challengeRandom: challenge.random,
    })
    const transcript = enrolmentTranscript({
      hello: evidence.helloBytes,
      challenge: evidence.challengeBytes,
      ldevidCsr: answer.csr.ldevid,
      tlsCsr: answer.csr.tls,
      eventLog: answer.proven.eventLog,
    })
    if (!new Secret(activationProof(expected.secret, nonce, transcript)).equals(new Secret(answer.proven.proof)))
      fail('credential.proof', 'the credential was not activated by this TPM, or for another connection')
    const data = (role: 'quote' | 'srk' | 'ldevid' | 'recipient'): Uint8Array => qualifyingData(role, nonce, transcript)
    const [srk, ldevid, recipient] = (['srk', 'ldevid', 'recipient'] as const).map((role) => certified(hello, answer, role, data(role)))
    if (srk === undefined || ldevid === undefined || recipient === undefined) return fail('certify.missing')
    const asked = challenge.selection[0]
    if (asked === undefined) return fail('quote.selection.bank')
    const { quote, pcrs, events } = measured(hello.presented.ak, answer.proven, asked, data('quote'))
    return makeClaims({
      method: 'tpm2',
      ekHash: presented.ekHash,
      assurance: presented.assurance,
      endorsement: presented.endorsement,
      ak: presented.akName,
      srk,
      ldevid,
      recipient,
      srkPublic: hello.presented.srk,
      recipientPublic: hello.presented.recipient,
      ...requested(hello, answer, expected.tenant),
      pcrs,
      events,
      resetCount: quote.clockInfo.resetCount,
      restartCount: quote.clockInfo.restartCount,
      clockSafe: quote.clockInfo.safe,
      firmwareVersion: quote.firmwareVersion,
    })
  },
}
