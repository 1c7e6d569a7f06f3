import { join } from 'node:path'
import { openSqliteStore } from '@fleetkey/server/store/sqlite.ts'
import { theNextCaWasKnown } from './invariants/invariants.ts'
import type { World } from './world.ts'

/** I19 on what the server of a world has left; it is stopped for that. */
export const rolloverHolds = async (world: World): Promise<void> => {
  await world.server.stop()
  const store = await openSqliteStore(join(world.folder, 'server', 'store'), { now: () => Date.now(), log: () => undefined, step: () => undefined })
  try {
    await theNextCaWasKnown({ store })
  } finally {
    await store.close()
  }
}
