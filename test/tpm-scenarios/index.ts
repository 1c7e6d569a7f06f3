import { duplication } from './duplication.ts'
import { framing } from './framing.ts'
import { keysAtWork } from './keys-at-work.ts'
import { nv } from './nv.ts'
import { objects } from './objects.ts'
import { policy } from './policy.ts'
import type { Scenario } from './recorder.ts'
import { contexts, hierarchies, pcrs, starts } from './states.ts'

export const scenarios: Readonly<Record<string, Scenario>> = {
  framing,
  objects,
  policy,
  nv,
  'keys at work': keysAtWork,
  duplication,
  pcrs,
  starts,
  hierarchies,
  contexts,
}
