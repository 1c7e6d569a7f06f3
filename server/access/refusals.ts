/** Refusals of peers without identity: counted per reason and source prefix, written as one bounded summary a minute. */
export interface RefusalCounter {
  count(
    intent: { readonly caller: { readonly from: string }; readonly action: string; readonly subject: string },
    problem: { readonly code: string; readonly reason: string | undefined; readonly message: string },
    at: number,
  ): void
  /** The summary since the last call, or undefined if there was nothing. At most `maxKinds` lines, each with its first example. */
  take(): string | undefined
}

const maxKinds = 64

export const refusalCounter = (): RefusalCounter => {
  let kinds = new Map<string, { count: number; example: string }>()
  let others = 0
  return {
    count(intent, problem) {
      const kind = `${intent.action} ${problem.reason ?? problem.code} from ${intent.caller.from}`.slice(0, 160)
      const known = kinds.get(kind)
      if (known !== undefined) known.count++
      else if (kinds.size < maxKinds) kinds.set(kind, { count: 1, example: `${intent.subject}: ${problem.message}`.slice(0, 200) })
      else others++
    },
    take() {
      if (kinds.size === 0 && others === 0) return undefined
      const lines = [...kinds].map(([kind, { count, example }]) => `${count} × ${kind} (first: ${example})`)
      if (others > 0) lines.push(`${others} × other`)
      kinds = new Map()
      others = 0
      return lines.join('; ')
    },
  }
}
