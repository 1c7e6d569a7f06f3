import { createECDH } from 'node:crypto'
import { join } from 'node:path'
import { afterAll, beforeAll, expect, test } from 'vitest'
import { examine, type Examination } from '@fleetkey/device-agent/doctor/examine.ts'
import type { Board } from '@fleetkey/firmware-sim/board/board.ts'
import { command, handle } from '@fleetkey/tpm2/constants.ts'
import { openDeviceKeys, provision } from '@fleetkey/tpm2/device-keys.ts'
import { OtherEk } from '@fleetkey/tpm2/errors.ts'
import { parsePublic, type EccPublic } from '@fleetkey/tpm2/structures.ts'
import { templates } from '@fleetkey/tpm2/templates.ts'
import { Tpm } from '@fleetkey/tpm2/tpm.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import { openWorld, random, until, type Machine, type World } from './world.ts'

type Simulated = Machine & { readonly board: Board }
const codeOf = (bytes: Uint8Array): number => Buffer.from(bytes).readUInt32BE(6)

/** Somebody on the bus who shows a key of his own in the place of the EK: what sessions are salted to is then his to read. */
const posing = async (machine: Simulated) => {
  const honest = new Tpm(await machine.openTpm(), { random })
  const ek = await honest.createPrimary(handle.endorsement, templates.ekEcc)
  await honest.flush(ek.handle)
  const { x, y } = parsePublic(ek.public) as EccPublic
  const own = new Uint8Array(createECDH('prime256v1').generateKeys())
  const state = { on: true, sent: [] as number[] }
  const openTpm = async (): Promise<Transport> => {
    const inner = await machine.openTpm()
    return {
      async send(bytes) {
        state.sent.push(codeOf(bytes))
        const response = await inner.send(bytes)
        const at = Buffer.from(response).indexOf(x)
        if (!state.on || codeOf(bytes) !== command.createPrimary || at < 0) return response
        const changed = response.slice()
        changed.set(own.subarray(1, 33), at)
        changed.set(own.subarray(33), Buffer.from(response).indexOf(y))
        return changed
      },
      close: inner.close,
    }
  }
  return { state, openTpm }
}

let world: World
let boards: readonly Simulated[]
beforeAll(async () => {
  world = await openWorld()
  boards = await Promise.all(['GW-1', 'GW-2', 'GW-3'].map(async (serial) => await world.simulated(serial)))
  await world.enlist(boards, 'plant')
}, 60_000)
afterAll(async () => await world.stop())
const boardOf = (at: number): Simulated => boards[at] ?? boards[0] ?? (Promise.reject<never>(new Error('no board')) as never)

const doctor = async (serial: string, open: () => Promise<Transport>): Promise<Examination> =>
  await examine({
    tpm: 'in-process',
    tpmAuth: {},
    data: join(world.folder, 'agents', serial),
    eventLog: null,
    imaList: null,
    root: world.folder,
    open,
    random,
    now: Date.now(),
  })
const pinOf = ({ findings }: Examination): string =>
  findings
    .filter(({ check }) => check === 'EK of this device')
    .map(({ grade, found }) => `${grade}: ${found}`)
    .join()

test('once enrolled the agent goes on with that EK only: nothing is salted to another, and it is back with the right one', { timeout: 120_000 }, async () => {
  const machine = boardOf(0)
  let agent = world.agent(machine)
  await until('connected', () => agent.status().connected, 60_000)
  await agent.stop()
  expect(pinOf(await doctor('GW-1', machine.openTpm))).toBe('ok: the one that it enrolled with')
  const { state, openTpm } = await posing(machine)
  agent = world.agent({ ...machine, openTpm })
  await until('it says so', () => agent.status().problem !== null, 60_000)
  expect(agent.status().problem).toMatch(/^the endorsement key of this TPM \(000b[0-9a-f]{64}\) is not the one that this device enrolled with \(000b/)
  expect(agent.status()).toMatchObject({ connected: false, state: 'opening' })
  expect(state.sent).toContain(command.createPrimary)
  expect(state.sent).not.toContain(command.startAuthSession)
  const found = await doctor('GW-1', openTpm)
  expect(pinOf(found)).toMatch(/^fail: the endorsement key of this TPM/)
  expect(found.ready).toBe(false)
  state.on = false
  await until('it is back', () => agent.status().connected, 60_000)
  expect(agent.status().problem).toBeNull()
  await agent.stop()
})

test('a board whose TPM is another one does not go on either', { timeout: 120_000 }, async () => {
  const [machine, other] = [boardOf(1), boardOf(2)]
  let agent = world.agent(machine)
  await until('connected', () => agent.status().connected, 60_000)
  await agent.stop()
  agent = world.agent({ ...machine, openTpm: other.openTpm })
  await until('it says so', () => agent.status().problem !== null, 60_000)
  expect(agent.status().problem).toMatch(/not the one that this device enrolled with/)
  await agent.stop()
})

test('before the first enrolment it cannot know: a session is salted to the other key, and no identity comes of it', { timeout: 120_000 }, async () => {
  const machine = boardOf(2)
  expect(pinOf(await doctor('GW-3', machine.openTpm))).toMatch(/^ok: not enrolled yet/)
  const { state, openTpm } = await posing(machine)
  const agent = world.agent({ ...machine, openTpm })
  await until('it has tried', () => agent.status().problem !== null, 60_000)
  expect(state.sent).toContain(command.startAuthSession)
  expect(agent.status()).toMatchObject({ device: null, connected: false })
  expect((await world.client.call('device.show', { params: { id: 'gw-3' } })).state).toBe('registered')
  state.on = false
  await until('it enrols', () => agent.status().connected, 60_000)
  await agent.stop()
  expect(pinOf(await doctor('GW-3', machine.openTpm))).toBe('ok: the one that it enrolled with')
})

test('within one run too: after a reset of the TPM another EK is refused, whatever was known before', async () => {
  const machine = boardOf(2)
  const { state, openTpm } = await posing(machine)
  state.on = false
  const tpm = new Tpm(await openTpm(), { random })
  const keys = await openDeviceKeys(tpm, await provision(tpm))
  state.on = true
  machine.board.boot()
  state.sent.length = 0
  await expect(keys.sign(random(8))).rejects.toThrow(OtherEk)
  expect(state.sent).not.toContain(command.startAuthSession)
  state.on = false
  expect(await keys.sign(random(8))).toHaveLength(64)
  await keys.close()
})
