import { concat, empty, Reader, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known, session as flag } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { nameOf } from '@fleetkey/tpm2/names.ts'
import { marshalPcrSelection } from '@fleetkey/tpm2/structures.ts'
import { password, type ScriptSession } from '../tpm-script.ts'
import { bits, flush, nullHandle, owner, sealed, signing, storage, type Recorder, type Scenario } from './recorder.ts'

const bank = (...pcrs: readonly number[]): Uint8Array => marshalPcrSelection([{ hash: alg.sha256, pcrs }])
const assertion = (of: { nonce?: Uint8Array; cpHash?: Uint8Array; ref?: Uint8Array; expiration?: number } = {}): Uint8Array =>
  concat(sized(of.nonce ?? empty), sized(of.cpHash ?? empty), sized(of.ref ?? empty), u32((of.expiration ?? 0) >>> 0))
const start = (of: { nonce?: number; type?: number; symmetric?: Uint8Array; hash?: number; secret?: Uint8Array } = {}): Uint8Array =>
  concat(sized(new Uint8Array(of.nonce ?? 16)), sized(of.secret ?? empty), u8(of.type ?? 1), of.symmetric ?? u16(alg.null), u16(of.hash ?? alg.sha256))
const aes = (bitsOf: number, mode: number): Uint8Array => concat(u16(alg.aes), u16(bitsOf), u16(mode))

const sessions = async (on: Recorder): Promise<void> => {
  const begin = async (label: string, parameters: Uint8Array, handles: readonly number[] = [nullHandle, nullHandle]): Promise<void> => {
    const { handle, rc } = await on.step(label, { code: command.startAuthSession, handles, parameters, givesHandle: true })
    on.note(`${label}: handle`, rc === 0 ? handle.toString(16) : '')
    if (rc === 0) await on.flush(handle)
  }
  for (const type of [0, 1, 2, 3, 4]) await begin(`type ${type}`, start({ type }))
  for (const nonce of [0, 15, 16, 20, 32, 33, 65]) await begin(`nonce of ${nonce}`, start({ nonce }))
  for (const hash of [alg.sha1, alg.sha384, alg.sha512, alg.null, 0x99]) await begin(`hash ${hash}`, start({ hash }))
  for (const [label, symmetric] of [
    ['AES-128', aes(128, alg.cfb)],
    ['AES-256', aes(256, alg.cfb)],
    ['AES-192', aes(192, alg.cfb)],
    ['AES-CBC', aes(128, 0x42)],
    ['AES without mode', aes(128, alg.null)],
    ['AES, no such mode', aes(128, 0x99)],
    ['XOR', concat(u16(alg.xor), u16(alg.sha256))],
    ['XOR without hash', concat(u16(alg.xor), u16(alg.null))],
    ['no such cipher', u16(0x99)],
  ] as const)
    await begin(label, start({ symmetric }))
  await begin('salt without a key', start({ secret: new Uint8Array(20) }))
  const key = await on.primary(owner, storage)
  const signer = await on.primary(owner, signing)
  await begin('key without a salt', start(), [key.handle, nullHandle])
  await begin('salt that is none', start({ secret: new Uint8Array(68) }), [key.handle, nullHandle])
  await begin('signing key', start({ secret: new Uint8Array(68) }), [signer.handle, nullHandle])
  await begin('bound', start({ type: 0 }), [nullHandle, owner])
  await begin('bound to a PCR', start({ type: 0 }), [nullHandle, 4])
  await begin('bound to nothing', start({ type: 0 }), [nullHandle, 0x8000_0002])
  const open: number[] = []
  for (let at = 0; at < 4; at++) {
    const { handle, rc } = await on.step(`session ${at}`, {
      code: command.startAuthSession,
      handles: [nullHandle, nullHandle],
      parameters: start(),
      givesHandle: true,
    })
    if (rc === 0) open.push(handle)
  }
  await on.flush(...open, key.handle, signer.handle)
}

