import { generateKeyPairSync, randomBytes, randomInt } from 'node:crypto'
import { describe, expect, test } from 'vitest'
import { nameOf } from '@fleetkey/protocol/x509/certificate.ts'
import { lint } from './lint/lint.ts'
import { ProfileSettings, profilesOf } from './profile-settings.ts'
import { backdate, defaultProfiles, validityOf } from './profiles.ts'
import { serialOf, signatureAlgorithm, tbsOf, type CertificateOrder, type IssuerName, type Issuing } from './tbs.ts'
import { fillTemplate, writeClean, type Filling } from './template.ts'

const newKey = (): Uint8Array => new Uint8Array(generateKeyPairSync('ec', { namedCurve: 'prime256v1' }).publicKey.export({ format: 'der', type: 'spki' }))
const issuer = { subject: nameOf('ca'), spki: newKey(), until: Infinity }
const now = Date.UTC(2027, 0, 1)
const names = ['device-identity', 'device-tls', 'station'] as const

const letters = 'abcdefghijklmnopqrstuvwxyz0123456789-'
const idOf = (length: number): string => `a${Array.from({ length: length - 1 }, () => letters[randomInt(letters.length)]).join('')}`
const orderOf = (
  profile: (typeof names)[number],
  odd: { order?: Partial<CertificateOrder>; of?: Partial<Issuing>; issuer?: IssuerName; now?: number } = {},
): Filling => {
  const at = odd.now ?? now
  return {
    profile: defaultProfiles[profile],
    order: { profile, subject: 'gw-1', spki: newKey(), ...odd.order },
    issuer: odd.issuer ?? issuer,
    of: { tenant: 'plant', serial: serialOf(randomBytes(12), at), ...validityOf(defaultProfiles[profile], at), ...odd.of },
    now: at,
  }
}

test('what a template makes is what the writer makes, and breaks no rule', () => {
  for (let done = 0; done < 600; done++) {
    const subject = idOf(1 + (done % 64))
    const at = now + randomInt(10 * 365 * 86_400) * 1000 + randomInt(1000)
    const tenant = done % 3 === 0 ? 'plant' : `t-${done % 5}`
    const filling = orderOf(names[done % 3] ?? 'station', { order: { subject }, of: { tenant }, now: at })
    const { profile, order, of } = filling
    const made = fillTemplate(filling)
    expect(Buffer.from(made ?? [])).toEqual(Buffer.from(tbsOf(profile, order, issuer, of)))
    expect(lint({ ...filling, tbs: made ?? new Uint8Array(), algorithm: signatureAlgorithm })).toEqual([])
  }
})

test('names that look like other parts of the certificate', () => {
  for (const subject of ['z', 'zz', 'device', 'station', 'plant', 'ca', 'spiffe', '270101000000z', 'z'.repeat(64)])
    for (const name of names) {
      const filling = orderOf(name, { order: { subject }, of: { tenant: 'device' } })
      const made = fillTemplate(filling)
      if (made !== undefined) expect(Buffer.from(made)).toEqual(Buffer.from(tbsOf(filling.profile, filling.order, issuer, filling.of)))
      expect(writeClean(filling)).toBeDefined()
    }
})

