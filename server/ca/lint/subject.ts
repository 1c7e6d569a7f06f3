import { isPoint } from '@fleetkey/protocol/curves.ts'
import { isDeviceId, isName } from '@fleetkey/protocol/ids.ts'
import { oids } from '@fleetkey/protocol/x509/oids.ts'
import { backdate } from '../profiles.ts'
import { relativeNames, subjectAttributes } from '../subject.ts'
import { same, type Rules } from './rule.ts'
import type { Node } from './tree.ts'
import { dateDigits, hasDateForm, utf8, type View } from './view.ts'

const commonNames = ({ attributes }: View): readonly Node[] => attributes.filter(({ type }) => type === oids.commonName).map(({ value }) => value)

const isEndless = (node: Node): boolean => node.tag === 0x18 && dateDigits(node) === '99991231235959Z'

/** Runs a rule over both dates when they can be read: that they can is another rule's. */
const dated = (rule: (notBefore: number, notAfter: number, view: View) => boolean) => (view: View) => {
  const { notBefore, notAfter } = view.dates
  return notBefore === undefined || notAfter === undefined || rule(notBefore, notAfter, view)
}

const both = (rule: (node: Node) => boolean) => (view: View) => rule(view.notBefore) && rule(view.notAfter)

/** Dates. */
export const validityRules = {
  'validity.form': { source: 'RFC 5280 §4.1.2.5', says: 'dates with seconds, without fraction, in UTC', holds: both(hasDateForm) },
  'validity.date': {
    source: 'RFC 5280 §4.1.2.5',
    says: 'dates that exist',
    holds: ({ notBefore, notAfter, dates }) =>
      (!hasDateForm(notBefore) || dates.notBefore !== undefined) && (!hasDateForm(notAfter) || dates.notAfter !== undefined),
  },
  'validity.utc-time': { source: 'RFC 5280 §4.1.2.5', says: 'UTCTime until 2049', holds: both((node) => node.tag !== 0x18 || dateDigits(node) >= '2050') },
  'validity.order': { source: 'RFC 5280 §4.1.2.5', says: 'an end after the beginning', holds: dated((notBefore, notAfter) => notBefore < notAfter) },
  'validity.endless': {
    source: 'RFC 5280 §4.1.2.5',
    says: 'an end: 99991231235959Z is for factory identities (IEEE 802.1AR §8)',
    holds: ({ notAfter }) => !isEndless(notAfter),
  },
  'validity.life': {
    source: 'profile; CA/B BR §6.3.2',
    says: 'no longer than the profile says',
    holds: dated((notBefore, notAfter, { profile, notAfter: node }) => isEndless(node) || notAfter - notBefore <= profile.life + backdate),
  },
  'validity.issuer': {
    source: 'RFC 5280 §6.1.3',
    says: 'no end after that of the issuer',
    holds: dated((_, notAfter, { issuer, notAfter: node }) => isEndless(node) || notAfter <= issuer.until),
  },
  'validity.backdate': {
    source: 'profile; CA/B BR §7.1.2.7',
    says: 'a beginning at most an hour ago, and not to come',
    holds: dated((notBefore, _, { now }) => notBefore <= now && now - notBefore < backdate + 60_000),
  },
} as const satisfies Rules

const bounds: ReadonlyMap<string, number> = new Map(Object.values(subjectAttributes).map(({ oid, most }) => [oid, most]))

