import { execFile, spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { promisify } from 'node:util'
import { defaultImaList } from '@fleetkey/device-agent/config.ts'
import { examine, type Examination } from '@fleetkey/device-agent/doctor/examine.ts'
import { examinationText } from '@fleetkey/device-agent/doctor/text.ts'
import { readPasswords } from '@fleetkey/device-agent/tpm-passwords.ts'
import { inPlainWords } from '@fleetkey/device-agent/tpm-trouble.ts'
import { nodeFileSystem } from '@fleetkey/device-agent/filesystem.ts'
import type { PasswordFiles } from '@fleetkey/device-agent/config.ts'
import { alg, handle, sessionType } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision, type DeviceKeyBlobs } from '@fleetkey/tpm2/device-keys.ts'
import { rc, TpmError } from '@fleetkey/tpm2/errors.ts'
import { eventType, marshalEventLog, type Event } from '@fleetkey/tpm2/event-log.ts'
import { inspectTpm } from '@fleetkey/tpm2/inspect.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { openTransport, type Transport } from '@fleetkey/tpm2/transport.ts'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { approver } from './approver.ts'
import { hasProgram } from './programs.ts'
import { socketFree, startSwtpm, type RunningSwtpm } from './swtpm.ts'
import { openWorld, random, until } from './world.ts'

const here = hasProgram('swtpm') && hasProgram('swtpm_setup') && hasProgram('tpm2_changeauth')
const main = fileURLToPath(new URL('../device-agent/main.ts', import.meta.url))

let folder: string
let running: RunningSwtpm
beforeAll(() => {
  folder = mkdtempSync(join(tmpdir(), 'fk-hardware-'))
})
afterAll(() => rmSync(folder, { recursive: true, force: true }))

const free = async (): Promise<void> => await socketFree(running.spec.slice('unix:'.length))

/** tpm2-tools, each once the socket is free. */
const tool = async (name: string, ...args: readonly string[]): Promise<string> => {
  await free()
  const env = { ...process.env, TPM2TOOLS_TCTI: running.tcti, TSS2_LOG: 'all+none' }
  return (await promisify(execFile)(name, [...args], { cwd: folder, env })).stdout
}

/** The command itself, as a person runs it. */
const agent = async (...args: readonly string[]): Promise<{ code: number; stdout: string; stderr: string }> => {
  await free()
  const child = spawn(process.execPath, [main, ...args], { cwd: folder })
  const said = { stdout: '', stderr: '' }
  child.stdout.on('data', (chunk: Buffer) => void (said.stdout += chunk.toString()))
  child.stderr.on('data', (chunk: Buffer) => void (said.stderr += chunk.toString()))
  const [code] = (await once(child, 'close')) as [number]
  return { code, ...said }
}

/** What the command does, without starting a process for it. */
const doctor = async (of: { readonly root?: string; readonly eventLog?: string } = {}): Promise<Examination> => {
  await free()
  const { spec: tpm } = running
  return await examine({
    tpm,
    tpmAuth: {},
    data: null,
    eventLog: null,
    imaList: defaultImaList,
    root: '/',
    open: async () => await openTransport(tpm),
    random,
    now: Date.now(),
    ...of,
  })
}
const finding = (found: Examination, check: string): string =>
  found.findings
    .filter((one) => one.check === check)
    .map(({ grade, found: what, remedy }) => `${grade}: ${what}${remedy === '' ? '' : ` > ${remedy}`}`)
    .join('\n')

const write = (name: string, content: string | Uint8Array): string => {
  const path = join(folder, name)
  writeFileSync(path, content, { mode: 0o600 })
  return path
}

const withTpm = async <R>(
  work: (tpm: Tpm, transport: Transport) => Promise<R>,
  options: { files?: PasswordFiles; wrap?: (of: Transport) => Transport } = {},
): Promise<R> => {
  await free()
  const opened = await openTransport(running.spec)
  const transport = options.wrap?.(opened) ?? opened
  const passwords = await readPasswords(nodeFileSystem.read, options.files ?? {})
  try {
    return await work(new Tpm(transport, { random, passwords }), transport)
  } finally {
    await transport.close()
  }
}

