import type { ResponseOf } from '@fleetkey/protocol/admin.ts'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import type { Base, Seal, SealStatus } from '../../flows/context.ts'
import { handInShare } from '../../flows/seal.ts'
import type { Handlers } from './router.ts'

export const sealView = ({ recipient, ways, sets, ...rest }: SealStatus): ResponseOf<'seal.status'> => ({
  ...rest,
  ways: [...ways],
  sets: sets.map((set) => ({ ...set, gathered: [...set.gathered] })),
  recipient: Buffer.from(recipient).toString('base64'),
})

/** Addresses that are told to wait; beyond it the one that waits longest is let go. */
const maxPaced = 256
const longest = 60

/** Seconds that whoever handed in the last of so many wrong shares waits: 1, 2, 4, … 60. The count is durable, so that a restart shortens nothing. */
export const pauseAfter = (wrong: number): number => Math.min(longest, 2 ** Math.min(wrong - 1, 10))

/** What is served without a token, and while the server is sealed besides nothing else. */
export const sealHandlers = (ctx: Base, seal: Seal): Pick<Handlers, 'seal.status' | 'seal.unseal'> => {
  /** By address, until when. Others are not held up: who floods does not keep those with good shares out. */
  const paced = new Map<string, number>()
  return {
    'seal.status': async () => sealView(await seal.status()),
    async 'seal.unseal'({ caller, body }) {
      const left = (paced.get(caller.from) ?? 0) - ctx.now()
      if (left > 0) {
        const retryAfterSeconds = Math.ceil(left / 1000)
        throw new Problem('rate-limited', `a wrong share came from there: wait ${retryAfterSeconds} s`, { reason: 'seal.paced', retryAfterSeconds })
      }
      try {
        return sealView(await handInShare(ctx, seal, { caller, share: new Uint8Array(Buffer.from(body.share, 'base64')), reset: body.reset }))
      } catch (thrown) {
        const { reason, message } = toProblem(thrown)
        if (reason === 'seal.share.wrong' || reason === 'seal.share.set') {
          const { wrong } = await seal.status()
          paced.delete(caller.from)
          paced.set(caller.from, ctx.now() + pauseAfter(wrong) * 1000)
          for (const [from] of paced) if (paced.size > maxPaced) paced.delete(from)
          ctx.log(`a wrong share from ${caller.from}, ${wrong} since the keys were last opened by shares: ${message.slice(0, 200)}`)
        }
        throw thrown
      }
    },
  }
}
