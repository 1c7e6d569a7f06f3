import { randomBytes } from 'node:crypto'
import { expect, test } from 'vitest'
import { concat, sized, u16, u32, u8, empty } from '@fleetkey/tpm2/bytes.ts'
import { alg, command, handle as known, tag } from '@fleetkey/tpm2/constants.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import { createSoftwareTpm, type SoftwareTpm } from './software-tpm.ts'

const random = (length: number): Uint8Array => new Uint8Array(randomBytes(length))

/** A TPM on a clock of its own; `states`: what it had saved. */
const board = (state?: Uint8Array): { tpm: SoftwareTpm; client: Tpm; pass: (milliseconds: number) => void; saved: () => Uint8Array } => {
  let now = 1_000_000
  let saved = state ?? empty
  const keep = (bytes: Uint8Array): void => {
    saved = bytes
  }
  const tpm = createSoftwareTpm({ random, now: () => now, save: keep, ...(state === undefined ? {} : { state }) })
  const pass = (milliseconds: number): void => {
    now += milliseconds
  }
  return { tpm, client: new Tpm(tpm.transport(), { random }), pass, saved: () => saved }
}

/** A command with one password; its response code. */
const rcOf = (tpm: SoftwareTpm, of: { code: number; handle: number; password?: Uint8Array; parameters?: Uint8Array }): number => {
  const area = concat(u32(known.password), sized(empty), u8(1), sized(of.password ?? empty))
  const body = concat(u32(of.handle), u32(area.length), area, of.parameters ?? empty)
  return Buffer.from(tpm.execute(concat(u16(tag.sessions), u32(10 + body.length), u32(of.code), body))).readUInt32BE(6)
}
const changeAuth = (tpm: SoftwareTpm, value: Uint8Array, password: Uint8Array = empty): number =>
  rcOf(tpm, { code: command.hierarchyChangeAuth, handle: known.lockout, password, parameters: sized(value) })

test('the clock is safe after an orderly shutdown; after a pulled plug only when it has passed what was written last', async () => {
  const { tpm, client, pass } = board()
  expect(await client.readClock()).toMatchObject({ safe: true, restartCount: 0 })
  const { resetCount } = await client.readClock()
  tpm.powerCycle({ shutdown: 'none' })
  expect(await client.readClock()).toMatchObject({ safe: false, resetCount: resetCount + 1 })
  pass(4_096)
  expect(await client.readClock()).toMatchObject({ safe: true, resetCount: resetCount + 1 })
  tpm.powerCycle({ shutdown: 'state' })
  expect(await client.readClock()).toMatchObject({ safe: true, resetCount: resetCount + 1, restartCount: 1 })
})

test('a start at locality 3 is told in PCR 0', async () => {
  const { tpm, client } = board()
  const pcr0 = async (): Promise<number | undefined> => (await client.pcrRead(alg.sha256, [0])).get(0)?.at(-1)
  expect(await pcr0()).toBe(0)
  tpm.powerCycle({ startup: 3 })
  expect(await pcr0()).toBe(3)
})

test('a TPM that nobody has started takes nothing but a start', async () => {
  const { tpm, client } = board()
  tpm.powerCycle({ startup: 'none' })
  await expect(client.getRandom(8)).rejects.toMatchObject({ code: 0x100 })
  await client.startup()
  expect(await client.getRandom(8)).toHaveLength(8)
})

test('the lockout value, tried wrong, is refused until its time is over, also with power off in between', () => {
  const first = board()
  const secret = new TextEncoder().encode('lockout')
  expect(changeAuth(first.tpm, secret)).toBe(0)
  expect(changeAuth(first.tpm, empty)).toBe(0x98e)
  expect(changeAuth(first.tpm, empty, secret)).toBe(0x921)
  const second = board(first.saved())
  expect(changeAuth(second.tpm, empty, secret)).toBe(0x921)
  second.pass(999_000)
  expect(changeAuth(second.tpm, empty, secret)).toBe(0x921)
  second.pass(2_000)
  expect(changeAuth(second.tpm, empty, secret)).toBe(0)
})

test('what it has saved is all that it was', async () => {
  const first = board()
  await first.client.nvStore(0x0150_0001, new Uint8Array(40).fill(3))
  const { resetCount } = await first.client.readClock()
  const second = board(first.saved())
  expect(await second.client.nvRead(0x0150_0001)).toEqual(new Uint8Array(40).fill(3))
  expect((await second.client.readClock()).resetCount).toBe(resetCount + 1)
})
