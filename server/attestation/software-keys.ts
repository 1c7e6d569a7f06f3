import type { KeyObject } from 'node:crypto'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { p256Key } from '@fleetkey/protocol/signed.ts'
import { isCanonicalP256 } from '@fleetkey/protocol/x509/public-key.ts'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { fail } from './reasons.ts'

/** A P-256 key in software. `spki`: DER SubjectPublicKeyInfo. */
export interface SoftwareKey {
  readonly spki: Uint8Array
  readonly object: KeyObject
}

/** A key that a device without a TPM presents: canonical form, on its curve. */
export const checkSoftwareKey = (role: 'ldevid' | 'recipient', spki: Uint8Array): SoftwareKey => {
  if (!isCanonicalP256(spki)) fail(`${role}.malformed`, 'not the canonical form of a P-256 key')
  try {
    return { spki, object: p256Key(spki) }
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    return fail(`${role}.point`, error.message)
  }
}

/** LDevID and recipient key; no key does the work of another. `hardware`: SPKI of the key that the device was made with. */
export const checkSoftwareKeys = (presented: { readonly ldevid: Uint8Array; readonly recipient: Uint8Array }, hardware?: Uint8Array): SoftwareKey => {
  const [ldevid, recipient] = [checkSoftwareKey('ldevid', presented.ldevid), checkSoftwareKey('recipient', presented.recipient)]
  const all = [ldevid.spki, recipient.spki, ...(hardware === undefined ? [] : [hardware])]
  if (all.some((one, at) => all.slice(at + 1).some((other) => sameBytes(one, other)))) fail('key.two-roles')
  return ldevid
}
