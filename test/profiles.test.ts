import { execFileSync } from 'node:child_process'
import { X509Certificate } from 'node:crypto'
import { mkdtempSync, rmSync, writeFileSync } from 'node:fs'
import { request as httpsRequest } from 'node:https'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { newTlsKey } from '@fleetkey/device-agent/tls-key.ts'
import { profilesOf, ProfileSettings } from '@fleetkey/server/ca/profile-settings.ts'
import { defaultProfiles, type Profiles } from '@fleetkey/server/ca/profiles.ts'
import { openAuthority } from '@fleetkey/server/flows/authority.ts'
import { certificatesIn } from './est-answer.ts'
import { testContext, type TestContext } from './harness.ts'
import { hasProgram } from './programs.ts'
import { given, openDevices, type Device } from './returning.ts'
import { openWorld, until } from './world.ts'

const settings = {
  'server-tls': { subject: { C: 'DE', O: 'Plant' }, usages: ['keyAgreement'] },
  'server-signing': { subject: { O: 'Plant' } },
  'device-identity': { subject: { C: 'DE', O: 'Plant' }, names: ['URI:urn:plant:{id}'], usages: ['contentCommitment'], purposes: ['1.3.6.1.4.1.4711.1'] },
  'device-tls': {
    subject: { C: 'DE', O: 'Müller & Söhne, GmbH', OU: 'Gateways' },
    names: ['DNS:{id}.devices.example', 'URI:https://plant.example/{tenant}/{id}'],
    usages: ['keyAgreement'],
    purposes: ['eapOverLAN', '1.3.6.1.4.1.4711.2'],
  },
}
const plainName = /^CN=[a-z0-9-]+$/
/** Subject, alternative names and purposes of what the settings above make. */
const added = (id: string, tenant: string) => ({
  subject: `C=DE\nO=Müller & Söhne\\, GmbH\nOU=Gateways\nCN=${id}`,
  subjectAltName: `URI:spiffe://${tenant}/device/${id}, DNS:${id}.devices.example, URI:https://plant.example/${tenant}/${id}`,
  keyUsage: ['1.3.6.1.5.5.7.3.2', '1.3.6.1.5.5.7.3.14', '1.3.6.1.4.1.4711.2'],
})
const read = (bytes: Uint8Array | string) => {
  const { subject, subjectAltName, keyUsage } = new X509Certificate(bytes)
  return { subject, subjectAltName, keyUsage }
}

describe('a device, over changes of the configuration', () => {
  let ctx: TestContext
  let device: Device
  beforeEach(async () => {
    ctx = await testContext()
    ;[device] = (await openDevices(ctx)) as [Device]
  })
  afterEach(async () => await ctx.close())
  const configured = async (profiles: Profiles): Promise<void> => void Object.assign(ctx.authority, await openAuthority(ctx, { profiles }))
  const renewed = async () => {
    const key = newTlsKey()
    const answer = await device.renew(await device.open(), { key })
    if (answer.type !== 'identity') throw new Error(`refused: ${answer.code}`)
    return { key, certificate: answer.tls }
  }
  const identity = async (): Promise<Uint8Array> => {
    const row = await ctx.store.get('certificate', (await device.row()).ldevidSerial)
    return row?.der ?? new Uint8Array()
  }

  test('goes on with the certificate that it has, and renews to the form of the day', async () => {
    const first = given(await device.prove('enrol'))
    expect(read(first.certificate).subject).toMatch(plainName)
    await configured(profilesOf(ProfileSettings.parse(settings)))
    expect(await device.connect(first)).toBe('accepted')
    const second = await renewed()
    expect(read(second.certificate)).toEqual(added('gw-1', 'plant'))
    // The one before is good until the new one was used.
    expect([await device.connect(first), await device.connect(second), await device.connect(first)]).toEqual(['accepted', 'accepted', 'forbidden'])
    // Its identity was not renewed: that is for an enrolment.
    expect(read(await identity()).subject).toMatch(plainName)
    const third = given(await device.prove('return'))
    expect(read(third.certificate)).toEqual(added('gw-1', 'plant'))
    expect(await device.connect(third)).toBe('accepted')
    const fourth = given(await device.prove('enrol'))
    expect(read(await identity())).toEqual({
      subject: 'C=DE\nO=Plant\nCN=gw-1',
      subjectAltName: 'URI:spiffe://plant/device/gw-1, URI:urn:plant:gw-1',
      keyUsage: ['1.3.6.1.4.1.58888.1.16', '1.3.6.1.4.1.4711.1'],
    })
    await configured(defaultProfiles)
    expect(await device.connect(fourth)).toBe('accepted')
    const last = await renewed()
    expect(read(last.certificate)).toMatchObject({ subject: 'CN=gw-1', subjectAltName: 'URI:spiffe://plant/device/gw-1' })
    expect(await device.connect(last)).toBe('accepted')
  })
})

