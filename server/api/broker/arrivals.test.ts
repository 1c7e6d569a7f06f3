import { expect, test } from 'vitest'
import { arrivals, type Arrival, type Turns } from './arrivals.ts'

/** An event loop whose turns take as long as they are told to. */
const loop = (): Turns & { turn(took?: number): void } => {
  let at = 0
  let next: (() => void)[] = []
  return {
    now: () => at,
    next: (run) => void next.push(run),
    turn(took = 1) {
      at += took
      const runs = next
      next = []
      for (const run of runs) run()
    },
  }
}

const limits = { arriving: 2, waiting: 3, patience: 60_000, turn: 5, longest: 100 }

const scene = (of: Partial<typeof limits> = {}) => {
  const turns = loop()
  const queue = arrivals({ ...limits, ...of }, turns)
  const went: string[] = []
  const gaveUp: string[] = []
  const arrive = (from: string, endpoint: string): void => {
    const arrival: Arrival = { endpoint, go: () => void went.push(endpoint), giveUp: () => void gaveUp.push(endpoint) }
    queue.add(from, arrival)
  }
  return { turns, queue, went, gaveUp, arrive }
}

test('one goes on each turn, so many of a prefix at a time, the others in order as those before them are through', () => {
  const { turns, queue, went, gaveUp, arrive } = scene()
  for (const endpoint of ['a1', 'a2', 'a3', 'a4']) arrive('a', endpoint)
  expect(gaveUp).toEqual(['a4'])
  turns.turn()
  expect(went).toEqual(['a1'])
  turns.turn()
  turns.turn()
  expect(went).toEqual(['a1', 'a2'])
  queue.done('a', 'a1')
  queue.done('a', 'a1')
  turns.turn()
  expect(went).toEqual(['a1', 'a2', 'a3'])
})

test('prefixes take turns: one that has a crowd waiting does not keep the others out', () => {
  const { turns, went, arrive } = scene({ arriving: 8, waiting: 100 })
  for (let at = 0; at < 20; at++) arrive('crowd', `c${at}`)
  arrive('other', 'o1')
  arrive('third', 't1')
  for (let at = 0; at < 5; at++) turns.turn()
  expect(went).toEqual(['c0', 'o1', 't1', 'c1', 'c2'])
})

test('nobody is let on while turns are long, but for one in a while', () => {
  const { turns, went, arrive } = scene({ arriving: 8, waiting: 100 })
  for (let at = 0; at < 20; at++) arrive('a', `a${at}`)
  turns.turn(1)
  expect(went.length).toBe(1)
  for (let at = 0; at < 5; at++) turns.turn(15)
  expect(went.length).toBe(1)
  turns.turn(30)
  expect(went.length).toBe(2)
  turns.turn(4)
  expect(went.length).toBe(3)
})

test('one that leaves while it waits is not called, and its place is free', () => {
  const { turns, queue, went, gaveUp, arrive } = scene({ waiting: 2 })
  arrive('a', 'a1')
  arrive('a', 'a2')
  queue.done('a', 'a1')
  arrive('a', 'a3')
  turns.turn()
  turns.turn()
  expect([went, gaveUp]).toEqual([['a2', 'a3'], []])
})
