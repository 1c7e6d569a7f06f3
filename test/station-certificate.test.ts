import { execFile, execFileSync } from 'node:child_process'
import { generateKeyPairSync, X509Certificate } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'
import { main } from '@fleetkey/cli/main.ts'
import { manifestJson } from '@fleetkey/firmware-sim/factory/manifest.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { toProblem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { stationEku } from '@fleetkey/protocol/x509/roles.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { stateOf } from '@fleetkey/server/ca/certificate.ts'
import { raiseAlerts } from '@fleetkey/server/flows/alerts.ts'
import { calendar } from '@fleetkey/server/flows/calendar.ts'
import { admitConnection } from '@fleetkey/server/flows/connect.ts'
import { estEnrol, estReenrol } from '@fleetkey/server/flows/est.ts'
import { searchCertificates } from '@fleetkey/server/flows/inventory.ts'
import { importBatch } from '@fleetkey/server/flows/import-batch.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { claimSpki, prepareCertificates, recordIssued, sweepIntents, type Order } from '@fleetkey/server/flows/issue.ts'
import { perform } from '@fleetkey/server/flows/perform.ts'
import { stationRadius } from '@fleetkey/server/flows/shared-radius.ts'
import { certifyStation } from '@fleetkey/server/flows/station-certificate.ts'
import { addStation, reinstateStation, removeStation, revokeStation, suspendStation } from '@fleetkey/server/flows/station.ts'
import { further, generated, named, selfSigned } from './hostile-requests.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'
import { hasProgram } from './programs.ts'
import { openWorld, until } from './world.ts'

const day = 86_400_000
let ctx: TestContext
let line: ReturnType<typeof station>
beforeEach(async () => {
  ctx = await testContext()
  line = station()
  await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
})
afterEach(async () => await ctx.close())

const certify = async (of: { readonly csr?: Uint8Array; readonly devices?: number; readonly id?: string } = {}) =>
  await certifyStation(ctx, operator(), {
    id: of.id ?? line.id,
    csr: of.csr ?? (await line.request()),
    ...(of.devices === undefined ? {} : { devices: of.devices }),
  })
let batches = 0
/** A batch of so many devices, signed by a station; its name. */
const enlist = async (count = 1, by = line): Promise<string> => {
  const batch = `b${++batches}`
  const rows = Array.from({ length: count }, (_, at) => ({ serial: `${batch}-${at}` }))
  await importBatch(ctx, operator(), { ...by.signed(manifestJson({ batch, model: 'gateway', station: by.id }, rows)), format: 'json' })
  return batch
}
const reasonOf = async (work: Promise<unknown>): Promise<string> =>
  await work.then(
    () => 'done',
    (thrown: unknown) => toProblem(thrown).reason ?? toProblem(thrown).code,
  )
const states = async (): Promise<readonly string[]> => {
  const { certificates } = await searchCertificates(ctx, { profile: 'station', limit: 100 })
  return certificates.toSorted((one, other) => one.notBefore - other.notBefore).map((row) => stateOf(row, ctx.clock.now))
}
const row = async () => await ctx.store.get('station', line.id)

