import { EndorsementPolicyView } from '@fleetkey/protocol/admin.ts'
import { z } from 'zod'

const view = EndorsementPolicyView.shape
const hex64 = z.string().regex(/^[0-9a-f]{64}$/)
const pcrs = z.record(z.string().regex(/^(\d|1\d|2[0-3])$/), z.string().regex(/^([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$/))
const Release = z.object({
  id: z.string().optional(),
  model: z.string().optional(),
  name: z.string().optional(),
  number: z.int().min(0).default(0),
  pcrs,
  debug: z.boolean().default(false),
  withdrawn: z.boolean().default(false),
})

/**
 * What an offline appraisal asks for besides authenticity. `releases`: reference values, one of which must match every quoted PCR; `floor`: lowest release
 * number; `clock: any`: an unsafe clock is no reason; `separators`: of which kind of firmware the log is, `none` when it has none; `ima.files`: path → SHA-256
 * values that are allowed, everything else is refused; `ima.complete`: entries behind the quoted PCR 10 are refused, not left aside; `endorsement`: deny list, firmware
 * floors; `last`: what was accepted before, which counters must not fall below.
 */
export const OfflinePolicy = z.strictObject({
  releases: z.array(Release).optional(),
  floor: z.int().min(0).default(0),
  clock: z.enum(['safe', 'any']).default('safe'),
  separators: z.enum(['pcClient', 'board', 'none']).default('none'),
  ima: z
    .strictObject({
      files: z.record(z.string(), z.array(hex64)).optional(),
      complete: z.boolean().default(false),
      violations: z.boolean().default(false),
    })
    .prefault({}),
  endorsement: z
    .strictObject({
      deny: view.deny.default([]),
      floors: view.floors.default([]),
      updates: view.updates.default([]),
      manufacturers: view.manufacturers.default(null),
    })
    .prefault({}),
  last: z
    .strictObject({
      resetCount: z.int().min(0),
      restartCount: z.int().min(0).optional(),
      clock: z.int().min(0).optional(),
      firmware: z.string().optional(),
    })
    .optional(),
})
export type OfflinePolicy = z.output<typeof OfflinePolicy>

/** A policy, or the signed reference values of one release (`fleetkey/release/1`) as they are. */
export const readOfflinePolicy = (value: unknown) => {
  const isRelease = typeof value === 'object' && value !== null && 'format' in value && value.format === 'fleetkey/release/1'
  return OfflinePolicy.safeParse(isRelease ? { releases: [value] } : value)
}
