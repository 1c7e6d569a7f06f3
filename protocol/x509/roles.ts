/**
 * Extended key usages of Fleetkey's own certificates, under an arc of its own. A server key signs messages of one role only, and no device
 * profile can carry a role.
 */
export const fleetkeyArc = '1.3.6.1.4.1.58888.1'

export const roleEku = {
  challenge: `${fleetkeyArc}.1`,
  delivery: `${fleetkeyArc}.2`,
  group: `${fleetkeyArc}.3`,
  release: `${fleetkeyArc}.4`,
} as const
export type Role = keyof typeof roleEku

/** EKU of an LDevID certificate: the identity of a device, not a TLS client. */
export const deviceIdentityEku = `${fleetkeyArc}.16`

/** EKU of a factory station's certificate: it signs manifests and reference values. */
export const stationEku = `${fleetkeyArc}.17`
