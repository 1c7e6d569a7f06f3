import { createECDH } from 'node:crypto'
import { concat, empty, Reader, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, generated, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { password } from '../tpm-script.ts'
import {
  agreement,
  attestation,
  bits,
  create,
  ecc,
  macKey,
  nullHandle,
  nullScheme,
  own,
  owner,
  sealed,
  signing,
  storage,
  type Loaded,
  type Recorder,
  type Scenario,
} from './recorder.ts'

const hash32 = digest(alg.sha256, Uint8Array.of(1))
const noTicket = concat(u16(tag.hashcheck), u32(nullHandle), sized(empty))
const scheme = (which: number, hash: number): Uint8Array => concat(u16(which), u16(hash))
const seeAttest = (reader: Reader): unknown => {
  const attest = new Reader(reader.sized())
  const head = { magic: attest.u32(), type: attest.u16(), signer: attest.sized().length, extra: Buffer.from(attest.sized()).toString('hex') }
  attest.bytes(8)
  attest.bytes(8)
  return { ...head, safe: attest.u8(), rest: attest.left, scheme: reader.u16() }
}

const signatures = async (on: Recorder, parent: Loaded): Promise<void> => {
  const sign = async (label: string, key: number, of: { digest?: Uint8Array; scheme?: Uint8Array; ticket?: Uint8Array } = {}): Promise<Uint8Array> => {
    const step = {
      code: command.sign,
      handles: [key],
      auth: [password()],
      parameters: concat(sized(of.digest ?? hash32), of.scheme ?? nullScheme, of.ticket ?? noTicket),
    }
    return (await on.step({ label, see: (reader) => ({ scheme: reader.u16(), hash: reader.u16() }) }, step)).parameters
  }
  const verify = async (label: string, key: number, signature: Uint8Array, of: Uint8Array = hash32): Promise<void> =>
    void (await on.step(
      { label, see: (reader) => ({ tag: reader.u16(), hierarchy: reader.u32(), ticket: reader.sized().length }) },
      { code: command.verifySignature, handles: [key], parameters: concat(sized(of), signature) },
    ))
  const key = await on.child(parent, signing)
  const signature = await sign('sign', key.handle)
  await verify('verify', key.handle, signature)
  await verify('verify another digest', key.handle, signature, new Uint8Array(32))
  await verify('verify a longer digest', key.handle, signature, new Uint8Array(48))
  await verify('verify a digest too long', key.handle, signature, new Uint8Array(65))
  await verify('signature of nothing', key.handle, concat(u16(alg.ecdsa), u16(alg.sha256), sized(empty), sized(empty)))
  await verify('signature too long', key.handle, concat(u16(alg.ecdsa), u16(alg.sha256), sized(new Uint8Array(40).fill(255)), sized(new Uint8Array(32))))
  await verify('null signature', key.handle, u16(alg.null))
  await verify('RSA signature', key.handle, concat(u16(alg.rsassa), u16(alg.sha256), sized(new Uint8Array(256))))
  await verify('no such signature', key.handle, u16(0x99))
  await verify('no such hash', key.handle, concat(u16(alg.ecdsa), u16(0x99), sized(empty), sized(empty)))
  await verify('short signature', key.handle, signature.subarray(0, 20))
  await verify('by a storage key', parent.handle, signature)
  await sign('short digest', key.handle, { digest: new Uint8Array(20) })
  await sign('long digest', key.handle, { digest: new Uint8Array(64) })
  await sign('its own scheme', key.handle, { scheme: scheme(alg.ecdsa, alg.sha256) })
  await sign('another hash', key.handle, { scheme: scheme(alg.ecdsa, alg.sha384) })
  await sign('RSA scheme', key.handle, { scheme: scheme(alg.rsassa, alg.sha256) })
  await sign('no such scheme', key.handle, { scheme: scheme(0x99, alg.sha256) })
  await sign('forged ticket', key.handle, { ticket: concat(u16(tag.hashcheck), u32(owner), sized(new Uint8Array(64))) })
  await sign('ticket of another kind', key.handle, { ticket: concat(u16(tag.verified), u32(owner), sized(empty)) })
  await sign('ticket of no hierarchy', key.handle, { ticket: concat(u16(tag.hashcheck), u32(0), sized(empty)) })
  await sign('by a storage key', parent.handle)
  await on.flush(key.handle)
  const restricted = await on.child(parent, attestation)
  await sign('restricted without a ticket', restricted.handle)
  const hashed = async (label: string, data: Uint8Array, hierarchy: number): Promise<Uint8Array> => {
    const step = { code: command.hash, parameters: concat(sized(data), u16(alg.sha256), u32(hierarchy)) }
    const { parameters } = await on.step(
      {
        label,
        see: (reader) => ({ digest: Buffer.from(reader.sized()).toString('hex'), tag: reader.u16(), hierarchy: reader.u32(), ticket: reader.sized().length }),
      },
      step,
    )
    if (parameters.length === 0) return empty
    const reader = new Reader(parameters)
    reader.sized()
    return reader.rest()
  }
  const ticket = await hashed('hash', Uint8Array.of(1), owner)
  await sign('ticket of a short message', restricted.handle, { ticket })
  const long = new TextEncoder().encode('a message')
  await sign('restricted with a ticket', restricted.handle, { digest: digest(alg.sha256, long), ticket: await hashed('hash of a message', long, owner) })
  await sign('ticket of another digest', restricted.handle, { ticket: await hashed('hash of a message again', long, owner) })
  await hashed('hash in the null hierarchy', long, nullHandle)
  await hashed('hash of a statement', concat(u32(generated), long), owner)
  await hashed('hash in no hierarchy', long, known.lockout)
  await on.flush(restricted.handle)
  const free = await on.child(parent, { ...signing, scheme: null })
  await sign('no scheme at all', free.handle)
  await verify('free scheme', free.handle, await sign('a scheme asked for', free.handle, { scheme: scheme(alg.ecdsa, alg.sha256) }))
  await sign('with SHA-384', free.handle, { scheme: scheme(alg.ecdsa, alg.sha384), digest: new Uint8Array(48).fill(1) })
  await on.flush(free.handle)
  const mac = await on.child(parent, macKey, { data: new Uint8Array(32).fill(1) })
  await verify('verify an HMAC', mac.handle, await sign('sign with an HMAC key', mac.handle))
  await on.flush(mac.handle)
}

const attestations = async (on: Recorder, parent: Loaded): Promise<void> => {
  const key = await on.primary(known.endorsement, attestation)
  const quote = async (label: string, handle: number, of: { extra?: Uint8Array; scheme?: Uint8Array; pcrs?: Uint8Array } = {}): Promise<void> =>
    void (await on.step(
      { label, see: seeAttest },
      {
        code: command.quote,
        handles: [handle],
        auth: [password()],
        parameters: concat(sized(of.extra ?? hash32), of.scheme ?? nullScheme, of.pcrs ?? marshalPcrSelection([{ hash: alg.sha256, pcrs: [0, 1, 7] }])),
      },
    ))
  await quote('quote', key.handle)
  await quote('extra data of 66 bytes', key.handle, { extra: new Uint8Array(66) })
  await quote('extra data of 67 bytes', key.handle, { extra: new Uint8Array(67) })
  await quote('no PCRs', key.handle, { pcrs: u32(0) })
  await quote('another bank', key.handle, { pcrs: marshalPcrSelection([{ hash: alg.sha1, pcrs: [0] }]) })
  await quote('two banks', key.handle, {
    pcrs: marshalPcrSelection([
      { hash: alg.sha1, pcrs: [0] },
      { hash: alg.sha256, pcrs: [1] },
    ]),
  })
  await quote('the same bank twice', key.handle, {
    pcrs: marshalPcrSelection([
      { hash: alg.sha256, pcrs: [0] },
      { hash: alg.sha256, pcrs: [1] },
    ]),
  })
  await quote('another scheme', key.handle, { scheme: scheme(alg.ecdsa, alg.sha384) })
  await quote('by nobody', nullHandle)
  await quote('by a storage key', parent.handle)
  const certify = async (label: string, object: number, by: number): Promise<void> =>
    void (await on.step(
      { label, see: seeAttest },
      { code: command.certify, handles: [object, by], auth: [password(), password()], parameters: concat(sized(hash32), nullScheme) },
    ))
  await certify('certify', parent.handle, key.handle)
  await certify('certify itself', key.handle, key.handle)
  await certify('certify by nobody', parent.handle, nullHandle)
  await certify('certify by a storage key', key.handle, parent.handle)
  const time = async (label: string, by: number, hierarchy: number = known.endorsement): Promise<void> =>
    void (await on.step(
      { label, see: seeAttest },
      { code: command.getTime, handles: [hierarchy, by], auth: [password(), password()], parameters: concat(sized(hash32), nullScheme) },
    ))
  await time('time', key.handle)
  await time('time by nobody', nullHandle)
  await time('time of the owner', key.handle, owner)
  const made = await on.subject.tpm.must(create(parent.handle, signing))
  const reader = new Reader(made.parameters)
  const [privateBytes, publicBytes] = [reader.sized().slice(), reader.sized().slice()]
  reader.sized()
  const [creationHash, ticket] = [reader.sized().slice(), reader.rest().slice()]
  const { handle } = await on.subject.tpm.must({
    code: command.load,
    handles: [parent.handle],
    auth: [password()],
    parameters: concat(sized(privateBytes), sized(publicBytes)),
    givesHandle: true,
  })
  const certifyCreation = async (label: string, object: number, of: { hash?: Uint8Array; ticket?: Uint8Array }): Promise<void> =>
    void (await on.step(
      { label, see: seeAttest },
      {
        code: command.certifyCreation,
        handles: [key.handle, object],
        auth: [password()],
        parameters: concat(sized(hash32), sized(of.hash ?? creationHash), nullScheme, of.ticket ?? ticket),
      },
    ))
  await certifyCreation('creation', handle, {})
  await certifyCreation('another creation', handle, { hash: new Uint8Array(32) })
  await certifyCreation('creation of another', parent.handle, {})
  await certifyCreation('ticket of another kind', handle, { ticket: concat(u16(tag.verified), u32(owner), sized(empty)) })
  await on.flush(handle, key.handle)
}

const agreements = async (on: Recorder, parent: Loaded): Promise<void> => {
  const key = await on.child(parent, agreement)
  const pair = createECDH('prime256v1')
  pair.setPrivateKey(Buffer.alloc(32, 7))
  const point = new Uint8Array(pair.getPublicKey())
  const [x, y] = [point.subarray(1, 33), point.subarray(33)]
  const zgen = async (label: string, handle: number, parameters: Uint8Array): Promise<void> =>
    void (await on.step(
      { label, see: (reader) => new Reader(reader.sized()).sized().length },
      { code: command.ecdhZGen, handles: [handle], auth: [password()], parameters },
    ))
  await zgen('multiply', key.handle, sized(concat(sized(x), sized(y))))
  await zgen('off the curve', key.handle, sized(concat(sized(x), sized(x))))
  await zgen('infinity', key.handle, sized(concat(sized(new Uint8Array(32)), sized(new Uint8Array(32)))))
  await zgen('empty point', key.handle, sized(concat(sized(empty), sized(empty))))
  await zgen('nothing', key.handle, sized(empty))
  await zgen('trailing byte', key.handle, sized(concat(sized(x), sized(y), u8(0))))
  await zgen('short', key.handle, sized(sized(x)))
  await zgen('with a storage key', parent.handle, sized(concat(sized(x), sized(y))))
  await on.step('ephemeral', { code: command.ecdhKeyGen, handles: [key.handle] })
  await on.flush(key.handle)
  const both = await on.child(parent, ecc(own | bits.noDA | bits.sign | bits.decrypt))
  await zgen('with a key for both', both.handle, sized(concat(sized(x), sized(y))))
  await on.flush(both.handle)
  const signer = await on.child(parent, signing)
  await zgen('with a signing key', signer.handle, sized(concat(sized(x), sized(y))))
  await on.flush(signer.handle)
}

const macs = async (on: Recorder, parent: Loaded): Promise<void> => {
  const key = await on.child(parent, macKey, { data: new Uint8Array(32).fill(1) })
  const mac = async (label: string, handle: number, data: Uint8Array, hash: number): Promise<void> =>
    void (await on.step(
      { label, see: (reader) => reader.sized() },
      { code: command.hmac, handles: [handle], auth: [password()], parameters: concat(sized(data), u16(hash)) },
    ))
  await mac('HMAC', key.handle, hash32, alg.null)
  await mac('its own hash', key.handle, hash32, alg.sha256)
  await mac('another hash', key.handle, hash32, alg.sha384)
  await mac('no such hash', key.handle, hash32, 0x99)
  await mac('1024 bytes', key.handle, new Uint8Array(1024), alg.null)
  await mac('1025 bytes', key.handle, new Uint8Array(1025), alg.null)
  await mac('with a storage key', parent.handle, hash32, alg.null)
  const begin = async (label: string, code: number, handles: readonly number[], hash: number, auth: Uint8Array = empty): Promise<number> =>
    (await on.step(label, { code, handles, auth: handles.length === 0 ? [] : [password()], parameters: concat(sized(auth), u16(hash)), givesHandle: true }))
      .handle
  const secret = Uint8Array.of(5, 6)
  const sequence = await begin('start an HMAC', command.hmacStart, [key.handle], alg.null, secret)
  const update = async (label: string, handle: number, data: Uint8Array, auth: Uint8Array = empty): Promise<void> =>
    void (await on.step(label, { code: command.sequenceUpdate, handles: [handle], auth: [password(auth)], parameters: sized(data) }))
  const complete = async (label: string, handle: number, auth: Uint8Array = empty, hierarchy: number = owner): Promise<void> =>
    void (await on.step(
      {
        label,
        see: (reader) => ({ result: Buffer.from(reader.sized()).toString('hex'), tag: reader.u16(), hierarchy: reader.u32(), ticket: reader.sized().length }),
      },
      { code: command.sequenceComplete, handles: [handle], auth: [password(auth)], parameters: concat(sized(hash32), u32(hierarchy)) },
    ))
  await update('update', sequence, hash32, secret)
  await update('update with a wrong value', sequence, hash32)
  await on.step('read its public area', { code: command.readPublic, handles: [sequence] })
  await complete('complete', sequence, secret)
  await complete('complete again', sequence, secret)
  await update('update a key', key.handle, hash32)
  await complete('complete a key', key.handle)
  for (const hash of [alg.sha1, alg.sha256, alg.sha384, alg.sha512]) {
    const handle = await begin(`start hash ${hash}`, command.hashSequenceStart, [], hash)
    await update('a message', handle, new TextEncoder().encode('message'))
    await complete('its hash', handle)
  }
  const statement = await begin('start a statement', command.hashSequenceStart, [], alg.sha256)
  await update('a statement', statement, u32(generated))
  await complete('hash of a statement', statement)
  const event = await begin('start an event', command.hashSequenceStart, [], alg.null)
  await complete('complete an event as a hash', event)
  const completeEvent = async (label: string, pcr: number): Promise<void> =>
    void (await on.step(
      { label, see: (reader) => reader.rest() },
      { code: command.eventSequenceComplete, handles: [pcr, event], auth: [password(), password()], parameters: sized(hash32) },
    ))
  await completeEvent('event into PCR 17', 17)
  await completeEvent('event into PCR 16', 16)
  await completeEvent('event again', 16)
  await begin('start with no such hash', command.hashSequenceStart, [], 0x99)
  await on.flush(key.handle)
  const box = await on.child(parent, sealed, { data: hash32 })
  await mac('with a sealed object', box.handle, hash32, alg.sha256)
  await on.flush(box.handle)
}

export const keysAtWork: Scenario = async (on) => {
  const parent = await on.primary(owner, storage)
  await signatures(on, parent)
  await attestations(on, parent)
  await agreements(on, parent)
  await macs(on, parent)
}
