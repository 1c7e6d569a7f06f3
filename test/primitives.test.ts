import { constants, createECDH, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { seal } from '@fleetkey/protocol/hpke.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'
import { checkSignature } from '@fleetkey/server/attestation/signature.ts'
import { openCell, sealCell } from '@fleetkey/server/keys/at-rest.ts'
import { marshalSignature } from '@fleetkey/tpm2/attest.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { bits, oid, seq, tlv } from './hostile-requests.ts'
import { outcome } from './mutations.ts'
import { spkiPair } from './spki.ts'

/** What OpenSSL takes and a standard does not: our own guards, one test each. */

describe('RSASSA-PSS of a TPM', () => {
  const { privateKey, publicKey } = generateKeyPairSync('rsa', { modulusLength: 2048 })
  const key = { public: { type: alg.rsa, scheme: { scheme: alg.rsapss, hash: alg.sha256 } }, object: publicKey } as never
  const data = Buffer.from('what is signed')
  test.each([
    [32, 'accepted'],
    [222, 'accepted'],
    [0, 'quote.signature'],
    [20, 'quote.signature'],
    [31, 'quote.signature'],
    [33, 'quote.signature'],
    [221, 'quote.signature'],
  ])('a salt of %i bytes: %s', (saltLength, want) => {
    const signature = new Uint8Array(sign('sha256', data, { key: privateKey, padding: constants.RSA_PKCS1_PSS_PADDING, saltLength }))
    const bytes = marshalSignature({ scheme: alg.rsapss, hash: alg.sha256, signature })
    expect(outcome((of) => checkSignature('quote', key, data, of), bytes)).toBe(want)
  })
})

test.each(['compressed', 'hybrid'] as const)('HPKE seals to no %s point', (form) => {
  const pair = createECDH('prime256v1')
  pair.generateKeys()
  const none = new Uint8Array(0)
  expect(seal('aes-256-gcm', pair.getPublicKey(), none, none, none).enc).toHaveLength(65)
  expect(() => seal('aes-256-gcm', pair.getPublicKey(null, form), none, none, none)).toThrow('not an uncompressed point')
})

test('a cell at rest that was cut anywhere does not open, however short its tag would be', () => {
  const place = { tenant: 'plant', table: 'epoch', row: 'telemetry/1', column: 'material' }
  const key = new Secret(randomBytes(32))
  const cell = sealCell(key, place, new Secret(new Uint8Array(0)), randomBytes(12))
  expect(openCell(key, place, cell).bytes()).toHaveLength(0)
  for (let length = 0; length < cell.length; length++)
    expect(
      outcome((of) => openCell(key, place, of), cell.subarray(0, length)),
      `${length} bytes`,
    ).toBe('at-rest.open')
})

test('a public key has one encoding', () => {
  const key = Buffer.from(spkiPair())
  const [name, curve, point] = [oid('1.2.840.10045.2.1'), oid('1.2.840.10045.3.1.7'), bits(key.subarray(26))]
  const long = (element: Buffer): Buffer => Buffer.concat([element.subarray(0, 1), Buffer.from([0x81]), element.subarray(1)])
  const read = (of: Buffer): string => outcome(importSpki, new Uint8Array(of))
  expect(read(seq(seq(name, curve), point))).toBe('accepted')
  for (const other of [
    seq(seq(long(name), curve), point),
    seq(seq(name, long(curve)), point),
    seq(seq(name, curve), long(point)),
    // A BIT STRING in pieces.
    seq(seq(name, curve), tlv(0x23, point)),
    seq(seq(name, curve), point, tlv(0x05)),
    seq(seq(name, curve, tlv(0x05)), point),
    seq(seq(name, curve), bits(key.subarray(26), 1)),
    Buffer.concat([key, Buffer.from([0])]),
  ])
    expect(read(other)).toBe('x509.der')
})
