import type { RevocationReason } from '@fleetkey/protocol/x509/reasons.ts'

/**
 * Generations of the CA, each with an issuing CA of its own under a root that it may share with the one before. One is active; its successor is prepared,
 * made known to the devices (distributed) and then takes its place; what it leaves is superseded, tainted (devices are renewed away from it) and retired.
 */
export const generationStates = ['preparing', 'prepared', 'distributed', 'activating', 'active', 'superseded', 'tainted', 'retiring', 'retired'] as const
export type GenerationState = (typeof generationStates)[number]

export interface Generation {
  readonly number: number
  /** Number of its root. */
  readonly root: number
  readonly state: GenerationState
  /** When it came into this state, milliseconds since 1970. */
  readonly since: number
  /** When it first signed for others; null while it has not. */
  readonly activatedAt: number | null
  /** Set when it was revoked instead of retired. */
  readonly revoked?: Revocation
  /** Set while nothing it has issued is accepted, for now. */
  readonly suspended?: { readonly at: number; readonly by: string; readonly reason: string }
}

/** Who has revoked a CA, when, and why: in words, and for the list of its root. */
export interface Revocation {
  readonly at: number
  readonly by: string
  readonly reason: string
  readonly code: RevocationReason
}

export interface Rollover {
  /** Version of the trust bundle: 1, that of every device's configuration, is never sent. Only grows. */
  readonly version: number
  /** Seconds over which devices spread their renewals away from a tainted CA. */
  readonly renewWithin: number
  /** Ascending. */
  readonly generations: readonly Generation[]
  /** Roots that each version of the bundle had, oldest first: what a device trusts follows from the version that it has acknowledged. */
  readonly history: readonly { readonly version: number; readonly roots: readonly number[]; readonly at: number }[]
}

export const commands = ['prepare', 'distribute', 'activate', 'taint', 'retire', 'revoke'] as const
export type Command = (typeof commands)[number]

/** Milliseconds since 1970 at which the first CA was set up. */
export const firstRollover = (at: number): Rollover => ({
  version: 1,
  renewWithin: 0,
  generations: [{ number: 1, root: 1, state: 'active', since: at, activatedAt: at }],
  history: [{ version: 1, roots: [1], at }],
})

/** Nothing of it is accepted any more. */
export const isOver = ({ state }: Generation): boolean => state === 'retiring' || state === 'retired'
const isMade = ({ state }: Generation): boolean => state !== 'preparing' && state !== 'prepared'

export const activeOf = ({ generations }: Rollover): Generation => {
  const active = generations.find(({ state }) => state === 'active')
  if (active === undefined) throw new Error('no generation of the CA is active')
  return active
}

/** The generation that is to follow; undefined when none is. */
export const nextOf = ({ generations }: Rollover): Generation | undefined =>
  generations.find(({ state }) => ['preparing', 'prepared', 'distributed', 'activating'].includes(state))

/** What devices are told of. */
export const knownOf = ({ generations }: Rollover): readonly Generation[] => generations.filter(isMade)

/** `trusted` while any generation under it is, `tainted` when only tainted ones are left, `retired` when none is, `unknown` before devices are told. */
export const rootState = ({ generations }: Rollover, root: number): 'unknown' | 'trusted' | 'tainted' | 'retired' => {
  const own = generations.filter((one) => one.root === root && isMade(one))
  if (own.length === 0) return 'unknown'
  if (own.every(isOver)) return 'retired'
  return own.every((one) => isOver(one) || one.state === 'tainted') ? 'tainted' : 'trusted'
}

/** Whether the key of a root is still needed: also when nothing under it counts any more, while its list says that it has revoked a CA. */
export const isRootNeeded = (rollover: Rollover, root: number): boolean =>
  rootState(rollover, root) !== 'retired' || rollover.generations.some((one) => one.root === root && one.revoked !== undefined)

/** Numbers of the roots that a device is to trust, ascending. */
export const rootsOf = (rollover: Rollover): readonly number[] =>
  [...new Set(rollover.generations.map(({ root }) => root))].filter((root) => ['trusted', 'tainted'].includes(rootState(rollover, root)))

/** A command on a generation: what it comes to, or why not. `already`: it has been carried out before, which is no fault. */
export type Ruling = { readonly do: Command | 'already'; readonly generation: Generation | null } | { readonly refused: string }

const spoken = ({ number, state }: Generation): string => `generation ${number} is ${state}`

const succession = (rollover: Rollover, command: 'prepare' | 'distribute' | 'activate'): Ruling => {
  const [next, active] = [nextOf(rollover), activeOf(rollover)]
  const done = active.number === 1 ? undefined : active
  if (command === 'prepare') {
    if (next === undefined || next.state === 'preparing') return { do: 'prepare', generation: next ?? null }
    return next.state === 'prepared' ? { do: 'already', generation: next } : { refused: `${spoken(next)}: activate it before another one is prepared` }
  }
  if (next === undefined)
    return command === 'activate' && done !== undefined ? { do: 'already', generation: done } : { refused: 'no CA is prepared: `ca prepare` comes first' }
  if (next.state === 'preparing') return { refused: `${spoken(next)}: repeat \`ca prepare\`` }
  if (command === 'distribute') return { do: next.state === 'prepared' ? 'distribute' : 'already', generation: next }
  return next.state === 'prepared' ? { refused: `${spoken(next)}: \`ca distribute\` comes first` } : { do: 'activate', generation: next }
}

