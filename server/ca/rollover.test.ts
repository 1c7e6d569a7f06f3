import { describe, expect, test } from 'vitest'
import {
  activeOf,
  firstRollover,
  isRootNeeded,
  published,
  rootState,
  rootsAt,
  rootsOf,
  ruling,
  withNext,
  withRevoked,
  withState,
  type Command,
  type GenerationState,
  type Rollover,
} from './rollover.ts'

const rolled = (...states: readonly (GenerationState | readonly [GenerationState, number])[]): Rollover => ({
  ...firstRollover(0),
  generations: states.map((one, at) => {
    const [state, root] = typeof one === 'string' ? [one, 1] : one
    return { number: at + 1, root, state, since: 0, activatedAt: null }
  }),
})

const outcome = (rollover: Rollover, command: Command, number?: number): string => {
  const found = ruling(rollover, command, number)
  return 'refused' in found ? `refused: ${found.refused}` : `${found.do} ${found.generation?.number ?? 'new'}`
}

describe('every command in every state', () => {
  const cases: readonly (readonly [Rollover, Command, string])[] = [
    [rolled('active'), 'prepare', 'prepare new'],
    [rolled('active'), 'distribute', 'refused: no CA is prepared'],
    [rolled('active'), 'activate', 'refused: no CA is prepared'],
    [rolled('active'), 'taint', 'refused: no CA is superseded'],
    [rolled('active'), 'retire', 'refused: no CA is tainted'],
    [rolled('active', 'preparing'), 'prepare', 'prepare 2'],
    [rolled('active', 'preparing'), 'distribute', 'refused: generation 2 is preparing'],
    [rolled('active', 'preparing'), 'activate', 'refused: generation 2 is preparing'],
    [rolled('active', 'prepared'), 'prepare', 'already 2'],
    [rolled('active', 'prepared'), 'distribute', 'distribute 2'],
    [rolled('active', 'prepared'), 'activate', 'refused: generation 2 is prepared: `ca distribute` comes first'],
    [rolled('active', 'distributed'), 'prepare', 'refused: generation 2 is distributed'],
    [rolled('active', 'distributed'), 'distribute', 'already 2'],
    [rolled('active', 'distributed'), 'activate', 'activate 2'],
    [rolled('active', 'distributed'), 'taint', 'refused: no CA is superseded'],
    [rolled('active', 'activating'), 'distribute', 'already 2'],
    [rolled('active', 'activating'), 'activate', 'activate 2'],
    [rolled('superseded', 'active'), 'activate', 'already 2'],
    [rolled('superseded', 'active'), 'prepare', 'prepare new'],
    [rolled('superseded', 'active'), 'taint', 'taint 1'],
    [rolled('superseded', 'active'), 'retire', 'refused: no CA is tainted'],
    [rolled('tainted', 'active'), 'taint', 'already 1'],
    [rolled('tainted', 'active'), 'retire', 'retire 1'],
    [rolled('retiring', 'active'), 'retire', 'retire 1'],
    [rolled('retired', 'active'), 'retire', 'already 1'],
    [rolled('retired', 'active'), 'taint', 'already 1'],
    [rolled('superseded', 'superseded', 'active'), 'taint', 'taint 1'],
    [rolled('tainted', 'superseded', 'active'), 'taint', 'taint 2'],
    [rolled('retired', 'superseded', 'active'), 'retire', 'refused: no CA is tainted'],
  ]
  test.each(cases)('%o %s: %s', (rollover, command, want) => expect(outcome(rollover, command)).toContain(want))

  test.each([
    [1, 'retire', 'refused: generation 1 is superseded: `ca taint` comes first'],
    [2, 'taint', 'refused: generation 2 is active: activate its successor first'],
    [3, 'taint', 'refused: generation 3 is prepared'],
    [9, 'retire', 'refused: there is no generation 9'],
    [1, 'revoke', 'revoke 1'],
    [2, 'revoke', 'refused: generation 2 is active, and no other is ready: `ca prepare` and `ca distribute` come first'],
    [3, 'revoke', 'revoke 3'],
    [9, 'revoke', 'refused: there is no generation 9'],
  ] as const)('generation %d, %s: %s', (number, command, want) => expect(outcome(rolled('superseded', 'active', 'prepared'), command, number)).toBe(want))
})

describe('a CA that is revoked', () => {
  test.each([
    [['active', 'distributed'], 1, 'revoke 1'],
    [['active', 'distributed'], 2, 'revoke 2'],
    [['active', 'activating'], 1, 'refused: generation 1 is active, and no other is ready'],
    [['active', 'activating'], 2, 'refused: generation 2 is activating: repeat that command first'],
    [['active', 'preparing'], 2, 'refused: generation 2 is preparing: repeat that command first'],
    [['tainted', 'active'], 1, 'revoke 1'],
    [['retiring', 'active'], 1, 'refused: generation 1 is retiring: nothing it has issued is accepted'],
    [['retired', 'active'], 1, 'refused: generation 1 is retired: nothing it has issued is accepted'],
  ] as const)('%o, generation %d: %s', (states, number, want) => expect(outcome(rolled(...states), 'revoke', number)).toContain(want))

  const revoked = { at: 5, by: 'operator:alice', reason: 'stolen', code: 'cACompromise' } as const

  test('the one that signs is succeeded in the same step; repeated, it goes on until it is over', () => {
    const under = withRevoked(rolled('active', 'distributed'), 1, revoked)
    expect(under.generations).toMatchObject([
      { state: 'retiring', revoked },
      { state: 'active', activatedAt: 5 },
    ])
    expect(outcome(under, 'revoke', 1)).toBe('revoke 1')
    expect(outcome(withState(under, 1, 'retired', 6), 'revoke', 1)).toBe('already 1')
    expect(withRevoked(rolled('active', 'distributed'), 2, revoked).generations).toMatchObject([{ state: 'active' }, { state: 'retiring', revoked }])
  })

  test('its root stays to list it, trusted no more', () => {
    const alone = withRevoked(rolled(['superseded', 1], ['active', 2]), 1, revoked)
    expect([rootState(alone, 1), isRootNeeded(alone, 1), isRootNeeded(alone, 2)]).toEqual(['retired', true, true])
    expect(isRootNeeded(withState(rolled(['superseded', 1], ['active', 2]), 1, 'retired', 5), 1)).toBe(false)
  })
})

test('a root lives as long as a CA under it; what a device trusts follows from the version it has acknowledged', () => {
  const next = withNext(firstRollover(1), true, 2)
  expect(rootState(next, 2)).toBe('unknown')
  const told = published(withState(next, 2, 'distributed', 3), 3)
  expect(rootsOf(told)).toEqual([1, 2])
  const active = withState(told, 2, 'active', 4)
  expect(active.generations.map(({ state }) => state)).toEqual(['superseded', 'active'])
  expect(activeOf(active)).toMatchObject({ number: 2, root: 2, activatedAt: 4 })
  const tainted = withState(active, 1, 'tainted', 5)
  expect([rootState(tainted, 1), rootState(tainted, 2)]).toEqual(['tainted', 'trusted'])
  const retired = published(withState(tainted, 1, 'retiring', 6), 6)
  expect(rootState(retired, 1)).toBe('retired')
  expect([0, 1, 2, 3, 9].map((version) => rootsAt(retired, version))).toEqual([[1], [1], [1, 2], [2], [2]])
  expect(withNext(active, false, 7).generations.at(-1)).toMatchObject({ number: 3, root: 2, state: 'preparing' })
})
