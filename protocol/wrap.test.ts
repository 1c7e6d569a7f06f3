import { createECDH, createPrivateKey, decapsulate, randomBytes } from 'node:crypto'
import { inspect } from 'node:util'
import fc from 'fast-check'
import { describe, expect, test } from 'vitest'
import { counted, readVectors, vectors } from '@fleetkey/test/public-vectors.ts'
import { chunkFrameMax, isFrame, reassembler, split } from './chunks.ts'
import { aeads, open, seal, type Aead } from './hpke.ts'
import { Problem } from './problem.ts'
import { Secret } from './secret.ts'
import { openSealed, sealTo, type Recipient, type WrapContext } from './wrap.ts'

const bytes = (text: string): Uint8Array => new Uint8Array(Buffer.from(text, 'hex'))

interface Vector {
  readonly mode: string
  readonly kem_id: string
  readonly kdf_id: string
  readonly aead_id: string
  readonly info: string
  readonly skEm: string
  readonly skRm: string
  readonly pkRm: string
  readonly enc: string
  readonly shared_secret: string
  readonly encryptions: readonly { readonly pt: string; readonly aad: string; readonly ct: string }[]
}

describe.skipIf(vectors.folder === undefined)('RFC 9180 appendix A, base mode with P-256 and SHA-256', () => {
  const all = vectors.folder === undefined ? [] : (JSON.parse(readVectors('hpke-rfc9180.json')) as Vector[])
  const ours = all.filter(({ mode, kem_id, kdf_id }) => mode === '0' && kem_id === '16' && kdf_id === '1')
  test('both AEADs of the RFC are there', () => {
    expect(ours.map(({ aead_id }) => aead_id)).toEqual(['1', '3'])
    counted('hpke-rfc9180 (set-ups)', ours.length, all.length)
  })
  // Encap draws its ephemeral key itself: that OpenSSL's secret is the RFC's is seen from the other side, and what ours is in the test below.
  test('OpenSSL finds the shared secret of every set-up with P-256', () => {
    const same = all.filter(({ mode, kem_id }) => kem_id === '16' && (mode === '0' || mode === '1'))
    expect(same.length).toBeGreaterThan(3)
    for (const { skRm, pkRm, enc, shared_secret } of same) {
      const point = bytes(pkRm)
      const [x, y] = [point.subarray(1, 33), point.subarray(33)].map((one) => Buffer.from(one).toString('base64url')) as [string, string]
      const jwk = { kty: 'EC', crv: 'P-256', x, y, d: Buffer.from(bytes(skRm)).toString('base64url') }
      expect(decapsulate(createPrivateKey({ key: jwk, format: 'jwk' }), bytes(enc)).toString('hex')).toBe(shared_secret)
    }
  })
  test.each(ours)('AEAD $aead_id', (vector) => {
    const aead = (Object.keys(aeads) as Aead[]).find((name) => String(aeads[name].id) === vector.aead_id) ?? 'aes-256-gcm'
    const [first] = vector.encryptions
    if (first === undefined) throw new Error('no encryption')
    const sealed = seal(aead, bytes(vector.pkRm), bytes(vector.info), bytes(first.aad), bytes(first.pt), bytes(vector.skEm))
    expect(Buffer.from(sealed.enc).toString('hex')).toBe(vector.enc)
    expect(Buffer.from(sealed.ciphertext).toString('hex')).toBe(first.ct)
    const recipient = createECDH('prime256v1')
    recipient.setPrivateKey(bytes(vector.skRm))
    const dh = recipient.computeSecret(bytes(vector.enc))
    const opened = open(aead, dh, bytes(vector.pkRm), bytes(vector.info), bytes(first.aad), sealed)
    expect(Buffer.from(opened ?? []).toString('hex')).toBe(first.pt)
  })
})

test('what OpenSSL encapsulates, the private key alone opens; a point that is none is refused', () => {
  for (let round = 0; round < 50; round++) {
    const pair = createECDH('prime256v1')
    const point = pair.generateKeys()
    const [info, aad, plain] = [randomBytes(round), randomBytes(round), randomBytes(32)]
    const sealed = seal('aes-256-gcm', point, info, aad, plain)
    expect(sealed.enc).toHaveLength(65)
    expect(Buffer.from(open('aes-256-gcm', pair.computeSecret(sealed.enc), point, info, aad, sealed) ?? [])).toEqual(plain)
  }
  const off = Buffer.from(createECDH('prime256v1').generateKeys())
  off[64] = (off[64] ?? 0) ^ 1
  for (const point of [off, Buffer.concat([Uint8Array.of(4), new Uint8Array(64)]), Buffer.concat([Uint8Array.of(4), new Uint8Array(64).fill(255)])])
    expect(() => seal('aes-256-gcm', point, off, off, off)).toThrow()
})

const recipientOf = (): Recipient => {
  const pair = createECDH('prime256v1')
  const point = new Uint8Array(pair.generateKeys())
  return { point, dh: async (ephemeral) => new Uint8Array(pair.computeSecret(ephemeral)) }
}
const context: WrapContext = { tenant: 'plant', device: 'gw-1', key: 'telemetry', epoch: 3, protection: 'sealed', purpose: 'key' }

