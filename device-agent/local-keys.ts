import { decryptData, encryptData, readCiphertext, runLength } from '@fleetkey/protocol/ciphertext.ts'
import type { KeyAlgorithm, Protection } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import type { Keyring } from './keyring.ts'
import type { UsageCounters } from './usage.ts'

/** One key as a local application sees it. */
export interface LocalKey {
  readonly key: string
  readonly algorithm: KeyAlgorithm
  readonly protection: Protection
  /** The epoch in use; null when none is yet. */
  readonly current: number | null
  readonly epochs: readonly number[]
}

/** What local applications may do with the keys. Every method throws Problem: `not-found`, `forbidden`, `unsupported`, `malformed`, `unauthenticated`, `unavailable`. */
export interface LocalKeys {
  list(): readonly LocalKey[]
  /** A copy of the key bytes: `sealed` keys only. */
  get(key: string, epoch?: number): { readonly key: string; readonly epoch: number; readonly algorithm: KeyAlgorithm; readonly material: Uint8Array }
  /** COSE_Encrypt0 under the epoch in use (protocol/ciphertext.ts); `aad` is the external_aad. Counted before it is given out. */
  encrypt(key: string, plaintext: Uint8Array, aad?: Uint8Array): Promise<{ readonly epoch: number; readonly ciphertext: Uint8Array }>
  /** Under any epoch that is held. `run` and `counter` name the message: who has seen both before looks at a replay. */
  decrypt(
    key: string,
    ciphertext: Uint8Array,
    aad?: Uint8Array,
  ): { readonly epoch: number; readonly run: Uint8Array; readonly counter: number; readonly plaintext: Uint8Array }
  /** Counts messages that an application has protected with bytes that it took by `get`. */
  count(key: string, epoch: number, messages: number): Promise<void>
  /** HMAC-SHA256 inside the TPM over "fleetkey/1 app\0" ‖ data. */
  mac(key: string, data: Uint8Array): Promise<{ readonly epoch: number; readonly mac: Uint8Array }>
  verify(key: string, epoch: number, data: Uint8Array, mac: Uint8Array): Promise<boolean>
}

const none = new Uint8Array(0)

/** This process as a writer under one epoch. Never stored: after a restart it is another one. */
interface Run {
  readonly epoch: number
  readonly id: Uint8Array
  counter: number
}

/** Use of the keys by local applications; `keyring` and `usage` are asked at every call, they may not be open yet. */
export const localKeys = (of: {
  readonly keyring: () => Keyring
  readonly usage: () => UsageCounters
  readonly random: (length: number) => Uint8Array
}): LocalKeys => {
  const { keyring, usage, random } = of
  const runs = new Map<string, Run>()
  const encryptionKey = (key: string, epoch?: number) => {
    const { algorithm } = keyring().heldOf(key) ?? {}
    if (algorithm === 'HS256')
      throw new Problem(
        'unsupported',
        `${key} never leaves the TPM, which computes HMAC-SHA256 with it and nothing else: use mac and verify, or a sealed key`,
        {
          reason: 'key.algorithm',
        },
      )
    return keyring().material(key, epoch)
  }
  const runOf = (key: string, epoch: number): Run => {
    const known = runs.get(key)
    if (known?.epoch === epoch) return known
    const run = { epoch, id: random(runLength), counter: 0 }
    runs.set(key, run)
    return run
  }
  return {
    list: () =>
      keyring()
        .held()
        .filter(({ epochs }) => epochs.length > 0)
        .map(({ key, algorithm, protection, current, epochs }) => ({ key, algorithm, protection, current, epochs: epochs.map(({ epoch }) => epoch) })),

    get(key, epoch) {
      const found = keyring().material(key, epoch)
      return { key, epoch: found.epoch, algorithm: keyring().heldOf(key)?.algorithm ?? 'A256GCM', material: Uint8Array.from(found.secret.bytes()) }
    },

    async encrypt(key, plaintext, aad = none) {
      const { epoch, secret } = encryptionKey(key)
      const run = runOf(key, epoch)
      // In one go: the epoch may be erased while the medium is written. Counted before anybody sees it.
      const ciphertext = encryptData(secret, { key, epoch, run: run.id, counter: run.counter++ }, plaintext, aad)
      await usage().count(key, epoch)
      return { epoch, ciphertext }
    },

    decrypt(key, bytes, aad = none) {
      const ciphertext = readCiphertext(bytes)
      if (ciphertext.key !== key) throw new Problem('not-found', `encrypted under another key than ${key}`, { reason: 'ciphertext.key' })
      const { secret } = encryptionKey(key, ciphertext.epoch)
      const plaintext = decryptData(secret, ciphertext, aad)
      return { epoch: ciphertext.epoch, run: ciphertext.run, counter: ciphertext.counter, plaintext }
    },

    async count(key, epoch, messages) {
      encryptionKey(key, epoch)
      await usage().count(key, epoch, messages)
    },

    mac: async (key, data) => await keyring().mac(key, data),
    verify: async (key, epoch, data, mac) => await keyring().verify({ key, epoch, data, mac }),
  }
}
