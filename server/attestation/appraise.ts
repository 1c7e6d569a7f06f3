import type { Claims } from './claims.ts'

/** What a maker says a boot of one release measures: PCR index → hex SHA-256 value. */
export interface ReferenceValues {
  readonly id: string
  readonly model: string
  readonly number: number
  readonly pcrs: Readonly<Record<string, string>>
}

/**
 * The verdict of appraisal (RFC 9334 §8.2; words after draft-ietf-rats-ar4si). `reason` is stable and private.
 * `warning`: acceptable firmware, but not the newest that is known.
 */
export type AttestationResult =
  | { readonly verdict: 'affirming'; readonly reason: 'release.current'; readonly release: string; readonly number: number }
  | { readonly verdict: 'warning'; readonly reason: 'release.older'; readonly release: string; readonly number: number }
  | { readonly verdict: 'contraindicated'; readonly reason: string; readonly detail: string }

export interface AppraisalPolicy {
  /** Number of the release this device ran when it was last accepted; older firmware is refused from then on. */
  readonly floor: number
}

/**
 * Compares proven claims with the reference values of the device's model. A release matches only if every quoted PCR
 * has a reference value and equals it: an unknown combination is never acceptable in part.
 */
export const appraise = (claims: Claims, model: string, releases: readonly ReferenceValues[], policy: AppraisalPolicy): AttestationResult => {
  const known = releases.filter((release) => release.model === model)
  if (known.length === 0) return { verdict: 'contraindicated', reason: 'reference.none', detail: `no reference values for model ${model}` }
  const match = known.find((release) => Object.entries(claims.pcrs).every(([pcr, value]) => release.pcrs[pcr] === value))
  if (match === undefined) return { verdict: 'contraindicated', ...nearest(claims, known) }
  if (match.number < policy.floor)
    return { verdict: 'contraindicated', reason: 'release.rollback', detail: `release ${match.id} is number ${match.number}, the device ran ${policy.floor}` }
  const newest = Math.max(...known.map(({ number }) => number))
  return match.number < newest
    ? { verdict: 'warning', reason: 'release.older', release: match.id, number: match.number }
    : { verdict: 'affirming', reason: 'release.current', release: match.id, number: match.number }
}

/** Names the lowest PCR that differs from the release that agrees most, so that an operator knows which boot stage to look at. */
const nearest = (claims: Claims, known: readonly ReferenceValues[]): { reason: string; detail: string } => {
  const differing = known.map((release) => ({ release, pcrs: Object.keys(claims.pcrs).filter((pcr) => release.pcrs[pcr] !== claims.pcrs[pcr]) }))
  const best = differing.toSorted((a, b) => a.pcrs.length - b.pcrs.length || b.release.number - a.release.number)[0]
  const lowest = Math.min(...(best?.pcrs ?? []).map(Number))
  return { reason: `reference.pcr-${lowest}`, detail: `PCRs ${best?.pcrs.join(', ')} differ from release ${best?.release.id}` }
}
