import { describe, expect, test } from 'vitest'
import { appraise, appraiseUnmeasured, isUnmeasured, type AppraisalPolicy, type ReferenceValues } from './appraise.ts'
import { makeStateClaims, recordedState, recordOf, type ImaClaims, type StateContent } from './claims.ts'
import { firmwareText } from './firmware.ts'
import { discontinuity } from './reattest.ts'
import type { TpmRecord } from './continuity.ts'

const pcrs = (kernel: string): Readonly<Record<string, string>> => ({ '0': 'aa', '4': kernel, '11': 'cc' })
const release = (number: number, more: Partial<ReferenceValues> = {}): ReferenceValues => ({
  id: `m/${number}`,
  model: 'm',
  number,
  debug: false,
  withdrawn: null,
  pcrs: { ...pcrs(`k${number}`), '6': 'ff' },
  ...more,
})
const withdrawn = { at: 1, reason: 'CVE-2027-1' }
const lenient: AppraisalPolicy = {
  floor: 0,
  releases: 'any',
  minimumRelease: 0,
  onUnknown: 'warn',
  onWithdrawn: 'warn',
  onDebug: 'warn',
  ima: 'ignored',
  onUnlisted: 'warn',
}
const strict: AppraisalPolicy = { ...lenient, onUnknown: 'quarantine', onWithdrawn: 'quarantine', onDebug: 'quarantine' }
const content: StateContent = {
  pcrs: pcrs('k2'),
  events: 13,
  resetCount: 4,
  restartCount: 1,
  clock: 5_000n,
  clockSafe: true,
  firmwareVersion: 0x2000_0000_0001n,
  ima: null,
}
const running = (kernel: string) => makeStateClaims({ ...content, pcrs: pcrs(kernel) })

/** What runs, what is known, policy; verdict and reason. */
const cases: readonly (readonly [string, string, readonly ReferenceValues[], Partial<AppraisalPolicy>, string, string])[] = [
  ['the newest release', 'k2', [release(1), release(2)], {}, 'affirming', 'release.current'],
  ['an older release', 'k1', [release(1), release(2)], {}, 'warning', 'release.older'],
  ['older than a debug release only', 'k1', [release(1), release(2, { debug: true })], {}, 'affirming', 'release.current'],
  ['older than a withdrawn release only', 'k1', [release(1), release(2, { withdrawn })], {}, 'affirming', 'release.current'],
  ['older than a release that is not accepted', 'k1', [release(1), release(2)], { releases: ['m/1'] }, 'affirming', 'release.current'],
  ['a kernel that nobody knows', 'kx', [release(1), release(2)], {}, 'contraindicated', 'reference.pcr-4'],
  ['a release of another model', 'k1', [release(1, { model: 'other' })], {}, 'contraindicated', 'reference.none'],
  ['nothing is known', 'k1', [], {}, 'contraindicated', 'reference.none'],
  ['a quoted PCR without reference value', 'k1', [release(1, { pcrs: { '0': 'aa', '4': 'k1' } })], {}, 'contraindicated', 'reference.pcr-11'],
  ['a withdrawn release', 'k1', [release(1, { withdrawn })], {}, 'contraindicated', 'release.withdrawn'],
  ['a debug release', 'k1', [release(1, { debug: true })], {}, 'contraindicated', 'release.debug'],
  ['a debug release that is listed', 'k1', [release(1, { debug: true })], { releases: ['m/1'] }, 'contraindicated', 'release.debug'],
  ['not among the accepted ones', 'k1', [release(1), release(2)], { releases: ['m/2'] }, 'contraindicated', 'release.not-accepted'],
  ['no release is accepted', 'k1', [release(1)], { releases: [] }, 'contraindicated', 'release.not-accepted'],
  ['below the minimum of the group', 'k1', [release(1)], { minimumRelease: 2 }, 'contraindicated', 'release.below-minimum'],
  ['at the minimum of the group', 'k2', [release(2)], { minimumRelease: 2 }, 'affirming', 'release.current'],
  ['below what the device ran', 'k1', [release(1), release(2)], { floor: 2 }, 'contraindicated', 'release.rollback'],
  ['what the device ran', 'k2', [release(1), release(2)], { floor: 2 }, 'affirming', 'release.current'],
  ['unknown, let pass', 'kx', [release(1)], { onUnknown: 'warn' }, 'warning', 'reference.pcr-4'],
  ['withdrawn, let pass', 'k1', [release(1, { withdrawn })], { onWithdrawn: 'warn' }, 'warning', 'release.withdrawn'],
  ['debug, let pass', 'k1', [release(1, { debug: true })], { onDebug: 'warn' }, 'warning', 'release.debug'],
  [
    'debug let pass does not let a withdrawn one pass',
    'k1',
    [release(1, { debug: true, withdrawn })],
    { onDebug: 'warn' },
    'contraindicated',
    'release.withdrawn',
  ],
  [
    'withdrawn let pass does not let a rollback pass',
    'k1',
    [release(1, { withdrawn })],
    { onWithdrawn: 'warn', floor: 2 },
    'contraindicated',
    'release.rollback',
  ],
]

