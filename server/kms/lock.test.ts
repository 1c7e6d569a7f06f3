import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setFlagsFromString } from 'node:v8'
import { runInNewContext } from 'node:vm'
import { expect, test } from 'vitest'
import { lockKeys } from './lock.ts'

setFlagsFromString('--expose-gc')
const collect = runInNewContext('gc') as () => void

test('the lock holds until it is released, though nobody keeps the release', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-lock-'))
  try {
    lockKeys(folder)
    for (let round = 0; round < 5; round++) {
      collect()
      await new Promise((resolve) => void setImmediate(resolve))
    }
    expect(() => lockKeys(folder, { patience: 0 })).toThrow('in use by another process')
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
})

test('released it is free', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-lock-'))
  try {
    lockKeys(folder)()
    expect(lockKeys(folder, { patience: 0 })).not.toThrow()
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
})
