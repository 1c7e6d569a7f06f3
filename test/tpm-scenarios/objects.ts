import { concat, empty, Reader, sized, u16, u32, u8 } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, curve, handle as known } from '@fleetkey/tpm2/constants.ts'
import { digest } from '@fleetkey/tpm2/kdf.ts'
import { marshalPcrSelection, marshalPublic, parsePublic, type Public } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { password } from '../tpm-script.ts'
import {
  aes128,
  agreement,
  attestation,
  bits,
  create,
  createPrimary,
  creation,
  ecc,
  ecdsa,
  flush,
  hmacScheme,
  keyedHash,
  load,
  macKey,
  nullHandle,
  own,
  owner,
  sealed,
  signing,
  storage,
  type Recorder,
  type Scenario,
} from './recorder.ts'

/** Public area without the key itself, and what surrounds it in the answer of a creation; of the creation data what does not name a parent. */
const seePublic = (reader: Reader): unknown => {
  const area = parsePublic(reader.sized())
  const { type, attributes, nameAlg } = area
  const [data, hash] = [reader.sized(), reader.sized()]
  const [tag, hierarchy, ticket] = [reader.u16(), reader.u32(), reader.sized()]
  return {
    type,
    attributes,
    nameAlg,
    data: Buffer.from(data.subarray(0, 44)).toString('hex'),
    size: data.length,
    hash: hash.length,
    tag,
    hierarchy,
    ticket: ticket.length,
  }
}

const templatesToTry: readonly (readonly [string, Public, { data?: Uint8Array; auth?: Uint8Array }?])[] = [
  ['EK L-2', templates.ekEcc],
  ['SRK', templates.srk],
  ['AK', templates.ak],
  ['signing', signing],
  ['key agreement', agreement],
  ['P-384', ecc(own | bits.sign, { scheme: { scheme: alg.ecdsa, hash: alg.sha384 }, curve: curve.p384 })],
  ['name by SHA-384', ecc(own | bits.sign, { scheme: ecdsa, nameAlg: alg.sha384 })],
  ['name by SHA-1', ecc(own | bits.sign, { scheme: ecdsa, nameAlg: alg.sha1 })],
  ['AES-256 storage', ecc(own | bits.restricted | bits.decrypt, { symmetric: { ...aes128, keyBits: 256 } })],
  ['sealed', sealed, { data: new Uint8Array(32).fill(7) }],
  ['sealed, 128 bytes', sealed, { data: new Uint8Array(128) }],
  ['sealed, 129 bytes', sealed, { data: new Uint8Array(129) }],
  ['sealed nothing', sealed],
  ['HMAC key given', macKey, { data: new Uint8Array(32) }],
  ['HMAC key made', keyedHash(own | bits.sign, { scheme: hmacScheme })],
  ['HMAC key too long', macKey, { data: new Uint8Array(65) }],
  ['HMAC key without scheme', { ...macKey, scheme: null }, { data: new Uint8Array(32) }],
  ['authorisation value too long', storage, { auth: new Uint8Array(33).fill(1) }],
  ['authorisation value of zeros', storage, { auth: new Uint8Array(64) }],
  ['fixedTPM without fixedParent', ecc((own | bits.sign) & ~bits.fixedParent, { scheme: ecdsa })],
  ['restricted without a use', ecc(own | bits.restricted)],
  ['restricted with both uses', ecc(own | bits.restricted | bits.sign | bits.decrypt, { scheme: ecdsa })],
  ['both uses', ecc(own | bits.sign | bits.decrypt)],
  ['both uses with a scheme', ecc(own | bits.sign | bits.decrypt, { scheme: ecdsa })],
  ['no use', ecc(own)],
  ['restricted signing without a scheme', ecc(own | bits.restricted | bits.sign)],
  ['storage without a cipher', ecc(own | bits.restricted | bits.decrypt)],
  ['cipher in a signing key', ecc(own | bits.sign, { scheme: ecdsa, symmetric: aes128 })],
  ['ECDH in a signing key', ecc(own | bits.sign, { scheme: { scheme: alg.ecdh, hash: alg.sha256 } })],
  ['ECDSA in a storage key', ecc(own | bits.restricted | bits.decrypt, { symmetric: aes128, scheme: ecdsa })],
  ['not made by the TPM', ecc((own | bits.sign) & ~bits.sensitiveDataOrigin, { scheme: ecdsa })],
  ['fixed and encrypted duplication', ecc(own | bits.sign | bits.encryptedDuplication, { scheme: ecdsa })],
  ['policy of a wrong size', ecc(own | bits.sign, { scheme: ecdsa, authPolicy: new Uint8Array(20) })],
  ['reserved attribute', ecc(own | bits.sign | (1 << 3), { scheme: ecdsa })],
  ['hash that is none', { ...signing, nameAlg: 0x0099 }],
  ['mode that is none', ecc(own | bits.restricted | bits.decrypt, { symmetric: { ...aes128, mode: 0x0099 } })],
  ['key of 100 bits', ecc(own | bits.restricted | bits.decrypt, { symmetric: { ...aes128, keyBits: 100 } })],
  ['cipher that is none', ecc(own | bits.restricted | bits.decrypt, { symmetric: { ...aes128, algorithm: 0x0099 } })],
  ['scheme that is none', ecc(own | bits.sign, { scheme: { scheme: 0x0099, hash: alg.sha256 } })],
  ['curve that is none', { ...signing, curve: 0x0099 }],
]

