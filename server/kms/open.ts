import type { KeyObject } from 'node:crypto'
import { existsSync, readdirSync, readFileSync } from 'node:fs'
import { Problem, toProblem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms } from '../flows/context.ts'
import { openAwsHolder } from './aws/holder.ts'
import { awsSuffix } from './aws/records.ts'
import { kmsOf, type Holder } from './custody.ts'
import { fileSuffix, openFileHolder } from './file.ts'
import { joined } from './joined.ts'
import type { Backend, FileBackend } from './orders.ts'
import { openPkcs11Holder, tokenSuffix } from './pkcs11/holder.ts'
import { sealed } from './sealed.ts'
import type { Splitter } from './shares.ts'

/** Passphrase in a file; the end of a line is no part of it. Throws Problem: reason `kms.sealed` when there is no file, `malformed` when it is too short. */
const passphraseIn = (path: string): Secret => {
  if (!existsSync(path)) throw sealed(`the passphrase file ${path} is missing`)
  const bytes = readFileSync(path)
  let { length } = bytes
  if (bytes[length - 1] === 0x0a) length--
  if (bytes[length - 1] === 0x0d) length--
  try {
    if (length < 12) throw new Problem('malformed', `the passphrase in ${path} is shorter than 12 bytes`, { reason: 'kms.passphrase' })
    return new Secret(bytes.subarray(0, length))
  } finally {
    bytes.fill(0)
  }
}

/** What every back end takes besides what it takes to reach its keys. */
export interface Place {
  /** Of this process alone: whoever opens it has locked it. */
  readonly folder: string
  /** Called at every named durable step. */
  readonly step?: ((name: string) => void) | undefined
  /** The master key of the folder, once shares gave it. */
  readonly master?: KeyObject | undefined
  /** Told what keeps the keys from being used for a while, and null when nothing does any more. */
  readonly notice?: ((problem: Problem | null) => void) | undefined
}

/** Where what opens the keys can be split among people. */
interface Split {
  readonly shares?: Splitter
}

/** An open back end. */
export interface Opened extends Kms, Split {}

const has = (folder: string, suffix: string): boolean => existsSync(folder) && readdirSync(folder).some((entry) => entry.endsWith(suffix))

const files = ({ folder, step, master }: Place, { passphraseFile, keyFile }: FileBackend): ReturnType<typeof openFileHolder> =>
  openFileHolder(folder, {
    master,
    ...(passphraseFile === null || master !== undefined ? {} : { passphrase: passphraseIn(passphraseFile) }),
    ...(keyFile === null ? {} : { keyFile }),
    ...(step === undefined ? {} : { step }),
  })

const openers: { readonly [B in Backend as B['kind']]: (place: Place, backend: B) => Promise<Holder & Split> } = {
  async file(place, backend) {
    // Without their token they would be made anew, and nothing that they have signed or wrapped would count any more.
    if (has(place.folder, tokenSuffix))
      throw new Problem('unavailable', `keys of ${place.folder} are in a PKCS#11 token: start with --kms pkcs11`, { reason: 'kms.token' })
    if (has(place.folder, awsSuffix)) throw new Problem('unavailable', `keys of ${place.folder} are in AWS KMS: start with --kms aws`, { reason: 'kms.aws' })
    return await Promise.resolve(files(place, backend))
  },
  async pkcs11(place, backend) {
    // Before the library is loaded, which reads them, and before anything runs on another thread.
    Object.assign(process.env, backend.variables, { UV_THREADPOOL_SIZE: String(backend.sessions) })
    // First, because opening them leaves nothing behind: those that are not moved yet.
    const inFiles = has(place.folder, fileSuffix) ? files(place, backend.files) : undefined
    let inToken: Holder
    try {
      inToken = await openPkcs11Holder({ ...place, ...backend })
    } catch (thrown) {
      const { reason, message } = toProblem(thrown)
      // Tokens are put in, and files come.
      throw reason === 'kms.token' || reason === 'kms.pin-file' ? sealed(message) : thrown
    }
    return inFiles === undefined ? inToken : joined(inToken, inFiles)
  },
  async aws(place, backend) {
    Object.assign(process.env, backend.variables)
    const inFiles = has(place.folder, fileSuffix) ? files(place, backend.files) : undefined
    let inAws: Holder
    try {
      inAws = await openAwsHolder({ ...place, ...backend })
    } catch (thrown) {
      const { reason, message } = toProblem(thrown)
      // Networks come back, and rights are given.
      throw reason === 'kms.aws' || reason === 'kms.aws-credentials' ? sealed(message) : thrown
    }
    return inFiles === undefined ? inAws : joined(inAws, inFiles)
  },
}

/** The KMS of that back end. Throws Problem with what keeps it closed; reason `kms.sealed` (sealed.ts) when it is something that may still come. */
export const openKms = async (place: Place, backend: Backend): Promise<Opened> => {
  const holder = await (openers[backend.kind] as (place: Place, backend: Backend) => Promise<Holder & Split>)(place, backend)
  return { ...kmsOf(holder), ...(holder.shares === undefined ? {} : { shares: holder.shares }) }
}
