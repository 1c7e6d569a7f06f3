import type { Release } from '../fleet/device.ts'
import type { Context } from './context.ts'
import type { Transaction } from './perform.ts'
import { oweAppraisal, settleAppraisal, type Impact } from './reappraise.ts'

const nameOf = (release: Pick<Release, 'id'>, became: 'imported' | 'withdrawn'): string => `release/${release.id}/${became}`

/** Adds to the commit that imports or withdraws a release: what follows from it is owed from then on, also after a crash. */
export const oweAcceptance = (tx: Transaction, release: Pick<Release, 'id' | 'model'>, became: 'imported' | 'withdrawn'): void =>
  oweAppraisal(tx, nameOf(release, became), { scope: { model: release.model }, because: `release ${release.id} ${became}` })

/**
 * Everything that follows when a release comes to be known or is withdrawn, the one place: the devices of its model are judged anew. Run after the commit;
 * harmless to repeat.
 */
export const acceptanceChanged = async (ctx: Context, release: Pick<Release, 'id' | 'model'>, became: 'imported' | 'withdrawn'): Promise<Impact> =>
  await settleAppraisal(ctx, nameOf(release, became))
