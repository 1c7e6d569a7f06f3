import { execFileSync } from 'node:child_process'
import { createHash, randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { makeOcspRequest } from '@fleetkey/protocol/x509/ocsp.ts'
import { alertService } from '@fleetkey/server/api/alerts.ts'
import { estServer } from '@fleetkey/server/api/est.ts'
import { defaultProfiles } from '@fleetkey/server/ca/profiles.ts'
import { serverTls } from '@fleetkey/server/flows/authority.ts'
import type { Around } from '@fleetkey/server/flows/doctor/check.ts'
import { checks, examine, type Finding } from '@fleetkey/server/flows/doctor/examine.ts'
import { firstToken } from '@fleetkey/server/flows/first-token.ts'
import { addOperator } from '@fleetkey/server/flows/operator.ts'
import { retireKek, rotateKek } from '@fleetkey/server/flows/kek.ts'
import { rewrapAll } from '@fleetkey/server/flows/rewrap.ts'
import { prepareCertificates } from '@fleetkey/server/flows/issue.ts'
import { ocspResponder } from '@fleetkey/server/flows/ocsp.ts'
import { activateCa, distributeCa, prepareCa } from '@fleetkey/server/flows/rollover.ts'
import { askApproval } from '@fleetkey/server/flows/second-person.ts'
import { listMaker } from '@fleetkey/server/api/list-maker.ts'
import { statusLists } from '@fleetkey/server/flows/status-lists.ts'
import { certifyStation } from '@fleetkey/server/flows/station-certificate.ts'
import { addStation } from '@fleetkey/server/flows/station.ts'
import { suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { diskRoom } from '@fleetkey/server/store/sqlite/disk.ts'
import { reserveIn } from '@fleetkey/server/store/sqlite/reserve.ts'
import { change } from './conformance/store.ts'
import { operator, station, testContext, type TestContext } from './harness.ts'
import { healthy } from './healthy.ts'
import { hasProgram } from './programs.ts'
import { given, openDevices } from './returning.ts'
import { spkiPair } from './spki.ts'

const [minute, hour, day] = [60_000, 3_600_000, 86_400_000]

let ctx: TestContext
let around: Around
let folder: string
const undo: (() => Promise<void> | void)[] = []

beforeEach(async () => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-doctor-'))
  ctx = await testContext()
  const tls = await serverTls(ctx, ctx.authority, ['plant.example'])
  around = { ...healthy, tls: () => tls, names: ['plant.example'] }
})
afterEach(async () => {
  for (const back of undo.splice(0).toReversed()) await back()
  await ctx.close()
  rmSync(folder, { recursive: true, force: true })
})

const found = async (name: string): Promise<Finding> => {
  const finding = (await examine(ctx, around)).find(({ check }) => check === name)
  if (finding === undefined) throw new Error(`no check ${name}`)
  return finding
}

/** One device that has enrolled and was connected. */
const enrolled = async () => {
  const [device] = await openDevices(ctx)
  if (device === undefined) throw new Error('no device')
  expect(await device.connect(given(await device.prove('enrol')))).toBe('accepted')
  return device
}

const crashAt = async (step: string, work: () => Promise<unknown>): Promise<void> => {
  const { step: before } = ctx
  Object.assign(ctx, {
    step: (name: string) => {
      if (name === step) throw new Error(`killed at ${name}`)
    },
  })
  await expect(work()).rejects.toThrow(step)
  Object.assign(ctx, { step: before })
}

const another = async (): Promise<TestContext> => {
  const other = await testContext()
  undo.push(async () => await other.close())
  return other
}

/** A setting as somebody else has written it. */
const tamper = async (id: string, value: Uint8Array): Promise<void> => {
  const row = await ctx.store.get('setting', id)
  if (row === undefined) throw new Error(`no setting ${id}`)
  await ctx.store.commit(change({ table: 'setting', do: 'update', row: { ...row, value } }))
}

const rootSerial = async (): Promise<string> => parseCertificate(ctx.authority.root).serial

const asked = async (): Promise<void> => {
  const { issuing } = ctx.authority
  const { serial } = parseCertificate(issuing)
  // About the issuing CA, which the root answers for, and about something of the issuing CA itself.
  for (const [issuer, number] of [
    [ctx.authority.byRoot, serial],
    [ctx.authority, '41'],
  ] as const) {
    const names = { hash: 'sha256', issuerNameHash: sha256(issuer.subject), issuerKeyHash: sha256(issuer.spki.subarray(-65)) } as const
    await ocspResponder(ctx).answer(makeOcspRequest({ ...names, serial: Buffer.from(number, 'hex') }))
  }
}
const sha256 = (bytes: Uint8Array): Uint8Array => new Uint8Array(createHash('sha256').update(bytes).digest())

type Case = readonly [check: string, what: string, grade: Finding['grade'], found: RegExp, spoil: () => Promise<void> | void]

const lists = async (): Promise<() => NonNullable<ReturnType<Around['lists']>>> => {
  const made = statusLists(ctx, 'http://crl.test/crl/', listMaker)
  await made.publish()
  await made.close()
  return () => [...made.all()].map(([name, { thisUpdate, nextUpdate }]) => ({ name, thisUpdate, nextUpdate }))
}

const cases: readonly Case[] = [
  ['KMS answers', 'its process is gone', 'failure', /cannot be checked/, async () => await ctx.kms.close()],
  ['CA keys', 'a key was destroyed', 'failure', /issuing-ca is not in the KMS/, async () => await ctx.kms.destroy('issuing-ca')],
  [
    'CA keys match',
    'a key of another server under its name',
    'failure',
    /issuing-ca is another key/,
    async () => {
      await ctx.kms.destroy('issuing-ca')
      await ctx.kms.create('issuing-ca', 'issuing-ca')
    },
  ],
  ['message keys and KEK', 'no KEK', 'failure', /kek is not in the KMS/, async () => await ctx.kms.destroy('kek')],
  [
    'message keys and KEK',
    'another key that signs deliveries',
    'failure',
    /delivery-signing is another key/,
    async () => {
      await ctx.kms.destroy('delivery-signing')
      await ctx.kms.create('delivery-signing', 'delivery-signing')
    },
  ],
  [
    'former KEK',
    'everything is wrapped anew, and nobody retires it',
    'warning',
    /^kek is not needed since \d{4}-\d\d-\d\d and not retired$/,
    async () => {
      await rotateKek(ctx, operator(), rewrapAll)
      ctx.clock.now += 6 * day
      expect((await found('former KEK')).grade).toBe('ok')
      ctx.clock.now += 2 * day
    },
  ],
  [
    'former KEK',
    'a rotation that ended before everything was wrapped anew',
    'failure',
    /^what kek has wrapped is being wrapped by kek-2 since /,
    async () => {
      await crashAt('kek.switched', async () => await rotateKek(ctx, operator(), rewrapAll))
      ctx.clock.now += 16 * minute
    },
  ],
  [
    'former KEK',
    'a successor that was never made',
    'failure',
    /^kek-2 is being made since /,
    async () => {
      await crashAt('kek.intended', async () => await rotateKek(ctx, operator(), rewrapAll))
      ctx.clock.now += 16 * minute
    },
  ],
  [
    'former KEK',
    'it was retired, and is still there',
    'failure',
    /^kek is being destroyed since /,
    async () => {
      await rotateKek(ctx, operator(), rewrapAll)
      await crashAt('kek.retiring', async () => await retireKek(ctx, operator(), rewrapAll))
      ctx.clock.now += 16 * minute
    },
  ],
  [
    'CA chain',
    'the root of another server',
    'failure',
    /issuing-ca does not lead to its root/,
    async () => {
      await tamper('ca/root', (await another()).authority.root)
      await ctx.authority.reload()
    },
  ],
  ['CA chain', 'a clock before the CA was made', 'failure', /issuing-ca does not lead to its root/, () => void (ctx.clock.now -= 30 * day)],
  ['CA end', 'half a year left', 'warning', /issuing-ca until/, () => void (ctx.clock.now = parseCertificate(ctx.authority.issuing).notAfter - 170 * day)],
  ['CA end', 'days left', 'failure', /issuing-ca until/, () => void (ctx.clock.now = parseCertificate(ctx.authority.issuing).notAfter - 20 * day)],
  ['CA outlives what it signs', 'identities would live longer', 'warning', /an identity issued today lives until/, () => void (ctx.clock.now += 8 * 365 * day)],
  [
    'CA certificates on record',
    'the record of the root says that it is revoked',
    'failure',
    /root-ca is in use and revoked/,
    async () => {
      const row = await ctx.store.get('certificate', await rootSerial())
      if (row !== undefined) await ctx.store.commit(change({ table: 'certificate', do: 'update', row: { ...row, status: 'revoked', revokedAt: 1 } }))
    },
  ],
  [
    'CA certificates on record',
    'another certificate with the serial of the root',
    'failure',
    /root-ca: another certificate has serial/,
    async () => {
      const row = await ctx.store.get('certificate', await rootSerial())
      const der = (await another()).authority.root
      if (row !== undefined) await ctx.store.commit(change({ table: 'certificate', do: 'update', row: { ...row, der } }))
    },
  ],
  [
    'records of certificates',
    'two records for one serial',
    'failure',
    /^4abc is the record of /,
    async () => {
      const row = await ctx.store.get('certificate', await rootSerial())
      if (row !== undefined)
        await ctx.store.commit(change({ table: 'certificate', do: 'insert', row: { ...row, id: '4abc', version: 0, spkiHash: 's', profile: 'device-tls' } }))
    },
  ],
  [
    'certificate profiles',
    'one that breaks a rule',
    'failure',
    /device-tls breaks key-usage\.ca/,
    () => void Object.assign(ctx.authority, { profiles: { ...defaultProfiles, 'device-tls': { ...defaultProfiles['device-tls'], usages: ['keyCertSign'] } } }),
  ],
  [
    'active CA',
    'a start that did not finish',
    'failure',
    /issuing-ca-9 signs, and generation 1 is active/,
    () => void Object.assign(ctx.authority, { key: 'issuing-ca-9' }),
  ],
  [
    'issuances',
    'the server was killed before it signed',
    'warning',
    /1 were begun more than 10 minutes ago/,
    async () => {
      const order = { profile: 'device-tls', device: DeviceId.parse('gw-1'), subject: 'gw-1', spki: spkiPair() } as const
      const intent = { caller: operator(), action: 'fleet.read', subject: 'gw-1' } as const
      await crashAt('issue.intended', async () => await prepareCertificates(ctx, ctx.authority, intent, [order]))
      ctx.clock.now += hour
    },
  ],
  [
    'revocation lists',
    'named in certificates, served by nobody',
    'failure',
    /nobody serves it/,
    () => void Object.assign(around, { statusUrl: 'http://crl.test' }),
  ],
  [
    'revocation lists',
    'not made anew for six days',
    'warning',
    /issuing\.crl ends on/,
    async () => {
      const made = (await lists())()
      Object.assign(around, { lists: () => made.filter(({ name }) => !name.endsWith('-delta.crl')) })
      ctx.clock.now += 6 * day
    },
  ],
  [
    'revocation lists',
    'not made anew for eight days',
    'failure',
    /issuing\.crl ended on/,
    async () => {
      Object.assign(around, { lists: await lists() })
      ctx.clock.now += 8 * day
    },
  ],
  [
    'delta lists',
    'one is missing',
    'failure',
    /^issuing\.crl has no delta$/,
    async () => {
      const made = (await lists())()
      Object.assign(around, { lists: () => made.filter(({ name }) => name !== 'issuing-delta.crl') })
    },
  ],
  [
    'OCSP responders',
    'its certificate has ended',
    'failure',
    /that of (root|issuing) ended on/,
    async () => {
      await asked()
      ctx.clock.now += 40 * day
    },
  ],
  [
    'OCSP responders',
    'its key is another',
    'failure',
    /the key of ocsp-issuing is not that of its certificate/,
    async () => {
      await asked()
      await ctx.kms.destroy('ocsp-issuing')
    },
  ],
  [
    'OCSP responders',
    'the certificate of another CA',
    'failure',
    /that of issuing is not signed by it/,
    async () => {
      await asked()
      const root = await ctx.store.get('setting', 'ca/ocsp/root')
      await tamper('ca/ocsp/issuing', root?.value ?? new Uint8Array())
    },
  ],
  [
    'TLS certificate',
    'a name that it does not have',
    'failure',
    /does not name other\.example/,
    () => void Object.assign(around, { names: ['other.example'] }),
  ],
  ['TLS certificate', 'it has ended', 'failure', /ended on/, () => void (ctx.clock.now += 31 * day)],
  ['TLS certificate', 'it was not renewed', 'warning', /ends on/, () => void (ctx.clock.now += 28 * day)],
  [
    'EST listener',
    'it has stopped',
    'failure',
    /does not listen/,
    async () => {
      const server = estServer(ctx, await serverTls(ctx, ctx.authority, ['localhost']))
      await new Promise<void>((resolve) => void server.listen(0, '127.0.0.1', resolve))
      Object.assign(around, { est: () => ({ listening: server.listening }) })
      expect(await found('EST listener')).toMatchObject({ grade: 'ok' })
      await new Promise((resolve) => server.close(resolve))
    },
  ],
  [
    'devices past renewal',
    'away for four days',
    'warning',
    /^1 of 1 have let/,
    async () => {
      await enrolled()
      ctx.clock.now += 4 * day
    },
  ],
  [
    'identities that end',
    'in the last month of an identity',
    'warning',
    /^1 of 1 end within/,
    async () => {
      const device = await enrolled()
      const row = await ctx.store.get('certificate', (await device.row()).ldevidSerial)
      ctx.clock.now = (row?.notAfter ?? 0) - 20 * day
    },
  ],
  [
    'recovery budgets',
    'a device that came back too often',
    'warning',
    /^1 devices wait for a person: gw-1$/,
    async () => {
      Object.assign(ctx, { recoveries: { count: 1, window: 30 * day } })
      const device = await enrolled()
      ctx.clock.now += day
      expect(await device.connect(given(await device.prove('return')))).toBe('accepted')
      ctx.clock.now += day
      expect(await device.prove('return')).toMatchObject({ code: 'forbidden' })
    },
  ],
  [
    'certificates in force',
    'all that sign messages are revoked',
    'failure',
    /4 revoked/,
    async () => {
      const rows = (await ctx.store.find('certificate', { limit: 100 })).filter(({ profile }) => profile === 'server-signing')
      await ctx.store.commit(
        change(...rows.map((row) => ({ table: 'certificate' as const, do: 'update' as const, row: { ...row, status: 'revoked' as const } }))),
      )
    },
  ],
  [
    'superseded certificates',
    'one whose time was over long ago is still there',
    'warning',
    /^1 TLS certificates of devices, removed 30 days after their end; one that ended on 20\d\d-\d\d-\d\d is still there$/,
    async () => {
      const device = await enrolled()
      expect(await device.connect(given(await device.prove('enrol')))).toBe('accepted')
      ctx.clock.now += 40 * 86_400_000
    },
  ],
  [
    'station certificates',
    'one that has run out',
    'failure',
    /^line-1: station\.certificate-expired$/,
    async () => {
      const line = station()
      await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
      await certifyStation(ctx, operator(), { id: line.id, csr: await line.request() })
      ctx.clock.now += 91 * day
    },
  ],
  [
    'station certificates',
    'one of the CA before the active one',
    'warning',
    /^line-1: certified by a CA that another one has followed$/,
    async () => {
      const line = station()
      await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
      await certifyStation(ctx, operator(), { id: line.id, csr: await line.request() })
      await prepareCa(ctx, operator(), { root: false })
      await distributeCa(ctx, operator())
      await activateCa(ctx, operator(), null)
    },
  ],
  [
    'station certificates',
    'one that ends soon',
    'warning',
    /^line-1 until 20\d\d-\d\d-\d\d$/,
    async () => {
      const line = station()
      await addStation(ctx, operator(), { id: line.id, publicKey: line.publicKey })
      await certifyStation(ctx, operator(), { id: line.id, csr: await line.request() })
      ctx.clock.now += 80 * day
    },
  ],
  [
    'suspended devices',
    'one that nobody decides about',
    'warning',
    /^1 for more than 30 days: gw-1$/,
    async () => {
      await enrolled()
      await suspendDevice(ctx, operator(), DeviceId.parse('gw-1'), 'lost')
      ctx.clock.now += 31 * day
    },
  ],
  [
    'trust bundle',
    'a device that never hears of it',
    'warning',
    /acknowledged by 0 of 1, 0 waiting, 0 stranded/,
    async () => {
      await enrolled()
      await prepareCa(ctx, operator(), { root: true })
      await distributeCa(ctx, operator())
      ctx.clock.now += 8 * day
    },
  ],
  [
    'rollover',
    'killed in the middle of preparing',
    'failure',
    /generation 2 is preparing since/,
    async () => {
      await crashAt('rollover.intended', async () => await prepareCa(ctx, operator(), { root: false }))
      await ctx.authority.reload()
      ctx.clock.now += hour
    },
  ],
  [
    'rollover',
    'prepared, and forgotten',
    'warning',
    /generation 2 is prepared since/,
    async () => {
      await prepareCa(ctx, operator(), { root: false })
      ctx.clock.now += 15 * day
    },
  ],
  [
    'rollover',
    'superseded, and never tainted',
    'warning',
    /generation 1 is superseded since/,
    async () => {
      await prepareCa(ctx, operator(), { root: false })
      await distributeCa(ctx, operator())
      await activateCa(ctx, operator(), null)
      ctx.clock.now += 91 * day
    },
  ],
  [
    'approvals',
    'nobody looks at it',
    'warning',
    /ca\.retire generation 1, asked by alice/,
    async () => {
      await askApproval(ctx, operator(), { what: 'ca.retire generation 1', detail: 'x', reason: 'y' })
      ctx.clock.now += 5 * hour
    },
  ],
  ['clock of the server', 'set back', 'failure', /s behind the newest entry/, () => void (ctx.clock.now -= 2 * minute)],
  [
    'webhook',
    'a receiver that is gone',
    'failure',
    /127\.0\.0\.1:1 has failed 5 times in a row \(.*ECONNREFUSED/,
    async () => {
      const webhook = { url: new URL('https://127.0.0.1:1/'), secret: new Secret(randomBytes(32)), ca: undefined }
      const deadlines = async () => [{ name: 'issuing', kind: 'ca' as const, begins: 0, at: ctx.clock.now + day }]
      const alerts = alertService(ctx, { marks: [2 * day], webhook, deadlines })
      undo.push(async () => await alerts.stop())
      Object.assign(around, { webhook: alerts.health })
      await alerts.round()
      expect(await found('webhook')).toMatchObject({ grade: 'warning' })
      for (let failure = 1; failure < 5; failure++) {
        ctx.clock.now += hour
        await alerts.round()
      }
    },
  ],
  [
    'disk',
    'the reserve was given back',
    'failure',
    /reserve for revocations not held/,
    async () => {
      const path = join(folder, 'store')
      await (await openSqliteStore(path)).close()
      Object.assign(around, { disk: () => diskRoom(path) })
      expect((await found('disk')).found).toContain('reserve for revocations held')
      reserveIn(path).release()
    },
  ],
]

describe('doctor', () => {
  test('a server that is well: nothing fails, and the one warning is that there is one owner', async () => {
    const findings = await examine(ctx, around)
    expect(findings.filter(({ grade }) => grade !== 'ok')).toMatchObject([{ check: 'second person', grade: 'warning' }])
    expect(findings.map(({ check }) => check)).toEqual(checks.map(({ name }) => name))
    expect(new Set(checks.map(({ name }) => name)).size).toBe(checks.length)
    expect(checks.length).toBeGreaterThanOrEqual(20)
    for (const { remedy } of checks) expect(remedy.length).toBeGreaterThan(20)
    await firstToken(ctx, undefined, () => undefined)
    await addOperator(ctx, operator(), { id: 'bob', roles: ['owner'] })
    expect(await found('second person')).toMatchObject({ grade: 'ok', remedy: '' })
  })

  test.each(cases)('%s: %s', async (name, _what, grade, pattern, spoil) => {
    expect((await found(name)).grade).toBe('ok')
    await spoil()
    const finding = await found(name)
    expect(finding).toMatchObject({ grade, found: expect.stringMatching(pattern) as string })
    expect(finding.remedy).toBe(checks.find((check) => check.name === name)?.remedy)
  })

  test.skipIf(!hasProgram('openssl'))('algorithms: a maker whose CA is RSA of 1024 bits with SHA-1', async () => {
    const file = join(folder, 'weak')
    execFileSync(
      'openssl',
      [
        'req',
        '-x509',
        '-newkey',
        'rsa:1024',
        '-nodes',
        '-sha1',
        '-subj',
        '/CN=Old maker',
        '-days',
        '30',
        '-keyout',
        `${file}.key`,
        '-outform',
        'der',
        '-out',
        file,
      ],
      {
        stdio: 'ignore',
      },
    )
    const certificate = new Uint8Array(execFileSync('cat', [file]))
    const id = createHash('sha256').update(certificate).digest('hex')
    await ctx.store.commit(
      change({ table: 'endorsement', do: 'insert', row: { id, version: 0, certificate, subject: 'CN=Old maker', test: false, importedAt: 1 } }),
    )
    expect(await found('algorithms')).toMatchObject({ grade: 'warning', found: expect.stringMatching(/RSA of 1024 bits.*signed with/) as string })
  })

  test('every check has a case that makes it fail', () => {
    const tried = new Set([...cases.map(([name]) => name), 'algorithms', 'second person'])
    expect(checks.map(({ name }) => name).filter((name) => !tried.has(name))).toEqual([])
  })

  test('a check that hangs holds up no other: 5 seconds, then it counts as a failure', async () => {
    Object.assign(ctx.kms, { wrap: async () => await new Promise(() => undefined) })
    const findings = await examine(ctx, around)
    expect(findings.filter(({ grade }) => grade === 'failure')).toMatchObject([{ check: 'KMS answers', found: 'not answered within 5 s' }])
  })

  test('it writes nothing', async () => {
    const before = await ctx.store.checkpoint()
    await examine(ctx, around)
    expect(await ctx.store.checkpoint()).toEqual(before)
  })
})
