import { spawnSync } from 'node:child_process'
import { createHash, randomBytes, verify, X509Certificate } from 'node:crypto'
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, describe, expect, test } from 'vitest'
import { createBoard, install } from '@fleetkey/firmware-sim/board/board.ts'
import { Flash } from '@fleetkey/firmware-sim/board/flash.ts'
import { buildRelease, simulatedImages } from '@fleetkey/firmware-sim/release/release.ts'
import { createSoftwareTpm } from '@fleetkey/firmware-sim/tpm/software-tpm.ts'
import { alg } from '@fleetkey/tpm2/constants.ts'
import { eventType, marshalEventLog, parseEventLog, replay, type Event } from '@fleetkey/tpm2/event-log.ts'
import { checkSeparators, knownData, separatorProfiles } from '@fleetkey/tpm2/event-log-rules.ts'
import { imaLimits, marshalIma, parseIma } from '@fleetkey/tpm2/ima.ts'
import { measuredFiles, replayIma, type ImaReplay } from '@fleetkey/tpm2/ima-replay.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { hasProgram } from './programs.ts'
import { reasonOf } from './refusals.ts'

// Logs of real boots against the PCRs that the TPM gave in the same boot; vectors/event-logs/README.md tells how they were made.

interface List {
  readonly binary: string
  readonly ascii: string
  readonly pcr10: Readonly<Record<string, string>>
}
interface Boot {
  readonly log: string
  readonly pcrs: Readonly<Record<string, Readonly<Record<string, string>>>>
  readonly ima?: List
  readonly violated?: List
  readonly signed?: { readonly path: string; readonly content: string; readonly certificate: string }
}

const limits = { maxEvents: 4096, maxBytes: 1 << 20 }
const banks: Readonly<Record<string, number>> = { sha1: alg.sha1, sha256: alg.sha256, sha384: alg.sha384, sha512: alg.sha512 }
const bankOf = (name: string): number => banks[name] ?? 0
const hex = (bytes: Uint8Array | undefined): string => Buffer.from(bytes ?? []).toString('hex')
const bytes = (text: string, as: 'hex' | 'base64' | 'latin1'): Uint8Array => new Uint8Array(Buffer.from(text, as))
const boot = (name: string): Boot => JSON.parse(readFileSync(new URL(`vectors/event-logs/${name}.json`, import.meta.url), 'utf8')) as Boot
const eventsOf = (of: Boot): readonly Event[] => parseEventLog(bytes(of.log, 'base64'), limits)

describe.each([
  ['ovmf', 24],
  ['ovmf-ima-sig', 24],
  ['u-boot', 22],
  ['laptop', 28],
])('log of %s', (name, count) => {
  const of = boot(name)
  const events = eventsOf(of)

  test(`${count} events`, () => expect(events).toHaveLength(count))

  test.each(Object.keys(of.pcrs))('leads to the PCRs of bank %s', (bank) => {
    const values = replay(events, bankOf(bank))
    // What Linux itself measured into PCR 10 is in its own list.
    const firmware = Object.entries(of.pcrs[bank] ?? {}).filter(([pcr]) => Number(pcr) < 10)
    expect(firmware.length).toBeGreaterThanOrEqual(8)
    for (const [pcr, value] of firmware) expect(hex(values.get(Number(pcr)) ?? new Uint8Array(value.length / 2)), `PCR ${pcr}`).toBe(value)
    expect(Math.max(...values.keys())).toBeLessThan(10)
  })

  test('every event less is another machine', () => {
    const whole = replay(events)
    for (const [at, { pcr, type }] of events.entries()) {
      if (type === eventType.noAction) continue
      expect(hex(replay(events.toSpliced(at, 1)).get(pcr)), `event ${at}`).not.toBe(hex(whole.get(pcr)))
    }
  })

  test('marshals to a log of the same events', () => {
    const hashes = [...(events[0]?.digests.keys() ?? [])]
    expect(parseEventLog(marshalEventLog(events, hashes), limits)).toEqual(events)
  })
})

