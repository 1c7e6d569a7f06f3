import { spawnSync } from 'node:child_process'
import { createHash, timingSafeEqual } from 'node:crypto'
import { existsSync, mkdirSync, mkdtempSync, readdirSync, readFileSync, realpathSync, renameSync, rmSync } from 'node:fs'
import { dirname, join } from 'node:path'

/** The one release that is built: its source is judged by this hash, wherever it comes from. */
export const pkcs11js = {
  version: '2.1.7',
  integrity: 'sha512-hstUuhkFoISF8BmTVRtaZzbF09WjE39K3gzZzUrI8WtRu4cYl4gakkd06I4Kq36kR/mkwVw2T2y3kHXk6JvuHQ==',
} as const

/** It cannot be installed; the message says what is missing. */
export class InstallError extends Error {
  override readonly name = 'InstallError'
}

const run = (program: string, args: readonly string[], cwd: string): void => {
  const { status, stderr, error } = spawnSync(program, args, { cwd, encoding: 'utf8', stdio: ['ignore', 'ignore', 'pipe'] })
  if (error !== undefined) throw new InstallError(`${program}: ${error.message}`)
  if (status !== 0) throw new InstallError(`${program} failed: ${stderr.trim().split('\n').slice(-5).join('\n').slice(0, 2000)}`)
}

const mustBeIt = (tarball: Uint8Array): void => {
  const [wanted, found] = [Buffer.from(pkcs11js.integrity.slice('sha512-'.length), 'base64'), createHash('sha512').update(tarball).digest()]
  if (!timingSafeEqual(wanted, found)) throw new InstallError(`not pkcs11js ${pkcs11js.version} as it was published: its SHA-512 is another`)
}

/** Those of the Node that runs: N-API is stable, so that the add-on loads in later ones too. */
const headersOf = (node: string): string => {
  const headers = join(dirname(dirname(realpathSync(node))), 'include', 'node')
  if (!existsSync(join(headers, 'node_api.h'))) throw new InstallError(`no headers of Node in ${headers}`)
  return headers
}

const loads = (folder: string): boolean =>
  spawnSync(process.execPath, ['-e', `new (require(process.argv[1]).PKCS11)()`, join(folder, 'index.js')], { stdio: 'ignore' }).status === 0

/**
 * Builds pkcs11js from its source into `folder` with the system's compiler (`CXX`, else c++). Without `tarball` the source comes by `npm pack`. False when it was
 * there already. A crash leaves the folder as it was, and `<folder>.new-…` beside it. Throws InstallError.
 */
export const installPkcs11js = ({ folder, tarball }: { readonly folder: string; readonly tarball?: string | undefined }): boolean => {
  if (existsSync(folder) && loads(folder)) return false
  const headers = headersOf(process.execPath)
  mkdirSync(dirname(folder), { recursive: true, mode: 0o700 })
  const work = mkdtempSync(`${folder}.new-`)
  try {
    if (tarball === undefined) run('npm', ['pack', `pkcs11js@${pkcs11js.version}`, '--ignore-scripts', '--pack-destination', work], work)
    const source = tarball ?? join(work, readdirSync(work).find((name) => name.endsWith('.tgz')) ?? 'none.tgz')
    let bytes: Buffer
    try {
      bytes = readFileSync(source)
    } catch (error) {
      throw new InstallError(`${source}: ${error instanceof Error ? error.message : String(error)}`)
    }
    mustBeIt(bytes)
    run('tar', ['-xzf', source, '-C', work], work)
    const made = join(work, 'package')
    const built = join(made, 'build', 'Release')
    mkdirSync(built, { recursive: true })
    const sources = ['dl', 'common', 'main'].map((name) => `src/${name}.cpp`)
    const flags = ['-std=c++17', '-O2', '-fPIC', '-shared', '-DNAPI_DISABLE_CPP_EXCEPTIONS', '-DNODE_GYP_MODULE_NAME=pkcs11', '-DBUILDING_NODE_EXTENSION']
    run(process.env['CXX'] ?? 'c++', [...flags, '-Iincludes', `-I${headers}`, '-o', join(built, 'pkcs11.node'), ...sources], made)
    if (!loads(made)) throw new InstallError('it was built and does not load')
    rmSync(folder, { recursive: true, force: true })
    renameSync(made, folder)
    return true
  } finally {
    rmSync(work, { recursive: true, force: true })
  }
}
