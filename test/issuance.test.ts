import { execFileSync, spawnSync } from 'node:child_process'
import { createPublicKey, generateKeyPairSync, verify, X509Certificate } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, readBits, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { secondReading } from '@fleetkey/protocol/x509/library.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import type { ProfileName } from '@fleetkey/server/ca/certificate.ts'
import { ProfileSettings, profilesOf } from '@fleetkey/server/ca/profile-settings.ts'
import { defaultProfiles, profileNames } from '@fleetkey/server/ca/profiles.ts'
import { readSettings, SettingsError } from '@fleetkey/server/config.ts'
import type { Caller } from '@fleetkey/server/access/caller.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import type { Base } from '@fleetkey/server/flows/context.ts'
import { claimSpki, prepareCertificates, recordIssued, sweepIntents, type Issued, type Order } from '@fleetkey/server/flows/issue.ts'
import { perform, type Intent } from '@fleetkey/server/flows/perform.ts'
import { openMemoryStore } from '@fleetkey/server/store/memory.ts'
import { testContext, type TestContext } from './harness.ts'
import { hasProgram } from './programs.ts'

const caller: Caller = { kind: 'device', id: DeviceId.parse('gw-1'), from: '127.0.0.0/24' }
const intent: Intent = { caller, action: 'enrol.issue', subject: 'gw-1' }
const newKey = (namedCurve = 'prime256v1'): Uint8Array =>
  new Uint8Array(generateKeyPairSync('ec', { namedCurve }).publicKey.export({ format: 'der', type: 'spki' }))
const orderOf = (profile: ProfileName, id = 'gw-1', spki = newKey()): Order => ({ profile, subject: id, spki, device: DeviceId.parse(id) })

const record = async (ctx: Base, issued: readonly Issued[]): Promise<void> =>
  await perform(ctx, intent, async (tx) => {
    for (const one of issued) {
      await claimSpki(ctx, tx, one)
      recordIssued(tx, one)
    }
  })
const reasonOf = async (work: Promise<unknown>): Promise<string> =>
  await work.then(
    () => 'done',
    (error: unknown) => (error instanceof Problem ? (error.reason ?? error.code) : Promise.reject(error instanceof Error ? error : new Error(String(error)))),
  )

let ctx: TestContext
beforeEach(async () => {
  ctx = await testContext()
})
afterEach(async () => await ctx.close())

const issue = async (...orders: readonly Order[]): Promise<readonly Issued[]> => {
  const issued = await prepareCertificates(ctx, ctx.authority, intent, orders)
  await record(ctx, issued)
  return issued
}