describe('wrapping a key', () => {
  const recipient = recipientOf()
  const key = randomBytes(32)
  const sealed = sealTo(recipient.point, new Secret(key), context)

  test('the recipient opens it', async () => expect(Buffer.from((await openSealed(sealed, context, recipient)).bytes())).toEqual(key))
  test('every wrap is another one', () => expect(Buffer.from(sealTo(recipient.point, new Secret(key), context))).not.toEqual(Buffer.from(sealed)))
  test('nobody else does', async () => await expect(openSealed(sealed, context, recipientOf())).rejects.toMatchObject({ code: 'unauthenticated' }))

  test.each([
    ['tenant', { tenant: 'plants' }],
    ['device', { device: 'gw-2' }],
    ['key', { key: 'telemetry2' }],
    ['epoch', { epoch: 4 }],
    ['protection', { protection: 'tpm' }],
    ['purpose', { purpose: 'inner' }],
  ] as const)(
    'not as another %s',
    async (_, of) => await expect(openSealed(sealed, { ...context, ...of }, recipient)).rejects.toMatchObject({ code: 'unauthenticated' }),
  )

  test('every changed byte is refused, with a code', async () => {
    for (let at = 0; at < sealed.length; at++) {
      const changed = Uint8Array.from(sealed)
      changed[at] = (changed[at] ?? 0) ^ 1
      await expect(openSealed(changed, context, recipient), `byte ${at}`).rejects.toThrow()
    }
  })

  test('a point that is not on the curve is not wrapped to', () =>
    expect(() => sealTo(Buffer.concat([Buffer.from([4]), Buffer.alloc(64, 7)]), new Secret(key), context)).toThrow())
})

describe('frames of a large message', () => {
  const whole = randomBytes(150_000)
  const transfer = randomBytes(16)
  const { manifest, frames } = split(whole, transfer)

  test('they fit, and make the message again', () => {
    const parts = reassembler({ max: 1 << 20 })
    parts.begin(manifest)
    expect(frames.every((frame) => isFrame(frame) && frame.length <= chunkFrameMax)).toBe(true)
    expect(Buffer.from(frames.map((frame) => parts.add(frame)).at(-1) ?? [])).toEqual(whole)
    expect(parts.pending).toBe(0)
  })

  test('any length', () =>
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 200_000 }), (length) => {
        const message = randomBytes(length)
        const made = split(message, transfer)
        const parts = reassembler({ max: 1 << 20 })
        parts.begin(made.manifest)
        expect(Buffer.from(made.frames.map((frame) => parts.add(frame)).at(-1) ?? [])).toEqual(message)
      }),
      { numRuns: 20 },
    ))

  const other = split(whole, randomBytes(16))
  test.each([
    ['a frame without a manifest', [], [frames[0]]],
    ['frames in another order', [manifest], [frames[1]]],
    ['a frame twice', [manifest], [frames[0], frames[0]]],
    ['a frame of another transfer', [manifest], [other.frames[0]]],
    ['a frame that is no CBOR', [manifest], [new Uint8Array([0x83, 1])]],
    ['other bytes', [{ ...manifest, hash: new Uint8Array(32) }], frames],
    ['a frame that is too large', [manifest], [new Uint8Array(chunkFrameMax + 1)]],
    ['more than the bound', [{ ...manifest, length: (1 << 20) + 1 }], []],
    ['a count that does not fit', [{ ...manifest, count: 3 }], []],
  ] as const)('%s: malformed, and nothing is kept', (_, begin, add) => {
    const parts = reassembler({ max: 1 << 20 })
    expect(() => {
      for (const one of begin) parts.begin(one)
      for (const one of add) if (one !== undefined) parts.add(one)
      if (add.length === 0) throw new Problem('malformed', 'unreachable when begin refuses')
    }).toThrow(Problem)
    expect(parts.pending).toBe(0)
  })
})

describe('a secret', () => {
  const secret = new Secret(new TextEncoder().encode('top-secret-key-bytes'))
  test.each([
    ['inspect', inspect({ secret })],
    ['JSON', JSON.stringify({ secret })],
    ['text', String(secret)],
    ['a template', `${secret.toString()}`],
    ['depth', inspect(secret, { depth: 10, showHidden: true })],
  ])('does not show in %s', (_, shown) => {
    expect(shown).toContain('[secret]')
    expect(shown).not.toContain('top')
    expect(shown).not.toContain('116')
  })
  test('equality, length and wiping', () => {
    const copy = new Secret(secret.bytes())
    expect(secret.equals(copy)).toBe(true)
    copy.destroy()
    expect([...copy.bytes()].every((byte) => byte === 0)).toBe(true)
    expect(secret.equals(copy)).toBe(false)
    expect(secret.equals(new Secret(new Uint8Array(3)))).toBe(false)
  })
})
