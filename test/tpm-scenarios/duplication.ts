import { concat, empty, Reader, sized, u16, u32 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known } from '@fleetkey/tpm2/constants.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { randomBytes } from 'node:crypto'
import { password, type ScriptSession } from '../tpm-script.ts'
import { bits, ecc, ecdsa, flush, load, nullHandle, own, owner, signing, storage, type Loaded, type Recorder, type Scenario } from './recorder.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const aes = concat(u16(alg.aes), u16(128), u16(alg.cfb))
const none = u16(alg.null)
const flipped = (bytes: Uint8Array, at: number): Uint8Array => bytes.map((byte, place) => (place === at ? byte ^ 1 : byte))

const imports = async (on: Recorder, parent: Loaded): Promise<void> => {
  const key = new Uint8Array(32).fill(3)
  const wrapped = wrapForImport({ parent: parent.public, key, authPolicy: null, random })
  const take = async (label: string, of: Partial<typeof wrapped> & { symmetric?: Uint8Array; handle?: number } = {}): Promise<Uint8Array> => {
    const all = { ...wrapped, ...of }
    const parameters = concat(sized(all.innerKey), sized(all.public), sized(all.duplicate), sized(all.seed), of.symmetric ?? aes)
    return (await on.step(label, { code: command.import, handles: [of.handle ?? parent.handle], auth: [password()], parameters })).parameters
  }
  const blob = await take('import')
  const { handle } = await on.step('load what was imported', load(parent.handle, new Reader(blob).sized(), wrapped.public))
  await on.step(
    { label: 'HMAC', see: (reader) => reader.sized() },
    { code: command.hmac, handles: [handle], auth: [password()], parameters: concat(sized(key), none) },
  )
  await on.step('duplicate it again', { code: command.duplicate, handles: [handle, nullHandle], auth: [password()], parameters: concat(sized(empty), none) })
  await on.flush(handle)
  await take('altered duplicate', { duplicate: flipped(wrapped.duplicate, 40) })
  await take('altered integrity', { duplicate: flipped(wrapped.duplicate, 4) })
  await take('short duplicate', { duplicate: wrapped.duplicate.subarray(0, 20) })
  await take('empty duplicate', { duplicate: empty })
  await take('another inner key', { innerKey: random(16) })
  await take('short inner key', { innerKey: random(15) })
  await take('no inner key', { innerKey: empty, symmetric: none })
  await take('inner key without a cipher', { symmetric: none })
  await take('inner key of AES-256', { symmetric: concat(u16(alg.aes), u16(256), u16(alg.cfb)) })
  await take('no seed', { seed: empty })
  await take('short seed', { seed: wrapped.seed.subarray(0, 20) })
  await take('altered seed', { seed: flipped(wrapped.seed, 10) })
  await take('altered public area', { public: flipped(wrapped.public, wrapped.public.length - 1) })
  await take('fixed', { public: flipped(wrapped.public, 7).map((byte, at) => (at === 7 ? byte ^ 0x12 : byte)) })
  await take('no public area', { public: empty })
  const signer = await on.child(parent, signing)
  await take('below a signing key', { handle: signer.handle })
  await on.flush(signer.handle)
}

/** Policy that lets an object be duplicated: PolicyCommandCode(Duplicate). */
const shown = async (on: Recorder, type: 'policy' | 'trial'): Promise<ScriptSession> => {
  const session = await on.subject.tpm.session(type)
  await on.subject.tpm.must({ code: command.policyCommandCode, handles: [session.handle], parameters: u32(command.duplicate) })
  return session
}