const digestOf = async (on: Recorder, label: string, session: number): Promise<void> =>
  void (await on.step({ label, see: (reader) => reader.sized() }, { code: command.policyGetDigest, handles: [session] }))

/** Every policy command on a real and on a trial session; digests are compared after each. */
const digests = async (on: Recorder): Promise<void> => {
  const name = concat(u16(alg.sha256), new Uint8Array(32).fill(5))
  const steps: readonly (readonly [string, number, Uint8Array])[] = [
    ['PCR', command.policyPcr, concat(sized(empty), bank(0, 7))],
    ['PCR with a digest', command.policyPcr, concat(sized(digest(alg.sha256, new Uint8Array(32))), bank(4))],
    ['PCR with a wrong digest', command.policyPcr, concat(sized(new Uint8Array(32)), bank(4))],
    ['PCR without PCRs', command.policyPcr, concat(sized(empty), u32(0))],
    ['PCR of another bank', command.policyPcr, concat(sized(empty), marshalPcrSelection([{ hash: alg.sha1, pcrs: [0] }]))],
    ['PCR of no bank', command.policyPcr, concat(sized(empty), u32(1), u16(0x99), u8(3), new Uint8Array(3))],
    ['PCR selection of four bytes', command.policyPcr, concat(sized(empty), u32(1), u16(alg.sha256), u8(4), new Uint8Array(4))],
    ['PCR selection of two bytes', command.policyPcr, concat(sized(empty), u32(1), u16(alg.sha256), u8(2), new Uint8Array(2))],
    ['command code', command.policyCommandCode, u32(command.unseal)],
    ['the same command code', command.policyCommandCode, u32(command.unseal)],
    ['another command code', command.policyCommandCode, u32(command.sign)],
    ['no command code', command.policyCommandCode, u32(0x0fff)],
    ['locality 0', command.policyLocality, u8(1)],
    ['locality 1 too', command.policyLocality, u8(2)],
    ['no locality', command.policyLocality, u8(0)],
    ['extended locality', command.policyLocality, u8(200)],
    ['NV written', command.policyNvWritten, u8(1)],
    ['NV not written', command.policyNvWritten, u8(0)],
    ['NV neither', command.policyNvWritten, u8(2)],
    ['value', command.policyAuthValue, empty],
    ['password', command.policyPassword, empty],
    ['parameter hash', command.policyCpHash, sized(new Uint8Array(32).fill(1))],
    ['the same parameter hash', command.policyCpHash, sized(new Uint8Array(32).fill(1))],
    ['another parameter hash', command.policyCpHash, sized(new Uint8Array(32).fill(2))],
    ['short parameter hash', command.policyCpHash, sized(new Uint8Array(20))],
    ['name hash after it', command.policyNameHash, sized(new Uint8Array(32))],
    ['duplication after it', command.policyDuplicationSelect, concat(sized(name), sized(name), u8(1))],
    ['OR of one', command.policyOr, concat(u32(1), sized(new Uint8Array(32)))],
    ['OR of nine', command.policyOr, concat(u32(9), ...Array.from({ length: 9 }, () => sized(new Uint8Array(32))))],
    ['OR of others', command.policyOr, concat(u32(2), sized(new Uint8Array(32)), sized(new Uint8Array(32).fill(1)))],
    ['OR of a digest too long', command.policyOr, concat(u32(2), sized(new Uint8Array(65)), sized(empty))],
    [
      'authorize without a ticket',
      command.policyAuthorize,
      concat(sized(new Uint8Array(32)), sized(empty), sized(name), u16(0x8022), u32(owner), sized(empty)),
    ],
    ['authorize by no name', command.policyAuthorize, concat(sized(new Uint8Array(32)), sized(empty), sized(empty), u16(0x8022), u32(owner), sized(empty))],
    [
      'authorize by a short name',
      command.policyAuthorize,
      concat(sized(new Uint8Array(32)), sized(empty), sized(name.subarray(0, 20)), u16(0x8022), u32(owner), sized(empty)),
    ],
    [
      'authorize with another ticket',
      command.policyAuthorize,
      concat(sized(new Uint8Array(32)), sized(empty), sized(name), u16(0x8024), u32(owner), sized(empty)),
    ],
    ['authorize with no ticket', command.policyAuthorize, concat(sized(new Uint8Array(32)), sized(empty), sized(name), u16(0x1234), u32(owner), sized(empty))],
    ['restart', command.policyRestart, empty],
    ['name hash', command.policyNameHash, sized(new Uint8Array(32).fill(3))],
    ['restart again', command.policyRestart, empty],
    ['duplication', command.policyDuplicationSelect, concat(sized(name), sized(name), u8(1))],
    ['duplication without the object', command.policyDuplicationSelect, concat(sized(name), sized(name), u8(0))],
  ]
  for (const type of ['policy', 'trial'] as const) {
    const { handle } = await on.subject.tpm.session(type)
    for (const [label, code, parameters] of steps) {
      await on.step(`${type}: ${label}`, { code, handles: [handle], parameters })
      await digestOf(on, `${type}: digest after ${label}`, handle)
    }
    await on.step(`${type}: OR of what is there`, { code: command.policyRestart, handles: [handle] })
    await on.step(`${type}: OR`, {
      code: command.policyOr,
      handles: [handle],
      parameters: concat(u32(2), sized(new Uint8Array(32)), sized(new Uint8Array(32).fill(9))),
    })
    await digestOf(on, `${type}: digest after OR`, handle)
    await on.flush(handle)
  }
  const { handle } = await on.subject.tpm.session('hmac')
  await on.step('policy command on an HMAC session', { code: command.policyPcr, handles: [handle], parameters: concat(sized(empty), bank(0)) })
  await on.flush(handle)
}