const ending = (rollover: Rollover, command: 'taint' | 'retire', number: number | undefined): Ruling => {
  const { generations } = rollover
  const from = command === 'taint' ? ['superseded'] : ['retiring', 'tainted']
  const after = command === 'taint' ? ['tainted', 'retiring', 'retired'] : ['retired']
  const target = number === undefined ? generations.find(({ state }) => from.includes(state)) : generations.find((one) => one.number === number)
  const done = number === undefined && target === undefined ? generations.findLast(({ state }) => after.includes(state)) : undefined
  if (done !== undefined && !generations.some(({ state }) => state === 'superseded')) return { do: 'already', generation: done }
  if (target === undefined)
    return { refused: number === undefined ? `no CA is ${command === 'taint' ? 'superseded' : 'tainted'}` : `there is no generation ${number}` }
  if (after.includes(target.state)) return { do: 'already', generation: target }
  if (from.includes(target.state)) return { do: command, generation: target }
  if (target.state === 'active') return { refused: `${spoken(target)}: activate its successor first` }
  return { refused: command === 'retire' && target.state === 'superseded' ? `${spoken(target)}: \`ca taint\` comes first` : spoken(target) }
}

/** A CA that signs is revoked only together with its succession: somebody has to sign. */
const revoking = (rollover: Rollover, number: number | undefined): Ruling => {
  const target = rollover.generations.find((one) => one.number === number)
  if (target === undefined) return { refused: `there is no generation ${number ?? ''}` }
  if (target.revoked !== undefined) return { do: target.state === 'retired' ? 'already' : 'revoke', generation: target }
  if (isOver(target)) return { refused: `${spoken(target)}: nothing it has issued is accepted` }
  if (target.state === 'preparing' || target.state === 'activating') return { refused: `${spoken(target)}: repeat that command first` }
  if (target.state === 'active' && nextOf(rollover)?.state !== 'distributed')
    return { refused: `${spoken(target)}, and no other is ready: \`ca prepare\` and \`ca distribute\` come first` }
  return { do: 'revoke', generation: target }
}

/**
 * Pure, so that every order of commands is a case of a table. `number`: of the generation to end; the oldest that can be when left out, which a revocation
 * never does.
 */
export const ruling = (rollover: Rollover, command: Command, number?: number): Ruling => {
  if (command === 'revoke') return revoking(rollover, number)
  return command === 'taint' || command === 'retire' ? ending(rollover, command, number) : succession(rollover, command)
}

/** The same with one generation in another state. */
export const withState = (rollover: Rollover, number: number, state: GenerationState, at: number): Rollover => ({
  ...rollover,
  generations: rollover.generations.map((one) =>
    one.number === number && one.state !== state
      ? { ...one, state, since: at, activatedAt: state === 'active' ? at : one.activatedAt }
      : one.state === 'active' && state === 'active'
        ? { ...one, state: 'superseded', since: at }
        : one,
  ),
})

/** With this generation revoked; when it was the one that signs, the next one signs in the same step: there is no moment without. */
export const withRevoked = (rollover: Rollover, number: number, revoked: Revocation): Rollover => {
  const next = activeOf(rollover).number === number ? nextOf(rollover) : undefined
  const succeeded = next === undefined ? rollover : withState(rollover, next.number, 'active', revoked.at)
  const over = withState(succeeded, number, 'retiring', revoked.at)
  return { ...over, generations: over.generations.map((one) => (one.number === number ? { ...one, revoked } : one)) }
}

/** With this generation suspended, or reinstated. */
export const withSuspended = (rollover: Rollover, number: number, suspended: Generation['suspended']): Rollover => ({
  ...rollover,
  generations: rollover.generations.map((one) => {
    if (one.number !== number) return one
    const { suspended: _, ...rest } = one
    return suspended === undefined ? rest : { ...rest, suspended }
  }),
})

/** With one more generation, to be prepared: under the root of the active one, or under a root of its own. */
export const withNext = (rollover: Rollover, isNewRoot: boolean, at: number): Rollover => {
  const number = Math.max(...rollover.generations.map((one) => one.number)) + 1
  const root = isNewRoot ? Math.max(...rollover.generations.map((one) => one.root)) + 1 : activeOf(rollover).root
  return { ...rollover, generations: [...rollover.generations, { number, root, state: 'preparing', since: at, activatedAt: null }] }
}

/** With the next version of the bundle. */
export const published = (rollover: Rollover, at: number): Rollover => ({
  ...rollover,
  version: rollover.version + 1,
  history: [...rollover.history, { version: rollover.version + 1, roots: rootsOf(rollover), at }],
})

/** Roots of a device that has acknowledged this version; 0, and what nobody remembers: those of the first configuration. */
export const rootsAt = ({ history }: Rollover, version: number): readonly number[] => history.findLast((one) => one.version <= version)?.roots ?? [1]