describe('a certificate of a station', () => {
  test('names it, and takes nothing from the request but that the key was shown', async () => {
    const { id, der, notAfter } = await certify()
    const { commonName, altNames, extKeyUsage, spki } = parseCertificate(der)
    expect({ commonName, extKeyUsage }).toEqual({ commonName: 'line-1', extKeyUsage: [stationEku] })
    expect(altNames.map((name) => Buffer.from(name.subarray(2)).toString())).toEqual(['spiffe://plant/station/line-1'])
    expect([Buffer.from(spki).equals(Buffer.from(line.spki)), notAfter - ctx.clock.now]).toEqual([true, 90 * day])
    expect(await row()).toMatchObject({ certificate: id })
    expect(await ctx.store.get('certificate', id)).toMatchObject({ station: 'line-1', device: null, profile: 'station', status: 'valid' })
    expect((await ctx.entries()).at(-1)).toMatchObject({ action: 'station.certify', subject: 'line-1', outcome: 'done', caller: 'operator:alice' })
  })

  test('DER and PEM are taken, under its name, as a serial in capitals is not', async () => {
    const csr = await line.request()
    expect(await reasonOf(certify({ csr: Buffer.from(toPem('CERTIFICATE REQUEST', csr)) }))).toBe('done')
    expect(await reasonOf(certify({ csr: await line.request('LINE-1') }))).toBe('csr.subject.other')
  })

  test('one whose name no device could have', async () => {
    const odd = station('e-line')
    await addStation(ctx, operator(), { id: odd.id, publicKey: odd.publicKey })
    expect(parseCertificate((await certify({ id: odd.id, csr: await odd.request() })).der).commonName).toBe('e-line')
  })

  test.each([
    ['another key', async () => await station('line-1').request(), 'csr.station.other-key'],
    ['the name of another', async () => await line.request('line-2'), 'csr.subject.other'],
    ['no request', async () => new Uint8Array([0x30, 0]), 'csr.der'],
    ['a file of text', async () => Buffer.from('hello'), 'csr.pem'],
    ['its key without possession', async () => selfSigned({ subject: named('line-1'), spki: line.spki }), 'csr.signature'],
  ] as const)('%s is refused, audited, and leaves nothing', async (_, csr, reason) => {
    expect(await reasonOf(certify({ csr: await csr() }))).toBe(reason)
    expect((await ctx.entries()).at(-1)).toMatchObject({ action: 'station.certify', outcome: 'refused', detail: expect.stringContaining(reason) as string })
    expect([await ctx.store.count('intent', { unissued: 'open' }), (await row())?.certificate]).toEqual([0, undefined])
  })

  test('every request that is refused for a device is refused for a station', async () => {
    const cases = [...generated, ...further].filter(({ reason }) => !reason.startsWith('csr.rsa'))
    for (const { make, reason, name } of cases) {
      const bytes = make()
      // The requests are by other names; which of two faults is said first is not what counts here.
      const want = bytes.length === 0 ? ['csr.pem'] : [reason, 'csr.subject.other']
      expect(want, name).toContain(await reasonOf(certify({ csr: bytes })))
    }
    expect(cases.length).toBeGreaterThan(60)
  })

  test('only an owner orders one; nobody learns by asking whether a request is good', async () => {
    for (const role of ['operator', 'factory', 'auditor'] as const)
      expect(await reasonOf(certifyStation(ctx, operator(role), { id: line.id, csr: new Uint8Array() }))).toBe('access.station.certify')
    expect((await ctx.entries()).at(-1)).toMatchObject({ action: 'station.certify', outcome: 'refused', code: 'forbidden' })
    expect(await reasonOf(certify({ id: 'line-9' }))).toBe('not-found')
  })

  test('its key is certified again for it and for nobody else', async () => {
    const first = await certify()
    ctx.clock.now += day
    const second = await certify()
    expect(second.id).not.toBe(first.id)
    expect(await states()).toEqual(['superseded', 'valid'])
    const order: Order = { profile: 'device-tls', device: DeviceId.parse('gw-1'), subject: 'gw-1', spki: line.spki }
    const intent = { caller: operator(), action: 'station.certify', subject: 'gw-1' } as const
    for (const odd of [order, { ...order, profile: 'station', device: null, station: 'line-2', subject: 'line-2' } as const]) {
      const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [odd])
      const claim = perform(ctx, intent, async (tx) => {
        if (issued === undefined) throw new Error('nothing was issued')
        await claimSpki(ctx, tx, issued)
        recordIssued(tx, issued)
      })
      expect(await reasonOf(claim)).toBe('key.reused')
    }
    // Nor is it the key of another station, or that of a device the key of one.
    expect(await reasonOf(addStation(ctx, operator(), { id: 'line-2', publicKey: line.publicKey }))).toBe('key.reused')
    const { publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
    const [issued] = await prepareCertificates(ctx, ctx.authority, intent, [{ ...order, spki }])
    await perform(ctx, intent, (tx) => issued !== undefined && recordIssued(tx, issued))
    expect(await reasonOf(addStation(ctx, operator(), { id: 'line-3', publicKey: publicKey.export({ format: 'pem', type: 'spki' }) as string }))).toBe(
      'key.reused',
    )
  })

  test('it opens no door: neither MQTT nor EST takes it, whatever else it may be for', async () => {
    const { der } = await certify()
    const connect = { clientId: 'line-1', username: 'line-1', password: undefined, certificate: der, exporter: new Uint8Array(32), from: '192.0.2.0/24' }
    expect(await admitConnection(ctx, connect)).toEqual({ refused: 'unauthenticated' })
    const request = { csr: await line.request(), chain: [der], basic: null, from: '192.0.2.0/24' }
    expect(await reasonOf(estReenrol(ctx, request))).toBe('certificate.unknown')
    expect(['done', 'certificate.unknown']).not.toContain(await reasonOf(estEnrol(ctx, request)))
  })

  test('two orders at once: both are issued, one counts, and the store has no two newest ones', async () => {
    const both = await Promise.all([certify(), certify()].map(reasonOf))
    expect(both).toContain('done')
    const { certificates } = await searchCertificates(ctx, { profile: 'station', state: 'valid', limit: 9 })
    expect(certificates.map(({ id }) => id)).toEqual([(await row())?.certificate])
  })
})

