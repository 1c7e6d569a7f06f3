import { assuranceLevels, type Assurance, type GroupPolicy } from './device.ts'

/** What holds for a new group, and for a device that is in none. */
export const defaultPolicy: GroupPolicy = {
  connectionProof: true,
  rotateOnLeave: true,
  rotateOnJoin: false,
  history: false,
  releases: 'any',
  minimumRelease: 0,
  onUnknown: 'quarantine',
  onWithdrawn: 'quarantine',
  onDebug: 'quarantine',
  ima: 'ignored',
  onUnlisted: 'quarantine',
  assurance: 'token',
  attestAge: 86_400,
  rotateOnQuarantine: false,
}

/** Whether hardware of this level may hold what demands `least`. */
export const isAssured = (level: Assurance, least: Assurance): boolean => assuranceLevels.indexOf(level) >= assuranceLevels.indexOf(least)

/** Of several groups the strictest wins; a device in no group has the default. Nothing a second group allows undoes what a first one forbids. */
export const strictestPolicy = (policies: readonly GroupPolicy[]): GroupPolicy => {
  const whole = policies.map(wholePolicy)
  return whole.reduce(stricter, whole[0] ?? defaultPolicy)
}

/** A policy as it is kept; a part that is newer than the row is as in the default. */
export const wholePolicy = (kept: Partial<GroupPolicy>): GroupPolicy => ({ ...defaultPolicy, ...kept })

/** From lax to strict. */
const imaLevels: readonly GroupPolicy['ima'][] = ['ignored', 'required', 'listed']

const stricter = (one: GroupPolicy, other: GroupPolicy): GroupPolicy => {
  const either = (field: 'connectionProof' | 'rotateOnLeave' | 'rotateOnJoin' | 'rotateOnQuarantine'): boolean => one[field] || other[field]
  const harder = (field: 'onUnknown' | 'onWithdrawn' | 'onDebug' | 'onUnlisted') => (one[field] === 'quarantine' ? one[field] : other[field])
  return {
    connectionProof: either('connectionProof'),
    rotateOnLeave: either('rotateOnLeave'),
    rotateOnJoin: either('rotateOnJoin'),
    history: one.history && other.history,
    releases: both(one.releases, other.releases),
    minimumRelease: Math.max(one.minimumRelease, other.minimumRelease),
    onUnknown: harder('onUnknown'),
    onWithdrawn: harder('onWithdrawn'),
    onDebug: harder('onDebug'),
    ima: imaLevels.indexOf(one.ima) >= imaLevels.indexOf(other.ima) ? one.ima : other.ima,
    onUnlisted: harder('onUnlisted'),
    assurance: isAssured(one.assurance, other.assurance) ? one.assurance : other.assurance,
    attestAge: Math.min(one.attestAge, other.attestAge),
    rotateOnQuarantine: either('rotateOnQuarantine'),
  }
}

/** Releases that both accept. */
const both = (one: GroupPolicy['releases'], other: GroupPolicy['releases']): GroupPolicy['releases'] => {
  if (one === 'any') return other
  return other === 'any' ? one : one.filter((id) => other.includes(id))
}
