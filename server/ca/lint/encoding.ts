import { same, type Rules } from './rule.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import type { View } from './view.ts'

const flawless = (flaw: Parameters<View['tree']['flaws']['has']>[0]) => (view: View) =>
  !view.tree.flaws.has(flaw) && view.extensions.every(({ tree }) => tree === undefined || !tree.flaws.has(flaw))

const isMinimalInteger = (content: Uint8Array): boolean => {
  const [first = 0, second = 0] = [content[0], content[1]]
  return content.length === 1 || (content.length > 1 && !(first === 0 && second < 0x80) && !(first === 0xff && second >= 0x80))
}

const isMinimalOid = (content: Uint8Array): boolean =>
  content.length > 0 && (content.at(-1) ?? 0x80) < 0x80 && !content.some((byte, at) => byte === 0x80 && (at === 0 || (content[at - 1] ?? 0) < 0x80))

/** Named bits end with a one (X.690 §11.2.2). */
const isMinimalBits = (content: Uint8Array): boolean => {
  const [unused = 8, ...bytes] = content
  const last = bytes.at(-1)
  return last === undefined ? unused === 0 : unused < 8 && ((last >> unused) & 1) === 1 && (last & ((1 << unused) - 1)) === 0
}

/** Form of the whole: DER, version, serial, signature algorithm, issuer. */
export const encodingRules = {
  'der.length': { source: 'X.690 §10.1', says: 'lengths in the fewest bytes', holds: flawless('length') },
  'der.definite': { source: 'X.690 §10.1', says: 'definite lengths', holds: flawless('indefinite') },
  'der.trailing': { source: 'X.690 §8.1', says: 'nothing behind a structure', holds: flawless('trailing') },
  'der.string': { source: 'X.690 §10.2', says: 'strings in one piece', holds: flawless('string') },
  'der.integer': {
    source: 'X.690 §8.3.2',
    says: 'integers in the fewest bytes',
    holds: ({ nodes }) => nodes.every((node) => node.tag !== 0x02 || isMinimalInteger(node.content)),
  },
  'der.boolean': {
    source: 'X.690 §11.1',
    says: 'true is ff',
    holds: ({ nodes }) => nodes.every((node) => node.tag !== 0x01 || (node.length === 1 && (node.content[0] === 0xff || node.content[0] === 0))),
  },
  'der.default': {
    source: 'X.690 §11.5',
    says: 'defaults are left out (critical FALSE, cA FALSE)',
    holds: (view) => {
      const flag = view.extension(oids.basicConstraints)?.tree?.root.children[0]
      return view.extensions.every(({ written }) => !written) && !(flag?.tag === 0x01 && flag.content[0] === 0)
    },
  },
  'der.bits': {
    source: 'X.690 §11.2.2',
    says: 'named bits without zeros at the end',
    holds: (view) => {
      const usage = view.extension(oids.keyUsage)?.tree?.root
      return usage === undefined || isMinimalBits(usage.content)
    },
  },
  'der.oid': {
    source: 'X.690 §8.19.2',
    says: 'object identifiers in the fewest bytes',
    holds: ({ nodes }) => nodes.every((node) => node.tag !== 0x06 || isMinimalOid(node.content)),
  },
  'tbs.size': { source: 'bound of this CA', says: 'at most 8 KiB', holds: ({ tbs }) => tbs.length <= 8 << 10 },
  'tbs.unique-ids': { source: 'RFC 5280 §4.1.2.8', says: 'no unique identifiers', holds: ({ uniqueIds }) => uniqueIds.length === 0 },
  'version.three': { source: 'RFC 5280 §4.1.2.1', says: 'version 3', holds: ({ version }) => same(version?.bytes, Uint8Array.of(0xa0, 3, 2, 1, 2)) },
  'serial.positive': {
    source: 'RFC 5280 §4.1.2.2',
    says: 'a positive serial',
    holds: ({ serial: { content } }) => (content[0] ?? 0x80) < 0x80 && content.some((byte) => byte !== 0),
  },
  'serial.length': { source: 'RFC 5280 §4.1.2.2', says: 'a serial of at most 20 bytes', holds: ({ serial }) => serial.content.length <= 20 },
  'serial.entropy': { source: 'CA/B BR §7.1', says: 'a serial of at least 64 random bits', holds: ({ serial }) => serial.content.length >= 9 },
  'serial.intent': {
    source: 'this CA: intent before signature',
    says: 'the serial of the durable intent',
    holds: ({ serial: { content }, of }) => BigInt(`0x${Buffer.from(content).toString('hex') || '0'}`) === BigInt(`0x${of.serial}`),
  },
  'signature.same': {
    source: 'RFC 5280 §4.1.1.2',
    says: 'one signature algorithm, inside and outside',
    holds: ({ signature, algorithm }) => same(signature.bytes, algorithm),
  },
  'signature.allowed': {
    source: 'CA/B BR §7.1.3.2',
    says: 'ecdsa-with-SHA256',
    holds: ({ signature: { children } }) => children[0]?.oid === oids.ecdsaSha256,
  },
  'signature.parameters': {
    source: 'RFC 5758 §3.2',
    says: 'no parameters of the signature algorithm',
    holds: ({ signature }) => signature.children.length === 1,
  },
  'issuer.name': {
    source: 'RFC 5280 §6.1.3',
    says: 'the subject of the issuer, byte by byte',
    holds: ({ issuerName, issuer }) => same(issuerName.bytes, issuer.subject),
  },
} as const satisfies Rules