describe.skipIf(!here)('handles that a crash has left', () => {
  let blobs: DeviceKeyBlobs
  beforeAll(async () => {
    running = await startSwtpm()
    blobs = await withTpm(async (tpm) => await provision(tpm))
  })
  afterAll(async () => await running.stop())

  /** Fills every slot and never flushes: as a process that was killed. */
  const leak = async (tpm: Tpm, what: readonly ('object' | 'hmac' | 'policy')[]): Promise<void> => {
    for (const one of what)
      if (one === 'object') await tpm.createPrimary(handle.owner, templates.srk)
      else await tpm.startSession(sessionType[one], null)
  }
  const full = ['object', 'object', 'object', 'hmac', 'policy', 'policy'] as const

  test('fill the TPM for whoever does not clean up', async () => {
    await withTpm(async (tpm) => await leak(tpm, full))
    await withTpm(async (tpm) => {
      await expect(tpm.createPrimary(handle.owner, templates.srk)).rejects.toMatchObject({ code: rc.objectMemory })
      await expect(tpm.startSession(sessionType.hmac, null)).rejects.toMatchObject({ code: rc.sessionMemory })
      expect((await inspectTpm(tpm)).leftOver).toEqual({ objects: 3, sessions: 3 })
    })
    const found = await doctor()
    expect(finding(found, 'left in the TPM')).toMatch(/^warn: 3 objects and 3 sessions of a program that has ended \(room for 3 and 3\)/)
    expect(finding(found, 'keys')).toMatch(/^fail: other programs hold all slots of the TPM/)
  })

  test('are freed when the agent opens a raw TPM', async () => {
    await withTpm(async (tpm) => {
      const keys = await openDeviceKeys(tpm, blobs)
      expect(await keys.sign(random(10))).toHaveLength(64)
      await keys.close()
      expect([await tpm.handles(0x8000_0000), await tpm.handles(0x0200_0000)]).toEqual([[], []])
    })
  })

  test('are freed when somebody fills the TPM while the agent runs', async () => {
    await withTpm(async (tpm, transport) => {
      const keys = await openDeviceKeys(tpm, blobs)
      const maker = approver()
      const { storage } = await keys.make(maker.policy())
      keys.approve([await maker.running(tpm)])
      const before = await keys.storageKey(storage)
      await keys.close()
      await leak(new Tpm(transport, { random }), full)
      expect(await keys.storageKey(storage)).toEqual(before)
      await keys.close()
    })
  })

  test('behind a resource manager, whose list shows the sessions of others, nothing of theirs is flushed', async () => {
    const foreign = await withTpm(async (tpm) => await tpm.startSession(sessionType.policy, null))
    const managed = (of: Transport): Transport => ({ managed: true, send: async (command) => await of.send(command), close: async () => await of.close() })
    await withTpm(
      async (tpm) => {
        const keys = await openDeviceKeys(tpm, blobs)
        expect(await keys.sign(random(10))).toHaveLength(64)
        await keys.close()
        expect(await tpm.handles(0x0200_0000)).toEqual([foreign.handle])
        expect((await inspectTpm(tpm)).leftOver).toBeNull()
      },
      { wrap: managed },
    )
  })

  test('a saved session of another program stays on a raw TPM too', async () => {
    await withTpm(async (tpm) => {
      const keys = await openDeviceKeys(tpm, blobs)
      await keys.close()
    })
    await tool('tpm2_startauthsession', '-S', 'session.ctx')
    const saved = async (): Promise<readonly number[]> => await withTpm(async (tpm) => await tpm.handles(0x0300_0000))
    const before = await saved()
    expect(before).toHaveLength(1)
    await withTpm(async (tpm) => await (await openDeviceKeys(tpm, blobs)).close())
    expect(await saved()).toEqual(before)
  })
})

