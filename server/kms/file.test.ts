import { chmodSync, copyFileSync, existsSync, mkdtempSync, readdirSync, readFileSync, rmSync, statSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { Secret } from '@fleetkey/protocol/secret.ts'
import { openFileKms } from './file.ts'

let folder: string
beforeEach(() => {
  folder = mkdtempSync(join(tmpdir(), 'fleetkey-kms-'))
})
afterEach(() => rmSync(folder, { recursive: true, force: true }))

const passphrase = (text: string): { passphrase: Secret } => ({ passphrase: new Secret(Buffer.from(text)) })
const made = async (options: Parameters<typeof openFileKms>[1] = {}): Promise<void> => {
  const kms = await openFileKms(folder, options)
  await kms.create('a', 'audit-signing')
  await kms.create('b', 'audit-signing')
  await kms.create('kek', 'kek')
  await kms.close()
}

test('wrong passphrase, or one where a key file is: unauthenticated; without it the keys are sealed', async () => {
  await made(passphrase('correct horse'))
  await expect(openFileKms(folder, passphrase('correct horsf'))).rejects.toMatchObject({ code: 'unauthenticated', reason: 'kms.passphrase' })
  await expect(openFileKms(folder)).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.sealed' })
  await (await openFileKms(folder, passphrase('correct horse'))).close()
  rmSync(folder, { recursive: true })
  await made()
  await expect(openFileKms(folder, passphrase('correct horse'))).rejects.toMatchObject({ code: 'unauthenticated' })
})

test('key file: another one, a missing one and one that others can read are refused', async () => {
  await made()
  const path = join(folder, 'master.key')
  const right = readFileSync(path)
  writeFileSync(path, Buffer.alloc(32, 7))
  await expect(openFileKms(folder)).rejects.toMatchObject({ code: 'unauthenticated', reason: 'kms.key-file' })
  rmSync(path)
  await expect(openFileKms(folder)).rejects.toMatchObject({ code: 'unavailable', reason: 'kms.sealed' })
  expect(existsSync(path)).toBe(false)
  writeFileSync(path, right, { mode: 0o600 })
  chmodSync(path, 0o640)
  await expect(openFileKms(folder)).rejects.toMatchObject({ code: 'forbidden' })
  chmodSync(path, 0o600)
  await (await openFileKms(folder)).close()
})

test('every file is for its owner only, and none holds a key in the clear', async () => {
  await made()
  const kms = await openFileKms(folder)
  const spki = Buffer.from((await kms.describe('a'))?.spki ?? [])
  await kms.close()
  for (const name of readdirSync(folder)) {
    expect(statSync(join(folder, name)).mode & 0o777).toBe(0o600)
    expect(readFileSync(join(folder, name)).includes(spki.subarray(-64))).toBe(false)
  }
})

test('a key file changed in any byte, cut, or copied over another is noticed', async () => {
  await made()
  const path = join(folder, 'a.key.cbor')
  const right = readFileSync(path)
  const refused = { code: 'internal', reason: 'kms.tampered' }
  // The number of uses is the one field that is not authenticated: it can be raised and lowered, nothing else.
  const uses = right.indexOf('uses') + 4
  for (const at of right.keys().filter((index) => index % 3 === 0 && (index < uses || index > uses + 4))) {
    const changed = Buffer.from(right)
    changed[at] = (changed[at] ?? 0) ^ 1
    writeFileSync(path, changed)
    await expect(openFileKms(folder)).rejects.toMatchObject(refused)
  }
  writeFileSync(path, right.subarray(0, -1))
  await expect(openFileKms(folder)).rejects.toMatchObject(refused)
  copyFileSync(join(folder, 'b.key.cbor'), path)
  await expect(openFileKms(folder)).rejects.toMatchObject(refused)
  writeFileSync(path, right)
  await (await openFileKms(folder)).close()
})

test('what a crash left behind is removed; counts are never too low after one', async () => {
  await made()
  writeFileSync(join(folder, '.c.key.cbor.new'), 'half')
  writeFileSync(join(folder, '.d.key.cbor.gone'), 'whole')
  const crashed = await openFileKms(folder)
  await crashed.sign([{ key: 'a', purpose: 'audit-signing', data: new Uint8Array(1) }])
  const kms = await openFileKms(folder)
  expect(readdirSync(folder).filter((name) => name.startsWith('.'))).toEqual([])
  expect((await kms.describe('a'))?.uses).toBeGreaterThanOrEqual(1)
  await kms.close()
})