describe('the order of issuing', () => {
  test('intent durable, linted, signed, stored', async () => {
    const seen: string[] = []
    const before = ctx.kms
    const watched: Base = {
      ...ctx,
      store: {
        ...ctx.store,
        commit: async (changes, options) => {
          const verdict = await ctx.store.commit(changes, options)
          for (const write of changes.writes)
            if (write.do !== 'delete') seen.push(`${write.do} ${write.table} ${'state' in write.row ? write.row.state : ''}`.trim())
          return verdict
        },
      },
      kms: {
        ...before,
        sign: async (batch) => {
          seen.push(`sign ${batch.length}`)
          return await before.sign(batch)
        },
      },
    }
    const issued = await prepareCertificates(watched, ctx.authority, intent, [orderOf('device-identity'), orderOf('device-tls')])
    await record(watched, issued)
    expect(seen).toEqual([
      'insert intent open',
      'insert intent open',
      'sign 2',
      'update intent issued',
      'insert certificate',
      'update intent issued',
      'insert certificate',
    ])
  })

  const faulty: readonly (readonly [string, Partial<Order>, string])[] = [
    ['a key that the profile does not admit', { spki: newKey('secp384r1') }, 'lint.key.allowed'],
    ['the key of the CA', {}, 'lint.key.issuer'],
    ['a name of 65 characters', { subject: 'g'.repeat(65) }, 'lint.subject.length'],
    ['a name that leaves its path', { subject: 'gw-1/../gw-2' }, 'lint.subject.id'],
    ['a name with NUL', { subject: 'gw-1\0' }, 'lint.subject.control'],
  ]
  test.each(faulty)('%s: refused by the lint, audited, nothing signed', async (name, odd, reason) => {
    let signed = 0
    const watched: Base = { ...ctx, kms: { ...ctx.kms, sign: async (batch) => ((signed += batch.length), await ctx.kms.sign(batch)) } }
    const bad: Order = { ...orderOf('device-identity'), ...odd, ...(name === 'the key of the CA' ? { spki: ctx.authority.spki } : {}) }
    expect(await reasonOf(prepareCertificates(watched, ctx.authority, intent, [orderOf('device-tls'), bad]))).toBe(reason)
    expect(signed).toBe(0)
    expect((await ctx.store.find('intent', { where: { unissued: 'open' }, limit: 10 })).length).toBe(0)
    expect(await ctx.store.count('intent', { unissued: 'abandoned' })).toBe(2)
    const entries = (await ctx.entries()).slice(-2).map(({ outcome, code, detail }) => [outcome, code, detail])
    expect(entries).toEqual([
      ['done', null, `not signed: ${reason}`],
      ['refused', 'internal', expect.stringContaining(reason) as string],
    ])
  })

  test('a serial that was drawn before is refused by the store', async () => {
    const stuck: Base = { ...ctx, random: (length) => new Uint8Array(length).fill(7) }
    await prepareCertificates(stuck, ctx.authority, intent, [orderOf('device-tls')])
    expect(await reasonOf(prepareCertificates(stuck, ctx.authority, intent, [orderOf('device-tls')]))).toBe('conflict.intent.exists')
  })

  test('10,000 serials: all different, 16 bytes, positive, their second, and 92 bits of which each is of either kind', async () => {
    const began = ctx.now()
    const serials = new Set<string>()
    let [or, and] = [0n, (1n << 128n) - 1n]
    for (let done = 0; done < 10_000; done += 500) {
      const issued = await prepareCertificates(
        ctx,
        ctx.authority,
        intent,
        Array.from({ length: 500 }, () => orderOf('device-tls', 'gw-1', keys[done % 8] ?? newKey())),
      )
      for (const { intent: row } of issued) {
        serials.add(row.id)
        or |= BigInt(`0x${row.id}`)
        and &= BigInt(`0x${row.id}`)
      }
    }
    expect(serials.size).toBe(10_000)
    const drawn = BigInt(`0x00f0000000${'f'.repeat(22)}`)
    expect(or & drawn).toBe(drawn)
    expect(and & drawn).toBe(0n)
    expect(or >> 124n).toBe(4n)
    const seconds = [...serials].map((serial) => Number.parseInt(`${serial[1] ?? ''}${serial.slice(3, 10)}`, 16) * 1000)
    expect(seconds.every((second) => second >= began - 999 && second <= ctx.now())).toBe(true)
  })
  const keys = Array.from({ length: 8 }, () => newKey())

  /** Every commit fails once, in turn: what is left is no certificate without intent, and an intent that the next start ends. */
  test.each([1, 2])('the store fails at commit %i', async (at) => {
    let commits = 0
    const failing: Base = {
      ...ctx,
      store: {
        ...ctx.store,
        commit: async (changes, options) => {
          if (++commits === at) throw new Problem('unavailable', 'no space left on device', { reason: 'store.disk' })
          return await ctx.store.commit(changes, options)
        },
      },
    }
    const before = await ctx.store.count('certificate')
    const work = prepareCertificates(failing, ctx.authority, intent, [orderOf('device-tls')]).then(async (issued) => await record(failing, issued))
    expect(await reasonOf(work)).toBe('store.disk')
    expect(await ctx.store.count('certificate')).toBe(before)
    expect(await ctx.store.count('intent', { unissued: 'open' })).toBe(at - 1)
    await sweepIntents(ctx)
    expect(await ctx.store.count('intent', { unissued: 'open' })).toBe(0)
  })

  test('the KMS fails: no certificate, an intent that the next start ends', async () => {
    const failing: Base = { ...ctx, kms: { ...ctx.kms, sign: () => Promise.reject(new Problem('unavailable', 'gone', { reason: 'kms.closed' })) } }
    expect(await reasonOf(prepareCertificates(failing, ctx.authority, intent, [orderOf('device-tls')]))).toBe('kms.closed')
    await sweepIntents(ctx)
    expect(await ctx.store.count('intent', { unissued: 'open' })).toBe(0)
  })
})

