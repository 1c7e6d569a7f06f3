import { readFileSync } from 'node:fs'
import { cpuOf } from './cpu.ts'
import { openControlDevice, percentile, type ControlDevice } from './control-device.ts'
import { connected, patienceFor, type LiveFleet } from './live-fleet.ts'
import { until } from './server.ts'

/** All connections of the fleet break at once. */
export interface Storm {
  /** Seconds until 99 % and until all are back. */
  readonly most: number
  readonly all: number
  /** Server and fleet CPU, milliseconds for each connection. */
  readonly serverCpu: number
  readonly fleetCpu: number
  /** 99th percentile of a report's round trip of a device that stays connected, meanwhile, milliseconds. */
  readonly control: number
}

export interface StormFigures {
  /** Nobody has a ticket that the server takes: every key is proven anew, as after a night. */
  readonly full: Storm
  /** The one after it: whoever has a ticket resumes its TLS session. */
  readonly resumed: Storm
  /** Server CPU of one report that brings nothing new, milliseconds. */
  readonly reportCpu: number
  /** Most resident memory that the server ever had, bytes. */
  readonly memory: number
  /** The control device's 99th percentile before, milliseconds. */
  readonly idle: number
}

/** Within what one connection may send at once. */
const reports = 90

/** Highest resident memory of a process, bytes. */
const peakOf = (pid: number): number => Number(/^VmHWM:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? Number.NaN) * 1024

/** Breaks every connection of the fleet at once and waits for all to be back, while one device that has nothing to do with it goes on reporting. */
const measureOne = async ({ server, fleet, devices, fleetCpu }: LiveFleet, control: ControlDevice): Promise<Storm> => {
  const [cpu, cpuOfFleet, opened] = [cpuOf(server.pid), fleetCpu(), (await fleet.counts()).connections]
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
    fleetCpu: (fleetCpu() - cpuOfFleet) / devices,
    control: percentile(meanwhile, 0.99),
  }
}

/** Two storms: with keys proven anew, for opening the control device has made all tickets worthless; then with sessions resumed. */
export const measureStorms = async (folder: string, live: LiveFleet): Promise<StormFigures> => {
  const { pid } = live.server
  const control = await openControlDevice(folder, live.server)
  try {
    const idle = await control.reports(new Promise((resolve) => void setTimeout(resolve, 20_000)))
    const cpu = cpuOf(pid)
    await control.burst(reports)
    const reportCpu = (cpuOf(pid) - cpu) / reports
    const full = await measureOne(live, control)
    const resumed = await measureOne(live, control)
    return { full, resumed, reportCpu, memory: peakOf(pid), idle: percentile(idle, 0.99) }
  } finally {
    await control.stop()
  }
}
