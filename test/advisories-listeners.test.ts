import { generateKeyPairSync, randomBytes, type KeyObject } from 'node:crypto'
import { once } from 'node:events'
import { mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { request as plain } from 'node:http'
import { request } from 'node:https'
import { connect as connectTcp } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect as connectTls, type ConnectionOptions } from 'node:tls'
import { afterAll, beforeAll, describe, expect, test, vi } from 'vitest'
import { createClient } from '@fleetkey/cli/client.ts'
import { newTlsKey, tlsCsr } from '@fleetkey/device-agent/tls-key.ts'
import { makeElement, makeIdevidCa } from '@fleetkey/firmware-sim/factory/idevid-ca.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { readSettings, SettingsError } from '@fleetkey/server/config.ts'
import { startServer } from '@fleetkey/server/main.ts'
import { certificatesIn } from './est-answer.ts'
import { dial, packetType } from './mqtt-wire.ts'
import { openWorld, type World } from './world.ts'

/** What went wrong in others, done to every listener of a server in a process of its own; after each attack the same process still serves. */

// Hundreds of handshakes, and seconds of a machine that has others to serve.
vi.setConfig({ testTimeout: 180_000 })

let world: World
/** Certificates and keys of two devices, PEM: those of the first also in what the second tries. */
interface Own {
  readonly cert: string
  readonly key: string
}
let [one, other]: Own[] = []
let batch: string
let owner: string
/** Of operators with less than every right. */
let auditor: string

const pem = (key: KeyObject): string => key.export({ format: 'pem', type: 'pkcs8' }) as string

interface Asked {
  readonly status: number
  readonly text: string
}
/** One request over TLS, its path sent as it is. */
const ask = async (
  of: ConnectionOptions & {
    readonly port: number
    readonly path: string
    readonly method?: string
    readonly headers?: Readonly<Record<string, string>>
    readonly body?: string | Buffer
  },
): Promise<Asked> =>
  await new Promise((resolve, reject) => {
    const { body, ...rest } = of
    const outgoing = request({ host: '127.0.0.1', rejectUnauthorized: false, agent: false, method: 'GET', ...rest }, (incoming) => {
      let text = ''
      incoming.on('data', (chunk: Buffer) => (text += chunk.toString()))
      incoming.on('end', () => resolve({ status: incoming.statusCode ?? 0, text }))
      incoming.on('error', reject)
    })
    outgoing.on('error', reject)
    outgoing.end(body)
  })
const admin = async (path: string, of: { token?: string; method?: string; body?: string | Buffer } & Partial<Own> = {}): Promise<Asked> => {
  const { token, ...rest } = of
  return await ask({ port: world.server.httpsPort, path, headers: token === undefined ? {} : { authorization: `Bearer ${token}` }, ...rest })
}
const est = async (path: string, of: { auth?: string; body?: string; method?: string } & Partial<Own> = {}): Promise<Asked> => {
  const { auth, ...rest } = of
  const headers = { 'content-type': 'application/pkcs10', ...(auth === undefined ? {} : { authorization: auth }) }
  return await ask({ port: world.server.estPort ?? 0, path: `/.well-known/est/${path}`, method: 'POST', headers, ...rest })
}
const basic = (user: string, password: string): string => `Basic ${Buffer.from(`${user}:${password}`).toString('base64')}`
const status = async (path: string, body?: Buffer): Promise<number> =>
  await new Promise((resolve, reject) => {
    const outgoing = plain(
      { host: '127.0.0.1', port: world.server.httpPort ?? 0, path, agent: false, method: body === undefined ? 'GET' : 'POST' },
      (incoming) => resolve(incoming.resume().statusCode ?? 0),
    )
    outgoing.on('error', reject)
    outgoing.end(body)
  })
/** Whether every listener of the same process answers: one that ended by itself is not started again. */
const serves = async (): Promise<boolean> => {
  const wire = await dial(world.server.mqttPort, one)
  const codes = [
    (await admin('/readyz')).status,
    (await est('cacerts', { method: 'GET' })).status,
    await status('/ca/root.cer'),
    await wire.connect({ id: 'pl-1', username: 'pl-1' }),
  ]
  await wire.close()
  return codes.join() === '200,200,200,0'
}
/** CONNACK (MQTT 3.1.1 §3.2.2.3): bad user name or password, not authorised. */
const refused = [4, 5]
const tlsPorts = (): readonly number[] => [world.server.mqttPort, world.server.httpsPort, world.server.estPort ?? 0]

