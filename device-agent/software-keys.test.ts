import { createPublicKey, generateKeyPairSync } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { newToken, tokenText } from '@fleetkey/protocol/enrolment-token.ts'
import type { BodyOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { verifySignature } from '@fleetkey/protocol/signed.ts'
import { sealTo, openSealed, type WrapContext } from '@fleetkey/protocol/wrap.ts'
import type { Challenged } from './attesters/attester.ts'
import { tokenAttester, type TokenFile } from './attesters/token.ts'
import { openDocument } from './files.ts'
import { memoryFileSystem } from './memory-filesystem.ts'
import { privateKeyOf, softwareSecureElement } from './secure-element.ts'
import { openSoftwareKeys, type SoftwareKeys } from './software-keys.ts'
import { testServer, today } from './test-server.ts'
import { random } from './test-keys.ts'

const opened = async (files = memoryFileSystem(), steps: string[] = []): Promise<SoftwareKeys> =>
  await openSoftwareKeys({
    document: openDocument({ files, folder: '/data', name: 'software-keys', step: () => undefined }),
    random,
    step: (name) => void steps.push(name),
  })

describe('keys of a device without a TPM', () => {
  test('are made once, and are the same at the next start', async () => {
    const [files, steps] = [memoryFileSystem(), [] as string[]]
    await files.makeFolder('/data', 0o700)
    const first = await opened(files, steps)
    expect([first.known, first.device, steps]).toEqual([false, null, ['software-keys.stored']])
    await first.settle('pl-1')
    await first.settle('pl-1')
    const second = await opened(files, steps)
    expect([second.known, second.device, steps]).toEqual([true, 'pl-1', ['software-keys.stored', 'software-keys.settled']])
    expect([second.ldevid.spki, second.recipient.spki]).toEqual([first.ldevid.spki, first.recipient.spki])
    expect(second.storage.equals(first.storage)).toBe(true)
    const data = random(40)
    expect(verifySignature(first.ldevid.spki, data, await second.ldevid.sign(data))).toBe(true)
  })

  test('open what was wrapped to them, and hold nothing that wants a TPM', async () => {
    const keys = await opened(memoryFileSystem())
    const context: WrapContext = { tenant: 'plant', device: 'pl-1', key: 'site', epoch: 1, protection: 'sealed', purpose: 'key' }
    const secret = new Secret(random(32))
    const { point } = keys.recipient
    const sealed = sealTo(point, secret, context)
    expect((await openSealed(sealed, context, { point, dh: keys.recipient.zgen })).equals(secret)).toBe(true)
    await expect(openSealed(sealed, { ...context, device: 'pl-2' }, { point, dh: keys.recipient.zgen })).rejects.toMatchObject({ reason: 'wrap.open' })
    await expect(keys.recipient.importHmacKey({ public: random(8), duplicate: random(8), seed: random(8), innerKey: random(16) })).rejects.toMatchObject({
      reason: 'key.needs-tpm',
    })
    await expect(keys.recipient.hmac({ public: random(8), private: random(8) }, random(8))).rejects.toMatchObject({ reason: 'key.needs-tpm' })
  })
})

describe('a secure element in software', () => {
  const server = testServer()
  const { privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const certificate = server.issue({ subject: 'se', spki: new Uint8Array(createPublicKey(privateKey).export({ format: 'der', type: 'spki' })) })

  test('signs with the key of its certificate', async () => {
    const element = softwareSecureElement(privateKey, [certificate])
    const data = random(10)
    expect(verifySignature(element.spki, data, await element.sign(data))).toBe(true)
  })
  const wrong: readonly (readonly [string, () => unknown, RegExp])[] = [
    [
      'a certificate for another key',
      () => softwareSecureElement(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey, [certificate]),
      /for another key/,
    ],
    ['no certificate', () => softwareSecureElement(privateKey, []), /no certificate/],
    ['an RSA key', () => softwareSecureElement(generateKeyPairSync('rsa', { modulusLength: 2048 }).privateKey, [certificate]), /not of P-256 or P-384/],
    ['a file that holds no key', () => privateKeyOf('-----BEGIN CERTIFICATE-----'), /no private key/],
  ]
  test.each(wrong)('%s: it does not start', (_name, make, what) => expect(make).toThrow(what))
})

describe('a token file', () => {
  const around = { serial: 'PL-1', purpose: 'enrol', random: random(32), agent: 'test' } as const
  const attester = async (content: () => string | undefined, lines: string[] = []) => {
    const file: TokenFile = {
      path: '/data/token',
      read: async () => {
        const text = content()
        return text === undefined ? undefined : new TextEncoder().encode(text)
      },
      remove: async () => undefined,
      step: () => undefined,
      log: (line) => void lines.push(line),
    }
    return tokenAttester(await opened(memoryFileSystem()), file)
  }
  const challenged = (hello: BodyOf<'hello'>, method: 'token' | 'idevid' = 'token'): Challenged => ({
    tenant: 'plant',
    hello,
    helloBytes: random(10),
    challenge: { type: 'challenge', challenge: random(16), hello: random(32), random: random(32), demanded: { method }, expires: today },
    challengeBytes: random(10),
    exporter: random(32),
    eventLog: new Uint8Array(),
    tls: { spki: random(91), csr: random(100) },
  })

  test('only the name of the token is in the hello, only a proof in the answer', async () => {
    const token = newToken(random)
    const made = await attester(() => `${tokenText(token)}\n`)
    const hello = await made.hello(around)
    expect(hello.presented.token).toEqual(token.id)
    const { proven } = await made.answer(challenged(hello))
    expect(proven.proof).toHaveLength(32)
    for (const bytes of [...Object.values(hello.presented), ...Object.values(proven)])
      if (bytes instanceof Uint8Array) expect(Buffer.from(bytes).includes(Buffer.from(token.secret.bytes()))).toBe(false)
  })
  test('without one the LDevID key alone speaks', async () => {
    const made = await attester(() => undefined)
    const hello = await made.hello(around)
    expect(hello.presented.token).toBeNull()
    expect((await made.answer(challenged(hello))).proven.proof).toBeNull()
  })
  test('one that holds something else is told, and not shown', async () => {
    const lines: string[] = []
    const made = await attester(() => 'hunter2', lines)
    expect((await made.hello(around)).presented.token).toBeNull()
    expect(lines).toEqual(['/data/token holds no enrolment token'])
  })
  test('exchanged between hello and answer: the next hello takes the new one', async () => {
    const texts = [tokenText(newToken(random)), tokenText(newToken(random))]
    const made = await attester(() => texts.shift())
    const hello = await made.hello(around)
    await expect(made.answer(challenged(hello))).rejects.toMatchObject({ reason: 'token.exchanged' })
  })
  test('a challenge by another method is not answered', async () => {
    const made = await attester(() => tokenText(newToken(random)))
    const hello = await made.hello(around)
    await expect(made.answer(challenged(hello, 'idevid'))).rejects.toThrow(Problem)
  })
})
