import { verify as verifySignature } from 'node:crypto'
import type { HelloOf } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { possessionOf, sha256 } from '@fleetkey/protocol/transcript.ts'
import { makeClaims, type Claims } from './claims.ts'
import { byMethod, commitmentsOf, presentedBy } from './conversation.ts'
import { noEndorsementPolicy, type EndorsementPolicy } from './endorsement-policy.ts'
import { checkIdevidDenied, vouchedForIdevid, type EndorsementCa, type Vouched } from './endorsements.ts'
import { checkIdevidCertificate, idevidHash, readIdevidCertificate, type Idevid } from './idevid-certificate.ts'
import type { AttestationPolicy, Evidence, Expected, Method, Presented } from './methods.ts'
import { fail } from './reasons.ts'
import { checkRequests } from './requests.ts'
import { checkSoftwareKeys, type SoftwareKey } from './software-keys.ts'

interface Read {
  readonly idevid: Idevid
  readonly ldevid: SoftwareKey
  readonly presented: Presented
}

const vouched = (vouching: Vouched) => ({
  assurance: vouching.test ? ('simulated' as const) : ('idevid' as const),
  endorsement: vouching.root.subject,
  endorsedBy: vouching.by,
})

/** An IDevID certificate that its maker's chain, an endorsement and the deny list let count. `chain`: leaf first, then what was sent along. */
export const presentedIdevid = (chain: readonly Uint8Array[], endorsements: readonly EndorsementCa[], denied: EndorsementPolicy, now: number) => {
  const [leaf = new Uint8Array(0), ...others] = chain
  const idevid = checkIdevidCertificate(leaf)
  const hash = idevidHash(idevid.certificate.spki)
  checkIdevidDenied(hash, denied)
  const vouching = vouchedForIdevid(idevid.certificate, others.map(readIdevidCertificate), endorsements, denied, now)
  return { idevid, presented: { hardware: `idevid/${hash}`, ...vouched(vouching) } }
}

/** What an IDevID certificate proves besides, as it is kept beside the verdict. */
export const idevidFacts = ({ serialNumber, module }: Idevid): readonly { readonly name: string; readonly value: string }[] => [
  { name: 'idevid-serial-number', value: serialNumber },
  ...(module === null ? [] : [{ name: 'idevid-hardware-module', value: `${module.type}/${module.serial}` }]),
]

const read = ({ presented }: HelloOf<'idevid'>, endorsements: readonly EndorsementCa[], policy: AttestationPolicy, now: number): Read => {
  const idevid = checkIdevidCertificate(presented.chain[0] ?? new Uint8Array(0))
  const ldevid = checkSoftwareKeys(presented, idevid.certificate.spki)
  const found = presentedIdevid(presented.chain, endorsements, policy.endorsement ?? noEndorsementPolicy, now)
  return { idevid, ldevid, presented: { ...found.presented, ldevidSpki: ldevid.spki } }
}

const verify = (all: Evidence, expected: Expected, endorsements: readonly EndorsementCa[], now: number): Claims => {
  const evidence = byMethod('idevid', all)
  const { hello, answer } = evidence
  const { idevid, ldevid, presented } = read(hello, endorsements, expected.policy, now)
  const { nonce, transcript } = commitmentsOf(evidence, expected, sha256(idevid.certificate.spki))
  const { key, hash } = idevid
  if (!verifySignature(hash, possessionOf('idevid', nonce, transcript), { key, dsaEncoding: 'ieee-p1363' }, answer.proven.signature)) fail('idevid.possession')
  return makeClaims({
    method: 'idevid',
    ...presented,
    assurance: presented.assurance,
    recipientSpki: hello.presented.recipient,
    ...checkRequests(answer, ldevid, expected.tenant),
    facts: idevidFacts(idevid),
  })
}

/** X.509 factory identity of a secure element (IEEE 802.1AR): its maker's chain, the manifest, and a signature of its key over what both ends commit to. */
export const idevid: Method = {
  present: (hello, endorsements, policy, now) => read(presentedBy('idevid', hello), endorsements, policy, now).presented,
  shown(hello) {
    const [leaf = new Uint8Array(0)] = presentedBy('idevid', hello).presented.chain
    try {
      return `idevid/${idevidHash(readIdevidCertificate(leaf).spki)}`
    } catch (error) {
      if (error instanceof Problem) return null
      throw error
    }
  },
  ldevidSpki: (hello) => checkSoftwareKeys(presentedBy('idevid', hello).presented).spki,
  demand: () => ({ method: 'idevid' }),
  verify,
  reasons: { unlisted: 'manifest.unknown-idevid', otherHardware: 'identity.other-idevid' },
}
