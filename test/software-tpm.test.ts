import { execFile } from 'node:child_process'
import { createHmac, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { serveSoftwareTpm } from '@fleetkey/firmware-sim/tpm/serve.ts'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { hasProgram } from './programs.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const here = hasProgram('tpm2_getrandom')

/** tpm2-tools, which nobody here wrote, drive our simulator as they would a chip. */
describe.skipIf(!here)('tpm2-tools on the software TPM', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-tools-'))
  let tpm: SoftwareTpm
  let served: { stop(): Promise<void> }
  const at = (name: string): string => join(folder, name)
  /** Runs one tool; what it leaves loaded is flushed, as a resource manager would (there are three slots). */
  const tool = async (name: string, ...args: string[]): Promise<string> => {
    const output = await run(name, ...args)
    await run('tpm2_flushcontext', '-t')
    return output
  }
  const run = async (name: string, ...args: string[]): Promise<string> => {
    const env = { ...process.env, TPM2TOOLS_TCTI: `swtpm:path=${at('tpm')}`, TSS2_LOG: 'all+none' }
    try {
      return (await promisify(execFile)(name, args, { cwd: folder, env })).stdout
    } catch (error) {
      const { stdout = '', stderr = '' } = error as { stdout?: string; stderr?: string }
      throw new Error(`${name} ${args.join(' ')}: ${stdout}${stderr}`, { cause: error })
    }
  }

  beforeAll(async () => {
    tpm = createSoftwareTpm({ random, now: () => Date.now() })
    served = await serveSoftwareTpm(tpm, { path: at('tpm') })
  })
  afterAll(async () => {
    await served.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  test('it says that it is a simulator', async () => expect(await tool('tpm2_getcap', 'properties-fixed')).toMatch(/FKSM/))

  test('random numbers, PCRs', async () => {
    expect((await tool('tpm2_getrandom', '--hex', '16')).trim()).toMatch(/^[0-9a-f]{32}$/)
    await tool('tpm2_pcrextend', `16:sha256=${'ab'.repeat(32)}`)
    expect(await tool('tpm2_pcrread', 'sha256:16')).toMatch(/0x[0-9A-F]{64}/)
    expect(await tool('tpm2_pcrread', 'sha256:0,1,2,3,4,5,6,7,8,9,10,11')).not.toMatch(/error/i)
    await tool('tpm2_pcrreset', '16')
    expect(await tool('tpm2_pcrread', 'sha256:16')).toMatch(/0x0{64}/)
  })

  test('quote: tpm2_checkquote accepts it, and nothing that was changed', async () => {
    await tool('tpm2_createek', '-c', 'ek.ctx', '-G', 'ecc', '-u', 'ek.pub')
    await tool('tpm2_createak', '-C', 'ek.ctx', '-c', 'ak.ctx', '-G', 'ecc', '-s', 'ecdsa', '-g', 'sha256', '-u', 'ak.pem', '-f', 'pem', '-n', 'ak.name')
    const quote = ['-m', 'quote.msg', '-s', 'quote.sig']
    await tool('tpm2_quote', '-c', 'ak.ctx', '-l', 'sha256:0,1,2,7', '-q', 'abcdef', ...quote, '-o', 'quote.pcrs', '-g', 'sha256')
    await tool('tpm2_checkquote', '-u', 'ak.pem', ...quote, '-f', 'quote.pcrs', '-q', 'abcdef', '-g', 'sha256')
    await expect(tool('tpm2_checkquote', '-u', 'ak.pem', ...quote, '-f', 'quote.pcrs', '-q', 'abcdee', '-g', 'sha256')).rejects.toThrow()
  })

  test('tpm2_activatecredential opens what our server made', async () => {
    const ek = Uint8Array.from(readFileSync(at('ek.pub'))).subarray(2)
    const secret = random(32)
    const { blob, secret: seed } = makeCredential({ ek, name: readFileSync(at('ak.name')), secret: { bytes: () => secret }, random })
    const size = (bytes: Uint8Array): Buffer => Buffer.from([bytes.length >> 8, bytes.length & 0xff])
    writeFileSync(at('cred'), Buffer.concat([Buffer.from('badcc0de00000001', 'hex'), size(blob), blob, size(seed), seed]))
    await tool('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx')
    await tool('tpm2_policysecret', '-S', 'session.ctx', '-c', 'e')
    await tool('tpm2_activatecredential', '-c', 'ak.ctx', '-C', 'ek.ctx', '-i', 'cred', '-o', 'secret.out', '-P', 'session:session.ctx')
    await tool('tpm2_flushcontext', 'session.ctx')
    expect(readFileSync(at('secret.out'))).toEqual(Buffer.from(secret))
  })

  test('keys below a primary: sign, verify, seal, HMAC, import', async () => {
    await tool('tpm2_createprimary', '-C', 'o', '-G', 'ecc', '-c', 'srk.ctx')
    await tool('tpm2_create', '-C', 'srk.ctx', '-G', 'ecc', '-u', 'key.pub', '-r', 'key.priv')
    await tool('tpm2_load', '-C', 'srk.ctx', '-u', 'key.pub', '-r', 'key.priv', '-c', 'key.ctx')
    writeFileSync(at('text'), 'some text')
    await tool('tpm2_sign', '-c', 'key.ctx', '-g', 'sha256', '-s', 'ecdsa', '-o', 'text.sig', 'text')
    await tool('tpm2_verifysignature', '-c', 'key.ctx', '-g', 'sha256', '-m', 'text', '-s', 'text.sig')
    writeFileSync(at('secret'), 'sealed words')
    await tool('tpm2_create', '-C', 'srk.ctx', '-i', 'secret', '-u', 'seal.pub', '-r', 'seal.priv')
    await tool('tpm2_load', '-C', 'srk.ctx', '-u', 'seal.pub', '-r', 'seal.priv', '-c', 'seal.ctx')
    expect(await tool('tpm2_unseal', '-c', 'seal.ctx')).toBe('sealed words')
    const key = random(32)
    writeFileSync(at('hmac.key'), key)
    await tool('tpm2_import', '-C', 'srk.ctx', '-G', 'hmac', '-i', 'hmac.key', '-u', 'hmac.pub', '-r', 'hmac.priv')
    await tool('tpm2_load', '-C', 'srk.ctx', '-u', 'hmac.pub', '-r', 'hmac.priv', '-c', 'hmac.ctx')
    const mac = await tool('tpm2_hmac', '-c', 'hmac.ctx', '--hex', '-g', 'sha256', 'text')
    expect(mac.trim()).toBe(createHmac('sha256', key).update('some text').digest('hex'))
  })

  test('a signature that a real key made is accepted, a changed one is not', async () => {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    writeFileSync(at('host.pem'), publicKey.export({ format: 'pem', type: 'spki' }))
    const signature = sign('sha256', Buffer.from('some text'), privateKey)
    writeFileSync(at('host.sig'), signature)
    await tool('tpm2_loadexternal', '-C', 'o', '-G', 'ecc', '-u', 'host.pem', '-c', 'host.ctx')
    await tool('tpm2_verifysignature', '-c', 'host.ctx', '-g', 'sha256', '-m', 'text', '-s', 'host.sig', '-f', 'ecdsa')
    writeFileSync(at('other'), 'other text')
    await expect(tool('tpm2_verifysignature', '-c', 'host.ctx', '-g', 'sha256', '-m', 'other', '-s', 'host.sig', '-f', 'ecdsa')).rejects.toThrow()
  })

  test('NV and persistent handles', async () => {
    await tool('tpm2_nvdefine', '0x1500001', '-C', 'o', '-s', '64', '-a', 'ownerread|ownerwrite')
    writeFileSync(at('nv'), random(64))
    await tool('tpm2_nvwrite', '0x1500001', '-C', 'o', '-i', 'nv')
    await tool('tpm2_nvread', '0x1500001', '-C', 'o', '-o', 'nv.out')
    expect(readFileSync(at('nv.out'))).toEqual(readFileSync(at('nv')))
    await tool('tpm2_nvundefine', '0x1500001', '-C', 'o')
    await tool('tpm2_evictcontrol', '-C', 'o', '-c', 'srk.ctx', '0x81000001')
    expect(await tool('tpm2_getcap', 'handles-persistent')).toMatch(/0x81000001/)
  })
})
