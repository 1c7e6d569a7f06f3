import { createECDH, createHmac, generateKeyPairSync, randomBytes, sign, verify, type KeyObject } from 'node:crypto'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { marshalSignature, parseSignature, rawOf } from '@fleetkey/tpm2/attest.ts'
import { concat, empty, Reader, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, attribute, command, curve, handle as known, session as flag, tag } from '@fleetkey/tpm2/constants.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { approvalDigest, noPolicy, policyAuthorize, policyPcr } from '@fleetkey/tpm2/policies.ts'
import { keyObjectOf, marshalPcrSelection, marshalPublic, parsePublic, type Public } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { openTransport } from '@fleetkey/tpm2/transport.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm } from './swtpm.ts'
import { password, ScriptTpm, type ScriptSession } from './tpm-script.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const pcrs = [{ hash: alg.sha256, pcrs: [0, 4, 11] }]
const ref = new TextEncoder().encode('release/gateway')

interface Bench {
  readonly tpm: ScriptTpm
  readonly stop: () => Promise<void>
}

const swtpm = async (): Promise<Bench> => {
  const running = await startSwtpm()
  const transport = await openTransport(running.spec)
  const stop = async (): Promise<void> => {
    await transport.close()
    await running.stop()
  }
  return { tpm: new ScriptTpm(transport.send), stop }
}
const simulator = async (): Promise<Bench> => {
  const tpm = createSoftwareTpm({ random, now: () => Date.now() })
  return { tpm: new ScriptTpm(async (bytes) => tpm.execute(bytes)), stop: async () => undefined }
}

interface Loaded {
  readonly handle: number
  readonly name: Uint8Array
  readonly public: Uint8Array
}

