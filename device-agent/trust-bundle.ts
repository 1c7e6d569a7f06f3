import { decode, encode } from '@fleetkey/protocol/cbor.ts'
import { TrustBundle } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { trustDigest } from '@fleetkey/protocol/transcript.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { inside, tags, whole } from '@fleetkey/protocol/x509/der.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { validateChain } from '@fleetkey/protocol/x509/path.ts'
import type { Document } from './files.ts'
import type { Belief } from './device-clock.ts'
import type { Identity } from './identity.ts'
import { openTrust, type Trust, type TrustSource } from './trust.ts'

/** Whom this device was told to believe; it takes the place of its configuration, whatever that says. */
export interface TrustStore {
  /** Undefined when it was never told. */
  load(): Promise<TrustBundle | undefined>
  save(bundle: TrustBundle): Promise<void>
}

/** Not encrypted: it is public, and who can write here can write the configuration as well. */
export const trustStore = (document: Document, onLoss: (why: string) => void): TrustStore => ({
  async load() {
    const stored = await document.load()
    if (stored === undefined) return undefined
    const read = TrustBundle.safeParse(decode(stored))
    if (!read.success) onLoss('the trust bundle is not readable')
    return read.success ? read.data : undefined
  },
  // No older version stays on the medium: it could be read when the newer copy is damaged.
  save: async (bundle) => await document.replace(encode(bundle)),
})

export const sourceOf = ({ roots, chain, keys, tainted, retired }: TrustBundle): TrustSource => ({ trust: roots, chain, keys, tainted, retired })

const same = (a: Uint8Array, b: Uint8Array): boolean => Buffer.compare(a, b) === 0
const sameKey = (one: Certificate, other: Certificate): boolean => same(one.subject, other.subject) && same(one.spki, other.spki)

const refuse = (reason: string, detail: string): never => {
  throw new Problem('forbidden', detail, { reason: `trust.${reason}` })
}

/**
 * Judges a bundle whose message was verified. `held`: the one in force; `trust`: what it comes to; `kid`: who signed the message. `undefined` when it is held
 * already, the trust to come otherwise. Throws Problem('forbidden'): a lower version (a replay), another content under the same one, a root that none of those
 * trusted now has certified (a message key alone makes no root), or a bundle that would not believe its own sender: it would be the last one.
 */
export const judgeBundle = (
  bundle: TrustBundle,
  of: { readonly held: TrustBundle | undefined; readonly trust: Trust; readonly kid: Uint8Array; readonly time: Belief },
): Trust | undefined => {
  const { held, trust, kid, time } = of
  if (held !== undefined && bundle.version < held.version) refuse('older', `trust bundle ${bundle.version} after ${held.version}`)
  if (held !== undefined && bundle.version === held.version)
    return same(trustDigest(bundle), trustDigest(held)) ? undefined : refuse('other-content', `another trust bundle ${bundle.version}`)
  const [roots, chain] = [bundle.roots.map(parseCertificate), bundle.chain.map(parseCertificate)]
  for (const root of roots) {
    const vouched = chain.filter((one) => sameKey(one, root))
    const led = [root, ...vouched].some(
      (leaf) =>
        trust.roots.some((known) => same(known.der, leaf.der)) ||
        validateChain({ leaf, intermediates: chain, roots: trust.roots, at: time.now, leafMayBeCa: true, maxIntermediates: 16 }).ok,
    )
    if (!led) refuse('root', `a root that none of ours has certified: ${root.serial}`)
  }
  const next = openTrust(sourceOf(bundle))
  try {
    next.signerOf(kid, ['delivery'], time)
  } catch {
    refuse('sender', `trust bundle ${bundle.version} does not believe its own sender`)
  }
  return next
}

const issuerKeyIdentifier = (certificate: Certificate): Uint8Array | undefined => {
  const value = certificate.extensions.get(oids.authorityKeyIdentifier)?.value
  return value === undefined ? undefined : inside(whole(value, tags.sequence)).optional(0x80)?.content
}

/** Whether the device has to be renewed: its certificates come from a CA that is tainted or retired. Key identifiers are the first 20 bytes of the hash (RFC 7093 §2). */
export const isTainted = ({ tls, ldevid }: Identity, bundle: TrustBundle): boolean =>
  [tls, ldevid].map(parseCertificate).some((certificate) => {
    const issuer = issuerKeyIdentifier(certificate)
    return issuer !== undefined && [...bundle.tainted, ...bundle.retired].some((hash) => same(hash.subarray(0, issuer.length), issuer))
  })
