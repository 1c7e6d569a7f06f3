import { createPublicKey, generateKeyPairSync, randomBytes, verify, type KeyObject } from 'node:crypto'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { createBoard, install } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { makeEkCa, type EkCa } from '@fleetkey/firmware-sim/factory/ek-ca.ts'
import { personalise } from '@fleetkey/firmware-sim/factory/factory.ts'
import { buildRelease, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import type { AnswerOf, BodyOf, HelloOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, readBits, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { methodOf, type Evidence, type Expected } from '@fleetkey/server/attestation/methods.ts'
import { parseSignature, rawOf } from '@fleetkey/tpm2/attest.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { signerPublic } from '@fleetkey/tpm2/firmware.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const release = buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('gateway/1.0.0', new TextEncoder().encode('agent')))

/** One signature of the evidence with nothing around it. `key`: SubjectPublicKeyInfo; `encoding`: of the signature. */
interface Bare {
  readonly key: Uint8Array
  readonly data: Uint8Array
  readonly signature: Uint8Array
  readonly encoding: 'der' | 'ieee-p1363'
}

interface Case {
  readonly evidence: Evidence
  readonly expected: Expected
  readonly bare: readonly Bare[]
}

/** A signed DER structure (certificate, request) as what was signed, and the signature. */
const signedParts = (bytes: Uint8Array): Pick<Bare, 'data' | 'signature' | 'encoding'> => {
  const outer = inside(whole(bytes, tags.sequence))
  const data = outer.next(tags.sequence).bytes
  outer.next(tags.sequence)
  return { data, signature: readBits(outer.next(tags.bitString)), encoding: 'der' }
}

const bareOf = (ca: EkCa, hello: HelloOf<'tpm2'>, answer: AnswerOf<'tpm2'>, tls: Uint8Array): readonly Bare[] => {
  const [ak, ldevid] = [spkiOf(hello.presented.ak), spkiOf(hello.presented.ldevid)]
  const { quote, certify } = answer.proven
  const statements = [certify.srk, certify.ldevid, certify.recipient, quote]
  return [
    { key: parseCertificate(ca.certificate).spki, ...signedParts(hello.presented.ekCertificate ?? new Uint8Array()) },
    ...statements.map(({ attest, signature }): Bare => ({ key: ak, data: attest, signature: rawOf(parseSignature(signature)), encoding: 'ieee-p1363' })),
    { key: ldevid, ...signedParts(answer.csr.ldevid) },
    { key: tls, ...signedParts(answer.csr.tls) },
    { key: ldevid, data: tlsBinding('plant', answer.challenge, tls), signature: answer.binding, encoding: 'ieee-p1363' },
  ]
}

/** A key that approves firmware, as the TPM would load it. */
const approving = (): Uint8Array => {
  const { x = '', y = '' } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'jwk' })
  return signerPublic(new Uint8Array(Buffer.from(x, 'base64url')), new Uint8Array(Buffer.from(y, 'base64url')))
}

/** The evidence of one board: agent and software TPM make it, as in an enrolment. */
const makeCase = async (ca: EkCa, now: number): Promise<Case> => {
  const tpm = createSoftwareTpm({ random, now: () => now })
  await personalise(tpm, ca, { random, now })
  const board = createBoard({ serial: 'GW-1', tpm, flash: new Flash() })
  install(board, release)
  board.boot()
  const client = new Tpm(board.transport(), { random })
  const attester = tpm2Attester(await openDeviceKeys(client, await provision(client)))
  const hello = await attester.hello({ serial: 'GW-1', purpose: 'enrol', random: random(32), agent: 'bench' })
  const method = methodOf(hello.presented)
  const policy = { requireEkCertificate: true }
  const secret = random(32)
  const challenge: BodyOf<'challenge'> = {
    type: 'challenge',
    challenge: random(16),
    hello: random(32),
    random: random(32),
    demanded: method.demand(hello, {
      share: () => new Secret(secret),
      random,
      selection: [{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }],
      firmware: { signer: approving(), ref: random(32) },
    }),
    expires: now,
  }
  const tls = newTlsKey()
  const around = { hello, helloBytes: random(1500), challenge, challengeBytes: random(900), exporter: random(32) }
  const answer = await attester.answer({ ...around, tenant: 'plant', eventLog: board.eventLog(), tls: { spki: tls.spki, csr: await tlsCsr(tls, 'GW-1') } })
  return {
    evidence: { ...around, answer },
    expected: { tenant: 'plant', exporter: around.exporter, secret: new Secret(secret), policy },
    bare: bareOf(ca, hello, answer, tls.spki),
  }
}

const endorsementsOf = (ca: EkCa) => [{ certificate: ca.certificate, subject: 'simulator', test: true }]

/** Each key is read once, as a verifier that does nothing but this would. */
const verifyBare = (bare: readonly Bare[], issuer: KeyObject): boolean => {
  const keys = new Map<Uint8Array, KeyObject>([[bare[0]?.key ?? new Uint8Array(), issuer]])
  return bare.every(({ key, data, signature, encoding }) => {
    const object = keys.get(key) ?? createPublicKey({ key: Buffer.from(key), format: 'der', type: 'spki' })
    keys.set(key, object)
    return verify('sha256', data, { key: object, dsaEncoding: encoding }, signature)
  })
}

/** CPU milliseconds of `work` over every case, per case. */
const cpuPerCase = (cases: readonly Case[], work: (one: Case) => void): number => {
  const before = process.cpuUsage()
  for (const one of cases) work(one)
  const { user, system } = process.cpuUsage(before)
  return (user + system) / 1000 / cases.length
}

const median = (values: readonly number[]): number => values.toSorted((one, other) => one - other)[values.length >> 1] ?? Number.NaN

/**
 * Evidence of an enrolment verified on one core: CPU milliseconds of the verifier (EK chain, five public areas, four statements, log, requests), and of its
 * eight signatures alone. Boards differ, so that nothing but the CA is known from before.
 */
export const measureEvidence = async (boards: number): Promise<{ readonly verify: number; readonly floor: number; readonly signatures: number }> => {
  const now = Date.now()
  const ca = makeEkCa(now)
  const endorsements = endorsementsOf(ca)
  const cases: Case[] = []
  for (let count = 0; count < boards; count++) cases.push(await makeCase(ca, now))
  const issuer = createPublicKey({ key: Buffer.from(parseCertificate(ca.certificate).spki), format: 'der', type: 'spki' })
  const whole = (one: Case): void => void methodOf(one.evidence.hello.presented).verify(one.evidence, one.expected, endorsements, now)
  const bare = (one: Case): void => {
    if (!verifyBare(one.bare, issuer)) throw new Error('a signature does not verify')
  }
  for (let round = 0; round < 10; round++) for (const work of [whole, bare]) cpuPerCase(cases, work)
  // In turns, so that a busy machine slows both.
  const rounds = Array.from({ length: 9 }, () => ({ verify: cpuPerCase(cases, whole), floor: cpuPerCase(cases, bare) }))
  return { verify: median(rounds.map((round) => round.verify)), floor: median(rounds.map((round) => round.floor)), signatures: cases[0]?.bare.length ?? 0 }
}