const enrol = async (id: string): Promise<Own> => {
  const key = newTlsKey()
  const csr = Buffer.from(await tlsCsr(key, id)).toString('base64')
  const { text } = await est('simpleenroll', { auth: basic(id, await world.token(batch, { device: id })), body: csr })
  return { cert: certificatesIn(text)[0] ?? '', key: pem(key.private) }
}

beforeAll(async () => {
  world = await openWorld({ apart: true, args: ['--est-port', '0', '--http-port', '0'] })
  batch = await world.enlist([{ serial: 'PL-1' }, { serial: 'PL-2' }, { serial: 'PL-3' }], 'open')
  await world.client.call('group.policy.set', { params: { id: 'open' }, body: { connectionProof: false } })
  ;[one, other] = [await enrol('pl-1'), await enrol('pl-2')]
  owner = (JSON.parse(readFileSync(world.server.cliFile, 'utf8')) as { token: string }).token
  auditor = (await world.client.call('operator.add', { body: { id: 'ada', roles: ['auditor'] } })).token
}, 120_000)
afterAll(async () => await world.stop())

describe('who comes', () => {
  test('Keylime CVE-2026-1709: at every listener, without certificate or with one that is none of ours', async () => {
    const stranger = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    expect(stranger.privateKey.type).toBe('private')
    const made = makeElement(makeIdevidCa(Date.now()), 'PL-1', Date.now())
    const foreign = { cert: toPem('CERTIFICATE', made.certificate), key: pem(made.key) }
    const csr = Buffer.from(await tlsCsr(newTlsKey(), 'pl-1')).toString('base64')
    for (const own of [{}, foreign, other]) {
      const wire = await dial(world.server.mqttPort, own)
      expect(refused).toContain(await wire.connect({ id: 'pl-1', username: 'pl-1' }))
      await wire.close()
      expect((await est('simplereenroll', { body: csr, ...own })).status).toBe(own === other ? 403 : 401)
    }
    expect((await est('simplereenroll', { body: csr, ...one })).status).toBe(200)
    // A device's certificate is no operator's token.
    for (const own of [{}, foreign, one]) expect((await admin('/api/1/devices', own)).status).toBe(401)
  })

  test('EMQX CVE-2026-6564: whoever claims the name of a live session does not end it', async () => {
    const live = await dial(world.server.mqttPort, one)
    expect(await live.connect({ id: 'pl-1', username: 'pl-1' })).toBe(0)
    expect(await live.subscribe('fk/1/pl-1/down')).toEqual([1])
    for (const [own, username] of [
      [{}, 'pl-1'],
      [other, 'pl-1'],
      [other, 'pl-2'],
    ] as const) {
      const wire = await dial(world.server.mqttPort, own)
      expect(refused).toContain(await wire.connect({ id: 'pl-1', username }))
      await wire.close()
    }
    live.write(Buffer.from([packetType.pingreq << 4, 0]))
    for (;;) {
      const packet = await live.next()
      if (packet === 'closed') throw new Error('the session was taken')
      if (packet.type === packetType.pingresp) break
    }
    await live.close()
  })

  test('mosquitto CVE-2017-7650: a client id or user name that is a pattern gets no right', async () => {
    for (const name of ['#', '+', '+/#', '$SYS', 'pl-1/#', 'pl-+', '*'])
      for (const words of [
        { id: name, username: name },
        { id: name, username: 'pl-1' },
        { id: 'pl-1', username: name },
      ]) {
        const wire = await dial(world.server.mqttPort, one)
        expect(words.id === 'pl-1' ? refused : [2]).toContain(await wire.connect(words))
        await wire.close()
      }
  })

  test('CVE-2026-49186: no wildcard, shared or foreign subscription is granted', async () => {
    const wire = await dial(world.server.mqttPort, one)
    expect(await wire.connect({ id: 'pl-1', username: 'pl-1' })).toBe(0)
    const filters = ['#', '+/+/+/+', 'fk/1/+/down', 'fk/1/pl-2/down', '$SYS/#', '$share/g/fk/1/pl-2/down', 'fk/1/pl-1/#', 'fk/1/g/open/0']
    expect(await wire.subscribe(...filters, 'fk/1/pl-1/down')).toEqual([...filters.map(() => 128), 1])
    await wire.close()
  })

  test('SPIRE 1.14.3 (#6715): no listener resumes a session, the operators’ included', async () => {
    for (const port of tlsPorts())
      for (const maxVersion of ['TLSv1.3', 'TLSv1.2'] as const) {
        if (maxVersion === 'TLSv1.2' && port !== world.server.estPort) continue
        const sessions: Buffer[] = []
        const first = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, maxVersion })
        first.on('session', (session: Buffer) => void sessions.push(session))
        await once(first, 'secureConnect')
        // HTTP answers, so that tickets that come after the handshake are there; MQTT closes.
        const end = once(first, 'close')
        first.resume().write('GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n')
        await end
        for (const session of [...sessions, first.getSession()]) {
          const again = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, maxVersion, ...(session === undefined ? {} : { session }) })
          await once(again, 'secureConnect')
          expect([port, maxVersion, again.isSessionReused()]).toEqual([port, maxVersion, false])
          again.destroy()
        }
      }
  })
})