const secrets = async (on: Recorder): Promise<void> => {
  const session: ScriptSession = await on.subject.tpm.session('policy')
  const secret = async (label: string, parameters: Uint8Array, entity: number = known.endorsement, auth = password()): Promise<void> => {
    await on.step(
      { label, see: (reader) => ({ timeout: reader.sized().length, tag: reader.u16(), hierarchy: reader.u32(), ticket: reader.sized().length }) },
      { code: command.policySecret, handles: [entity, session.handle], auth: [auth], parameters },
    )
    await digestOf(on, `digest after ${label}`, session.handle)
  }
  await secret('endorsement', assertion())
  await secret('with a reference', assertion({ ref: new TextEncoder().encode('x') }))
  await secret('with this nonce', assertion({ nonce: session.nonceTpm }))
  await secret('with another nonce', assertion({ nonce: new Uint8Array(32) }))
  await secret('with a ticket', assertion({ expiration: -100 }))
  await secret('with an expiration', assertion({ expiration: 100 }))
  await secret('with a parameter hash', assertion({ cpHash: new Uint8Array(32).fill(1) }))
  await secret('with another parameter hash', assertion({ cpHash: new Uint8Array(32).fill(2) }))
  await secret('with a short parameter hash', assertion({ cpHash: new Uint8Array(20) }))
  await secret('with a wrong password', assertion(), owner, password(Uint8Array.of(1)))
  await secret('of the null hierarchy', assertion(), nullHandle)
  await secret('of a PCR', assertion(), 3)
  await on.flush(session.handle)
}

