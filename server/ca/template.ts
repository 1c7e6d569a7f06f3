import { hash } from 'node:crypto'
import { isPoint } from '@fleetkey/protocol/curves.ts'
import { isDeviceId } from '@fleetkey/protocol/ids.ts'
import { isCanonicalP256 } from '@fleetkey/protocol/x509/public-key.ts'
import { utcTime } from '@fleetkey/protocol/x509/der.ts'
import { lint, requireClean } from './lint/lint.ts'
import { nameBy, placeOfId } from './name-pattern.ts'
import { backdate, uriOf, type Profile } from './profiles.ts'
import { altNamesOf, keyIdentifier, signatureAlgorithm, tbsOf, type CertificateOrder, type IssuerName, type Issuing } from './tbs.ts'

/**
 * A certificate that broke no rule of the lint, and where in it the parts lie that differ from order to order: what is filled in has the same length, is
 * judged by itself, and everything else is the bytes that were linted. An order of another shape has another template, or none: it is written and linted whole.
 */
interface Template {
  readonly bytes: Uint8Array
  readonly serial: number
  readonly notBefore: number
  readonly notAfter: number
  /** Where the id stands: common name, and alternative names. */
  readonly subject: readonly number[]
  readonly point: number
  readonly keyIdentifier: number
}

export interface Filling {
  readonly profile: Profile
  readonly order: CertificateOrder
  readonly issuer: IssuerName
  readonly of: Issuing
  readonly now: number
}

/** By issuer and profile, then by tenant and length of the id. */
const templates = new WeakMap<IssuerName, WeakMap<Profile, Map<string, Template>>>()
const prefixLength = 27
const year2050 = Date.UTC(2050, 0, 1)

/** Whether every part that is filled in keeps the rules that a linted certificate cannot answer for it. */
const isSound = ({ profile, order, issuer, of, now }: Filling): boolean =>
  (profile.names === 'device' || profile.names === 'station') &&
  // Where others ask depends on the serial.
  (profile.status !== true || issuer.status === undefined) &&
  profile.noCheck !== true &&
  order.role === undefined &&
  order.names === undefined &&
  profile.keys.includes('p256') &&
  isDeviceId(order.subject) &&
  // An id that goes without one of the names has a certificate of another shape.
  profile.patterns.every((pattern) => nameBy(pattern, { tenant: of.tenant, id: order.subject }) !== undefined) &&
  isCanonicalP256(order.spki) &&
  isPoint('p256', { x: order.spki.subarray(prefixLength, prefixLength + 32), y: order.spki.subarray(prefixLength + 32) }) &&
  Buffer.compare(order.spki, issuer.spki) !== 0 &&
  /^[4-7][0-9a-f]{31}$/.test(of.serial) &&
  of.notBefore < of.notAfter &&
  of.notBefore % 1000 === 0 &&
  of.notAfter % 1000 === 0 &&
  of.notAfter - of.notBefore <= profile.life + backdate &&
  of.notAfter <= issuer.until &&
  of.notBefore <= now &&
  now - of.notBefore < backdate + 60_000 &&
  of.notBefore > 0 &&
  of.notAfter < year2050

const write = (bytes: Uint8Array, at: number, text: string): void => {
  for (let index = 0; index < text.length; index++) bytes[at + index] = text.charCodeAt(index)
}

/** Texts of the last dates: certificates of one second share theirs. */
const dates = { notBefore: { at: NaN, text: '' }, notAfter: { at: NaN, text: '' } }
const dateText = (which: keyof typeof dates, at: number): string => {
  if (dates[which].at !== at) dates[which] = { at, text: utcTime(at) }
  return dates[which].text
}

const filled = (template: Template, { order, of }: Filling): Uint8Array => {
  const bytes = Buffer.allocUnsafe(template.bytes.length)
  bytes.set(template.bytes)
  bytes.write(of.serial, template.serial, 'hex')
  write(bytes, template.notBefore, dateText('notBefore', of.notBefore))
  write(bytes, template.notAfter, dateText('notAfter', of.notAfter))
  for (const at of template.subject) write(bytes, at, order.subject)
  bytes.set(order.spki.subarray(prefixLength), template.point)
  bytes.set(keyIdentifier(order.spki), template.keyIdentifier)
  return bytes
}

