import { Secret } from '@fleetkey/protocol/secret.ts'
import { verifyWith } from '@fleetkey/protocol/signed.ts'
import { possessionOf, sha256, tokenProof } from '@fleetkey/protocol/transcript.ts'
import { makeClaims, type Claims } from './claims.ts'
import { byMethod, commitmentsOf, presentedBy } from './conversation.ts'
import type { Evidence, Expected, Method } from './methods.ts'
import { fail } from './reasons.ts'
import { checkRequests } from './requests.ts'
import { checkSoftwareKeys } from './software-keys.ts'

const hex = (bytes: Uint8Array): string => Buffer.from(bytes).toString('hex')

const nobody = { assurance: 'token', endorsement: null, endorsedBy: [] } as const

const verify = (all: Evidence, expected: Expected): Claims => {
  const evidence = byMethod('token', all)
  const { hello, answer } = evidence
  const ldevid = checkSoftwareKeys(hello.presented)
  const { nonce, transcript } = commitmentsOf(evidence, expected, sha256(ldevid.spki))
  if (!verifyWith(ldevid.object, possessionOf('ldevid', nonce, transcript), answer.proven.signature)) fail('ldevid.possession')
  const { proof } = answer.proven
  if (expected.secret !== null && (proof === null || !new Secret(tokenProof(expected.secret, nonce, transcript)).equals(new Secret(proof)))) fail('token.proof')
  const { token } = hello.presented
  return makeClaims({
    method: 'token',
    hardware: `serial/${hello.serial}`,
    ...nobody,
    recipientSpki: hello.presented.recipient,
    ...checkRequests(answer, ldevid, expected.tenant),
    facts: expected.secret === null || token === null ? [] : [{ name: 'token', value: hex(token) }],
  })
}

/**
 * A board without any key of its own: an operator's single-use token brings it in, and its LDevID key is what it is from then on. Which token, and whether one
 * is needed, is the flow's to say: `expected.secret` is the token's verifier, null for a device that comes back with the LDevID key on its record.
 */
export const token: Method = {
  present(hello) {
    const { ldevid, recipient } = presentedBy('token', hello).presented
    return { hardware: `serial/${hello.serial}`, ldevidSpki: checkSoftwareKeys({ ldevid, recipient }).spki, ...nobody }
  },
  shown: (hello) => `serial/${hello.serial}`,
  ldevidSpki: (hello) => checkSoftwareKeys(presentedBy('token', hello).presented).spki,
  demand: () => ({ method: 'token' }),
  verify,
  reasons: { unlisted: 'manifest.no-token-row', otherHardware: 'identity.other-serial' },
}
