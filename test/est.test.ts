import { execFile, execFileSync } from 'node:child_process'
import { promisify } from 'node:util'
import { generateKeyPairSync, randomBytes, sign, X509Certificate, type KeyObject } from 'node:crypto'
import { readFileSync, writeFileSync } from 'node:fs'
import { Agent, request } from 'node:https'
import type { Socket } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { estReasons } from '@fleetkey/server/ca/est-reasons.ts'
import { derSignature } from '@fleetkey/protocol/signed.ts'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { bitString, der, explicit, octetString, oid, sequence, set, tags } from '@fleetkey/protocol/x509/der.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { expectCut, stepClock } from './cut.ts'
import { certificatesIn } from './est-answer.ts'
import { hasProgram } from './programs.ts'
import { openWorld, type World } from './world.ts'

interface Key {
  readonly spki: Uint8Array
  readonly object: KeyObject
  readonly pem: string
}
const newKey = (curve = 'prime256v1'): Key => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: curve })
  return {
    spki: new Uint8Array(publicKey.export({ format: 'der', type: 'spki' })),
    object: privateKey,
    pem: privateKey.export({ format: 'pem', type: 'pkcs8' }) as string,
  }
}

/** A request of this key, whose every part can be another. */
const csr = (key: Key, name: string, of: { attributes?: Uint8Array[]; signer?: Key; names?: Uint8Array } = {}): Uint8Array => {
  const wanted = of.names === undefined ? [] : [sequence(oid(oids.extensionRequest), set(sequence(sequence(oid(oids.subjectAltName), octetString(of.names)))))]
  const info = sequence(Uint8Array.of(tags.integer, 1, 0), nameOf(name), key.spki, explicit(0, ...wanted, ...(of.attributes ?? [])))
  const raw = sign('sha256', info, { key: (of.signer ?? key).object, dsaEncoding: 'ieee-p1363' })
  return sequence(info, sequence(oid(oids.ecdsaSha256)), bitString(derSignature(raw)))
}
const uri = (text: string): Uint8Array => sequence(der(0x86, new TextEncoder().encode(text)))
const base64 = (bytes: Uint8Array): string => Buffer.from(bytes).toString('base64')

const steps = stepClock()
let world: World
let port: number
let root: string
let batch: string
const at = (name: string): string => join(world.folder, name)

interface Call {
  readonly method?: string
  readonly path?: string
  readonly body?: string
  readonly type?: string
  readonly auth?: string
  readonly cert?: string
  readonly key?: string
}
interface Answer {
  readonly status: number
  readonly body: string
  readonly headers: Readonly<Record<string, unknown>>
}
const call = async (of: Call): Promise<Answer> =>
  await new Promise((resolve, reject) => {
    const req = request(
      {
        host: '127.0.0.1',
        port,
        path: of.path ?? '/.well-known/est/simpleenroll',
        method: of.method ?? 'POST',
        ca: root,
        agent: false,
        ...(of.cert === undefined ? {} : { cert: of.cert, key: of.key }),
        headers: { 'content-type': of.type ?? 'application/pkcs10', ...(of.auth === undefined ? {} : { authorization: of.auth }) },
      },
      (response) => {
        const chunks: Buffer[] = []
        response.on('data', (chunk: Buffer) => chunks.push(chunk))
        response.on('end', () => resolve({ status: response.statusCode ?? 0, body: Buffer.concat(chunks).toString(), headers: response.headers }))
        response.on('error', reject)
      },
    )
    req.on('error', reject)
    req.end(of.body)
  })
const basic = (user: string, password: string): string => `Basic ${Buffer.from(`${user}:${password}`).toString('base64')}`

/** The certificate in an answer, as openssl reads it. PEM. */
const certificateIn = (answer: Answer): string => {
  expect(answer).toMatchObject({ status: 200 })
  return certificatesIn(answer.body)[0] ?? ''
}
const reenroll = '/.well-known/est/simplereenroll'
const enrol = async (user: string, token: string, key: Key): Promise<string> =>
  certificateIn(await call({ auth: basic(user, token), body: base64(csr(key, user)) }))
const token = async (device?: string): Promise<string> => await world.token(batch, device === undefined ? {} : { device })
const lastReason = async (device: string): Promise<string | undefined> =>
  (await world.client.call('device.show', { params: { id: device } })).lastRefusal?.reason

beforeAll(async () => {
  world = await openWorld({ args: ['--est-port', '0'], step: steps.step })
  port = world.server.estPort ?? 0
  root = world.bundle.trust[0] ?? ''
  writeFileSync(at('root.pem'), root)
  const element = await world.withSecureElement('SE-1')
  batch = await world.enlist([element, ...Array.from({ length: 16 }, (_, n) => ({ serial: `PL-${n + 1}` }))], 'plant')
}, 60_000)
afterAll(async () => await world.stop())

