import { createPublicKey, generateKeyPairSync } from 'node:crypto'
import { nameOf, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { secondReading } from '@fleetkey/protocol/x509/library.ts'
import { nameAttributes } from '@fleetkey/protocol/x509/name.ts'
import { keyUsages, oids } from '@fleetkey/protocol/x509/oids.ts'
import { roleEku } from '@fleetkey/protocol/x509/roles.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import { lint } from './lint/lint.ts'
import { namesOf, profileNames, validityOf, type Profile, type Profiles } from './profiles.ts'
import { attributeNames, attributesOf, subjectAttributes } from './subject.ts'
import { altNamesOf, certificateOf, extensionsOf, serialOf, signatureAlgorithm, tbsOf, type CertificateOrder, type IssuerName, type Issuing } from './tbs.ts'

const curves: Readonly<Record<KeyKind, string>> = { p256: 'prime256v1', p384: 'secp384r1' }
const newKey = (kind: KeyKind): Uint8Array =>
  new Uint8Array(generateKeyPairSync('ec', { namedCurve: curves[kind] }).publicKey.export({ format: 'der', type: 'spki' }))

/** The shape is judged here, not the signature: two small integers will do. */
const signature = Uint8Array.of(0x30, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01)

/** Serials and subjects at their ends; the longest label of a host name where that makes a name, the longest id without it otherwise. */
const endsOf = ({ patterns }: Profile): readonly { readonly random: Uint8Array; readonly subject: string }[] => [
  { random: new Uint8Array(16), subject: 'a' },
  { random: new Uint8Array(16).fill(0xff), subject: 'z'.repeat(64) },
  ...(patterns.length === 0 ? [] : [{ random: new Uint8Array(16).fill(0x55), subject: 'z'.repeat(63) }]),
]

const sameList = <T>(one: readonly T[], ...others: readonly (readonly T[])[]): boolean =>
  others.every((other) => other.length === one.length && other.every((value, at) => value === one[at]))

/** Whether three parsers read what was ordered, and the same: our own (which has compared itself with node's already), node, and @peculiar/x509. */
const areAgreed = (bytes: Uint8Array, profile: Profile, { order, issuing, issuer }: Ordered): boolean => {
  const [own, second] = [parseCertificate(bytes), secondReading(bytes)]
  const { native } = own
  const subject = [...attributesOf(profile.attributes), ['CN', order.subject] as const]
  const short = new Map<string, string>([[oids.commonName, 'CN'], ...attributeNames.map((name) => [subjectAttributes[name].oid, name] as const)])
  const purposes = profile.eku === null ? [] : [order.role === undefined ? profile.eku : roleEku[order.role], ...profile.purposes]
  const usages = profile.usages.map((usage) => keyUsages[usage]).toSorted((one, other) => one - other)
  const names = altNamesOf(profile, order, issuing.tenant)
  const ofId = namesOf(profile, { tenant: issuing.tenant, id: order.subject })
  return (
    sameList([issuing.serial], [own.serial], [second.serial]) &&
    sameList(
      subject.map(([type, value]) => `${type}=${value}`),
      nameAttributes(own.subject).map(({ type, value }) => `${short.get(type) ?? type}=${value}`),
      second.attributes.map(([type, value]) => `${type}=${value}`),
    ) &&
    own.commonName === order.subject &&
    sameList([issuing.notBefore, issuing.notAfter], [own.notBefore, own.notAfter], [second.notBefore, second.notAfter]) &&
    Buffer.compare(own.spki, order.spki) === 0 &&
    Buffer.compare(second.spki, own.spki) === 0 &&
    native.publicKey.equals(createPublicKey({ key: Buffer.from(order.spki), format: 'der', type: 'spki' })) &&
    sameList(
      names.map((name) => Buffer.from(name).toString('hex')),
      own.altNames.map((name) => Buffer.from(name).toString('hex')),
    ) &&
    second.altNames.length === names.length &&
    (ofId.length === 0 ||
      (sameList(
        ofId.map((name) => name.slice(4)),
        second.altNames,
      ) &&
        native.subjectAltName === ofId.join(', '))) &&
    sameList(
      usages,
      [...(own.keyUsage ?? [])].toSorted((one, other) => one - other),
      second.usages,
    ) &&
    sameList(purposes, own.extKeyUsage ?? [], (native.keyUsage as readonly string[] | undefined) ?? [], second.purposes) &&
    [...extensionsOf(profile, issuer)].every(([id, critical]) => own.extensions.get(id)?.critical === critical && second.extensions.includes(id)) &&
    second.extensions.length === own.extensions.size
  )
}

interface Ordered {
  readonly order: CertificateOrder
  readonly issuing: Issuing
  readonly issuer: IssuerName
}

const checkOne = (profile: Profile, order: CertificateOrder, of: { issuer: IssuerName; serial: string; now: number }): void => {
  const { issuer, serial, now } = of
  const issuing = { tenant: 'check', serial, ...validityOf(profile, now) }
  const tbs = tbsOf(profile, order, issuer, issuing)
  const broken = lint({ tbs, algorithm: signatureAlgorithm, profile, order, issuer, of: issuing, now })
  if (broken.length > 0) throw new Error(`certificate profile ${order.profile} breaks ${broken.join(', ')}`)
  if (!areAgreed(certificateOf(tbs, signature), profile, { order, issuing, issuer }))
    throw new Error(`certificate profile ${order.profile} is read differently by different parsers`)
}

/**
 * Writes certificates of every profile, with every kind of key it admits, lints them, and has them read by our own reader, by node and by @peculiar/x509: a
 * profile that breaks a rule or that one of them reads differently must not issue anything. Run at start. Throws when one does.
 */
export const checkProfiles = (profiles: Profiles, now: number): void => {
  const status = {
    crl: (serial: string) => `http://check.example/crl/${serial.slice(-2)}`,
    ocsp: 'http://check.example/ocsp',
    issuer: 'http://check.example/ca.cer',
  }
  const named = { subject: nameOf('check'), spki: newKey('p256'), until: Infinity }
  for (const name of profileNames) {
    const profile = profiles[name]
    for (const kind of profile.keys)
      for (const { random, subject, issuer } of endsOf(profile).map((end, at): typeof end & { issuer: IssuerName } => ({
        ...end,
        issuer: at === 0 ? named : { ...named, status },
      })))
        checkOne(
          profile,
          {
            profile: name,
            subject,
            spki: newKey(kind),
            ...(profile.eku === 'role' ? { role: 'challenge' as const } : {}),
            ...(profile.names === 'hosts' ? { names: ['localhost', '127.0.0.1', '::1', '2001:db8::8:800:200c:417a'] } : {}),
          },
          { issuer, serial: serialOf(random, now), now },
        )
  }
}