describe('what it signs counts while its newest certificate is in force', () => {
  test('from the first one on, and again with the next', async () => {
    await enlist()
    await certify()
    await enlist()
    ctx.clock.now += 90 * day
    await enlist()
    ctx.clock.now += 1000
    const late = enlist()
    expect(await reasonOf(late)).toBe('station.certificate-expired')
    await expect(late).rejects.toThrow('fleetkey station certify line-1 --csr FILE')
    const release = JSON.stringify({ format: 'fleetkey/release/1', model: 'gateway', name: '1', number: 1, debug: false, pcrs: { 0: '0'.repeat(64) } })
    expect(await reasonOf(importRelease(ctx, operator(), line.signed(release)))).toBe('station.certificate-expired')
    await certify()
    await enlist()
    expect(await reasonOf(importRelease(ctx, operator(), line.signed(release)))).toBe('done')
    // A signature that is none says so, certificate or not.
    const { signature, ...rest } = line.signed(release)
    expect(await reasonOf(importRelease(ctx, operator(), { ...rest, signature: signature.slice(1) }))).toBe('station.signature')
  })

  test('not under a CA that counts no more', async () => {
    await certify()
    Object.assign(ctx.authority, { retired: new Set(['issuing-ca']) })
    expect(await reasonOf(enlist())).toBe('station.certificate-ca-retired')
    Object.assign(ctx.authority, { retired: new Set() })
    expect(await reasonOf(enlist())).toBe('done')
  })

  test('a quota: so many devices under one certificate, whatever comes at the same time', async () => {
    await certify({ devices: 10 })
    await enlist(4)
    expect((await row())?.quota).toEqual({ devices: 10, admitted: 4 })
    const at = await Promise.all([enlist(4), enlist(4)].map(reasonOf))
    expect(at.toSorted()).toEqual(['done', 'station.quota'])
    expect([await reasonOf(enlist(3)), await reasonOf(enlist(2)), await reasonOf(enlist(1))]).toEqual(['station.quota', 'done', 'station.quota'])
    expect(await ctx.store.count('device')).toBe(10)
    await certify({ devices: 3 })
    expect([await reasonOf(enlist(3)), await reasonOf(enlist(1))]).toEqual(['done', 'station.quota'])
    await certify()
    expect([await reasonOf(enlist(50)), (await row())?.quota]).toEqual(['done', undefined])
  })

  test('suspended, reinstated, revoked: its certificates with it, those before the newest too', async () => {
    await certify()
    ctx.clock.now += day
    await certify()
    await suspendStation(ctx, operator(), line.id, 'missing')
    expect(await states()).toEqual(['suspended', 'suspended'])
    expect([await reasonOf(certify()), await reasonOf(enlist())]).toEqual(['station.suspended', 'station.suspended'])
    await reinstateStation(ctx, operator(), line.id)
    expect(await states()).toEqual(['superseded', 'valid'])
    expect(await reasonOf(enlist())).toBe('done')
    ctx.published.splice(0)
    await revokeStation(ctx, operator(), line.id, 'copied', 'keyCompromise')
    expect(await states()).toEqual(['revoked', 'revoked'])
    // The lists and the responder have heard of it.
    expect(ctx.published.map(({ status, code }) => [status, code])).toEqual([
      ['revoked', 'keyCompromise'],
      ['revoked', 'keyCompromise'],
    ])
    expect([await reasonOf(certify()), await reasonOf(enlist())]).toEqual(['station.revoked', 'station.revoked'])
    expect(await stationRadius(ctx, line.id, { limit: 10 })).toMatchObject({ certificates: [{ status: 'revoked' }, { status: 'revoked' }] })
  })

  test('removed: they are revoked, and its key has no other one', async () => {
    await certify()
    await removeStation(ctx, operator(), line.id)
    expect(await states()).toEqual(['revoked'])
    expect(ctx.published.map(({ code }) => code)).toEqual(['cessationOfOperation'])
    await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
    expect([await reasonOf(enlist()), await reasonOf(certify())]).toEqual(['done', 'key.revoked'])
  })

  test('calendar and alerts have it', async () => {
    await certify()
    const spans = await calendar(ctx, { by: 'day', until: ctx.clock.now + 100 * day, profile: 'station' })
    expect(spans).toMatchObject([{ certificates: 1, kinds: [{ profile: 'station', issuer: 'issuing-ca', certificates: 1 }] }])
    ctx.clock.now += 80 * day
    const raised = await raiseAlerts(ctx, { deadlines: [], marks: [30 * day, 7 * day] })
    expect(raised).toMatchObject([{ type: 'certificates.expiring', subject: 'station by issuing-ca', certificates: 1 }])
  })
})

