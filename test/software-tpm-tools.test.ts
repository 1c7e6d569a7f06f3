import { execFile } from 'node:child_process'
import { createHash, generateKeyPairSync, randomBytes, sign } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { serveSoftwareTpm } from '@fleetkey/firmware-sim/tpm/serve.ts'
import { createSoftwareTpm, type SoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { hasProgram } from './programs.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const here = hasProgram('tpm2_getrandom')

/** The whole of an enrolment as a shell script would do it, with tools that nobody here wrote, through the sockets that swtpm has too. */
describe.skipIf(!here)('an enrolment by tpm2-tools', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-script-'))
  const at = (name: string): string => join(folder, name)
  let tpm: SoftwareTpm
  let served: { stop(): Promise<void> }
  const run = async (line: string): Promise<string> => {
    const [name = '', ...args] = line.split(' ')
    const env = { ...process.env, TPM2TOOLS_TCTI: `swtpm:path=${at('tpm')}`, TSS2_LOG: 'all+none' }
    try {
      return (await promisify(execFile)(`tpm2_${name}`, args, { cwd: folder, env })).stdout
    } catch (error) {
      const { stdout = '', stderr = '' } = error as { stdout?: string; stderr?: string }
      throw new Error(`${line}: ${stdout}${stderr}`, { cause: error })
    }
  }
  /** Tools that leave no object in one of the three slots. */
  const tidy = /^(startauthsession|flushcontext|policy|nv|changeauth|checkquote|pcrevent|dictionarylockout|readclock|selftest|gettestresult)/
  /** One line after the other, and room made after each, as a resource manager would. */
  const script = async (...lines: readonly string[]): Promise<void> => {
    for (const line of lines) {
      await run(line)
      if (!tidy.test(line)) await run('flushcontext -t')
    }
  }

  beforeAll(async () => {
    tpm = createSoftwareTpm({ random, now: () => Date.now() })
    served = await serveSoftwareTpm(tpm, { path: at('tpm') })
    writeFileSync(at('message'), 'a message')
    writeFileSync(at('words'), 'sealed words')
    writeFileSync(at('secret'), random(32))
    writeFileSync(at('hmac.key'), random(32))
    writeFileSync(at('nv'), random(48))
  })
  afterAll(async () => {
    await served.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  test.each([
    ['ecc', 'ecdsa'],
    ['rsa', 'rsassa'],
  ])(
    'EK and AK (%s), credential, quote',
    async (kind, scheme) => {
      await script(`createek -c ek.ctx -G ${kind} -u ek.pub`, `createak -C ek.ctx -c ak.ctx -G ${kind} -s ${scheme} -g sha256 -u ak.pub -n ak.name`)
      const name = readFileSync(at('ak.name')).toString('hex')
      await script(
        `makecredential -e ek.pub -s secret -n ${name} -o credential`,
        'startauthsession --policy-session -S session',
        'policysecret -S session -c e',
        'activatecredential -c ak.ctx -C ek.ctx -i credential -o opened -P session:session',
        'flushcontext session',
      )
      expect(readFileSync(at('opened'))).toEqual(readFileSync(at('secret')))
      await script(
        'quote -c ak.ctx -l sha256:0,1,7 -q abcdef -m quote.msg -s quote.sig -o quote.pcrs -g sha256',
        'readpublic -c ak.ctx -f pem -o ak.pem',
        'checkquote -u ak.pem -m quote.msg -s quote.sig -f quote.pcrs -q abcdef -g sha256',
      )
      await expect(run('checkquote -u ak.pem -m quote.msg -s quote.sig -f quote.pcrs -q abcdee -g sha256')).rejects.toThrow(/checkquote/)
    },
    120_000,
  )

  test('keys: create, load, sign, verify, import, duplicate to another parent', async () => {
    await script(
      'createprimary -C o -G ecc -c parent.ctx',
      'create -C parent.ctx -G ecc -u key.pub -r key.priv',
      'load -C parent.ctx -u key.pub -r key.priv -c key.ctx',
      'sign -c key.ctx -g sha256 -o message.sig message',
      'verifysignature -c key.ctx -g sha256 -m message -s message.sig',
      'import -C parent.ctx -G hmac -i hmac.key -u hmac.pub -r hmac.priv',
      'startauthsession -S session',
      'policycommandcode -S session -L duplicate.policy TPM2_CC_Duplicate',
      'flushcontext session',
      'create -C parent.ctx -G ecc -L duplicate.policy -a sensitivedataorigin|userwithauth|sign -u move.pub -r move.priv',
      'load -C parent.ctx -u move.pub -r move.priv -c move.ctx',
      'createprimary -C p -G ecc -c target.ctx',
      'startauthsession --policy-session -S session',
      'policycommandcode -S session TPM2_CC_Duplicate',
      'duplicate -C target.ctx -c move.ctx -G null -p session:session -r move.duplicate -s move.seed',
      'flushcontext session',
      'import -C target.ctx -G ecc -u move.pub -i move.duplicate -r moved.priv -s move.seed',
      'load -C target.ctx -u move.pub -r moved.priv -c moved.ctx',
      'sign -c moved.ctx -g sha256 -o moved.sig message',
      'verifysignature -c moved.ctx -g sha256 -m message -s moved.sig',
    )
    writeFileSync(at('other'), 'another message')
    await expect(run('verifysignature -c moved.ctx -g sha256 -m other -s moved.sig')).rejects.toThrow(/verifysignature/)
    await run('flushcontext -t')
  }, 120_000)

  test('an object under PolicyAuthorize opens with an approval, and not after a change', async () => {
    const { publicKey, privateKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
    writeFileSync(at('approver.pem'), publicKey.export({ format: 'pem', type: 'spki' }))
    await script(
      'loadexternal -C o -G ecc -u approver.pem -c approver.ctx -n approver.name',
      'startauthsession -S session',
      'policypcr -S session -l sha256:0,7 -L pcr.policy',
      'flushcontext session',
      'startauthsession -S session',
      'policyauthorize -S session -L authorize.policy -n approver.name',
      'flushcontext session',
      'createprimary -C o -G ecc -c parent.ctx',
      'create -C parent.ctx -i words -L authorize.policy -u words.pub -r words.priv -a fixedtpm|fixedparent|noda',
      'load -C parent.ctx -u words.pub -r words.priv -c words.ctx',
    )
    writeFileSync(at('approval'), sign('sha256', readFileSync(at('pcr.policy')), privateKey))
    expect(
      createHash('sha256')
        .update(readFileSync(at('pcr.policy')))
        .digest(),
    ).toHaveLength(32)
    await script('verifysignature -c approver.ctx -g sha256 -m pcr.policy -s approval -f ecdsa -t ticket')
    const open = async (): Promise<string> => {
      await script('startauthsession --policy-session -S session', 'policypcr -S session -l sha256:0,7')
      try {
        await run('policyauthorize -S session -i pcr.policy -n approver.name -t ticket')
        return await run('unseal -c words.ctx -p session:session')
      } finally {
        await script('flushcontext session')
      }
    }
    expect(await open()).toBe('sealed words')
    await expect(run('unseal -c words.ctx')).rejects.toThrow(/unseal/)
    await run('flushcontext -t')
    await run(`pcrextend 7:sha256=${'ab'.repeat(32)}`)
    await expect(open()).rejects.toThrow(/policyauthorize/)
  }, 120_000)

  test('NV, persistent keys, hierarchy values, lockout, clear', async () => {
    await script(
      'nvdefine 0x1500020 -C o -s 48 -a ownerread|ownerwrite',
      'nvwrite 0x1500020 -C o -i nv',
      'nvread 0x1500020 -C o -o nv.out',
      'nvreadpublic 0x1500020',
      'nvundefine 0x1500020 -C o',
      'createprimary -C o -G ecc -c parent.ctx',
      'evictcontrol -C o -c parent.ctx 0x81000005',
      'readpublic -c 0x81000005',
      'evictcontrol -C o -c 0x81000005',
      'changeauth -c o owner',
      'changeauth -c lockout lock',
    )
    expect(readFileSync(at('nv.out'))).toEqual(readFileSync(at('nv')))
    await expect(run('createprimary -C o -G ecc -c parent.ctx')).rejects.toThrow(/createprimary/)
    await script('createprimary -C o -P owner -G ecc -c parent.ctx', 'dictionarylockout -s -n 5 -t 100 -l 100 -p lock', 'dictionarylockout -c -p lock')
    expect(await run('getcap properties-variable')).toMatch(/TPM2_PT_MAX_AUTH_FAIL: 0x5/)
    await expect(run('clear')).rejects.toThrow(/clear/)
    // The lockout value was tried wrong: the platform is the way on.
    await script('clear -c p', 'createprimary -C o -G ecc -c parent.ctx', 'readclock', 'selftest', 'gettestresult', 'pcrevent 8 message')
    await expect(run('load -C parent.ctx -u key.pub -r key.priv -c key.ctx')).rejects.toThrow(/load/)
    await run('flushcontext -t')
  }, 120_000)
})
