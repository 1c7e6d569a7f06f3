import { createECDH, hkdfSync, createSecretKey, verify } from 'node:crypto'
import { readdirSync, readFileSync } from 'node:fs'
import { fileURLToPath } from 'node:url'
import { describe, expect, test } from 'vitest'
import { open as openHpke, seal as sealHpke } from '@fleetkey/protocol/hpke.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { p256Key, rawSignature, verifySignature } from '@fleetkey/protocol/signed.ts'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { checkPossession, readKey } from '@fleetkey/protocol/x509/request/key.ts'
import { checkSignature } from '@fleetkey/server/attestation/signature.ts'
import { open, seal } from '@fleetkey/server/kms/cell.ts'
import { marshalSignature } from '@fleetkey/tpm2/attest.ts'
import { alg, curve } from '@fleetkey/tpm2/constants.ts'
import { hmac } from '@fleetkey/tpm2/kdf.ts'
import { counted, readVectors, vectors } from './public-vectors.ts'

/**
 * C2SP Wycheproof and CCTV against every primitive that is called: by our own function where one takes the vector's input, else by the call that it makes.
 * What OpenSSL takes and a vector forbids is a guard of ours, with a test that needs no vectors (primitives.test.ts, advisories.test.ts).
 */
type Result = 'valid' | 'invalid' | 'acceptable'
type Case = Readonly<Record<string, string>> & { readonly tcId: number; readonly flags: readonly string[]; readonly result: Result; readonly size: number }
type Group = Readonly<Record<string, never>> & { readonly tests: readonly Case[] }

const bytes = (text: string | undefined): Uint8Array => new Uint8Array(Buffer.from(text ?? '', 'hex'))
const text = (of: Uint8Array | undefined): string | undefined => (of === undefined ? undefined : Buffer.from(of).toString('hex'))

/** Whether this does not throw what we, or OpenSSL, refuse with. */
const isAccepted = (work: () => unknown): boolean => {
  try {
    return work() !== false
  } catch (thrown) {
    if (thrown instanceof Problem || (thrown as NodeJS.ErrnoException).code !== undefined) return false
    throw thrown
  }
}

/**
 * The cases of a file that end otherwise than they must. `judge`: whether it was accepted, undefined when nothing here has such inputs. `acceptable`: what we
 * take of those that the vectors leave to us, nothing unless told; `deviating`: where we know better.
 */
const wrongIn = (
  file: string,
  judge: (of: Case, group: Group) => boolean | undefined,
  known: { readonly acceptable?: (of: Case) => boolean; readonly deviating?: (of: Case) => boolean } = {},
): readonly string[] => {
  const groups = (JSON.parse(readVectors(`wycheproof/${file}_test.json`)) as { testGroups: Group[] }).testGroups
  const wrong: string[] = []
  let [ran, all] = [0, 0]
  for (const group of groups)
    for (const one of group.tests) {
      all++
      const accepted = judge(one, group)
      if (accepted === undefined) continue
      ran++
      const want = one.result === 'acceptable' ? (known.acceptable?.(one) ?? false) : (one.result === 'valid') !== (known.deviating?.(one) ?? false)
      if (accepted !== want) wrong.push(`${one.tcId} ${one['comment'] ?? ''} (${one.flags.join()}): ${accepted ? 'accepted' : 'refused'}, ${one.result}`)
    }
  counted(`wycheproof/${file}`, ran, all)
  return ran > 20 ? wrong : [...wrong, `${ran} cases only`]
}

