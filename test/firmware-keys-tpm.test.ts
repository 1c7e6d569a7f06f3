import { execFile } from 'node:child_process'
import { createECDH, randomBytes } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { marshalSignature } from '@fleetkey/tpm2/attest.ts'
import { sized } from '@fleetkey/tpm2/bytes.ts'
import { alg, command } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs, type DeviceKeys, type FirmwareKeyBlobs, type KeyBlob } from '@fleetkey/tpm2/device-keys.ts'
import { authPolicyOf, firmwareDigest, NotApproved, type ApprovalSet } from '@fleetkey/tpm2/firmware.ts'
import { wrapForImport } from '@fleetkey/tpm2/import.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { approver, firmwarePcrs } from './approver.ts'
import { hasProgram } from './programs.ts'
import { startSwtpm, type RunningSwtpm } from './swtpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
const codeOf = (bytes: Uint8Array): number => Buffer.from(bytes).readUInt32BE(6)
const point = (): Uint8Array => new Uint8Array(createECDH('prime256v1').generateKeys())

interface Bench {
  open(): Promise<Transport>
  restart(): Promise<void>
  stop(): Promise<void>
}
const benches = {
  async swtpm(): Promise<Bench> {
    const running = await startSwtpm()
    return { open: async () => await openTransport(running.spec), restart: running.restart, stop: running.stop }
  },
  async simulator(): Promise<Bench> {
    const tpm = createSoftwareTpm({ random, now: () => Date.now() })
    return { open: async () => tpm.transport(), restart: async () => tpm.powerCycle(), stop: async () => undefined }
  },
} as const

