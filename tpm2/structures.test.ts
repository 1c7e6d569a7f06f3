import { createHash, createHmac, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { marshalAttest, marshalSignature, parseAttest, parseSignature, rawOf, verifyAttest, type Attest } from './attest.ts'
import { concat, parseAll, TpmFormatError } from './bytes.ts'
import { alg, attribute, curve, handle } from './constants.ts'
import { makeCredential } from './credential.ts'
import { responseName } from './errors.ts'
import { eventType, marshalEventLog, parseEventLog, pcrDigest, replay, type Event } from './event-log.ts'
import { wrapForImport } from './import.ts'
import { kdfA, kdfE } from './kdf.ts'
import { nameOf, qualifiedName } from './names.ts'
import { ekPolicy } from './policies.ts'
import { marshalPcrSelection, marshalPublic, parsePublic, readPcrSelection, spkiOf, type EccPublic, type Public } from './structures.ts'
import { mismatch, templates, type KeyRole } from './templates.ts'

const long = process.env['FLEETKEY_LONG'] === '1'
const runs = long ? 20_000 : 300
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')
const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text.replaceAll(' ', ''), 'hex'))
const sha256 = (...parts: readonly Uint8Array[]): Uint8Array => new Uint8Array(createHash('sha256').update(Buffer.concat(parts)).digest())
const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

const some = (length: number) => fc.uint8Array({ minLength: length, maxLength: length })
const hash = fc.constantFrom(alg.sha1, alg.sha256, alg.sha384, alg.sha512)
const selection = fc
  .uniqueArray(hash, { minLength: 1, maxLength: 3 })
  .chain((hashes) =>
    fc.tuple(
      ...hashes.map((of) =>
        fc.uniqueArray(fc.integer({ min: 0, max: 23 }), { maxLength: 24 }).map((pcrs) => ({ hash: of, pcrs: pcrs.toSorted((a, b) => a - b) })),
      ),
    ),
  )
const clockInfo = fc.record({
  clock: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
  resetCount: fc.nat(0xffff_ffff),
  restartCount: fc.nat(0xffff_ffff),
  safe: fc.boolean(),
})
const common = {
  qualifiedSigner: some(34),
  extraData: fc.uint8Array({ maxLength: 64 }),
  clockInfo,
  firmwareVersion: fc.bigInt({ min: 0n, max: 2n ** 64n - 1n }),
}
const attest: fc.Arbitrary<Attest> = fc.oneof(
  fc.record({ type: fc.constant('quote' as const), ...common, selection, pcrDigest: some(32) }),
  fc.record({ type: fc.constant('certify' as const), ...common, name: some(34), qualifiedName: some(34) }),
)
const attributes = fc.nat(0xffff_ffff)
const ecc: fc.Arbitrary<Public> = fc.record({
  type: fc.constant(alg.ecc),
  nameAlg: fc.constant(alg.sha256),
  attributes,
  authPolicy: fc.constantFrom(new Uint8Array(0), ekPolicy),
  symmetric: fc.constantFrom(null, templates.srk.type === alg.ecc ? templates.srk.symmetric : null),
  scheme: fc.constantFrom(null, { scheme: alg.ecdsa, hash: alg.sha256 }),
  curve: fc.constant(curve.p256),
  x: some(32),
  y: some(32),
})

const properties: readonly [string, fc.Arbitrary<Uint8Array>, (bytes: Uint8Array) => Uint8Array][] = [
  ['TPMS_ATTEST', attest.map(marshalAttest), (of) => marshalAttest(parseAttest(of))],
  ['TPMT_PUBLIC', ecc.map(marshalPublic), (of) => marshalPublic(parsePublic(of))],
  ['TPML_PCR_SELECTION', selection.map(marshalPcrSelection), (of) => marshalPcrSelection(parseAll(of, readPcrSelection))],
  [
    'TPMT_SIGNATURE',
    fc.record({ r: some(32), s: some(32) }).map(({ r, s }) => concat(bytes('0018 000b 0020'), r, bytes('0020'), s)),
    (of) => marshalSignature(parseSignature(of)),
  ],
]

describe.each(properties)('%s', (_, made, again) => {
  test('parse and marshal are inverse', () =>
    fc.assert(
      fc.property(made, (of) => {
        expect(hex(again(of))).toBe(hex(of))
      }),
      { numRuns: runs },
    ))

  test('bytes after it and bytes that lack are refused', () =>
    fc.assert(
      fc.property(made, fc.nat(200), (of, at) => {
        expect(() => again(concat(of, new Uint8Array(1)))).toThrow(TpmFormatError)
        expect(() => again(of.subarray(0, at % of.length))).toThrow(TpmFormatError)
      }),
      { numRuns: runs },
    ))

  test('whatever is changed: a TpmFormatError, or a value that marshals to it', () =>
    fc.assert(
      fc.property(made, fc.array(fc.tuple(fc.nat(400), fc.nat(255)), { minLength: 1, maxLength: 4 }), (of, changes) => {
        const changed = Uint8Array.from(of)
        for (const [at, byte] of changes) changed[at % changed.length] = byte
        try {
          expect(hex(again(changed))).toBe(hex(changed))
        } catch (thrown) {
          if (!(thrown instanceof TpmFormatError)) throw thrown
        }
      }),
      { numRuns: runs * 3 },
    ))
})