/** The place of these bytes; undefined unless they stand there once. */
const placeIn = (bytes: Buffer, part: Uint8Array): number | undefined => {
  const at = bytes.indexOf(part)
  return at < 0 || bytes.includes(part, at + 1) ? undefined : at
}

/** Where the id of this order stands in its alternative names; undefined where one of them is not to be told from what else is in the certificate. */
const idsInNames = (bytes: Buffer, { profile, order, of }: Filling): readonly number[] | undefined => {
  if (profile.names !== 'device' && profile.names !== 'station') return []
  const within = [uriOf(of.tenant, profile.names, '').length, ...profile.patterns.map((pattern) => placeOfId(pattern, of))]
  const names = altNamesOf(profile, order, of.tenant)
  const found = names.flatMap((name, at) => {
    const place = placeIn(bytes, name)
    // A name has at most 255 bytes: its header has two, or three from 128 on.
    return place === undefined ? [] : [place + (name[1] === 0x81 ? 3 : 2) + (within[at] ?? 0)]
  })
  return found.length === names.length && names.length === within.length ? found : undefined
}

/** Bytes that follow from the filling and occur nowhere else by chance. */
const marker = (text: string): Buffer => hash('sha256', text, 'buffer')

/** A template from an order with parts that cannot be mistaken for anything else; undefined when it is not clean, or not what the writer makes of the next order. */
const compile = (filling: Filling): Template | undefined => {
  const { profile, order, issuer, of, now } = filling
  const subject = 'z'.repeat(order.subject.length)
  const serial = `4${marker('serial').toString('hex').slice(1, 32)}`
  const marked = { ...filling, order: { ...order, subject }, of: { ...of, serial } }
  const tbs = Buffer.from(tbsOf(profile, marked.order, issuer, marked.of))
  const dates = placeIn(tbs, Buffer.from(`\x17\x0d${utcTime(of.notBefore)}\x17\x0d${utcTime(of.notAfter)}`, 'latin1'))
  const name = placeIn(tbs, Buffer.concat([Buffer.from([0x0c, subject.length]), Buffer.from(subject)]))
  const names = idsInNames(tbs, marked)
  const [at, point, key] = [placeIn(tbs, Buffer.from(serial, 'hex')), placeIn(tbs, order.spki), placeIn(tbs, keyIdentifier(order.spki))]
  if (dates === undefined || name === undefined || names === undefined || at === undefined || point === undefined || key === undefined) return undefined
  const template: Template = {
    bytes: tbs,
    serial: at,
    notBefore: dates + 2,
    notAfter: dates + 17,
    subject: [name + 2, ...names],
    point: point + prefixLength,
    keyIdentifier: key,
  }
  // What it makes of the order that asked for it is what the writer makes, byte by byte, and that breaks no rule.
  const [made, wanted] = [filled(template, filling), tbsOf(profile, order, issuer, of)]
  const given = { algorithm: signatureAlgorithm, profile, issuer, now }
  const clean = lint({ ...given, ...marked, tbs }).length === 0 && lint({ ...given, order, of, tbs: made }).length === 0
  return clean && Buffer.compare(made, wanted) === 0 ? template : undefined
}

/**
 * The TBSCertificate of an order, linted: as a whole, or by filling a template that was. Throws Problem('internal', reason `lint.RULE`) for one that breaks a
 * rule.
 */
export const writeClean = (filling: Filling): Uint8Array => {
  const known = fillTemplate(filling)
  if (known !== undefined) return known
  const { profile, order, issuer, of } = filling
  const tbs = tbsOf(profile, order, issuer, of)
  requireClean({ ...filling, tbs, algorithm: signatureAlgorithm })
  return tbs
}

/**
 * The TBSCertificate of an order by its template; undefined for what has none or does not keep a rule: then it is written and linted whole, which says what is
 * wrong.
 */
export const fillTemplate = (filling: Filling): Uint8Array | undefined => {
  if (!isSound(filling)) return undefined
  const { profile, issuer, order, of } = filling
  const byProfile = templates.get(issuer) ?? new WeakMap<Profile, Map<string, Template>>()
  templates.set(issuer, byProfile)
  const shapes = byProfile.get(profile) ?? new Map<string, Template>()
  byProfile.set(profile, shapes)
  const shape = `${of.tenant}/${order.subject.length}`
  const known = shapes.get(shape) ?? compile(filling)
  if (known === undefined) return undefined
  shapes.set(shape, known)
  return filled(known, filling)
}
