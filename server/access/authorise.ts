import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Caller, Role } from './caller.ts'

/** Every act there is, and who may do it: operators by role, else the kind of caller. The one table of permissions. */
export const actions = {
  'batch.import': ['owner', 'factory'],
  'batch.window': ['owner'],
  'batch.revoke': ['owner', 'operator'],
  'batch.suspend': ['owner', 'operator'],
  'batch.reinstate': ['owner', 'operator'],
  'batch.settle': ['system'],
  'station.add': ['owner'],
  'station.remove': ['owner'],
  'station.revoke': ['owner'],
  'release.import': ['owner', 'factory'],
  'release.withdraw': ['owner'],
  'firmware.approve': ['system'],
  'endorsement.import': ['owner'],
  'endorsement.remove': ['owner'],
  'endorsement.policy': ['owner'],
  'group.create': ['owner', 'operator'],
  'group.change': ['owner', 'operator'],
  'group.policy': ['owner'],
  'key.create': ['owner', 'operator'],
  'key.grant': ['owner', 'operator'],
  'key.rotate': ['owner', 'operator', 'system'],
  'key.destroy': ['system'],
  'campaign.pause': ['owner', 'operator'],
  'campaign.resume': ['owner', 'operator'],
  'campaign.abort': ['owner', 'operator'],
  'campaign.step': ['system'],
  'device.revoke': ['owner', 'operator', 'system'],
  'device.suspend': ['owner', 'operator', 'system'],
  'device.reinstate': ['owner', 'operator', 'system'],
  'device.attest': ['owner', 'operator'],
  'device.recover': ['owner', 'operator'],
  'device.hold': ['unidentified', 'device'],
  'device.quarantine': ['system'],
  'appraisal.settle': ['system'],
  'rotation.settle': ['system'],
  'enrol.sweep': ['system'],
  'ca.prepare': ['owner'],
  'ca.distribute': ['owner'],
  'ca.activate': ['owner'],
  'ca.taint': ['owner'],
  'ca.retire': ['owner'],
  'ca.settle': ['system'],
  'approval.ask': ['owner'],
  'approval.grant': ['owner'],
  'operator.add': ['owner'],
  'token.create': ['owner'],
  'token.remove': ['owner'],
  'enrolment-token.create': ['owner', 'operator'],
  'enrolment-token.revoke': ['owner', 'operator'],
  'fleet.read': ['owner', 'operator', 'factory', 'auditor'],
  'audit.read': ['owner', 'auditor'],
  'audit.summary': ['system'],
  'crl.publish': ['system'],
  'ocsp.responder': ['system'],
  'server.setup': ['system'],
  'enrol.hello': ['unidentified', 'device'],
  'enrol.answer': ['unidentified', 'device'],
  'enrol.issue': ['unidentified', 'device'],
  'est.enrol': ['unidentified'],
  'est.reenrol': ['device'],
  'device.connect': ['unidentified', 'device'],
  'device.report': ['device'],
  'device.trust': ['device'],
  'device.evidence': ['device'],
  'device.renew': ['device'],
  'device.acknowledge': ['device'],
  'device.message': ['unidentified', 'device'],
  'key.deliver': ['system', 'device'],
} as const satisfies Readonly<Record<string, readonly (Role | 'system' | 'device' | 'unidentified')[]>>

export type Action = keyof typeof actions

/** Throws Problem('forbidden') unless the table allows it. */
export const authorise = (caller: Caller, action: Action): void => {
  const allowed: readonly string[] = actions[action]
  const held: readonly string[] = caller.kind === 'operator' ? caller.roles : [caller.kind]
  if (!held.some((role) => allowed.includes(role)))
    throw new Problem('forbidden', `${caller.kind}:${caller.id} may not ${action}`, { reason: `access.${action}` })
}