describe('one key, one device, one purpose', () => {
  test('case 42: the key of another device', async () => {
    const spki = newKey()
    await issue(orderOf('device-identity', 'gw-1', spki))
    expect(await reasonOf(issue(orderOf('device-identity', 'gw-2', spki)))).toBe('key.reused')
    expect(await reasonOf(issue(orderOf('device-tls', 'gw-2', spki)))).toBe('key.reused')
  })

  test('case 44: the identity key as TLS key, and the other way round', async () => {
    const [identity, tls] = [newKey(), newKey()]
    await issue(orderOf('device-identity', 'gw-1', identity), orderOf('device-tls', 'gw-1', tls))
    expect(await reasonOf(issue(orderOf('device-tls', 'gw-1', identity)))).toBe('key.other-purpose')
    expect(await reasonOf(issue(orderOf('device-identity', 'gw-1', tls)))).toBe('key.other-purpose')
  })

  test('cases 43 and 52: the key of a revoked certificate, also for its own device', async () => {
    const spki = newKey()
    const [first] = await issue(orderOf('device-tls', 'gw-1', spki))
    const row = await ctx.store.get('certificate', first?.intent.id ?? '')
    await perform(ctx, { ...intent, action: 'device.revoke', caller: { kind: 'operator', id: 'alice', roles: ['owner'], from: 'test' } }, (tx) => {
      if (row !== undefined) tx.update('certificate', { ...row, status: 'revoked', revokedAt: ctx.now(), reason: 'stolen' })
    })
    expect(await reasonOf(issue(orderOf('device-tls', 'gw-1', spki)))).toBe('key.revoked')
  })

  test('case 43: the keys of the server', async () => {
    const rows = await ctx.store.find('certificate', { limit: 100 })
    expect(rows.map(({ profile }) => profile).toSorted()).toEqual([
      'issuing-ca',
      'root-ca',
      'server-signing',
      'server-signing',
      'server-signing',
      'server-signing',
    ])
    for (const { der, id } of rows) {
      const spki = parseCertificate(der).spki
      // The issuing CA's own key does not get past the lint.
      const want = Buffer.compare(spki, ctx.authority.spki) === 0 ? 'lint.key.issuer' : 'key.authority'
      expect(await reasonOf(issue(orderOf('device-tls', 'gw-1', spki))), id).toBe(want)
    }
  })

  test('the same device may have its key certified again', async () => {
    const spki = newKey()
    await issue(orderOf('device-identity', 'gw-1', spki))
    expect(await reasonOf(issue(orderOf('device-identity', 'gw-1', spki)))).toBe('done')
  })
})

