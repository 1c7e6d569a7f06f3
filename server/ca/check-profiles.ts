import { createPublicKey, generateKeyPairSync } from 'node:crypto'
import { nameOf, parseCertificate } from '@fleetkey/protocol/x509/certificate.ts'
import { secondReading } from '@fleetkey/protocol/x509/library.ts'
import type { KeyKind } from '@fleetkey/protocol/x509/request/key.ts'
import { lint } from './lint/lint.ts'
import { profileNames, validityOf, type Profile, type Profiles } from './profiles.ts'
import { certificateOf, extensionsOf, serialOf, signatureAlgorithm, tbsOf, type CertificateOrder, type IssuerName } from './tbs.ts'

const curves: Readonly<Record<KeyKind, string>> = { p256: 'prime256v1', p384: 'secp384r1' }
const newKey = (kind: KeyKind): Uint8Array =>
  new Uint8Array(generateKeyPairSync('ec', { namedCurve: curves[kind] }).publicKey.export({ format: 'der', type: 'spki' }))

/** The shape is judged here, not the signature: two small integers will do. */
const signature = Uint8Array.of(0x30, 0x06, 0x02, 0x01, 0x01, 0x02, 0x01, 0x01)

/** Serials and subjects at their ends. */
const ends = [
  { random: new Uint8Array(16), subject: 'a' },
  { random: new Uint8Array(16).fill(0xff), subject: 'z'.repeat(64) },
] as const

const checkOne = (profile: Profile, order: CertificateOrder, of: { issuer: IssuerName; serial: string; now: number }): void => {
  const { issuer, serial, now } = of
  const validity = validityOf(profile, now)
  const issuing = { tenant: 'check', serial, ...validity }
  const tbs = tbsOf(profile, order, issuer, issuing)
  const broken = lint({ tbs, algorithm: signatureAlgorithm, profile, order, issuer, of: issuing, now })
  if (broken.length > 0) throw new Error(`certificate profile ${order.profile} breaks ${broken.join(', ')}`)
  const bytes = certificateOf(tbs, signature)
  // Our own reader throws when node's reading differs from its own.
  const [own, second] = [parseCertificate(bytes), secondReading(bytes)]
  const same =
    own.serial === serial &&
    second.serial === serial &&
    own.commonName === order.subject &&
    own.native.subject === `CN=${order.subject}` &&
    second.subject === `CN=${order.subject}` &&
    own.notAfter === validity.notAfter &&
    second.notBefore === own.notBefore &&
    second.notAfter === own.notAfter &&
    Buffer.compare(own.spki, order.spki) === 0 &&
    Buffer.compare(second.spki, own.spki) === 0 &&
    own.native.publicKey.equals(createPublicKey({ key: Buffer.from(order.spki), format: 'der', type: 'spki' })) &&
    own.altNames.length === second.altNames.length &&
    [...extensionsOf(profile, issuer)].every(([id, critical]) => own.extensions.get(id)?.critical === critical && second.extensions.includes(id)) &&
    second.extensions.length === own.extensions.size
  if (!same) throw new Error(`certificate profile ${order.profile} is read differently by different parsers`)
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
      for (const { random, subject, issuer } of ends.map((end, at): typeof end & { issuer: IssuerName } => ({
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