describe('known values', () => {
  test('PolicyA of the TCG EK profile', () => expect(hex(ekPolicy)).toBe('837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa'))

  test('EK template L-2', () =>
    expect(hex(marshalPublic(templates.ekEcc))).toBe(
      hex(
        bytes(
          `0023 000b 000300b2 0020 837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa 0006 0080 0043 0010 0003 0010 0020 ${'00'.repeat(32)} 0020 ${'00'.repeat(32)}`,
        ),
      ),
    ))

  test('EK template L-1', () =>
    expect(hex(marshalPublic(templates.ekRsa))).toBe(
      hex(
        bytes(
          `0001 000b 000300b2 0020 837197674484b3f81a90cc8d46a5d724fd52d76e06520b64f2a1da1b331469aa 0006 0080 0043 0010 0800 00000000 0100 ${'00'.repeat(256)}`,
        ),
      ),
    ))

  test('TCG SRK template', () =>
    expect(hex(marshalPublic(templates.srk))).toBe(
      hex(bytes(`0023 000b 00030472 0000 0006 0080 0043 0010 0003 0010 0020 ${'00'.repeat(32)} 0020 ${'00'.repeat(32)}`)),
    ))

  test('Name and qualified name', () => {
    const area = marshalPublic(templates.srk)
    expect(hex(nameOf(area))).toBe(`000b${hex(sha256(area))}`)
    const name = nameOf(area)
    expect(hex(qualifiedName(handle.owner, name))).toBe(`000b${hex(sha256(bytes('40000001'), name))}`)
    expect(hex(qualifiedName(name, name))).toBe(`000b${hex(sha256(name, name))}`)
  })

  test('KDFa and KDFe, written out (Part 1 §11.4.10)', () => {
    const [key, u, v] = [random(32), random(34), random(7)]
    const block = (counter: number, bits: number): Buffer =>
      createHmac('sha256', key)
        .update(Buffer.concat([bytes(`0000000${counter}`), Buffer.from('STORAGE\0'), u, v, bytes(bits.toString(16).padStart(8, '0'))]))
        .digest()
    expect(hex(kdfA(alg.sha256, key, 'STORAGE', u, v, 128))).toBe(block(1, 128).subarray(0, 16).toString('hex'))
    expect(hex(kdfA(alg.sha256, key, 'STORAGE', u, v, 384))).toBe(
      Buffer.concat([block(1, 384), block(2, 384)])
        .subarray(0, 48)
        .toString('hex'),
    )
    expect(hex(kdfE(alg.sha256, key, 'IDENTITY', u, v, 256))).toBe(hex(sha256(bytes('00000001'), key, Buffer.from('IDENTITY\0'), u, v)))
  })

  test.each([
    [0x922, 'RETRY'],
    [0x98e, 'AUTH_FAIL of session 1'],
    [0x1c4, 'VALUE of parameter 1'],
    [0x18b, 'HANDLE of handle 1'],
    [0x101, 'FAILURE'],
    [0x121, 'EXCLUSIVE'],
  ])('response code 0x%s is %s', (code, name) => expect(responseName(code)).toContain(name.split(' ')[0]))
})

describe('templates', () => {
  const point = (): { x: Uint8Array; y: Uint8Array } => {
    const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const { x = '', y = '' } = publicKey.export({ format: 'jwk' })
    return { x: new Uint8Array(Buffer.from(x, 'base64url')), y: new Uint8Array(Buffer.from(y, 'base64url')) }
  }
  const keyOf = (role: KeyRole): EccPublic => ({ ...(role === 'ek' ? templates.ekEcc : templates[role]), ...point() }) as EccPublic
  const roles: readonly KeyRole[] = ['ek', 'srk', 'ak', 'ldevid', 'recipient']

  test.each(roles)('a key of role %s is that and no other', (role) => {
    const key = marshalPublic(keyOf(role))
    expect(mismatch(key, role)).toBeUndefined()
    for (const other of roles) if (other !== role) expect(mismatch(key, other), other).toBeDefined()
  })

  test.each(roles)('every attribute of role %s counts', (role) => {
    const key = keyOf(role)
    for (const bit of Object.values(attribute))
      expect(mismatch(marshalPublic({ ...key, attributes: key.attributes ^ bit }), role), bit.toString(16)).toBe('attributes')
  })

  test.each(roles)('every field of role %s counts', (role) => {
    const key = keyOf(role)
    const changed: readonly [string, Partial<EccPublic>][] = [
      ['policy', { authPolicy: key.authPolicy.length === 0 ? ekPolicy : new Uint8Array(0) }],
      ['scheme', { scheme: key.scheme === null ? { scheme: alg.ecdsa, hash: alg.sha256 } : null }],
      ['symmetric', { symmetric: key.symmetric === null ? (templates.srk as EccPublic).symmetric : null }],
      ['name-algorithm', { nameAlg: alg.sha384 }],
      ['curve', { curve: curve.p384 }],
    ]
    for (const [field, change] of changed) expect(mismatch(marshalPublic({ ...key, ...change }), role), field).toBeDefined()
  })

  test('a point that is not on its curve is no key', () =>
    expect(() => spkiOf(marshalPublic({ ...keyOf('ak'), x: new Uint8Array(32).fill(7) }))).toThrow(TpmFormatError))

  test('nothing is wrapped to a key that is not on its curve', () => {
    const ek = marshalPublic({ ...keyOf('ek'), y: new Uint8Array(32).fill(9) })
    expect(() => makeCredential({ ek, name: new Uint8Array(34), secret: { bytes: () => new Uint8Array(32) }, random })).toThrow(TpmFormatError)
    expect(() => wrapForImport({ parent: ek, key: new Uint8Array(32), authPolicy: new Uint8Array(32), random })).toThrow(TpmFormatError)
  })
})

