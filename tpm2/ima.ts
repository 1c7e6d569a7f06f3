import { concat, TpmFormatError } from './bytes.ts'
import { alg } from './constants.ts'
import { digest, hashName } from './kdf.ts'
import { le32, LittleEndianReader } from './little-endian.ts'

/** Limits of a list that comes over the wire, and of one that an operator judges from a file. */
export const imaLimits = {
  wire: { maxEntries: 100_000, maxBytes: 2 << 20 },
  offline: { maxEntries: 100_000, maxBytes: 16 << 20 },
} as const
export interface ImaLimits {
  readonly maxEntries: number
  readonly maxBytes: number
}

/**
 * One entry of a Linux IMA measurement list (Documentation/security/IMA-templates): nothing in it is authentic before `replayIma` has led it to a quoted
 * PCR 10. What a violation names is not known: it has no digest.
 */
export interface ImaEntry {
  readonly template: 'ima-ng' | 'ima-sig'
  /** SHA-1 over the template data as the list has it; zeros for a violation. */
  readonly templateHash: Uint8Array
  /** The fields with their lengths: what is hashed for each bank. */
  readonly templateData: Uint8Array
  /** Whether the kernel gave up measuring this file: it was written to while it was read. */
  readonly violation: boolean
  /** TPM_ALG_ID of the file's digest. */
  readonly hash: number
  readonly digest: Uint8Array
  /** As the kernel wrote it; bytes that are not UTF-8 as `\xNN`. */
  readonly path: string
  /** `security.ima` or portable EVM signature of the file as it is in its extended attribute, if it has one. Not verified here. */
  readonly signature: Uint8Array | null
}

const refuse = (reason: string, detail: string): never => {
  throw new TpmFormatError(`measurement list: ${detail}`, `ima.${reason}`)
}

/** The PCR that Linux measures files into. */
export const imaPcr = 10
const sha1Size = 20
const maxTemplateName = 32
const maxTemplateData = 16 << 10
const templates = { 'ima-ng': 2, 'ima-sig': 3 } as const
const fileHashes: Readonly<Record<string, number>> = { sha1: alg.sha1, sha256: alg.sha256, sha384: alg.sha384, sha512: alg.sha512 }
const fatal = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })
const latin1 = (bytes: Uint8Array): string => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
const isZero = (bytes: Uint8Array): boolean => bytes.every((byte) => byte === 0)

/** d-ng: algorithm name, colon, NUL, digest. Of a violation the digest is zeros, of 20 bytes from older kernels. */
const readDigest = (field: Uint8Array, violation: boolean): { readonly hash: number; readonly digest: Uint8Array } => {
  const end = field.subarray(0, maxTemplateName).indexOf(0)
  const name = latin1(field.subarray(0, Math.max(0, end - 1)))
  const digest = field.subarray(end + 1)
  const hash = Object.hasOwn(fileHashes, name) ? fileHashes[name] : undefined
  if (end < 1 || field[end - 1] !== 0x3a || hash === undefined) return refuse('malformed', 'a file digest of another form or algorithm')
  const right = digest.length === hashName(hash).size || (violation && digest.length === sha1Size)
  if (!right || (violation && !isZero(digest))) refuse('malformed', `a ${name} digest of ${digest.length} bytes`)
  return { hash, digest }
}

/** n-ng: a NUL-terminated path. */
const readPath = (field: Uint8Array): string => {
  const end = field.length - 1
  if (end < 0 || field.indexOf(0) !== end) refuse('malformed', 'a path that does not end with its NUL')
  try {
    return fatal.decode(field.subarray(0, end))
  } catch {
    return latin1(field.subarray(0, end)).replaceAll(/[\u0080-\u00ff]/g, (char) => `\\x${char.charCodeAt(0).toString(16)}`)
  }
}

const templateOf = (name: string): ImaEntry['template'] =>
  name === 'ima-ng' || name === 'ima-sig' ? name : refuse('template', `template ${name.replaceAll(/[^ -~]/g, '?')}`)

/** Entry of these fields; throws `ima.malformed`. */
const entryOf = (template: ImaEntry['template'], templateHash: Uint8Array, templateData: Uint8Array): ImaEntry => {
  const data = new LittleEndianReader(templateData, 'ima.malformed')
  const fields = Array.from({ length: templates[template] }, () => data.bytes(data.u32()))
  if (!data.done) refuse('malformed', 'bytes after the fields of its template')
  const [digestField = templateData, pathField = templateData, signature] = fields
  const violation = isZero(templateHash)
  const { hash, digest } = readDigest(digestField, violation)
  const hasSignature = signature !== undefined && signature.length > 0
  return { template, templateHash, templateData, violation, hash, digest, path: readPath(pathField), signature: hasSignature ? signature : null }
}