describe('appraisal', () => {
  test.each(cases)('%s', (_name, kernel, releases, policy, verdict, reason) =>
    expect(appraise(running(kernel), 'm', releases, { ...strict, ...policy })).toMatchObject({ verdict, reason }),
  )

  test('says which release matched, whatever the verdict', () => {
    expect(appraise(running('k1'), 'm', [release(1, { withdrawn })], strict)).toEqual({
      verdict: 'contraindicated',
      reason: 'release.withdrawn',
      detail: 'm/1: CVE-2027-1',
      release: 'm/1',
      number: 1,
    })
    expect(appraise(running('kx'), 'm', [release(1)], strict)).toMatchObject({ release: null, number: null, detail: 'PCRs 4 differ from release m/1' })
  })
})

const measured: ImaClaims = { entries: 40, value: 'ab'.repeat(32), pending: 0, violations: 0, comparedWith: 'm/2', unlisted: 0, firstUnlisted: null }
const listed = release(2, { files: 12 })
const files: readonly (readonly [string, ReferenceValues, Partial<AppraisalPolicy>, Partial<ImaClaims>, string, string])[] = [
  ['ignored', listed, { ima: 'ignored' }, { unlisted: 3, violations: 1 }, 'affirming', 'release.current'],
  ['required, and there', release(2), { ima: 'required' }, { unlisted: 3 }, 'affirming', 'release.current'],
  ['required, with a violation', release(2), { ima: 'required' }, { violations: 1 }, 'contraindicated', 'ima.violation'],
  ['a violation, let pass', release(2), { ima: 'required', onUnlisted: 'warn' }, { violations: 1 }, 'warning', 'ima.violation'],
  ['all are listed', listed, { ima: 'listed' }, {}, 'affirming', 'release.current'],
  ['one is not listed', listed, { ima: 'listed' }, { unlisted: 1, firstUnlisted: 'ab called "/x"' }, 'contraindicated', 'ima.file'],
  ['one is not listed, let pass', listed, { ima: 'listed', onUnlisted: 'warn' }, { unlisted: 1 }, 'warning', 'ima.file'],
  ['a release without a list', release(2), { ima: 'listed' }, {}, 'contraindicated', 'ima.no-list'],
  [
    'compared with another release: asked for again, not judged',
    listed,
    { ima: 'listed' },
    { unlisted: 1, comparedWith: 'm/1' },
    'affirming',
    'release.current',
  ],
  ['a withdrawn release says more', release(2, { withdrawn }), { ima: 'listed' }, {}, 'contraindicated', 'release.withdrawn'],
]
describe('measured files', () => {
  test.each(files)('%s', (_name, known, policy, ima, verdict, reason) =>
    expect(
      appraise(makeStateClaims({ ...content, ima: { ...measured, ...ima } }), 'm', [known], { ...strict, onUnlisted: 'quarantine', ...policy }),
    ).toMatchObject({
      verdict,
      reason,
    }),
  )

  test('an unlisted file says more than that there is a newer release; unknown firmware that may pass lists nothing', () => {
    const state = makeStateClaims({ ...content, ima: { ...measured, unlisted: 1 } })
    const policy = { ...lenient, ima: 'listed' } as const
    expect(appraise(state, 'm', [listed, release(3)], policy)).toMatchObject({ verdict: 'warning', reason: 'ima.file' })
    expect(appraise(makeStateClaims({ ...state, pcrs: pcrs('kx') }), 'm', [listed], { ...policy, onUnlisted: 'quarantine' })).toMatchObject({
      verdict: 'contraindicated',
      reason: 'ima.no-list',
    })
  })

  const wanted: readonly (readonly [AppraisalPolicy['ima'], ImaClaims | null, string | null, boolean])[] = [
    ['ignored', null, 'm/2', false],
    ['required', null, 'm/2', true],
    ['required', { ...measured, comparedWith: null }, 'm/2', false],
    ['listed', measured, 'm/2', false],
    ['listed', measured, 'm/3', true],
    ['listed', { ...measured, comparedWith: null }, null, false],
  ]
  test.each(wanted)('a verdict that rests on no list where policy wants one: %s %o %s', (ima, claims, id, want) =>
    expect(isUnmeasured(claims, id, { ima })).toBe(want),
  )
})

