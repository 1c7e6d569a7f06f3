import { generateKeyPairSync, randomBytes, sign, verify } from 'node:crypto'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { encode } from './cbor.ts'
import { DeviceId, TenantId } from './ids.ts'
import type { Envelope } from './messages.ts'
import { Problem } from './problem.ts'
import { derSignature, keyId, rawSignature, readMessage, signMessage, verifyMessage, verifySignature } from './signed.ts'

const pair = () => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  return {
    spki,
    publicKey,
    privateKey,
    signer: { kid: keyId(spki), sign: async (tbs: Uint8Array) => sign('sha256', tbs, { key: privateKey, dsaEncoding: 'ieee-p1363' }) },
  }
}
const one = pair()
const other = pair()
const envelope: Envelope = {
  v: 1,
  tenant: TenantId.parse('plant'),
  device: DeviceId.parse('gw-1'),
  from: 'server',
  id: new Uint8Array(16),
  seq: 1,
  body: { type: 'welcome', session: new Uint8Array(16), time: 1, reportEvery: 300 },
}
const max = 64 << 10
const codeOf = (work: () => unknown): string => {
  try {
    work()
  } catch (thrown) {
    if (thrown instanceof Problem) return thrown.code
    throw thrown
  }
  return 'none'
}

test('what was signed is read and verified', async () => {
  const message = readMessage(await signMessage(envelope, one.signer), { max })
  expect(message.envelope.body).toMatchObject({ type: 'welcome' })
  verifyMessage(message, one.spki)
  expect(codeOf(() => verifyMessage(message, other.spki))).toBe('unauthenticated')
})

test('every changed bit is refused, with a code', async () => {
  const bytes = await signMessage(envelope, one.signer)
  for (let bit = 0; bit < bytes.length * 8; bit += process.env['FLEETKEY_LONG'] === '1' ? 1 : 3) {
    const changed = Uint8Array.from(bytes)
    changed[bit >> 3] = (changed[bit >> 3] ?? 0) ^ (1 << (bit & 7))
    expect(
      codeOf(() => verifyMessage(readMessage(changed, { max }), one.spki)),
      `bit ${bit}`,
    ).toMatch(/^(malformed|unsupported|unauthenticated)$/)
  }
})

test('every message that ends early is refused', async () => {
  const bytes = await signMessage(envelope, one.signer)
  for (let length = 0; length < bytes.length; length++) expect(codeOf(() => readMessage(bytes.subarray(0, length), { max }))).toMatch(/malformed|unsupported/)
  expect(codeOf(() => readMessage(Buffer.concat([bytes, Buffer.from([0])]), { max }))).toBe('malformed')
})

test('any bytes: a code, never another error', () =>
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 200 }), (bytes) => {
      expect(codeOf(() => readMessage(Buffer.concat([Buffer.from([0xd2]), bytes]), { max }))).toMatch(/malformed|unsupported/)
    }),
    { numRuns: 500 },
  ))

describe('refused', () => {
  const signed = async (of: unknown): Promise<Uint8Array> => await signMessage(of as Envelope, one.signer)
  test.each([
    ['another version', { ...envelope, v: 2 }, 'unsupported'],
    ['an unknown type', { ...envelope, body: { type: 'hallo' } }, 'unsupported'],
    ['an unknown field of the body', { ...envelope, body: { ...envelope.body, more: 1 } }, 'malformed'],
    ['an unknown field of the envelope', { ...envelope, more: 1 }, 'malformed'],
    ['a missing field', { ...envelope, body: { type: 'welcome', time: 1, reportEvery: 300 } }, 'malformed'],
    ['a session of 15 bytes', { ...envelope, body: { ...envelope.body, session: new Uint8Array(15) } }, 'malformed'],
    ['a device with a dot', { ...envelope, device: 'gw.1' }, 'malformed'],
    ['a sequence that is text', { ...envelope, seq: '1' }, 'malformed'],
  ])('%s', async (_, of, code) => {
    const bytes = await signed(of)
    expect(codeOf(() => readMessage(bytes, { max }))).toBe(code)
  })

  test('a message that is too large, before it is parsed', async () => {
    const bytes = await signed(envelope)
    expect(codeOf(() => readMessage(bytes, { max: bytes.length - 1 }))).toBe('malformed')
  })

  test.each([
    [
      'another algorithm',
      new Map<number, unknown>([
        [1, -8],
        [4, keyId(one.spki)],
      ]),
      'unsupported',
    ],
    ['no kid', new Map([[1, -7]]), 'malformed'],
    [
      'a header too many',
      new Map<number, unknown>([
        [1, -7],
        [4, keyId(one.spki)],
        [5, 1],
      ]),
      'malformed',
    ],
    [
      'a critical header',
      new Map<number, unknown>([
        [1, -7],
        [2, [9]],
        [4, keyId(one.spki)],
      ]),
      'malformed',
    ],
  ])('%s', (_, header, code) => {
    const bytes = Buffer.concat([Buffer.from([0xd2]), encode([encode(header), {}, encode(envelope), new Uint8Array(64)])])
    expect(codeOf(() => readMessage(bytes, { max }))).toBe(code)
  })

  test('an unprotected header', () => {
    const header = encode(
      new Map<number, unknown>([
        [1, -7],
        [4, keyId(one.spki)],
      ]),
    )
    const bytes = Buffer.concat([Buffer.from([0xd2]), encode([header, new Map([[4, new Uint8Array(8)]]), encode(envelope), new Uint8Array(64)])])
    expect(codeOf(() => readMessage(bytes, { max }))).toBe('malformed')
  })
})

test('DER and raw signatures are the same', () =>
  fc.assert(
    fc.property(fc.uint8Array({ minLength: 1, maxLength: 40 }), (data) => {
      const der = sign('sha256', data, one.privateKey)
      const raw = rawSignature(der)
      expect(verifySignature(one.spki, data, raw)).toBe(true)
      expect(Buffer.from(derSignature(raw))).toEqual(der)
      expect(verify('sha256', data, one.publicKey, derSignature(raw))).toBe(true)
    }),
    { numRuns: 100 },
  ))

test('any bytes as a signature: false, as DER: malformed', () => {
  for (let length = 0; length < 80; length++) {
    const bytes = randomBytes(length)
    expect(verifySignature(one.spki, bytes, bytes)).toBe(false)
    expect(codeOf(() => rawSignature(bytes))).toBe('malformed')
  }
})
