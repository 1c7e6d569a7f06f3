import { execFileSync } from 'node:child_process'
import { generateKeyPairSync, randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync, truncateSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test, vi } from 'vitest'
import { main } from '@fleetkey/cli/main.ts'
import type { RequestVerdict } from '@fleetkey/cli/offline/request.ts'
import { toPem } from '@fleetkey/protocol/x509/pem.ts'
import { extension, further, generated, honest, named, p384Request, selfSigned, seq, text, wishing } from './hostile-requests.ts'
import { hasProgram } from './programs.ts'

const folder = mkdtempSync(join(tmpdir(), 'fk-check-csr-'))
afterAll(() => rmSync(folder, { recursive: true, force: true }))
let files = 0
const file = (content: string | Uint8Array): string => {
  const path = join(folder, `${++files}.csr`)
  writeFileSync(path, content)
  return path
}

const run = async (...words: string[]): Promise<{ code: number; stdout: string; stderr: string }> => {
  let [stdout, stderr] = ['', '']
  const out = vi.spyOn(process.stdout, 'write').mockImplementation((text) => ((stdout += String(text)), true))
  const err = vi.spyOn(process.stderr, 'write').mockImplementation((text) => ((stderr += String(text)), true))
  try {
    return { code: await main(['ca', 'check-csr', ...words], {}), stdout, stderr }
  } finally {
    out.mockRestore()
    err.mockRestore()
  }
}
const judged = async (content: string | Uint8Array, ...words: string[]): Promise<{ code: number; verdict: RequestVerdict }> => {
  const { code, stdout } = await run(file(content), '--json', ...words)
  return { code, verdict: JSON.parse(stdout) as RequestVerdict }
}
const pem = (bytes: Uint8Array, label = 'CERTIFICATE REQUEST'): string => toPem(label, bytes)