describe('a crash leaves', () => {
  test.each([
    ['issue.intended', 0],
    ['issue.signed', 0],
    ['station.certified', 1],
  ])('at %s nothing that a second order does not put right', async (at, certificates) => {
    const { step } = ctx
    const killed: TestContext = {
      ...ctx,
      step: (name) => {
        step(name)
        if (name === at) throw new Error(`killed at ${name}`)
      },
    }
    const csr = await line.request()
    await expect(certifyStation(killed, operator(), { id: line.id, csr, devices: 5 })).rejects.toThrow(at)
    await sweepIntents(ctx)
    expect(await ctx.store.count('intent', { unissued: 'open' })).toBe(0)
    expect((await states()).length).toBe(certificates)
    ctx.clock.now += 1000
    await certify({ devices: 5 })
    expect((await states()).filter((state) => state === 'valid')).toHaveLength(1)
    expect((await row())?.quota).toEqual({ devices: 5, admitted: 0 })
    await enlist(5)
  })

  test('the store fails at each commit: what there is can be revoked, and what is not recorded does not count', async () => {
    for (const at of [1, 2]) {
      let commits = 0
      const commit: TestContext['store']['commit'] = async (changes, options) => {
        if (changes.writes.length > 0 && ++commits === at) throw new Error('no space left on device')
        return await ctx.store.commit(changes, options)
      }
      await expect(certifyStation({ ...ctx, store: { ...ctx.store, commit } }, operator(), { id: line.id, csr: await line.request() })).rejects.toThrow(
        'no space left',
      )
      expect([(await row())?.certificate, await states()]).toEqual([undefined, []])
      await enlist()
    }
  })
})