describe.skipIf(!hasProgram('tpm2_eventlog'))('tpm2_eventlog', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fleetkey-log-'))
  afterAll(() => rmSync(folder, { recursive: true, force: true }))

  /** PCRs per bank as it replays them: ` 0  : 0x…` under `sha256:` under `pcrs:`. */
  const judged = (name: string): Readonly<Record<string, Readonly<Record<string, string>>>> => {
    const path = join(folder, name)
    writeFileSync(path, bytes(boot(name).log, 'base64'))
    const { stdout } = spawnSync('tpm2_eventlog', [path], { encoding: 'utf8' })
    const text = stdout.slice(stdout.indexOf('\npcrs:'))
    const found = [...text.matchAll(/^ {2}(sha\d+):\n((?: {4}\d+ *: 0x[0-9a-f]+\n?)+)/gm)]
    return Object.fromEntries(
      found.map(([, bank = '', lines = '']) => [
        bank,
        Object.fromEntries([...lines.matchAll(/(\d+) *: 0x([0-9a-f]+)/g)].map(([, pcr = '', value = '']) => [pcr, value])),
      ]),
    )
  }
  const ours = (events: readonly Event[], bank: string): Readonly<Record<string, string>> =>
    Object.fromEntries([...replay(events, bankOf(bank))].map(([pcr, value]) => [String(pcr), hex(value)]))

  test.each(['ovmf', 'ovmf-ima-sig', 'u-boot', 'laptop'])('replays %s to the same PCRs', (name) => {
    const events = eventsOf(boot(name))
    const found = judged(name)
    expect(Object.keys(found).length).toBeGreaterThanOrEqual(2)
    // Version 5.4 knows no startup locality, and extends the EV_NO_ACTION that says it.
    const skipped = events.some(({ type }) => type === eventType.noAction) ? { 0: undefined } : {}
    for (const [bank, values] of Object.entries(found)) expect({ ...values, ...skipped }, bank).toEqual({ ...ours(events, bank), ...skipped })
  })
})

describe('separators', () => {
  test.each(['ovmf', 'ovmf-ima-sig', 'u-boot'])('%s has those of a PC client', (name) => {
    for (const hash of Object.values(banks)) expect(checkSeparators(eventsOf(boot(name)), separatorProfiles.pcClient, hash)).toBeUndefined()
  })

  test('laptop measures another four zero bytes into PCR 0: only a profile that says so takes it', () => {
    const events = eventsOf(boot('laptop'))
    expect(reasonOf(() => checkSeparators(events, separatorProfiles.pcClient))).toBe('log.separator.duplicate')
    const profile = { ...separatorProfiles.pcClient, closed: [2, 3, 6], repeatable: [0] }
    expect(checkSeparators(events, profile)).toBeUndefined()
  })
})

test('the log of a board leads to the PCRs of its TPM, and has the separators of its profile', async () => {
  const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))
  const board = createBoard({ serial: 'GW-1', tpm: createSoftwareTpm({ random, now: () => 0 }), flash: new Flash() })
  install(board, buildRelease({ model: 'gateway', name: '1.0.0', number: 1 }, simulatedImages('release 1', Buffer.from('agent'), 2048)))
  board.boot()
  const events = parseEventLog(board.eventLog(), limits)
  expect(checkSeparators(events, separatorProfiles.board)).toBeUndefined()
  expect(reasonOf(() => checkSeparators([...events, ...events.slice(0, 1)], separatorProfiles.board))).toBe('log.after-separator')
  const values = replay(events)
  expect(await new Tpm(board.transport(), { random }).pcrRead(alg.sha256, [...values.keys()])).toEqual(values)
})

describe('event data', () => {
  const text = (event: Event): string | undefined => {
    const data = knownData(event)
    return data === undefined ? undefined : Buffer.from(data).toString('latin1')
  }

  test('is known where it is what was measured', () => {
    const known = eventsOf(boot('ovmf')).map(text)
    expect(known).toContain('Exit Boot Services Returned with Success')
    expect(known.filter((data) => data === '\0\0\0\0')).toHaveLength(8)
  })

  test('is not known of firmware, images and boot options', () => {
    const types = eventsOf(boot('ovmf')).flatMap((event) => (text(event) === undefined ? [event.type] : []))
    expect(new Set(types)).toEqual(new Set([0x80000008, 0x80000003, 0x80000002, 0x6]))
  })

  test('case 44: edited under the same digest it is known no longer, and no PCR changes', () => {
    const events = eventsOf(boot('ovmf'))
    const edited = events.map((event) => (event.type === 0x80000007 ? { ...event, data: bytes('Nothing happened', 'latin1') } : event))
    expect(replay(edited)).toEqual(replay(events))
    expect(edited.map(text)).not.toContain('Nothing happened')
  })
})

