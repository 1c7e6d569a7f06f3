import { mkdtempSync, readFileSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { TpmReport } from '@fleetkey/tpm2/inspect.ts'
import { expect, test } from 'vitest'
import { readBoard, tpmKind, type BoardFacts, type TpmKind } from './board.ts'
import type { Examination } from './examine.ts'
import { eventLogFinding, imaFinding, pcrFinding } from './measured-boot.ts'
import { protections } from './protection.ts'
import { examinationText } from './text.ts'
import { tpmFindings } from './tpm.ts'

const nowhere: BoardFacts = { model: null, raspberryPi: false, signedBoot: null, driver: null, bus: null }
const report: TpmReport = {
  manufacturer: 'IFX',
  vendor: 'SLB9672',
  firmware: '16.13.0.17733',
  revision: '1.59',
  limits: { nvBuffer: 768, digest: 48, inputBuffer: 1024, command: 1420, response: 1420, transientObjects: 3, loadedSessions: 3, persistentObjects: 7 },
  leftOver: null,
  banks: [{ hash: 0x0b, name: 'sha256', pcrs: [0, 1, 2] }],
  curves: [3],
  missing: [],
  ekCertificates: [],
  lockout: { locked: false, failures: 0, allowed: 32, interval: 7200, recovery: 86_400 },
  clock: { safe: true, safeWithin: 0, resetCount: 4, restartCount: 0 },
  persistent: [],
  passwordSet: { owner: false, endorsement: false, lockout: true },
  enabled: { owner: true, endorsement: true },
  managed: true,
}
const grades = (change: Partial<TpmReport>, of: { kind?: TpmKind; spec?: string; known?: readonly string[] } = {}): readonly string[] =>
  tpmFindings(
    { ...report, ...change },
    { kind: of.kind ?? 'discrete', board: { ...nowhere, bus: 'SPI' }, spec: of.spec ?? 'device:/dev/tpmrm0', known: new Set(of.known) },
  )
    .filter(({ grade }) => grade !== 'ok')
    .map(({ grade, check, found, remedy }) => {
      expect(remedy, `${check} has a remedy`).not.toBe('')
      return `${grade} ${check}: ${found}`
    })

test('a chip behind the kernel: nothing to do', () => expect(grades({})).toEqual([]))

const cases: readonly (readonly [string, Partial<TpmReport>, Parameters<typeof grades>[1], RegExp])[] = [
  [
    'a raw device',
    { managed: false, leftOver: { objects: 0, sessions: 0 } },
    { spec: 'device:/dev/tpm0' },
    /^warn resource manager: none: \/dev\/tpm0 is for one program alone$/,
  ],
  ['left-over handles', { managed: false, leftOver: { objects: 2, sessions: 1 } }, { spec: 'unix:x' }, /^warn left in the TPM: 2 objects and 1 sessions/],
  ['a hierarchy that is off', { enabled: { owner: false, endorsement: true } }, {}, /^fail hierarchies: the owner hierarchy is switched off$/],
  [
    'a password that is not configured',
    { passwordSet: { owner: true, endorsement: false, lockout: true } },
    {},
    /^fail passwords: the owner hierarchy has one/,
  ],
  ['a lockout', { lockout: { ...report.lockout, locked: true, failures: 32 } }, {}, /^warn lockout: the TPM is in lockout: 32 wrong passwords/],
  ['a clock that is not safe', { clock: { ...report.clock, safe: false, safeWithin: 2 ** 22 } }, {}, /^warn clock: .*not safe: .* within 1 h 10 min$/],
  [
    'a needed command missing',
    { missing: [{ name: 'TPM2_Quote', for: 'attestation', needed: true }] },
    {},
    /^fail missing: TPM2_Quote, needed for attestation$/,
  ],
  ['an optional one missing', { missing: [{ name: 'TPM2_Import', for: 'keys with protection "tpm"', needed: false }] }, {}, /^warn missing: TPM2_Import/],
  ['a simulator', {}, { kind: 'simulator' }, /^warn TPM: .*a simulator/],
]
test.each(cases)('%s', (_name, change, of, want) => expect(grades(change, of)).toEqual([expect.stringMatching(want)]))

test('a configured password is not missed', () => {
  expect(grades({ passwordSet: { owner: true, endorsement: true, lockout: true } }, { known: ['owner', 'endorsement'] })).toEqual([])
})

test('kinds of TPM, the driver before the maker', () => {
  const of = (manufacturer: string, driver: string | null = null): TpmKind => tpmKind(manufacturer, { driver })
  expect([of('IFX'), of('INTC'), of('IBM'), of('FKSM'), of('XYZ'), of('constructor')]).toEqual([
    'discrete',
    'firmware',
    'virtual',
    'simulator',
    'unknown',
    'unknown',
  ])
  expect([of('XYZ', 'tpm_tis_spi'), of('XYZ', 'tpm_tis_i2c'), of('XYZ', 'tpm_ftpm_tee'), of('IFX', 'tpm_tis')]).toEqual([
    'discrete',
    'discrete',
    'firmware',
    'discrete',
  ])
})

test('a machine that tells nothing', () => {
  const root = mkdtempSync(join(tmpdir(), 'fk-board-'))
  expect(readBoard(root)).toEqual(nowhere)
  rmSync(root, { recursive: true })
})

test('no kind of TPM is praised for what it does not do', () => {
  const of = (kind: TpmKind): Readonly<Record<string, string>> =>
    Object.fromEntries(protections(kind, nowhere).map(({ threat, protected: how }) => [threat, how]))
  expect(of('discrete')).toMatchObject({ 'resetting the TPM alone (its RST# pin, a GPIO) while the processor runs on': 'no' })
  expect(of('unknown')).toMatchObject({ 'resetting the TPM alone (its RST# pin, a GPIO) while the processor runs on': 'no' })
  expect(of('firmware')).toMatchObject({ 'resetting the TPM alone': 'yes', 'relay: a genuine TPM that answers for another machine': 'partly' })
  expect(of('simulator')).toEqual({ everybody: 'no' })
  for (const kind of ['discrete', 'firmware', 'virtual', 'unknown'] as const) expect(of(kind)).toMatchObject({ 'root on the running system': 'partly' })
})

test('PCRs and lists that say nothing', () => {
  const zeros = new Map(Array.from({ length: 24 }, (_, pcr) => [pcr, new Uint8Array(32)] as const))
  expect(pcrFinding(zeros)).toMatchObject({ grade: 'warn', found: '0 to 7 are all zero: the firmware measures nothing' })
  expect(pcrFinding(new Map([...zeros, [4, Uint8Array.of(1)]]))).toMatchObject({ grade: 'ok', found: expect.stringContaining('0, 1, 2, 3, 5, 6, 7 of 0 to 7') })
  expect(imaFinding('/list', null, zeros)).toMatchObject({ grade: 'ok', found: expect.stringContaining('none at /list') })
  expect(imaFinding('/list', new Error('EACCES'), zeros)).toMatchObject({ grade: 'warn', found: '/list: EACCES' })
  expect(imaFinding('/list', new Uint8Array(0), zeros)).toMatchObject({ grade: 'warn', found: '/list is empty' })
  expect(eventLogFinding('/log', new Error('EACCES'), zeros)).toMatchObject({ grade: 'warn', found: '/log: EACCES' })
})

test('what a certificate says does not steer the terminal', () => {
  const of: Examination = {
    ready: false,
    tpm: null,
    ekCertificates: [],
    board: { ...nowhere, model: 'Board\u001B[2J' },
    findings: [{ check: 'EK certificate', grade: 'fail', found: 'issuer CN=\u001B]0;x\u0007', remedy: 'none\u202E' }],
    protections: [{ threat: 'a', protected: 'no', text: 'b' }],
  }
  expect(examinationText(of, 80)).toMatch(/NOT READY: see FAIL above$/)
  for (const control of ['\u001B', '\u0007', '\u202E']) expect(examinationText(of, 80)).not.toContain(control)
})

interface Boot {
  readonly log: string
  readonly pcrs: { readonly sha256: Readonly<Record<string, string>> }
  readonly ima?: { readonly binary: string; readonly pcr10: { readonly sha256: string } }
}
const bootOf = (name: string): Boot => JSON.parse(readFileSync(new URL(`../../test/vectors/event-logs/${name}.json`, import.meta.url), 'utf8')) as Boot

test.each(['ovmf', 'ovmf-ima-sig', 'u-boot'])('the log of a real boot (%s) against the PCRs of that boot, and against others', (name) => {
  const { log, pcrs, ima } = bootOf(name)
  const values = new Map(Object.entries(pcrs.sha256).map(([pcr, value]) => [Number(pcr), new Uint8Array(Buffer.from(value, 'hex'))] as const))
  const bytes = new Uint8Array(Buffer.from(log, 'base64'))
  expect(eventLogFinding('/log', bytes, values)).toMatchObject({
    grade: 'ok',
    found: expect.stringMatching(/^\d+ events, PCRs 0, .*it leads to the values in the TPM$/),
  })
  const reset = new Map([...values, [4, new Uint8Array(32)], [7, new Uint8Array(32)]])
  expect(eventLogFinding('/log', bytes, reset)).toMatchObject({
    grade: 'fail',
    found: expect.stringMatching(/PCR 4 is the first that differs: .* the TPM has 0{64}$/),
  })
  expect(eventLogFinding('/log', bytes.subarray(0, -1), values)).toMatchObject({ grade: 'fail' })
  if (ima === undefined) return
  const list = new Uint8Array(Buffer.from(ima.binary, 'base64'))
  const measured = new Map([...values, [10, new Uint8Array(Buffer.from(ima.pcr10.sha256, 'hex'))]])
  expect(imaFinding('/list', list, measured)).toMatchObject({ grade: 'ok', found: expect.stringMatching(/^\d+ entries in \d+ bytes.*; \d+ lead to PCR 10$/) })
  expect(imaFinding('/list', list, reset)).toMatchObject({ grade: 'warn', found: expect.stringContaining('boot_aggregate is not the digest of PCRs 0 to 9') })
})