test('cacerts: the issuing CA and the root, on one line', async () => {
  const answer = await call({ method: 'GET', path: '/.well-known/est/cacerts' })
  expect(answer.body).toMatch(/^[A-Za-z0-9+/=]+$/)
  const out = execFileSync('openssl', ['pkcs7', '-inform', 'DER', '-print_certs'], { input: Buffer.from(answer.body, 'base64'), encoding: 'utf8' })
  expect(out.match(/BEGIN CERTIFICATE/g)).toHaveLength(2)
  expect(out).toContain(new X509Certificate(root).toString().split('\n')[1])
})

test('csrattrs: P-256, ECDSA with SHA-256', async () => {
  const { body } = await call({ method: 'GET', path: '/.well-known/est/csrattrs' })
  const out = execFileSync('openssl', ['asn1parse', '-inform', 'DER'], { input: Buffer.from(body, 'base64'), encoding: 'utf8' })
  for (const name of ['id-ecPublicKey', 'prime256v1', 'ecdsa-with-SHA256']) expect(out).toContain(name)
})

test.skipIf(!hasProgram('curl'))('curl and openssl enrol with a token and re-enrol with the certificate', async () => {
  const url = `https://127.0.0.1:${port}/.well-known/est`
  const run = async (program: string, args: string[]): Promise<Buffer> => (await promisify(execFile)(program, args, { encoding: 'buffer' })).stdout
  const request = async (name: string): Promise<void> => {
    await run('openssl', [
      'req',
      '-new',
      '-newkey',
      'ec',
      '-pkeyopt',
      'ec_paramgen_curve:P-256',
      '-nodes',
      '-keyout',
      at(`${name}.key`),
      '-subj',
      '/CN=pl-1',
      '-outform',
      'DER',
      '-out',
      at(`${name}.der`),
    ])
    writeFileSync(at(`${name}.b64`), await run('openssl', ['base64', '-in', at(`${name}.der`)]))
  }
  const post = async (name: string, path: string, ...more: string[]): Promise<void> => {
    const body = await run('curl', [
      '-sf',
      '--cacert',
      at('root.pem'),
      ...more,
      '-H',
      'Content-Type: application/pkcs10',
      '--data-binary',
      `@${at(`${name}.b64`)}`,
      `${url}/${path}`,
    ])
    writeFileSync(at(`${name}.pem`), execFileSync('openssl', ['pkcs7', '-inform', 'DER', '-print_certs'], { input: Buffer.from(body.toString(), 'base64') }))
  }
  await request('one')
  await post('one', 'simpleenroll', '-u', `PL-1:${await token('pl-1')}`)
  await request('two')
  await post('two', 'simplereenroll', '--cert', at('one.pem'), '--key', at('one.key'))
  const chain = at('issuing.pem')
  writeFileSync(chain, world.bundle.chain[0] ?? '')
  for (const name of ['one', 'two'])
    expect(
      (await run('openssl', ['verify', '-x509_strict', '-purpose', 'sslclient', '-CAfile', at('root.pem'), '-untrusted', chain, at(`${name}.pem`)])).toString(),
    ).toContain('OK')
  const [one, two] = ['one', 'two'].map((name) => new X509Certificate(readFileSync(at(`${name}.pem`))))
  expect(two?.subject).toBe(one?.subject)
  expect(two?.publicKey.equals(one?.publicKey as KeyObject)).toBe(false)
  expect(await world.client.call('device.show', { params: { id: 'pl-1' } })).toMatchObject({
    state: 'enrolled',
    method: 'token',
    assurance: 'token',
    measured: false,
  })
})