describe.skipIf(!hasProgram('openssl'))('on the command line', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-station-'))
  afterEach(() => rmSync(folder, { recursive: true, force: true }))
  const at = (name: string): string => join(folder, name)
  const run = async (...words: string[]): Promise<{ code: number; stdout: string; stderr: string }> => {
    let [stdout, stderr] = ['', '']
    const out = vi.spyOn(process.stdout, 'write').mockImplementation((text) => ((stdout += String(text)), true))
    const err = vi.spyOn(process.stderr, 'write').mockImplementation((text) => ((stderr += String(text)), true))
    try {
      return { code: await main(words, {}), stdout, stderr }
    } finally {
      out.mockRestore()
      err.mockRestore()
    }
  }

  test('openssl makes the request, the certificate verifies, lists and responder say when it is revoked', { timeout: 60_000 }, async () => {
    const world = await openWorld({ args: ['--http-port', '0', '--status-url', 'http://127.0.0.1:1'] })
    try {
      const here = ['--data', join(world.folder, 'server')]
      execFileSync('openssl', ['genpkey', '-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256', '-out', at('line.key')])
      execFileSync('openssl', ['pkey', '-in', at('line.key'), '-pubout', '-out', at('line.pem')])
      execFileSync('openssl', ['req', '-new', '-key', at('line.key'), '-subj', '/CN=line-7', '-out', at('line.csr')])
      expect(await run('station', 'add', 'line-7', at('line.pem'), ...here)).toMatchObject({ code: 0 })
      expect((await run('station', 'show', 'line-7', ...here)).stdout).toContain('none: what it signs counts without')
      const refused = await run('station', 'certify', 'line-7', '--csr', at('line.pem'), ...here)
      expect([refused.code === 0, refused.stderr]).toEqual([false, expect.stringContaining('a block of PUBLIC KEY') as string])
      const made = await run('station', 'certify', 'line-7', '--csr', at('line.csr'), '--devices', '500', '--out', at('line.crt'), ...here)
      expect(made).toMatchObject({ code: 0, stdout: expect.stringContaining('500 devices') as string })
      const certificate = new X509Certificate(readFileSync(at('line.crt')))
      expect([certificate.subject, certificate.subjectAltName]).toEqual(['CN=line-7', 'URI:spiffe://default/station/line-7'])
      writeFileSync(at('root.pem'), world.bundle.trust[0] ?? '')
      expect(execFileSync('openssl', ['verify', '-x509_strict', '-CAfile', at('root.pem'), '-untrusted', at('line.crt'), at('line.crt')]).toString()).toContain(
        'OK',
      )
      for (const [words, text] of [
        [['station', 'list'], '0 of 500'],
        [['station', 'show', 'line-7'], '0 of 500'],
        [['ca', 'list', '--profile', 'station'], 'line-7'],
        [['station', 'blast-radius', 'line-7'], `${certificate.serialNumber.toLowerCase()} valid until`],
      ] as const)
        expect((await run(...words, ...here)).stdout, words.join(' ')).toContain(text)
      writeFileSync(at('issuing.pem'), world.bundle.chain[0] ?? '')
      writeFileSync(at('chain.pem'), `${world.bundle.chain[0] ?? ''}${world.bundle.trust[0] ?? ''}`)
      const status = async (): Promise<string> => {
        const asked = ['-issuer', at('issuing.pem'), '-cert', at('line.crt'), '-url', `http://127.0.0.1:${world.server.httpPort ?? 0}/ocsp`]
        return (await promisify(execFile)('openssl', ['ocsp', ...asked, '-CAfile', at('chain.pem')])).stdout
      }
      expect(await status()).toContain('line.crt: good')
      expect((await run('station', 'revoke', 'line-7', '--reason', 'keyCompromise', ...here)).code).toBe(0)
      expect((await run('ca', 'list', '--profile', 'station', '--state', 'revoked', ...here)).stdout).toContain('line-7')
      expect(await status()).toMatch(/line\.crt: revoked[^]*Reason: keyCompromise/)
      await until('it is on the list', async () => {
        const list = Buffer.from(await (await fetch(`http://127.0.0.1:${world.server.httpPort ?? 0}/crl/issuing-delta.crl`)).arrayBuffer())
        writeFileSync(at('delta.crl'), list)
        return execFileSync('openssl', ['crl', '-inform', 'DER', '-in', at('delta.crl'), '-noout', '-text'], { encoding: 'utf8' }).includes(
          certificate.serialNumber,
        )
      })
      const again = await run('station', 'certify', 'line-7', '--csr', at('line.csr'), ...here)
      expect([again.code === 0, again.stderr]).toEqual([false, expect.stringContaining('is revoked') as string])
    } finally {
      await world.stop()
    }
  })
})
