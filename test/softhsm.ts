import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { installPkcs11js, pkcs11js } from '@fleetkey/cli/offline/pkcs11js.ts'
import type { Pkcs11Backend } from '@fleetkey/server/kms/orders.ts'
import { hasProgram } from './programs.ts'

const libraries = ['/usr/lib/softhsm/libsofthsm2.so', '/usr/lib64/pkcs11/libsofthsm2.so', '/usr/local/lib/softhsm/libsofthsm2.so']

/** What reaches tokens, built once for this checkout. */
export const addon = fileURLToPath(new URL(`../node_modules/.cache/fleetkey/pkcs11js-${pkcs11js.version}`, import.meta.url))

/** Whether tests can use a PKCS#11 token: SoftHSM2 and a compiler are here, and the add-on can be built. */
export const hasSoftHsm = (): boolean => {
  if (!hasProgram('softhsm2-util') || !hasProgram('c++')) return false
  try {
    if (!existsSync(addon)) installPkcs11js({ folder: addon })
    return true
  } catch (error) {
    // Another test file has built it meanwhile.
    if (existsSync(addon)) return true
    if (process.env['CI'] === 'true') throw error
    process.stderr.write(`skipped: ${error instanceof Error ? error.message : String(error)}\n`)
    return false
  }
}

export interface SoftHsm {
  readonly backend: Pkcs11Backend
  /** Where the token keeps its objects: taken away, the token is gone. */
  readonly tokens: string
  readonly pinFile: string
}

export const pin = '271828'

/** A fresh token of its own in that folder. */
export const openSoftHsm = (folder: string, changes: Partial<Pkcs11Backend> = {}): SoftHsm => {
  const tokens = join(folder, 'tokens')
  const config = join(folder, 'softhsm2.conf')
  const pinFile = join(folder, 'pin')
  mkdirSync(tokens, { recursive: true })
  writeFileSync(config, `directories.tokendir = ${tokens}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n`)
  writeFileSync(pinFile, `${pin}\n`, { mode: 0o600 })
  const made = spawnSync('softhsm2-util', ['--init-token', '--free', '--label', 'fleetkey', '--so-pin', '3141592653', '--pin', pin], {
    env: { ...process.env, SOFTHSM2_CONF: config },
    encoding: 'utf8',
  })
  if (made.status !== 0) throw new Error(`softhsm2-util: ${made.stderr}`)
  const backend: Pkcs11Backend = {
    kind: 'pkcs11',
    addon,
    module: libraries.find((path) => existsSync(path)) ?? 'libsofthsm2.so',
    token: 'fleetkey',
    pinFile,
    sessions: 4,
    variables: { SOFTHSM2_CONF: config },
    files: { kind: 'file', passphraseFile: null, keyFile: null },
    ...changes,
  }
  return { backend, tokens, pinFile }
}