describe('every profile', () => {
  const everyOrder = (): readonly Order[] =>
    profileNames.map((profile) => ({
      profile,
      subject: 'gw-1',
      spki: newKey(),
      device: null,
      ...(profile === 'server-signing' ? { role: 'challenge' as const } : {}),
      ...(profile === 'server-tls' ? { names: ['plant.example', '10.0.0.1', '2001:db8::1', 'localhost'] } : {}),
    }))

  test('what we issue, three parsers read the same, and OpenSSL accepts the signature', async () => {
    const isCa = ({ profile }: Order): boolean => profile === 'root-ca' || profile === 'cross-ca' || profile === 'issuing-ca'
    // Its key does not sign a CA, whatever the flow asks of it.
    expect(await reasonOf(prepareCertificates(ctx, ctx.authority, intent, everyOrder().filter(isCa)))).toBe('kms.content')
    for (let round = 0; round < 20; round++) {
      const byRoot = await prepareCertificates(ctx, ctx.authority.byRoot, intent, everyOrder().filter(isCa))
      const byIssuing = await prepareCertificates(
        ctx,
        ctx.authority,
        intent,
        everyOrder().filter((order) => !isCa(order)),
      )
      for (const { der, intent: row } of [...byRoot, ...byIssuing]) {
        // Our own reader throws when node reads another serial, subject, key or name.
        const [own, node, second] = [parseCertificate(der), new X509Certificate(der), secondReading(der)]
        expect([own.serial, node.serialNumber.toLowerCase(), second.serial]).toEqual([row.id, row.id, row.id])
        expect([node.subject, second.subject]).toEqual(['CN=gw-1', 'CN=gw-1'])
        expect(node.publicKey.export({ format: 'der', type: 'spki' })).toEqual(Buffer.from(own.spki))
        expect(Buffer.from(second.spki)).toEqual(Buffer.from(own.spki))
        expect([Date.parse(node.validFrom), Date.parse(node.validTo)]).toEqual([own.notBefore, own.notAfter])
        const outer = inside(whole(der, tags.sequence))
        const tbs = outer.next(tags.sequence).bytes
        outer.next(tags.sequence)
        const { spki } = own.basicConstraints?.ca === true ? ctx.authority.byRoot : ctx.authority
        const issuer = createPublicKey({ key: Buffer.from(spki), format: 'der', type: 'spki' })
        expect(verify('sha256', tbs, issuer, readBits(outer.next(tags.bitString)))).toBe(true)
      }
    }
  })

  test('the URI of the device is in its certificates', async () => {
    const [tls] = await issue(orderOf('device-tls'))
    expect(new X509Certificate(tls?.der ?? '').subjectAltName).toBe('URI:spiffe://plant/device/gw-1')
  })

  const everything = profilesOf(
    ProfileSettings.parse({
      'server-signing': { subject: { C: 'DE', O: 'Plant' } },
      'server-tls': { subject: { C: 'DE', ST: 'Baden-Württemberg', O: '工場' }, usages: ['keyAgreement'], purposes: ['1.3.6.1.4.1.4711.3'] },
      'ocsp-responder': { subject: { O: 'Plant', OU: 'Status' } },
      'device-identity': {
        subject: { C: 'DE', O: 'Plant' },
        names: ['URI:urn:plant:{tenant}:{id}'],
        usages: ['contentCommitment'],
        purposes: ['1.3.6.1.4.1.4711.1'],
      },
      'device-tls': {
        subject: { C: 'DE', ST: 'Baden-Württemberg', L: 'Ulm', O: 'Müller & Söhne, GmbH', OU: 'Gateways (line 1)' },
        names: ['DNS:{id}.{tenant}.devices.example.com', 'URI:urn:plant:{tenant}:{id}', 'URI:https://plant.example/devices/{id}'],
        usages: ['keyAgreement'],
        purposes: ['eapOverLAN', 'eapOverPPP', 'ipsecIKE', '1.3.6.1.4.1.4711.2'],
      },
      station: { subject: { O: 'Plant' }, names: ['DNS:{id}.stations.example'], usages: ['contentCommitment'], purposes: ['1.3.6.1.4.1.4711.4'] },
    }),
  )

  describe.skipIf(!hasProgram('openssl') || !hasProgram('certtool'))('openssl and certtool accept', () => {
    test('what is added is in the certificate, as they read it', async () => {
      const authority = await openAuthority(ctx, { profiles: everything })
      const [tls] = await prepareCertificates(ctx, authority, intent, [orderOf('device-tls')])
      const input = toPem('CERTIFICATE', tls?.der ?? new Uint8Array())
      const text = execFileSync('openssl', ['x509', '-noout', '-text', '-nameopt', 'RFC2253,-esc_msb,utf8'], { input, encoding: 'utf8' })
      expect(text).toContain('Subject: CN=gw-1,OU=Gateways (line 1),O=Müller & Söhne\\, GmbH,L=Ulm,ST=Baden-Württemberg,C=DE')
      expect(text).toContain('Digital Signature, Key Agreement')
      expect(text).toContain('DNS:gw-1.plant.devices.example.com, URI:urn:plant:plant:gw-1, URI:https://plant.example/devices/gw-1')
      expect(text).toMatch(/TLS Web Client Authentication, .*1\.3\.6\.1\.4\.1\.4711\.2/)
      const info = execFileSync('certtool', ['-i'], { input, encoding: 'utf8' })
      for (const line of [
        'CN=gw-1,OU=Gateways (line 1),O=Müller & Söhne\\, GmbH,L=Ulm,ST=Baden-Württemberg,C=DE',
        'URI: spiffe://plant/device/gw-1',
        'DNSname: gw-1.plant.devices.example.com',
        'Ipsec IKE',
        'Key agreement',
      ])
        expect(info).toContain(line)
    })

    test.each(
      profileNames.flatMap((profile) =>
        profile.endsWith('-ca')
          ? [[profile, 'as it is', defaultProfiles] as const]
          : [[profile, 'as it is', defaultProfiles] as const, [profile, 'with everything added', everything] as const],
      ),
    )('%s %s', async (profile, _, profiles) => {
      const folder = mkdtempSync(join(tmpdir(), 'fk-profile-'))
      try {
        const path = (file: string, pem: string): string => {
          writeFileSync(join(folder, file), pem)
          return join(folder, file)
        }
        const order = everyOrder().find((one) => one.profile === profile)
        // certtool judges by the clock of the machine.
        const real: Base = { ...ctx, store: openMemoryStore(), now: () => Date.now() }
        const authority = await openAuthority(real, { profiles })
        // The CAs are judged as the server made them.
        const der =
          profile === 'root-ca'
            ? authority.root
            : profile === 'issuing-ca'
              ? authority.issuing
              : order === undefined
                ? new Uint8Array()
                : ((await prepareCertificates(real, profile === 'cross-ca' ? authority.byRoot : authority, intent, [order]))[0]?.der ?? new Uint8Array())
        const leaf = path('leaf.pem', toPem('CERTIFICATE', der))
        const [root, issuing] = [path('root.pem', toPem('CERTIFICATE', authority.root)), path('issuing.pem', toPem('CERTIFICATE', authority.issuing))]
        const text = execFileSync('openssl', ['x509', '-in', leaf, '-noout', '-text', '-certopt', 'ext_error'], { encoding: 'utf8' })
        expect(text).toContain('Version: 3 (0x2)')
        expect(text).toContain(`X509v3 Key Usage: critical`)
        const purpose =
          profile === 'device-tls' ? ['-purpose', 'sslclient'] : profile === 'server-tls' ? ['-purpose', 'sslserver', '-verify_hostname', 'plant.example'] : []
        const verified = spawnSync('openssl', ['verify', '-x509_strict', '-check_ss_sig', ...purpose, '-CAfile', root, '-untrusted', issuing, leaf], {
          encoding: 'utf8',
        })
        expect([verified.stderr, verified.stdout]).toEqual(['', `${leaf}: OK\n`])
        const info = spawnSync('certtool', ['-i', '--infile', leaf], { encoding: 'utf8' })
        expect(info.status).toBe(0)
        expect(info.stdout).toContain('Version: 3')
        if (defaultProfiles[profile].names === 'device') expect(info.stdout).toContain('URI: spiffe://plant/device/gw-1')
        const chain = [
          der,
          ...(profile === 'root-ca' ? [] : profile === 'issuing-ca' || profile === 'cross-ca' ? [authority.root] : [authority.issuing, authority.root]),
        ]
        const whole_ = path('chain.pem', chain.map((one) => toPem('CERTIFICATE', one)).join(''))
        const gnutls = spawnSync('certtool', ['--verify', '--load-ca-certificate', root, '--infile', whole_, '--verify-profile', 'high'], { encoding: 'utf8' })
        expect(gnutls.stdout + gnutls.stderr).toContain('Chain verification output: Verified. The certificate is trusted.')
      } finally {
        rmSync(folder, { recursive: true, force: true })
      }
    })
  })
})

