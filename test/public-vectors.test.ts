import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { findVectors } from './public-vectors.ts'

const missing = join(tmpdir(), 'fleetkey-no-such-folder')

test.each([
  ['named and there', { FLEETKEY_VECTORS: tmpdir(), CI: 'true' }, missing, { folder: tmpdir() }],
  ['not named, beside the checkout', { CI: 'true' }, tmpdir(), { folder: tmpdir() }],
  ['nowhere', { CI: 'true' }, missing, { why: 'FLEETKEY_VECTORS is not set and ../shared/vectors is not there: public test vectors were not used' }],
  [
    'named and not there',
    { FLEETKEY_VECTORS: missing },
    tmpdir(),
    { why: `FLEETKEY_VECTORS names ${missing}, which is not there: public test vectors were not used` },
  ],
] as const)('%s', (_, environment, usual, want) => expect(findVectors(environment, usual)).toMatchObject(want))

test('CI asks for a folder that is not there: that is no skip', () =>
  expect(() => findVectors({ FLEETKEY_VECTORS: missing, CI: 'true' }, tmpdir())).toThrow('is not there'))
