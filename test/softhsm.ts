import { spawnSync } from 'node:child_process'
import { existsSync, mkdirSync, statSync, writeFileSync } from 'node:fs'
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

/** Options of `server start` for that token. */
export const serverOptions = ({ addon, module, token, pinFile, variables }: Pkcs11Backend): readonly string[] => {
  const options = ['--kms', 'pkcs11', '--pkcs11-addon', addon, '--pkcs11-module', module, '--pkcs11-token', token, '--pkcs11-pin-file', pinFile]
  return options.concat(Object.entries(variables).flatMap(([name, value]) => ['--pkcs11-env', `${name}=${value}`]))
}

/** A token whose mood a test can change. */
export interface MoodyToken extends SoftHsm {
  /** `delay MS`: each signature takes that long; `fail`: signatures fail as if the device were gone; empty: neither. */
  mood(said: string): void
  /** How often somebody tried to log in. */
  logins(): number
}

/** SoftHSM behind a library that stands in its way when it is told to (token-interposer.cpp). */
export const openMoodyToken = (folder: string, changes: Partial<Pkcs11Backend> = {}): MoodyToken => {
  const token = openSoftHsm(folder)
  const [library, moodFile, loginsFile] = [join(folder, 'interposer.so'), join(folder, 'mood'), join(folder, 'logins')]
  const source = fileURLToPath(new URL('./token-interposer.cpp', import.meta.url))
  const built = spawnSync('c++', ['-std=c++17', '-fPIC', '-shared', `-I${addon}/includes`, '-o', library, source, '-ldl'], { encoding: 'utf8' })
  if (built.status !== 0) throw new Error(built.stderr)
  const { module, variables } = token.backend
  const ours = { FLEETKEY_TOKEN_LIBRARY: module, FLEETKEY_TOKEN_MOOD: moodFile, FLEETKEY_TOKEN_LOGINS: loginsFile }
  return {
    ...token,
    backend: { ...token.backend, module: library, variables: { ...variables, ...ours }, ...changes },
    mood: (said) => writeFileSync(moodFile, said),
    logins: () => (existsSync(loginsFile) ? statSync(loginsFile).size : 0),
  }
}
