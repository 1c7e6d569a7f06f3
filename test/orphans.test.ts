import { spawn, type ChildProcess } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setTimeout as sleep } from 'node:timers/promises'
import { afterAll, describe, expect, test } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { fleetkey } from './command-line.ts'
import { inSession } from './processes.ts'
import { random, until } from './world.ts'

const program = (name: 'cli' | 'firmware-sim'): string => fileURLToPath(new URL(`../${name}/main.ts`, import.meta.url))
/** Milliseconds that the start of a process may take on a busy machine. */
const patience = 120_000
const session = ({ pid }: ChildProcess): number => pid ?? -1

/** Kills it, and nothing but it, as the kernel does when memory runs out; whatever it has started must follow. */
const killed = async (child: ChildProcess): Promise<void> => {
  const gone = once(child, 'exit')
  child.kill('SIGKILL')
  await gone
  await until('nothing that it has started is left', () => inSession(session(child)).length === 0, patience)
}

const folder = mkdtempSync(join(tmpdir(), 'fk-orphans-'))
const at = (name: string): string => join(folder, name)
const children: ChildProcess[] = []
afterAll(() => {
  for (const child of children) for (const pid of inSession(session(child))) process.kill(pid, 'SIGKILL')
  rmSync(folder, { recursive: true, force: true, maxRetries: 20, retryDelay: 50 })
})

type Told = ChildProcess & { readonly said: () => string }
const start = (name: 'cli' | 'firmware-sim', words: readonly string[], stdin: 'ignore' | 'pipe' = 'ignore'): Told => {
  const child = spawn(process.execPath, [program(name), ...words], { stdio: [stdin, 'pipe', 'inherit'], detached: true })
  children.push(child)
  let text = ''
  child.stdout?.on('data', (chunk: Buffer) => (text += chunk.toString()))
  return Object.assign(child, { said: () => text })
}
const server = (stdin: 'ignore' | 'pipe' = 'ignore'): Told =>
  start('cli', ['server', 'start', '--data', at('data'), '--mqtt-port', '0', '--https-port', '0', '--json', ...(stdin === 'pipe' ? ['--attached'] : [])], stdin)
const ready = async (child: Told): Promise<Told> => {
  await until('it is ready', () => child.said().startsWith('{"ready":true'), patience)
  return child
}

describe('what is killed with -9 leaves no process behind', { timeout: 600_000 }, () => {
  let running: Told

  test('fleetkey server start, at any moment of its start', async () => {
    for (const moment of [200, 800]) {
      const child = server()
      await sleep(moment)
      await killed(child)
    }
    const child = server()
    await until('it has started its KMS process', () => inSession(session(child)).length > 1, patience)
    await killed(child)
    running = await ready(server())
    expect(inSession(session(running))).toHaveLength(2)
  })

  test('fleetkey-sim run --devices, while it starts its processes and while they run', async () => {
    const order = { batch: 'b1', model: 'gateway', station: 'line-1', devices: 20, release: { name: '1.0.0', number: 1 } }
    await writeBatch(at('line-1'), await makeBatch(order, { random, now: () => Date.now() }))
    expect((await fleetkey(['server', 'bundle', '--data', at('data'), '--out', at('bundle')])).code).toBe(0)
    const words = ['run', '--devices', '20', '--processes', '2', '--factory', at('line-1'), '--bundle', at('bundle'), '--data', at('fleet'), '--json']
    const all = (child: ChildProcess): boolean => inSession(session(child)).length === 3
    const first = start('firmware-sim', words)
    await until('its processes are there', () => all(first), patience)
    await killed(first)
    const second = start('firmware-sim', words)
    await until('its boards are on', () => /"on":[1-9]/.test(second.said()), patience)
    expect(all(second)).toBe(true)
    await killed(second)
  })

  test('fleetkey server start, while it serves; it starts again', async () => {
    await killed(running)
    running = await ready(server('pipe'))
  })

  test('fleetkey server start --attached ends, in order, when whoever holds its standard input has gone', async () => {
    const gone = once(running, 'exit')
    running.stdin?.destroy()
    expect(await gone).toEqual([0, null])
    expect(inSession(session(running))).toEqual([])
  })
})