test.skipIf(!hasProgram('pki'))('strongSwan asks for the CAs, enrols and re-enrols', { timeout: 30_000 }, async () => {
  const run = async (args: string[]): Promise<Buffer> => (await promisify(execFile)('pki', args, { encoding: 'buffer' })).stdout
  const url = `https://127.0.0.1:${port}`
  await run(['--estca', '--url', url, '--cacert', at('root.pem'), '--caout', at('got.pem'), '--outform', 'pem', '--force'])
  const request = async (name: string): Promise<void> => {
    writeFileSync(at(`${name}.key`), await run(['--gen', '--type', 'ecdsa', '--size', '256', '--outform', 'pem']), { mode: 0o600 })
    writeFileSync(at(`${name}.csr`), await run(['--req', '--type', 'ecdsa', '--in', at(`${name}.key`), '--dn', 'CN=pl-2', '--outform', 'der']))
  }
  await request('sw1')
  const secret = await token('pl-2')
  writeFileSync(
    at('sw1.pem'),
    await run(['--est', '--url', url, '--in', at('sw1.csr'), '--cacert', at('root.pem'), '--userpass', `pl-2:${secret}`, '--outform', 'pem']),
  )
  await request('sw2')
  writeFileSync(
    at('sw2.pem'),
    await run(['--est', '--url', url, '--in', at('sw2.csr'), '--cacert', at('root.pem'), '--cert', at('sw1.pem'), '--key', at('sw1.key'), '--outform', 'pem']),
  )
  const [one, two] = ['sw1', 'sw2'].map((name) => new X509Certificate(readFileSync(at(`${name}.pem`))))
  expect(two?.subject).toBe('CN=pl-2')
  expect(two?.serialNumber).not.toBe(one?.serialNumber)
})

test('by factory identity, again with another key; never by one that is not ours', async () => {
  const by = (made: ReturnType<typeof makeElement>) => ({
    cert: toPem('CERTIFICATE', made.certificate),
    key: made.key.export({ format: 'pem', type: 'pkcs8' }) as string,
  })
  const own = makeElement(world.idevidCa, 'SE-2', Date.now())
  await world.enlist([{ serial: 'SE-2', idevid: own.spki }], 'plant')
  const ask = async (of: { cert: string; key: string }, name = 'se-2'): Promise<Answer> => await call({ ...of, body: base64(csr(newKey(), name)) })
  expect(new X509Certificate(certificateIn(await ask(by(own)))).subject).toBe('CN=se-2')
  certificateIn(await ask(by(own)))
  expect(await world.client.call('device.show', { params: { id: 'se-2' } })).toMatchObject({ state: 'enrolled', method: 'idevid', assurance: 'simulated' })
  // Genuine and in no manifest; of another maker.
  expect((await ask(by(makeElement(world.idevidCa, 'SE-9', Date.now())))).status).toBe(403)
  expect((await ask(by(makeElement(makeIdevidCa(Date.now()), 'SE-2', Date.now())))).status).toBe(403)
})

test('SPIRE 1.14.6: of 64 that use one token at once, one wins', { timeout: 30_000 }, async () => {
  const secret = await token()
  const all = await Promise.all(
    Array.from({ length: 64 }, async (_, n) => {
      const user = `pl-${10 + (n % 3)}`
      return await call({ auth: basic(user, secret), body: base64(csr(newKey(), user)) })
    }),
  )
  expect(all.filter(({ status }) => status === 200)).toHaveLength(1)
})

test('a lost answer is asked for again with the same key; the old certificate ends when the new one was used', async () => {
  const [one, two, three] = [newKey(), newKey(), newKey()]
  const secret = await token('pl-3')
  await enrol('pl-3', secret, one)
  const first = { cert: await enrol('pl-3', secret, one), key: one.pem, path: reenroll }
  await call({ ...first, body: base64(csr(two, 'pl-3')) })
  const second = { cert: certificateIn(await call({ ...first, body: base64(csr(two, 'pl-3')) })), key: two.pem, path: reenroll }
  await call({ ...second, body: base64(csr(three, 'pl-3')) })
  expect((await call({ ...first, body: base64(csr(three, 'pl-3')) })).status).toBe(403)
  expect(await lastReason('pl-3')).toBe('certificate.replaced')
})

test('suspended, it gets nothing; reinstated it does; revoked, never again', async () => {
  const key = newKey()
  const own = { cert: await enrol('pl-4', await token('pl-4'), key), key: key.pem, path: reenroll }
  const again = async (): Promise<number> => (await call({ ...own, body: base64(csr(newKey(), 'pl-4')) })).status
  await world.client.call('device.suspend', { params: { id: 'pl-4' }, body: { reason: 'test' } })
  expect(await again()).toBe(403)
  await world.client.call('device.reinstate', { params: { id: 'pl-4' } })
  expect(await again()).toBe(200)
  await world.client.call('device.revoke', { params: { id: 'pl-4' }, body: { reason: 'test' } })
  expect(await again()).toBe(403)
})

