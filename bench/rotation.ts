import { cpuOf } from './cpu.ts'
import { patienceFor, type LiveFleet } from './live-fleet.ts'
import { until } from './server.ts'

export interface RotationFigures {
  /** Seconds from the order until 99 %, and until all have proven the new epoch in use. */
  readonly most: number
  readonly all: number
  /** Server and fleet CPU, milliseconds for each device. */
  readonly serverCpu: number
  readonly fleetCpu: number
  /** Audit entries for each device. */
  readonly entries: number
}

/** Rotates the group's key: one wave, every device connected. What counts is what the server has seen proven. */
export const measureRotation = async (live: LiveFleet): Promise<RotationFigures> => {
  const { server, devices } = live
  const { client } = server
  const [cpu, fleetCpu] = [cpuOf(server.pid), live.fleetCpu()]
  const entries = async (): Promise<number> => (await client.call('status')).audit.size
  const before = await entries()
  const started = performance.now()
  const { campaign } = await client.call('key.rotate', { params: { id: 'telemetry' }, body: { deadline: 600_000 } })
  let most = Number.NaN
  await until(async () => {
    await new Promise((resolve) => void setTimeout(resolve, 200))
    const { counts } = await client.call('campaign.show', { params: { id: campaign } })
    const proven = (counts['active'] ?? 0) + (counts['retired'] ?? 0)
    if (Number.isNaN(most) && proven >= devices * 0.99) most = performance.now() - started
    return proven === devices
  }, patienceFor(devices))
  const all = performance.now() - started
  const written = ((await entries()) - before) / devices
  return {
    most: most / 1_000,
    all: all / 1_000,
    entries: written,
    serverCpu: (cpuOf(server.pid) - cpu) / devices,
    fleetCpu: (live.fleetCpu() - fleetCpu) / devices,
  }
}
