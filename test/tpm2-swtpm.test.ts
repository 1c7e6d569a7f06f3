import { createHmac, createECDH, createPublicKey, randomBytes, verify } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { verifyAttest, parseAttest } from '@fleetkey/tpm2/attest.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs, type DeviceKeys, type FirmwareKeyBlobs } from '@fleetkey/tpm2/device-keys.ts'
import { TpmError } from '@fleetkey/tpm2/errors.ts'
import { authPolicyOf, NotApproved } from '@fleetkey/tpm2/firmware.ts'
import { pcrDigest } from '@fleetkey/tpm2/event-log.ts'
import { ImportRefused, wrapForImport } from '@fleetkey/tpm2/import.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { pointOf, spkiOf } from '@fleetkey/tpm2/structures.ts'
import { mismatch, templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { approver } from './approver.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

interface Bench {
  open(): Promise<Transport>
  restart(): Promise<void>
  stop(): Promise<void>
}

const swtpm = async (): Promise<Bench> => {
  const running: RunningSwtpm = await startSwtpm()
  return { open: async () => await openTransport(running.spec), restart: running.restart, stop: running.stop }
}

const simulator = async (): Promise<Bench> => {
  const tpm = createSoftwareTpm({ random, now: () => Date.now() })
  return {
    open: async () => tpm.transport(),
    restart: async () => tpm.powerCycle(),
    stop: async () => undefined,
  }
}

/** One list of expectations, two TPMs: the reference and our simulator. */
describe.each([
  ['swtpm', swtpm],
  ['simulator', simulator],
] as const)('device keys on %s', (name, start) => {
  const here = name !== 'swtpm' || hasProgram('swtpm')
  let bench: Bench
  let transport: Transport
  let tpm: Tpm
  let blobs: DeviceKeyBlobs
  let keys: DeviceKeys
  let bound: FirmwareKeyBlobs
  const maker = approver()
  const authPolicy = authPolicyOf(maker.policy())

  beforeAll(async () => {
    if (!here) return
    bench = await start()
    transport = await bench.open()
    tpm = new Tpm(transport, { random })
    blobs = await provision(tpm)
    keys = await openDeviceKeys(tpm, blobs)
    bound = await keys.make(maker.policy())
    keys.approve([await maker.running(tpm)])
  }, 60_000)
  afterAll(async () => {
    if (!here) return
    await keys.close()
    await transport.close()
    await bench.stop()
  })

  test.skipIf(!here)('every public area matches its template and no other', () => {
    for (const role of ['ek', 'ak', 'srk', 'ldevid'] as const) {
      expect(mismatch(keys.publics[role], role)).toBeUndefined()
      for (const other of ['ek', 'ak', 'srk', 'ldevid', 'recipient'] as const)
        if (other !== role) expect(mismatch(keys.publics[role], other), `${role} as ${other}`).toBeDefined()
    }
    expect(mismatch(bound.recipient.public, 'recipient', authPolicy)).toBeUndefined()
    expect(mismatch(bound.recipient.public, 'recipient')).toBe('attributes')
    expect(mismatch(bound.recipient.public, 'recipient', authPolicyOf(maker.policy(random(32))))).toBe('policy')
    expect(keys.ekName).toEqual(nameOf(keys.publics.ek))
  })

  test.skipIf(!here)('activates a credential for its own AK, and for no other name', async () => {
    const secret = random(32)
    const of = { ek: keys.publics.ek, secret: { bytes: () => secret }, random }
    expect(await keys.activate(makeCredential({ ...of, name: nameOf(keys.publics.ak) }))).toEqual(secret)
    await expect(keys.activate(makeCredential({ ...of, name: nameOf(keys.publics.srk) }))).rejects.toThrow(/INTEGRITY/)
    expect(await keys.activate(makeCredential({ ...of, name: nameOf(keys.publics.ak) }))).toEqual(secret)
  })

  test.skipIf(!here)('quotes and certifies over our data', async () => {
    const nonce = random(32)
    const { attest, signature } = await keys.quote([{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }], nonce)
    expect(verifyAttest(attest, signature, keys.publics.ak)).toBe(true)
    expect(verifyAttest(attest, signature, keys.publics.ldevid)).toBe(false)
    const quote = parseAttest(attest)
    const values = await tpm.exclusive(async () => await tpm.pcrRead(0x0b, [0, 1, 2, 3, 4, 5, 7, 11]))
    expect(quote).toMatchObject({ type: 'quote', selection: [{ hash: 0x0b, pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }] })
    expect(Buffer.from(quote.extraData)).toEqual(Buffer.from(nonce))
    if (quote.type === 'quote') expect(Buffer.from(quote.pcrDigest)).toEqual(Buffer.from(pcrDigest(values, [0, 1, 2, 3, 4, 5, 7, 11])))
    const certifiable = [
      ['srk', keys.publics.srk],
      ['ldevid', keys.publics.ldevid],
      [bound.recipient, bound.recipient.public],
    ] as const
    for (const [key, publicBytes] of certifiable) {
      const certified = await keys.certify(key, nonce)
      expect(verifyAttest(certified.attest, certified.signature, keys.publics.ak)).toBe(true)
      const parsed = parseAttest(certified.attest)
      expect(parsed.type === 'certify' && Buffer.compare(parsed.name, nameOf(publicBytes))).toBe(0)
    }
  })

  test.skipIf(!here)('signs with the LDevID key', async () => {
    const data = random(100)
    const key = createPublicKey({ key: Buffer.from(spkiOf(keys.publics.ldevid)), format: 'der', type: 'spki' })
    expect(verify('sha256', data, { key, dsaEncoding: 'ieee-p1363' }, await keys.sign(data))).toBe(true)
  })

  test.skipIf(!here)('multiplies with the recipient key, and refuses a point off the curve', async () => {
    const pair = createECDH('prime256v1')
    pair.generateKeys()
    const expected = pair.computeSecret(pointOf(bound.recipient.public))
    expect(Buffer.from(await keys.zgen(bound.recipient, pair.getPublicKey()))).toEqual(expected)
    const off = Uint8Array.from(pair.getPublicKey())
    off[64] = (off[64] ?? 0) ^ 1
    await expect(keys.zgen(bound.recipient, off)).rejects.toThrow(TpmError)
  })

  test.skipIf(!here)('imports an HMAC key that never leaves', async () => {
    const key = random(32)
    const wrapped = wrapForImport({ parent: keys.publics.srk, key, authPolicy, random })
    const blob = await keys.importHmacKey(wrapped)
    for (const length of [0, 1, 1024, 1025, 5000]) {
      const data = random(length)
      expect(Buffer.from(await keys.hmac(blob, data)), `${length} bytes`).toEqual(createHmac('sha256', key).update(data).digest())
    }
    const changed = Uint8Array.from(wrapped.duplicate)
    changed[40] = (changed[40] ?? 0) ^ 1
    await expect(keys.importHmacKey({ ...wrapped, duplicate: changed })).rejects.toThrow(ImportRefused)
    await expect(keys.importHmacKey({ ...wrapped, innerKey: random(16) })).rejects.toThrow(ImportRefused)
    const other = wrapForImport({ parent: keys.publics.srk, key, authPolicy, random })
    await expect(keys.importHmacKey({ ...wrapped, public: other.public })).rejects.toThrow(ImportRefused)
  })

  test.skipIf(!here)('unseals the same storage key, also after a power cycle in the middle', async () => {
    const before = await keys.storageKey(bound.storage)
    const count = (await keys.clock()).resetCount
    expect(before).toHaveLength(32)
    await keys.close()
    await transport.close()
    await bench.restart()
    transport = await bench.open()
    tpm = new Tpm(transport, { random })
    keys = await openDeviceKeys(tpm, blobs)
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(NotApproved)
    keys.approve([await maker.running(tpm)])
    expect(await keys.storageKey(bound.storage)).toEqual(before)
    expect((await keys.clock()).resetCount).toBeGreaterThan(count)
  })

  test.skipIf(!here)('takes turns when many ask at once, with three slots', async () => {
    const key = random(32)
    const blob = await keys.importHmacKey(wrapForImport({ parent: keys.publics.srk, key, authPolicy, random }))
    const data = random(64)
    const work = Array.from({ length: 8 }, async (_, at) =>
      at % 4 === 0
        ? await keys.quote([{ hash: 'sha256', pcrs: [0] }], data)
        : at % 4 === 1
          ? await keys.hmac(blob, data)
          : at % 4 === 2
            ? await keys.sign(data)
            : await keys.storageKey(bound.storage),
    )
    expect((await Promise.all(work)).length).toBe(8)
  })

  test.skipIf(!here)('EK certificate from NV: none, then the one the factory stored', async () => {
    expect(await keys.ekCertificate()).toBeNull()
    const certificate = Uint8Array.from([0x30, 0x82, 0x02, 0x58, ...random(600)])
    await tpm.exclusive(async () => await tpm.nvStore(0x01c0_000a, Uint8Array.from([...certificate, ...new Uint8Array(100)])))
    expect(Buffer.from((await keys.ekCertificate()) ?? [])).toEqual(Buffer.from(certificate))
  })

  test.skipIf(!here)('refuses blobs of another owner hierarchy', async () => {
    await keys.close()
    await tpm.exclusive(async () => await tpm.clear())
    await expect(openDeviceKeys(tpm, blobs)).rejects.toThrow(/INTEGRITY/)
    expect(templates.ak.type).toBe(0x23)
    blobs = await provision(tpm)
    keys = await openDeviceKeys(tpm, blobs)
  })
})