/** Policies at work: a sealed object and what opens it. */
const use = async (on: Recorder): Promise<void> => {
  const { tpm } = on.subject
  const trial = await tpm.session('trial')
  await tpm.must({ code: command.policyCommandCode, handles: [trial.handle], parameters: u32(command.unseal) })
  await tpm.must({ code: command.policyAuthValue, handles: [trial.handle] })
  const policy = new Reader((await tpm.must({ code: command.policyGetDigest, handles: [trial.handle] })).parameters).sized().slice()
  await on.step('trial session at work', { code: command.unseal, handles: [0x8000_0000], auth: [{ session: trial }] })
  await on.flush(trial.handle)
  const parent = await on.primary(owner, storage)
  const auth = new TextEncoder().encode('value')
  const object = await on.child(
    parent,
    { ...sealed, attributes: sealed.attributes & ~bits.userWithAuth, authPolicy: policy },
    { data: new Uint8Array(20).fill(6), auth },
  )
  const session = await tpm.session('policy', { salter: parent })
  const unseal = async (label: string, use2: { auth?: Uint8Array; attributes?: number; encryptAuth?: Uint8Array }): Promise<void> =>
    void (await on.step({ label, see: (reader) => reader.sized() }, { code: command.unseal, handles: [object], auth: [{ session, ...use2 }] }))
  await unseal('nothing shown', { auth })
  await tpm.must({ code: command.policyCommandCode, handles: [session.handle], parameters: u32(command.unseal) })
  await unseal('half shown', { auth })
  await tpm.must({ code: command.policyAuthValue, handles: [session.handle] })
  await unseal('wrong value', { auth: empty })
  await unseal('shown', { auth, attributes: flag.continue | flag.encrypt })
  await unseal('shown once', { auth })
  await on.step('password', { code: command.unseal, handles: [object], auth: [password(auth)] })
  await tpm.must({ code: command.policyCommandCode, handles: [session.handle], parameters: u32(command.unseal) })
  await tpm.must({ code: command.policyPassword, handles: [session.handle] })
  const asPassword = concat(u32(session.handle), sized(empty), u8(flag.continue), sized(auth))
  await on.step({ label: 'as a password', see: (reader) => reader.sized() }, { code: command.unseal, handles: [object], auth: [{ raw: asPassword }] })
  await on.step('another command', { code: command.objectChangeAuth, handles: [object, parent], auth: [{ session }], parameters: sized(empty) })
  await on.flush(session.handle, object.handle)
  const signer = await on.child(parent, { ...signing, attributes: signing.attributes | bits.adminWithPolicy })
  await on.step('admin role by password', {
    code: command.certify,
    handles: [signer, signer],
    auth: [password(), password()],
    parameters: concat(sized(empty), u16(alg.null)),
  })
  const hmac = await tpm.session('hmac', { salter: parent, bound: { handle: owner, auth: empty } })
  await on.step('bound session', { code: command.nvReadPublic, handles: [0x0100_0000], auth: [{ session: hmac, attributes: flag.continue | flag.encrypt }] })
  await on.step('encrypting session', { code: command.getRandom, auth: [{ session: hmac, attributes: flag.continue | flag.encrypt }], parameters: u16(20) })
  await on.step('decrypting where there is nothing to', {
    code: command.getRandom,
    auth: [{ session: hmac, attributes: flag.continue | flag.decrypt }],
    parameters: u16(0),
  })
  await on.step('session that is good for nothing', { code: command.getRandom, auth: [{ session: hmac }], parameters: u16(20) })
  await on.step('audit', { code: command.getRandom, auth: [{ session: hmac, attributes: flag.continue | flag.audit }], parameters: u16(20) })
  await on.step('the same session twice', {
    code: command.getRandom,
    auth: [
      { session: hmac, attributes: flag.continue | flag.audit },
      { session: hmac, attributes: flag.continue | flag.encrypt },
    ],
    parameters: u16(20),
    unchecked: true,
  })
  await on.step('authorised by a session', { code: command.dictionaryAttackLockReset, handles: [known.lockout], auth: [{ session: hmac }] })
  await on.step('session that ends', { code: command.getRandom, auth: [{ session: hmac, attributes: flag.encrypt }], parameters: u16(20) })
  await on.step('ended', flush(hmac.handle))
  on.note('name', nameOf(object.public).length)
  await on.flush(signer.handle, parent.handle)
}

export const policy: Scenario = async (on) => {
  await sessions(on)
  await digests(on)
  await secrets(on)
  await use(on)
}
