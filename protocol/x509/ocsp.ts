import { Problem } from '../problem.ts'
import {
  bitString,
  der,
  enumerated,
  explicit,
  generalizedTime,
  inside,
  octetString,
  oid,
  readBoolean,
  readOid,
  readUnsigned,
  sequence,
  tags,
  whole,
} from './der.ts'
import type { DerReader, Element } from './der.ts'
import { ecdsaSha256 } from './csr.ts'
import { oids } from './oids.ts'
import { crlReasons, type CrlReason } from './reasons.ts'

/** Which certificate is asked about (RFC 6960 §4.1.1). */
export interface CertId {
  /** As it came: the answer repeats it. */
  readonly der: Uint8Array
  readonly hash: 'sha1' | 'sha256'
  readonly issuerNameHash: Uint8Array
  readonly issuerKeyHash: Uint8Array
  /** Hex, as in Certificate. */
  readonly serial: string
}

export interface OcspRequest {
  readonly ids: readonly CertId[]
  /** 1 to 128 bytes (RFC 9654 §2.1); null without one. */
  readonly nonce: Uint8Array | null
}

export const maxOcspRequest = 4096
const maxIds = 16

const fail = (what: string): never => {
  throw new Problem('malformed', `OCSP request: ${what}`, { reason: 'x509.ocsp' })
}

const hashes: Readonly<Record<string, CertId['hash']>> = { [oids.sha1]: 'sha1', [oids.sha256]: 'sha256' }
const hashLength = { sha1: 20, sha256: 32 } as const

const readHash = (algorithm: DerReader): CertId['hash'] => {
  const id = readOid(algorithm.next(tags.oid))
  const parameters = algorithm.optional(tags.null)
  algorithm.end()
  if (parameters !== undefined && parameters.content.length > 0) fail('parameters of a hash')
  const hash = Object.hasOwn(hashes, id) ? hashes[id] : undefined
  if (hash === undefined) throw new Problem('unsupported', `OCSP request: hash ${id}`, { reason: 'x509.ocsp.hash' })
  return hash
}

const readCertId = (element: Element): CertId => {
  const fields = inside(element)
  const hash = readHash(fields.enter(tags.sequence))
  const [issuerNameHash, issuerKeyHash] = [fields.next(tags.octetString).content, fields.next(tags.octetString).content]
  if (issuerNameHash.length !== hashLength[hash] || issuerKeyHash.length !== hashLength[hash]) fail('a hash of another length')
  const serial = readUnsigned(fields.next(tags.integer))
  if (serial.length > 21) fail('a serial of more than 20 bytes')
  fields.end()
  const bytes = serial[0] === 0 && serial.length > 1 ? serial.subarray(1) : serial
  return { der: element.bytes, hash, issuerNameHash, issuerKeyHash, serial: Buffer.from(bytes).toString('hex') }
}

/** Extensions: the nonce; another one that is critical makes the request one that we do not understand. */
const readNonce = (element: Element | undefined): Uint8Array | null => {
  if (element === undefined) return null
  const list = inside(whole(element.content, tags.sequence))
  if (list.done) fail('an empty list of extensions')
  let nonce: Uint8Array | null = null
  for (let count = 0; !list.done; count++) {
    if (count >= maxIds) fail('too many extensions')
    const one = list.enter(tags.sequence)
    const id = readOid(one.next(tags.oid))
    const flag = one.optional(tags.boolean)
    const critical = flag !== undefined && readBoolean(flag)
    const value = one.next(tags.octetString).content
    one.end()
    if (id !== oids.ocspNonce) {
      if (critical) fail(`critical extension ${id}`)
      continue
    }
    if (nonce !== null) fail('two nonces')
    nonce = whole(value, tags.octetString).content
    if (nonce.length === 0 || nonce.length > 128) fail(`a nonce of ${nonce.length} bytes`)
  }
  return nonce
}

const readRequest = (one: DerReader): CertId => {
  const id = readCertId(one.next(tags.sequence))
  readNonce(one.optional(0xa0))
  one.end()
  return id
}

