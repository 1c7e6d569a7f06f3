import { expect, test } from 'vitest'
import { judgeForward, judgePublish, judgeSubscribe } from './guard.ts'
import type { Peer } from './peer.ts'

const peer = (of: Partial<Peer> = {}): Peer =>
  ({
    ref: { client: 'd-1', device: 'd-1', from: '', exporter: null, connection: 1 },
    up: 'fk/1/d-1/up',
    down: 'fk/1/d-1/down',
    groups: new Set(['fk/1/g/plant/0']),
    subscribed: new Set(['fk/1/d-1/down']),
    ...of,
  }) as Peer

/** The library matches stored filters by itself: what it wants to send is judged once more. */
test.each([
  ['its own topic', peer(), 'fk/1/d-1/down', true],
  ['a topic that it may have and has not subscribed to', peer(), 'fk/1/g/plant/0', false],
  ['the topic of another', peer(), 'fk/1/d-2/down', false],
  ['what a wildcard would match', peer({ subscribed: new Set(['#']) }), 'fk/1/d-2/down', false],
  ['anything before CONNACK', peer({ ref: undefined }), 'fk/1/d-1/down', false],
  ['after it has unsubscribed', peer({ subscribed: new Set() }), 'fk/1/d-1/down', false],
])('forward: %s', (_, to, topic, want) => expect(judgeForward(to, topic)).toBe(want))

test.each([
  ['its own topic', peer(), 'fk/1/d-1/down', true],
  ['its group', peer(), 'fk/1/g/plant/0', true],
  ['another shard', peer(), 'fk/1/g/plant/1', false],
  ['before CONNACK', peer({ ref: undefined }), 'fk/1/d-1/down', false],
])('subscribe: %s', (_, by, filter, want) => expect(judgeSubscribe(by, filter)).toBe(want))

test('publish before CONNACK', () =>
  expect(judgePublish(peer({ ref: undefined }), { cmd: 'publish', topic: 'fk/1/d-1/up', payload: '', qos: 1, dup: false, retain: false })).toMatch(/CONNACK/))