/** Names of the subject. */
export const subjectRules = {
  'subject.present': { source: 'RFC 5280 §4.1.2.6', says: 'a subject', holds: ({ attributes }) => attributes.length > 0 },
  'subject.one-name': { source: 'CA/B BR §7.1.4.3', says: 'one common name', holds: (view) => commonNames(view).length <= 1 },
  'subject.attributes': {
    source: 'profile',
    says: 'the attributes of the profile in front of the common name, and no other',
    holds: ({ subject, profile: { attributes } }) => {
      const wanted = relativeNames(attributes)
      const others = subject.children.filter(({ children }) => children.length > 0 && children.every((one) => one.children[0]?.oid !== oids.commonName))
      return others.length === wanted.length && wanted.every((name, at) => same(subject.children[at]?.bytes, name))
    },
  },
  'subject.bounds': {
    source: 'RFC 5280 §A.1',
    says: 'attributes with no more characters than their kind may have, and none empty',
    holds: ({ attributes }) =>
      attributes.every(({ type, value: { content } }) => {
        const most = bounds.get(type) ?? Infinity
        return most === Infinity || (content.length > 0 && Array.from(utf8(content)).length <= most)
      }),
  },
  'subject.country': {
    source: 'RFC 5280 §A.1; ISO 3166',
    says: 'a country as two capital letters in a PrintableString',
    holds: ({ attributes }) => attributes.every(({ type, value }) => type !== oids.country || (value.tag === 0x13 && /^[A-Z]{2}$/.test(utf8(value.content)))),
  },
  'subject.rdn': {
    source: 'CA/B BR §7.1.4.2',
    says: 'one attribute in each relative name',
    holds: ({ subject }) => subject.children.every(({ children }) => children.length === 1),
  },
  'subject.length': {
    source: 'RFC 5280 §A.1',
    says: 'a common name of 1 to 64 characters',
    holds: (view) => commonNames(view).every(({ content }) => content.length > 0 && Array.from(utf8(content)).length <= 64),
  },
  'subject.string': {
    source: 'RFC 5280 §4.1.2.4',
    says: 'UTF8String or PrintableString',
    holds: ({ attributes }) => attributes.every(({ value }) => value.tag === 0x0c || value.tag === 0x13),
  },
  'subject.encoding': {
    source: 'RFC 3629 §3',
    says: 'valid UTF-8',
    holds: ({ attributes }) => attributes.every(({ value }) => value.tag !== 0x0c || same(Buffer.from(utf8(value.content)), value.content)),
  },
  'subject.control': {
    source: 'CVE-2009-2408',
    says: 'no control characters',
    holds: ({ attributes }) => attributes.every(({ value }) => !value.content.some((byte) => byte < 0x20 || byte === 0x7f)),
  },
  'subject.id': {
    source: 'ids; GHSA-59w7-v8rr-pr4p',
    says: 'an id of a device or station, where it is one',
    holds: (view) =>
      (view.profile.names !== 'device' && view.profile.names !== 'station') ||
      commonNames(view).every(({ content }) => (view.profile.names === 'device' ? isDeviceId : isName)(utf8(content))),
  },
  'subject.order': {
    source: 'this CA: nothing is taken from a request',
    says: 'the name that was ordered',
    holds: (view) => commonNames(view).every(({ content }) => utf8(content) === view.order.subject),
  },
} as const satisfies Rules

const isEc = ({ keyAlgorithm: { children } }: View): boolean => children[0]?.oid === oids.ecPublicKey
const isNamed = (view: View): boolean => view.keyAlgorithm.children.length === 2 && view.keyAlgorithm.children[1]?.tag === 0x06
const isUncompressed = (view: View): boolean => {
  const { curve } = view
  return curve === undefined || (view.keyBits.content[1] === 4 && view.keyBits.content.length === 2 + 2 * curve.size)
}

/** The public key. */
export const keyRules = {
  'key.allowed': {
    source: 'profile; CA/B BR §6.1.5',
    says: 'a key of a kind that the profile admits',
    holds: (view) => {
      if (isEc(view) && !isNamed(view)) return true
      const { curve } = view
      return curve !== undefined && view.profile.keys.includes(curve.kind)
    },
  },
  'key.named-curve': { source: 'RFC 5480 §2.1.1', says: 'a curve by its name', holds: (view) => !isEc(view) || isNamed(view) },
  'key.uncompressed': { source: 'RFC 5480 §2.2', says: 'an uncompressed point', holds: isUncompressed },
  'key.bits': { source: 'RFC 5280 §4.1.2.7', says: 'a key without unused bits', holds: ({ keyBits }) => keyBits.content[0] === 0 },
  'key.on-curve': {
    source: 'SP 800-56A §5.6.2.3.3',
    says: 'a point on its curve',
    holds: (view) => {
      const { curve } = view
      if (curve === undefined || !isUncompressed(view)) return true
      const point = view.keyBits.content.subarray(2)
      return isPoint(curve.kind, { x: point.subarray(0, curve.size), y: point.subarray(curve.size) })
    },
  },
  'key.order': { source: 'this CA: proof of possession', says: 'the key that was ordered', holds: ({ spki, order }) => same(spki.bytes, order.spki) },
  'key.issuer': {
    source: 'SP 800-57 Part 1 §5.2',
    says: 'another key than the issuer’s for an end entity',
    holds: ({ spki, issuer, profile }) => profile.ca !== null || !same(spki.bytes, issuer.spki),
  },
} as const satisfies Rules