const external = async (on: Recorder): Promise<void> => {
  const key = await on.primary(owner, signing)
  await on.flush(key.handle)
  const given = parsePublic(key.public)
  if (given.type !== alg.ecc) throw new Error('not an ECC key')
  const loadExternal = async (label: string, area: Public | Uint8Array, of: { hierarchy?: number; sensitive?: Uint8Array } = {}): Promise<void> => {
    const bytes = area instanceof Uint8Array ? area : marshalPublic(area)
    const { handle, rc } = await on.step(label, {
      code: command.loadExternal,
      parameters: concat(sized(of.sensitive ?? empty), sized(bytes), u32(of.hierarchy ?? owner)),
      givesHandle: true,
    })
    if (rc !== 0) return
    await on.step(`${label}: password`, {
      code: command.sign,
      handles: [handle],
      auth: [password()],
      parameters: concat(sized(new Uint8Array(32)), u16(alg.null), u16(0x8024), u32(nullHandle), u16(0)),
    })
    await on.step(`${label}: persistent`, { code: command.evictControl, handles: [owner, handle], auth: [password()], parameters: u32(0x8100_0009) })
    await on.flush(handle)
  }
  const free = given.attributes & ~(bits.fixedTPM | bits.fixedParent)
  await loadExternal('public', given)
  for (const hierarchy of [known.endorsement, known.platform, nullHandle, known.lockout, 0])
    await loadExternal(`public in ${hierarchy.toString(16)}`, given, { hierarchy })
  await loadExternal('point off the curve', { ...given, y: given.y.map((byte, at) => (at === 31 ? byte ^ 1 : byte)) })
  await loadExternal('short coordinate', { ...given, x: given.x.subarray(1) })
  await loadExternal('trailing byte', concat(marshalPublic(given), u8(0)))
  await loadExternal('empty', empty)
  const secret = new Uint8Array(32).fill(9)
  const seed = new Uint8Array(32).fill(3)
  const area = keyedHash(bits.userWithAuth | bits.noDA | bits.sign, { scheme: hmacScheme, unique: digest(alg.sha256, seed, secret) })
  const sensitive = concat(u16(alg.keyedhash), sized(empty), sized(seed), sized(secret))
  await loadExternal('HMAC key', area, { hierarchy: nullHandle, sensitive })
  await loadExternal('HMAC key in a hierarchy', area, { sensitive })
  await loadExternal('HMAC key of another unique', { ...area, unique: new Uint8Array(32) }, { hierarchy: nullHandle, sensitive })
  await loadExternal('HMAC key with a short seed', area, {
    hierarchy: nullHandle,
    sensitive: concat(u16(alg.keyedhash), sized(empty), sized(seed.subarray(1)), sized(secret)),
  })
  await loadExternal('sensitive of another type', area, { hierarchy: nullHandle, sensitive: concat(u16(alg.ecc), sized(empty), sized(seed), sized(secret)) })
  await loadExternal('sensitive of no type', area, { hierarchy: nullHandle, sensitive: concat(u16(0x99), sized(empty), sized(seed), sized(secret)) })
  await loadExternal('fixed', { ...area, attributes: area.attributes | bits.fixedTPM | bits.fixedParent }, { hierarchy: nullHandle, sensitive })
  await loadExternal(
    'private key of another point',
    { ...given, attributes: free },
    { hierarchy: nullHandle, sensitive: concat(u16(alg.ecc), sized(empty), sized(empty), sized(secret)) },
  )
}