/**
 * Reads a request (RFC 6960 §4.1.1), DER and nothing else, at most 4 KiB and 16 certificates. A signature is not asked for and not looked at, nor is the name
 * of who asks: the answer is the same for everybody. Throws Problem('malformed'), and 'unsupported' for a hash other than SHA-1 (which here only names an
 * issuer) and SHA-256.
 */
export const parseOcspRequest = (bytes: Uint8Array): OcspRequest => {
  if (bytes.length > maxOcspRequest) fail(`${bytes.length} bytes`)
  const outer = inside(whole(bytes, tags.sequence))
  const fields = outer.enter(tags.sequence)
  outer.optional(0xa0)
  outer.end()
  // Version 1 is the default, which DER leaves out.
  if (fields.peek() === 0xa0) fail('another version than 1')
  fields.optional(0xa1)
  const list = fields.enter(tags.sequence)
  const ids: CertId[] = []
  while (!list.done) {
    if (ids.length >= maxIds) fail(`more than ${maxIds} certificates`)
    ids.push(readRequest(list.enter(tags.sequence)))
  }
  if (ids.length === 0) fail('about nothing')
  const nonce = readNonce(fields.optional(0xa2))
  fields.end()
  return { ids, nonce }
}

/** What is said of one certificate. Times: milliseconds since 1970. */
export interface OcspStatus {
  readonly id: CertId
  readonly status: 'good' | 'unknown' | { readonly revokedAt: number; readonly code: CrlReason }
  readonly thisUpdate: number
  readonly nextUpdate: number
}

const statusOf = (status: OcspStatus['status']): Uint8Array => {
  if (status === 'good') return der(0x80)
  if (status === 'unknown') return der(0x82)
  // No reason is said as `unspecified` is: by saying nothing.
  const reason = status.code === 'unspecified' ? [] : [explicit(0, enumerated(crlReasons[status.code]))]
  return der(0xa1, generalizedTime(status.revokedAt), ...reason)
}

/** ResponseData (RFC 6960 §4.2.1): what the responder signs with ECDSA and SHA-256. `responder`: its name, DER. */
export const ocspResponseData = (of: {
  readonly responder: Uint8Array
  readonly producedAt: number
  readonly statuses: readonly OcspStatus[]
  readonly nonce: Uint8Array | null
}): Uint8Array =>
  sequence(
    explicit(1, of.responder),
    generalizedTime(of.producedAt),
    sequence(
      ...of.statuses.map(({ id, status, thisUpdate, nextUpdate }) =>
        sequence(id.der, statusOf(status), generalizedTime(thisUpdate), explicit(0, generalizedTime(nextUpdate))),
      ),
    ),
    ...(of.nonce === null ? [] : [explicit(1, sequence(sequence(oid(oids.ocspNonce), octetString(octetString(of.nonce)))))]),
  )

/** OCSPResponse of a ResponseData, its DER signature and the certificate of who made it. */
export const ocspResponse = (data: Uint8Array, signature: Uint8Array, certificate: Uint8Array): Uint8Array =>
  sequence(
    enumerated(0),
    explicit(0, sequence(oid(oids.ocspBasic), octetString(sequence(data, ecdsaSha256, bitString(signature), explicit(0, sequence(certificate)))))),
  )

const errors = { malformedRequest: 1, internalError: 2, tryLater: 3, unauthorized: 6 } as const

/** OCSPResponse without an answer (RFC 6960 §2.3), which nobody signs. */
export const ocspError = (error: keyof typeof errors): Uint8Array => sequence(enumerated(errors[error]))

/** OCSPRequest about one certificate; for tests and tools. `nonce`: 1 to 128 bytes. */
export const makeOcspRequest = (of: Pick<CertId, 'hash' | 'issuerNameHash' | 'issuerKeyHash'> & { serial: Uint8Array; nonce?: Uint8Array }): Uint8Array => {
  const id = sequence(
    sequence(oid(oids[of.hash]), Uint8Array.of(tags.null, 0)),
    octetString(of.issuerNameHash),
    octetString(of.issuerKeyHash),
    der(tags.integer, of.serial),
  )
  const { nonce } = of
  const extensions = nonce === undefined ? [] : [explicit(2, sequence(sequence(oid(oids.ocspNonce), octetString(octetString(nonce)))))]
  return sequence(sequence(sequence(sequence(id)), ...extensions))
}
