import type { ImaClaims, StateClaims } from './claims.ts'

/** What a maker says a boot of one release measures: PCR index → hex SHA-256 value. */
export interface ReferenceValues {
  readonly id: string
  readonly model: string
  /** Anti-rollback number: only grows. */
  readonly number: number
  readonly debug: boolean
  readonly withdrawn: { readonly at: number; readonly reason: string } | null
  readonly pcrs: Readonly<Record<string, string>>
  /** How many files it lists that may run under it; absent: it has no list. */
  readonly files?: number
}

/** What is done about a finding: no keys, or keys with a warning. */
type Severity = 'quarantine' | 'warn'

export interface AppraisalPolicy {
  /** Highest number of a release that this device was accepted with: older firmware is refused from then on. */
  readonly floor: number
  /** Ids of accepted releases; `any`: every known one of the model. */
  readonly releases: 'any' | readonly string[]
  readonly minimumRelease: number
  readonly onUnknown: Severity
  readonly onWithdrawn: Severity
  readonly onDebug: Severity
  /** Whether the kernel's measurement list has to be there, and every file of it on the release's list. */
  readonly ima: 'ignored' | 'required' | 'listed'
  /** A file that the release does not list, or that changed while it was measured. */
  readonly onUnlisted: Severity
}

/**
 * The verdict of appraisal (RFC 9334 §8.2; words after draft-ietf-rats-ar4si). `reason` is stable and private. `warning`: keys are released, and an
 * operator should know. `release` and `number`: whose reference values matched, whatever the verdict.
 */
export interface AttestationResult {
  readonly verdict: 'affirming' | 'warning' | 'contraindicated'
  readonly reason: string
  readonly detail: string
  readonly release: string | null
  readonly number: number | null
}

interface Finding {
  readonly severity: Severity
  readonly reason: string
  readonly detail: string
}

/**
 * Compares proven claims with the reference values of the device's model. A release matches only if every quoted PCR has a reference value and equals it:
 * an unknown combination is never acceptable in part. The gravest finding decides; of several equally grave ones the first.
 */
export const appraise = (claims: StateClaims, model: string, releases: readonly ReferenceValues[], policy: AppraisalPolicy): AttestationResult => {
  const known = releases.filter((release) => release.model === model)
  const match = matching(claims.pcrs, known)
  const files = fileFindings(claims.ima, match, policy)
  if (match === undefined) return resultOf([{ severity: policy.onUnknown, ...unknown(claims, model, known) }, ...files], undefined)
  return resultOf([...findings(match, policy), ...files, ...isOlder(match, known, policy)], match)
}

/** The release of this state, if there is one. */
export const matching = <R extends Pick<ReferenceValues, 'pcrs'>>(pcrs: Readonly<Record<string, string>>, releases: readonly R[]): R | undefined =>
  releases.find((release) => Object.entries(pcrs).every(([pcr, value]) => release.pcrs[pcr] === value))

/** What the measured files say. Whether a list has to be there at all is not judged here: a device without one is asked for it (`isUnmeasured`). */
const fileFindings = (ima: ImaClaims | null, match: ReferenceValues | undefined, policy: AppraisalPolicy): readonly Finding[] => {
  if (policy.ima === 'ignored' || ima === null) return []
  const severity = policy.onUnlisted
  const all: readonly (Finding & { readonly holds: boolean })[] = [
    { holds: ima.violations > 0, severity, reason: 'ima.violation', detail: `${ima.violations} of ${ima.entries} entries` },
    {
      holds: policy.ima === 'listed' && match?.files === undefined,
      severity,
      reason: 'ima.no-list',
      detail: match === undefined ? 'unknown firmware has no list of files' : `${match.id} has no list of files`,
    },
    {
      holds: policy.ima === 'listed' && ima.unlisted > 0 && ima.comparedWith === match?.id,
      severity,
      reason: 'ima.file',
      detail: `${ima.unlisted} of ${ima.entries} entries, first ${ima.firstUnlisted ?? ''}`,
    },
  ]
  return all.filter(({ holds }) => holds)
}

