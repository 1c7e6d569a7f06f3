const every = 10_000
const remembered = 1_000

/** Log lines of peers: one per peer and cause in ten seconds, with the number of those left out. Bounded memory. */
export const quietLines = (log: (line: string) => void, now: () => number): ((who: string, cause: string) => void) => {
  const seen = new Map<string, { at: number; more: number }>()
  return (who, cause) => {
    const id = `${who}\n${cause}`
    const last = seen.get(id)
    if (last !== undefined && now() - last.at < every) {
      last.more++
      return
    }
    if (seen.size >= remembered) seen.clear()
    seen.set(id, { at: now(), more: 0 })
    log(`broker: ${who}: ${cause}${last === undefined || last.more === 0 ? '' : ` (and ${last.more} more)`}`)
  }
}
