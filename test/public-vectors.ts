import { existsSync, readFileSync } from 'node:fs'
import { join } from 'node:path'
import { fileURLToPath } from 'node:url'

/** Where the public test vectors of others are looked for when nobody says where: beside the checkout. */
const beside = fileURLToPath(new URL('../../shared/vectors', import.meta.url))

export type PublicVectors = { readonly folder: string } | { readonly folder: undefined; readonly why: string }

/**
 * The folder of public test vectors (Wycheproof, x509-limbo, CCTV, RFC 9180): the one that FLEETKEY_VECTORS names, else `../shared/vectors`; or why there is none.
 * Throws under CI=true when the variable names a folder that is not there: what was asked for would not be tested.
 */
export const findVectors = (environment: Readonly<Record<string, string | undefined>> = process.env, usual = beside): PublicVectors => {
  const named = environment['FLEETKEY_VECTORS']
  const folder = named ?? usual
  if (existsSync(folder)) return { folder }
  const why = named === undefined ? 'FLEETKEY_VECTORS is not set and ../shared/vectors is not there' : `FLEETKEY_VECTORS names ${named}, which is not there`
  if (named !== undefined && environment['CI'] === 'true') throw new Error(why)
  return { folder: undefined, why: `${why}: public test vectors were not used` }
}

export const vectors = findVectors()

/** Text of a file of the vectors. */
export const readVectors = (name: string): string => readFileSync(join(vectors.folder ?? '', name), 'utf8')

/** Says how many vectors of a file were run. */
export const counted = (name: string, ran: number, all = ran): void =>
  void process.stdout.write(`vectors ${name}: ${ran}${ran === all ? '' : ` of ${all}, the others are of a kind that nothing here uses`}\n`)
