import { createHash, verify } from 'node:crypto'
import { importSpki } from '@fleetkey/protocol/x509/public-key.ts'

/** State of the log at one size, as its tree says. */
export interface TreeHead {
  /** Identity of the log: `fleetkey/<tenant>`. */
  readonly origin: string
  readonly size: number
  /** RFC 6962 root, 32 bytes. */
  readonly root: Uint8Array
}

/** Bounds what a reader looks at; sixteen signatures fit (C2SP signed-note asks for that many). */
const maxNote = 8192

/** The text to be signed: C2SP tlog-checkpoint v1, three lines, no extension lines. Origins with spaces, plus or control characters throw. */
export const checkpointText = ({ origin, size, root }: TreeHead): string => {
  if (!/^[^\s+\p{Cc}]+$/u.test(origin)) throw new RangeError('not an origin of a checkpoint')
  return `${origin}\n${size}\n${Buffer.from(root).toString('base64')}\n`
}

/** Key ID of an ECDSA key in a signed note: first four bytes of SHA-256 of its SubjectPublicKeyInfo (C2SP signed-note, type 0x02). */
const keyIdOf = (spki: Uint8Array): Buffer => createHash('sha256').update(spki).digest().subarray(0, 4)

/** The signed note (C2SP signed-note). `signature`: ECDSA P-256 with SHA-256 over the text's UTF-8 bytes, DER. */
export const signedCheckpoint = (head: TreeHead, signer: { readonly spki: Uint8Array; readonly signature: Uint8Array }): string =>
  `${checkpointText(head)}\n— ${head.origin} ${Buffer.concat([keyIdOf(signer.spki), signer.signature]).toString('base64')}\n`

/** The tree head that a note states, without looking at its signatures; undefined when it is not a checkpoint. */
export const readCheckpoint = (note: string): (TreeHead & { readonly text: string; readonly signatures: readonly string[] }) | undefined => {
  if (note.length > maxNote) return undefined
  const split = note.lastIndexOf('\n\n')
  if (split < 0 || !note.endsWith('\n')) return undefined
  const text = note.slice(0, split + 1)
  const signatures = note.slice(split + 2, -1).split('\n')
  const [origin = '', size = '', root = '', ...more] = text.slice(0, -1).split('\n')
  if (!/^[^\s+\p{Cc}]+$/u.test(origin) || !/^(?:0|[1-9]\d{0,15})$/.test(size) || !Number.isSafeInteger(Number(size)) || more.includes('')) return undefined
  const bytes = Buffer.from(root, 'base64')
  if (bytes.length !== 32 || bytes.toString('base64') !== root) return undefined
  return { origin, size: Number(size), root: new Uint8Array(bytes), text, signatures }
}

/** The tree head of a note that this key signed; undefined when it is no checkpoint or not signed by it. Other keys' lines are ignored. */
export const verifyCheckpoint = (note: string, spki: Uint8Array): TreeHead | undefined => {
  const head = readCheckpoint(note)
  if (head === undefined) return undefined
  const key = importSpki(spki)
  const prefix = `— ${head.origin} `
  const own = head.signatures
    .filter((line) => line.startsWith(prefix))
    .map((line) => Buffer.from(line.slice(prefix.length), 'base64'))
    .filter((bytes) => bytes.length > 4 && bytes.subarray(0, 4).equals(keyIdOf(spki)))
  const valid = own.length > 0 && own.every((bytes) => verify('sha256', Buffer.from(head.text), key, bytes.subarray(4)))
  return valid ? { origin: head.origin, size: head.size, root: head.root } : undefined
}
