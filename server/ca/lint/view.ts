import { oids } from '@fleetkey/protocol/x509/oids.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import type { Issuing, CertificateOrder, IssuerName } from '../tbs.ts'
import type { Profile } from '../profiles.ts'
import { treeOf, type Node, type Tree } from './tree.ts'

/** What is about to be signed, and what was ordered. */
export interface ToBeSigned {
  readonly tbs: Uint8Array
  /** AlgorithmIdentifier that will stand outside. */
  readonly algorithm: Uint8Array
  readonly profile: Profile
  readonly order: CertificateOrder
  readonly issuer: IssuerName
  readonly of: Issuing
  /** Milliseconds since 1970. */
  readonly now: number
}

export interface ExtensionView {
  readonly id: string
  readonly critical: boolean
  /** Criticality stands there although it is the default. */
  readonly written: boolean
  readonly value: Uint8Array
  /** The value as an element; undefined for bytes that are none. */
  readonly tree: Tree | undefined
}

export interface AttributeView {
  readonly type: string
  readonly value: Node
  readonly rdn: number
}

/** A TBSCertificate (RFC 5280 §4.1) taken apart as far as its structure carries. */
export interface View extends ToBeSigned {
  readonly tree: Tree
  /** Elements of the TBSCertificate and of every extension's value. */
  readonly nodes: readonly Node[]
  readonly version: Node | undefined
  readonly serial: Node
  readonly signature: Node
  readonly issuerName: Node
  readonly notBefore: Node
  readonly notAfter: Node
  /** Milliseconds since 1970; undefined for what is no date in the form of RFC 5280 §4.1.2.5. */
  readonly dates: { readonly notBefore: number | undefined; readonly notAfter: number | undefined }
  readonly subject: Node
  readonly attributes: readonly AttributeView[]
  readonly spki: Node
  readonly keyAlgorithm: Node
  readonly keyBits: Node
  /** The curve that the key names; undefined for one that we do not know, and for other keys. */
  readonly curve: { readonly kind: KeyKind; readonly size: number } | undefined
  readonly uniqueIds: readonly Node[]
  readonly extensions: readonly ExtensionView[]
  readonly extension: (id: string) => ExtensionView | undefined
}

const extensionOf = (node: Node): ExtensionView | undefined => {
  const [id, ...rest] = node.children
  const value = rest.at(-1)
  if (node.tag !== 0x30 || id?.tag !== 0x06 || value === undefined || value.tag !== 0x04 || rest.length > 2) return undefined
  const flag = rest.length === 2 ? rest[0] : undefined
  if (flag !== undefined && flag.tag !== 0x01) return undefined
  const critical = flag !== undefined && flag.content.some((byte) => byte !== 0)
  return { id: id.oid, critical, written: flag !== undefined && !critical, value: value.content, tree: treeOf(value.content) }
}

const attributesOf = (subject: Node): readonly AttributeView[] | undefined => {
  const found: AttributeView[] = []
  for (const [rdn, set] of subject.children.entries()) {
    if (set.tag !== 0x31) return undefined
    for (const attribute of set.children) {
      const [type, value] = attribute.children
      if (attribute.tag !== 0x30 || type?.tag !== 0x06 || value === undefined || attribute.children.length !== 2) return undefined
      found.push({ type: type.oid, value, rdn })
    }
  }
  return found
}

const curves: Readonly<Record<string, { readonly kind: KeyKind; readonly size: number }>> = {
  [oids.p256]: { kind: 'p256', size: 32 },
  [oids.p384]: { kind: 'p384', size: 48 },
}

const curveOf = ({ children: [algorithm, parameters] }: Node): View['curve'] =>
  algorithm?.oid === oids.ecPublicKey && parameters !== undefined && Object.hasOwn(curves, parameters.oid) ? curves[parameters.oid] : undefined

/** Text of bytes, one character each; and of UTF-8, with U+FFFD for what is none. */
export const latin1 = (bytes: Uint8Array): string => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('latin1')
export const utf8 = (bytes: Uint8Array): string => Buffer.from(bytes.buffer, bytes.byteOffset, bytes.length).toString('utf8')

/** Whether it has the one form that RFC 5280 §4.1.2.5 allows. */
export const hasDateForm = ({ tag, content }: Node): boolean => {
  const text = latin1(content)
  return (tag === 0x17 && /^\d{12}Z$/.test(text)) || (tag === 0x18 && /^\d{14}Z$/.test(text))
}

/** Digits with the year in full. */
export const dateDigits = ({ tag, content }: Node): string => {
  const text = latin1(content)
  return tag === 0x17 ? `${Number(text.slice(0, 2)) >= 50 ? '19' : '20'}${text}` : text
}

const dateOf = (node: Node): number | undefined => {
  if (!hasDateForm(node)) return undefined
  const text = dateDigits(node)
  const part = (from: number, length: number): number => Number(text.slice(from, from + length))
  const [year, month, day, hour, minute, second] = [part(0, 4), part(4, 2), part(6, 2), part(8, 2), part(10, 2), part(12, 2)] as const
  const at = Date.UTC(year, month - 1, day, hour, minute, second)
  const back = new Date(at)
  const exists = back.getUTCMonth() === month - 1 && back.getUTCDate() === day && hour < 24 && minute < 60 && second < 60
  return exists ? at : undefined
}

/** Takes it apart; undefined for what is no TBSCertificate at all. */
export const viewOf = (given: ToBeSigned): View | undefined => {
  const tree = treeOf(given.tbs)
  if (tree === undefined || tree.root.tag !== 0x30) return undefined
  const fields = [...tree.root.children]
  const take = (tag: number): Node | undefined => (fields[0]?.tag === tag ? fields.shift() : undefined)
  const version = take(0xa0)
  const [serial, signature, issuerName, validity, subject, spki] = [take(0x02), take(0x30), take(0x30), take(0x30), take(0x30), take(0x30)]
  const uniqueIds = [take(0x81), take(0x82)].filter((node) => node !== undefined)
  const list = take(0xa3)
  if (fields.length > 0 || serial === undefined || signature === undefined || issuerName === undefined) return undefined
  if (validity === undefined || subject === undefined || spki === undefined) return undefined
  const [[notBefore, notAfter], [keyAlgorithm, keyBits]] = [validity.children, spki.children]
  if (notBefore === undefined || notAfter === undefined || keyAlgorithm?.tag !== 0x30 || keyBits?.tag !== 0x03) return undefined
  if (validity.children.length !== 2 || spki.children.length !== 2) return undefined
  const attributes = attributesOf(subject)
  const [inner] = list?.children ?? []
  if (list !== undefined && (inner?.tag !== 0x30 || list.children.length !== 1)) return undefined
  const extensions = (inner?.children ?? []).map(extensionOf)
  if (attributes === undefined || !extensions.every((one) => one !== undefined)) return undefined
  return {
    ...given,
    tree,
    nodes: [tree, ...extensions.map((one) => one.tree)].flatMap((one) => one?.nodes ?? []),
    version,
    serial,
    signature,
    issuerName,
    notBefore,
    notAfter,
    dates: { notBefore: dateOf(notBefore), notAfter: dateOf(notAfter) },
    subject,
    attributes,
    spki,
    keyAlgorithm,
    keyBits,
    curve: curveOf(keyAlgorithm),
    uniqueIds,
    extensions,
    extension: (id) => extensions.find((one) => one.id === id),
  }
}
