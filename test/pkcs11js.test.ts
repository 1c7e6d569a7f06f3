import { mkdtempSync, readdirSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { main } from '@fleetkey/cli/main.ts'
import { installPkcs11js } from '@fleetkey/cli/offline/pkcs11js.ts'
import { addon, hasSoftHsm } from './softhsm.ts'

let folder = ''
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fk-addon-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

test('a source that is not the published one is not built, and leaves nothing behind', async () => {
  const tarball = join(folder, 'source.tgz')
  writeFileSync(tarball, 'not it')
  const data = join(folder, 'data')
  expect(() => installPkcs11js({ folder: join(data, 'pkcs11js'), tarball })).toThrow(/SHA-512/)
  expect(() => installPkcs11js({ folder: join(data, 'pkcs11js'), tarball: join(folder, 'none.tgz') })).toThrow(/none\.tgz/)
  expect(readdirSync(data)).toEqual([])
  expect(await main(['kms', 'install-pkcs11', '--data', data, '--tarball', tarball])).toBe(5)
  expect(readdirSync(data)).toEqual([])
})

test.skipIf(!hasSoftHsm())('what is there already, and loads, is left as it is', () => {
  expect(installPkcs11js({ folder: addon, tarball: join(folder, 'none.tgz') })).toBe(false)
})
