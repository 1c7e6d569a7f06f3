import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { setTimeout as sleep } from 'node:timers/promises'
import { expect, test } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { openWorld, random } from './world.ts'

const program = fileURLToPath(new URL('../firmware-sim/main.ts', import.meta.url))

test('fleetkey-sim run: told to stop, it says all it has to say, whole lines, and leaves with 0', { timeout: 180_000 }, async () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-sim-'))
  const world = await openWorld()
  try {
    const order = { batch: 'b1', model: 'gateway', station: 'line-1', devices: 300, release: { name: '1.0.0', number: 1 } }
    await writeBatch(join(folder, 'line-1'), await makeBatch(order, { random, now: () => Date.now() }))
    writeFileSync(join(folder, 'bundle.json'), JSON.stringify({ ...world.bundle, server: 'mqtts://127.0.0.1:1' }))
    const words = ['run', '--factory', join(folder, 'line-1'), '--bundle', join(folder, 'bundle.json'), '--data', join(folder, 'boards')]
    const child = spawn(process.execPath, [program, ...words], { stdio: ['ignore', 'pipe', 'ignore'] })
    let text = ''
    const ended = once(child, 'close') as Promise<[number | null]>
    const started = Promise.withResolvers<void>()
    child.stdout.on('data', (chunk: Buffer) => {
      text += chunk.toString()
      if (text.includes('"event":"started"')) started.resolve()
    })
    await started.promise
    // A reader that is slow: the last words wait in the pipe.
    child.stdout.pause()
    child.kill('SIGTERM')
    await sleep(2_000)
    child.stdout.resume()
    expect((await ended)[0]).toBe(0)
    const last = new Map<string, string>()
    for (const line of text.trimEnd().split('\n')) {
      const { serial, state } = JSON.parse(line) as { serial?: string; state?: string }
      if (serial !== undefined && state !== undefined) last.set(serial, state)
    }
    expect([last.size, [...last.values()].every((state) => state === 'stopped')]).toEqual([300, true])
  } finally {
    await world.stop()
    rmSync(folder, { recursive: true, force: true })
  }
})