describe('a record of claims', () => {
  test('gives back the state that was proven', () => {
    expect(recordedState(recordOf(content))).toEqual(content)
    for (const ima of [measured, { ...measured, pending: 3, violations: 2, unlisted: 1, firstUnlisted: 'ab called "/x"', comparedWith: null }])
      expect(recordedState(recordOf({ ...content, ima }))).toEqual({ ...content, ima })
  })
  test('proves nothing where nothing was measured', () => {
    expect(recordedState([])).toBeUndefined()
    expect(recordedState([{ name: 'reset-count', value: '4' }])).toBeUndefined()
  })
})

describe('a TPM that goes on', () => {
  const srk = new Uint8Array(8)
  const quoted = { restartCount: 1, clock: 100_000_000n, clockSafe: true, firmwareVersion: 7n }
  const record: TpmRecord = { srk, resetCount: 4, release: 'm/1', quoted }
  const unsafe = { quoted: { ...quoted, clockSafe: false } }
  const now = { ...quoted, resetCount: 4, release: 'm/1' as string | null }
  const going: readonly (readonly [string, Partial<TpmRecord>, number | null, Partial<typeof now>, string | undefined])[] = [
    ['unchanged', {}, 4, {}, undefined],
    ['resumed', {}, 4, { restartCount: 2 }, undefined],
    ['booted another release, then connected', {}, 5, { resetCount: 5, restartCount: 0, release: 'm/2' }, undefined],
    ['a lower resetCount', {}, 3, { resetCount: 3 }, 'tpm.reset-count.lower'],
    ['a lower restartCount without a reset', {}, 4, { restartCount: 0 }, 'tpm.restart-count.lower'],
    ['reset while connected', {}, 4, { resetCount: 5 }, 'tpm.reset-in-session'],
    ['another release without a reset', {}, 4, { release: 'm/2' }, 'tpm.reset-count.unchanged'],
    ['a clock that went back without a reset', {}, 4, { clock: 99_000_000n }, 'tpm.clock.back'],
    ['other TPM firmware', {}, 4, { firmwareVersion: 8n }, 'tpm.firmware.changed'],
    ['an unsafe clock after a power cut', {}, 5, { resetCount: 5, clockSafe: false }, undefined],
    ['an unsafe clock without one', {}, 4, { clockSafe: false }, 'quote.clock.unsafe'],
    ['the boot after a power cut once more, its clock not yet safe', unsafe, 4, { clockSafe: false, clock: 100_000_500n }, undefined],
    ['the same with a clock that went back', unsafe, 4, { clockSafe: false, clock: 99_000_000n }, 'quote.clock.unsafe'],
    ['the boot after a power cut, its clock safe by now', unsafe, 4, { clock: 104_000_000n }, undefined],
    ['nothing is known of before', { quoted: null, release: null }, null, { restartCount: 0, firmwareVersion: 1n, clock: 0n }, undefined],
  ]
  test.each(going)('%s', (_name, was, session, is, reason) =>
    expect(discontinuity({ record: { ...record, ...was }, session }, { ...now, ...is }, { updates: [] })?.reason).toBe(reason),
  )
  test('newer TPM firmware by a recorded update', () => {
    const updates = (to: bigint) => ({ updates: [{ from: firmwareText(7n), to: firmwareText(to) }] })
    const updated = { ...now, firmwareVersion: 8n }
    expect(discontinuity({ record, session: null }, updated, updates(8n))).toBeUndefined()
    expect(discontinuity({ record, session: null }, updated, updates(9n))?.reason).toBe('tpm.firmware.changed')
  })
})

describe('a device whose firmware nothing measures', () => {
  const policies: readonly (readonly [string, Partial<AppraisalPolicy>, 'warning' | 'contraindicated'])[] = [
    ['whatever firmware', {}, 'warning'],
    ['strict about what is measured, and content with any release', strict, 'warning'],
    ['these releases', { releases: ['m/1'] }, 'contraindicated'],
    ['no release at all', { releases: [] }, 'contraindicated'],
    ['from a number on', { minimumRelease: 1 }, 'contraindicated'],
    ['a list of measured files', { ima: 'required' }, 'contraindicated'],
  ]
  test.each(policies)('where policy takes %s', (_name, policy, verdict) =>
    expect(appraiseUnmeasured({ ...lenient, ...policy })).toMatchObject({ verdict, reason: 'firmware.unmeasured', release: null, number: null }),
  )
})