describe.skipIf(vectors.folder === undefined)('Wycheproof', () => {
  /** The signature of a request, as it is verified. */
  const requestVerifies = (kind: 'p256' | 'p384', { msg, sig }: Case, spki: Uint8Array): boolean =>
    isAccepted(() => {
      const key = readKey(spki, [kind])
      const signatureAlgorithm = { oid: kind === 'p256' ? oids.ecdsaSha256 : oids.ecdsaSha384, parameters: false }
      checkPossession({ info: bytes(msg), signature: bytes(sig), signatureAlgorithm } as never, key)
    })
  /** The signature of a TPM, as a quote's is verified. */
  const tpmVerifies = (key: object, scheme: number, hash: number, { msg }: Case, signature: object, spki: Uint8Array): boolean =>
    isAccepted(() =>
      checkSignature(
        'quote',
        { public: { ...key, scheme: { scheme, hash } }, object: importSpki(spki) } as never,
        bytes(msg),
        marshalSignature({ scheme, hash, ...signature } as never),
      ),
    )

  test.each([
    ['ecdsa_secp256r1_sha256', 'p256', 'sha256'],
    ['ecdsa_secp384r1_sha384', 'p384', 'sha384'],
  ] as const)('%s: requests, and chains, lists, checkpoints', (file, kind, hash) =>
    expect(
      wrongIn(file, (of, { publicKeyDer }) => {
        const spki = bytes(publicKeyDer)
        const plain = verify(hash, bytes(of['msg']), importSpki(spki), bytes(of['sig']))
        expect(requestVerifies(kind, of, spki), `${of.tcId}`).toBe(plain)
        if (kind === 'p256')
          expect(
            isAccepted(() => verifySignature(spki, bytes(of['msg']), rawSignature(bytes(of['sig'])))),
            `${of.tcId}`,
          ).toBe(plain)
        return plain
      }),
    ).toEqual([]),
  )

  test.each([
    ['ecdsa_secp256r1_sha256_p1363', curve.p256, alg.sha256, 32],
    ['ecdsa_secp384r1_sha384_p1363', curve.p384, alg.sha384, 48],
  ] as const)('%s: quotes, and signed messages', (file, of, hash, size) =>
    expect(
      wrongIn(file, (one, { publicKeyDer }) => {
        const [spki, raw] = [bytes(publicKeyDer), bytes(one['sig'])]
        if (of === curve.p256 && raw.length !== 2 * size) return verifySignature(spki, bytes(one['msg']), raw)
        // A TPM names the length of each half: there is no signature of another.
        if (raw.length !== 2 * size) return undefined
        const quoted = tpmVerifies({ type: alg.ecc, curve: of }, alg.ecdsa, hash, one, { r: raw.subarray(0, size), s: raw.subarray(size) }, spki)
        if (of === curve.p256) expect(verifySignature(spki, bytes(one['msg']), raw), `${one.tcId}`).toBe(quoted)
        return quoted
      }),
    ).toEqual([]),
  )

  test.each(['rsa_signature_2048_sha256', 'rsa_signature_3072_sha256', 'rsa_signature_4096_sha256'])('%s: quotes, and chains', (file) =>
    expect(
      wrongIn(file, (of, { publicKeyDer }) => {
        const [spki, signature] = [bytes(publicKeyDer), bytes(of['sig'])]
        const plain = verify('sha256', bytes(of['msg']), importSpki(spki), signature)
        // What is longer than any key of a TPM does not parse.
        expect(tpmVerifies({ type: alg.rsa }, alg.rsassa, alg.sha256, of, { signature }, spki), `${of.tcId}`).toBe(plain)
        return plain
      }),
    ).toEqual([]),
  )

  // The TPM's longest salt is taken knowingly: 222 bytes of 2048 bits, 350 of 3072.
  test.each(['rsa_pss_2048_sha256_mgf1_32', 'rsa_pss_3072_sha256_mgf1_32'])('%s: quotes', (file) =>
    expect(
      wrongIn(
        file,
        (of, { publicKeyDer }) => tpmVerifies({ type: alg.rsa }, alg.rsapss, alg.sha256, of, { signature: bytes(of['sig']) }, bytes(publicKeyDer)),
        {
          deviating: (of) => /^s_len changed to (?:222|350)$/.test(of['comment'] ?? ''),
        },
      ),
    ).toEqual([]),
  )

  test('ecdh_secp256r1_ecpoint: sealing to a device, and opening', () =>
    expect(
      wrongIn('ecdh_secp256r1_ecpoint', (of) => {
        const [point, context] = [bytes(of['public']), bytes('636f6e74657874')]
        const own = bytes(of['private']?.slice(-64).padStart(64, '0'))
        let sealed: ReturnType<typeof sealHpke>
        try {
          sealed = sealHpke('aes-256-gcm', point, context, context, bytes('01'), own)
        } catch {
          return false
        }
        // It opens by the shared secret of the vector alone, and OpenSSL finds the same in the other direction.
        const pair = createECDH('prime256v1')
        pair.setPrivateKey(own)
        expect(text(pair.computeSecret(point)), `${of.tcId}`).toBe(of['shared'])
        return text(openHpke('aes-256-gcm', bytes(of['shared']), point, context, context, sealed)) === '01'
      }),
    ).toEqual([]))

  test('ecdh_secp256r1: public keys as they come', () =>
    expect(
      wrongIn('ecdh_secp256r1', (of) => isAccepted(() => p256Key(bytes(of['public']))), {
        acceptable: (of) => of.flags.includes('CompressedPoint'),
      }),
    ).toEqual([]))

  test('ecdh_secp384r1_ecpoint: the call of a credential for an EK of P-384', () =>
    expect(
      wrongIn('ecdh_secp384r1_ecpoint', (of) => {
        const [pair, point] = [createECDH('secp384r1'), bytes(of['public'])]
        // The TPM's structure has both coordinates.
        if (point[0] !== 4) return undefined
        pair.setPrivateKey(bytes(of['private']?.slice(-96).padStart(96, '0')))
        return isAccepted(() => text(pair.computeSecret(point)) === of['shared'])
      }),
    ).toEqual([]))

  test.each([
    ['hmac_sha256', alg.sha256],
    ['hmac_sha384', alg.sha384],
    ['hmac_sha512', alg.sha512],
  ] as const)('%s', (file, hash) =>
    expect(wrongIn(file, (of) => text(hmac(hash, bytes(of['key']), bytes(of['msg'])))?.slice(0, of['tag']?.length) === of['tag'])).toEqual([]),
  )

  test('aes_gcm: cells of the KMS, the form of everything at rest', () =>
    expect(
      wrongIn('aes_gcm', (of, group) => {
        const { ivSize, keySize, tagSize } = group as unknown as Readonly<Record<string, number>>
        if (ivSize !== 96 || keySize !== 256 || tagSize !== 128) return undefined
        const key = createSecretKey(bytes(of['key']))
        const cell = bytes(`01${of['iv'] ?? ''}${of['ct'] ?? ''}${of['tag'] ?? ''}`)
        const made = seal(key, bytes(of['msg']), bytes(of['aad']), bytes(of['iv']))
        expect(text(made) === text(cell), `${of.tcId}`).toBe(of.result === 'valid')
        return text(open(key, cell, bytes(of['aad']))) === of['msg']
      }),
    ).toEqual([]))

  test('hkdf_sha256: the call of ciphertext.ts', () =>
    expect(
      wrongIn('hkdf_sha256', (of) =>
        isAccepted(() => text(new Uint8Array(hkdfSync('sha256', bytes(of['ikm']), bytes(of['salt']), bytes(of['info']), of.size))) === of['okm']),
      ),
    ).toEqual([]))
})