describe.skipIf(!hasProgram('openssl'))('a server, over changes of its configuration', () => {
  const folder = mkdtempSync(join(tmpdir(), 'fk-profiles-'))
  const at = (name: string): string => join(folder, name)
  afterEach(() => rmSync(folder, { recursive: true, force: true }))
  const openssl = (...args: readonly string[]): string => execFileSync('openssl', args, { encoding: 'utf8', stdio: ['ignore', 'pipe', 'ignore'] })
  const configure = (profiles: object): void => writeFileSync(at('config.json'), JSON.stringify({ profiles }))

  test('devices with and without an agent enrol, connect, renew and are revoked', { timeout: 120_000 }, async () => {
    configure({})
    const world = await openWorld({ args: ['--est-port', '0', '--config', at('config.json')] })
    try {
      const [one, two] = [await world.simulated('GW-1'), await world.simulated('GW-2')]
      const batch = await world.enlist([one, two, { serial: 'PL-1' }], 'plant')
      const tls = async (id: string): Promise<string> => {
        const { items } = await world.client.call('certificate.list', { query: { device: id, profile: 'device-tls', state: 'valid' } })
        return (await world.client.call('certificate.show', { params: { id: items.at(-1)?.serial ?? '' } })).pem
      }
      const est = async (path: string, csr: string, more: { readonly auth?: string; readonly cert?: string; readonly key?: string }): Promise<string> => {
        const body = openssl('base64', '-in', csr)
        const { auth, ...own } = more
        const answer = await new Promise<{ status: number | undefined; body: string }>((resolve, reject) => {
          const headers = { 'content-type': 'application/pkcs10', ...(auth === undefined ? {} : { authorization: auth }) }
          const target = { host: '127.0.0.1', port: world.server.estPort ?? 0, path: `/.well-known/est/${path}`, method: 'POST', agent: false }
          const asked = httpsRequest({ ...target, ca: world.bundle.trust[0], headers, ...own }, (response) => {
            let text = ''
            response.setEncoding('utf8').on('data', (part: string) => void (text += part))
            response.on('end', () => resolve({ status: response.statusCode, body: text }))
          })
          asked.on('error', reject)
          asked.end(body)
        })
        expect(answer).toMatchObject({ status: 200 })
        return certificatesIn(answer.body)[0] ?? ''
      }
      const newKey = (name: string): string => {
        writeFileSync(at(`${name}.key`), openssl('genpkey', '-algorithm', 'EC', '-pkeyopt', 'ec_paramgen_curve:P-256'))
        return at(`${name}.key`)
      }
      let renewals = 0
      /** As a client does that asks for everything the certificate in hand has: its subject, names, usages and purposes. */
      const copied = async (own: { readonly cert: string; readonly key: string }): Promise<{ readonly cert: string; readonly key: string }> => {
        const name = `renewal-${++renewals}`
        writeFileSync(at('own.pem'), own.cert)
        const key = newKey(name)
        const csr = at(`${name}.der`)
        openssl('x509', '-x509toreq', '-copy_extensions', 'copyall', '-in', at('own.pem'), '-key', key, '-out', at('copy.pem'))
        openssl('req', '-in', at('copy.pem'), '-outform', 'DER', '-out', csr)
        return { cert: await est('simplereenroll', csr, own), key: openssl('pkey', '-in', key) }
      }

      const first = world.agent(one)
      await until('it enrols', () => first.status().connected)
      expect(read(await tls('gw-1')).subject).toBe('CN=gw-1')
      const key = newKey('plain')
      openssl('req', '-new', '-key', key, '-subj', '/CN=pl-1', '-outform', 'DER', '-out', at('plain.der'))
      const auth = `Basic ${Buffer.from(`pl-1:${await world.token(batch, { device: 'pl-1' })}`).toString('base64')}`
      const plain = { cert: await est('simpleenroll', at('plain.der'), { auth }), key: openssl('pkey', '-in', key) }
      expect(read(plain.cert).subject).toBe('CN=pl-1')

      configure(settings)
      await world.restart()
      await until('it is back', () => first.status().connected)
      expect(first.status().lastRefusal).toBeNull()
      const second = world.agent(two)
      await until('another enrols', () => second.status().connected)
      expect(read(await tls('gw-2'))).toEqual(added('gw-2', 'default'))
      // By the certificate from before, asking for what that one has; then by the new one, in the same way.
      const other = await copied(plain)
      expect(read(other.cert)).toEqual(added('pl-1', 'default'))
      const third = await copied(other)
      expect(read(third.cert)).toEqual(added('pl-1', 'default'))
      // A key for both, proven in use: messages go through, whatever the certificates look like.
      await world.client.call('key.create', { body: { id: 'telemetry', protection: 'sealed' } })
      await world.client.call('key.grant', { params: { id: 'telemetry' }, body: { group: 'plant' } })
      await until('both use it', () => [first, second].every((agent) => agent.status().current['telemetry'] === 1), 60_000)

      configure({})
      await world.restart()
      await until('both are back', () => first.status().connected && second.status().connected)
      const last = await copied(third)
      expect(read(last.cert)).toMatchObject({ subject: 'CN=pl-1', subjectAltName: 'URI:spiffe://default/device/pl-1' })
      const pem = await tls('gw-2')
      await world.client.call('device.revoke', { params: { id: 'gw-2' }, body: { reason: 'stolen' } })
      await until('it is cut off', () => !second.status().connected)
      const { items } = await world.client.call('certificate.list', { query: { device: 'gw-2', profile: 'device-tls', state: 'revoked' } })
      expect(items.map(({ serial }) => serial)).toEqual([new X509Certificate(pem).serialNumber.toLowerCase()])
    } finally {
      await world.stop()
    }
  })
})
