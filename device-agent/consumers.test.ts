import { expect, test, vi } from 'vitest'
import type { Problem } from '@fleetkey/protocol/problem.ts'
import { openConsumers, type Consumer } from './consumers.ts'

const never = new AbortController().signal
const open = (required: readonly Consumer[] = [], within = 200) => openConsumers({ required, within })
const reasonOf = async (running: Promise<void>): Promise<string | undefined> =>
  await running.then(
    () => 'taken',
    (thrown: unknown) => (thrown as Problem).reason,
  )

test('nobody registered: nobody is waited for', async () => expect(await reasonOf(open().take('site', 2, never))).toBe('taken'))

test('every consumer of the key is told and waited for, others are not', async () => {
  const consumers = open()
  const told: string[] = []
  const one = consumers.register({ key: 'site', name: 'one' }, (epoch) => void told.push(`one ${epoch}`))
  const two = consumers.register({ key: 'site', name: 'two' }, (epoch) => void told.push(`two ${epoch}`))
  consumers.register({ key: 'meter', name: 'three' }, () => void told.push('three'))
  const taken = vi.fn<() => void>()
  const running = consumers.take('site', 2, never).then(taken)
  expect(told).toEqual(['one 2', 'two 2'])
  one.ready(2)
  two.ready(1)
  await new Promise((resolve) => void setTimeout(resolve, 20))
  expect(taken).not.toHaveBeenCalled()
  two.ready(2)
  await running
  // Asked again, after a crash of something else: both have it already.
  await consumers.take('site', 2, never)
  expect(told).toHaveLength(2)
})

test.each<[string, string, (of: ReturnType<ReturnType<typeof open>['register']>) => void]>([
  ['says nothing', 'consumer.not-ready: app', () => undefined],
  ['is ready for another epoch only', 'consumer.not-ready: app', (one) => one.ready(1)],
  ['refuses it', 'consumer.refused: app', (one) => one.refuse(2)],
  ['goes away', 'consumer.gone: app', (one) => one.leave()],
])('one that %s: a reason that names it', async (_what, reason, does) => {
  const consumers = open()
  const one = consumers.register({ key: 'site', name: 'app' }, () => setTimeout(() => does(one), 10))
  expect(await reasonOf(consumers.take('site', 2, never))).toBe(reason)
})

test('one that must be there holds the epoch up until it is there and ready', async () => {
  const consumers = open([{ key: 'site', name: 'app' }])
  consumers.register({ key: 'site', name: 'other' }, () => undefined).ready(9)
  expect(await reasonOf(consumers.take('site', 2, never))).toBe('consumer.absent: app')
  expect(await reasonOf(consumers.take('meter', 2, never))).toBe('taken')
  const app = consumers.register({ key: 'site', name: 'app' }, () => setTimeout(() => app.ready(2), 10))
  expect(await reasonOf(consumers.take('site', 2, never))).toBe('taken')
  app.leave()
  expect(await reasonOf(consumers.take('site', 3, never))).toBe('consumer.absent: app')
})

test('an agent that stops waits for nobody', async () => {
  const stop = new AbortController()
  const consumers = open([], 60_000)
  consumers.register({ key: 'site', name: 'app' }, () => undefined)
  const running = reasonOf(consumers.take('site', 2, stop.signal))
  stop.abort()
  expect(await running).toBe('agent.stops')
})