test.skipIf(vectors.folder === undefined)('CCTV RFC 6979: a nonce that is drawn again', () => {
  const value = (name: string): string => new RegExp(`^${name} = ([0-9A-F]{64})$`, 'm').exec(readVectors('cctv/RFC6979/README.md'))?.[1] ?? ''
  const spki = bytes(`3059301306072a8648ce3d020106082a8648ce3d03010703420004${value('Ux')}${value('Uy')}`)
  const pair = createECDH('prime256v1')
  pair.setPrivateKey(bytes(value('x')))
  expect(text(pair.getPublicKey())?.slice(2).toUpperCase()).toBe(value('Ux') + value('Uy'))
  expect(verifySignature(spki, Buffer.from('wv[vnX'), bytes(value('r') + value('s')))).toBe(true)
  expect(verifySignature(spki, Buffer.from('wv[vnY'), bytes(value('r') + value('s')))).toBe(false)
  counted('cctv/RFC6979', 1)
})

/** Their vectors stay unread because nothing calls them; whoever calls one runs its vectors first. OpenSSL's AES key wrap opens an empty ciphertext. */
const unused: readonly (readonly [what: string, pattern: RegExp, but?: string])[] = [
  ['AES key wrap', /['"`][\w-]*aes[\w-]*wrap[\w-]*['"`]|\bAES-KWP?\b/i],
  ['Ed25519, X25519', /['"`](?:ed|x)(?:25519|448)['"`]/i],
  ['ML-KEM, ML-DSA', /['"`]ml-?(?:kem|dsa)[\w-]*['"`]/i],
  // Of P-256, with the RFC's vectors (protocol/wrap.test.ts).
  ['key encapsulation but that of HPKE', /\b(?:en|de)capsulate\(/, 'protocol/hpke.ts'],
  ['ChaCha20 alone', /['"`]chacha20['"`]/i],
  ['PBKDF2', /\bpbkdf2(?:Sync)?\(/],
]
test.each(unused.map(([what, pattern, but = '']) => [what, pattern, but] as const))('%s is called nowhere', (_, pattern, but) => {
  const root = fileURLToPath(new URL('..', import.meta.url))
  const product = ['protocol', 'tpm2', 'server', 'device-agent', 'firmware-sim', 'cli']
  const files = product.flatMap((folder) =>
    readdirSync(`${root}${folder}`, { recursive: true, encoding: 'utf8' })
      .filter((name) => name.endsWith('.ts') && !name.endsWith('.test.ts') && !name.includes('node_modules'))
      .map((name) => `${folder}/${name}`),
  )
  expect(files.length).toBeGreaterThan(200)
  expect(files.filter((name) => name !== but && pattern.test(readFileSync(`${root}${name}`, 'utf8')))).toEqual([])
})