/** Whether policy wants a measurement list, and what was proven last rests on none of the release that was found (`release`: its id, null: unknown firmware). */
export const isUnmeasured = (ima: ImaClaims | null | undefined, release: string | null, policy: Pick<AppraisalPolicy, 'ima'>): boolean => {
  if (policy.ima === 'ignored') return false
  return ima === null || ima === undefined || (policy.ima === 'listed' && ima.comparedWith !== release)
}

/**
 * The verdict on a device whose firmware nothing measures (no TPM). A policy that names releases, a lowest one, or a list of measured files asks for what such a device cannot show; any
 * other takes it with a warning.
 */
export const appraiseUnmeasured = ({ releases, minimumRelease, ima }: Pick<AppraisalPolicy, 'releases' | 'minimumRelease' | 'ima'>): AttestationResult => {
  const demanded = releases !== 'any' || minimumRelease > 0 || ima !== 'ignored'
  const detail = demanded ? 'its policy demands measured firmware, and it has no TPM to show any' : 'no TPM: its identity is proven, its firmware is not'
  return { verdict: demanded ? 'contraindicated' : 'warning', reason: 'firmware.unmeasured', detail, release: null, number: null }
}

const resultOf = (found: readonly Finding[], match: ReferenceValues | undefined): AttestationResult => {
  const gravest = found.find(({ severity }) => severity === 'quarantine') ?? found[0]
  const of = { release: match?.id ?? null, number: match?.number ?? null }
  if (gravest === undefined) return { verdict: 'affirming', reason: 'release.current', detail: `release ${match?.id ?? ''}`, ...of }
  const { severity, reason, detail } = gravest
  return { verdict: severity === 'quarantine' ? 'contraindicated' : 'warning', reason, detail, ...of }
}

const findings = (match: ReferenceValues, policy: AppraisalPolicy): readonly Finding[] => {
  const { id, number } = match
  const all: readonly (Finding & { readonly holds: boolean })[] = [
    { holds: match.withdrawn !== null, severity: policy.onWithdrawn, reason: 'release.withdrawn', detail: `${id}: ${match.withdrawn?.reason ?? ''}` },
    { holds: match.debug, severity: policy.onDebug, reason: 'release.debug', detail: `${id} is a debug release` },
    {
      holds: policy.releases !== 'any' && !policy.releases.includes(id),
      severity: 'quarantine',
      reason: 'release.not-accepted',
      detail: `${id} is not among the accepted releases`,
    },
    {
      holds: number < policy.minimumRelease,
      severity: 'quarantine',
      reason: 'release.below-minimum',
      detail: `${id} is number ${number}, at least ${policy.minimumRelease} is accepted`,
    },
    { holds: number < policy.floor, severity: 'quarantine', reason: 'release.rollback', detail: `${id} is number ${number}, the device ran ${policy.floor}` },
  ]
  return all.filter(({ holds }) => holds)
}

/** The mildest finding, told when there is no other. */
const isOlder = ({ id, number }: ReferenceValues, known: readonly ReferenceValues[], policy: AppraisalPolicy): readonly Finding[] => {
  const newest = Math.max(number, ...known.filter((release) => isGood(release, policy)).map((release) => release.number))
  return number < newest ? [{ severity: 'warn', reason: 'release.older', detail: `${id} is number ${number}, the newest is ${newest}` }] : []
}

/** A release that a device should update to. */
const isGood = (release: ReferenceValues, policy: AppraisalPolicy): boolean =>
  release.withdrawn === null && !release.debug && (policy.releases === 'any' || policy.releases.includes(release.id))

/** Names the lowest PCR that differs from the release that agrees most, so that an operator knows which boot stage to look at. */
const unknown = (claims: StateClaims, model: string, known: readonly ReferenceValues[]): { reason: string; detail: string } => {
  const differing = known.map((release) => ({ release, pcrs: Object.keys(claims.pcrs).filter((pcr) => release.pcrs[pcr] !== claims.pcrs[pcr]) }))
  const best = differing.toSorted((a, b) => a.pcrs.length - b.pcrs.length || b.release.number - a.release.number)[0]
  if (best === undefined) return { reason: 'reference.none', detail: `no reference values for model ${model}` }
  const lowest = Math.min(...best.pcrs.map(Number))
  return { reason: `reference.pcr-${lowest}`, detail: `PCRs ${best.pcrs.join(', ')} differ from release ${best.release.id}` }
}
