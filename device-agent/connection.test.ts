import { spawn } from 'node:child_process'
import { constants } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import type { AddressInfo } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { createServer, type SecureVersion, type Server, type TLSSocket } from 'node:tls'
import { verifySignature } from '@fleetkey/protocol/signed.ts'
import { connectProof, exporterLabel } from '@fleetkey/protocol/transcript.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import fc from 'fast-check'
import { afterEach, describe, expect, test } from 'vitest'
import { checkServerTime, ConnectionRefused, openConnection, type Connection, type ConnectionOptions } from './connection.ts'
import { random } from './test-keys.ts'
import { testCertificate } from './test-certificates.ts'
import { day, keyPair, testServer } from './test-server.ts'
import { openTlsMemory, type TlsMemory } from './tls.ts'

const now = Date.now()
const pki = testServer({ start: now })
const other = testServer({ start: now })
const [tls, device, ldevid] = [keyPair(), keyPair(), keyPair()]
const certificate = pki.issue({ subject: '127.0.0.1', spki: tls.spki, local: true })
const deviceCertificate = pki.issue({ subject: 'd-1', spki: device.spki })
const topics = { up: 'fk/1/d-1/up', down: 'fk/1/d-1/down' }
const pem = (der: Uint8Array): string => toPem('CERTIFICATE', der)

/** MQTT 3.1.1 §2: type and flags, remaining length (below 16 KiB here), content. */
const packet = (head: number, content: Uint8Array): Uint8Array =>
  Buffer.concat([content.length < 128 ? Uint8Array.of(head, content.length) : Uint8Array.of(head, (content.length & 127) | 128, content.length >> 7), content])
const string = (text: string | Uint8Array): Uint8Array => Buffer.concat([Uint8Array.of(text.length >> 8, text.length & 255), Buffer.from(text)])
const connack = (code: number): Uint8Array => packet(0x20, Uint8Array.of(0, code))
const suback = (content: Uint8Array, code = 1): Uint8Array => packet(0x90, Uint8Array.of(content[0] ?? 0, content[1] ?? 0, code))
const publish = (topic: string, payload: Uint8Array): Uint8Array => packet(0x30, Buffer.concat([string(topic), payload]))
const puback = (content: Uint8Array): Uint8Array => {
  const id = 2 + (((content[0] ?? 0) << 8) | (content[1] ?? 0))
  return packet(0x40, content.subarray(id, id + 2))
}

type Answer = (socket: TLSSocket, type: number, content: Uint8Array) => void
/** Answers as a broker does. */
const broker: Answer = (socket, type, content) => {
  if (type === 1) socket.write(connack(0))
  else if (type === 8) socket.write(suback(content))
  else if (type === 3) socket.write(puback(content))
}

const servers: Server[] = []
const connections: Connection[] = []
const sockets = new Set<TLSSocket>()
afterEach(async () => {
  for (const connection of connections.splice(0)) connection.destroy()
  for (const socket of sockets) socket.destroy()
  await Promise.all(servers.splice(0).map(async (server) => await new Promise((resolve) => server.close(resolve))))
})

interface ServerOptions {
  readonly answer?: Answer
  readonly onSocket?: (socket: TLSSocket) => void
  readonly certificate?: Uint8Array
  readonly chain?: Uint8Array
  readonly versions?: SecureVersion
  readonly wantsClients?: readonly Uint8Array[]
  /** Options of TLS, such as SSL_OP_NO_TICKET. */
  readonly secureOptions?: number
}
/** A TLS server that says whatever the case wants; its port. */
const serve = async (of: ServerOptions = {}): Promise<number> => {
  const server = createServer(
    {
      key: tls.private.export({ format: 'pem', type: 'pkcs8' }),
      cert: pem(of.certificate ?? certificate) + pem(of.chain ?? pki.issuing.der),
      maxVersion: of.versions ?? 'TLSv1.3',
      ALPNProtocols: ['mqtt'],
      ...(of.secureOptions === undefined ? {} : { secureOptions: of.secureOptions }),
      ...(of.wantsClients === undefined ? {} : { requestCert: true, rejectUnauthorized: true, ca: of.wantsClients.map(pem) }),
    },
    (socket) => {
      sockets.add(socket)
      socket.on('error', () => undefined)
      of.onSocket?.(socket)
      let waiting: Buffer = Buffer.alloc(0)
      socket.on('data', (chunk: Buffer) => {
        waiting = Buffer.concat([waiting, chunk])
        while (waiting.length >= 2) {
          const long = (waiting[1] ?? 0) >= 128
          const start = long ? 3 : 2
          const length = ((waiting[1] ?? 0) & 127) + (long ? (waiting[2] ?? 0) << 7 : 0)
          if (waiting.length < start + length) return
          const content = waiting.subarray(start, start + length)
          const type = (waiting[0] ?? 0) >> 4
          waiting = waiting.subarray(start + length)
          ;(of.answer ?? broker)(socket, type, content)
        }
      })
    },
  )
  servers.push(server)
  server.on('tlsClientError', () => undefined)
  await new Promise<void>((resolve) => server.listen(0, '127.0.0.1', resolve))
  return (server.address() as AddressInfo).port
}

