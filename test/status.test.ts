import { execFile } from 'node:child_process'
import { createHash, randomBytes, randomInt, verify } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { parseCrl } from '@fleetkey/protocol/x509/crl.ts'
import { inside, readBits, readUnsigned, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { makeOcspRequest, parseOcspRequest } from '@fleetkey/protocol/x509/ocsp.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { statusPlaces } from '@fleetkey/server/api/status.ts'
import type { Certificate } from '@fleetkey/server/ca/certificate.ts'
import { pointOf } from '@fleetkey/server/ca/revocation-list.ts'
import { life } from '@fleetkey/server/ca/kept-answers.ts'
import { listMaker } from '@fleetkey/server/api/list-maker.ts'
import { issuerOf, statusLists, type ListMaker, type StatusLists } from '@fleetkey/server/flows/status-lists.ts'
import { ocspResponder } from '@fleetkey/server/flows/ocsp.ts'
import { revokeCa } from '@fleetkey/server/flows/revoke-ca.ts'
import { distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { grantApproval } from '@fleetkey/server/flows/second-person.ts'
import { prepareCertificates, recordIssued } from '@fleetkey/server/flows/issue.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { operator, testContext, type TestContext } from './harness.ts'
import { survey } from './mutations.ts'
import { freePort } from './ports.ts'
import { hasProgram } from './programs.ts'
import { spkiPair } from './spki.ts'
import { openWorld, until, type World } from './world.ts'

const run = promisify(execFile)
const day = 86_400_000
const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const sha1 = (bytes: Uint8Array): Uint8Array => new Uint8Array(createHash('sha1').update(bytes).digest())
const keyBits = (spki: Uint8Array): Uint8Array => {
  const fields = inside(whole(spki, tags.sequence))
  fields.next(tags.sequence)
  return readBits(fields.next(tags.bitString))
}

/** What a program says, whatever its exit code. */
const output = async (program: string, ...args: readonly string[]): Promise<string> => {
  const done = await run(program, args).catch((error: { stdout: string; stderr: string }) => error)
  return `${done.stdout}\n${done.stderr}`
}

describe.skipIf(!hasProgram('openssl'))('judged by openssl and certtool', () => {
  let world: World
  let url: string
  const folder = mkdtempSync(join(tmpdir(), 'fk-status-'))
  const path = (name: string): string => join(folder, name)
  const fetched = async (name: string): Promise<Uint8Array> => {
    const response = await fetch(`${url}/${name}`)
    expect(response.status).toBe(200)
    return new Uint8Array(await response.arrayBuffer())
  }
  const save = async (name: string, as: string): Promise<string> => {
    const bytes = await fetched(name)
    writeFileSync(path(`${as}.der`), bytes)
    const kind = name.endsWith('.crl') ? 'crl' : 'x509'
    await run('openssl', [kind, '-inform', 'der', '-in', path(`${as}.der`), '-out', path(`${as}.pem`)])
    return path(`${as}.pem`)
  }
  const identity = async (device: string): Promise<{ pem: string; serial: string; file: string }> => {
    const { certificates } = await world.client.call('device.show', { params: { id: device } })
    const [found] = certificates.filter(({ profile }) => profile === 'device-identity')
    if (found === undefined) throw new Error('no identity')
    writeFileSync(path(`${device}.pem`), found.pem)
    return { pem: found.pem, serial: found.serial, file: path(`${device}.pem`) }
  }
  const asked = async (device: string, ...more: readonly string[]): Promise<string> =>
    await output(
      'openssl',
      'ocsp',
      '-issuer',
      path('issuing.pem'),
      '-cert',
      path(`${device}.pem`),
      '-url',
      `${url}/ocsp`,
      '-CAfile',
      path('chain.pem'),
      ...more,
    )
  const verified = async (device: string, ...crls: readonly string[]): Promise<string> =>
    await output(
      'openssl',
      'verify',
      '-CAfile',
      path('root.pem'),
      '-untrusted',
      path('issuing.pem'),
      '-crl_check',
      ...crls.flatMap((crl) => ['-CRLfile', crl]),
      path(`${device}.pem`),
    )

  beforeAll(async () => {
    const port = await freePort()
    url = `http://127.0.0.1:${port}`
    world = await openWorld({ args: ['--http-port', String(port), '--status-url', url] })
    const machines = [await world.simulated('GW-1'), await world.simulated('GW-2')]
    await world.enlist(machines, 'plant')
    const agents = machines.map((machine) => world.agent(machine))
    await until('both are enrolled', () => agents.every((agent) => agent.status().connected), 60_000)
    await until('the lists are there', async () => (await fetch(`${url}/crl/issuing.crl`)).status === 200)
    for (const name of ['root', 'issuing'] as const) await save(`ca/${name}.cer`, name)
    await run('sh', ['-c', `cat ${path('root.pem')} ${path('issuing.pem')} > ${path('chain.pem')}`])
    for (const device of ['gw-1', 'gw-2']) await identity(device)
  }, 120_000)
  afterAll(async () => {
    await world.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  test('a good certificate: good, signed by the delegated responder, with our nonce in it, by POST and by GET', async () => {
    const said = await asked('gw-1', '-resp_text')
    expect(said).toContain('Response verify OK')
    expect(said).toContain('gw-1.pem: good')
    expect(said).toContain('OCSP Nonce')
    expect(said).toContain('OCSP No Check')
    expect(said).not.toContain('WARNING: no nonce')
    const request = path('request.der')
    await run('openssl', ['ocsp', '-issuer', path('issuing.pem'), '-cert', path('gw-1.pem'), '-no_nonce', '-reqout', request])
    const bytes = readFileSync(request)
    for (const text of [encodeURIComponent(bytes.toString('base64')), bytes.toString('base64')]) {
      const response = await fetch(`${url}/ocsp/${text}`)
      expect(await judged('gw-1', response)).toContain('gw-1.pem: good')
    }
  })

  /** What openssl makes of an answer that came over HTTP. */
  const judged = async (device: string, response: Response): Promise<string> => {
    expect(response.status).toBe(200)
    writeFileSync(path('response.der'), new Uint8Array(await response.arrayBuffer()))
    const [issuer, certificate, answer] = [path('issuing.pem'), path(`${device}.pem`), path('response.der')]
    return await output('openssl', 'ocsp', '-issuer', issuer, '-cert', certificate, '-respin', answer, '-CAfile', path('chain.pem'), '-resp_text')
  }

  // RFC 5019 §6.2: what lets caches stand between.
  test('made ahead: the same answer for everybody, as caches want it by GET; on hold at once, whatever was kept', async () => {
    const request = path('ahead.der')
    await run('openssl', ['ocsp', '-issuer', path('issuing.pem'), '-cert', path('gw-1.pem'), '-no_nonce', '-reqout', request])
    const bytes = readFileSync(request)
    const place = `${url}/ocsp/${encodeURIComponent(bytes.toString('base64'))}`
    const post = async (): Promise<Response> =>
      await fetch(`${url}/ocsp`, { method: 'POST', body: bytes, headers: { 'content-type': 'application/ocsp-request' } })
    const first = await fetch(place)
    const header = (name: string): string => first.headers.get(name) ?? ''
    const body = new Uint8Array(await first.clone().arrayBuffer())
    expect(header('content-type')).toBe('application/ocsp-response')
    expect(Number(header('content-length'))).toBe(body.length)
    const [, age] = /^max-age=(\d+), public, no-transform, must-revalidate$/.exec(header('cache-control')) ?? []
    expect(Number(age)).toBeGreaterThan(290)
    expect(Number(age)).toBeLessThanOrEqual(300)
    expect(header('etag')).toBe(`"${createHash('sha256').update(body).digest('hex')}"`)
    const said = await judged('gw-1', first)
    expect(said).toContain('Response verify OK')
    expect(said).toContain('gw-1.pem: good')
    const time = (name: string): number => Date.parse(new RegExp(`${name}: (.*)`).exec(said)?.[1] ?? '')
    expect(Date.parse(header('last-modified'))).toBe(time('Produced At'))
    expect(Date.parse(header('expires'))).toBeLessThan(time('Next Update'))
    expect(Math.abs(Date.parse(header('expires')) - Date.parse(header('date')) - Number(age) * 1000)).toBeLessThanOrEqual(2_000)
    const again = await fetch(place, { headers: { 'if-none-match': header('etag') } })
    expect(again.status).toBe(304)
    expect(again.headers.get('etag')).toBe(header('etag'))
    const head = await fetch(place, { method: 'HEAD' })
    expect([head.headers.get('etag'), (await head.arrayBuffer()).byteLength]).toEqual([header('etag'), 0])
    // The very same bytes by POST, which no cache may answer.
    const posted = await post()
    expect(posted.headers.get('cache-control')).toBe('no-store')
    expect(new Uint8Array(await posted.arrayBuffer())).toEqual(body)

    await world.client.call('device.suspend', { params: { id: 'gw-1' }, body: { reason: 'repair' } })
    const held = await fetch(place, { headers: { 'if-none-match': header('etag'), 'if-modified-since': header('last-modified') } })
    expect(await judged('gw-1', held)).toContain('gw-1.pem: revoked')
    await world.client.call('device.reinstate', { params: { id: 'gw-1' } })
    expect(await judged('gw-1', await post())).toContain('gw-1.pem: good')
  })

  test('the issuing CA: good, said by the responder of the root', async () => {
    const said = await output('openssl', 'ocsp', '-issuer', path('root.pem'), '-cert', path('issuing.pem'), '-url', `${url}/ocsp`, '-CAfile', path('root.pem'))
    expect(said).toContain('Response verify OK')
    expect(said).toContain('issuing.pem: good')
  })

  test('an issuer that is none of ours: unknown', async () => {
    const said = await output('openssl', 'ocsp', '-issuer', path('gw-2.pem'), '-cert', path('gw-1.pem'), '-url', `${url}/ocsp`, '-CAfile', path('chain.pem'))
    expect(said).toContain('gw-1.pem: unknown')
  })

  test('suspended: on hold with OCSP at once, on the delta, off it again when reinstated', async () => {
    await world.client.call('device.suspend', { params: { id: 'gw-2' }, body: { reason: 'repair' } })
    const said = await asked('gw-2')
    expect(said).toContain('gw-2.pem: revoked')
    expect(said).toContain('Reason: certificateHold')
    const { serial } = await identity('gw-2')
    const delta = async (): Promise<string> =>
      await output('openssl', 'crl', '-noout', '-text', '-CAfile', path('chain.pem'), '-in', await save('crl/issuing-delta.crl', 'delta'))
    await until('the delta has it', async () => (await delta()).includes(serial.toUpperCase()))
    expect(await delta()).toMatch(/Delta CRL Indicator: critical[\s\S]*Certificate Hold/)
    await world.client.call('device.reinstate', { params: { id: 'gw-2' } })
    expect(await asked('gw-2')).toContain('gw-2.pem: good')
    await until('the delta takes it off', async () => (await delta()).includes('Remove From CRL'))
    expect(await delta()).toContain('verify OK')
  })

  test('revoked: OCSP says so at once, the delta, and after the next complete lists openssl refuses it by either', async () => {
    await world.client.call('device.revoke', { params: { id: 'gw-1' }, body: { reason: 'keyCompromise' } })
    const said = await asked('gw-1')
    expect(said).toContain('gw-1.pem: revoked')
    expect(said).toContain('Reason: keyCompromise')
    const { serial, pem } = await identity('gw-1')
    const before = parseCrl(await fetched('crl/issuing.crl'))
    // A start makes complete lists.
    await world.restart()
    await until('the lists are there', async () => (await fetch(`${url}/crl/issuing.crl`).catch(() => undefined))?.status === 200)
    const bytes = await fetched('crl/issuing.crl')
    const list = parseCrl(bytes)
    expect(list.revoked.has(serial)).toBe(true)
    expect(BigInt(`0x${list.number}`)).toBeGreaterThan(BigInt(`0x${before.number}`))
    const full = await save('crl/issuing.crl', 'full')
    expect(await verified('gw-1', full)).toContain('certificate revoked')
    expect(await verified('gw-2', full)).toContain('gw-2.pem: OK')
    // Its own distribution point, which the certificate names.
    const point = pointOf(serial)
    const text = await output('openssl', 'x509', '-noout', '-text', '-in', path('gw-1.pem'))
    expect(text).toContain(`URI:${url}/crl/issuing-${point}.crl`)
    expect(text).toContain(`OCSP - URI:${url}/ocsp`)
    expect(await verified('gw-1', await save(`crl/issuing-${point}.crl`, 'part'))).toContain('certificate revoked')
    const other = point === '0' ? '1' : '0'
    expect(await verified('gw-1', await save(`crl/issuing-${other}.crl`, 'other'))).toContain('different CRL scope')
    const part = await output('openssl', 'crl', '-noout', '-text', '-in', path('part.pem'), '-CAfile', path('chain.pem'))
    expect(part).toContain('verify OK')
    expect(part).toContain('Issuing Distribution Point: critical')
    expect(parseCertificate(new Uint8Array(Buffer.from(pem.replace(/-----[^-]+-----/g, ''), 'base64'))).serial).toBe(serial)
  })

  test.skipIf(!hasProgram('certtool'))('certtool reads and verifies the list', async () => {
    await save('crl/issuing.crl', 'full')
    const said = await output('certtool', '--verify-crl', '--load-ca-certificate', path('issuing.pem'), '--infile', path('full.pem'))
    expect(said).toMatch(/[Vv]erified/)
    expect(said).not.toMatch(/[Nn]ot verified/)
    expect(await output('certtool', '--crl-info', '--infile', path('full.pem'))).toMatch(/CRL Number/)
  })

  test('what the listener does not know is refused, and it goes on', async () => {
    const status = async (of: string, init?: RequestInit): Promise<number> => (await fetch(`${url}${of}`, init)).status
    expect(await status('/')).toBe(404)
    expect(await status('/crl/../kms')).toBe(404)
    expect(await status('/crl/nothing.crl')).toBe(404)
    expect(await status('/ocsp', { method: 'PUT', body: 'x' })).toBe(405)
    expect(await status('/ocsp', { method: 'POST', body: new Uint8Array(5000) })).toBe(400)
    expect(await status('/ocsp/%%%')).toBe(400)
    expect(await status(`/ocsp/${'A'.repeat(15_000)}`)).not.toBe(200)
    const refused = await fetch(`${url}/ocsp`, { method: 'POST', body: new Uint8Array([0x30, 0x00]) })
    expect(new Uint8Array(await refused.arrayBuffer())).toEqual(Uint8Array.of(0x30, 3, 0x0a, 1, 1))
    const { headers } = await fetch(`${url}/crl/issuing.crl`)
    expect(await status('/crl/issuing.crl', { headers: { 'if-none-match': headers.get('etag') ?? '' } })).toBe(304)
    expect(await asked('gw-2')).toContain('gw-2.pem: good')
  })
})

describe('lists and answers', () => {
  let ctx: TestContext
  beforeEach(async () => {
    ctx = await testContext()
  })
  afterEach(async () => await ctx.close())

  const issue = async (count: number): Promise<readonly Certificate[]> => {
    const intent = { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: 'test' } as const
    const device = DeviceId.parse('d')
    const orders = Array.from({ length: count }, () => ({ profile: 'device-identity', subject: 'd', spki: spkiPair(), device }) as const)
    const issued = await prepareCertificates(ctx, ctx.authority, intent, orders)
    await perform(ctx, intent, (tx) => {
      for (const one of issued) recordIssued(tx, one)
    })
    const rows = await Promise.all(issued.map(async ({ intent: { id } }) => await ctx.store.get('certificate', id)))
    return rows.filter((row) => row !== undefined)
  }
  const end = async (rows: readonly Certificate[], status: Certificate['status']): Promise<readonly Certificate[]> => {
    const intent = { caller: { kind: 'system', id: 'setup', from: 'server' }, action: 'server.setup', subject: 'test' } as const
    const ended = rows.map((row): Certificate => ({
      ...row,
      status,
      revokedAt: status === 'valid' ? null : ctx.clock.now,
      code: status === 'held' ? 'certificateHold' : 'superseded',
    }))
    await perform(ctx, intent, (tx) => ended.forEach((row) => tx.update('certificate', row)))
    return ended
  }
  const opened: StatusLists[] = []
  afterEach(async () => {
    for (const lists of opened.splice(0)) await lists.close()
  })
  const open = (start = listMaker): StatusLists => {
    const lists = statusLists(ctx, 'http://crl.test/crl/', start)
    opened.push(lists)
    return lists
  }
  const serials = (lists: StatusLists, name = 'issuing.crl'): readonly string[] => [...parseCrl(lists.get(name)?.bytes ?? new Uint8Array()).revoked.keys()]

  test('numbers grow over restarts, whatever a crash leaves', async () => {
    const numbers: number[] = []
    for (let start = 0; start < 3; start++) {
      const lists = open()
      await lists.publish()
      numbers.push(lists.get('issuing.crl')?.number ?? 0)
      lists.changed(await end(await issue(1), 'revoked'))
      await lists.publish()
      expect(lists.get('issuing-delta.crl')?.number).toBeGreaterThan(lists.get('issuing.crl')?.number ?? Infinity)
    }
    expect(numbers).toEqual([...new Set(numbers)].toSorted((one, other) => one - other))
  })

  test('what changes while everything is read is newer than what is read', async () => {
    const rows = await end(await issue(3), 'held')
    const lists = open()
    const publishing = lists.publish()
    lists.changed(
      await end(
        rows.slice(0, 1).map((row) => ({ ...row, version: row.version + 1 })),
        'valid',
      ),
    )
    await publishing
    await lists.publish({ complete: true })
    expect(serials(lists).toSorted()).toEqual(
      rows
        .slice(1)
        .map(({ id }) => id)
        .toSorted(),
    )
  })

  test('who has run out stays for one list after that, and is dropped from the next', async () => {
    const rows = await end(await issue(2), 'revoked')
    const lists = open()
    await lists.publish()
    expect(serials(lists)).toHaveLength(2)
    ctx.clock.now = (rows[0]?.notAfter ?? 0) + 2 * day
    await lists.publish()
    expect(serials(lists)).toHaveLength(2)
    ctx.clock.now += day
    await lists.publish()
    expect(serials(lists)).toHaveLength(0)
    const again = open()
    await again.publish()
    expect(serials(again)).toHaveLength(0)
  })

  test('a signature that fails loses no entry', async () => {
    const lists = open()
    await lists.publish()
    const rows = await end(await issue(1), 'revoked')
    lists.changed(rows)
    const sign = ctx.kms.sign.bind(ctx.kms)
    ctx.kms.sign = (batch) => (batch[0]?.key === 'issuing-ca' ? Promise.reject(new Error('the token is gone')) : sign(batch))
    await expect(lists.publish({ complete: true })).rejects.toThrow('the token is gone')
    ctx.kms.sign = sign
    await lists.publish()
    expect(serials(lists)).toEqual(rows.map(({ id }) => id))
  })

  test('a thread that ends loses no entry, and what was begun fails', async () => {
    const makers: ListMaker[] = []
    const lists = open(() => {
      const maker = listMaker()
      makers.push(maker)
      return maker
    })
    await lists.publish()
    const rows = await end(await issue(2), 'revoked')
    lists.changed(rows.slice(0, 1))
    const publishing = lists.publish({ complete: true })
    await makers[0]?.close()
    await expect(publishing).rejects.toMatchObject({ code: 'unavailable', reason: 'crl.thread' })
    // It is not told of this one: the store is.
    lists.changed(rows.slice(1))
    const before = lists.get('issuing.crl')?.number ?? Infinity
    await lists.publish()
    expect(makers).toHaveLength(2)
    expect(lists.get('issuing.crl')?.number).toBeGreaterThan(before)
    expect(serials(lists).toSorted()).toEqual(rows.map(({ id }) => id).toSorted())
    lists.changed(await end(await issue(1), 'revoked'))
    await lists.publish()
    expect(lists.get('issuing-delta.crl')?.number).toBeGreaterThan(lists.get('issuing.crl')?.number ?? Infinity)
  })

  test('the sixteen points add up to the whole list', async () => {
    const rows = await end(await issue(40), 'revoked')
    const lists = open()
    await lists.publish()
    const places = statusPlaces('http://crl.test', 'issuing-ca')
    expect(places.crl(rows[0]?.id ?? '')).toBe(`http://crl.test/crl/issuing-${pointOf(rows[0]?.id ?? '')}.crl`)
    expect(serials(lists).toSorted()).toEqual(rows.map(({ id }) => id).toSorted())
    // A list of one point says so in a critical extension: it is never taken for a complete one.
    for (const point of '0123456789abcdef') expect(() => parseCrl(lists.get(`issuing-${point}.crl`)?.bytes ?? new Uint8Array())).toThrow('critical extension')
    expect(rows.every((row) => issuerOf(row) === 'issuing')).toBe(true)
  })

  const request = (serial: string, nonce?: Uint8Array): Uint8Array => {
    const { subject, spki } = ctx.authority
    const bytes = Buffer.from(serial, 'hex')
    return makeOcspRequest({
      hash: 'sha1',
      issuerNameHash: sha1(subject),
      issuerKeyHash: sha1(keyBits(spki)),
      serial: (bytes[0] ?? 0) >= 0x80 ? Buffer.concat([Uint8Array.of(0), bytes]) : bytes,
      ...(nonce === undefined ? {} : { nonce }),
    })
  }

  const uses = async (): Promise<number> => (await ctx.kms.describe('ocsp-issuing'))?.uses ?? 0
  const one = async (): Promise<Certificate> => {
    const [row] = await issue(1)
    if (row === undefined) throw new Error('no certificate')
    return row
  }

  test('an answer is signed once and handed out again, however many ask, until the status changes', async () => {
    const responder = ocspResponder(ctx)
    const row = await one()
    const first = await responder.answer(request(row.id))
    expect(first.valid).toEqual({ from: ctx.clock.now, until: ctx.clock.now + life })
    const before = await uses()
    expect((await responder.answer(request(row.id))).bytes).toEqual(first.bytes)
    expect(await uses()).toBe(before)
    const nonced = await responder.answer(request(row.id, random(32)))
    expect(nonced.valid).toBeNull()
    expect(await uses()).toBe(before + 1)
    // Nobody tells the responder: it reads the row.
    await end([row], 'revoked')
    const many = await Promise.all(Array.from({ length: 50 }, async () => await responder.answer(request(row.id))))
    expect(new Set(many.map(({ bytes }) => Buffer.from(bytes).toString('hex'))).size).toBe(1)
    expect(many[0]?.bytes).not.toEqual(first.bytes)
    expect(await uses()).toBe(before + 2)
  })

  test('revoked while “good” is being signed: whoever asks afterwards is told, and “good” is never handed out again', async () => {
    const responder = ocspResponder(ctx)
    const row = await one()
    await responder.answer(request('40'))
    const sign = ctx.kms.sign.bind(ctx.kms)
    let release = (): void => undefined
    const held = new Promise<void>((resolve) => (release = resolve))
    ctx.kms.sign = async (batch) => {
      await held
      return await sign(batch)
    }
    const good = responder.answer(request(row.id))
    await new Promise((resolve) => void setImmediate(resolve))
    ctx.kms.sign = sign
    const [ended] = await end([row], 'revoked')
    const revoked = await responder.answer(request(row.id))
    release()
    expect((await good).bytes).not.toEqual(revoked.bytes)
    expect(ended?.status).toBe('revoked')
    const before = await uses()
    // Made last, “good” lies in the store; the row speaks against it.
    const after = await responder.answer(request(row.id))
    expect(statusIn(after.bytes)).toBe('revoked')
    expect(statusIn(revoked.bytes)).toBe('revoked')
    expect(statusIn((await good).bytes)).toBe('good')
    expect(await uses()).toBeLessThanOrEqual(before + 1)
  })

  test('what is wanted is made anew before it is over, what nobody asks for is forgotten', async () => {
    const responder = ocspResponder(ctx)
    const [wanted, once] = [await one(), await one()]
    const first = await responder.answer(request(wanted.id))
    await responder.answer(request(wanted.id))
    await responder.answer(request(once.id))
    const before = await uses()
    ctx.clock.now += life / 2 - 1_000
    await responder.renew()
    expect(await uses()).toBe(before)
    ctx.clock.now += 1_000
    await responder.renew()
    expect(await uses()).toBe(before + 1)
    const second = await responder.answer(request(wanted.id))
    expect(await uses()).toBe(before + 1)
    expect(second.valid?.from).toBe((first.valid?.from ?? 0) + life / 2)
    await responder.answer(request(once.id))
    expect(await uses()).toBe(before + 2)
    // Nobody has renewed it in time: it is not handed out to be over when it arrives.
    ctx.clock.now += life - 30_000
    expect((await responder.answer(request(wanted.id))).valid?.from).toBe(Math.floor(ctx.clock.now / 1000) * 1000)
  })

  test('serials that nobody has are kept nowhere, and take nothing from certificates that exist', async () => {
    const responder = ocspResponder(ctx)
    const row = await one()
    await responder.answer(request(row.id))
    const flood = await Promise.all(Array.from({ length: 500 }, async (_, at) => await responder.answer(request((0x4000 + at).toString(16)))))
    expect(flood.filter(({ bytes }) => bytes.length < 10)).toHaveLength(100)
    expect(flood.every(({ valid }) => valid === null)).toBe(true)
    expect((await responder.answer(request((await one()).id))).bytes.length).toBeGreaterThan(100)
    expect((await responder.answer(request(row.id))).valid).not.toBeNull()
  })

  test('of a CA that is gone nothing is handed out, whatever was kept', async () => {
    const responder = ocspResponder(ctx)
    const row = await one()
    const before = request(row.id)
    expect(statusIn((await responder.answer(before)).bytes)).toBe('good')
    const alice = operator()
    const bob: Caller = { ...operator(), id: 'bob' } as Caller
    await prepareCa(ctx, alice, { root: false })
    ctx.clock.now += 1_000
    await distributeCa(ctx, alice)
    const { approval } = await revokeCa(ctx, alice, 'issuing', { why: 'stolen', force: true })
    await grantApproval(ctx, bob, approval ?? '')
    await revokeCa(ctx, alice, 'issuing', { why: 'stolen', force: true })
    expect(statusIn((await responder.answer(before)).bytes)).not.toBe('good')
  })

  test('a flood of new nonces is told to come later, unsigned', async () => {
    const responder = ocspResponder(ctx)
    const answers = await Promise.all(Array.from({ length: 1000 }, async () => await responder.answer(request('40', random(16)))))
    const later = answers.filter(({ bytes }) => Buffer.from(bytes).equals(Buffer.from([0x30, 3, 0x0a, 1, 3])))
    expect(later.length).toBe(600)
    ctx.clock.now += 5_000
    expect((await responder.answer(request('40', random(16)))).bytes.length).toBeGreaterThan(100)
  })

  test('the responder is the CA’s own, says nothing but OCSP, and is replaced in time under the same key', async () => {
    const responder = ocspResponder(ctx)
    await responder.answer(request('40'))
    const stored = async () => parseCertificate((await ctx.store.get('setting', 'ca/ocsp/issuing'))?.value ?? new Uint8Array())
    const first = await stored()
    expect(first.extKeyUsage).toEqual(['1.3.6.1.5.5.7.3.9'])
    expect(first.extensions.has('1.3.6.1.5.5.7.48.1.5')).toBe(true)
    expect(verify('sha256', first.tbs, parseCertificate(ctx.authority.issuing).native.publicKey, signatureOf(first.der))).toBe(true)
    ctx.clock.now += 21 * day
    await responder.answer(request('41'))
    const second = await stored()
    expect(second.serial).not.toBe(first.serial)
    expect(second.spki).toEqual(first.spki)
  })

  // RFC 9654 §2.1, RFC 6960 §4.1: what must not be read is refused before anything is looked up. step-ca CVE-2026-40097: a parser's surprise ended the CA.
  test('CVE-2026-40097: hostile requests get a typed refusal, never an exception', async () => {
    const valid = [request('40'), request('5f5f', random(1)), request('40', random(128))]
    for (const one of valid) expect(parseOcspRequest(one).ids).toHaveLength(1)
    expect(() => parseOcspRequest(request('40', new Uint8Array(0)))).toThrow('nonce of 0 bytes')
    expect(() => parseOcspRequest(request('40', random(129)))).toThrow('nonce of 129 bytes')
    expect(() => parseOcspRequest(new Uint8Array(4097))).toThrow('4097 bytes')
    const { accepted, refused } = survey(parseOcspRequest, valid, { count: 20_000, seed: Number(process.env['FLEETKEY_SEED'] ?? randomInt(1_000_000_000)) })
    expect(accepted).toBeLessThan(10_000)
    expect([...refused.keys()].every((reason) => reason.startsWith('x509.'))).toBe(true)
    const responder = ocspResponder(ctx)
    const [whole40 = new Uint8Array(0)] = valid
    for (let at = 0; at < whole40.length; at++) expect(Buffer.from((await responder.answer(whole40.subarray(0, at))).bytes).toString('hex')).toBe('30030a0101')
  })

  test('a serial keeps its sign byte out of the row’s name', () => {
    const { ids } = parseOcspRequest(request('f0'))
    expect(ids[0]?.serial).toBe('f0')
    expect(readUnsigned(whole(Uint8Array.of(2, 2, 0, 0xf0), tags.integer))).toEqual(Uint8Array.of(0, 0xf0))
  })
})

const signatureOf = (der: Uint8Array): Uint8Array => {
  const outer = inside(whole(der, tags.sequence))
  outer.next(tags.sequence)
  outer.next(tags.sequence)
  return readBits(outer.next(tags.bitString))
}

/** What a response with one answer says, read with our own reader; its signature is for openssl to judge. */
const statusIn = (response: Uint8Array): 'good' | 'revoked' | 'unknown' | 'error' => {
  const outer = inside(whole(response, tags.sequence))
  outer.next(tags.enumerated)
  if (outer.done) return 'error'
  const bytes = inside(whole(outer.next(0xa0).content, tags.sequence))
  bytes.next(tags.oid)
  const data = inside(whole(bytes.next(tags.octetString).content, tags.sequence)).enter(tags.sequence)
  data.next(0xa1)
  data.next(tags.generalizedTime)
  const single = data.enter(tags.sequence).enter(tags.sequence)
  single.next(tags.sequence)
  return ({ 0x80: 'good', 0xa1: 'revoked' } as const)[single.peek() ?? 0] ?? 'unknown'
}
