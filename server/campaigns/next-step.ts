import { stages, type Campaign, type Stage } from './campaign.ts'

/** Targets per stage, per wave in order. */
export type Progress = readonly Readonly<Record<Stage, number>>[]

/** What a rotation does next. */
export type Step =
  | { readonly do: 'halt'; readonly because: string }
  | { readonly do: 'time-out'; readonly waves: readonly number[]; readonly stages: readonly Stage[] }
  | { readonly do: 'open-wave'; readonly wave: number }
  | { readonly do: 'activate' }
  | { readonly do: 'retire' }
  | { readonly do: 'finish' }
  /** `until`: when asking again makes sense even if nothing happens; null: only an event can change it. */
  | { readonly do: 'wait'; readonly until: number | null }

const sum = (counts: Readonly<Record<Stage, number>>, ...of: readonly Stage[]): number => of.reduce((total, stage) => total + counts[stage], 0)
const total = (counts: Readonly<Record<Stage, number>>): number => sum(counts, ...stages)

/**
 * The decision, pure: same campaign, same progress, same time, same answer; asking twice is harmless. Errors are judged before success.
 * `readableUntil`: end of the recipient-usage period of the epoch that is replaced; null when there is none.
 */
export const nextStep = (campaign: Campaign, progress: Progress, now: number, readableUntil: number | null): Step => {
  const open = progress.slice(0, campaign.wave + 1)
  const due = campaign.since + campaign.policy.deadline
  switch (campaign.state) {
    case 'installing':
      return installing(campaign, open, now, due)
    case 'activating': {
      const failing = halted(campaign, open)
      if (failing !== undefined) return failing
      if (open.some((counts) => sum(counts, 'pending', 'delivered', 'installed') > 0))
        return now >= due ? { do: 'time-out', waves: all(open), stages: ['pending', 'delivered', 'installed'] } : { do: 'wait', until: due }
      return readableUntil === null || now >= readableUntil ? { do: 'retire' } : { do: 'wait', until: readableUntil }
    }
    case 'retiring':
      if (open.some((counts) => counts.active > 0)) return now >= due ? { do: 'time-out', waves: all(open), stages: ['active'] } : { do: 'wait', until: due }
      return { do: 'finish' }
    default:
      return { do: 'wait', until: null }
  }
}

const installing = (campaign: Campaign, open: Progress, now: number, due: number): Step => {
  const failing = halted(campaign, open)
  if (failing !== undefined) return failing
  const waiting = open.reduce((count, counts) => count + sum(counts, 'pending', 'delivered'), 0)
  if (waiting > 0 && now >= due) return { do: 'time-out', waves: all(open), stages: ['pending', 'delivered'] }
  const newest = open.at(-1)
  const last = campaign.wave === campaign.waves - 1
  if (!last && newest !== undefined) {
    const settled = total(newest) - sum(newest, 'pending', 'delivered', 'failed')
    if (settled >= campaign.policy.successThreshold * total(newest)) return { do: 'open-wave', wave: campaign.wave + 1 }
    // Nobody is left who could still succeed, too few did, and not so many failed that it halts by error.
    if (waiting === 0) return { do: 'halt', because: `wave ${campaign.wave + 1}: ${settled} of ${total(newest)} settled, ${newest.failed} failed` }
  }
  if (last && waiting === 0) return { do: 'activate' }
  return { do: 'wait', until: due }
}

/** Error threshold: strictly above it. */
const halted = (campaign: Campaign, open: Progress): Step | undefined => {
  const wave = open.findIndex((counts) => counts.failed > campaign.policy.errorThreshold * total(counts))
  return wave < 0 ? undefined : { do: 'halt', because: `wave ${wave + 1}: ${open[wave]?.failed ?? 0} of ${total(open[wave] ?? ({} as never))} failed` }
}

const all = (open: Progress): readonly number[] => open.map((_, wave) => wave)
