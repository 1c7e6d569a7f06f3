import { createHash, type KeyObject } from 'node:crypto'
import type { Body } from '@fleetkey/protocol/messages.ts'
import { Problem } from '@fleetkey/protocol/problem.ts'
import { keyId, p256Key, readMessage, verifyWith, type SignedMessage } from '@fleetkey/protocol/signed.ts'
import { parseCertificate, type Certificate } from '@fleetkey/protocol/x509/certificate.ts'
import { validateChain, type PathQuestion, type PathResult } from '@fleetkey/protocol/x509/path.ts'
import { roleEku, type Role } from '@fleetkey/protocol/x509/roles.ts'
import { judgedAt, type Belief } from './device-clock.ts'

/** Whom a device believes: its roots, and the certificates of the server's message keys, which must lead to one of them. All DER. */
export interface TrustSource {
  readonly trust: readonly Uint8Array[]
  readonly chain: readonly Uint8Array[]
  readonly keys: readonly Uint8Array[]
  /** SHA-256 of the SubjectPublicKeyInfo of CAs: nothing under a tainted one signs a message, nothing under a retired one counts at all. */
  readonly tainted?: readonly Uint8Array[]
  readonly retired?: readonly Uint8Array[]
}

/** CAs that count less, or no more, by the SHA-256 of their key in hex. */
interface Denied {
  readonly tainted: ReadonlySet<string>
  readonly retired: ReadonlySet<string>
}

export interface Trust {
  readonly roots: readonly Certificate[]
  readonly chain: readonly Certificate[]
  /** The same trust with newer chain and key certificates added; the roots stay those of the configuration. */
  with(more: { readonly chain: readonly Uint8Array[]; readonly keys: readonly Uint8Array[] }): Trust
  /**
   * Public key (P-256) behind this kid, if a certificate says that it may sign for one of these roles at the time `stated`, else now.
   * Throws Problem('unauthenticated').
   */
  signerOf(kid: Uint8Array, roles: readonly Role[], time: Belief, stated?: number | null): KeyObject
  /** Throws Problem('unauthenticated') unless this leaf (DER) leads to a root at `now`, and is for this purpose (OID) where one is named. */
  check(leaf: Uint8Array, intermediates: readonly Uint8Array[], now: number, eku?: string): Certificate
}

/** The key of a certificate of the server: its kid, and itself once it was needed. */
interface SigningKey {
  readonly kid: Uint8Array
  readonly key: () => KeyObject
}

const signingKeys = new WeakMap<Certificate, SigningKey>()
const signingKeyOf = (certificate: Certificate): SigningKey => {
  const known = signingKeys.get(certificate)
  if (known !== undefined) return known
  let imported: KeyObject | undefined
  const made = { kid: keyId(certificate.spki), key: () => (imported ??= p256Key(certificate.spki)) }
  signingKeys.set(certificate, made)
  return made
}

/** Thousands of agents in one process share what they parsed. */
const parsed = new Map<string, Certificate>()
export const parseOnce = (der: Uint8Array): Certificate => {
  const name = Buffer.from(der).toString('base64')
  const known = parsed.get(name)
  if (known !== undefined) return known
  const certificate = parseCertificate(Uint8Array.from(der))
  if (parsed.size >= 256) parsed.clear()
  parsed.set(name, certificate)
  return certificate
}

const distinct = (certificates: readonly Certificate[]): readonly Certificate[] => [...new Map(certificates.map((one) => [one.fingerprint, one])).values()]

/** Builds the trust of one agent. Throws Problem('malformed') for what is no certificate. */
export const openTrust = ({ tainted = [], retired = [], ...source }: TrustSource): Trust =>
  trustOf(source.trust.map(parseOnce), source.chain.map(parseOnce), source.keys.map(parseOnce), {
    tainted: new Set(tainted.map((hash) => Buffer.from(hash).toString('hex'))),
    retired: new Set(retired.map((hash) => Buffer.from(hash).toString('hex'))),
  })

/** SHA-256 of its SubjectPublicKeyInfo, hex. */
const keyHash = ({ spki }: Certificate): string => createHash('sha256').update(spki).digest('hex')

