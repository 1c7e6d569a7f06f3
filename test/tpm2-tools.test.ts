import { execFile } from 'node:child_process'
import { createPublicKey, randomBytes } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { makeCredential } from '@fleetkey/tpm2/credential.ts'
import { openDeviceKeys, provision, type DeviceKeys } from '@fleetkey/tpm2/device-keys.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { spkiOf } from '@fleetkey/tpm2/structures.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const here = hasProgram('swtpm') && hasProgram('tpm2_checkquote')

/** tpm2-tools judge what our agent's and our server's code made; swtpm is the TPM. */
describe.skipIf(!here)('tpm2-tools as the judge', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-judge-'))
  const at = (name: string): string => join(folder, name)
  let swtpm: RunningSwtpm
  beforeAll(async () => {
    swtpm = await startSwtpm()
  })
  afterAll(async () => {
    await swtpm.stop()
    rmSync(folder, { recursive: true, force: true })
  })
  const tool = async (tcti: string, name: string, ...args: string[]): Promise<string> => {
    try {
      return (await promisify(execFile)(name, args, { cwd: folder, env: { ...process.env, TPM2TOOLS_TCTI: tcti, TSS2_LOG: 'all+none' } })).stdout
    } catch (error) {
      const { stdout = '', stderr = '' } = error as { stdout?: string; stderr?: string }
      throw new Error(`${name} ${args.join(' ')}: ${stdout}${stderr}`, { cause: error })
    }
  }

  const quoteOf = async (transport: Transport): Promise<void> => {
    const tpm = new Tpm(transport, { random })
    const keys: DeviceKeys = await openDeviceKeys(tpm, await provision(tpm))
    const nonce = Buffer.from('00112233445566778899aabbccddeeff', 'hex')
    const { attest, signature } = await keys.quote([{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }], nonce)
    const ak = createPublicKey({ key: Buffer.from(spkiOf(keys.publics.ak)), format: 'der', type: 'spki' })
    writeFileSync(at('ak.pem'), ak.export({ format: 'pem', type: 'spki' }))
    writeFileSync(at('quote.msg'), attest)
    writeFileSync(at('quote.sig'), signature)
    await keys.close()
    await transport.close()
  }
  const check = async (nonce: string): Promise<string> =>
    await tool('none', 'tpm2_checkquote', '-u', 'ak.pem', '-m', 'quote.msg', '-s', 'quote.sig', '-q', nonce, '-g', 'sha256')

  test.each([
    ['swtpm', async () => await openTransport(swtpm.spec)],
    ['the simulator', async () => createSoftwareTpm({ random, now: () => Date.now() }).transport()],
  ] as const)('tpm2_checkquote accepts our quote from %s, and none that was changed', async (_, open) => {
    await quoteOf(await open())
    await check('00112233445566778899aabbccddeeff')
    await expect(check('00112233445566778899aabbccddeefe')).rejects.toThrow(/tpm2_checkquote/)
    const message = readFileSync(at('quote.msg'))
    message[message.length - 1] = (message.at(-1) ?? 0) ^ 1
    writeFileSync(at('quote.msg'), message)
    await expect(check('00112233445566778899aabbccddeeff')).rejects.toThrow(/tpm2_checkquote/)
  })

  test("tpm2_activatecredential on swtpm opens the server's credential", async () => {
    const on = async (name: string, ...args: string[]): Promise<string> => await tool(swtpm.tcti, name, ...args)
    await on('tpm2_createek', '-c', 'ek.ctx', '-G', 'ecc', '-u', 'ek.pub')
    await on('tpm2_createak', '-C', 'ek.ctx', '-c', 'ak.ctx', '-G', 'ecc', '-s', 'ecdsa', '-g', 'sha256', '-u', 'ak.pub.pem', '-f', 'pem', '-n', 'ak.name')
    await on('tpm2_flushcontext', '-t')
    const ek = Uint8Array.from(readFileSync(at('ek.pub'))).subarray(2)
    const secret = random(32)
    // What the challenge of an enrolment carries.
    const { blob, secret: seed } = makeCredential({ ek, name: Uint8Array.from(readFileSync(at('ak.name'))), secret: new Secret(secret), random })
    const size = (bytes: Uint8Array): Buffer => Buffer.from([bytes.length >> 8, bytes.length & 0xff])
    writeFileSync(at('cred'), Buffer.concat([Buffer.from('badcc0de00000001', 'hex'), size(blob), blob, size(seed), seed]))
    await on('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx')
    await on('tpm2_policysecret', '-S', 'session.ctx', '-c', 'e')
    await on('tpm2_activatecredential', '-c', 'ak.ctx', '-C', 'ek.ctx', '-i', 'cred', '-o', 'secret.out', '-P', 'session:session.ctx')
    expect(readFileSync(at('secret.out'))).toStrictEqual(Buffer.from(secret))
  })
})
