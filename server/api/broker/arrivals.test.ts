import { expect, test } from 'vitest'
import { arrivals, type Arrival, type Turns } from './arrivals.ts'

/** An event loop whose turns take as long as they are told to. */
const loop = (): Turns & { turn(took?: number): void } => {
  let at = 0
  let next: { readonly due: number; readonly run: () => void }[] = []
  return {
    now: () => at,
    next: (run) => void next.push({ due: at, run }),
    later: (run, milliseconds) => void next.push({ due: at + milliseconds, run }),
    turn(took = 1) {
      at += took
      const runs = next.filter(({ due }) => due <= at)
      next = next.filter(({ due }) => due > at)
      for (const { run } of runs) run()
    },
  }
}

const limits = { arriving: 2, atLeast: 100, patience: 60_000, turn: 5, longest: 100 }

const scene = ({ places = 200, ...of }: Partial<typeof limits> & { places?: number } = {}) => {
  const turns = loop()
  const sockets = new Set<string>()
  const queue = arrivals({ ...limits, ...of }, () => places - sockets.size, turns)
  const went: string[] = []
  const gaveUp: string[] = []
  const arrive = (from: string, endpoint: string): void => {
    const arrival: Arrival = { endpoint, go: () => void went.push(endpoint), giveUp: () => (gaveUp.push(endpoint), sockets.delete(endpoint)) }
    sockets.add(endpoint)
    queue.add(from, arrival)
  }
  const leave = (from: string, endpoint: string): void => {
    sockets.delete(endpoint)
    queue.done(from, endpoint)
  }
  return { turns, queue, leave, went, gaveUp, arrive }
}

test('one goes on each turn, so many of a prefix at a time, the others in order as those before them are through', () => {
  const { turns, queue, went, gaveUp, arrive } = scene({ places: 6 })
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
  const { turns, went, arrive } = scene({ arriving: 8 })
  for (let at = 0; at < 20; at++) arrive('crowd', `c${at}`)
  arrive('other', 'o1')
  arrive('third', 't1')
  for (let at = 0; at < 5; at++) turns.turn()
  expect(went).toEqual(['c0', 'o1', 't1', 'c1', 'c2'])
})

test('as many of one prefix wait as there is room left: there is always room for another', () => {
  const { gaveUp, arrive } = scene({ places: 12 })
  for (let at = 0; at < 20; at++) arrive('crowd', `c${at}`)
  expect(gaveUp.length).toBe(14)
  for (let at = 0; at < 20; at++) arrive('second', `s${at}`)
  expect(gaveUp.filter((endpoint) => endpoint.startsWith('s')).length).toBe(17)
  arrive('third', 't1')
  expect(gaveUp).not.toContain('t1')
})

test('nobody is let on while turns are long, but for one in a while', () => {
  const { turns, went, arrive } = scene({ arriving: 8 })
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
  const { turns, leave, went, gaveUp, arrive } = scene({ places: 4 })
  arrive('a', 'a1')
  arrive('a', 'a2')
  leave('a', 'a1')
  arrive('a', 'a3')
  turns.turn()
  turns.turn()
  expect([went, gaveUp]).toEqual([['a2', 'a3'], []])
})

test('as many go on as turns stay short with: few where the server is what they wait for, more where it is not', () => {
  const { turns, queue, went, arrive } = scene({ arriving: 1_000, atLeast: 4, places: 2_000 })
  for (let at = 0; at < 500; at++) arrive('a', `a${at}`)
  for (let at = 0; at < 4; at++) turns.turn()
  expect(went.length).toBe(4)
  // They are slow, the server is not: one more in a while, and more with time.
  turns.turn(4)
  expect(went.length).toBe(4)
  turns.turn(1)
  expect(went.length).toBe(5)
  for (let at = 0; at < 40; at++) turns.turn(5)
  expect(went.length).toBe(45)
  // What they do makes turns long: those that are through are not replaced until as few are left as before.
  for (let at = 0; at < 12; at++) turns.turn(12)
  const before = went.length
  expect(before).toBeLessThan(48)
  for (let at = 0; at < before - 4; at++) queue.done('a', went[at] as string)
  turns.turn(1)
  turns.turn(1)
  expect(went.length).toBeLessThanOrEqual(before + 1)
  for (const endpoint of went) queue.done('a', endpoint)
  turns.turn(5)
  turns.turn(1)
  expect(went.length).toBeGreaterThan(before)
})

test('who hangs about holds up nobody for long', () => {
  const { turns, went, arrive } = scene({ arriving: 1_000, atLeast: 2, places: 2_000 })
  for (let at = 0; at < 20; at++) arrive('a', `a${at}`)
  for (let at = 0; at < 60; at++) turns.turn(20)
  // One in a hundred milliseconds, on a server that is busy all the time.
  expect(went.length).toBeGreaterThanOrEqual(11)
  expect(went.length).toBeLessThanOrEqual(13)
})
