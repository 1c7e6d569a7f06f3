import { spawnSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { secondRequestVerdict } from '@fleetkey/protocol/x509/library.ts'
import { requestReasons, requestReasonsMarkdown, type RequestReason } from '@fleetkey/protocol/x509/request/reasons.ts'
import { judgeRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { defaultProfiles, profilesMarkdown, requestPolicyOf } from '@fleetkey/server/ca/profiles.ts'
import { lintMarkdown } from '@fleetkey/server/ca/lint/lint.ts'
import { further, generated, honest, honestSpki, p384Request } from './hostile-requests.ts'
import { outcome } from './mutations.ts'
import { hasProgram } from './programs.ts'

const policy = requestPolicyOf(defaultProfiles['device-identity'], { tenant: 'default', subject: 'gw-1' })
const judged = (bytes: Uint8Array): string => outcome((of) => judgeRequest(of, policy), new Uint8Array(bytes))

describe('the 37 requests of the list, as files', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-csr-'))
  const path = (number: number, name: string): string => join(folder, `${String(number).padStart(2, '0')}-${name}.csr`)
  beforeAll(() => {
    for (const { number, name, make } of generated) writeFileSync(path(number, name), make())
  }, 120_000)
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  test('there are 37', () => expect(generated).toHaveLength(37))

  test.each(generated)('$number $name: $reason', ({ number, name, reason }) => expect(judged(readFileSync(path(number, name)))).toBe(reason))

  // Others are asked for comparison; openssl's exit code is 0 also for a signature that does not verify, so its words count.
  test.skipIf(!hasProgram('openssl'))('none is accepted here; others accept many', { timeout: 120_000 }, async () => {
    const accepted = { fleetkey: [] as number[], 'x509 library': [] as number[], openssl: [] as number[] }
    for (const { number, name } of generated) {
      const file = path(number, name)
      const bytes = new Uint8Array(readFileSync(file))
      if (judged(bytes) === 'accepted') accepted.fleetkey.push(number)
      if (await secondRequestVerdict(bytes).catch(() => false)) accepted['x509 library'].push(number)
      const { stdout, stderr } = spawnSync('openssl', ['req', '-in', file, '-inform', 'DER', '-verify', '-noout'], { encoding: 'utf8', timeout: 20_000 })
      if (/verify OK/.test(stdout + stderr)) accepted.openssl.push(number)
    }
    for (const [who, numbers] of Object.entries(accepted))
      process.stdout.write(`${who} accepts ${numbers.length} of ${generated.length}: ${numbers.join(' ') || 'none'}\n`)
    expect(accepted.fleetkey).toEqual([])
    // If these were none, the requests would be broken rather than hostile.
    expect(accepted['x509 library'].length).toBeGreaterThan(15)
    expect(accepted.openssl.length).toBeGreaterThan(15)
  })
})

describe('the rest of the list, and more of its kind', () => {
  test.each(further)('$number $name: $reason', { timeout: 60_000 }, ({ make, reason }) => expect(judged(make())).toBe(reason))
})

describe('requests in order', () => {
  test.each([false, true])('are accepted (with wishes: %s), and nothing but the key is taken', (wished) => {
    const made = judgeRequest(new Uint8Array(honest(wished)), policy)
    expect(made).toMatchObject({ kind: 'p256', commonName: 'gw-1' })
    expect(Buffer.compare(made.spki, honestSpki)).toBe(0)
    expect(made.ignored).toEqual(wished ? ['2.5.4.10', '2.5.29.14'] : [])
  })

  test('another kind of key where the profile admits it', () => {
    const bytes = new Uint8Array(p384Request())
    expect(judged(bytes)).toBe('csr.key.curve')
    expect(judgeRequest(bytes, { ...policy, keys: ['p256', 'p384'] }).kind).toBe('p384')
  })

  test('what a device says of itself is not compared where the certificate says something else', () => {
    const { subject: _, ...anybody } = policy
    expect(judgeRequest(new Uint8Array(honest()), anybody).commonName).toBe('gw-1')
  })
})

describe('docs/pki.md', () => {
  const docs = readFileSync(new URL('../docs/pki.md', import.meta.url), 'utf8')
  test('has the table of reasons as the code has it', () => expect(docs).toContain(requestReasonsMarkdown()))
  test('has the profiles as the code has them', () => expect(docs).toContain(profilesMarkdown()))
  test('has the rules of the lint as the code has them', () => expect(docs).toContain(lintMarkdown()))

  test('every case of the list has a reason', () => {
    const answered = new Set<number>(Object.values(requestReasons).flatMap(({ cases }) => [...cases]))
    expect(Array.from({ length: 60 }, (_, at) => at + 1).filter((number) => !answered.has(number))).toEqual([])
  })

  test('every case that a request shows is tested, with the reason of the table', () => {
    const table: Readonly<Record<string, RequestReason>> = requestReasons
    for (const { number, reason } of [...generated, ...further]) if (number > 0) expect(table[reason]?.cases, `case ${number}`).toContain(number)
    const shown = new Set([...generated, ...further].map(({ number }) => number))
    // What only the server knows: issuance.test.ts.
    expect(Array.from({ length: 60 }, (_, at) => at + 1).filter((number) => !shown.has(number))).toEqual([42, 43, 44, 52, 53])
  })

  test('every reason of a request is made by a test', () => {
    const made = new Set([...generated, ...further].map(({ reason }) => reason))
    expect(Object.keys(requestReasons).filter((reason) => reason.startsWith('csr.') && !made.has(reason))).toEqual([
      // Of files and of the command line: cli/commands/ca.test.ts; of an attestation: attestation-cases.test.ts.
      'csr.pem',
      'csr.subject.id',
      // Of a station: station-certificate.test.ts.
      'csr.station.other-key',
      'csr.ldevid.other-key',
    ])
  })
})