/** Keys that work only while the PCRs are those that an outside key has approved: the policy of keys under firmware, on the reference TPM and on ours. */
describe.each([
  ['swtpm', swtpm],
  ['simulator', simulator],
] as const)('keys under PolicyAuthorize on %s', (which, start) => {
  const here = which !== 'swtpm' || hasProgram('swtpm')
  const signer = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const point = signer.publicKey.export({ format: 'jwk' })
  const signerPublic = marshalPublic({
    type: alg.ecc,
    nameAlg: alg.sha256,
    attributes: attribute.sign | attribute.userWithAuth,
    authPolicy: empty,
    symmetric: null,
    scheme: { scheme: alg.ecdsa, hash: alg.sha256 },
    curve: curve.p256,
    x: new Uint8Array(Buffer.from(point.x ?? '', 'base64url')),
    y: new Uint8Array(Buffer.from(point.y ?? '', 'base64url')),
  })
  const policy = policyAuthorize(nameOf(signerPublic), ref)
  let bench: Bench
  let tpm: ScriptTpm
  let ek: Loaded
  let srk: Loaded

  const primary = async (hierarchy: number, template: Public): Promise<Loaded> => {
    const { handle, parameters } = await tpm.must({
      code: command.createPrimary,
      handles: [hierarchy],
      auth: [password()],
      parameters: concat(sized(concat(sized(empty), sized(empty))), sized(marshalPublic(template)), sized(empty), u32(0)),
      givesHandle: true,
    })
    const publicBytes = new Reader(parameters).sized().slice()
    return { handle, public: publicBytes, name: nameOf(publicBytes) }
  }
  const child = async (template: Public, data: Uint8Array = empty, auth: Uint8Array = empty): Promise<Loaded> => {
    const made = await tpm.must({
      code: command.create,
      handles: [srk],
      auth: [password()],
      parameters: concat(sized(concat(sized(auth), sized(data))), sized(marshalPublic(template)), sized(empty), u32(0)),
    })
    const reader = new Reader(made.parameters)
    const [privateBytes, publicBytes] = [reader.sized().slice(), reader.sized().slice()]
    const { handle } = await tpm.must({
      code: command.load,
      handles: [srk],
      auth: [password()],
      parameters: concat(sized(privateBytes), sized(publicBytes)),
      givesHandle: true,
    })
    return { handle, public: publicBytes, name: nameOf(publicBytes) }
  }
  const flush = async (handle: number): Promise<void> => void (await tpm.must({ code: command.flushContext, parameters: u32(handle) }))
  const values = async (): Promise<readonly Uint8Array[]> => {
    const reader = new Reader((await tpm.must({ code: command.pcrRead, parameters: marshalPcrSelection(pcrs) })).parameters)
    reader.u32()
    reader.bytes(4 + 2 + 1 + 3)
    return Array.from({ length: reader.u32() }, () => reader.sized().slice())
  }
  /** TPM2_LoadExternal of the approving key, TPM2_VerifySignature of an approval: its ticket. */
  const ticketFor = async (approved: Uint8Array, by: KeyObject = signer.privateKey, over: Uint8Array = ref): Promise<Uint8Array> => {
    const { handle, parameters } = await tpm.must({
      code: command.loadExternal,
      parameters: concat(sized(empty), sized(signerPublic), u32(known.owner)),
      givesHandle: true,
    })
    expect(Buffer.from(new Reader(parameters).sized())).toEqual(Buffer.from(nameOf(signerPublic)))
    const raw = new Uint8Array(sign('sha256', concat(approved, over), { key: by, dsaEncoding: 'ieee-p1363' }))
    const signature = marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: raw.subarray(0, 32), s: raw.subarray(32) })
    const verified = await tpm.run({ code: command.verifySignature, handles: [handle], parameters: concat(sized(approvalDigest(approved, over)), signature) })
    await flush(handle)
    if (verified.rc !== 0) throw new Error(verified.rc.toString(16))
    return verified.parameters
  }
  interface Approval {
    readonly approved: Uint8Array
    readonly ticket: Uint8Array
  }
  /** An approval of the PCRs as they are; needs a free slot. */
  const approve = async (): Promise<Approval> => {
    const approved = policyPcr(noPolicy, pcrs, await values())
    return { approved, ticket: await ticketFor(approved) }
  }
  /** A policy session, salted to the EK, in which the approved PCRs have been shown. */
  const open = async ({ approved, ticket }: Approval): Promise<ScriptSession> => {
    const session = await tpm.session('policy', { salter: ek })
    await tpm.must({ code: command.policyPcr, handles: [session.handle], parameters: concat(sized(empty), marshalPcrSelection(pcrs)) })
    const { rc } = await tpm.run({
      code: command.policyAuthorize,
      handles: [session.handle],
      parameters: concat(sized(approved), sized(ref), sized(nameOf(signerPublic)), ticket),
    })
    if (rc !== 0) {
      await flush(session.handle)
      throw new Error(rc.toString(16))
    }
    const { parameters } = await tpm.must({ code: command.policyGetDigest, handles: [session.handle] })
    expect(Buffer.from(new Reader(parameters).sized())).toEqual(Buffer.from(policy))
    return session
  }
  /** The same template under the policy alone. */
  const under = <T extends Public>(template: T): T => ({ ...template, attributes: template.attributes & ~attribute.userWithAuth, authPolicy: policy })

  beforeAll(async () => {
    if (!here) return
    bench = await start()
    ;({ tpm } = bench)
    ek = await primary(known.endorsement, templates.ekEcc)
    srk = await primary(known.owner, templates.srk)
    await tpm.must({ code: command.pcrExtend, handles: [11], auth: [password()], parameters: concat(u32(1), u16(alg.sha256), new Uint8Array(32).fill(7)) })
  })
  afterAll(async () => (here ? await bench.stop() : undefined))

  test.skipIf(!here)('unseals under the policy, encrypted on its way; by no password, by no empty session, not after an extend', async () => {
    const approval = await approve()
    const sealed = await child(under(templates.sealed), new TextEncoder().encode('sealed words'))
    expect((await tpm.run({ code: command.unseal, handles: [sealed], auth: [password()] })).rc).toBe(0x12f)
    const session = await open(approval)
    const { parameters, raw } = await tpm.must({ code: command.unseal, handles: [sealed], auth: [{ session, attributes: flag.continue | flag.encrypt }] })
    expect(Buffer.from(new Reader(parameters).sized()).toString()).toBe('sealed words')
    expect(Buffer.from(raw).includes('sealed words')).toBe(false)
    // Used up: the same session authorises nothing more.
    expect((await tpm.run({ code: command.unseal, handles: [sealed], auth: [{ session }] })).rc).toBe(0x99d)
    await flush(session.handle)
    const bare = await tpm.session('policy')
    expect((await tpm.run({ code: command.unseal, handles: [sealed], auth: [{ session: bare }] })).rc).toBe(0x99d)
    await flush(bare.handle)
    const late = await open(approval)
    await tpm.must({ code: command.pcrExtend, handles: [4], auth: [password()], parameters: concat(u32(1), u16(alg.sha256), new Uint8Array(32).fill(9)) })
    expect((await tpm.run({ code: command.unseal, handles: [sealed], auth: [{ session: late }] })).rc).toBe(0x128)
    await flush(late.handle)
    // Another firmware needs its own approval.
    await expect(open(approval)).rejects.toThrow('1c4')
    await flush(sealed.handle)
  })

  test.skipIf(!here)('an approval by another key, over another reference, or with a ticket of another digest, opens nothing', async () => {
    const { approved } = await approve()
    const other = generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey
    await expect(ticketFor(approved, other)).rejects.toThrow('2db')
    await expect(open({ approved, ticket: await ticketFor(approved, signer.privateKey, random(8)) })).rejects.toThrow('4c4')
    await expect(open({ approved, ticket: await ticketFor(random(32)) })).rejects.toThrow('4c4')
    await expect(open({ approved, ticket: concat(u16(tag.verified), u32(known.owner), sized(random(32))) })).rejects.toThrow('4c4')
  })

  test.skipIf(!here)('signs, multiplies, computes HMACs and loads under the policy', async () => {
    const approval = await approve()
    const key = await child(under(templates.ldevid))
    const message = random(48)
    const signing = await open(approval)
    const ticket = concat(u16(tag.hashcheck), u32(known.null), sized(empty))
    const hash = approvalDigest(message, empty)
    const signed = await tpm.must({
      code: command.sign,
      handles: [key],
      auth: [{ session: signing, attributes: 0 }],
      parameters: concat(sized(hash), u16(alg.null), ticket),
    })
    const raw = rawOf(parseSignature(signed.parameters))
    expect(verify('sha256', message, { key: keyObjectOf(parsePublic(key.public)), dsaEncoding: 'ieee-p1363' }, raw)).toBe(true)
    await flush(key.handle)

    const recipient = await child(under(templates.recipient))
    const pair = createECDH('prime256v1')
    pair.generateKeys()
    const ours = new Uint8Array(pair.getPublicKey())
    const multiplying = await open(approval)
    const product = await tpm.must({
      code: command.ecdhZGen,
      handles: [recipient],
      auth: [{ session: multiplying, attributes: flag.decrypt | flag.encrypt }],
      parameters: sized(concat(sized(ours.subarray(1, 33)), sized(ours.subarray(33)))),
    })
    const theirs = parsePublic(recipient.public)
    if (theirs.type !== alg.ecc) throw new Error('not an ECC key')
    const z = new Reader(new Reader(product.parameters).sized())
    expect(Buffer.from(z.sized())).toEqual(pair.computeSecret(concat(Uint8Array.of(4), theirs.x, theirs.y)))
    await flush(recipient.handle)
  })

  test.skipIf(!here)('HMAC and its sequences under the policy', async () => {
    const secret = random(32)
    const scheme = { scheme: alg.hmac, hash: alg.sha256 }
    const approval = await approve()
    const template = under({ ...templates.sealed, attributes: (templates.sealed.attributes | attribute.sign) & ~attribute.sensitiveDataOrigin, scheme })
    const key = await child(template, secret)
    const data = random(900)
    const session = await open(approval)
    const once = await tpm.must({
      code: command.hmac,
      handles: [key],
      auth: [{ session, attributes: flag.decrypt | flag.encrypt }],
      parameters: concat(sized(data), u16(alg.null)),
    })
    expect(Buffer.from(new Reader(once.parameters).sized())).toEqual(createHmac('sha256', secret).update(data).digest())
    const starting = await open(approval)
    await flush(ek.handle)
    const { handle } = await tpm.must({
      code: command.hmacStart,
      handles: [key],
      auth: [{ session: starting, attributes: flag.decrypt }],
      parameters: concat(sized(random(16)), u16(alg.null)),
      givesHandle: true,
    })
    const sequence = { handle, name: empty }
    expect((await tpm.run({ code: command.sequenceUpdate, handles: [sequence], auth: [password()], parameters: sized(data) })).rc).toBe(0x9a2)
    await flush(handle)
    await flush(key.handle)
    ek = await primary(known.endorsement, templates.ekEcc)
  })

  test.skipIf(!here)('a storage key under the policy: its children load only in an approved state', async () => {
    await flush(srk.handle)
    const approval = await approve()
    const strict = await primary(known.owner, under(templates.srk))
    const session = await open(approval)
    const made = await tpm.must({
      code: command.create,
      handles: [strict],
      auth: [{ session, attributes: flag.decrypt | flag.encrypt }],
      parameters: concat(sized(concat(sized(empty), sized(random(32)))), sized(marshalPublic(templates.sealed)), sized(empty), u32(0)),
    })
    const reader = new Reader(made.parameters)
    const blob = concat(sized(reader.sized()), sized(reader.sized()))
    expect((await tpm.run({ code: command.load, handles: [strict], auth: [password()], parameters: blob })).rc).toBe(0x12f)
    const loading = await open(approval)
    const { handle } = await tpm.must({
      code: command.load,
      handles: [strict],
      auth: [{ session: loading, attributes: flag.decrypt }],
      parameters: blob,
      givesHandle: true,
    })
    await flush(handle)
    await flush(strict.handle)
    srk = await primary(known.owner, templates.srk)
  })
})
