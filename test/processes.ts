import { readdirSync, readFileSync } from 'node:fs'

/** State, parent, group and session of a process, as /proc tells them (proc_pid_stat(5)); undefined once it has gone. */
const statOf = (pid: number): readonly string[] | undefined => {
  try {
    const text = readFileSync(`/proc/${pid}/stat`, 'latin1')
    return text.slice(text.lastIndexOf(') ') + 2).split(' ')
  } catch {
    return undefined
  }
}

/** Whether it runs; one that has ended and waits for its parent counts as gone. */
export const isAlive = (pid: number): boolean => {
  const state = statOf(pid)?.[0]
  return state !== undefined && state !== 'Z'
}

/** What runs in a session: whatever a process that was started detached has started, and what that has, also when their parents have gone. */
export const inSession = (session: number): readonly number[] =>
  readdirSync('/proc')
    .filter((name) => /^\d+$/.test(name))
    .map(Number)
    .filter((pid) => statOf(pid)?.[3] === String(session) && isAlive(pid))
