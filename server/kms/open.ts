import { readFileSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms } from '../flows/context.ts'
import { openFileKms } from './file.ts'
import type { Backend } from './orders.ts'

/** Passphrase in a file; the end of a line is no part of it. Throws Problem('malformed', reason `kms.passphrase`) when it is too short. */
const passphraseIn = (path: string): Secret => {
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
}

type Opener<B extends Backend> = (place: Place, backend: B) => Promise<Kms>

const openers: { readonly [B in Backend as B['kind']]: Opener<B> } = {
  file: async ({ folder, step }, { passphraseFile, keyFile }) =>
    await openFileKms(folder, {
      ...(passphraseFile === null ? {} : { passphrase: passphraseIn(passphraseFile) }),
      ...(keyFile === null ? {} : { keyFile }),
      ...(step === undefined ? {} : { step }),
    }),
}

/** The KMS of that back end. Throws Problem with what keeps it closed. */
export const openKms = async (place: Place, backend: Backend): Promise<Kms> => await (openers[backend.kind] as Opener<Backend>)(place, backend)
