import { createDecipheriv, createHmac, randomBytes } from 'node:crypto'
import fc from 'fast-check'
import { expect, test } from 'vitest'
import { decode, encode } from './cbor.ts'
import { decryptData, encryptData, readCiphertext } from './ciphertext.ts'
import { Secret } from './secret.ts'

const secret = new Secret(Uint8Array.from({ length: 32 }, (_, at) => at))
const run = Uint8Array.from({ length: 16 }, (_, at) => 0xf0 + at)
const head = { key: 'telemetry', epoch: 3, run, counter: 258 }
const text = (value: string): Uint8Array => new TextEncoder().encode(value)
const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')

test('what docs/protocol.md says is enough to open it', () => {
  const made = encryptData(secret, head, text('4.2 bar'), text('pump-1'))
  const [header, , body] = decode(made.subarray(1), { useMaps: true }) as [Uint8Array, Map<number, unknown>, Uint8Array]
  expect(hex(header)).toBe(`a40103044b${hex(text('telemetry/3'))}064201020a50${hex(run)}`)
  const prk = createHmac('sha256', run).update(secret.bytes()).digest()
  const key = createHmac('sha256', prk)
    .update(encode(['fleetkey/1/encrypt', 'telemetry', 3]))
    .update(Uint8Array.of(1))
    .digest()
  const opener = createDecipheriv('aes-256-gcm', key, Buffer.from('000000000000000000000102', 'hex'))
  opener.setAAD(encode(['Encrypt0', header, text('pump-1')]))
  opener.setAuthTag(body.subarray(-16))
  expect(Buffer.concat([opener.update(body.subarray(0, -16)), opener.final()]).toString()).toBe('4.2 bar')
  // The same input gives the same bytes: a vector for other implementations.
  expect(hex(made)).toBe(
    'd0835826a40103044b74656c656d657472792f33064201020a50f0f1f2f3f4f5f6f7f8f9fafbfcfdfeffa05719dece44b132e57d3ccce48ec802040988afd2fc3b8577',
  )
})

test('whatever is changed, moved or cut does not open', () => {
  const made = encryptData(secret, head, text('4.2 bar'), text('pump-1'))
  expect(new TextDecoder().decode(decryptData(secret, readCiphertext(made), text('pump-1')))).toBe('4.2 bar')
  expect(() => decryptData(secret, readCiphertext(made), text('pump-2'))).toThrow('does not authenticate')
  expect(() => decryptData(new Secret(randomBytes(32)), readCiphertext(made), text('pump-1'))).toThrow('does not authenticate')
  for (let at = 0; at < made.length; at++)
    for (const bit of [1, 0x80]) {
      const changed = made.map((byte, index) => (index === at ? byte ^ bit : byte))
      expect(() => decryptData(secret, readCiphertext(changed), text('pump-1')), `bit ${bit} of byte ${at}`).toThrow(/./)
    }
  for (let length = 0; length < made.length; length++) expect(() => readCiphertext(made.subarray(0, length))).toThrow(/./)
  expect(() => readCiphertext(Buffer.concat([made, Uint8Array.of(0)]))).toThrow(/./)
})

const withHeader = (fields: readonly (readonly [number, unknown])[]): Uint8Array =>
  Buffer.concat([Uint8Array.of(0xd0), encode([encode(new Map(fields)), new Map(), new Uint8Array(16)])])

test.each<[string, readonly (readonly [number, unknown])[]]>([
  [
    'another algorithm',
    [
      [1, 1],
      [4, text('k/1')],
      [6, Uint8Array.of(0)],
      [10, run],
    ],
  ],
  [
    'no kid',
    [
      [1, 3],
      [6, Uint8Array.of(0)],
      [10, run],
    ],
  ],
  [
    'a kid without epoch',
    [
      [1, 3],
      [4, text('k')],
      [6, Uint8Array.of(0)],
      [10, run],
    ],
  ],
  [
    'an epoch with a leading zero',
    [
      [1, 3],
      [4, text('k/01')],
      [6, Uint8Array.of(0)],
      [10, run],
    ],
  ],
  [
    'an epoch that is none',
    [
      [1, 3],
      [4, text('k/4294967296')],
      [6, Uint8Array.of(0)],
      [10, run],
    ],
  ],
  [
    'a number that is too long',
    [
      [1, 3],
      [4, text('k/1')],
      [6, Uint8Array.of(0, 1)],
      [10, run],
    ],
  ],
  [
    'no number',
    [
      [1, 3],
      [4, text('k/1')],
      [6, new Uint8Array(0)],
      [10, run],
    ],
  ],
  [
    'a number beyond every counter',
    [
      [1, 3],
      [4, text('k/1')],
      [6, new Uint8Array(7).fill(1)],
      [10, run],
    ],
  ],
  [
    'a short context',
    [
      [1, 3],
      [4, text('k/1')],
      [6, Uint8Array.of(0)],
      [10, run.subarray(1)],
    ],
  ],
  [
    'one field more',
    [
      [1, 3],
      [4, text('k/1')],
      [6, Uint8Array.of(0)],
      [10, run],
      [11, 1],
    ],
  ],
])('refuses %s', (_name, fields) => expect(() => readCiphertext(withHeader(fields))).toThrow(expect.objectContaining({ code: 'malformed' })))

test('any message opens as it was, under its own nonce', () =>
  fc.assert(
    fc.property(fc.uint8Array({ maxLength: 300 }), fc.uint8Array({ maxLength: 40 }), fc.integer({ min: 0, max: 2 ** 32 }), (plaintext, aad, counter) => {
      const read = readCiphertext(encryptData(secret, { ...head, counter }, plaintext, aad))
      expect(read).toMatchObject({ key: 'telemetry', epoch: 3, counter })
      expect(Buffer.from(decryptData(secret, read, aad))).toEqual(Buffer.from(plaintext))
    }),
    { numRuns: 200 },
  ))
