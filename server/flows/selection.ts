import type { PcrSelection } from '@fleetkey/protocol/messages.ts'

/** SHA-256 of the PCRs that firmware and boot chain are measured into: what every quote covers. */
export const selection: PcrSelection = [{ hash: 'sha256', pcrs: [0, 1, 2, 3, 4, 5, 7, 11] }]
