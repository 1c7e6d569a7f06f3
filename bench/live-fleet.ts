import { existsSync, mkdirSync, mkdtempSync, rmSync, statfsSync } from 'node:fs'
import { availableParallelism, setPriority } from 'node:os'
import { join } from 'node:path'
import { makeBatch, writeBatch } from '@fleetkey/firmware-sim/factory/factory.ts'
import { admitBatch } from '@fleetkey/firmware-sim/fleet/admission.ts'
import { allOf, type Counts } from '@fleetkey/firmware-sim/fleet/counts.ts'
import { boardsPerProcess, startFleetProcesses, type FleetProcesses } from '@fleetkey/firmware-sim/fleet/processes.ts'
import { cpuOf } from './cpu.ts'
import { around } from './around.ts'
import { startServer, until, type ServerProcess } from './server.ts'

/** A server and a fleet of real agents in processes beside it, all enrolled and connected, in the group `plant`, all using epoch 1 of the key `telemetry`. */
export interface LiveFleet {
  readonly server: ServerProcess
  readonly fleet: FleetProcesses
  readonly devices: number
  /** Milliseconds of CPU that the fleet's processes have used. */
  fleetCpu(): number
  stop(): Promise<void>
}

/** Deadline of what a fleet of this size does at once. */
export const patienceFor = (devices: number): number => 120 + devices / 5

export const connected = (counts: Counts): number => allOf(counts).connected

/** Devices that use this epoch of `telemetry`, or a newer one. */
export const using = (counts: Counts, epoch: number): number =>
  Object.entries(counts.keys['telemetry'] ?? {}).reduce((sum, [held, devices]) => sum + (Number(held) >= epoch ? devices : 0), 0)

/** Room for the files of one board: it uses a third of it. */
const boardBytes = 128 << 10
const memoryDisk = '/dev/shm'

/**
 * Where the boards have their flash. Real devices have one each: where this machine keeps files in memory and has the room, neither does the fleet wait for the
 * server's disk nor the server for the fleet's.
 */
const flashFolder = (folder: string, devices: number): string => {
  if (!existsSync(memoryDisk)) return join(folder, 'fleet')
  const { bavail, bsize } = statfsSync(memoryDisk)
  return bavail * bsize < devices * boardBytes ? join(folder, 'fleet') : mkdtempSync(join(memoryDisk, 'fleetkey-bench-'))
}

export const openLiveFleet = async (folder: string, devices: number, flags: readonly string[] = []): Promise<LiveFleet> => {
  const data = flashFolder(folder, devices)
  mkdirSync(data, { recursive: true })
  const batch = await makeBatch({ batch: 'fleet', model: 'gateway', station: 'line-1', devices, release: { name: '1.0.0', number: 1 } }, around)
  await writeBatch(join(data, 'factory'), batch)
  const server = await startServer(join(folder, 'server'), { flags })
  try {
    const { client } = server
    await admitBatch(client, join(data, 'factory'), 'plant')
    await client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
    await client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
    const processes = Math.max(availableParallelism(), Math.ceil(devices / boardsPerProcess))
    const serials = batch.boards.map(({ serial }) => serial)
    const bundle = JSON.stringify(await client.call('bundle'))
    const fleet = await startFleetProcesses({ factory: join(data, 'factory'), bundle, data, serials, processes })
    // Real devices compute elsewhere: where a core is wanted by both, the server has it.
    for (const pid of fleet.pids) setPriority(pid, 5)
    try {
      await fleet.on()
      const ready = async (): Promise<boolean> => {
        await new Promise((resolve) => void setTimeout(resolve, 500))
        const counts = await fleet.counts()
        return connected(counts) === devices && using(counts, 1) === devices
      }
      await until(ready, patienceFor(devices))
    } catch (error) {
      await fleet.stop()
      throw error
    }
    return {
      server,
      fleet,
      devices,
      fleetCpu: () => fleet.pids.reduce((sum, pid) => sum + cpuOf(pid), 0),
      async stop() {
        await fleet.stop()
        await server.stop()
        rmSync(data, { recursive: true, force: true })
      },
    }
  } catch (error) {
    await server.stop()
    rmSync(data, { recursive: true, force: true })
    throw error
  }
}