describe('what is asked', () => {
  test('OpenBao CVE-2026-3605, GHSA-xp3c-3jw3-4vcr: a path has one spelling, and no other reaches what it names', async () => {
    const spellings = ['/api/1/devices', '/api/1/audit', '/api/1/audit/export'].flatMap((path) => {
      const [, , , last = ''] = path.split('/')
      return [
        `/api/1/x/..${path.slice('/api/1'.length)}`,
        `/api/1/groups/../${last}`,
        `/api/1/./${last}`,
        `/api/1//${last}`,
        `/${path}`,
        `//host${path}`,
        `/api/1\\${last}`,
        `/api/1/%64${last.slice(1)}`,
        `/api/1/%2e%2e/1/${last}`,
        `/api%2f1%2f${last}`,
        `${path}/`,
        `${path};x`,
        `/API/1/${last}`,
        `https://host${path}`,
      ]
    })
    for (const path of spellings)
      for (const token of [undefined, auditor, owner]) expect([path, (await admin(path, token === undefined ? {} : { token })).status]).toEqual([path, 404])
    // Listing asks for the same right as reading one.
    for (const path of ['/api/1/audit', '/api/1/audit?limit=1', '/api/1/audit/export']) expect((await admin(path, { token: auditor })).status).toBe(200)
    for (const path of ['cacerts/../simpleenroll', './simpleenroll', '../est/simpleenroll', 'label/simpleenroll', '%73impleenroll', 'simpleenroll/'])
      expect([path, (await est(path, { body: 'AAAA' })).status]).toEqual([path, 404])
    for (const path of ['/crl/../ca/root.cer', '/crl/..%2fca%2froot.cer', '/ca//root.cer', '/crl/%2e%2e/%2e%2e/etc/passwd', '/ca/__proto__'])
      expect([path, await status(path)]).toEqual([path, 404])
    // What no URL parser takes is no fault of the server.
    for (const path of ['//[', '//:x', 'http://[::1', '/api/1/devices/%'])
      for (const token of [undefined, owner]) expect([path, (await admin(path, token === undefined ? {} : { token })).status]).toEqual([path, 404])
    expect(world.lines.join('')).not.toContain('Invalid URL')
    expect(await serves()).toBe(true)
  })

  test(
    'OpenBao CVE-2025-59043, CVE-2024-8185: nothing is read before the right is known, and what is read is small once it is built',
    { timeout: 60_000 },
    async () => {
      const heavy = Buffer.from(`[${'[],'.repeat(7_000_000)}[]]`)
      /** Status and milliseconds; null when the connection ended before everything was written, as it may where nobody reads on. */
      const post = async (path: string, body: Buffer, token?: string): Promise<{ readonly status: number | null; readonly took: number }> => {
        const begun = performance.now()
        const said = await admin(path, { method: 'POST', body, ...(token === undefined ? {} : { token }) }).catch(() => ({ status: null }))
        return { status: said.status, took: performance.now() - begun }
      }
      for (const token of [undefined, 'z'.repeat(43), auditor]) expect([401, 403, null]).toContain((await post('/api/1/batches', heavy, token)).status)
      const bodies = [
        heavy,
        Buffer.from('['.repeat(20_000_000)),
        Buffer.from(`{"content":${'{"a":'.repeat(1_000_000)}1${'}'.repeat(1_000_000)}}`),
        Buffer.from(`{${Array.from({ length: 500_000 }, (_, at) => `"${at.toString(36)}":0`).join(',')}}`),
      ]
      const waiting = bodies.map(async (body) => await post('/api/1/batches', body, owner))
      // Others are served meanwhile.
      const asked = performance.now()
      expect((await admin('/healthz')).status).toBe(200)
      expect(performance.now() - asked).toBeLessThan(10_000)
      for (const { status: said } of await Promise.all(waiting)) expect(said).toBe(400)
      for (const text of ['[', '{"share":'.repeat(9_000), `{"share":"${'A'.repeat(70_000)}"}`])
        expect([400, null]).toContain((await post('/api/1/seal/shares', Buffer.from(text))).status)
      expect(await serves()).toBe(true)
    },
  )

  test('OpenBao CVE-2026-39946: quotes and names of columns are text', async () => {
    const { total } = await world.client.call('device.list', { query: {} }).then(({ items }) => ({ total: items.length }))
    for (const text of ["' OR 1=1 --", '"; DROP TABLE device; --', 'id', '%', '_', "pl-1'--", '\\', '\u0000'])
      for (const path of [
        'devices?state=',
        'devices?search=',
        'devices?after=',
        'certificates?device=',
        'certificates?search=',
        'certificates?state=',
        'audit?subject=',
      ]) {
        const said = await admin(`/api/1/${path}${encodeURIComponent(text)}`, { token: owner })
        expect([200, 400, 404]).toContain(said.status)
        if (said.status === 200 && !path.endsWith('after=')) expect([path, text, said.text]).toEqual([path, text, expect.stringContaining('"items":[]')])
      }
    expect((await world.client.call('device.list', { query: {} })).items).toHaveLength(total)
  })

  test('SPIRE 1.9.3: how much is answered is bounded before anything is reserved for it', async () => {
    for (const path of ['devices', 'certificates', 'audit', 'groups'])
      for (const limit of ['1000000000', '4294967297', '-1', '1e9', 'NaN', '0'])
        expect([path, limit, (await admin(`/api/1/${path}?limit=${limit}`, { token: owner })).status]).toEqual([path, limit, 400])
  })
})

