import { Problem } from '@fleetkey/protocol/problem.ts'
import type { KeyEpoch, KeyState } from './key.ts'

/** The transitions of NIST SP 800-57 Part 1 Rev. 5, §7.1 to §7.6, and no others. */
export const transitions: Readonly<Record<KeyState, readonly KeyState[]>> = {
  'pre-activation': ['active', 'compromised', 'destroyed'],
  active: ['suspended', 'deactivated', 'compromised'],
  suspended: ['active', 'deactivated', 'compromised'],
  deactivated: ['compromised', 'destroyed'],
  compromised: ['destroyed'],
  destroyed: [],
}

/**
 * The epoch in its next state, with the time of the change. Destroying drops the key material (crypto-shredding: what is left in a backup is under a
 * data key of its own). Throws Problem('conflict') for a transition that SP 800-57 does not have.
 */
export const moved = (epoch: KeyEpoch, to: KeyState, now: number): KeyEpoch => {
  if (!transitions[epoch.state].includes(to)) throw new Problem('conflict', `epoch ${epoch.id} cannot go from ${epoch.state} to ${to}`)
  return {
    ...epoch,
    state: to,
    material: to === 'destroyed' ? null : epoch.material,
    activatedAt: to === 'active' ? (epoch.activatedAt ?? now) : epoch.activatedAt,
    deactivatedAt: to === 'deactivated' ? now : epoch.deactivatedAt,
    destroyedAt: to === 'destroyed' ? now : epoch.destroyedAt,
    ...(to === 'compromised' ? { compromisedAt: now } : {}),
  }
}