const credentials = { key: device.private, certificates: [deviceCertificate, pki.issuing.der], sign: ldevid.sign }
const open = async (port: number, more: Partial<ConnectionOptions> = {}, abort?: AbortSignal) => {
  const messages: Uint8Array[] = []
  const closes: string[] = []
  const closed = Promise.withResolvers<string>()
  const connection = await openConnection(
    {
      server: { host: '127.0.0.1', port },
      trust: pki.trust(),
      time: { now, floor: now, signed: false },
      tenant: 'plant',
      client: 'd-1',
      credentials,
      topics,
      onMessage: (bytes) => void messages.push(bytes),
      onClose: (why) => {
        closes.push(why)
        closed.resolve(why)
      },
      ...more,
    },
    abort,
  )
  connections.push(connection)
  return { connection, messages, closes, closed: closed.promise }
}

describe('a connection', () => {
  test('signs its own exporter: the password proves the device on this very connection', async () => {
    let seen: { content: Uint8Array; exporter: Uint8Array } | undefined
    const port = await serve({
      wantsClients: [pki.root.der, pki.issuing.der],
      answer: (socket, type, content) => {
        if (type === 1) seen = { content, exporter: socket.exportKeyingMaterial(32, exporterLabel, Buffer.alloc(0)) }
        broker(socket, type, content)
      },
    })
    const { connection } = await open(port)
    expect(Buffer.from(connection.exporter)).toEqual(seen?.exporter)
    // Protocol name, level, flags and keep-alive take ten bytes; then client id, user name and password.
    const fields: string[] = []
    for (let rest = seen?.content.subarray(10) ?? new Uint8Array(0); rest.length > 0;) {
      const end = 2 + (((rest[0] ?? 0) << 8) | (rest[1] ?? 0))
      fields.push(Buffer.from(rest.subarray(2, end)).toString())
      rest = rest.subarray(end)
    }
    const [client, user, password] = fields
    expect([client, user]).toEqual(['d-1', 'd-1'])
    const proof = connectProof('plant', 'd-1', deviceCertificate, connection.exporter)
    expect(verifySignature(ldevid.spki, proof, Buffer.from(password ?? '', 'base64url'))).toBe(true)
    expect((await open(port)).connection.exporter).not.toEqual(connection.exporter)
  })

  test('gives what comes on its own topic, even before the subscription is confirmed, and nothing else', async () => {
    const [early, late] = [random(100), random(1_000)]
    const port = await serve({
      answer: (socket, type, content) => {
        if (type === 8) socket.write(publish(topics.down, early))
        broker(socket, type, content)
        if (type !== 3) return
        socket.write(publish('fk/1/d-2/down', random(10)))
        socket.write(publish(topics.up, random(10)))
        socket.write(publish(topics.down, late))
      },
    })
    const { connection, messages } = await open(port)
    await connection.send(random(200))
    await expect.poll(() => messages).toEqual([early, late])
  })

  test('ends once, whoever ends it; nothing can be sent afterwards', async () => {
    for (const end of ['close', 'destroy', 'server'] as const) {
      const port = await serve()
      const { connection, closes, closed } = await open(port)
      if (end === 'server') for (const socket of sockets) socket.destroy()
      else await connection[end]()
      await closed
      await connection.close()
      connection.destroy()
      expect(closes).toEqual([{ close: 'closed by the agent', destroy: 'dropped by the agent', server: 'the connection was closed' }[end]])
      await expect(connection.send(random(10))).rejects.toThrow(closes[0] ?? 'none')
    }
  })

  test('a message that is never acknowledged fails when the connection ends', async () => {
    const port = await serve({ answer: (socket, type, content) => (type === 3 ? void setTimeout(() => socket.destroy(), 20) : broker(socket, type, content)) })
    const { connection } = await open(port)
    await expect(connection.send(random(10))).rejects.toThrow()
  })

  test('is given up when the agent stops, at every moment', async () => {
    const silent = await serve({ answer: () => undefined })
    const gone = AbortSignal.abort()
    await expect(open(silent, {}, gone)).rejects.toThrow('aborted')
    const stop = new AbortController()
    setTimeout(() => stop.abort(), 100)
    await expect(open(silent, {}, stop.signal)).rejects.toThrow('aborted')
    const later = new AbortController()
    const { closed } = await open(await serve(), {}, later.signal)
    later.abort()
    expect(await closed).toBe('aborted')
  })
})