describe.each(['swtpm', 'simulator'] as const)('keys under firmware on %s', (which) => {
  const here = which === 'simulator' || hasProgram('swtpm')
  const maker = approver()
  const authPolicy = authPolicyOf(maker.policy())
  let bench: Bench
  let transport: Transport
  let tpm: Tpm
  let blobs: DeviceKeyBlobs
  let keys: DeviceKeys
  let bound: FirmwareKeyBlobs
  let imported: KeyBlob
  let approved: ApprovalSet
  /** Commands that went to the TPM, and what to do before one of them does. */
  let sent: number[]
  let before: ((code: number) => Promise<void>) | undefined

  const extend = async (pcr: number, on: Tpm = tpm): Promise<void> => await on.pcrExtend(pcr, [{ hash: alg.sha256, digest: random(32) }])
  /** Power off and on, and a boot that measures these. */
  const boot = async (measured: readonly Uint8Array[]): Promise<void> => {
    await transport.close()
    await bench.restart()
    const raw = await bench.open()
    transport = {
      send: async (bytes) => {
        sent.push(codeOf(bytes))
        const hook = before
        before = undefined
        if (hook !== undefined) await hook(codeOf(bytes)).finally(() => (before ??= hook))
        return await raw.send(bytes)
      },
      close: async () => await raw.close(),
    }
    tpm = new Tpm(transport, { random })
    await tpm.startup()
    for (const digest of measured) await tpm.pcrExtend(4, [{ hash: alg.sha256, digest }])
  }
  const firmware = [random(32), random(32)]
  const uses = (): readonly (readonly [string, () => Promise<unknown>])[] => [
    ['TPM2_ECDH_ZGen', async () => await keys.zgen(bound.recipient, point())],
    ['TPM2_Unseal', async () => await keys.storageKey(bound.storage)],
    ['TPM2_HMAC', async () => await keys.hmac(imported, random(64))],
    ['TPM2_HMAC of a sequence', async () => await keys.hmac(imported, random(3000))],
  ]

  beforeAll(async () => {
    if (!here) return
    sent = []
    bench = await benches[which]()
    transport = await bench.open()
    await boot(firmware)
    blobs = await provision(tpm)
    keys = await openDeviceKeys(tpm, blobs)
    bound = await keys.make(maker.policy())
    const key = random(32)
    imported = await keys.importHmacKey(wrapForImport({ parent: keys.publics.srk, key, authPolicy, random }))
    approved = await maker.running(tpm)
  }, 60_000)
  beforeEach(async () => {
    if (!here) return
    before = undefined
    await boot(firmware)
    keys = await openDeviceKeys(tpm, blobs)
    keys.approve([approved])
    sent = []
  })
  afterAll(async () => {
    if (!here) return
    await transport.close()
    await bench.stop()
  })
  // oxlint-disable-next-line vitest/expect-expect, vitest/valid-title -- the titles and assertions are below
  const on = (name: string, work: () => Promise<void>): void => test.skipIf(!here)(name, work, 60_000)

  on('work under approved firmware, after every boot of it', async () => {
    for (const [name, use] of uses()) expect(await use(), name).toBeInstanceOf(Uint8Array)
  })

  on('do not work once anything else was measured: the TPM itself refuses, also him who ignores our check', async () => {
    await extend(4)
    for (const [name, use] of uses()) await expect(use(), name).rejects.toThrow(NotApproved)
    // Past our own check: the approval of another state, shown to the TPM as if it were of this one.
    const values = await tpm.exclusive(async () => await tpm.pcrRead(alg.sha256, firmwarePcrs))
    const forged = { ...maker.approval(firmwareDigest(firmwarePcrs, values)), signature: approved.approvals[0]?.signature ?? random(64) }
    keys.approve([{ ...approved, approvals: [forged] }])
    for (const [name, use] of uses()) await expect(use(), name).rejects.toThrow(/verifySignature: SIGNATURE/)
    // Signed, but by a key of the attacker's own.
    const attacker = approver()
    keys.approve([{ ...approved, approvals: [attacker.approval(firmwareDigest(firmwarePcrs, values))] }])
    for (const [name, use] of uses()) await expect(use(), name).rejects.toThrow(/verifySignature: SIGNATURE/)
    // Signed by the right key, for another reference: an approval of before a withdrawal.
    const replayed = maker.approval(firmwareDigest(firmwarePcrs, values), random(32))
    keys.approve([{ ...approved, approvals: [replayed] }])
    for (const [name, use] of uses()) await expect(use(), name).rejects.toThrow(/verifySignature: SIGNATURE/)
    // And by no password: there is none.
    await keys.close()
    await tpm.exclusive(async () => {
      const srk = await tpm.createPrimary(0x4000_0001, templates.srk)
      const storage = await tpm.load(srk, bound.storage)
      await expect(tpm.unseal(storage)).rejects.toThrow(/AUTH_UNAVAILABLE|0x12f/)
      await tpm.flush(storage.handle)
      await tpm.flush(srk.handle)
    })
  })

  on('work again after the next boot of approved firmware', async () => {
    await extend(4)
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(NotApproved)
    await boot(firmware)
    keys = await openDeviceKeys(tpm, blobs)
    keys.approve([approved])
    expect(await keys.storageKey(bound.storage)).toHaveLength(32)
  })

  on('work under the next release once that is approved, in any order of approvals', async () => {
    await boot([random(32)])
    keys = await openDeviceKeys(tpm, blobs)
    keys.approve([approved])
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(NotApproved)
    const next = await maker.running(tpm)
    keys.approve([{ ...approved, approvals: [...approved.approvals, ...next.approvals] }])
    expect(await keys.storageKey(bound.storage)).toHaveLength(32)
  })

  on('are certified by the AK whatever runs', async () => {
    await extend(0)
    expect((await keys.certify(bound.recipient, random(32))).attest.length).toBeGreaterThan(0)
  })

  on('cost two commands more per use, and no session or signature after the first', async () => {
    for (const [, use] of uses()) await use()
    await keys.zgen(bound.recipient, point())
    sent = []
    await keys.zgen(bound.recipient, point())
    expect(sent).toEqual([command.policyPcr, command.policyAuthorize, command.ecdhZGen])
  })

  on('take one policy session and the ledger’s slots, however many ask', async () => {
    await Promise.all([...uses(), ...uses(), ...uses()].map(async ([, use]) => await use()))
    const [objects, hmacSessions, policySessions] = [await tpm.handles(0x8000_0000), await tpm.handles(0x0200_0000), await tpm.handles(0x0300_0000)]
    expect(objects.length).toBeLessThanOrEqual(3)
    expect(new Set([...hmacSessions, ...policySessions]).size).toBeLessThanOrEqual(2)
    await keys.close()
    expect([await tpm.handles(0x8000_0000), await tpm.handles(0x0200_0000)]).toEqual([[], []])
  })

  on('a PCR that changes between showing and using: refused by the TPM, tried once more, refused in our own words', async () => {
    await keys.storageKey(bound.storage)
    sent = []
    let extended = false
    before = async (code) => {
      if (code !== command.unseal || extended) return
      extended = true
      await extend(11)
    }
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(NotApproved)
    expect(extended).toBe(true)
    expect(sent.filter((code) => code === command.unseal)).toHaveLength(1)
    // A PCR that the policy does not name changes the TPM's counter as well: that is survived.
    await boot(firmware)
    keys = await openDeviceKeys(tpm, blobs)
    keys.approve([approved])
    let other = false
    before = async (code) => {
      if (code !== command.unseal || other) return
      other = true
      await extend(10)
    }
    sent = []
    expect(await keys.storageKey(bound.storage)).toHaveLength(32)
    expect(sent.filter((code) => code === command.unseal)).toHaveLength(2)
  })

  on('a point off the curve is refused as ever, and leaves nothing behind', async () => {
    const off = point()
    off[64] = (off[64] ?? 0) ^ 1
    await expect(keys.zgen(bound.recipient, off)).rejects.toThrow(/ecdhZGen/)
    expect(await keys.zgen(bound.recipient, point())).toHaveLength(32)
  })

  on('without any approval: said so', async () => {
    keys.approve([])
    await expect(keys.storageKey(bound.storage)).rejects.toThrow(/no approved firmware is known/)
  })
})