const duplicates = async (on: Recorder, parent: Loaded): Promise<void> => {
  const { tpm } = on.subject
  const trial = await shown(on, 'trial')
  const policy = new Reader((await tpm.must({ code: command.policyGetDigest, handles: [trial.handle] })).parameters).sized().slice()
  await on.flush(trial.handle)
  const free = (own | bits.noDA | bits.sign) & ~(bits.fixedTPM | bits.fixedParent)
  const object = await on.child(parent, ecc(free, { scheme: ecdsa, authPolicy: policy }))
  const target = await on.primary(known.platform, storage)
  const duplicate = async (label: string, of: { to?: number; key?: Uint8Array; symmetric?: Uint8Array; object?: Loaded }): Promise<Uint8Array> => {
    const session = await shown(on, 'policy')
    const outcome = await on.step(label, {
      code: command.duplicate,
      handles: [of.object ?? object, of.to === undefined ? target : of.to === target.handle ? target : of.to],
      auth: [{ session }],
      parameters: concat(sized(of.key ?? empty), of.symmetric ?? none),
    })
    await on.flush(session.handle)
    return outcome.parameters
  }
  await on.step('duplicate by password', {
    code: command.duplicate,
    handles: [object.handle, target.handle],
    auth: [password()],
    parameters: concat(sized(empty), none),
  })
  const moved = new Reader(await duplicate('duplicate', {}))
  moved.sized()
  const [blob, seed] = [moved.sized().slice(), moved.sized().slice()]
  const take = {
    code: command.import,
    handles: [target.handle],
    auth: [password()],
    parameters: concat(sized(empty), sized(object.public), sized(blob), sized(seed), none),
  }
  await on.step('import it elsewhere', take)
  await on.step('import it where it is not for', { ...take, handles: [parent.handle] })
  await duplicate('to nobody', { to: nullHandle })
  await duplicate('with an inner wrapper', { symmetric: aes })
  await duplicate('with an inner key', { symmetric: aes, key: new Uint8Array(16) })
  await duplicate('with a short inner key', { symmetric: aes, key: new Uint8Array(15) })
  await duplicate('with a key and no cipher', { key: new Uint8Array(16) })
  await on.flush(object.handle)
  const strict = await on.child(parent, ecc(free | bits.encryptedDuplication, { scheme: ecdsa, authPolicy: policy }))
  await duplicate('strict without a cipher', { object: strict })
  await duplicate('strict to nobody', { object: strict, to: nullHandle, symmetric: aes })
  await duplicate('strict', { object: strict, symmetric: aes })
  await on.flush(strict.handle)
  const fixed = await on.child(parent, { ...signing, authPolicy: policy })
  await duplicate('fixed', { object: fixed })
  await on.flush(fixed.handle, target.handle)
}

const credentials = async (on: Recorder): Promise<void> => {
  const { tpm } = on.subject
  const ek = await on.primary(known.endorsement, templates.ekEcc)
  const ak = await on.primary(known.endorsement, templates.ak)
  const secret = new Uint8Array(32).fill(8)
  const policy = async (): Promise<ScriptSession> => {
    const session = await tpm.session('policy')
    await tpm.must({
      code: command.policySecret,
      handles: [known.endorsement, session.handle],
      auth: [password()],
      parameters: concat(sized(empty), sized(empty), sized(empty), u32(0)),
    })
    return session
  }
  const activate = async (label: string, blob: Uint8Array, seed: Uint8Array, by: Loaded = ek): Promise<void> => {
    const session = await policy()
    await on.step(
      { label, see: (reader) => reader.sized() },
      { code: command.activateCredential, handles: [ak, by], auth: [password(), { session }], parameters: concat(sized(blob), sized(seed)) },
    )
    await on.subject.tpm.run(flush(session.handle))
  }
  const made = makeCredential({ ek: ek.public, name: ak.name, secret: { bytes: () => secret }, random })
  await activate('activate', made.blob, made.secret)
  await activate('altered', flipped(made.blob, 40), made.secret)
  await activate('altered seed', made.blob, flipped(made.secret, 40))
  await activate('short seed', made.blob, made.secret.subarray(0, 30))
  await activate('empty', empty, empty)
  await activate('with the AK', made.blob, made.secret, ak)
  await on.step('activate by password', {
    code: command.activateCredential,
    handles: [ak, ek],
    auth: [password(), password()],
    parameters: concat(sized(made.blob), sized(made.secret)),
  })
  const make = async (label: string, handle: number, value: Uint8Array, name: Uint8Array): Promise<Uint8Array> =>
    (await on.step(label, { code: command.makeCredential, handles: [handle], parameters: concat(sized(value), sized(name)) })).parameters
  const own2 = new Reader(await make('make', ek.handle, secret, ak.name))
  await activate('activate what it made', own2.sized().slice(), own2.sized().slice())
  await make('too long', ek.handle, new Uint8Array(33), ak.name)
  await make('with the AK', ak.handle, secret, ak.name)
  await make('for no name', ek.handle, secret, empty)
  await on.flush(ek.handle, ak.handle)
}

export const duplication: Scenario = async (on) => {
  const parent = await on.primary(owner, storage)
  await imports(on, parent)
  await duplicates(on, parent)
  await on.flush(parent.handle)
  await credentials(on)
}