describe('what ends before it is open', () => {
  const cases: readonly (readonly [string, ServerOptions, refused: boolean, RegExp])[] = [
    ['not authorised', { answer: (socket) => void socket.write(connack(5)) }, true, /Not authorized/],
    ['a bad password', { answer: (socket) => void socket.write(connack(4)) }, true, /Bad username or password/],
    ['a client id that is refused', { answer: (socket) => void socket.write(connack(2)) }, true, /Identifier rejected/],
    ['a server that is not available', { answer: (socket) => void socket.write(connack(3)) }, false, /Server unavailable/],
    ['a client certificate that the server drops without a word', { wantsClients: [other.root.der] }, false, /closed/],
    [
      'a subscription that is refused',
      { answer: (socket, type, content) => (type === 8 ? void socket.write(suback(content, 128)) : broker(socket, type, content)) },
      false,
      /subscri/i,
    ],
    ['a server that hangs up', { onSocket: (socket) => void socket.end() }, false, /./],
    ['a server that hangs up after CONNECT', { answer: (socket) => void socket.destroy() }, false, /closed|ECONNRESET/],
    ['a server that does not speak MQTT', { onSocket: (socket) => void socket.write('HTTP/1.1 400 Bad Request\r\n\r\n') }, false, /./],
    [
      'a server of another CA',
      { certificate: other.issue({ subject: '127.0.0.1', spki: tls.spki, local: true }), chain: other.issuing.der },
      false,
      /certificate/,
    ],
    ['a server of another name', { certificate: pki.issue({ subject: '127.0.0.1', spki: tls.spki }) }, false, /does not match/],
    [
      'a server certificate that is over by signed time',
      { certificate: pki.issue({ subject: '127.0.0.1', spki: tls.spki, local: true, notAfter: now - day }) },
      false,
      /was over before the time that the server signed last/,
    ],
    [
      'a certificate for something else',
      { certificate: pki.issue({ subject: '127.0.0.1', spki: tls.spki, local: true, role: 'delivery' }) },
      false,
      /wrong-usage/,
    ],
    ['a server without TLS 1.3', { versions: 'TLSv1.2' }, false, /protocol version|SSL|TLS/i],
  ]
  test.each(cases)('%s', async (_name, of, refused, want) => {
    const thrown: unknown = await open(await serve(of)).then(
      () => undefined,
      (error: unknown) => error,
    )
    expect(thrown).toBeInstanceOf(Error)
    expect([thrown instanceof ConnectionRefused, thrown instanceof Error && want.test(thrown.message) ? '' : String(thrown)]).toEqual([refused, ''])
  })

  const foreign = keyPair()
  const unknown = testCertificate({
    subject: 'unknown',
    issuer: 'unknown',
    spki: foreign.spki,
    key: foreign.private,
    ca: 1,
    notBefore: now - day,
    notAfter: now + day,
  })
  test.each([
    ['unknown', unknown],
    ['of the same name with another key', other.root.der],
  ])('a client certificate whose root is %s to the server, which says so (OpenSSL)', async (_name, root) => {
    const folder = mkdtempSync(join(tmpdir(), 'fleetkey-tls-'))
    const file = (name: string, content: string | Buffer): string => {
      writeFileSync(join(folder, name), content)
      return join(folder, name)
    }
    const key = file('key.pem', tls.private.export({ format: 'pem', type: 'pkcs8' }))
    const clients = ['-Verify', '3', '-verify_return_error', '-CAfile', file('ca.pem', pem(root))]
    const server = spawn('openssl', ['s_server', '-accept', '127.0.0.1:0', '-tls1_3', '-key', key, '-cert', file('cert.pem', pem(certificate)), ...clients])
    try {
      let said = ''
      server.stdout.on('data', (chunk: Buffer) => {
        said += chunk.toString()
      })
      await expect.poll(() => said, { timeout: 10_000 }).toMatch(/ACCEPT .*:\d+/)
      await expect(open(Number(/ACCEPT .*:(\d+)/.exec(said)?.[1]))).rejects.toThrow(ConnectionRefused)
    } finally {
      server.kill()
      rmSync(folder, { recursive: true, force: true })
    }
  })

  test('nobody there', async () => {
    const port = await serve()
    for (const server of servers.splice(0)) await new Promise((resolve) => server.close(resolve))
    await expect(open(port)).rejects.toThrow('ECONNREFUSED')
  })
})

