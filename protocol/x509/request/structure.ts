import { Problem } from '../../problem.ts'
import { checkDer, DerProblem, inside, readBits, readBoolean, readOid, readSmall, tags, whole, type DerFault, type DerReader } from '../der.ts'
import { oids } from '../oids.ts'
import { refuseRequest, type RequestReasonCode } from './reasons.ts'

/** A certification request (RFC 2986 §4) taken apart; nothing is believed yet. */
export interface RequestStructure {
  /** CertificationRequestInfo: what is signed. */
  readonly info: Uint8Array
  /** Name, DER. */
  readonly subject: Uint8Array
  /** SubjectPublicKeyInfo, DER. */
  readonly spki: Uint8Array
  readonly extensions: ReadonlyMap<string, { readonly critical: boolean; readonly value: Uint8Array }>
  readonly signatureAlgorithm: { readonly oid: string; readonly parameters: boolean }
  readonly signature: Uint8Array
}

export const requestLimits = { bytes: 16 << 10, depth: 12, attributes: 4, extensions: 16 } as const

const faults: Readonly<Record<DerFault, RequestReasonCode>> = {
  size: 'csr.size',
  depth: 'csr.der.depth',
  early: 'csr.der',
  tag: 'csr.der',
  indefinite: 'csr.der.indefinite',
  length: 'csr.der.length',
  trailing: 'csr.der.trailing',
  value: 'csr.der.value',
}

/** Runs a reader; what it does not understand is refused with `reason`, or with the reason of what is wrong in its encoding. */
export const understood = <T>(read: () => T, reason?: RequestReasonCode): T => {
  try {
    return read()
  } catch (error) {
    if (error instanceof DerProblem) return refuseRequest(reason ?? faults[error.fault], error.message, error)
    if (error instanceof Problem && reason !== undefined && error.reason?.startsWith('csr.') !== true) return refuseRequest(reason, error.message, error)
    throw error
  }
}

/** DER of a file that is DER, or PEM with one block of a request and nothing else that could be taken for one. Throws Problem with a reason of `requestReasons`. */
export const requestOfFile = (file: Uint8Array): Uint8Array => {
  if (file[0] === tags.sequence) return file
  // A PEM file of the largest request, with as much text around it.
  if (file.length > 4 * requestLimits.bytes) refuseRequest('csr.size', `${file.length} bytes`)
  const text = new TextDecoder('latin1').decode(file)
  const [begin, ...others] = text.matchAll(/-----BEGIN ([^\n-]*)-----/g)
  if (begin === undefined || others.length > 0) refuseRequest('csr.pem', begin === undefined ? 'no PEM block' : 'several PEM blocks')
  const [, label, body = ''] = /-----BEGIN ((?:NEW )?CERTIFICATE REQUEST)-----\r?\n([A-Za-z0-9+/=\r\n]+)-----END \1-----/.exec(text) ?? []
  if (label === undefined) refuseRequest('csr.pem', `a block of ${begin?.[1]?.slice(0, 40).replace(/[^ -~]/g, '?') ?? ''}, or no base64`)
  const base64 = body.replaceAll(/[\r\n]/g, '')
  const bytes = new Uint8Array(Buffer.from(base64, 'base64'))
  return Buffer.from(bytes).toString('base64') === base64 ? bytes : refuseRequest('csr.pem', 'base64 that is not in its one form')
}

/** Takes a request apart: DER throughout, bounded, nothing that stands twice. Throws Problem with a reason of `requestReasons`. */
export const readStructure = (bytes: Uint8Array): RequestStructure => {
  if (bytes.length > requestLimits.bytes) refuseRequest('csr.size', `${bytes.length} bytes`)
  return understood(() => {
    const request = whole(bytes, tags.sequence)
    checkDer(bytes, requestLimits.depth)
    const outer = inside(request)
    const info = outer.next(tags.sequence)
    const algorithm = outer.enter(tags.sequence)
    const signature = readBits(outer.next(tags.bitString))
    outer.end()
    const fields = inside(info)
    if (readSmall(fields.next(tags.integer)) !== 0) refuseRequest('csr.version')
    const subject = fields.next(tags.sequence).bytes
    const spki = fields.next(tags.sequence).bytes
    const extensions = readAttributes(fields.enter(0xa0))
    fields.end()
    const oid = readOid(algorithm.next(tags.oid))
    return { info: info.bytes, subject, spki, extensions, signatureAlgorithm: { oid, parameters: !algorithm.done }, signature }
  })
}

const none: RequestStructure['extensions'] = new Map()

const readAttributes = (attributes: DerReader): RequestStructure['extensions'] => {
  const seen = new Set<string>()
  let extensions = none
  while (!attributes.done) {
    if (seen.size >= requestLimits.attributes) refuseRequest('csr.attribute.count')
    const attribute = attributes.enter(tags.sequence)
    const type = readOid(attribute.next(tags.oid))
    const values = attribute.enter(tags.set)
    attribute.end()
    if (seen.has(type)) refuseRequest('csr.attribute.duplicate', `attribute ${type} twice`)
    seen.add(type)
    if (type === oids.challengePassword) refuseRequest('csr.attribute.password')
    // How many there are is said before what they are.
    if (type !== oids.extensionRequest) continue
    const value = values.done ? refuseRequest('csr.attribute.duplicate', 'an attribute without value') : values.enter(tags.sequence)
    if (!values.done) refuseRequest('csr.attribute.duplicate', 'an attribute of two values')
    extensions = readExtensions(value)
  }
  for (const type of seen) if (type !== oids.extensionRequest) refuseRequest('csr.attribute.unknown', `attribute ${type}`)
  return extensions
}

const readExtensions = (list: DerReader): RequestStructure['extensions'] => {
  const found = new Map<string, { critical: boolean; value: Uint8Array }>()
  while (!list.done) {
    if (found.size >= requestLimits.extensions) refuseRequest('csr.extension.value', 'more than 16 extensions')
    const one = list.enter(tags.sequence)
    const id = readOid(one.next(tags.oid))
    const flag = one.optional(tags.boolean)
    const critical = flag !== undefined && readBoolean(flag)
    if (flag !== undefined && !critical) refuseRequest('csr.der.value', 'a default written out')
    const { content } = one.next(tags.octetString)
    one.end()
    if (found.has(id)) refuseRequest('csr.extension.duplicate', `extension ${id} twice`)
    found.set(id, { critical, value: content })
  }
  return found
}
