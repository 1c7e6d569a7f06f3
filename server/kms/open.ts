import type { KeyObject } from 'node:crypto'
import { existsSync, readFileSync } from 'node:fs'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { Secret } from '@fleetkey/protocol/secret.ts'
import type { Kms } from '../flows/context.ts'
import { openFileKms } from './file.ts'
import type { Backend } from './orders.ts'
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
}

/** An open back end; `shares`: where what opens it can be split among people. */
export interface Opened extends Kms {
  readonly shares?: Splitter
}

type Opener<B extends Backend> = (place: Place, backend: B) => Promise<Opened>

const openers: { readonly [B in Backend as B['kind']]: Opener<B> } = {
  file: async ({ folder, step, master }, { passphraseFile, keyFile }) =>
    await openFileKms(folder, {
      master,
      ...(passphraseFile === null || master !== undefined ? {} : { passphrase: passphraseIn(passphraseFile) }),
      ...(keyFile === null ? {} : { keyFile }),
      ...(step === undefined ? {} : { step }),
    }),
}

/** The KMS of that back end. Throws Problem with what keeps it closed; reason `kms.sealed` (sealed.ts) when it is something that may still come. */
export const openKms = async (place: Place, backend: Backend): Promise<Opened> => await (openers[backend.kind] as Opener<Backend>)(place, backend)
