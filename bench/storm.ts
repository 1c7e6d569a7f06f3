import { readFileSync } from 'node:fs'
import { cpuOf } from './cpu.ts'
import { openControlDevice, percentile } from './control-device.ts'
import { connected, patienceFor, type LiveFleet } from './live-fleet.ts'
import { until } from './server.ts'

export interface StormFigures {
  /** Seconds until 99 % and until all are back. */
  readonly most: number
  readonly all: number
  /** Server and fleet CPU, milliseconds for each connection. */
  readonly serverCpu: number
  readonly fleetCpu: number
  /** Server CPU of one report that brings nothing new, milliseconds. */
  readonly reportCpu: number
  /** Most resident memory that the server ever had, bytes. */
  readonly memory: number
  /** 99th percentile of a report's round trip of a device that stays connected, milliseconds: before, and meanwhile. */
  readonly idle: number
  readonly meanwhile: number
}

/** Within what one connection may send at once. */
const reports = 90

/** Highest resident memory of a process, bytes. */
const peakOf = (pid: number): number => Number(/^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? Number.NaN) * 1024

/** Breaks every connection of the fleet at once and waits for all to be back, while one device that has nothing to do with it goes on reporting. */
export const measureStorm = async (folder: string, live: LiveFleet): Promise<StormFigures> => {
  const { server, fleet, devices } = live
  const control = await openControlDevice(folder, server)
  try {
    const idle = await control.reports(new Promise((resolve) => void setTimeout(resolve, 20_000)))
    const quiet = cpuOf(server.pid)
    await control.burst(reports)
    const reportCpu = (cpuOf(server.pid) - quiet) / reports
    const [cpu, fleetCpu, opened] = [cpuOf(server.pid), live.fleetCpu(), (await fleet.counts()).connections]
    const started = performance.now()
    let most = Number.NaN
    const back = (async (): Promise<void> => {
      await fleet.unplug()
      await until(async () => {
        await new Promise((resolve) => void setTimeout(resolve, 500))
        const counts = await fleet.counts()
        const there = counts.connections - opened
        if (Number.isNaN(most) && there >= devices * 0.99 && connected(counts) >= devices * 0.99) most = performance.now() - started
        return there >= devices && connected(counts) === devices
      }, patienceFor(devices))
    })()
    const meanwhile = await control.reports(back)
    await back
    const all = performance.now() - started
    return {
      most: most / 1_000,
      all: all / 1_000,
      serverCpu: (cpuOf(server.pid) - cpu) / devices,
      fleetCpu: (live.fleetCpu() - fleetCpu) / devices,
      reportCpu,
      memory: peakOf(server.pid),
      idle: percentile(idle, 0.99),
      meanwhile: percentile(meanwhile, 0.99),
    }
  } finally {
    await control.stop()
  }
}