/** One record of `binary_runtime_measurements` (security/integrity/ima/ima_fs.c): little-endian, as machines of that order write it. */
const readEntry = (list: LittleEndianReader): ImaEntry => {
  if (list.u32() !== imaPcr) refuse('pcr', 'an entry of another PCR than 10')
  const templateHash = list.bytes(sha1Size)
  const nameLength = list.u32()
  if (nameLength > maxTemplateName) refuse('template', `a template name of ${nameLength} bytes`)
  const template = templateOf(latin1(list.bytes(nameLength)))
  const size = list.u32()
  if (size > maxTemplateData) refuse('limit.entry', `an entry of ${size} bytes`)
  return entryOf(template, templateHash, list.bytes(size))
}

const parseBinary = (bytes: Uint8Array, limits: ImaLimits): readonly ImaEntry[] => {
  const list = new LittleEndianReader(bytes, 'ima.truncated')
  const entries: ImaEntry[] = []
  while (!list.done) {
    if (entries.length >= limits.maxEntries) refuse('limit.entries', `more than ${limits.maxEntries} entries`)
    entries.push(readEntry(list))
  }
  return entries
}

const field = (bytes: Uint8Array): Uint8Array => concat(le32(bytes.length), bytes)
const unhex = (text: string): Uint8Array =>
  text.length % 2 === 0 && /^[0-9a-f]*$/.test(text) ? new Uint8Array(Buffer.from(text, 'hex')) : refuse('malformed', 'no hexadecimal number')

/** One line of `ascii_runtime_measurements`; the template data is put together again, so that its hash tells whether that was right. */
const lineEntry = (line: string): ImaEntry => {
  const [, pcr = '', templateHash = '', name = '', fields = ''] =
    /^ ?(\d{1,2}) ([0-9a-f]{40}) (\S{1,32}) (.*)$/s.exec(line) ?? refuse('malformed', 'a line of another form')
  if (pcr !== '10') refuse('pcr', 'an entry of another PCR than 10')
  const template = templateOf(name)
  const [, hash = '', digest = '', rest = ''] = /^([a-z0-9-]{1,16}):([0-9a-f]{1,128}) (.*)$/s.exec(fields) ?? refuse('malformed', 'no file digest')
  // Paths of older kernels have spaces: what follows the last one is the signature.
  const cut = template === 'ima-sig' ? rest.lastIndexOf(' ') : rest.length
  if (cut === -1) refuse('malformed', 'a line without its signature field')
  const path = Buffer.from(`${rest.slice(0, cut)}\0`, 'latin1')
  const signature = template === 'ima-sig' ? field(unhex(rest.slice(cut + 1))) : new Uint8Array(0)
  const data = concat(field(concat(Buffer.from(`${hash}:\0`, 'latin1'), unhex(digest))), field(path), signature)
  return data.length > maxTemplateData ? refuse('limit.entry', `an entry of ${data.length} bytes`) : entryOf(template, unhex(templateHash), data)
}

const parseAscii = (bytes: Uint8Array, limits: ImaLimits): readonly ImaEntry[] => {
  const entries: ImaEntry[] = []
  for (let at = 0; at < bytes.length;) {
    if (entries.length >= limits.maxEntries) refuse('limit.entries', `more than ${limits.maxEntries} entries`)
    const end = bytes.indexOf(0x0a, at)
    if (end === -1) refuse('truncated', 'the last line does not end')
    if (end - at > 3 * maxTemplateData) refuse('limit.entry', `a line of ${end - at} bytes`)
    entries.push(lineEntry(latin1(bytes.subarray(at, end))))
    at = end + 1
  }
  return entries
}

/**
 * Parses a Linux IMA measurement list with templates ima-ng and ima-sig, binary or ASCII, whichever it is. Throws TpmFormatError with a reason:
 * `ima.malformed`, `ima.truncated`, `ima.pcr`, `ima.template` (another template), `ima.limit.bytes`, `.entries`, `.entry`.
 */
export const parseIma = (bytes: Uint8Array, limits: ImaLimits): readonly ImaEntry[] => {
  if (bytes.length > limits.maxBytes) refuse('limit.bytes', `${bytes.length} bytes`)
  return (bytes[0] ?? 0) >= 0x20 && (bytes[1] ?? 0) >= 0x20 ? parseAscii(bytes, limits) : parseBinary(bytes, limits)
}

/** The ima-ng entry that a kernel makes for a file with this SHA-256 digest. */
export const imaEntry = (path: string, sha256: Uint8Array): ImaEntry => {
  const data = concat(field(concat(Buffer.from('sha256:\0', 'latin1'), sha256)), field(concat(Buffer.from(path, 'utf8'), Uint8Array.of(0))))
  return entryOf('ima-ng', digest(alg.sha1, data), data)
}

/** The binary list of these entries. */
export const marshalIma = (entries: readonly ImaEntry[]): Uint8Array => {
  const parts = entries.flatMap(({ template, templateHash, templateData }) => {
    const name = Buffer.from(template, 'latin1')
    return [le32(imaPcr), templateHash, le32(name.length), name, le32(templateData.length), templateData]
  })
  return new Uint8Array(Buffer.concat(parts))
}