describe.skipIf(!here)('passwords of hierarchies', () => {
  const secrets = { owner: 'owner-canary-31', endorsement: 'hex:00112233445566778899aabbccddeeff00', lockout: 'lockout canary 33\n' } as const
  const files = (): PasswordFiles => ({
    owner: write('owner.auth', secrets.owner),
    endorsement: write('endorsement.auth', secrets.endorsement),
    lockout: write('lockout.auth', secrets.lockout),
  })
  beforeAll(async () => {
    running = await startSwtpm()
    await tool('tpm2_changeauth', '-c', 'owner', secrets.owner)
    await tool('tpm2_changeauth', '-c', 'endorsement', 'hex:00112233445566778899aabbccddeeff00')
    await tool('tpm2_changeauth', '-c', 'lockout', 'lockout canary 33')
  })
  afterAll(async () => await running.stop())

  test('are used, in HMACs only: no command carries one', async () => {
    const seen: Uint8Array[] = []
    const tap = (of: Transport): Transport => ({
      send: async (command) => {
        seen.push(command)
        return await of.send(command)
      },
      close: async () => await of.close(),
    })
    await withTpm(
      async (tpm) => {
        const keys = await openDeviceKeys(tpm, await provision(tpm))
        expect(await keys.quote([{ hash: 'sha256', pcrs: [0] }], random(32))).toBeDefined()
        expect(await keys.certify('srk', random(32))).toBeDefined()
        await keys.close()
        expect([await tpm.handles(0x8000_0000), await tpm.handles(0x0200_0000)]).toEqual([[], []])
      },
      { files: files(), wrap: tap },
    )
    const bus = Buffer.concat(seen)
    expect(seen.length).toBeGreaterThan(20)
    for (const secret of [secrets.owner, Buffer.from('00112233445566778899aabbccddeeff', 'hex'), 'lockout canary']) expect(bus.indexOf(secret)).toBe(-1)
  })

  const wrong: readonly (readonly [string, (all: PasswordFiles) => PasswordFiles, RegExp])[] = [
    ['none', () => ({}), /^the endorsement hierarchy of the TPM has a password: name the file that holds it: "tpmAuth": \{"endorsementAuthFile": "…"\}$/],
    ['no endorsement password', ({ owner = '' }) => ({ owner }), /^the endorsement hierarchy of the TPM has a password: name the file/],
    ['no owner password', ({ endorsement = '' }) => ({ endorsement }), /^the owner hierarchy of the TPM has a password: name the file .*ownerAuthFile/],
    [
      'a wrong owner password',
      (all) => ({ ...all, owner: write('wrong.auth', 'nothing-canary') }),
      /^the owner hierarchy of the TPM has a password: the one in \S+wrong\.auth is wrong$/,
    ],
    [
      'a wrong endorsement password',
      (all) => ({ ...all, endorsement: write('wrong.auth', 'nothing-canary') }),
      /^the endorsement hierarchy .* the one in \S+wrong\.auth is wrong$/,
    ],
  ]
  test.each(wrong)('%s: said in plain words, which hierarchy and what to do', async (_name, choose, want) => {
    const chosen = choose(files())
    const error = await withTpm(async (tpm) => await inPlainWords(tpm, chosen, async () => await provision(tpm)), { files: chosen }).catch(
      (thrown: unknown) => thrown,
    )
    expect(error).toMatchObject({ name: 'TpmTrouble', message: expect.stringMatching(want), cause: expect.any(TpmError) })
    expect(JSON.stringify([error, (error as Error).stack])).not.toContain('canary')
  })

  test('files that are none', async () => {
    const cases: readonly (readonly [string, RegExp])[] = [
      [write('empty.auth', '\n'), /empty; a hierarchy without a password needs no file/],
      [write('hex.auth', 'hex:0g'), /not hexadecimal after "hex:"/],
      [write('long.auth', 'x'.repeat(65)), /65 bytes; a TPM takes 64 at most/],
      [join(folder, 'nowhere'), /password of the owner hierarchy: \S+nowhere is not there/],
      [folder, /password of the owner hierarchy: EISDIR/],
    ]
    for (const [owner, want] of cases) await expect(readPasswords(nodeFileSystem.read, { owner })).rejects.toThrow(want)
  })

  test('doctor says which are set and which are not configured', async () => {
    const found = await doctor()
    expect(found.ready).toBe(false)
    expect(finding(found, 'passwords')).toMatch(
      /^fail: the owner hierarchy has one, and none is configured.*\nfail: the endorsement hierarchy[^]*\nok: owner set, endorsement set, lockout set$/,
    )
    expect(finding(found, 'keys')).toMatch(/^fail: the endorsement hierarchy of the TPM has a password/)
  })

  test('a lockout, provoked, told, and ended', async () => {
    await tool('tpm2_dictionarylockout', '-s', '-n', '2', '-t', '600', '-l', '300', '-p', 'lockout canary 33')
    await tool('tpm2_createprimary', '-C', 'o', '-P', secrets.owner, '-c', 'primary.ctx')
    await tool('tpm2_flushcontext', '-t')
    writeFileSync(join(folder, 'text'), 'sealed')
    await tool('tpm2_create', '-C', 'primary.ctx', '-i', 'text', '-p', 'right', '-u', 'seal.pub', '-r', 'seal.priv')
    await tool('tpm2_flushcontext', '-t')
    await tool('tpm2_load', '-C', 'primary.ctx', '-u', 'seal.pub', '-r', 'seal.priv', '-c', 'seal.ctx')
    await tool('tpm2_flushcontext', '-t')
    for (let attempt = 0; attempt < 3; attempt++) {
      await expect(tool('tpm2_unseal', '-c', 'seal.ctx', '-p', 'wrong')).rejects.toThrow()
      await tool('tpm2_flushcontext', '-t')
      await tool('tpm2_flushcontext', '-l')
    }
    const found = await doctor()
    expect(finding(found, 'lockout')).toMatch(
      /^warn: the TPM is in lockout: 2 wrong passwords, 2 are allowed; one more attempt is possible after 10 min, all are forgotten after 20 min .* fleetkey-agent tpm reset-lockout --lockout-auth-file FILE > /,
    )
    // Our own keys are exempt: a lockout that somebody else provokes does not stop the agent.
    const blobs = await withTpm(async (tpm) => await provision(tpm), { files: files() })
    await withTpm(
      async (tpm) => {
        const keys = await openDeviceKeys(tpm, blobs)
        expect(await keys.sign(random(10))).toHaveLength(64)
        await keys.close()
      },
      { files: files() },
    )
    // The refusal itself, as the agent would tell it.
    const told = await withTpm(async (tpm) => await inPlainWords(tpm, {}, async () => await Promise.reject(new TpmError(rc.lockout, 'unseal')))).catch(String)
    expect(told).toMatch(/the TPM is in lockout: 2 wrong passwords/)

    const reset = async (...more: readonly string[]) => await agent('tpm', 'reset-lockout', '--tpm', running.spec, ...more)
    expect(await reset()).toMatchObject({ code: 1, stderr: expect.stringContaining('the lockout hierarchy has a password: --lockout-auth-file FILE') })
    const right = await reset('--lockout-auth-file', write('lockout.auth', secrets.lockout))
    expect(right).toEqual({ code: 0, stdout: '', stderr: 'fleetkey-agent: the lockout is over; 2 failures forgotten\n' })
    expect(finding(await doctor(), 'lockout')).toMatch(/^ok: 0 of 2 failures/)
    expect(await reset('--lockout-auth-file', write('wrong.auth', 'canary-nothing'))).toEqual({
      code: 3,
      stdout: '',
      stderr: 'fleetkey-agent: wrong lockout password; the lockout hierarchy is shut after a wrong lockout password: it opens again after 5 min\n',
    })
    // Shut now, the right one is refused as well, and that is told too.
    expect(await reset('--lockout-auth-file', write('lockout.auth', secrets.lockout))).toMatchObject({
      code: 3,
      stderr: expect.stringMatching(/the lockout hierarchy is shut .* after 5 min/),
    })
  }, 120_000)
})