describe('signatures over attestations', () => {
  test('only the exact bytes under the exact key', () => {
    const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const jwk = publicKey.export({ format: 'jwk' })
    const ak = marshalPublic({
      ...(templates.ak as EccPublic),
      x: new Uint8Array(Buffer.from(jwk.x ?? '', 'base64url')),
      y: new Uint8Array(Buffer.from(jwk.y ?? '', 'base64url')),
    })
    const statement = random(100)
    const raw = new Uint8Array(sign('sha256', statement, { key: privateKey, dsaEncoding: 'ieee-p1363' }))
    const signature = concat(bytes('0018 000b 0020'), raw.subarray(0, 32), bytes('0020'), raw.subarray(32))
    expect(hex(rawOf(parseSignature(signature)))).toBe(hex(raw))
    expect(verifyAttest(statement, signature, ak)).toBe(true)
    for (let at = 0; at < statement.length; at++)
      expect(
        verifyAttest(
          statement.map((byte, index) => (index === at ? byte ^ 1 : byte)),
          signature,
          ak,
        ),
      ).toBe(false)
    for (let at = 6; at < signature.length; at++) {
      if (at === 38 || at === 39) continue
      expect(
        verifyAttest(
          statement,
          signature.map((byte, index) => (index === at ? byte ^ 1 : byte)),
          ak,
        ),
      ).toBe(false)
    }
  })
})

describe('event log', () => {
  const limits = { maxEvents: 100, maxBytes: 1 << 16 }
  const event = (pcr: number, text: string, type: number = eventType.postCode): Event => ({
    pcr,
    type,
    digests: new Map([[alg.sha256, sha256(Buffer.from(text))]]),
    data: new Uint8Array(Buffer.from(text)),
  })
  const log = [event(0, 'bootloader'), event(4, 'kernel'), event(0, 'more'), event(11, 'agent')]

  test('parse and marshal are inverse', () => expect(hex(marshalEventLog(parseEventLog(marshalEventLog(log), limits)))).toBe(hex(marshalEventLog(log))))

  test('replay extends in order', () => {
    const zero = new Uint8Array(32)
    const values = replay(parseEventLog(marshalEventLog(log), limits))
    expect(hex(values.get(0) ?? zero)).toBe(hex(sha256(sha256(zero, sha256(Buffer.from('bootloader'))), sha256(Buffer.from('more')))))
    expect(hex(pcrDigest(values, [4, 0, 7]))).toBe(hex(sha256(values.get(0) ?? zero, values.get(4) ?? zero, zero)))
  })

  test('EV_NO_ACTION extends nothing, but says the startup locality', () => {
    const startup = { ...event(0, '', eventType.noAction), data: concat(new Uint8Array(Buffer.from('StartupLocality\0')), Uint8Array.of(3)) }
    const values = replay([startup, event(0, 'bootloader')])
    expect(hex(values.get(0) ?? new Uint8Array())).toBe(hex(sha256(concat(new Uint8Array(31), Uint8Array.of(3)), sha256(Buffer.from('bootloader')))))
  })

  test('every cut and every bound is a TpmFormatError', () => {
    const whole = marshalEventLog(log)
    // A cut between two events is a shorter log; nothing else is one.
    const between = new Set(log.map((_, count) => marshalEventLog(log.slice(0, count)).length))
    for (let length = 0; length < whole.length; length++)
      if (!between.has(length)) expect(() => parseEventLog(whole.subarray(0, length), limits), String(length)).toThrow(TpmFormatError)
    expect(() => parseEventLog(whole, { ...limits, maxEvents: 3 })).toThrow(TpmFormatError)
    expect(() => parseEventLog(whole, { ...limits, maxBytes: whole.length - 1 })).toThrow(TpmFormatError)
  })

  test('any change: a TpmFormatError or another log', () =>
    fc.assert(
      fc.property(fc.nat(2_000), fc.nat(255), (at, byte) => {
        const changed = Uint8Array.from(marshalEventLog(log))
        changed[at % changed.length] = byte
        try {
          replay(parseEventLog(changed, limits))
        } catch (thrown) {
          if (!(thrown instanceof TpmFormatError)) throw thrown
        }
      }),
      { numRuns: runs * 3 },
    ))
})