const loading = async (on: Recorder): Promise<void> => {
  const parent = await on.primary(owner, storage)
  const made = await on.step({ label: 'create', see: (reader) => (reader.sized(), seePublic(reader)) }, create(parent.handle, signing))
  const reader = new Reader(made.parameters)
  const [privateBytes, publicBytes] = [reader.sized().slice(), reader.sized().slice()]
  const changed = (bytes: Uint8Array, at: number): Uint8Array => bytes.map((byte, place) => (place === at ? byte ^ 1 : byte))
  await on.step('load', load(parent.handle, privateBytes, publicBytes))
  await on.step('flush it', flush(0x8000_0001))
  await on.step('no private area', load(parent.handle, empty, publicBytes))
  await on.step('altered private area', load(parent.handle, changed(privateBytes, 60), publicBytes))
  await on.step('altered integrity', load(parent.handle, changed(privateBytes, 5), publicBytes))
  await on.step('altered public area', load(parent.handle, privateBytes, changed(publicBytes, 20)))
  await on.step('altered attributes', load(parent.handle, privateBytes, changed(publicBytes, 5)))
  await on.step('short private area', load(parent.handle, privateBytes.subarray(0, 40), publicBytes))
  await on.step('private area of 3 bytes', load(parent.handle, privateBytes.subarray(0, 3), publicBytes))
  const leaf = await on.child(parent, signing)
  await on.step('child of a signing key', create(leaf.handle, signing))
  await on.step('load below a signing key', load(leaf.handle, privateBytes, publicBytes))
  await on.flush(leaf.handle)
  const other = await on.primary(known.platform, storage)
  await on.step('below another parent', load(other.handle, privateBytes, publicBytes))
  await on.flush(other.handle)
  const free = ecc((own | bits.restricted | bits.decrypt) & ~(bits.fixedTPM | bits.fixedParent), { symmetric: aes128 })
  const movable = await on.child(parent, free)
  await on.step('fixed below what is not', create(movable.handle, signing))
  await on.step('not fixed below what is not', create(movable.handle, { ...signing, attributes: signing.attributes & ~(bits.fixedTPM | bits.fixedParent) }))
  await on.flush(movable.handle)
  await on.step('another hash in a storage child', create(parent.handle, { ...storage, nameAlg: alg.sha384 }))
  await on.step('another cipher in a storage child', create(parent.handle, { ...storage, symmetric: { ...aes128, keyBits: 256 } }))
  await on.step('data in a key', create(parent.handle, signing, { data: new Uint8Array(4) }))
  await on.step('data and origin', create(parent.handle, { ...sealed, attributes: sealed.attributes | bits.sensitiveDataOrigin }, { data: new Uint8Array(4) }))
  await on.step('value too long', create(parent.handle, signing, { auth: new Uint8Array(33).fill(1) }))
  const pcrs = marshalPcrSelection([{ hash: alg.sha256, pcrs: [0, 7] }])
  const outside = new TextEncoder().encode('order 7')
  await on.step(
    { label: 'creation data', see: (all) => (all.sized(), seePublic(all)) },
    { code: command.create, handles: [parent.handle], auth: [password()], parameters: creation(attestation, { outside, pcrs }) },
  )
  await on.step('outside data too long', {
    code: command.create,
    handles: [parent.handle],
    auth: [password()],
    parameters: creation(attestation, { outside: new Uint8Array(67) }),
  })
  await on.step('five banks', { code: command.create, handles: [parent.handle], auth: [password()], parameters: creation(attestation, { pcrs: u32(5) }) })
  await on.flush(parent.handle)
}

const values = async (on: Recorder): Promise<void> => {
  const parent = await on.primary(owner, storage)
  const word = new TextEncoder().encode('open')
  const object = await on.child(parent, sealed, { data: word, auth: word })
  const unseal = (auth: Uint8Array) => ({ code: command.unseal, handles: [object.handle], auth: [password(auth)] })
  await on.step({ label: 'unseal', see: (reader) => reader.sized() }, unseal(word))
  await on.step('trailing zeros', unseal(concat(word, new Uint8Array(3))))
  await on.step('wrong value', unseal(empty))
  await on.step('unseal a key', { code: command.unseal, handles: [parent.handle], auth: [password()] })
  const change = (handle: number, above: number, value: Uint8Array, auth: Uint8Array) => ({
    code: command.objectChangeAuth,
    handles: [handle, above],
    auth: [password(auth)],
    parameters: sized(value),
  })
  const changed = await on.step('change the value', change(object.handle, parent.handle, Uint8Array.of(1, 2), word))
  await on.step('change to a long value', change(object.handle, parent.handle, new Uint8Array(33).fill(2), word))
  await on.step('change below another parent', change(object.handle, object.handle, empty, word))
  const { handle } = await on.step('load it anew', load(parent.handle, new Reader(changed.parameters).sized(), object.public))
  await on.step('new value', { code: command.unseal, handles: [handle], auth: [password(Uint8Array.of(1, 2))] })
  await on.step('old value', { code: command.unseal, handles: [handle], auth: [password(word)] })
  await on.flush(handle, object.handle, parent.handle)
}

/** Templates, loading, values: everything about objects but duplication. */
export const objects: Scenario = async (on) => {
  for (const [label, template, of] of templatesToTry) {
    const { handle, rc } = await on.step({ label, see: seePublic }, createPrimary(owner, template, of))
    if (rc === 0) await on.flush(handle)
  }
  const ek = await on.step('EK', createPrimary(known.endorsement, templates.ekEcc))
  await on.step({ label: 'read public', see: (reader) => parsePublic(reader.sized()).attributes }, { code: command.readPublic, handles: [ek.handle] })
  await on.flush(ek.handle)
  await external(on)
  await loading(on)
  await values(on)
}
