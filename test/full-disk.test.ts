import { spawnSync } from 'node:child_process'
import { mkdirSync, mkdtempSync, rmSync, symlinkSync, writeFileSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { openWorld, until } from './world.ts'

test('a full disk: nothing is acknowledged, the alarm is raised, a revocation goes through, it recovers', { timeout: 120_000 }, async ({ skip }) => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-full-'))
  const disk = mkdtempSync(join(tmpdir(), 'fk-disk-'))
  const mounted = process.getuid?.() === 0 ? spawnSync('mount', ['-t', 'tmpfs', '-o', 'size=32m', 'tmpfs', disk], { encoding: 'utf8' }) : undefined
  if (mounted?.status !== 0) {
    const why = mounted === undefined ? 'needs root' : mounted.stderr.trim()
    if (process.env['CI'] === 'true' && mounted !== undefined) throw new Error(`cannot mount a small disk: ${why}`)
    process.stderr.write(`NOT RUN: full disk of a server (${why})\n`)
    return skip('no small disk can be mounted here')
  }
  try {
    mkdirSync(join(disk, 'server'))
    symlinkSync(join(disk, 'server'), join(folder, 'server'))
    const world = await openWorld({ folder })
    try {
      const { client, lines } = world
      const [one, two] = [await world.simulated('GW-1'), await world.simulated('GW-2')]
      await world.enlist([one, two], 'plant')
      const first = world.agent(one)
      await until('the first is connected', () => first.status().connected)
      await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
      await client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
      await until('it uses the key', () => first.status().current['telemetry'] === 1)

      // Fill it to the last block, while somebody writes.
      const ballast = join(disk, 'ballast')
      for (let size = 1 << 20; size >= 512; size >>= 1)
        for (let part = 0; ; part++)
          try {
            writeFileSync(`${ballast}-${size}-${part}`, new Uint8Array(size))
          } catch {
            break
          }
      let created = 0
      const refused = await (async (): Promise<string> => {
        for (;;)
          try {
            await client.call('key.create', { body: { id: `k-${created}`, protection: 'sealed' } })
            created++
          } catch (thrown) {
            return (thrown as { code?: string }).code ?? String(thrown)
          }
      })()
      expect(refused).toBe('unavailable')
      await until('the alarm is raised', () => lines.some((line) => line.startsWith('ALARM: the store is read-only')))

      // A device that enrols now is told to come back, and has no identity.
      const second = world.agent(two)
      await until('it is told', () => second.status().lastRefusal !== null)
      expect(second.status()).toMatchObject({ device: null, lastRefusal: 'unavailable' })
      // What is there can be read.
      expect((await client.call('device.show', { params: { id: 'gw-1' } })).state).toBe('enrolled')
      expect((await client.call('device.show', { params: { id: 'gw-2' } })).state).toBe('registered')
      // A revocation has room kept for it.
      await client.call('device.revoke', { params: { id: 'gw-1' }, body: { reason: 'stolen' } }).catch(() => undefined)
      expect((await client.call('device.show', { params: { id: 'gw-1' } })).state).toBe('revoked')
      await until('its session is closed', () => !first.status().connected)

      rmSync(`${ballast}-${1 << 20}-0`)
      rmSync(`${ballast}-${1 << 20}-1`)
      await until('it can be written again', () => lines.some((line) => line.includes('can be written again')), 30_000)
      await client.call('key.create', { body: { id: 'afterwards', protection: 'sealed' } })
      await until('the second has an identity', () => second.status().connected, 60_000)
      // Everything that was acknowledged is there.
      const keys = (await client.call('key.list')).items.map(({ id }) => String(id))
      for (let count = 0; count < created; count++) expect(keys).toContain(`k-${count}`)
    } finally {
      await world.stop()
    }
  } finally {
    spawnSync('umount', ['-l', disk])
    for (const one of [folder, disk]) rmSync(one, { recursive: true, force: true })
  }
})