describe('accepted', () => {
  test.each([
    ['DER', () => honest()],
    ['DER with wishes', () => honest(true)],
    ['PEM', () => pem(honest())],
    ['PEM of the older label', () => pem(honest(), 'NEW CERTIFICATE REQUEST')],
    ['PEM behind text, with CR LF', () => `Certificate Request:\r\n    Data:\r\n${pem(honest()).replaceAll('\n', '\r\n')}`],
  ])('%s: what would be issued', async (_, make) => {
    const { code, verdict } = await judged(make())
    expect(code).toBe(0)
    expect(verdict).toMatchObject({
      verdict: 'accepted',
      reason: null,
      profile: 'device-identity',
      certificate: {
        subject: 'CN=gw-1',
        altNames: ['URI:spiffe://default/device/gw-1'],
        keyUsage: ['digitalSignature'],
        extKeyUsage: ['1.3.6.1.4.1.58888.1.16'],
        ca: false,
        lifetime: 3 * 365 * 86_400,
        key: { kind: 'p256' },
      },
    })
  })

  test.each([
    ['device-tls', [], { altNames: ['URI:spiffe://default/device/gw-1'], extKeyUsage: ['1.3.6.1.5.5.7.3.2'], lifetime: 172_800 }],
    ['device-tls', ['--tenant', 'plant'], { altNames: ['URI:spiffe://plant/device/gw-1'] }],
    ['station', [], { altNames: ['URI:spiffe://default/station/gw-1'], extKeyUsage: ['1.3.6.1.4.1.58888.1.17'] }],
    ['server-tls', ['--name', 'plant.example'], { altNames: ['DNS:plant.example', 'DNS:localhost', 'IP:7f000001', `IP:${'0'.repeat(31)}1`] }],
  ])('profile %s %j', async (profile, more, want) => {
    const { code, verdict } = await judged(honest(), '--profile', profile, ...more)
    expect([code, verdict.verdict]).toEqual([0, 'accepted'])
    expect(verdict.certificate).toMatchObject(want)
  })

  test('a serial as common name becomes the id in lower case; with --id it must be the id', async () => {
    const serial = selfSigned({ subject: named('GW-1') })
    expect((await judged(serial)).verdict.certificate?.subject).toBe('CN=gw-1')
    expect((await judged(serial, '--id', 'gw-1')).verdict.reason).toBe('csr.subject.other')
    expect((await judged(honest(), '--id', 'gw-1')).verdict.verdict).toBe('accepted')
    expect((await judged(selfSigned({ subject: named('gateway 1') }))).verdict.reason).toBe('csr.subject.id')
    expect((await judged(selfSigned({ subject: named('e-1') }))).verdict.reason).toBe('csr.subject.id')
  })

  test('kinds of keys as the configuration has them', async () => {
    const config = file(JSON.stringify({ profiles: { 'device-tls': { lifetime: '24h', keys: ['p256', 'p384'] } } }))
    const bytes = p384Request()
    expect((await judged(bytes, '--profile', 'device-tls')).verdict.reason).toBe('csr.key.curve')
    expect((await judged(bytes, '--profile', 'device-tls', '--config', config)).verdict.certificate).toMatchObject({ key: { kind: 'p384' }, lifetime: 86_400 })
    expect((await judged(bytes, '--config', config)).verdict.reason).toBe('csr.key.curve')
  })

  test('what the configuration adds is shown, and may be asked for', async () => {
    const added = {
      subject: { C: 'DE', O: 'Müller & Söhne, GmbH' },
      names: ['DNS:{id}.{tenant}.example.com', 'URI:urn:plant:{id}'],
      usages: ['keyAgreement'],
      purposes: ['ipsecIKE'],
    }
    const config = file(JSON.stringify({ profiles: { 'device-tls': added } }))
    const dns = (name: string): Buffer => extension('2.5.29.17', seq(text(0x82, name)), false)
    const asking = wishing(dns('gw-1.plant.example.com'), extension('2.5.29.15', Buffer.from('03020308', 'hex'), true))
    const words = ['--profile', 'device-tls', '--tenant', 'plant']
    expect((await judged(asking, ...words, '--config', config)).verdict).toMatchObject({
      verdict: 'accepted',
      certificate: {
        subject: 'CN=gw-1,O=Müller & Söhne\\, GmbH,C=DE',
        altNames: ['URI:spiffe://plant/device/gw-1', 'DNS:gw-1.plant.example.com', 'URI:urn:plant:gw-1'],
        keyUsage: ['digitalSignature', 'keyAgreement'],
        extKeyUsage: ['1.3.6.1.5.5.7.3.2', '1.3.6.1.5.5.7.3.17'],
      },
    })
    expect((await judged(asking, ...words)).verdict.reason).toMatch(/^csr\.(name\.kind|usage)$/)
    const other = wishing(dns('gw-2.plant.example.com'))
    expect((await judged(other, ...words, '--config', config)).verdict.reason).toBe('csr.name.other')
    expect((await judged(honest(), '--profile', 'device-identity', '--config', config)).verdict.certificate?.subject).toBe('CN=gw-1')
  })

  test.skipIf(!hasProgram('openssl'))('what openssl makes', () => {
    const path = join(folder, 'openssl.pem')
    const args = [
      'req',
      '-new',
      '-newkey',
      'ec',
      '-pkeyopt',
      'ec_paramgen_curve:P-256',
      '-nodes',
      '-subj',
      '/O=Plant/CN=gw-7',
      '-keyout',
      '/dev/null',
      '-out',
      path,
    ]
    execFileSync('openssl', args, { stdio: 'ignore' })
    return run(path).then(({ code, stdout }) => {
      expect(code).toBe(0)
      expect(stdout).toContain('spiffe://default/device/gw-7')
      expect(stdout).toContain('2.5.4.10')
    })
  })
})