describe('a connection that stays open', () => {
  /** One TLS connection of this certificate, over which a first request was answered. */
  const opened = async (
    device: string,
  ): Promise<{ ask: () => Promise<{ status: number; port: number | undefined }>; socket: () => Socket; stop: () => void }> => {
    const key = newKey()
    const agent = new Agent({ keepAlive: true, maxSockets: 1, ca: root, cert: await enrol(device, await token(device), key), key: key.pem })
    let socket: Socket | undefined
    const ask = async (): Promise<{ status: number; port: number | undefined }> => {
      const body = base64(csr(newKey(), device))
      return await new Promise((resolve, reject) => {
        const asked = request(
          { host: '127.0.0.1', port, path: reenroll, method: 'POST', agent, headers: { 'content-type': 'application/pkcs10' } },
          (response) => {
            socket = response.socket
            const local = response.socket.localPort
            response.resume().on('end', () => resolve({ status: response.statusCode ?? 0, port: local }))
          },
        )
        asked.on('error', reject)
        asked.end(body)
      })
    }
    const [one, two] = [await ask(), await ask()]
    expect([one.status, two.status, one.port === two.port]).toEqual([200, 200, true])
    return { ask, socket: () => socket as Socket, stop: () => agent.destroy() }
  }

  test.each([
    ['suspended', 'device.suspend', 'pl-13', 'pl-14'],
    ['revoked', 'device.revoke', 'pl-15', 'pl-16'],
  ] as const)('%s between two requests: cut while it is idle, and no other; then refused', async (_how, order, device, other) => {
    const [control, one] = [await opened(other), await opened(device)]
    await Promise.all([control.ask(), one.ask()])
    await expectCut({
      order: async () => await world.client.call(order, { params: { id: device }, body: { reason: 'lost' } }),
      isCut: () => one.socket().destroyed,
      durable: () => steps.at(`${order.slice('device.'.length)}.committed`),
    })
    expect((await one.ask()).status).toBe(403)
    expect(await lastReason(device)).toBe(order === 'device.suspend' ? 'certificate.held' : 'certificate.revoked')
    expect((await control.ask()).status).toBe(200)
    one.stop()
    control.stop()
  })
})