describe('a server that sends garbage', () => {
  test('at any moment: the connection ends, the process does not', async () => {
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(0, 1, 8), fc.uint8Array({ minLength: 1, maxLength: 200 }), async (moment, garbage) => {
        const end = (socket: TLSSocket): void => void socket.end(garbage)
        const port = await serve({
          onSocket: (socket) => (moment === 0 ? end(socket) : undefined),
          answer: (socket, type, content) => (type === moment ? end(socket) : broker(socket, type, content)),
        })
        const opened = await open(port).catch(() => undefined)
        if (opened !== undefined) await opened.closed
      }),
      { numRuns: 25 },
    )
  })

  test('after it is open: it ends once, with a reason', async () => {
    const { closed, closes } = await open(
      await serve({
        answer: (socket, type, content) => (
          broker(socket, type, content),
          type === 8 ? void setTimeout(() => socket.end(packet(0x00, random(20))), 50) : undefined
        ),
      }),
    )
    expect(await closed).not.toBe('')
    expect(closes.length).toBe(1)
  })
})

describe('a session that is resumed', () => {
  /** Connects by its memory, breaks the connection, and so on; whether the server saw each session resumed. `before`: something to be done before the second one. */
  const twice = async (more: (again: boolean) => Partial<ConnectionOptions> = () => ({}), of: ServerOptions = {}, before?: () => void) => {
    const reused: boolean[] = []
    const always = { memory: openTlsMemory(), trust: pki.trust() }
    const port = await serve({ ...of, onSocket: (socket) => void reused.push(socket.isSessionReused()) })
    const first = await open(port, { ...always, ...more(false) })
    first.connection.destroy()
    before?.()
    const second = await open(port, { ...always, ...more(true) })
    return { port, always, reused, first: first.connection, second: second.connection }
  }

  test('the next connection takes the ticket, with an exporter and a proof of its own', async () => {
    const passwords: boolean[] = []
    const answer: Answer = (socket, type, content) => {
      const proof = connectProof('plant', 'd-1', deviceCertificate, socket.exportKeyingMaterial(32, exporterLabel, Buffer.alloc(0)))
      if (type === 1) passwords.push(verifySignature(ldevid.spki, proof, Buffer.from(content.subarray(-86).toString(), 'base64url')))
      broker(socket, type, content)
    }
    const { reused, first, second, always, port } = await twice(undefined, { answer, wantsClients: [pki.root.der, pki.issuing.der] })
    expect(reused).toEqual([false, true])
    expect(passwords).toEqual([true, true])
    expect(second.exporter).not.toEqual(first.exporter)
    expect(second.server).toEqual(first.server)
    // Each of its two tickets once; the handshake that is then in full brings two more.
    second.destroy()
    for (let more = 0; more < 4; more++) (await open(port, always)).connection.destroy()
    expect(reused).toEqual([false, true, true, false, true, true])
  })

  test('never without a memory, and never to enrol', async () => {
    expect((await twice(() => ({ memory: undefined }))).reused).toEqual([false, false])
    expect((await twice(() => ({ credentials: null }))).reused).toEqual([false, false])
  })

  test('only under the same certificate and key, trust and server', async () => {
    const [trust, renewed] = [pki.trust(), keyPair()]
    const memory = openTlsMemory()
    const renewedCertificate = pki.issue({ subject: 'd-1', spki: device.spki })
    const changed: Readonly<Record<string, Partial<ConnectionOptions>>> = {
      certificate: { credentials: { ...credentials, certificates: [renewedCertificate, pki.issuing.der] } },
      chain: { credentials: { ...credentials, certificates: [deviceCertificate] } },
      key: {
        credentials: { key: renewed.private, certificates: [pki.issue({ subject: 'd-1', spki: renewed.spki }), pki.issuing.der], sign: ldevid.sign },
      },
      trust: { trust: trust.with({ chain: [], keys: [] }) },
      nothing: {},
    }
    for (const [name, change] of Object.entries(changed))
      expect([name, (await twice((again) => ({ trust, ...(again ? change : {}) }))).reused]).toEqual([name, [false, name === 'nothing']])
    const reused: boolean[] = []
    for (let server = 0; server < 2; server++) {
      const { connection } = await open(await serve({ onSocket: (socket) => void reused.push(socket.isSessionReused()) }), { memory, trust })
      connection.destroy()
    }
    expect(reused).toEqual([false, false])
  })

  test('a ticket that did not lead to a connection is not shown again', async () => {
    let deaf = false
    const reused: boolean[] = []
    const port = await serve({
      onSocket: (socket) => void reused.push(socket.isSessionReused()),
      answer: (socket, type, content) => (deaf && type === 1 ? void socket.destroy() : broker(socket, type, content)),
    })
    const [kept, trust, taken] = [openTlsMemory(), pki.trust(), new Set<string>()]
    const memory: TlsMemory = {
      ...kept,
      take(of) {
        const ticket = kept.take(of)
        if (ticket !== undefined) taken.add(ticket.session.toString('hex'))
        return ticket
      },
    }
    ;(await open(port, { memory, trust })).connection.destroy()
    deaf = true
    await expect(open(port, { memory, trust })).rejects.toThrow()
    deaf = false
    await open(port, { memory, trust })
    expect(reused).toEqual([false, true, true])
    expect(taken.size).toBe(2)
  })

  test('refused where it is resumed, the credentials are shown anew', async () => {
    const refusing: Answer = (socket, type, content) => (type === 1 && socket.isSessionReused() ? void socket.write(connack(5)) : broker(socket, type, content))
    expect((await twice(undefined, { answer: refusing })).reused).toEqual([false, true, false])
    const refused: Answer = (socket, type, content) => (sockets.size > 1 && type === 1 ? void socket.write(connack(5)) : broker(socket, type, content))
    sockets.clear()
    await expect(twice(undefined, { answer: refused })).rejects.toThrow(ConnectionRefused)
  })

  test('a server that gives no tickets, or has forgotten them, is met in full', async () => {
    const trust = pki.trust()
    expect((await twice(() => ({ trust }), { secureOptions: constants.SSL_OP_NO_TICKET })).reused).toEqual([false, false])
    expect(
      (
        await twice(
          () => ({ trust }),
          {},
          () => servers.at(-1)?.setTicketKeys(Buffer.from(random(48))),
        )
      ).reused,
    ).toEqual([false, false])
  })

  test('the certificate that the server showed in full is judged again by the time of now', async () => {
    const times = (again: boolean) => ({ time: { now, floor: again ? now + 366 * day : now, signed: false } })
    await expect(twice(times)).rejects.toThrow(/was over before the time that the server signed last/)
  })
})

describe('a clock that shows anything', () => {
  test.each([0, Date.UTC(2038, 0, 20), Date.UTC(2106, 1, 7, 7)])('%i: the session is opened, and what the server then signs decides', async (wall) => {
    const { connection } = await open(await serve(), { time: { now: wall, floor: 0, signed: false } })
    expect(() => checkServerTime(connection, now)).not.toThrow()
    expect(() => checkServerTime(connection, now + 366 * day)).toThrow(/not good at the time/)
    expect(() => checkServerTime(connection, now - 31 * day)).toThrow(/not good at the time/)
  })
})