describe('refused with exit code 3, a reason and a remedy', () => {
  test.each([...generated, ...further].filter(({ reason }) => reason !== 'csr.subject.other' && !reason.startsWith('csr.rsa')))(
    '$name: $reason',
    async ({ make, reason }) => {
      const bytes = make()
      // An empty file is no DER file.
      const want = bytes.length === 0 ? 'csr.pem' : reason
      const { code, verdict } = await judged(bytes)
      expect([code, verdict.reason]).toEqual([3, want])
      expect(verdict).toMatchObject({ verdict: 'refused', certificate: null, remedy: expect.stringMatching(/.{5}/) as string })
    },
  )

  test.each([
    ['two blocks', () => pem(honest()) + pem(honest()), 'csr.pem'],
    ['a certificate', () => pem(honest(), 'CERTIFICATE'), 'csr.pem'],
    ['a private key', () => generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).privateKey.export({ format: 'pem', type: 'pkcs8' }), 'csr.pem'],
    ['a request behind a certificate', () => pem(honest(), 'CERTIFICATE') + pem(honest()), 'csr.pem'],
    ['base64 garbage', () => pem(honest()).replace('MI', '!!'), 'csr.pem'],
    ['NUL within', () => pem(honest()).replace('\nM', '\n\0M'), 'csr.pem'],
    ['base64 that does not end', () => pem(honest()).replace(/=*\n-----END/, '=A\n-----END'), 'csr.pem'],
    ['two spellings of the last byte', () => '-----BEGIN CERTIFICATE REQUEST-----\nMAF=\n-----END CERTIFICATE REQUEST-----\n', 'csr.pem'],
    ['no end', () => pem(honest()).replace(/-----END[^]*/, ''), 'csr.pem'],
    ['another end', () => pem(honest()).replace('END CERTIFICATE REQUEST', 'END CERTIFICATE'), 'csr.pem'],
    ['text', () => 'hello', 'csr.pem'],
    ['nothing', () => '', 'csr.pem'],
    ['zeros', () => Buffer.alloc(4096), 'csr.pem'],
    ['random bytes', () => Buffer.concat([Buffer.from([1]), randomBytes(4096)]), 'csr.pem'],
    ['PEM of rubbish', () => pem(randomBytes(300)), /^csr\.der/],
    ['a truncated request', () => honest().subarray(0, 100), 'csr.der'],
    ['a hundred kilobytes of text', () => 'x'.repeat(100_000), 'csr.size'],
    ['PEM of a mebibyte', () => pem(Buffer.alloc(1 << 20)), 'csr.size'],
  ])('%s', async (_, make, reason) => {
    const { code, verdict } = await judged(make() as string | Uint8Array)
    expect(code).toBe(3)
    expect(verdict.reason).toMatch(reason)
  })

  test('a file of a terabyte that is not read', async () => {
    const path = file(Buffer.from([0x30, 0x84]))
    truncateSync(path, 2 ** 40)
    const { code, stdout } = await run(path, '--json')
    expect([code, (JSON.parse(stdout) as RequestVerdict).reason]).toEqual([3, 'csr.size'])
    expect((await run('/dev/zero')).code).toBe(3)
  })

  test('in words', async () => {
    const { code, stdout } = await run(file(selfSigned({ subject: named('gw-1\x1b[2J') })))
    expect(code).toBe(3)
    expect(stdout).toContain('REFUSED csr.subject.control')
    expect(stdout).not.toContain('\x1b')
  })
})

describe('wrong on the command line: exit code 1', () => {
  const good = file(honest())
  const tenantNames = file('{"profiles":{"device-tls":{"names":["DNS:{id}.{tenant}.x"]}}}')
  test.each([
    ['no file', [], 'argument is missing'],
    ['a file that is not there', [join(folder, 'nowhere')], 'ENOENT'],
    ['a folder', [folder], 'EISDIR'],
    ['a profile that is none', [good, '--profile', 'admin'], 'device-identity, device-tls'],
    ['a profile that nobody asks for', [good, '--profile', 'root-ca'], 'takes one of'],
    ['a profile of every object', [good, '--profile', '__proto__'], 'takes one of'],
    ['an id that is none', [good, '--id', '../x'], '--id'],
    ['a tenant that is none', [good, '--tenant', 'a/b'], '--tenant'],
    ['a configuration that is none', [good, '--config', good], '--config'],
    ['a lifetime out of bounds', [good, '--config', file('{"profiles":{"device-tls":{"lifetime":"20y"}}}')], 'outside of 1h to 90d'],
    ['RSA', [good, '--config', file('{"profiles":{"device-tls":{"keys":["rsa"]}}}')], 'profiles.device-tls.keys'],
    ['a setting that is none', [good, '--config', file('{"profiles":{"device-tls":{"subject":"x"}}}')], 'subject'],
    ['names that are not for this tenant', [good, '--tenant', 'plant-', '--config', tenantNames], 'profiles.device-tls.names.0'],
  ])('%s', async (_, words, what) => {
    const { code, stderr } = await run(...words)
    expect([code, stderr]).toEqual([1, expect.stringContaining(what) as string])
  })
})
