import { activeOf, nextOf, rootState, type GenerationState, type Generation, type Revocation } from '../ca/rollover.ts'
import { caCertificates, issuingKey, rolloverOf } from './authority.ts'
import type { Context } from './context.ts'
import { certificatesUnder, devicesUnder, readiness, type Readiness } from './trust.ts'

export interface CaStatus {
  readonly version: number
  readonly generations: {
    readonly number: number
    readonly root: number
    readonly state: GenerationState
    readonly since: number
    /** Common name of its certificate. */
    readonly issuing: string
    readonly notAfter: number | null
    readonly devices: number | null
    readonly revoked: Revocation | null
    readonly suspended: NonNullable<Generation['suspended']> | null
    readonly certificates: number | null
  }[]
  readonly roots: { readonly number: number; readonly state: ReturnType<typeof rootState> }[]
  readonly readiness: Omit<Readiness, 'first'> & { readonly until: number | null; readonly first: Readiness['first'][number][] }
}

/** Certificates that are read to count their devices; of more only the certificates are counted. */
const countable = 5_000

/** Where a rollover stands. Costs the same however many devices there are: what is not counted already is read up to a bound. */
export const caStatus = async (ctx: Context): Promise<CaStatus> => {
  const rollover = await rolloverOf(ctx)
  const target = nextOf(rollover)
  const judged = target === undefined || target.state === 'preparing' ? activeOf(rollover) : target
  const { first, ...counts } = await readiness(ctx, rollover.version === 1 ? 0 : rollover.version, judged)
  const { crosses } = await caCertificates(ctx, judged)
  const generations = await Promise.all(
    rollover.generations.map(async ({ number, root, state, since, revoked = null, suspended = null }) => {
      const made = state === 'preparing' ? undefined : (await caCertificates(ctx, { number })).issuing
      const counted = ['superseded', 'tainted', 'retiring'].includes(state)
      const certificates = state === 'retired' ? 0 : counted ? await certificatesUnder(ctx, issuingKey(number)) : null
      const devices = certificates === null || certificates > countable ? null : certificates === 0 ? 0 : (await devicesUnder(ctx, issuingKey(number))).length
      return { number, root, state, since, issuing: made?.commonName ?? '', notAfter: made?.notAfter ?? null, devices, certificates, revoked, suspended }
    }),
  )
  return {
    version: rollover.version,
    generations,
    roots: [...new Set(rollover.generations.map(({ root }) => root))].map((number) => ({ number, state: rootState(rollover, number) })),
    readiness: { ...counts, until: counts.away === 0 || crosses.length === 0 ? null : Math.min(...crosses.map(({ notAfter }) => notAfter)), first: [...first] },
  }
}
