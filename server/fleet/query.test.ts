import fc from 'fast-check'
import { expect, test } from 'vitest'
import { matches, parseQuery, type DeviceFacts } from './query.ts'

const device: DeviceFacts = { batch: 'B1', model: 'gateway', serial: 'GW-1', release: 'gateway/1.0.0', assurance: 'attested', tags: { site: 'berlin' } }

test.each([
  ['batch=B1', true],
  ['batch=B2', false],
  ['batch=B1 AND tag.site=berlin', true],
  ['batch = B1  AND  tag.site = hamburg', false],
  ['tag.site=hamburg,berlin', true],
  ['tag.site!=berlin', false],
  ['tag.floor=2', false],
  ['tag.floor!=2', true],
  ['release=gateway/1.0.0 AND model=gateway AND serial!=GW-2 AND assurance=attested', true],
  ['tag.constructor!=x', true],
])('%s: %s', (text, want) => expect(matches(parseQuery(text), device)).toBe(want))

test('a device that has not enrolled has no release and no assurance', () => {
  const registered = { ...device, release: null, assurance: null }
  expect(matches(parseQuery('release=gateway/1.0.0'), registered)).toBe(false)
  expect(matches(parseQuery('release!=gateway/1.0.0'), registered)).toBe(true)
})

test.each([
  '',
  '   ',
  'batch',
  'batch=',
  '=B1',
  'batch==B1',
  'batch=B1 and model=x',
  'batch=B1 OR model=x',
  'batch=B1 AND',
  'AND batch=B1',
  'batch=B1,',
  'batch=a b',
  'owner=x',
  'constructor=x',
  'tag.=x',
  'tag.Site=x',
  'tag.a.b=x',
  'batch=x;y',
  "batch='B1'",
  `batch=${'x'.repeat(65)}`,
  `batch=${Array.from({ length: 33 }, (_, at) => at).join()}`,
  Array.from({ length: 17 }, () => 'batch=B1').join(' AND '),
  `batch=${'x,'.repeat(600)}x`,
])('refused: %j', (text) => expect(() => parseQuery(text)).toThrow(expect.objectContaining({ code: 'malformed', reason: 'group.query' })))

test('any text is a query or is refused, at once', () => {
  fc.assert(
    fc.property(
      fc.oneof(
        fc.string({ maxLength: 2_000 }),
        fc.array(fc.constantFrom('batch', 'tag.site', '=', '!=', 'B1', ',', ' AND ', ' ')).map((parts) => parts.join('')),
      ),
      (text) => {
        try {
          return typeof matches(parseQuery(text), device) === 'boolean'
        } catch (thrown) {
          return (thrown as { reason?: string }).reason === 'group.query'
        }
      },
    ),
    { numRuns: 2_000 },
  )
})
