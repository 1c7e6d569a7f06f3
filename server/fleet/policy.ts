import type { GroupPolicy } from './device.ts'

/** What holds for a new group, and for a device that is in none. */
export const defaultPolicy: GroupPolicy = { connectionProof: true, rotateOnLeave: true }

/** Of several groups the strictest wins; a device in no group has the default. */
export const strictestPolicy = (policies: readonly GroupPolicy[]): GroupPolicy =>
  policies.length === 0
    ? defaultPolicy
    : { connectionProof: policies.some((policy) => policy.connectionProof), rotateOnLeave: policies.some((policy) => policy.rotateOnLeave) }