describe.skipIf(!here)('doctor', () => {
  let root: string
  beforeEach(() => {
    root = mkdtempSync(join(folder, 'root-'))
  })
  afterEach(async () => await running.stop())

  const put = (path: string, content: string | Uint8Array): void => {
    mkdirSync(join(root, path, '..'), { recursive: true })
    writeFileSync(join(root, path), content)
  }

  test('a TPM as its maker delivers it, with EK certificates of swtpm_setup', async () => {
    running = await startSwtpm({ setup: ['--create-ek-cert', '--ecc', '--pcr-banks', 'sha256,sha384'] })
    const found = await doctor({ root })
    expect(found.ready).toBe(true)
    expect(found.tpm).toMatchObject({
      manufacturer: 'IBM',
      vendor: 'SW TPM',
      kind: 'virtual',
      managed: false,
      missing: [],
      persistent: [0x8101_0001, 0x8101_0016],
    })
    expect(found.tpm?.limits).toMatchObject({ nvBuffer: 1024, digest: 64, transientObjects: 3, loadedSessions: 3 })
    expect(found.tpm?.banks.filter(({ pcrs }) => pcrs.length > 0).map(({ name }) => name)).toEqual(['sha256', 'sha384'])
    const [used, other] = found.ekCertificates
    expect(used).toMatchObject({
      index: '0x01c00016',
      kind: 'P-384 (H-3)',
      used: true,
      issuer: 'CN=swtpm-localca',
      model: 'swtpm',
      manufacturer: 'id:00001014',
    })
    expect(other).toMatchObject({ index: '0x01c00002', kind: 'RSA-2048 (L-1)', used: false, notAfter: '9999-12-31T23:59:59.000Z' })
    expect(found.ekCertificates).toHaveLength(2)
    expect(finding(found, 'EK certificate')).toMatch(/^ok: P-384 \(H-3\) at 0x01c00016: issuer CN=swtpm-localca; TPM id:00001014 swtpm/)
    expect(finding(found, 'keys')).toBe('ok: the endorsement key and the storage root key can be made')
    expect(finding(found, 'TPM')).toMatch(/^warn: IBM SW TPM, firmware [\d.]+, TPM 2\.0 revision 1\.64; a program of this machine/)
  })

  test('a certificate that is of another TPM', async () => {
    running = await startSwtpm({ setup: ['--create-ek-cert'] })
    const certificate = await withTpm(async (tpm) => (await inspectTpm(tpm)).ekCertificates[0]?.der ?? new Uint8Array())
    await running.stop()
    running = await startSwtpm()
    await withTpm(async (tpm) => await tpm.nvStore(0x01c0_0002, certificate))
    const found = await doctor()
    expect([found.ready, finding(found, 'EK certificate')]).toEqual([false, expect.stringMatching(/^fail: .*; it is for another key than the TPM's/)])
  })

  test('a bank that is switched off', async () => {
    running = await startSwtpm()
    await tool('tpm2_pcrallocate', 'sha1:all+sha256:none')
    await running.restart()
    const found = await doctor()
    expect([found.ready, finding(found, 'missing')]).toEqual([
      false,
      expect.stringMatching(/^fail: SHA-256 PCR bank \(present, but switched off\), needed for attestation > tpm2_pcrallocate sha256:all/),
    ])
  })

  /** A boot of two stages: measured into the TPM, or only into the log. */
  const boot = async (measure: (pcr: number) => boolean): Promise<string> => {
    const events: Event[] = [0, 0, 4, 4, 9].map((pcr) => ({ pcr, type: eventType.postCode, digests: new Map([[alg.sha256, random(32)]]), data: random(8) }))
    await withTpm(async (tpm) => {
      await tpm.startup()
      for (const { pcr, digests } of events)
        if (measure(pcr))
          await tpm.pcrExtend(
            pcr,
            [...digests].map(([hash, digest]) => ({ hash, digest })),
          )
    })
    return write('log', marshalEventLog(events))
  }

  test('event log and PCRs: equal; the first that differs; one that the system extends; none; nonsense', async () => {
    running = await startSwtpm()
    const log = await boot(() => true)
    const with_ = async (path: string): Promise<string> => finding(await doctor({ eventLog: path }), 'event log')
    expect(await with_(log)).toBe('ok: 5 events, PCRs 0, 4, 9; it leads to the values in the TPM')
    await withTpm(async (tpm) => await tpm.pcrExtend(9, [{ hash: alg.sha256, digest: random(32) }]))
    expect(await with_(log)).toMatch(/^warn: .*PCR 9 is the first that differs.* > the system extends this PCR/)
    await withTpm(async (tpm) => await tpm.pcrExtend(4, [{ hash: alg.sha256, digest: random(32) }]))
    expect(await with_(log)).toMatch(/^fail: .*PCR 4 is the first that differs: the log leads to [0-9a-f]{64}, the TPM has [0-9a-f]{64} > the TPM was reset/)
    expect(await with_(join(folder, 'nowhere'))).toMatch(/^warn: none at \S+nowhere > measured boot is off/)
    expect(await with_(write('nonsense', 'this is no event log'))).toMatch(/^fail: \S+nonsense: \S.* > the server will refuse this log/)
    expect(await with_(folder)).toMatch(/^warn: \S+: EISDIR/)
  })

  test('a Raspberry Pi with a module on SPI: what it protects and what not', async () => {
    running = await startSwtpm()
    put('proc/device-tree/model', 'Raspberry Pi 4 Model B Rev 1.4\0')
    put('proc/device-tree/chosen/bootloader/signed', Uint8Array.of(0, 0, 0, 1))
    mkdirSync(join(root, 'sys/bus/spi/drivers/tpm_tis_spi'), { recursive: true })
    mkdirSync(join(root, 'sys/class/tpm/tpm0/device'), { recursive: true })
    symlinkSync(join(root, 'sys/bus/spi/drivers/tpm_tis_spi'), join(root, 'sys/class/tpm/tpm0/device/driver'))
    const found = await doctor({ root })
    expect(found.board).toEqual({ model: 'Raspberry Pi 4 Model B Rev 1.4', raspberryPi: true, signedBoot: false, driver: 'tpm_tis_spi', bus: 'SPI' })
    const told = Object.fromEntries(found.protections.map(({ threat, protected: how }) => [threat, how]))
    expect(told).toEqual({
      'stolen or copied storage (SD card, disk)': 'yes',
      'listening on the bus between processor and TPM': 'yes',
      'interposer: a device in the bus that changes what crosses it': 'partly',
      'resetting the TPM alone (its RST# pin, a GPIO) while the processor runs on': 'no',
      'relay: a genuine TPM that answers for another machine': 'partly',
      'changed firmware or kernel': 'partly',
      'root on the running system': 'partly',
    })
    put('proc/device-tree/chosen/bootloader/signed', Uint8Array.of(0x80, 0, 0, 9))
    const locked = await doctor({ root })
    expect(locked.protections.find(({ threat }) => threat === 'changed firmware or kernel')).toMatchObject({ protected: 'yes' })
  })

  test('the command: 0 and JSON where the agent can run, 5 where not, text at a terminal', async () => {
    running = await startSwtpm()
    const fine = await agent('doctor', '--tpm', running.spec)
    expect([fine.code, (JSON.parse(fine.stdout) as Examination).ready]).toEqual([0, true])
    const gone = await agent('doctor', '--tpm', `unix:${join(folder, 'nobody')}`, '--json')
    expect([gone.code, finding(JSON.parse(gone.stdout) as Examination, 'TPM')]).toEqual([5, expect.stringMatching(/^fail: TPM unix:\S+nobody: connect ENOENT/)])
    expect(examinationText(JSON.parse(fine.stdout) as Examination, 100)).toMatch(/^WARN {2}TPM [^]*\nthe agent can run here$/)
    expect(
      examinationText(JSON.parse(fine.stdout) as Examination, 100)
        .split('\n')
        .filter((line) => line.length > 100),
    ).toEqual([])
  })
})

describe.skipIf(!here)('an agent on a TPM whose owner has set passwords', () => {
  test('says what it lacks, and enrols once it is told', async () => {
    const world = await openWorld()
    try {
      const machine = await world.onSwtpm('LOCKED-1')
      await world.enlist([machine], 'plant')
      const env = { ...process.env, TPM2TOOLS_TCTI: machine.tcti, TSS2_LOG: 'all+none' }
      for (const [name, password] of [
        ['owner', 'first-canary'],
        ['endorsement', 'second-canary'],
      ] as const) {
        await socketFree(machine.spec.slice('unix:'.length))
        await promisify(execFile)('tpm2_changeauth', ['-c', name, password], { env })
      }
      const without = world.agent(machine)
      await until('it says why it does not start', () => without.status().problem !== null)
      expect(without.status()).toMatchObject({
        state: 'opening',
        problem: expect.stringMatching(/^the endorsement hierarchy of the TPM has a password: name the file/),
      })
      await without.stop()
      const agent_ = world.agent(machine, { tpmAuth: { owner: write('first.auth', 'first-canary\n'), endorsement: write('second.auth', 'second-canary\n') } })
      await until('it is enrolled and connected', () => agent_.status().connected)
      expect(agent_.status()).toMatchObject({ state: 'online', problem: null })
      expect(world.lines.join('\n')).not.toContain('canary')
      await agent_.stop()
    } finally {
      await world.stop()
    }
  })
})
