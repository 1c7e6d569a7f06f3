// Makes sure that the dependencies are there, then runs a script under the pinned Node: `node setup.mjs SCRIPT [ARGUMENT …]`.
// Plain JavaScript in Node 20 syntax: this runs before Node 26 is there.
import { spawn, spawnSync } from 'node:child_process'
import { createHash } from 'node:crypto'
import { existsSync, readFileSync, writeFileSync } from 'node:fs'
import { constants } from 'node:os'
import { dirname, join } from 'node:path'
import { fileURLToPath } from 'node:url'

const root = dirname(fileURLToPath(import.meta.url))
const modules = join(root, 'node_modules')
const marker = join(modules, '.fleetkey-installed')
const wanted = createHash('sha256')
  .update(readFileSync(join(root, 'package-lock.json')))
  .digest('hex')

// The marker is written last: an interrupted installation is done again.
const installed = () => existsSync(marker) && readFileSync(marker, 'utf8') === wanted

const install = () => {
  process.stderr.write('fleetkey: installing dependencies (npm ci) …\n')
  const npm = process.env.npm_execpath
  const [command, first] = npm !== undefined && /\.[cm]?js$/.test(npm) ? [process.execPath, [npm]] : ['npm', []]
  const done = spawnSync(command, [...first, 'ci', '--loglevel=error'], { cwd: root, stdio: ['ignore', process.stderr, process.stderr] })
  if (done.status !== 0) {
    process.stderr.write(`fleetkey: npm ci failed${done.error === undefined ? '' : `: ${done.error.message}`}\n`)
    process.exit(done.status ?? 1)
  }
  writeFileSync(marker, wanted)
}

/** The Node that came with the dependencies, else this one if it is new enough. */
const node = () => {
  const pinned = join(modules, '.bin', 'node')
  if (existsSync(pinned)) return pinned
  const [major, minor] = process.versions.node.split('.').map(Number)
  if (major > 24 || (major === 24 && minor >= 7)) return process.execPath
  process.stderr.write(`fleetkey: no pinned Node for ${process.platform}-${process.arch}, and Node ${process.versions.node} is older than 24.7\n`)
  return process.exit(1)
}

if (!installed()) install()
const [script, ...args] = process.argv.slice(2)
if (script !== undefined) {
  // npm puts the folder of its own Node first in PATH; children are to find the pinned one.
  const env = { ...process.env, PATH: `${join(modules, '.bin')}:${process.env.PATH ?? ''}` }
  const child = spawn(node(), [join(root, script), ...args], { stdio: 'inherit', env })
  for (const signal of ['SIGINT', 'SIGTERM', 'SIGHUP']) process.on(signal, () => child.kill(signal))
  child.on('error', (error) => {
    process.stderr.write(`fleetkey: ${error.message}\n`)
    process.exit(1)
  })
  child.on('exit', (code, signal) => process.exit(code ?? 128 + (constants.signals[signal] ?? 0)))
}