describe('what is sent', () => {
  /** Raw bytes, and however the other end ends it. */
  const throwAt = async (port: number, bytes: Uint8Array): Promise<void> => {
    const socket = connectTcp(port, '127.0.0.1')
    socket.on('error', () => undefined)
    socket.resume()
    await new Promise((resolve) => void socket.once('connect', resolve).once('close', resolve))
    socket.end(bytes)
    await new Promise((resolve) => {
      socket.once('close', resolve)
      setTimeout(resolve, 1_000)
    })
    socket.destroy()
  }
  const length = (bytes: Uint8Array, size: number): Buffer => {
    const head = Buffer.alloc(4)
    head.writeUInt32BE(bytes.length)
    return Buffer.concat([head.subarray(4 - size), bytes])
  }
  /** ClientHello (RFC 8446 §4.1.2) with these extensions, as they are. */
  const clientHello = (...extensions: readonly (readonly [number, Uint8Array])[]): Buffer => {
    const list = Buffer.concat(extensions.map(([type, data]) => Buffer.concat([Buffer.from([type >> 8, type & 0xff]), length(data, 2)])))
    const body = Buffer.concat([
      Buffer.from([3, 3]),
      randomBytes(32),
      Buffer.from([0]),
      length(Buffer.from([0x13, 1, 0xc0, 0x2b]), 2),
      Buffer.from([1, 0]),
      length(list, 2),
    ])
    return Buffer.concat([Buffer.from([22, 3, 1]), length(Buffer.concat([Buffer.from([1]), length(body, 3)]), 2)])
  }
  const versions = [43, Buffer.from([2, 3, 4])] as const
  const groups = [10, Buffer.from([0, 2, 0, 23])] as const
  const schemes = [13, Buffer.from([0, 2, 4, 3])] as const
  const serverName = (name: Uint8Array, type = 0): readonly [number, Uint8Array] => [0, length(Buffer.concat([Buffer.from([type]), length(name, 2)]), 2)]
  const alpn = (...names: readonly Uint8Array[]): readonly [number, Uint8Array] => [16, length(Buffer.concat(names.map((name) => length(name, 1))), 2)]

  test('node CVE-2026-21637: nothing in a ClientHello ends the process', async () => {
    const hellos = [
      serverName(Buffer.from('a\0b')),
      serverName(Buffer.alloc(0)),
      serverName(Buffer.alloc(16_000, 0x61)),
      serverName(Buffer.from([0xff, 0xfe])),
      serverName(Buffer.from('localhost'), 7),
      [0, Buffer.from([0, 200, 0])] as const,
      alpn(Buffer.alloc(0)),
      alpn(Buffer.alloc(255, 0xff)),
      alpn(Buffer.from('mqtt\0')),
      alpn(...Array.from({ length: 4_000 }, () => Buffer.from('xyz'))),
      alpn(Buffer.from('__proto__'), Buffer.from('h2')),
      [16, Buffer.from([0, 9, 200])] as const,
      [41, randomBytes(60)] as const,
      [42, Buffer.alloc(0)] as const,
      [0xffff, randomBytes(2_000)] as const,
    ]
    for (const port of tlsPorts())
      for (const extension of hellos) {
        await throwAt(port, clientHello(versions, groups, schemes, extension))
        await throwAt(port, clientHello(groups, schemes, extension))
      }
    for (const port of tlsPorts())
      for (const options of [{ ALPNProtocols: ['x'] }, { ALPNProtocols: ['h2'] }, { servername: 'xn--a.example' }, { servername: '*.localhost' }] as const) {
        const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, ...options })
        socket.on('error', () => undefined)
        await new Promise((resolve) => void socket.once('secureConnect', resolve).once('close', resolve))
        socket.destroy()
      }
    expect(await serves()).toBe(true)
  })

  test('node CVE-2025-59465: HTTP/2 is spoken nowhere, and its frames harm nothing', async () => {
    const preface = Buffer.from('PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n')
    const frame = (type: number, flags: number, stream: number, body: Uint8Array): Buffer => {
      const id = Buffer.alloc(4)
      id.writeUInt32BE(stream)
      return Buffer.concat([length(body, 3).subarray(0, 3), Buffer.from([type, flags]), id, body])
    }
    // A HEADERS frame that refers to a table of HPACK that is not there, with a length that it has not.
    const frames = [
      frame(4, 0, 0, Buffer.alloc(0)),
      frame(1, 5, 1, Buffer.alloc(16_000, 0xff)),
      frame(1, 0x2d, 3, Buffer.from([200, 1])),
      frame(9, 4, 1, randomBytes(100)),
    ]
    for (const port of tlsPorts()) {
      const socket = connectTls({ port, host: '127.0.0.1', rejectUnauthorized: false, ALPNProtocols: ['h2', 'http/1.1', 'mqtt'] })
      socket.on('error', () => undefined)
      await once(socket, 'secureConnect')
      expect(socket.alpnProtocol).not.toBe('h2')
      const closed = once(socket, 'close')
      socket.resume().write(Buffer.concat([preface, ...frames]))
      await closed
    }
    await throwAt(world.server.httpPort ?? 0, Buffer.concat([preface, ...frames]))
    expect(await serves()).toBe(true)
  })
})

