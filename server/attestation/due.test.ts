import { expect, test } from 'vitest'
import { isAttestationDue, type Attested, type Due } from './due.ts'

const at = 1_800_000_000_000
const hour = 3_600_000
const device: Attested = { state: 'enrolled', quotes: true, resetCount: 4, reportedResetCount: 4, verdict: { at }, attestOrderedAt: null }
const policy = { attestAge: 86_400 }
type Heard = { readonly resetCount: number; readonly first: boolean }
const heard = (resetCount: number, first = false): Heard => ({ resetCount, first })
const not: Due = { due: false }
const due = (because: Extract<Due, { due: true }>['because'], withholds: boolean): Due => ({ due: true, because, withholds })

const cases: readonly (readonly [string, Partial<Attested>, Heard | null, number, Due])[] = [
  ['fresh', {}, heard(4), at, not],
  ['not heard yet', {}, null, at, not],
  ['booted', {}, heard(5), at, due('boot', true)],
  ['a resetCount that went back', {}, heard(3), at, due('boot', true)],
  ['a boot that was reported before', { reportedResetCount: 5 }, null, at, due('boot', true)],
  ['19 of 24 hours old', {}, heard(4), at + 19 * hour, not],
  ['20 of 24 hours old', {}, heard(4), at + 20 * hour, due('ageing', false)],
  ['exactly 24 hours old', {}, null, at + 24 * hour, due('ageing', false)],
  ['older than 24 hours', {}, null, at + 24 * hour + 1, due('stale', true)],
  ['from the future: a clock was set back', {}, null, at - 60_001, due('stale', true)],
  ['a clock that was corrected', {}, null, at - 60_000, not],
  ['ordered', { attestOrderedAt: at }, null, at, due('order', false)],
  ['ordered while quarantined', { state: 'quarantined', attestOrderedAt: at }, null, at, due('order', true)],
  ['just quarantined', { state: 'quarantined' }, null, at + 59_999, not],
  ['quarantined for a minute', { state: 'quarantined' }, null, at + 60_000, due('quarantined', true)],
  ['quarantined, connects again', { state: 'quarantined' }, heard(4, true), at, due('quarantined', true)],
  ['enrolled, connects again', {}, heard(4, true), at, not],
  ['quarantined and booted', { state: 'quarantined' }, heard(5), at, due('boot', true)],
  ['no TPM: a factory certificate', { quotes: false }, heard(5), at + 48 * hour, not],
  ['no TPM: a token', { quotes: false, attestOrderedAt: at }, null, at, not],
]

test.each(cases)('%s', (_name, of, report, now, want) => expect(isAttestationDue({ ...device, ...of }, policy, report, now)).toEqual(want))

const outdated: typeof cases = [
  ['fresh', {}, heard(4), at, due('firmware', true)],
  ['booted', {}, heard(5), at, due('boot', true)],
  ['ordered', { attestOrderedAt: at }, null, at, due('firmware', true)],
  ['quarantined', { state: 'quarantined' }, heard(4, true), at, due('firmware', true)],
  ['no TPM', { quotes: false }, heard(4), at, not],
]
test.each(outdated)('a recipient key of an older generation: %s', (_name, of, report, now, want) =>
  expect(isAttestationDue({ ...device, ...of }, { ...policy, outdated: true }, report, now)).toEqual(want),
)

const unmeasured: typeof cases = [
  ['fresh', {}, heard(4), at, due('ima', true)],
  ['not heard yet', {}, null, at, due('ima', true)],
  ['booted', {}, heard(5), at, due('boot', true)],
  ['ordered', { attestOrderedAt: at }, null, at, due('ima', true)],
  ['no TPM', { quotes: false }, heard(4), at, not],
]
test.each(unmeasured)('policy wants a measurement list that the verdict does not rest on: %s', (_name, of, report, now, want) =>
  expect(isAttestationDue({ ...device, ...of }, { ...policy, unmeasured: true }, report, now)).toEqual(want),
)
