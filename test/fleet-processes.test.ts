import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'
import { expect, test } from 'vitest'
import { openWorld } from './world.ts'

const program = fileURLToPath(new URL('../firmware-sim/main.ts', import.meta.url))

interface Told {
  readonly processes: number
  readonly perBoard: number | null
  readonly connections: number
  readonly habits: Readonly<Record<string, { boards: number; on: number; enrolled: number; connected: number }>>
  readonly keys: Readonly<Record<string, Readonly<Record<string, number>>>>
}

const sum = (told: Told | undefined, of: 'boards' | 'on' | 'enrolled' | 'connected'): number =>
  Object.values(told?.habits ?? {}).reduce((total, share) => total + share[of], 0)

test('fleetkey-sim run --devices: hands its boards to a server, enrols them in several processes, and comes back without enrolling again', async () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-fleet-'))
  const world = await openWorld()
  /** Runs until `done` holds for what it tells, or fails; everything it told. */
  const fleet = async (words: readonly string[], done: (told: Told) => boolean): Promise<readonly Told[]> => {
    const child = spawn(process.execPath, [program, 'run', '--devices', '12', '--data', join(folder, 'fleet'), '--processes', '2', '--json', ...words], {
      stdio: ['ignore', 'pipe', 'inherit'],
    })
    const ended = once(child, 'close') as Promise<[number | null]>
    const all: Told[] = []
    let rest = ''
    let stopping = false
    child.stdout.on('data', (chunk: Buffer) => {
      const lines = (rest + chunk.toString()).split('\n')
      rest = lines.pop() ?? ''
      for (const line of lines) {
        const told = JSON.parse(line) as Told
        all.push(told)
        if (!stopping && done(told)) {
          stopping = true
          child.kill('SIGTERM')
        }
      }
    })
    expect((await ended)[0]).toBe(0)
    return all
  }
  try {
    await world.client.call('group.create', { body: { id: 'plant' } })
    await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    const mix = 'flaky=0.2,slow-tpm=0.1,wrong-clock=0.2'
    const words = ['--server-data', join(world.folder, 'server'), '--group', 'plant', '--profile', mix, '--seed', '2', '--for', '90']
    const first = await fleet(words, (told) => sum(told, 'connected') === 12 && told.keys['telemetry']?.['1'] === 12)
    expect(first.at(0)).toMatchObject({ processes: 2 })
    expect(sum(first.at(-2), 'enrolled')).toBe(12)
    expect(first.at(-2)?.perBoard).toBeGreaterThan(0)
    const enrolments = async (): Promise<number> => {
      let entries = 0
      await world.client.stream('/api/1/audit/export', (chunk) => void (entries += chunk.split('"enrol.issue"').length - 1))
      return entries
    }
    const before = await enrolments()
    expect(before).toBeGreaterThanOrEqual(12)

    // Against a bundle and boards that are there already, as on another machine: no token, and no enrolment.
    writeFileSync(join(folder, 'bundle.json'), JSON.stringify(world.bundle))
    const again = await fleet(
      ['--bundle', join(folder, 'bundle.json'), '--factory', join(folder, 'fleet', 'factory'), '--for', '60'],
      (told) => sum(told, 'connected') === 12 && told.keys['telemetry']?.['1'] === 12,
    )
    expect(sum(again.at(-2), 'connected')).toBe(12)
    expect(await enrolments()).toBe(before)
  } finally {
    await world.stop()
    rmSync(folder, { recursive: true, force: true })
  }
}, 240_000)

test.for([
  [['--devices', '0'], '--devices'],
  [['--devices', '5', '--profile', 'lazy=1'], '--profile takes shares'],
  [['--devices', '5', '--factory', 'nowhere'], 'no batch.json'],
] as const)('fleetkey-sim run %s is refused in words', async ([words, want]) => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-fleet-'))
  try {
    const child = spawn(process.execPath, [program, 'run', '--data', join(folder, 'fleet'), ...words], { stdio: ['ignore', 'ignore', 'pipe'] })
    let said = ''
    child.stderr.on('data', (chunk: Buffer) => (said += chunk.toString()))
    expect(((await once(child, 'close')) as [number | null])[0]).toBe(1)
    expect(said).toContain(want)
  } finally {
    rmSync(folder, { recursive: true, force: true })
  }
})
