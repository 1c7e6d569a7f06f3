import { execFileSync } from 'node:child_process'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import type { Problem } from '@fleetkey/protocol/problem.ts'
import { devicesByEndorsement, endorsementPolicy, importEndorsement, removeEndorsement, setEndorsementPolicy } from '@fleetkey/server/flows/endorsement.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { hasProgram } from './programs.ts'
import { operator, testContext, type TestContext } from './harness.ts'

const because = (code: string, reason?: string): Problem => expect.objectContaining(reason === undefined ? { code } : { code, reason }) as Problem

describe.skipIf(!hasProgram('openssl'))('endorsements', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-endorsement-'))
  const at = (name: string): string => join(folder, name)
  const text = (...names: string[]): string => names.map((name) => readFileSync(at(name), 'utf8')).join('\n')
  const openssl = (...args: string[]): void => void execFileSync('openssl', args, { cwd: folder, stdio: 'pipe' })
  const ca = (name: string, by?: string): void => {
    openssl('ecparam', '-name', 'prime256v1', '-genkey', '-noout', '-out', `${name}.key`)
    writeFileSync(
      at(`${name}.cnf`),
      `basicConstraints=critical,CA:TRUE\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n${by === undefined ? '' : 'authorityKeyIdentifier=keyid\n'}`,
    )
    openssl('req', '-new', '-key', `${name}.key`, '-subj', `/CN=${name}`, '-out', `${name}.csr`)
    const signer = by === undefined ? ['-signkey', `${name}.key`] : ['-CA', `${by}.pem`, '-CAkey', `${by}.key`]
    openssl('x509', '-req', '-in', `${name}.csr`, ...signer, '-days', '3650', '-extfile', `${name}.cnf`, '-set_serial', '5', '-out', `${name}.pem`)
  }
  const crl = (name: string, out: string, days: string): void => {
    writeFileSync(at(`${out}.index`), '')
    writeFileSync(at(`${out}.number`), '01\n')
    writeFileSync(at('ca.cnf'), `[ca]\ndefault_ca=d\n[d]\ndatabase=${at(`${out}.index`)}\ncrlnumber=${at(`${out}.number`)}\ndefault_md=sha256\n`)
    openssl('ca', '-config', 'ca.cnf', '-cert', `${name}.pem`, '-keyfile', `${name}.key`, '-gencrl', '-crldays', days, '-out', `${out}.crl`)
  }
  let ctx: TestContext
  beforeAll(() => {
    ca('root')
    ca('inner', 'root')
    ca('stranger')
    crl('inner', 'inner', '30')
    crl('stranger', 'stranger', '30')
  })
  afterAll(() => rmSync(folder, { recursive: true, force: true }))
  beforeEach(async () => {
    ctx = await testContext()
  })
  afterEach(async () => await ctx.close())
  const bring = async (...names: string[]) => await importEndorsement(ctx, operator(), { certificate: text(...names), test: false })

  test('a bundle: root, intermediate, and the CRL of the one that signed it', async () => {
    expect(await bring('inner.pem', 'root.pem', 'inner.crl')).toMatchObject({ roots: 1, intermediates: 1, crls: 1 })
    const rows = await ctx.store.find('endorsement', { limit: 10 })
    expect(rows.find(({ subject }) => subject === 'CN=inner')).toMatchObject({ intermediate: true, crl: expect.any(Uint8Array) as Uint8Array })
    expect(rows.find(({ subject }) => subject === 'CN=root')?.crl).toBeUndefined()
    // A newer list may follow alone; the same certificates again are nothing new.
    expect(await bring('inner.crl')).toMatchObject({ roots: 0, intermediates: 0, crls: 1 })
    await expect(bring('root.pem')).rejects.toThrow(because('conflict'))
  })

  test.each([
    ['an intermediate without its root', ['inner.pem'], 'endorsement.no-issuer'],
    ['a CRL of nobody who is trusted', ['root.pem', 'stranger.crl'], 'endorsement.crl-issuer'],
  ])('refused: %s', async (_, names, reason) => {
    await expect(bring(...names)).rejects.toThrow(because('malformed', reason))
    expect(await ctx.store.count('endorsement')).toBe(0)
  })

  test('removal says how many devices rest on it', async () => {
    const { id } = await bring('root.pem', 'inner.pem')
    const device = { id: DeviceId.parse('gw-1'), state: 'enrolled', endorsedBy: [id], serial: 'GW-1' }
    await ctx.store.commit({
      writes: [{ table: 'device', do: 'insert', row: { ...device, version: 0 } as never }],
      entries: [{ at: 0, caller: 'test', from: 'test', action: 'test', subject: 'gw-1', outcome: 'done', code: null, detail: '' }],
    })
    expect((await devicesByEndorsement(ctx)).get(id)).toBe(1)
    expect(await removeEndorsement(ctx, operator(), id, { dryRun: true })).toEqual({ devices: 1 })
    expect(await ctx.store.count('endorsement')).toBe(2)
    expect(await removeEndorsement(ctx, operator(), id, { dryRun: false })).toEqual({ devices: 1 })
    expect(await ctx.store.get('endorsement', id)).toBeUndefined()
    expect((await ctx.entries()).at(-1)).toMatchObject({
      action: 'endorsement.remove',
      outcome: 'done',
      detail: expect.stringContaining('1 devices') as string,
    })
    await expect(removeEndorsement(ctx, operator(), id, { dryRun: true })).rejects.toThrow(because('not-found'))
    await expect(removeEndorsement(ctx, operator('auditor'), id, { dryRun: false })).rejects.toThrow(because('forbidden'))
  })

  test('the policy is replaced part by part', async () => {
    await setEndorsementPolicy(ctx, operator(), { floors: [{ manufacturer: '*', minimum: '7.85' }] })
    await setEndorsementPolicy(ctx, operator(), { deny: [{ ek: 'ab'.repeat(32) }] })
    expect(await endorsementPolicy(ctx)).toEqual({
      deny: [{ ek: 'ab'.repeat(32) }],
      floors: [{ manufacturer: '*', minimum: '7.85' }],
      updates: [],
      manufacturers: null,
    })
    await expect(setEndorsementPolicy(ctx, operator(), { floors: [{ manufacturer: '*', minimum: '99999.0' }] })).rejects.toThrow(because('malformed'))
    await expect(setEndorsementPolicy(ctx, operator('operator'), { deny: [] })).rejects.toThrow(because('forbidden'))
  })
})