describe('the configuration of the server', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-config-'))
  const settings = (content: string) => {
    const path = join(folder, 'config.json')
    writeFileSync(path, content)
    return readSettings(['--config', path, '--name', 'mqtt.plant.example'], {})
  }

  test('lifetimes and keys are those of the file, from the environment as well', async () => {
    const { profiles } = settings('{"profiles":{"device-tls":{"lifetime":"24h","keys":["p256","p384"]}}}')
    expect(profiles).toEqual({ 'device-tls': { lifetime: 86_400_000, keys: ['p256', 'p384'] } })
    expect(readSettings([], { FLEETKEY_CONFIG: join(folder, 'config.json') }).profiles).toEqual(profiles)
    expect(readSettings([], {}).profiles).toEqual({})
    const authority = await openAuthority(ctx, { profiles: profilesOf(profiles) })
    const [tls] = await prepareCertificates(ctx, authority, intent, [orderOf('device-tls', 'gw-1', newKey('secp384r1'))])
    const { notAfter, native } = parseCertificate(tls?.der ?? new Uint8Array())
    expect(notAfter - ctx.now()).toBe(86_400_000)
    expect(native.publicKey.asymmetricKeyDetails?.namedCurve).toBe('secp384r1')
  })

  const tls = (settings: object): string => JSON.stringify({ profiles: { 'device-tls': settings } })
  const dns = (...names: readonly string[]): string => tls({ names })
  const subject = (of: object): string => tls({ subject: of })
  const both = (device: string, station: string): string => JSON.stringify({ profiles: { 'device-tls': { names: [device] }, station: { names: [station] } } })
  const long = 'x'.repeat(60)

  test.each([
    ['out of bounds', '{"profiles":{"device-tls":{"lifetime":"100d"}}}', 'profiles.device-tls.lifetime: outside of 1h to 90d'],
    ['no lifetime', '{"profiles":{"device-tls":{"lifetime":3600}}}', 'profiles.device-tls.lifetime'],
    ['a key that the profile cannot have', '{"profiles":{"device-identity":{"keys":["p384"]}}}', 'profiles.device-identity.keys'],
    ['no key at all', '{"profiles":{"device-tls":{"keys":[]}}}', 'profiles.device-tls.keys'],
    ['an unknown profile', '{"profiles":{"admin":{}}}', 'admin'],
    ['an unknown setting', '{"profile":{}}', 'profile'],
    ['what is fixed', '{"profiles":{"device-tls":{"eku":"2.5.29.37.0"}}}', 'eku'],
    ['no JSON', '{', '--config'],
    ['a subject for a CA', '{"profiles":{"issuing-ca":{"subject":{"O":"Plant"}}}}', 'profiles.issuing-ca: Unrecognized key: "subject"'],
    ['a purpose for a CA', '{"profiles":{"root-ca":{"purposes":["ipsecIKE"]}}}', 'profiles.root-ca: Unrecognized key: "purposes"'],
    ['another common name', subject({ CN: 'gw-2' }), 'profiles.device-tls.subject: Unrecognized key: "CN"'],
    ['a serial number in the subject', subject({ serialNumber: '1' }), 'profiles.device-tls.subject: Unrecognized key: "serialNumber"'],
    ['an empty subject', subject({}), 'profiles.device-tls.subject: none of C, ST, L, O, OU'],
    ['an empty organisation', subject({ O: '' }), 'profiles.device-tls.subject.O: not 1 to 64 characters'],
    ['an organisation of 65 characters', subject({ O: 'x'.repeat(65) }), 'profiles.device-tls.subject.O: not 1 to 64 characters'],
    ['a place of 129 characters', subject({ L: 'x'.repeat(129) }), 'profiles.device-tls.subject.L: not 1 to 128 characters'],
    ['two organisations', subject({ O: ['a', 'b'] }), 'profiles.device-tls.subject.O'],
    ['a country in small letters', subject({ C: 'de' }), 'profiles.device-tls.subject.C: not a country'],
    ['a country of three letters', subject({ C: 'DEU' }), 'profiles.device-tls.subject.C: not a country'],
    ['NUL', subject({ O: 'Plant\0' }), 'profiles.device-tls.subject.O: letters'],
    ['a line break', subject({ O: 'Plant\nCN=x' }), 'profiles.device-tls.subject.O: letters'],
    ['an escape', subject({ O: 'Plant\\2C' }), 'profiles.device-tls.subject.O: letters'],
    ['an attribute within', subject({ O: 'Plant+CN=x' }), 'profiles.device-tls.subject.O: letters'],
    ['a space in front', subject({ O: ' Plant' }), 'profiles.device-tls.subject.O: letters'],
    ['a space behind', subject({ O: 'Plant ' }), 'profiles.device-tls.subject.O: letters'],
    ['two spaces', subject({ O: 'A  B' }), 'profiles.device-tls.subject.O: letters'],
    ['a mark that turns the direction of text', subject({ O: 'Plant\u202egnp' }), 'profiles.device-tls.subject.O: letters'],
    ['a space of no width', subject({ O: 'Pl\u200bant' }), 'profiles.device-tls.subject.O: letters'],
    ['a letter in two pieces', subject({ O: 'Mu\u0308ller' }), 'profiles.device-tls.subject.O: not in the composed form'],
    ['half of a surrogate', subject({ O: 'a\ud800' }), 'profiles.device-tls.subject.O: letters'],
    ['no list of names', tls({ names: [] }), 'profiles.device-tls.names'],
    ['five names', dns(...[1, 2, 3, 4, 5].map((n) => `DNS:{id}.x${n}.example`)), 'profiles.device-tls.names'],
    ['a name of another kind', dns('IP:{id}'), 'profiles.device-tls.names.0: not DNS:… or URI:…'],
    ['a mailbox', dns('email:{id}@example.com'), 'profiles.device-tls.names.0: not DNS:… or URI:…'],
    ['a name without the id', dns('DNS:devices.example.com'), 'profiles.device-tls.names.0: not a name with {id} once'],
    ['the id twice', dns('DNS:{id}.{id}.example.com'), 'profiles.device-tls.names.0: not a name with {id} once'],
    ['an id that is not the whole of a label', dns('DNS:dev-{id}.example.com'), 'profiles.device-tls.names.0: not a name with {id} once'],
    ['an id next to the tenant', dns('DNS:{id}-{tenant}.example.com'), 'profiles.device-tls.names.0: not a name with {id} once'],
    ['a placeholder that there is not', dns('DNS:{id}.{model}.example.com'), 'profiles.device-tls.names.0: not a name with {id} once'],
    ['a wildcard', dns('DNS:*.{id}.example.com'), 'profiles.device-tls.names.0: not a host name of small letters'],
    ['an underscore', dns('DNS:{id}.a_b.example'), 'profiles.device-tls.names.0: not a host name of small letters'],
    ['capitals', dns('DNS:{id}.Example.com'), 'profiles.device-tls.names.0: not a host name of small letters'],
    ['the id alone', dns('DNS:{id}'), 'profiles.device-tls.names.0: not a host name that ends in a domain of yours'],
    ['the id as domain', dns('DNS:example.{id}'), 'profiles.device-tls.names.0: not a host name that ends in a domain of yours'],
    ['an empty label', dns('DNS:{id}..example.com'), 'profiles.device-tls.names.0: not a legal host name'],
    ['a dot at the end', dns('DNS:{id}.example.com.'), 'profiles.device-tls.names.0: not a legal host name'],
    ['an address as domain', dns('DNS:{id}.0.0.1'), 'profiles.device-tls.names.0: not a legal host name'],
    ['a label that ends with a hyphen', dns('DNS:{id}.a-.example'), 'profiles.device-tls.names.0: not a legal host name'],
    ['a name too long with the longest id', dns(`DNS:{id}.${long}.${long}.${long}.example`), 'profiles.device-tls.names.0: not a name of at most 253'],
    ['a URI too long with the longest id', dns(`URI:urn:plant:{id}:${'x'.repeat(200)}`), 'profiles.device-tls.names.0: not a name of at most 255'],
    ['another spiffe:// URI', dns('URI:spiffe://other/device/{id}'), 'profiles.device-tls.names.0: not another scheme'],
    ['a relative URI', dns('URI:/devices/{id}'), 'profiles.device-tls.names.0: not a URI in small letters'],
    ['a URI with a query', dns('URI:https://a.example/{id}?x={id}'), 'profiles.device-tls.names.0: not a URI in small letters'],
    ['a URI with a user', dns('URI:https://{id}@a.example/x'), 'profiles.device-tls.names.0: not a URI in small letters'],
    ['a URI with an escape', dns('URI:https://a.example/%2e/{id}'), 'profiles.device-tls.names.0: not a URI in small letters'],
    ['a URI of no host', dns('URI:https://a..b/{id}'), 'profiles.device-tls.names.0: not a URI with the name of a host'],
    ['a URI that climbs', dns('URI:https://a.example/x/../{id}'), 'profiles.device-tls.names.0: not a URI without'],
    ['a name twice', dns('DNS:{id}.example.com', 'DNS:{id}.example.com'), 'profiles.device-tls.names.1: DNS:{id}.example.com can be the same name as'],
    ['a name that is another one for some tenant', dns('DNS:{id}.{tenant}.example', 'DNS:{id}.plant.example'), 'profiles.device-tls.names.1'],
    ['names of two devices that can be one', dns('DNS:{id}.b.example', 'DNS:a.{id}.example'), 'can be the same name as DNS:{id}.b.example of device-tls'],
    ['a name for a device and a station', both('DNS:{id}.example.com', 'DNS:{id}.example.com'), 'profiles.station.names.0'],
    ['a name that can be that of a station', both('URI:urn:plant:station:{id}', 'URI:urn:plant:{tenant}:{id}'), 'profiles.station.names.0'],
    [
      'a name of the server',
      dns('DNS:{id}.plant.example'),
      'profiles.device-tls.names.0: DNS:{id}.plant.example can be the name of this server, mqtt.plant.example',
    ],
    ['names where there are no ids', '{"profiles":{"server-tls":{"names":["DNS:{id}.example.com"]}}}', 'profiles.server-tls.names: not to be added'],
    ['the usage that stays', tls({ usages: ['digitalSignature'] }), 'profiles.device-tls.usages.0: digitalSignature is there already'],
    ['a usage of CAs', tls({ usages: ['keyCertSign'] }), 'profiles.device-tls.usages.0: keyCertSign is none of keyAgreement'],
    ['lists', tls({ usages: ['crlSign'] }), 'profiles.device-tls.usages.0: crlSign is none of keyAgreement'],
    ['encryption with a key that only signs', tls({ usages: ['keyEncipherment'] }), 'profiles.device-tls.usages.0: keyEncipherment is none of keyAgreement'],
    ['agreement for an identity', '{"profiles":{"device-identity":{"usages":["keyAgreement"]}}}', 'profiles.device-identity.usages.0'],
    ['a usage for a responder', '{"profiles":{"ocsp-responder":{"usages":["keyAgreement"]}}}', 'profiles.ocsp-responder.usages.0: no usage can be added'],
    ['a usage twice', tls({ usages: ['keyAgreement', 'keyAgreement'] }), 'profiles.device-tls.usages: a usage twice'],
    ['a usage of every object', tls({ usages: ['__proto__'] }), 'profiles.device-tls.usages.0'],
    ['the purpose that stays', tls({ purposes: ['1.3.6.1.5.5.7.3.2'] }), 'profiles.device-tls.purposes.0: its own purpose is there already'],
    ['servers', tls({ purposes: ['serverAuth'] }), 'profiles.device-tls.purposes.0: serverAuth belongs to'],
    ['servers, by OID', tls({ purposes: ['1.3.6.1.5.5.7.3.1'] }), 'profiles.device-tls.purposes.0: serverAuth belongs to'],
    ['TLS clients', '{"profiles":{"station":{"purposes":["clientAuth"]}}}', 'profiles.station.purposes.0: clientAuth belongs to'],
    ['responders', tls({ purposes: ['OCSPSigning'] }), 'profiles.device-tls.purposes.0: OCSPSigning belongs to'],
    ['anything', tls({ purposes: ['2.5.29.37.0'] }), 'profiles.device-tls.purposes.0: anyExtendedKeyUsage: no certificate is for everything'],
    ['a role of the server', tls({ purposes: ['1.3.6.1.4.1.58888.1.2'] }), 'profiles.device-tls.purposes.0: a purpose of Fleetkey'],
    ['the identity of a device for TLS', tls({ purposes: ['1.3.6.1.4.1.58888.1.16'] }), 'profiles.device-tls.purposes.0: a purpose of Fleetkey'],
    ['stations', tls({ purposes: ['1.3.6.1.4.1.58888.1.17'] }), 'profiles.device-tls.purposes.0: a purpose of Fleetkey'],
    ['an agent that enrols others', tls({ purposes: ['1.3.6.1.4.1.311.20.2.1'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['a registration authority', tls({ purposes: ['1.3.6.1.5.5.7.3.28'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['mail', tls({ purposes: ['emailProtection'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['the arc of all enterprises', tls({ purposes: ['1.3.6.1.4.1'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['no OID', tls({ purposes: ['1.3.6.1.4.1.4711.01'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['an arc too large', tls({ purposes: ['1.3.6.1.4.1.4711.9999999999'] }), 'profiles.device-tls.purposes.0: not eapOverLAN'],
    ['a purpose twice', tls({ purposes: ['ipsecIKE', '1.3.6.1.5.5.7.3.17'] }), 'profiles.device-tls.purposes: a purpose twice'],
    ['nine purposes', tls({ purposes: [1, 2, 3, 4, 5, 6, 7, 8, 9].map((n) => `1.3.6.1.4.1.4711.${n}`) }), 'profiles.device-tls.purposes'],
    [
      'a purpose for a key that signs messages',
      '{"profiles":{"server-signing":{"purposes":["ipsecIKE"]}}}',
      'profiles.server-signing.purposes.0: no purpose can be added',
    ],
    [
      'a purpose of networks for an identity',
      '{"profiles":{"device-identity":{"purposes":["ipsecIKE"]}}}',
      'profiles.device-identity.purposes.0: not an OID of your own',
    ],
  ])('%s keeps the server from starting', (_, content, what) => {
    expect(() => settings(content)).toThrow(SettingsError)
    expect(() => settings(content)).toThrow(what)
    expect(() => settings(content)).not.toThrow('\n')
  })

  test('a tenant that is no label of a host name', () => {
    const path = join(folder, 'tenant.json')
    writeFileSync(path, dns('DNS:{id}.{tenant}.example'))
    expect(() => readSettings(['--config', path, '--tenant', 'plant-'], {})).toThrow(
      'profiles.device-tls.names.0: DNS:{id}.{tenant}.example: tenant plant- is no label',
    )
    expect(readSettings(['--config', path, '--tenant', 'plant'], {}).profiles['device-tls']?.names).toHaveLength(1)
  })

  test('a file that is not there', () => expect(() => readSettings(['--config', join(folder, 'nowhere')], {})).toThrow(SettingsError))
})
