import { defaultRetention } from '@fleetkey/server/ca/retention.ts'
import type { Around } from '@fleetkey/server/flows/doctor/check.ts'

/** What the checks of the doctor see around a server that has nothing besides its store and its keys, and is well. */
export const healthy: Around = {
  tls: () => ({ names: ['localhost'], notAfter: Date.UTC(9999, 0, 1) }),
  names: ['localhost'],
  lists: () => null,
  statusUrl: null,
  retention: defaultRetention,
  est: () => null,
  webhook: () => null,
  disk: () => ({ reserve: true, free: 2 ** 40 }),
}
