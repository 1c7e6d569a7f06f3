import { sign, type KeyObject } from 'node:crypto'
import type { Signer } from '@fleetkey/protocol/signed.ts'

/** Signs messages with a key of this process. */
export const ecdsaSigner = (key: KeyObject, kid: Uint8Array): Signer => ({
  kid,
  sign: async (tbs) => new Uint8Array(sign('sha256', tbs, { key, dsaEncoding: 'ieee-p1363' })),
})