describe('profiles with everything that a configuration can add', () => {
  const added = profilesOf(
    ProfileSettings.parse({
      'device-identity': { subject: { C: 'DE', O: 'Zzz' }, names: ['URI:urn:plant-identity:{tenant}:{id}'], usages: ['contentCommitment'] },
      'device-tls': {
        subject: { O: 'Müller & Söhne, GmbH', OU: 'device', ST: 'Baden-Württemberg', L: 'Ulm', C: 'DE' },
        names: ['DNS:{id}.{tenant}.devices.example.com', `URI:https://example.com/${'d/'.repeat(50)}{id}`],
        usages: ['keyAgreement'],
        purposes: ['ipsecIKE', 'eapOverLAN', '1.3.6.1.4.1.4711.1'],
      },
      station: { subject: { O: 'station' }, names: ['URI:urn:plant-station:{id}'], purposes: ['1.3.6.1.4.1.4711.2'] },
    }),
  )
  const fillingOf = (name: (typeof names)[number], subject: string, tenant = 'plant'): Filling => ({
    ...orderOf(name, { order: { subject }, of: { tenant } }),
    profile: added[name],
    of: { tenant, serial: serialOf(randomBytes(12), now), ...validityOf(added[name], now) },
  })

  test('what a template makes is what the writer makes, for ids of every length', () => {
    for (let length = 1; length <= 63; length++)
      for (const name of names) {
        const filling = fillingOf(
          name,
          idOf(length)
            .replace(/^(..)--/, '$1aa')
            .replace(/-$/, 'a'),
        )
        const made = fillTemplate(filling)
        expect(made, `${name} ${filling.order.subject}`).toBeDefined()
        expect(Buffer.from(made ?? [])).toEqual(Buffer.from(tbsOf(filling.profile, filling.order, issuer, filling.of)))
        expect(lint({ ...filling, tbs: made ?? new Uint8Array(), algorithm: signatureAlgorithm })).toEqual([])
      }
  })

  test.each(['z'.repeat(64), 'gw-', 'xn--gw'])('an id that is no label of a host name has no such name, no template, and a certificate: %s', (subject) => {
    const filling = fillingOf('device-tls', subject)
    expect(fillTemplate(filling)).toBeUndefined()
    const made = Buffer.from(writeClean(filling))
    expect([made.includes('devices.example.com'), made.includes(`example.com/${'d/'.repeat(50)}${subject}`)]).toEqual([false, true])
    // Where only URIs are made, every id has its template.
    expect(fillTemplate(fillingOf('station', subject))).toBeDefined()
  })

  test('names that look like other parts of the certificate', () => {
    for (const subject of ['z', 'zz', 'device', 'station', 'devices', 'example', 'd'])
      for (const name of names) {
        const filling = fillingOf(name, subject, 'device')
        expect(Buffer.from(writeClean(filling))).toEqual(Buffer.from(tbsOf(filling.profile, filling.order, issuer, filling.of)))
      }
  })
})

describe('what does not keep the rules has no template, and the lint says why', () => {
  const wrongPoint = (): Uint8Array => {
    const spki = newKey()
    spki[90] = (spki[90] ?? 0) ^ 1
    return spki
  }
  const { notBefore, notAfter } = validityOf(defaultProfiles['device-tls'], now)
  const rows: readonly (readonly [string, Parameters<typeof orderOf>[1], string])[] = [
    ['a point beside the curve', { order: { spki: wrongPoint() } }, 'lint.key.on-curve'],
    ['the key of the issuer', { order: { spki: issuer.spki } }, 'lint.key.issuer'],
    ['no id', { order: { subject: 'gw/1' } }, 'lint.subject.id'],
    ['65 characters', { order: { subject: 'g'.repeat(65) } }, 'lint.subject.length'],
    ['a short serial', { of: { serial: '41'.repeat(7) } }, 'lint.serial.entropy'],
    ['a life too long', { of: { notAfter: notAfter + 1000 } }, 'lint.validity.life'],
    ['longer than its issuer', { issuer: { ...issuer, until: notAfter - 1000 } }, 'lint.validity.issuer'],
    ['an end before the beginning', { of: { notAfter: notBefore - 1000 } }, 'lint.validity.order'],
    ['a beginning too early', { of: { notBefore: now - 3 * backdate, notAfter: notAfter - 3 * backdate } }, 'lint.validity.backdate'],
    ['a beginning to come', { of: { notBefore: now + 1000, notAfter } }, 'lint.validity.backdate'],
  ]
  test.each(rows)('%s', (_, odd, reason) => {
    const filling = orderOf('device-tls', odd)
    expect(fillTemplate(filling)).toBeUndefined()
    expect(() => writeClean(filling)).toThrow(expect.objectContaining({ reason }))
  })

  test('a certificate that names where others ask about it is written whole: the place depends on its serial', () => {
    const status = {
      crl: (serial: string): string => `http://ca.example/${serial.slice(-1)}`,
      ocsp: 'http://ca.example/ocsp',
      issuer: 'http://ca.example/ca.cer',
    }
    const filling = { ...orderOf('device-identity'), issuer: { ...issuer, status } }
    expect(fillTemplate(filling)).toBeUndefined()
    expect(Buffer.from(writeClean(filling)).includes(`http://ca.example/${filling.of.serial.slice(-1)}`)).toBe(true)
    expect(fillTemplate(orderOf('device-identity'))).toBeDefined()
  })

  test('a certificate that ends after 2049 is written whole', () => {
    const late = Date.UTC(2049, 11, 31, 23)
    const filling = orderOf('device-tls', { now: late })
    expect(fillTemplate(filling)).toBeUndefined()
    expect(Buffer.from(writeClean(filling)).includes('20500102')).toBe(true)
  })
})