describe('what lies in files', () => {
  test('mosquitto CVE-2017-9868: nothing in the data folder is for anybody but its owner, wherever it is copied', () => {
    const data = join(world.folder, 'server')
    const paths = [data, ...readdirSync(data, { recursive: true, encoding: 'utf8' }).map((name) => join(data, name))]
    expect(paths.length).toBeGreaterThan(10)
    expect(paths.filter((path) => ((statSync(path, { throwIfNoEntry: false })?.mode ?? 0) & 0o077) !== 0)).toEqual([])
  })

  test.each([
    ['an empty configuration', 'config', ''],
    ['a configuration that ends in the middle', 'config', '{"profiles": {"device-tls": {"day'],
    ['a configuration that is a list', 'config', '[]'],
    ['a profile that there is not', 'config', '{"profiles": {"device": {}}}'],
    ['an empty webhook secret', 'webhook', ''],
    ['an empty passphrase', 'passphrase', ''],
  ])('mosquitto CVE-2018-12550 and -12551, CVE-2017-7652, EMQX #13432: %s is not “everything allowed”: the server does not start', async (_, kind, content) => {
    const folder = mkdtempSync(join(tmpdir(), 'fk-empty-'))
    try {
      const file = join(folder, 'file')
      writeFileSync(file, content, { mode: 0o600 })
      const config = join(folder, 'config.json')
      writeFileSync(config, JSON.stringify({ alerts: { webhook: { url: 'https://127.0.0.1:1/', secretFile: file } } }))
      const args = { config: ['--config', file], webhook: ['--config', config], passphrase: ['--passphrase-file', file] }[kind] ?? []
      const start = async (): Promise<unknown> =>
        await startServer(readSettings(['--data', join(folder, 'data'), '--mqtt-port', '0', '--https-port', '0', ...args], {}), { log: () => undefined })
      if (kind === 'passphrase') await expect(start()).rejects.toMatchObject({ reason: 'kms.passphrase' })
      else await expect(start()).rejects.toBeInstanceOf(SettingsError)
    } finally {
      rmSync(folder, { recursive: true, force: true })
    }
  })
})

