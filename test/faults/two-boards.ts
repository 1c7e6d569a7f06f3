import { randomBytes } from 'node:crypto'
import { mkdtempSync, rmSync } from 'node:fs'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterAll, beforeAll } from 'vitest'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'

/** A factory folder with two boards, for the kill runs of one test file: made before its tests, gone after them. `now`: when the boards are made. */
export const twoBoards = (now: () => number = Date.now): { readonly factory: string; readonly serials: readonly [string, string] } => {
  const factory = mkdtempSync(join(tmpdir(), 'fk-factory-'))
  beforeAll(async () => {
    const order = { batch: 'batch-1', model: 'gateway', station: 'line-1', devices: 2, release: { name: '1.0.0', number: 1 } }
    await writeBatch(factory, await makeBatch(order, { random: (length) => new Uint8Array(randomBytes(length)), now }))
  }, 60_000)
  afterAll(() => rmSync(factory, { recursive: true, force: true }))
  return { factory, serials: ['GATEWAY-BATCH-1-0001', 'GATEWAY-BATCH-1-0002'] }
}
