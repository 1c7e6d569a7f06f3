import { sameBytes } from '@fleetkey/tpm2/bytes.ts'
import { makeClaims, type Claims } from './claims.ts'
import { idevidFacts, type presentedIdevid } from './idevid.ts'
import { fail } from './reasons.ts'

/**
 * What a device proves that speaks no protocol of ours (EST): one key, by its request's own signature; that it may have it, by the TLS handshake of its factory
 * key or by a token whose secret was compared. There is no recipient key.
 */
const oneKey = (spki: Uint8Array) => ({ ldevidSpki: spki, tlsSpki: spki, recipientSpki: null })

/** By a factory certificate that counts and whose key TLS has proven. `spki`: the key of the request, proven by it. */
export const claimsByIdevid = ({ idevid, presented }: ReturnType<typeof presentedIdevid>, spki: Uint8Array): Claims => {
  if (sameBytes(idevid.certificate.spki, spki)) fail('key.two-roles')
  return makeClaims({ method: 'idevid', ...presented, ...oneKey(spki), facts: idevidFacts(idevid) })
}

/** `token`: id (hex) of a token whose secret the peer has shown. */
export const claimsByToken = (of: { readonly serial: string; readonly spki: Uint8Array; readonly token: string }): Claims =>
  makeClaims({
    method: 'token',
    hardware: `serial/${of.serial}`,
    assurance: 'token',
    endorsement: null,
    endorsedBy: [],
    ...oneKey(of.spki),
    facts: [{ name: 'token', value: of.token }],
  })
