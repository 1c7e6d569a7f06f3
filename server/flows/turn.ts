const turns = new WeakMap<object, Map<string, Promise<unknown>>>()

/**
 * Work on one subject at a time within this process: saves the store from conflicts that would only be repeated. Correctness rests on the store's
 * compare-and-swap, never on this. `of`: whatever lives as long as the process's part (the store).
 */
export const inTurn = async <R>(of: object, subject: string, work: () => Promise<R>): Promise<R> => {
  const waiting = turns.get(of) ?? new Map<string, Promise<unknown>>()
  turns.set(of, waiting)
  const turn = (waiting.get(subject) ?? Promise.resolve()).then(work, work)
  const settled = turn.catch(() => undefined)
  waiting.set(subject, settled)
  try {
    return await turn
  } finally {
    if (waiting.get(subject) === settled) waiting.delete(subject)
  }
}

/** Everything else that waits has its turn: between the parts of work on a whole fleet, none of which may hold the event loop for 10 ms. */
export const othersFirst = async (): Promise<void> => await new Promise<void>((resolve) => void setImmediate(resolve))