describe.each(['ovmf', 'ovmf-ima-sig'])('measurement list of %s', (name) => {
  const of = boot(name)
  const events = eventsOf(of)
  const replaying = (list: List | undefined, bank: string): ImaReplay => ({
    quoted: bytes(list?.pcr10[bank] ?? '', 'hex'),
    hash: bankOf(bank),
    boot: new Map([[alg.sha256, replay(events)]]),
  })
  const binary = (list: List | undefined) => parseIma(bytes(list?.binary ?? '', 'base64'), imaLimits.wire)
  const { ima, violated } = of

  test('ASCII and binary are the same list', () => {
    for (const list of [ima, violated]) {
      expect(binary(list).length).toBeGreaterThan(4)
      expect(parseIma(bytes(list?.ascii ?? '', 'latin1'), imaLimits.wire)).toEqual(binary(list))
      expect(hex(marshalIma(binary(list)))).toBe(hex(bytes(list?.binary ?? '', 'base64')))
    }
  })

  test.each(['sha1', 'sha256'])('leads to PCR 10 of bank %s', (bank) => {
    expect(replayIma(binary(ima), replaying(ima, bank)).length).toBe(binary(ima).length)
  })

  test.each(['sha384', 'sha512'])('bank %s, which this kernel extends with a padded SHA-1, is not reached', (bank) => {
    expect(reasonOf(() => replayIma(binary(ima), replaying(ima, bank)))).toBe('ima.no-prefix')
  })

  test('what was measured after the quote is no part of it', () => {
    const measured = replayIma(binary(violated), replaying(ima, 'sha256'))
    expect([measured.length, binary(violated).length]).toEqual([binary(ima).length, binary(ima).length + 1])
  })

  test('the rest goes on from there', () => {
    const first = replayIma(binary(ima), replaying(ima, 'sha256'))
    const rest = binary(violated).slice(first.length)
    const next = { ...replaying(violated, 'sha256'), after: first.value, allowViolations: true }
    expect(replayIma(rest, next).length).toBe(1)
    expect(reasonOf(() => replayIma(rest, { ...next, allowViolations: false }))).toBe('ima.violation')
  })

  test('case 48: a violation is refused, unless policy takes it; then nobody knows its file', () => {
    const asked = replaying(violated, 'sha256')
    expect(reasonOf(() => replayIma(binary(violated), asked))).toBe('ima.violation')
    const measured = replayIma(binary(violated), { ...asked, allowViolations: true })
    expect(measuredFiles(binary(violated), measured)).toHaveLength(binary(violated).length - 2)
  })

  test('case 48: boot_aggregate of another boot', () => {
    const other = new Map([[alg.sha256, replay(eventsOf(boot('u-boot')))]])
    expect(reasonOf(() => replayIma(binary(ima), { ...replaying(ima, 'sha256'), boot: other }))).toBe('ima.boot-aggregate')
  })

  test('files are known by path and digest', () => {
    const files = measuredFiles(binary(ima), replayIma(binary(ima), replaying(ima, 'sha256')))
    expect(files.map(({ path }) => path)).toEqual(expect.arrayContaining(['/init', '/bin/busybox', '/etc/agent.conf']))
    const configuration = files.find(({ path }) => path === '/etc/agent.conf')
    expect(hex(configuration?.digest)).toBe(createHash('sha256').update('measured\n').digest('hex'))
  })
})

test('the signature of a measured file is the one in its attribute', () => {
  const of = boot('ovmf-ima-sig')
  const list = parseIma(bytes(of.ima?.binary ?? '', 'base64'), imaLimits.wire)
  const entry = list.find(({ path }) => path === of.signed?.path)
  expect(hex(entry?.digest)).toBe(
    createHash('sha256')
      .update(of.signed?.content ?? '')
      .digest('hex'),
  )
  // struct signature_v2_hdr: type 3, version 2, hash 4 (SHA-256), key id, length (big-endian), signature.
  const signature = entry?.signature ?? new Uint8Array(0)
  expect([...signature.subarray(0, 3)]).toEqual([3, 2, 4])
  const { publicKey } = new X509Certificate(of.signed?.certificate ?? '')
  expect(verify('sha256', Buffer.from(of.signed?.content ?? ''), publicKey, signature.subarray(9))).toBe(true)
  expect(list.filter((one) => one.signature !== null)).toHaveLength(1)
})