describe('hostile requests', () => {
  let good: string
  let key: Key
  let own: { cert: string; key: string }
  beforeAll(async () => {
    key = newKey()
    own = { cert: await enrol('pl-5', await token('pl-5'), key), key: key.pem }
    good = await token('pl-6')
  })
  const body = (name = 'pl-6'): string => base64(csr(newKey(), name))
  const auth = (): string => basic('pl-6', good)
  const re = (of: Partial<Call>): Call => ({ ...own, path: reenroll, body: body('pl-5'), ...of })
  const stranger = (): { cert: string; key: string } => {
    const made = makeElement(makeIdevidCa(Date.now()), 'PL-5', Date.now())
    return { cert: toPem('CERTIFICATE', made.certificate), key: made.key.export({ format: 'pem', type: 'pkcs8' }) as string }
  }
  const p384 = (): Uint8Array => csr(newKey('secp384r1'), 'pl-6')
  const password = sequence(oid(oids.challengePassword), set(der(tags.utf8, new TextEncoder().encode('bound'))))

  const cases: readonly (readonly [string, number, () => Call])[] = [
    ['another operation', 404, () => ({ path: '/.well-known/est/serverkeygen' })],
    ['a label', 404, () => ({ path: '/.well-known/est/other/simpleenroll', auth: auth(), body: body() })],
    ['dots in the path', 404, () => ({ path: '/.well-known/est/../est/simpleenroll', auth: auth(), body: body() })],
    ['a query', 404, () => ({ path: '/.well-known/est/simpleenroll?x=1', auth: auth(), body: body() })],
    ['a property of every object', 404, () => ({ path: '/.well-known/est/constructor' })],
    ['the operators’ API', 404, () => ({ method: 'GET', path: '/api/1/devices' })],
    ['enrolment by GET', 405, () => ({ method: 'GET' })],
    ['cacerts by POST', 405, () => ({ path: '/.well-known/est/cacerts' })],
    ['another content type', 415, () => ({ type: 'application/json', auth: auth(), body: body() })],
    ['a body without end', 413, () => ({ auth: auth(), body: 'A'.repeat(40_000) })],
    ['no body', 400, () => ({ auth: auth(), body: '' })],
    ['DER without base64', 400, () => ({ auth: auth(), body: Buffer.from(csr(newKey(), 'pl-6')).toString('latin1') })],
    ['base64 with other letters', 400, () => ({ auth: auth(), body: `${body().slice(0, 40)}-_${body().slice(42)}` })],
    ['PEM', 400, () => ({ auth: auth(), body: toPem('CERTIFICATE REQUEST', csr(newKey(), 'pl-6')) })],
    ['bytes that are no request', 400, () => ({ auth: auth(), body: base64(randomBytes(300)) })],
    ['bytes behind the request', 400, () => ({ auth: auth(), body: base64(Buffer.concat([csr(newKey(), 'pl-6'), Buffer.alloc(3)])) })],
    ['nobody', 401, () => ({ body: body() })],
    ['a bearer token', 401, () => ({ auth: `Bearer ${good}`, body: body() })],
    ['a password that is no token', 401, () => ({ auth: basic('pl-6', 'secret'), body: body() })],
    ['no user', 401, () => ({ auth: basic('', good), body: body() })],
    ['an unknown token', 401, () => ({ auth: basic('pl-6', `fkt1-${randomBytes(48).toString('base64url')}`), body: body() })],
    [
      'the public half of a token with another secret',
      401,
      () => ({
        auth: basic('pl-6', `fkt1-${Buffer.concat([Buffer.from(good.slice(5), 'base64url').subarray(0, 16), randomBytes(32)]).toString('base64url')}`),
        body: body(),
      }),
    ],
    ['an unknown device', 401, () => ({ auth: basic('pl-99', good), body: body() })],
    ['a token for another device', 403, () => ({ auth: basic('pl-7', good), body: body('pl-7') })],
    ['a device with a hardware key, by token', 403, () => ({ auth: basic('se-1', good), body: body('se-1') })],
    ['a token and a certificate', 403, () => ({ ...own, auth: auth(), body: body() })],
    ['another subject', 403, () => ({ auth: auth(), body: body('pl-7') })],
    ['a key of another', 403, () => ({ auth: auth(), body: base64(csr(key, 'pl-6')) })],
    ['a request that its key did not sign', 401, () => ({ auth: auth(), body: base64(csr(newKey(), 'pl-6', { signer: newKey() })) })],
    ['a P-384 key', 400, () => ({ auth: auth(), body: base64(p384()) })],
    ['a challenge password', 400, () => ({ auth: auth(), body: base64(csr(newKey(), 'pl-6', { attributes: [password] })) })],
    ['the name of another device', 403, () => ({ auth: auth(), body: base64(csr(newKey(), 'pl-6', { names: uri('spiffe://default/device/pl-7') })) })],
    ['re-enrolment without certificate', 401, () => ({ path: reenroll, body: body('pl-5') })],
    ['re-enrolment by a foreign certificate', 401, () => re(stranger())],
    ['re-enrolment with a token besides', 403, () => re({ auth: auth() })],
    ['re-enrolment as another', 403, () => re({ body: body('pl-6') })],
    ['re-enrolment for another name', 403, () => re({ body: base64(csr(newKey(), 'pl-5', { names: uri('spiffe://default/device/pl-6') })) })],
    ['enrolment by the certificate of a device', 403, () => ({ ...own, body: body('pl-5') })],
  ]
  test.each(cases)('%s', async (_name, status, make) => {
    const before = (await world.client.call('status')).devices
    const answer = await call(make())
    expect({ status: answer.status, body: answer.body }).toMatchObject({ status, body: expect.stringMatching(/^[a-z-]+\n$/) })
    if (status === 401) expect(answer.headers['www-authenticate']).toMatch(/^Basic /)
    expect((await world.client.call('status')).devices).toEqual(before)
  })

  test('after all of them the token is as good as before', async () => expect(new X509Certificate(await enrol('pl-6', good, newKey())).subject).toBe('CN=pl-6'))
})

test('cacerts while the root changes: openssl finds the way from the old root to the next CA', async () => {
  await world.client.call('ca.prepare', { body: { root: true } })
  await world.client.call('ca.distribute')
  const all = certificatesIn((await call({ method: 'GET', path: '/.well-known/est/cacerts' })).body)
  expect(all).toHaveLength(6)
  expect(all[1]?.replace(/\s/g, '')).toBe(root.replace(/\s/g, ''))
  const next = all.find((pem) => new X509Certificate(pem).subject.includes('issuing CA 2')) ?? ''
  writeFileSync(at('next.pem'), next)
  // The next root signed by itself leads nowhere from the old one; openssl would stop there.
  const led = all.filter((pem) => !new X509Certificate(pem).verify(new X509Certificate(pem).publicKey))
  writeFileSync(at('all.pem'), led.join(''))
  const out = execFileSync('openssl', ['verify', '-x509_strict', '-trusted', at('root.pem'), '-untrusted', at('all.pem'), at('next.pem')], { encoding: 'utf8' })
  expect(out).toContain('OK')
})

test('the table of reasons in the documentation is the one of the code', () => {
  const docs = readFileSync(new URL('../docs/protocol.md', import.meta.url), 'utf8')
  for (const [code, { meaning, remedy }] of Object.entries(estReasons)) expect(docs).toContain(`| \`${code}\` | ${meaning} | ${remedy} |`)
})
