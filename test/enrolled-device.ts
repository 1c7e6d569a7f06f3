import { createECDH, generateKeyPairSync } from 'node:crypto'
import type { DeviceId } from '@fleetkey/protocol/ids.ts'
import type { EnrolledDevice } from '@fleetkey/server/fleet/device.ts'

/** A recipient's P-256 key: `spki` DER, `point` uncompressed, `dh` the shared x coordinate with another point. */
export interface Recipient {
  readonly spki: Uint8Array
  readonly point: Uint8Array
  dh(point: Uint8Array): Promise<Uint8Array>
}

export const p256 = (): Recipient => {
  const { privateKey, publicKey } = generateKeyPairSync('ec', { namedCurve: 'prime256v1' })
  const spki = new Uint8Array(publicKey.export({ format: 'der', type: 'spki' }))
  const ecdh = createECDH('prime256v1')
  ecdh.setPrivateKey(Buffer.from((privateKey.export({ format: 'jwk' }) as { d: string }).d, 'base64url'))
  return { spki, point: spki.slice(-65), dh: async (point) => new Uint8Array(ecdh.computeSecret(point)) }
}

/** Row of a device as enrolment leaves it, for tests that begin after it. `ldevidSpki`: the recipient's key unless told. */
export const enrolledDevice = (
  id: DeviceId,
  of: { readonly spki: Uint8Array; readonly at: number; readonly batch?: string; readonly ldevidSpki?: Uint8Array },
): EnrolledDevice => ({
  id,
  version: 0,
  state: 'enrolled',
  serial: id.toUpperCase(),
  model: 'gateway',
  batch: of.batch ?? 'b1',
  registeredAt: of.at,
  lastRefusal: null,
  keys: { hardware: `idevid/${id}`, recipientSpki: of.spki, ldevidSpki: of.ldevidSpki ?? of.spki },
  enrolledAt: of.at,
  ldevidSerial: `${id}-1`,
  tlsSerial: `${id}-2`,
  previousTlsSerial: null,
  resetCount: 0,
  reportedResetCount: 0,
  release: null,
  floor: 0,
  assurance: 'attested',
  verdict: { verdict: 'affirming', reason: 'firmware.unmeasured', detail: '', release: null, at: of.at, claims: [] },
  attestOrderedAt: null,
  lastSeenAt: of.at,
  agent: 'test',
})
