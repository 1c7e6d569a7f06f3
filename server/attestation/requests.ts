import type { Answer } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { verifyWith } from '@fleetkey/protocol/signed.ts'
import { tlsBinding } from '@fleetkey/protocol/transcript.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import { judgeRequest, plainRequest } from '@fleetkey/protocol/x509/request/request.ts'
import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import type { TpmKey } from './keys.ts'
import { fail } from './reasons.ts'

type Key = Pick<TpmKey, 'spki' | 'object'>

const requested = (reason: 'csr.ldevid' | 'csr.tls', bytes: Uint8Array, keys: readonly KeyKind[], known?: Key): Uint8Array => {
  try {
    return judgeRequest(bytes, { ...plainRequest, keys }, known).spki
  } catch (error) {
    if (!(error instanceof Problem)) throw error
    return fail(reason, `${error.reason ?? error.code}: ${error.message}`)
  }
}

/** LDevID and software TLS key (P-256 unless policy admits more): each proves itself, and the TPM key binds the software key to this very challenge. DER of both public keys. */
export const checkRequests = (
  answer: Answer,
  ldevid: Key,
  tenant: string,
  tlsKeys: readonly KeyKind[] = plainRequest.keys,
): { readonly ldevidSpki: Uint8Array; readonly tlsSpki: Uint8Array } => {
  if (!sameBytes(requested('csr.ldevid', answer.csr.ldevid, plainRequest.keys, ldevid), ldevid.spki)) fail('csr.ldevid.other-key')
  const tlsSpki = requested('csr.tls', answer.csr.tls, tlsKeys)
  if (sameBytes(tlsSpki, ldevid.spki)) fail('csr.tls.same-key')
  if (!verifyWith(ldevid.object, tlsBinding(tenant, answer.challenge, tlsSpki), answer.binding)) fail('csr.tls.binding')
  return { ldevidSpki: ldevid.spki, tlsSpki }
}
