import { wrappedChallenge } from './enrol.ts'
import { wrappedToken } from './enrolment-token.ts'
import { rewrap, type RewrapAll } from './kek.ts'
import { wrappedDataKey } from './vault.ts'

/** Everything in the store that is under a KEK. */
export const rewrapAll: RewrapAll = async (ctx, keks, intent) => {
  const counts = [
    await rewrap(ctx, keks, intent, wrappedDataKey),
    await rewrap(ctx, keks, intent, wrappedToken),
    // Those that wait for an answer: the device would only have to say hello again.
    await rewrap(ctx, keks, intent, wrappedChallenge),
  ]
  return counts.reduce((sum, count) => sum + count, 0)
}
