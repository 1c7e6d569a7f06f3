import { isDeepStrictEqual } from 'node:util'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { z } from 'zod'
import type { Caller } from '../access/caller.ts'
import { acceptanceChanged, oweAcceptance } from './acceptance.ts'
import { announceApprovals } from './approvals.ts'
import type { Context } from './context.ts'
import { perform } from './perform.ts'
import { keepFiles, maxFiles } from './release-files.ts'
import { findAll } from './rows.ts'
import { stationSigned, type Signed } from './station.ts'

const maxBytes = 2 << 20
const name = z.string().regex(/^[a-z0-9][a-z0-9-]{0,63}$/)

/** `fleetkey/release/1`: PCR index → hex SHA-256 value after a boot of this release, as the maker computes it. */
const ReferenceValues = z.strictObject({
  format: z.literal('fleetkey/release/1'),
  model: name,
  name: z.string().regex(/^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$/),
  /** The anti-rollback number: only grows. */
  number: z.int().min(0).max(0xffff_ffff),
  /** Built for developers: with a console, test keys, or without checks. Its keys are not for production. */
  debug: z.boolean(),
  pcrs: z.record(z.string().regex(/^(\d|1\d|2[0-3])$/), z.string().regex(/^[0-9a-f]{64}$/)).refine((pcrs) => Object.keys(pcrs).length > 0, 'no PCR'),
  /** Hex digests (SHA-256, SHA-384 or SHA-512) of the files that may run under it, as the kernel measures them (Linux IMA). */
  files: z
    .array(z.string().regex(/^([0-9a-f]{64}|[0-9a-f]{96}|[0-9a-f]{128})$/))
    .min(1)
    .max(maxFiles)
    .optional(),
})

const parse = (content: Uint8Array): z.infer<typeof ReferenceValues> => {
  let value: unknown
  try {
    value = JSON.parse(new TextDecoder('utf-8', { fatal: true }).decode(content))
  } catch (cause) {
    throw new Problem('malformed', 'the reference values are not JSON', { cause })
  }
  const result = ReferenceValues.safeParse(value)
  if (!result.success) throw new Problem('malformed', `release ${result.error.issues[0]?.path.join('.') ?? ''}: ${result.error.issues[0]?.message ?? ''}`)
  return result.data
}

/**
 * Imports the reference values of one firmware release, signed by a registered station, and approves it for the keys of its model's devices: they hear it at once
 * when they are connected, before anybody can have installed it. Its id is `<model>/<name>`.
 */
export const importRelease = async (ctx: Context, caller: Caller, input: Signed): Promise<{ id: string }> => {
  const imported = await perform(ctx, { caller, action: 'release.import', subject: 'release' }, async (tx) => {
    if (input.content.length > maxBytes) throw new Problem('malformed', `reference values of more than ${maxBytes} bytes`)
    await stationSigned(ctx, input)
    const { format: _, files, ...release } = parse(input.content)
    const id = `${release.model}/${release.name}`
    if ((await ctx.store.get('release', id)) !== undefined) throw new Problem('conflict', `release ${id} was imported before`)
    const twin = (await findAll(ctx.store, 'release', { where: { model: release.model } })).find(({ pcrs }) => isDeepStrictEqual(pcrs, release.pcrs))
    // One firmware, one verdict: under two names it could be withdrawn and accepted at once.
    if (twin !== undefined) throw new Problem('conflict', `release ${id} measures the same as ${twin.id}`, { reason: 'release.same-measurements' })
    tx.insert('release', {
      id,
      ...release,
      ...(files === undefined ? {} : { files: files.length }),
      importedAt: ctx.now(),
      station: input.station,
      withdrawn: null,
    })
    if (files !== undefined) keepFiles(tx, id, files)
    oweAcceptance(tx, { id, model: release.model }, 'imported')
    tx.note(`release ${id} number ${release.number}${release.debug ? ', debug' : ''}, signed by station ${input.station}`)
    return { id, model: release.model }
  })
  // A crash here: it is imported; the start-up sweep approves it, and asks the devices that it may bring back.
  ctx.step('import.release')
  await announceApprovals(ctx, imported.model)
  await acceptanceChanged(ctx, imported, 'imported')
  return { id: imported.id }
}
