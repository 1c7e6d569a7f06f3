import { readFileSync } from 'node:fs'

/** CPU time of a process so far, milliseconds (user and system, proc(5)). */
export const cpuOf = (pid: number): number => {
  const fields = readFileSync(`/proc/${pid}/stat`, 'utf8')
    .replace(/^.*\) /s, '')
    .split(' ')
  // utime and stime are fields 14 and 15, in ticks of 10 ms.
  return (Number(fields[11]) + Number(fields[12])) * 10
}

/** Resident memory of a process, bytes. */
export const memoryOf = (pid: number): number => Number(/^VmRSS:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, 'utf8'))?.[1] ?? Number.NaN) * 1024

/** CPU milliseconds of one call, median of rounds. */
export const cpuPerCall = (work: () => unknown, of: { rounds: number; calls: number } = { rounds: 5, calls: 200 }): number => {
  const rounds = Array.from({ length: of.rounds }, () => {
    const before = process.cpuUsage()
    for (let call = 0; call < of.calls; call++) work()
    const { user, system } = process.cpuUsage(before)
    return (user + system) / 1000 / of.calls
  })
  return rounds.toSorted((one, other) => one - other)[of.rounds >> 1] ?? Number.NaN
}
