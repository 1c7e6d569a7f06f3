import type { Context } from '../context.ts'
import { authorityChecks } from './authority.ts'
import { failure, type Around, type Check, type Result } from './check.ts'
import { fleetChecks } from './fleet.ts'
import { issuingChecks } from './issuing.ts'
import { operationChecks } from './operation.ts'

export interface Finding extends Result {
  readonly check: string
  /** Empty when it is ok. */
  readonly remedy: string
}

/** One more check is one more row in one of these files. */
export const checks: readonly Check[] = [...authorityChecks, ...issuingChecks, ...fleetChecks, ...operationChecks]

/** How long one check may take. */
const patience = 5000

const inTime = async (work: Promise<Result>): Promise<Result> => {
  let timer: NodeJS.Timeout | undefined
  const late = new Promise<Result>((resolve) => {
    timer = setTimeout(() => resolve(failure(`not answered within ${patience / 1000} s`)), patience)
  })
  return await Promise.race([work, late]).finally(() => clearTimeout(timer))
}

/** Every check, one after the other: what cannot be checked is a failure of that check alone. */
export const examine = async (ctx: Context, around: Around): Promise<readonly Finding[]> => {
  const findings: Finding[] = []
  for (const { name, remedy, examine: look } of checks) {
    const result = await inTime((async () => await look(ctx, around))()).catch((thrown: unknown) =>
      failure(`cannot be checked: ${(thrown instanceof Error ? thrown.message : String(thrown)).slice(0, 200)}`),
    )
    findings.push({ check: name, ...result, remedy: result.grade === 'ok' ? '' : remedy })
  }
  return findings
}
