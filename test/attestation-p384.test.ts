import { createHash } from 'node:crypto'
import { readFileSync } from 'node:fs'
import { dirname, join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { tpm2Attester } from '@fleetkey/device-agent/attesters/tpm2.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { endorsementsOf } from '@fleetkey/cli/offline/attest.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { methodOf } from '@fleetkey/server/attestation/methods.ts'
import { alg, curve } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { eventType, marshalEventLog } from '@fleetkey/tpm2/event-log.ts'
import { ekPolicyB } from '@fleetkey/tpm2/policies.ts'
import { parsePublic } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'
import { approving, random } from './evidence.ts'

const pcrs = [0, 1, 2, 3, 4, 5, 7, 11]

/** A TPM as swtpm_setup makes it: EKs of RSA-2048 and P-384, their certificates in NV, by a CA with an intermediate. */
describe.skipIf(!hasProgram('swtpm_setup'))('an EK of P-384, made and certified by swtpm_setup', () => {
  let swtpm: RunningSwtpm
  let transport: Transport
  let bundle = ''
  beforeAll(async () => {
    swtpm = await startSwtpm({ setup: ['--create-ek-cert'] })
    const ca = join(dirname(swtpm.spec.slice('unix:'.length)), 'ca')
    bundle = ['issuercert.pem', 'swtpm-localca-rootca-cert.pem'].map((name) => readFileSync(join(ca, name), 'utf8')).join('\n')
    transport = await openTransport(swtpm.spec)
  }, 60_000)
  afterAll(async () => {
    await transport.close()
    await swtpm.stop()
  })

  test('enrols: template H-3, chain, credential, certifications, quote', async () => {
    const tpm = new Tpm(transport, { random })
    const keys = await openDeviceKeys(tpm, await provision(tpm))
    expect(parsePublic(keys.publics.ek)).toMatchObject({ curve: curve.p384, nameAlg: alg.sha384, authPolicy: ekPolicyB(alg.sha384) })
    const separator = new Uint8Array(createHash('sha256').update(new Uint8Array(4)).digest())
    const events = pcrs.map((pcr) => ({ pcr, type: eventType.separator, digests: new Map([[alg.sha256 as number, separator]]), data: new Uint8Array(4) }))
    await tpm.exclusive(async () => {
      for (const { pcr } of events) await tpm.pcrExtend(pcr, [{ hash: alg.sha256, digest: separator }])
    })

    const endorsements = endorsementsOf(bundle)
    const policy = { requireEkCertificate: true }
    const attester = tpm2Attester(keys)
    const hello = await attester.hello({ serial: 'GW-1', purpose: 'enrol', random: random(32), agent: 'test' })
    const method = methodOf(hello.presented)
    const now = Date.now() + 60_000
    const presented = method.present(hello, endorsements, policy, now)
    expect(presented).toMatchObject({ manufacturer: 'id:00001014', assurance: 'simulated' })
    expect(presented.endorsedBy).toHaveLength(2)
    const secret = random(32)
    const challenge: BodyOf<'challenge'> = {
      type: 'challenge',
      challenge: random(16),
      hello: random(32),
      random: random(32),
      demanded: method.demand(hello, {
        share: () => new Secret(secret),
        random,
        selection: [{ hash: 'sha256', pcrs }],
        firmware: { signer: approving(), ref: random(32) },
      }),
      expires: now,
    }
    const tls = newTlsKey()
    const around = { tenant: 'plant', hello, helloBytes: random(9), challenge, challengeBytes: random(9), exporter: random(32) }
    const answer = await attester.answer({ ...around, eventLog: marshalEventLog(events), tls: { spki: tls.spki, csr: await tlsCsr(tls, 'GW-1') } })
    const expected = { tenant: 'plant', exporter: around.exporter, secret: new Secret(secret), policy }
    expect(method.verify({ ...around, answer }, expected, endorsements, now)).toMatchObject({ manufacturer: 'id:00001014', events: pcrs.length })
    await keys.close()
  })
})
