import { expect, test } from 'vitest'
import { DeviceId, EnrolmentId, GroupId } from './ids.ts'
import { deviceTopic, enrolmentTopic, groupAddress, groupTopic, parseTopic, partsOfAddress, topicOfAddress } from './topics.ts'

const enrolment = EnrolmentId.parse(`e-${'0a'.repeat(16)}`)

test('what is built is parsed', () => {
  expect(parseTopic(deviceTopic(DeviceId.parse('gw-1'), 'up'))).toEqual({ kind: 'device', device: 'gw-1', direction: 'up' })
  expect(parseTopic(enrolmentTopic(enrolment, 'down'))).toEqual({ kind: 'enrolment', client: enrolment, direction: 'down' })
  expect(parseTopic(groupTopic(GroupId.parse('plant'), 12))).toEqual({ kind: 'group', group: 'plant', shard: 12 })
  const address = groupAddress(GroupId.parse('plant'), 12)
  expect(topicOfAddress(address)).toBe('fk/1/g/plant/12')
  expect(partsOfAddress(address)).toEqual({ group: 'plant', shard: 12 })
})

test.each([
  '',
  '/',
  'fk',
  'fk/1',
  'fk/1/gw-1',
  'fk/1/gw-1/',
  'fk/1/gw-1/UP',
  'fk/1/gw-1/up/',
  '/fk/1/gw-1/up',
  'fk/2/gw-1/up',
  'fk/1/+/up',
  'fk/1/#',
  'fk/1/gw-1/+',
  'fk/1/gw.1/up',
  'fk/1/Gw-1/up',
  'fk/1/-gw/up',
  'fk/1/gw\u0000/up',
  `fk/1/${'a'.repeat(65)}/up`,
  `fk/1/e-${'0'.repeat(32)}/up`,
  `fk/1/e/gw-1/up`,
  `fk/1/e/e-${'0'.repeat(31)}/up`,
  `fk/1/e/e-${'0A'.repeat(16)}/up`,
  'fk/1/g/plant/',
  'fk/1/g/plant/00',
  'fk/1/g/plant/-1',
  'fk/1/g/plant/1e3',
  'fk/1/g/plant/100000',
  'fk/1/g/+/0',
  '$SYS/fk/1/gw-1/up',
  '$share/x/fk/1/gw-1/down',
  `fk/1/${'x/'.repeat(100)}`,
])('%j is no topic', (topic) => expect(parseTopic(topic)).toBeUndefined())

test.each(['gw-1', 'a', '0', 'a'.repeat(64), 'gateway-batch-1-0001'])('device id %s', (id) => expect(DeviceId.safeParse(id).success).toBe(true))
test.each(['', '-a', 'A', 'a.b', 'a/b', 'a+', 'a#', 'a b', 'ä', 'e-1', `e-${'0'.repeat(32)}`, 'a'.repeat(65), '__proto__'])('no device id: %j', (id) =>
  expect(DeviceId.safeParse(id).success).toBe(false),
)