const tools = ['swtpm', 'tpm2_policyauthorize', 'tpm2_unseal']
describe.skipIf(!tools.every(hasProgram))('tpm2-tools as the judge of an approval', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-approval-'))
  const at = (name: string): string => join(folder, name)
  const maker = approver()
  let swtpm: RunningSwtpm
  let digest: Uint8Array
  const secret = 'thirty-two bytes of storage key!'
  const tool = async (name: string, ...args: string[]): Promise<string> => {
    try {
      return (await promisify(execFile)(name, args, { cwd: folder, env: { ...process.env, TPM2TOOLS_TCTI: swtpm.tcti, TSS2_LOG: 'all+none' } })).stdout
    } catch (error) {
      throw new Error(`${name}: ${(error as { stderr?: string }).stderr ?? ''}`, { cause: error })
    }
  }
  const selection = `sha256:${firmwarePcrs.join(',')}`
  beforeAll(async () => {
    swtpm = await startSwtpm()
    await tool('tpm2_pcrextend', '4:sha256=11d0f8b6a9c2cbd3cf0ecdcb73ee3bc3e2f6d7c4f5b0cbd1f5f2f4e2c2a2f001')
    const { signer, ref } = maker.policy()
    writeFileSync(at('signer.pub'), sized(signer))
    writeFileSync(at('ref'), ref)
    await tool('tpm2_loadexternal', '-C', 'o', '-u', 'signer.pub', '-c', 'signer.ctx', '-n', 'signer.name')
    await tool('tpm2_flushcontext', '-t')
    const transport = await openTransport(swtpm.spec)
    const tpm = new Tpm(transport, { random })
    digest = (await maker.running(tpm)).approvals[0]?.policy ?? new Uint8Array()
    await transport.close()
  }, 60_000)
  afterAll(async () => {
    await swtpm.stop()
    rmSync(folder, { recursive: true, force: true })
  })

  const session = async (): Promise<void> => {
    await tool('tpm2_startauthsession', '--policy-session', '-S', 'session.ctx')
    await tool('tpm2_policypcr', '-S', 'session.ctx', '-l', selection)
    await tool('tpm2_policyauthorize', '-S', 'session.ctx', '-i', 'approved', '-n', 'signer.name', '-q', 'ref', '-t', 'ticket')
  }

  test('our policy digests are the tools’, and our approval unseals', { timeout: 60_000 }, async () => {
    const { signature } = maker.approval(digest)
    writeFileSync(at('approved'), digest)
    writeFileSync(at('message'), Buffer.concat([digest, maker.policy().ref]))
    writeFileSync(at('signature'), marshalSignature({ scheme: alg.ecdsa, hash: alg.sha256, r: signature.subarray(0, 32), s: signature.subarray(32) }))
    await tool('tpm2_verifysignature', '-c', 'signer.ctx', '-g', 'sha256', '-m', 'message', '-s', 'signature', '-t', 'ticket')
    await tool('tpm2_flushcontext', '-t')
    await tool('tpm2_startauthsession', '-S', 'trial.ctx')
    await tool('tpm2_policypcr', '-S', 'trial.ctx', '-l', selection, '-L', 'pcr.policy')
    expect(readFileSync(at('pcr.policy'))).toEqual(Buffer.from(digest))
    await tool('tpm2_policyauthorize', '-S', 'trial.ctx', '-i', 'pcr.policy', '-n', 'signer.name', '-q', 'ref', '-t', 'ticket', '-L', 'auth.policy')
    await tool('tpm2_flushcontext', 'trial.ctx')
    expect(readFileSync(at('auth.policy'))).toEqual(Buffer.from(authPolicyOf(maker.policy())))
    writeFileSync(at('secret'), secret)
    await tool('tpm2_createprimary', '-C', 'o', '-c', 'primary.ctx', '-G', 'ecc')
    await tool(
      'tpm2_create',
      '-C',
      'primary.ctx',
      '-u',
      'sealed.pub',
      '-r',
      'sealed.priv',
      '-L',
      'auth.policy',
      '-a',
      'fixedtpm|fixedparent|noda',
      '-i',
      'secret',
    )
    await tool('tpm2_flushcontext', '-t')
    await tool('tpm2_load', '-C', 'primary.ctx', '-u', 'sealed.pub', '-r', 'sealed.priv', '-c', 'sealed.ctx')
    await tool('tpm2_flushcontext', '-t')
    await session()
    expect(await tool('tpm2_unseal', '-c', 'sealed.ctx', '-p', 'session:session.ctx')).toBe(secret)
    await tool('tpm2_flushcontext', 'session.ctx')
    await tool('tpm2_pcrextend', '11:sha256=11d0f8b6a9c2cbd3cf0ecdcb73ee3bc3e2f6d7c4f5b0cbd1f5f2f4e2c2a2f002')
    await expect(session()).rejects.toThrow(/tpm2_policyauthorize/)
  })
})