const trustOf = (roots: readonly Certificate[], allOfChain: readonly Certificate[], keys: readonly Certificate[], denied: Denied): Trust => {
  const counts = (certificate: Certificate): boolean => !denied.retired.has(keyHash(certificate))
  const vouches = (certificate: Certificate): boolean => counts(certificate) && !denied.tainted.has(keyHash(certificate))
  const chain = allOfChain.filter(counts)
  const vouching = { intermediates: chain.filter(vouches), roots: roots.filter(vouches) }
  /** Validated before: until the first certificate of the chain ends. */
  const valid = new Map<string, { readonly from: number; readonly until: number }>()

  /** Remembers a chain that holds: whatever else is shown later, it is one. */
  const validated = (name: string, now: number, question: Omit<PathQuestion, 'at'>): PathResult | undefined => {
    const known = valid.get(name)
    if (known !== undefined && now >= known.from && now <= known.until) return undefined
    const result = validateChain({ ...question, at: now })
    if (result.ok)
      valid.set(name, { from: Math.max(...result.chain.map(({ notBefore }) => notBefore)), until: Math.min(...result.chain.map(({ notAfter }) => notAfter)) })
    return result
  }

  const believed = (leaf: Certificate, role: Role, time: Belief, stated: number | null): boolean => {
    const now = judgedAt(leaf, time, stated)
    return now !== undefined && validated(`${role}/${leaf.fingerprint}`, now, { leaf, ...vouching, eku: roleEku[role] })?.ok !== false
  }

  return {
    roots,
    chain,
    with: (more) => trustOf(roots, distinct([...more.chain.map(parseOnce), ...chain]), distinct([...more.keys.map(parseOnce), ...keys]), denied),
    signerOf(kid, roles, time, stated = null) {
      const candidates = keys.filter((one) => Buffer.compare(signingKeyOf(one).kid, kid) === 0)
      const found = candidates.find((leaf) => roles.some((role) => believed(leaf, role, time, stated)))
      if (found === undefined)
        throw new Problem(
          'unauthenticated',
          candidates.length === 0 ? 'signed by a key without a certificate' : `the signer may not sign ${roles.join(' or ')} messages now`,
          {
            reason: 'server.signer',
          },
        )
      return signingKeyOf(found).key()
    },
    check(leaf, intermediates, now, eku) {
      const certificate = parseOnce(leaf)
      const between = [...intermediates.map(parseOnce), ...chain].filter(counts)
      const question = { leaf: certificate, intermediates: between, roots: roots.filter(counts), ...(eku === undefined ? {} : { eku }) }
      const result = validated(`${eku ?? 'any'}/${certificate.fingerprint}`, now, question)
      if (result?.ok === false)
        throw new Problem('unauthenticated', `a certificate that does not lead to our root: ${result.why} at ${result.at}`, { reason: 'certificate.chain' })
      return certificate
    },
  }
}

/** Which server key signs which message. A refusal comes from the one or the other, as the connection has an identity or not. */
const rolesOf: Readonly<Partial<Record<Body['type'], readonly Role[]>>> = {
  challenge: ['challenge'],
  identity: ['challenge'],
  welcome: ['delivery'],
  delivery: ['delivery'],
  activate: ['delivery'],
  retire: ['delivery'],
  labels: ['delivery'],
  broadcast: ['group'],
  attest: ['delivery'],
  approvals: ['delivery'],
  trust: ['delivery'],
  refusal: ['challenge', 'delivery'],
  manifest: ['challenge', 'delivery'],
}

/**
 * The time that a message states, which its signature covers; null for those that state none. Fresh in all of them: `challenge` and `identity` answer this
 * device's own randomness, `welcome` is the first word of its connection. A challenge says until when it waits.
 */
const statedIn = (body: Body): number | null => {
  if (body.type === 'welcome' || body.type === 'identity') return body.time
  return body.type === 'challenge' ? body.expires : null
}

/**
 * Reads and verifies one message of the server: form, direction, tenant, addressee, signer's certificate and role, signature.
 * `client`: the client id of the connection it came through; a broadcast is addressed to a shard of a group instead. Throws Problem; nothing of the message counts then.
 */
export const readFromServer = (
  bytes: Uint8Array,
  of: {
    readonly trust: Trust
    readonly tenant: string
    readonly client: string
    /** Addresses of the shards that it is in. */
    readonly groups?: ReadonlySet<string>
    readonly time: Belief
    readonly max: number
  },
): SignedMessage => {
  const message = readMessage(bytes, { max: of.max })
  const { envelope } = message
  const roles = envelope.from === 'server' ? rolesOf[envelope.body.type] : undefined
  if (roles === undefined) throw new Problem('unsupported', `${envelope.body.type} does not come from a server`, { reason: 'message.direction' })
  if (envelope.tenant !== of.tenant) throw new Problem('forbidden', `a message of tenant ${envelope.tenant}`, { reason: 'message.tenant' })
  const isMine = envelope.body.type === 'broadcast' ? of.groups?.has(envelope.device) === true : envelope.device === of.client
  if (!isMine) throw new Problem('forbidden', `a message to ${envelope.device}`, { reason: 'message.device' })
  const signer = of.trust.signerOf(message.kid, roles, of.time, statedIn(envelope.body))
  if (!verifyWith(signer, message.tbs, message.signature))
    throw new Problem('unauthenticated', 'the signature does not verify', { reason: 'message.signature' })
  return message
}