test('EMQX #17653: no operator gives, takes or changes what is another’s', async () => {
  const { server, ca } = JSON.parse(readFileSync(world.server.cliFile, 'utf8')) as { server: string; ca: string }
  const lesser = createClient({ server, ca, token: auditor })
  try {
    for (const work of [
      async () => await lesser.call('operator.add', { body: { id: 'ada', roles: ['owner'] } }),
      async () => await lesser.call('operator.add', { body: { id: 'owner', roles: ['auditor'] } }),
      async () => await lesser.call('ca.prepare', { body: { root: false } }),
      async () => await lesser.call('device.revoke', { params: { id: 'pl-1' }, body: { reason: 'x' } }),
    ])
      await expect(work()).rejects.toMatchObject({ code: 'forbidden' })
  } finally {
    lesser.close()
  }
})

test('SPIRE #6732: no token, in its place or another, is in log, audit log or data folder', async () => {
  const secrets = [auditor, owner, await world.token(batch), 'q'.repeat(43)]
  for (const secret of secrets) {
    const held = secret === auditor || secret === owner
    for (const path of [`/api/1/devices?access_token=${secret}`, `/api/1/devices/${secret}`, `/${secret}`, `/api/1/audit/export?token=${secret}`]) {
      await admin(path)
      await admin(path, { token: 'w'.repeat(43) })
    }
    if (!held) await admin('/api/1/devices', { token: secret })
    await admin('/api/1/groups', { token: owner, method: 'POST', body: JSON.stringify({ id: 'g', token: secret }) })
    for (const path of [`simpleenroll?token=${secret}`, 'simpleenroll']) await est(path, { body: 'AAAA', auth: basic('pl-3', secret) })
    await est('simpleenroll', { body: secret, auth: basic(secret, 'x') })
    const wire = await dial(world.server.mqttPort)
    await wire.connect({ id: 'pl-1', username: 'pl-1', password: secret })
    await wire.close()
  }
  // Refusals of strangers are written once a minute, and when the server stops.
  await world.restart()
  const exported = (await admin('/api/1/audit/export', { token: owner })).text
  expect(exported).toContain('no bearer token')
  const files = readdirSync(join(world.folder, 'server'), { recursive: true, encoding: 'utf8' })
    .map((name) => join(world.folder, 'server', name))
    .filter((path) => statSync(path).isFile() && path !== world.server.cliFile)
  for (const secret of secrets) {
    expect(exported.includes(secret)).toBe(false)
    expect(world.lines.join('').includes(secret)).toBe(false)
    for (const path of files) expect([path, readFileSync(path).includes(secret)]).toEqual([path, false])
  }
})
